"""Real ModelOpt exports of a one-layer Llama, made on the CPU while the tests run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

LAYER = "model.layers.0."
HIDDEN = 256

ModelOptExport = Callable[..., "Export"]


@dataclass(frozen=True)
class Export:
    """One export: the weights that went in, the tensors that came out, and the inputs calibration saw.

    Attributes:
        source: the weights before quantization, by name relative to the layer (``mlp.down_proj``).
        stored: the tensors of the export, by name relative to the layer (``mlp.down_proj.weight_scale``).
        input_amax: the largest magnitude that entered each linear layer during calibration.
    """

    source: dict[str, torch.Tensor]
    stored: dict[str, torch.Tensor]
    input_amax: dict[str, float]

    def tensors_of(self, linear: str) -> dict[str, torch.Tensor]:
        """Return the tensors stored for one linear layer, by the last part of their names."""
        prefix = linear + "."
        return {name.removeprefix(prefix): t for name, t in self.stored.items() if name.startswith(prefix)}


@pytest.fixture(scope="session")
def modelopt_export(tmp_path_factory: pytest.TempPathFactory) -> ModelOptExport:
    """``modelopt_export(preset, dtype, algorithm=None, intermediate=384)`` makes an :class:`Export`, once each.

    ``algorithm`` replaces the preset's calibration algorithm.
    """
    pytest.importorskip("modelopt", reason="needs nvidia-modelopt to make exports")
    exports: dict[tuple[Any, ...], Export] = {}

    def make(preset: str, dtype: torch.dtype, algorithm: str | None = None, intermediate: int = 384) -> Export:
        key = (preset, dtype, algorithm, intermediate)
        if key not in exports:
            exports[key] = _export(tmp_path_factory.mktemp("export"), *key)
        return exports[key]

    return make


def _export(directory: Path, preset: str, dtype: torch.dtype, algorithm: str | None, intermediate: int) -> Export:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from safetensors.torch import load_file

    model = _model(dtype, intermediate)
    linears = {name.removeprefix(LAYER): module for name, module in model.named_modules() if name.endswith("_proj")}
    source = {name: module.weight.detach().clone() for name, module in linears.items()}
    input_amax = dict.fromkeys(linears, 0.0)

    def record(name: str) -> Callable[[Any, Any], None]:
        def hook(_: Any, args: Any) -> None:
            input_amax[name] = max(input_amax[name], args[0].abs().max().item())

        return hook

    hooks = [module.register_forward_pre_hook(record(name)) for name, module in linears.items()]
    config = copy.deepcopy(getattr(mtq, preset))
    if algorithm is not None:
        config["algorithm"] = algorithm
    mtq.quantize(model, config, lambda m: m(torch.arange(64).reshape(2, 32)))
    for hook in hooks:
        hook.remove()
    export_hf_checkpoint(model, export_dir=directory)
    stored = load_file(directory / "model.safetensors")
    layer = {name.removeprefix(LAYER): t for name, t in stored.items() if name.startswith(LAYER)}
    return Export(source, layer, input_amax)


def _model(dtype: torch.dtype, intermediate: int) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=64,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        pad_token_id=0,
    )
    llama: Any = transformers.LlamaForCausalLM
    model = llama(config).to(dtype).eval()
    layer = model.model.layers[0]
    with torch.no_grad():
        _make_ties(layer.self_attn.o_proj.weight)
        _make_outliers(layer.self_attn.k_proj.weight)
        _make_extremes(layer.mlp.down_proj.weight)
    return model


def _make_ties(weight: torch.Tensor) -> None:
    """Values that fall on the midpoints of E2M1 exactly, in NVFP4 and in MXFP4.

    Multiples of 2^-8 up to 24 * 2^-8 = 6 * 2^-6 are quarters under a step of 2^-6. MXFP4 takes that step, and so does
    NVFP4 once the amax of the weight makes its global scale the power of two 2^-14.
    """
    weight.copy_(torch.randint(-24, 25, weight.shape) * 2.0**-8)
    weight[:, ::16] = 24 * 2.0**-8
    weight[-1, -1] = 2688 * 2.0**-14


def _make_outliers(weight: torch.Tensor) -> None:
    """A heavy-tailed weight: block scales all over the range."""
    weight.mul_(torch.randn(weight.shape).mul(2).exp().clamp(max=1e3))


def _make_extremes(weight: torch.Tensor) -> None:
    """All-zero channels of both signs, all-zero blocks, and channels that vanish beside the others."""
    weight[0:3] = 0.0
    weight[3] = -0.0
    weight[8, 128:256] = 0.0
    weight[9, 0:16] = 0.0
    weight[4:8] *= 2.0**-14  # subnormal in fp16
    weight[10] *= 2.0**-10
    weight[11] *= 2.0**-22  # its NVFP4 block scales underflow E4M3; zero in fp16
    weight[128:, 256:384] *= 2.0**-14
