"""MXFP4 and NVFP4 weights times FP8 activations on SM90, in Gluon: weights are fetched before the kernels ahead have ended."""

from sglang_modelopt_kernels.gemm.w4_stream.available import missing
from sglang_modelopt_kernels.gemm.w4_stream.linear import path_of, streamed_linear
from sglang_modelopt_kernels.gemm.w4_stream.naive import naive_streamed_linear
from sglang_modelopt_kernels.gemm.w4_stream.packing import StreamedWeight, stream_folded, stream_nvfp4, unstream

__all__ = [
    "StreamedWeight",
    "missing",
    "naive_streamed_linear",
    "path_of",
    "stream_folded",
    "stream_nvfp4",
    "streamed_linear",
    "unstream",
]
