"""Models: find and load a checkpoint; its tokenizer and its chat template."""
