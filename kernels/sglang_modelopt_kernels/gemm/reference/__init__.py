"""Reference product: weights decoded once at load, a dense matrix product for each call."""

from sglang_modelopt_kernels.gemm.reference.dense import dense_linear, prepare_dense
from sglang_modelopt_kernels.gemm.reference.naive import naive_linear

__all__ = ["dense_linear", "naive_linear", "prepare_dense"]
