"""Parts of every tiled product: configurations, split-K, the epilogue (scales and bias after the sum), and the launch."""

from sglang_modelopt_kernels.gemm.common.epilogue import Epilogue, check_epilogue
from sglang_modelopt_kernels.gemm.common.launch import (
    KernelConfig,
    choose,
    launch,
    machine,
    matrix_instruction,
    needs_drain,
    path,
)
from sglang_modelopt_kernels.gemm.common.naive import naive_epilogue, naive_finish
from sglang_modelopt_kernels.gemm.common.wgmma import checked

__all__ = [
    "Epilogue",
    "KernelConfig",
    "check_epilogue",
    "checked",
    "choose",
    "launch",
    "machine",
    "matrix_instruction",
    "naive_epilogue",
    "naive_finish",
    "needs_drain",
    "path",
]
