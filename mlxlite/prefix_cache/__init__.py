"""The prefix cache: FNV-1a keys, a radix index of blocks, files on disk.

The index decides what is kept, shared and evicted, within a byte budget; the runner and the files
carry out its operations. A hit compares tokens, not only keys. Never imports MLX.
"""
