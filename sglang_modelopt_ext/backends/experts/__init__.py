"""Backends of the experts of a mixture."""
