"""Product of all experts for many tokens: weights decoded once into a bounded scratch buffer, then large dense tiles.

The naive twin is :func:`moe.grouped.naive_grouped_linear`, as for the product that decodes in registers.
"""

from sglang_modelopt_kernels.moe.grouped.dense.launch import dense_block, run_dense, takes_dense

__all__ = ["dense_block", "run_dense", "takes_dense"]
