"""The contents of a checkpoint and the kernels that serve it."""
