"""Backends of the experts of a mixture: one product each, or a whole layer."""
