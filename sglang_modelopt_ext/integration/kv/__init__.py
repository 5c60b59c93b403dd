"""Quantized KV caches of this package in SGLang: checks of flags, scales, pools and attention."""
