"""Tuning: measure which backend serves a layer fastest on the GPU at hand (``python -m sglang_modelopt_ext.tuning``)."""
