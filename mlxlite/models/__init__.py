"""Models: find, download and load a checkpoint; its tokenizer and its chat template.

`load` returns the network, which only the device thread may touch, apart from the `Model`, which
any thread may use. Every way in which a checkpoint is unusable is a `LoadError` with its remedy.
Nothing from a checkpoint is executed: no remote code, no pickle; templates run in a sandbox.
"""
