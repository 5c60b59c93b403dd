"""Backends of layers, one for each way to keep a weight, and the choice among them."""
