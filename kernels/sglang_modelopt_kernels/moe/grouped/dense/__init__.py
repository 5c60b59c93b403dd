"""The product of all experts for many tokens: weights decoded once into a bounded scratch buffer, then large dense tiles."""

from sglang_modelopt_kernels.moe.grouped.dense.launch import dense_block, run_dense, takes_dense

__all__ = ["dense_block", "run_dense", "takes_dense"]
