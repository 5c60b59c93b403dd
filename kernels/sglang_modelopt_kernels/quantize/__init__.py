"""Rounding of activations, one folder for each kernel.

Naive twins of the rounding in registers (``kernel.py``): :func:`formats.e4m3.to_e4m3` and :func:`formats.e2m1.encode`.
"""
