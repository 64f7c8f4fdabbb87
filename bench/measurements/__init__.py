"""The sections of a run. Comparisons are interleaved (A B A B …); each pair has its own prompts."""
