"""Random operands of the registered kernels, and the names of Triton's types."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.registry.base import Case
from sglang_modelopt_kernels.formats.base import DecodedWeight
from sglang_modelopt_kernels.gemm.common import KernelConfig, machine
from sglang_modelopt_kernels.gemm.common.launch import masks
from sglang_modelopt_kernels.gemm.w4_decode.packing import Kind

KINDS: tuple[tuple[Kind, int], ...] = (
    ("e2m1_e4m3", 16),
    ("e2m1_e4m3", 32),
    ("e2m1_exponent", 32),
    ("int4_float", 128),
)
"""Kinds of packed 4-bit weights and the K elements under a block scale."""
TRITON_TYPES = {
    torch.int8: "i8",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
}
DTYPES = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Activations by the name that stress cases have."""

N = 4096
"""Output features of a stress case's weight."""
WIDTHS = {"whole": 4096, "half": 4096 - 128, "tail": 4096 - 32}
"""K of a stress case: whole tiles of every configuration, whole tiles of the narrow ones, and neither."""
FILLING = 3
"""Programs for each SM in a stress case, at the least."""
MOST_TOKENS = 2301
MANY = (300, 900, 2304)
"""Tokens for which a weight is decoded before the product."""
SPLIT = 4


def capability() -> int:
    """Return the compute capability of the GPU at hand, times ten."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def activation_types(arch: int) -> tuple[str, ...]:
    """Return Triton's names of the activations that ``arch`` multiplies: E4M3 from SM89 on."""
    return ("fp16", "bf16") if arch < 89 else ("fp8e4nv", "fp16", "bf16")


def product_case(
    name: str, kernel: Any, config: KernelConfig, operands: dict[str, str], numerics: dict[str, Any], matrix: str
) -> Case:
    """Make the compilation of a tiled product: one configuration, every scale and the bias, K a multiple of BK, no split."""
    types = operands | dict.fromkeys(("row_scale_ptr", "out_scale_ptr"), "*fp32")
    types |= dict.fromkeys(("bias_ptr", "y_ptr"), "*bf16") | dict.fromkeys(("m", "n", "k", "row_step"), "i32")
    types |= {"partial_ptr": "*fp32", "arrivals_ptr": "*i32"}
    tile = {"BN": config.bn, "BM": config.bm, "BK": config.bk}
    every = {
        "DESCALE": 1.0,
        "HAS_ROW_SCALE": True,
        "HAS_BIAS": True,
        "EVEN_M": not masks(config),
        "EVEN_K": True,
        "SPLIT_K": 1,
    }
    constexprs = every | tile | numerics
    return Case(
        f"{name} {config}",
        kernel,
        {key: value for key, value in types.items() if key in kernel.arg_names},
        {key: value for key, value in constexprs.items() if key in kernel.arg_names},
        {"num_warps": config.warps, "num_stages": config.stages},
        aligned=("n", "k"),
        matrix=matrix,
        weights=config.bn * config.bk,
    )


def random_codes(n: int, k: int) -> torch.Tensor:
    """Make random 4-bit codes, uint8 ``[N, K / 2]``, two to a byte."""
    return torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)


def random_scale(kind: str, n: int, k: int) -> torch.Tensor:
    """Make random block scales as stored: UE8M0 ``[N, K / 32]`` for "mxfp4", else E4M3 ``[N, K / 16]``."""
    if kind == "mxfp4":
        return torch.randint(118, 128, (n, k // 32), device="cuda").to(torch.uint8)
    return (torch.rand(n, k // 16, device="cuda") + 0.5).to(torch.float8_e4m3fn)


def random_int8(m: int, k: int) -> torch.Tensor:
    """Make random INT8 values ``[M, K]``."""
    return torch.randint(-128, 128, (m, k), device="cuda", dtype=torch.int8)


def random_bf16(m: int, k: int) -> torch.Tensor:
    """Make random bf16 values ``[M, K]``."""
    return torch.randn(m, k, device="cuda", dtype=torch.bfloat16)


def random_fp8(m: int, k: int) -> torch.Tensor:
    """Make random E4M3 values ``[M, K]``."""
    return torch.randn(m, k, device="cuda").to(torch.float8_e4m3fn)


def tokens_for(config: KernelConfig, split: int) -> int:
    """Return a number of tokens, no multiple of BM, for which the programs of a configuration fill the GPU."""
    tiles = FILLING * machine(torch.device("cuda", 0))[1] // (-(-N // config.bn) * split) + 1
    return min(tiles * config.bm, max(MOST_TOKENS, config.bm)) - (3 if config.bm > 4 else 0)


def stress_activations(tokens: int, k: int, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Make E4M3 values in a dtype of DTYPES, ``[M, K]``, and their scales, fp32 ``[M, 1]``; the same for the same tokens."""
    generator = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(tokens, k, generator=generator, device="cuda").to(torch.float8_e4m3fn)
    row_scale = torch.rand(tokens, 1, generator=generator, device="cuda") + 0.5
    return x.to(DTYPES[dtype]), row_scale


def dense_values(decoded: DecodedWeight) -> torch.Tensor:
    """Return the values of a decoded weight, float64 ``[N, K]``."""
    return decoded.unit.double() * decoded.out_scale.double()
