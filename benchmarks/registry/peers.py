"""Products of other packages, SGLang's own among them: peers of :mod:`benchmarks.gemm`, where they are installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.registry.base import Product
from benchmarks.registry.operands import random_bf16, random_codes, random_fp8, random_scale
from benchmarks.registry.peers_sglang import MARLIN, STOCK, naive_nvfp4
from sglang_modelopt_kernels.gemm.mxfp4_fp8_blackwell import naive_mxfp4_linear


def _humming_weight(n: int, k: int) -> dict[str, Any]:
    """Make a random MXFP4 weight, as stored and in humming's packing. Raises ImportError without humming."""
    from sglang_modelopt_ext.backends.base import ShardWeight
    from sglang_modelopt_ext.backends.linear.humming import Humming
    from sglang_modelopt_kernels.formats import WEIGHT_FORMATS

    codes, scale = random_codes(n, k), random_scale("mxfp4", n, k)
    stored = ShardWeight(WEIGHT_FORMATS["mxfp4"], {"weight": codes, "weight_scale": scale})
    prepared = Humming().prepare([stored])
    sizes = {"codes": prepared.weight, "scale": prepared.weight_scale}
    return {"backend": Humming(), "prepared": prepared, "stored": (codes, scale), **sizes}


def _quack_weight(n: int, k: int) -> dict[str, Any]:
    """Make a random NVFP4 weight, as stored and in quack's packing. Raises ImportError without quack."""
    from sglang_modelopt_ext.backends.base import ShardWeight
    from sglang_modelopt_ext.backends.linear.weight_only import QuackWeightOnly
    from sglang_modelopt_kernels.formats import WEIGHT_FORMATS

    codes, scale = random_codes(n, k), random_scale("nvfp4", n, k)
    one = torch.ones((), device="cuda")
    tensors = {"weight": codes, "weight_scale": scale, "weight_scale_2": one}
    prepared = QuackWeightOnly().prepare([ShardWeight(WEIGHT_FORMATS["nvfp4"], tensors)])
    sizes = {"codes": codes, "scale": scale}
    return {"backend": QuackWeightOnly(), "prepared": prepared, "stored": (codes, scale), **sizes}


def _run(x: torch.Tensor, weight: Mapping[str, Any], out_dtype: torch.dtype) -> torch.Tensor:
    """Compute the product of another package, which rounds to bf16."""
    y: torch.Tensor = weight["backend"].matmul(weight["prepared"], x, None, None, torch.bfloat16)
    return y.to(out_dtype)


PEERS = (
    STOCK
    | MARLIN
    | {
        "humming mxfp4": Product(
            lambda capability: capability in (89, 90),
            _humming_weight,
            random_fp8,
            _run,
            lambda x, weight: naive_mxfp4_linear(x, *weight["stored"]),
            2.0**-8,
            1040,
        ),
        "quack nvfp4": Product(
            lambda capability: capability == 90,
            _quack_weight,
            random_bf16,
            _run,
            naive_nvfp4,
            2.0**-8,
            1024,
        ),
    }
)
