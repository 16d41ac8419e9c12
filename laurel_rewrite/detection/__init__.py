"""Which sums are residual connections, what carries them, and where they stand."""
