"""The commands as functions: quantize, choose formats, inspect, serve, verify and evaluate."""
