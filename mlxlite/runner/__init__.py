"""The runner: one step on the device, on the device thread alone.

Merges and packs KV caches, runs prefill chunks and one decode forward for all rows, samples them
together, and carries out the prefix cache's operations. A step is dispatched before the one before
it is awaited. A row's text is the same alone and in any batch.
"""
