"""The prefix cache: FNV-1a keys, a radix index of blocks, files on disk; never imports MLX."""
