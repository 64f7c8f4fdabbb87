"""Benchmarks and the training script of the demo model."""
