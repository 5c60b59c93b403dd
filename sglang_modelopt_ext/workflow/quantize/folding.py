"""The smoothing scales that ModelOpt's export multiplies into the norm before the layers: made right, and checked.

After AWQ, layers with one input (q, k and v; gate and up) get one scale. Where a norm made that input, the scale becomes a part of
the norm's weight, and every module that reads the norm reads scaled values:

- A reader that is not smoothed, such as the router beside a quantized shared expert, would compute something else: an error.
- ModelOpt 0.47 knows by name which norms multiply by ``1 + weight``. Those of Qwen3-Next and Qwen3.5 are not among them, and their
  scale would be lost. Here a norm is tried, and marked by the attribute that ModelOpt's export asks for.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.quantize.quantizers import quantized_linears

_TOKENS = 16


class Folding:
    """The norms of a calibrated model, and which modules read each.

    Args:
        model: the model, before its export.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.smoothed = {name for name, module in quantized_linears(model) if _has_scale(module)}
        self.readers: dict[str, list[str]] = {}
        self.inputs: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        if self.smoothed:
            self._run()
        for name, readers in self.readers.items():
            if self.smoothed & set(readers) and _adds_one(model.get_submodule(name), *self.inputs[name]):
                model.get_submodule(name).zero_centered_gamma = True

    def check(self, where: object) -> None:
        """Raise ModelOptExtError, naming ``where``, where a scale was folded into a norm that has a reader without one."""
        for name, readers in self.readers.items():
            if not any(getattr(self.model.get_submodule(reader), "fused_with_prequant", False) for reader in readers):
                continue
            for reader in readers:
                if reader not in self.smoothed:
                    expected = (
                        "all readers of this norm smoothed, as ModelOpt folds their scale into it (see --exclude)"
                    )
                    raise ModelOptExtError.at(where, name, expected, f"{reader}, which is not")

    @torch.no_grad()
    def _run(self) -> None:
        """Run a few tokens, and note which modules with weights of their own read the output of which norm."""
        made: dict[int, str] = {}
        kept: list[torch.Tensor] = []  # no address is used twice while these live

        def after(name: str) -> Any:
            def hook(module: Any, inputs: Any, kwargs: Any, output: Any) -> None:
                del module
                if isinstance(output, torch.Tensor):
                    made[output.data_ptr()] = name
                    self.inputs[name] = inputs, kwargs
                    kept.append(output)

            return hook

        def before(name: str) -> Any:
            def hook(module: Any, inputs: Any, kwargs: Any) -> None:
                del module
                for value in (*inputs, *kwargs.values()):
                    if isinstance(value, torch.Tensor) and (norm := made.get(value.data_ptr())) is not None:
                        self.readers.setdefault(norm, []).append(name)

            return hook

        handles = []
        for name, module in self.model.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if (weight := own.get("weight")) is not None and weight.dim() == 1:
                handles.append(module.register_forward_hook(after(name), with_kwargs=True))
            if any(parameter.dim() > 1 for parameter in own.values()):
                handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        try:
            self.model(torch.arange(_TOKENS, device=self.model.device)[None] % 8, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()


@torch.no_grad()
def _adds_one(norm: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a norm multiplies by ``1 + weight``: its output is not zero where its weight is."""
    weight = norm.weight.detach().clone()
    try:
        norm.weight.zero_()
        return bool(norm(*inputs, **kwargs).any())
    finally:
        norm.weight.copy_(weight)


def _has_scale(module: Any) -> bool:
    return getattr(getattr(module, "input_quantizer", None), "_pre_quant_scale", None) is not None
