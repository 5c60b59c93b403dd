"""Product of all experts on SM90 for 4-bit weights kept tile by tile and FP8 activations, in Gluon.

It is one of those of :func:`moe.grouped.grouped_linear`; the naive twin is :func:`moe.grouped.naive_grouped_linear`.
"""
