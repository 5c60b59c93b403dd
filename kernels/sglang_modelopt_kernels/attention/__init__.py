"""Attention over quantized KV caches."""
