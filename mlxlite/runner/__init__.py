"""The runner: one step on the device; KV caches, forward passes, sampling."""
