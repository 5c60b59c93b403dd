"""The product of all experts for many tokens: weights decoded once into a bounded scratch buffer, then large dense tiles."""

from sglang_modelopt_kernels.moe.grouped.dense.launch import config_of, run_dense, takes_dense

__all__ = ["config_of", "run_dense", "takes_dense"]
