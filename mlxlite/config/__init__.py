"""Configuration: every flag once, as a field of a dataclass.

The field declares its flag, its environment variable, its check and its row in the documentation.
Imports nothing heavy: `--help` waits for this room alone.
"""
