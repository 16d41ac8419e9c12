"""Whether what was made computes what it was made from."""
