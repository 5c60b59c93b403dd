"""Quantization at load: an unquantized checkpoint is written once, without data, as the checkpoint that a server then reads."""
