"""Output: tokens to text, reasoning and tool calls; grammars that constrain them."""
