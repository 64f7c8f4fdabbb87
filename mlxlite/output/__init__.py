"""Output: a sequence's tokens to text, reasoning and tool calls; grammars that constrain them.

A `Generation` is one sequence's sink: detokenizer, stop strings, parser, events. What all pushes
and the flush give together depends on the tokens alone, never on how they were split. Each piece of
text is looked at once; the work for a token is bounded.
"""
