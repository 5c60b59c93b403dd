"""The products that serve a model: each scheme and kernel with the number of its layers, for the start-up log and operators."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sglang_modelopt_ext.integration.hooks import Hook
from sglang_modelopt_ext.integration.linear_method import ModelOptExtLinearMethod
from sglang_modelopt_ext.integration.loading import quantized_modules
from sglang_modelopt_ext.integration.moe_method import GATE_UP
from sglang_modelopt_ext.schemes.base import LayerScheme

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Product:
    """A product of a model's layers, and the kernel that computes it.

    Attributes:
        scheme: of the layers.
        math: see ``SGLANG_MODELOPT_EXT_W4A8_MATH``.
        kernel: the backend's name.
        projections: ``gate and up`` or ``down`` of experts, empty for a linear layer.
        experts: of a layer on this rank, 0 for a linear layer.
    """

    scheme: LayerScheme
    math: str
    kernel: str
    projections: str = ""
    experts: int = 0

    def __str__(self) -> str:
        layers = f"layers of {self.experts} experts, {self.projections}:" if self.experts else "linear layers"
        return f"{layers} {self.scheme.describe()}, math {self.math}, kernel {self.kernel}"


def count_products(model: torch.nn.Module) -> dict[Product, int]:
    """Return the number of layers by product, of those of ``model`` that this package serves, sorted by what the log prints."""
    counts: Counter[Product] = Counter()
    for _, method in quantized_modules(model):
        if isinstance(method, ModelOptExtLinearMethod):
            if method.backend:
                counts[Product(method.scheme, method.math, method.backend.name)] += 1
            continue
        for name, kernels in method.kernels.items():
            first = "gate and up" if method.activation.gated else "up"
            projections = first if name == GATE_UP else "down"
            for part, kernel in zip(method.products[name].parts, kernels, strict=True):
                one = part.product
                counts[Product(one.scheme, one.math, kernel, projections, len(part.members))] += 1
    return dict(sorted(counts.items(), key=lambda entry: str(entry[0])))


def log_schemes(model: torch.nn.Module) -> None:
    """Log one line per scheme and kernel: the number of layers (and of experts on this rank), and the kernel that serves them."""
    from sglang.srt.utils import log_info_on_rank0

    for product, count in count_products(model).items():
        log_info_on_rank0(logger, f"modelopt_ext: {count} {product}")


def _postprocess_weights(original: Callable[..., None], model: torch.nn.Module, target_device: torch.device) -> None:
    original(model, target_device)
    log_schemes(model)


HOOKS = (
    Hook(
        "sglang.srt.model_loader.loader.DefaultModelLoader.postprocess_weights",
        ("model", "target_device"),
        "the log would not say which kernel serves which layers",
        _postprocess_weights,
    ),
)
