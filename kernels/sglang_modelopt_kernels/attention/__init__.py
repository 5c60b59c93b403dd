"""Attention over quantized KV caches (Triton): decode, extend, and the store of new tokens, one folder each."""
