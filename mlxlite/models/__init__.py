"""Models: find a checkpoint, load it, and turn chat messages into prompts.

`load` gives two things that must not be mixed. The network is made of MLX arrays: it belongs to the
device thread and goes to the runner. The `Model` is everything else that is known of a checkpoint
(tokenizer, chat template, grammars, sizes, defaults); any thread may use it, and it never changes.

Every way in which a model can be unusable is a `LoadError` that names the remedy. Nothing from a
checkpoint is ever executed: no remote code, no pickle; chat templates run in transformers' Jinja
sandbox, for a limited time.
"""
