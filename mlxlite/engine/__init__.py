"""The engine: queue, admission, steps, memory. Pure but for the tick; never imports MLX."""
