"""What each op does to the data that goes through it, in tables."""
