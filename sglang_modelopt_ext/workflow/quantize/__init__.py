"""Quantization of a model to a checkpoint."""
