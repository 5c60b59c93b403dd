"""Quantized KV caches in SGLang."""
