"""The contents of a checkpoint, and what would serve it."""
