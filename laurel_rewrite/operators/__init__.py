"""What is put in the place of a residual connection."""
