"""Product of all experts on SM90 for MXFP4 weights kept tile by tile and FP8 activations, in Gluon.

It is one of those of :func:`moe.grouped.grouped_linear`; the naive twin is :func:`moe.grouped.naive_grouped_linear`.
"""
