"""The engine: queue, admission, preemption, steps and memory; tokens in, tokens out.

The scheduler is pure: the same commands and tokens give the same steps, and no clock, socket or
device is read in a decision. The tick runs it on the event loop and the model on one device thread,
one step ahead. Every sequence ends with exactly one `Finished`. Never imports MLX.
"""
