"""Benchmarks against mlx-lm's own loops, and the training script of the demo model."""
