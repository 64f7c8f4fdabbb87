"""The endpoints, one dialect a file; no file here imports another."""
