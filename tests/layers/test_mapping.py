"""The stored layers of a layer, where only the loading code of the model's class tells."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from sglang.srt.layers.linear import MergedColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from sglang.srt.model_loader.weight_utils import default_weight_loader

from sglang_modelopt_ext.checkpoint.reader import read_checkpoint
from sglang_modelopt_ext.checkpoint.tensors import read_tensors
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.config import ModelOptExtConfig
from sglang_modelopt_ext.integration.loading import StrictLoad, quantized_modules
from sglang_modelopt_ext.integration.mapping import settle
from sglang_modelopt_ext.schemes.table import UMBRELLA
from tests.layers.harness import Namespace, parallel_rank
from tests.layers.test_recipes import FLIP_TOLERANCE, layer_inputs, relative_error
from tests.support.exports import export
from tests.support.models import TinyModel, model_dir
from tests.support.reference import Reference

LAYER = "model.layers.0.mlp"
NORM = "model.norm.weight"


class Odd(Namespace):
    """A class that names its layers in its own way, and concatenates two stored ones for a replicated layer."""

    skips: tuple[str, ...] = ()

    def parameters_by_name(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.named_parameters())

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        parameters = self.parameters_by_name()
        cached: dict[str, torch.Tensor] = {}
        for name, tensor in weights:
            if any(skipped in name for skipped in self.skips):
                continue
            spec = name.rpartition(".")[2]
            if name.startswith((f"{LAYER}.gate_proj", f"{LAYER}.up_proj")):
                parameter = parameters[f"ffn.inner.{spec}"]
                parameter.weight_loader(parameter, tensor, 0 if "gate" in name else 1)
            elif name.startswith(f"{LAYER}.down_proj"):
                parameter = parameters[f"ffn.outer.{spec}"]
                parameter.weight_loader(parameter, tensor)
            elif name.startswith(("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")):
                cached[name] = tensor
                both = [cached.get(f"model.layers.0.self_attn.{one}_proj.{spec}") for one in "qk"]
                if all(part is not None for part in both):
                    parameter = parameters[f"latent.{spec}"]
                    parameter.weight_loader(parameter, torch.cat([part for part in both if part is not None]))
            elif name.startswith("model.layers.0.self_attn.o_proj"):
                parameter = parameters[f"head.{spec}"]
                loader = getattr(parameter, "weight_loader", default_weight_loader)
                loader(parameter, tensor)


class Late(Odd):
    """A class that collects all tensors before it loads the first."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        super().load_weights(list(weights))


class Keeping(Odd):
    """A class that keeps its parameters for the next load, and copies one itself before it loads the others (gpt-oss's sinks)."""

    kept: dict[str, torch.nn.Parameter]

    def parameters_by_name(self) -> dict[str, torch.nn.Parameter]:
        if not hasattr(self, "kept"):
            self.kept = super().parameters_by_name()
        return self.kept

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        tensors = dict(weights)
        self.parameters_by_name()["gain"].data.copy_(tensors.pop(NORM))
        super().load_weights(tensors.items())


@pytest.fixture(scope="module")
def folder() -> Path:
    return export(model_dir(TinyModel("llama")), "W4A8_AWQ_BETA_CFG")


def build(folder: Path, model: Odd) -> tuple[Odd, ModelOptExtConfig]:
    """Return the class's layers, built under names that no stored tensor has."""
    checkpoint = read_checkpoint(folder)
    config = ModelOptExtConfig(UMBRELLA, checkpoint.config, checkpoint)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with parallel_rank(0, 1):
            inner = MergedColumnParallelLinear(256, [512, 512], bias=False, quant_config=config, prefix="ffn.inner")
            model.put("ffn.inner", inner)
            model.put("ffn.outer", RowParallelLinear(512, 256, bias=False, prefix="ffn.outer"))  # no config
            model.put("latent", ReplicatedLinear(256, 384, bias=False, quant_config=config, prefix="latent"))
            model.put("head", torch.nn.Linear(256, 256, bias=False))
            settle(model, config)
    finally:
        torch.set_default_dtype(previous)
    return model, config


def load(model: Odd, config: ModelOptExtConfig) -> StrictLoad:
    """Load the tensors, all of the layers', and prepare the layers."""
    assert config.checkpoint is not None
    stored = list(config.checkpoint.tensors.values())
    strict = StrictLoad(model, config.checkpoint)
    strict.load(model.load_weights, ((one.name, tensor) for one, tensor in read_tensors(stored)))
    assert list(strict.missing()) == []
    for module, method in quantized_modules(model):
        method.verified = True
        method.process_weights_after_loading(module)
    return strict


@pytest.mark.parametrize("kind", [Odd, Late, Keeping])
def test_layers_are_found_by_the_loading_code(folder: Path, kind: type[Odd]) -> None:
    """Renamed, concatenated, unconfigured layers and PyTorch's own compute what the reading says; all of their tensors are used."""
    model = kind()
    if kind is Keeping:
        model.gain = torch.nn.Parameter(torch.full((256,), torch.nan), requires_grad=False)
    model, config = build(folder, model)
    strict = load(model, config)
    copied = (NORM,) if kind is Keeping else ()
    used = (LAYER, *(f"model.layers.0.self_attn.{one}_proj" for one in "qko"), *copied)
    assert strict.used == {name for name in strict.checkpoint.tensors if name.startswith(used)}
    reference = Reference(folder).model
    expected = {
        "ffn.inner": [f"{LAYER}.gate_proj", f"{LAYER}.up_proj"],
        "ffn.outer": [f"{LAYER}.down_proj"],
        "latent": ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"],
        "head": ["model.layers.0.self_attn.o_proj"],
    }
    for name, shards in expected.items():
        layer = model.get_submodule(name)
        x = layer_inputs(layer.input_size, torch.float32)
        y = layer(x) if name == "head" else layer.quant_method.apply(layer, x)
        right = torch.cat([reference.get_submodule(shard)(x) for shard in shards], dim=-1)
        assert relative_error(y, right) < FLIP_TOLERANCE, name


def test_a_declared_layer_that_nothing_is_stored_for(folder: Path) -> None:
    """A layer that is declared as quantized, and that the loading code has no quantized tensors for, is an error."""
    model = Odd()
    model.skips = ("q_proj",)
    with pytest.raises(ModelOptExtError, match=r"latent\.weight: expected a W4A8_AWQ layer, or it in exclude_modules"):
        build(folder, model)


def test_two_tensors_for_one_shard(folder: Path) -> None:
    """A class that loads two stored tensors to one place loses one of them."""

    class Twice(Odd):
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            super().load_weights((name.replace("up_proj", "gate_proj"), tensor) for name, tensor in weights)

    model, config = build(folder, Odd())
    model.__class__ = Twice
    with pytest.raises(
        ModelOptExtError, match=r"up_proj\.\w+: expected a tensor .* got one stored tensor for ffn\.inner"
    ):
        load(model, config)


class Reordering(Odd):
    """A class that reorders the rows of a weight, and of nothing else (Llama 4's q and k)."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        def reordered(name: str, tensor: torch.Tensor) -> torch.Tensor:
            is_head = name == "model.layers.0.self_attn.o_proj.weight"
            return tensor.view(2, -1, tensor.shape[1]).transpose(0, 1).reshape(tensor.shape) if is_head else tensor

        super().load_weights((name, reordered(name, tensor)) for name, tensor in weights)


def test_a_class_that_reorders_rows(folder: Path) -> None:
    """A weight whose block scales have rows of their own would be scaled by those of others; one with a single scale is right."""
    with pytest.raises(ModelOptExtError, match=r"o_proj\.weight: expected .* as those of weight_scale are"):
        load(*build(folder, Reordering()))
    plain = export(model_dir(TinyModel("llama")), "FP8_DEFAULT_CFG")
    model, _ = built = build(plain, Reordering())
    load(*built)
    x = layer_inputs(256, torch.float32)
    right = Reference(plain).model.get_submodule("model.layers.0.self_attn.o_proj")(x)
    right = right.view(len(x), 2, -1).transpose(1, 2).reshape(right.shape)
    assert relative_error(model.get_submodule("head")(x), right) < FLIP_TOLERANCE


class Permuting(Odd):
    """A class that reorders rows in a method that all tensors pass through, by the width of an unquantized weight (Llama 4)."""

    def permute_qk_weight_for_rotary(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        if name != "model.layers.0.self_attn.o_proj.weight":
            return name, tensor
        return name, tensor.view(2, -1, 2, 256).transpose(1, 2).reshape(-1, 256)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        super().load_weights(self.permute_qk_weight_for_rotary(name, tensor) for name, tensor in weights)


class Scattering(Permuting):
    """One that takes rows out of their blocks of 128."""

    def permute_qk_weight_for_rotary(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        if name != "model.layers.0.self_attn.o_proj.weight":
            return name, tensor
        return name, tensor.view(2, -1, 256).transpose(0, 1).reshape(-1, 256)


BLOCK_FP8 = "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"


@pytest.mark.parametrize(
    "recipe", ["W4A8_NVFP4_FP8_CFG", "W4A8_MXFP4_FP8_CFG", "FP8_DEFAULT_CFG", "MXFP8_DEFAULT_CFG", BLOCK_FP8]
)
def test_codes_and_scales_follow_a_class_that_reorders_rows(recipe: str) -> None:
    """Its method is called for the numbers of the rows, and is itself again behind the loading."""
    stored = export(model_dir(TinyModel("llama")), recipe)
    model, _ = built = build(stored, Permuting())
    load(*built)
    assert "permute_qk_weight_for_rotary" not in vars(model)
    x = layer_inputs(256, torch.float32)
    right = Reference(stored).model.get_submodule("model.layers.0.self_attn.o_proj")(x)
    right = right.view(len(x), 2, -1, 2).transpose(2, 3).reshape(right.shape)
    assert relative_error(model.get_submodule("head")(x), right) < FLIP_TOLERANCE


@pytest.mark.parametrize(
    ("recipe", "model", "line"),
    [
        ("INT4_AWQ_CFG", Permuting, "weight: expected .* rows of their own expected, .*, 2 in one stored"),
        (BLOCK_FP8, Scattering, "weight_scale: expected .* rows that stay together expected in blocks of 128"),
    ],
)
def test_rows_that_are_stored_together_stay_together(recipe: str, model: type[Permuting], line: str) -> None:
    """Two rows of INT4 share bytes, 128 of FP8's blocks a scale."""
    built = build(export(model_dir(TinyModel("llama")), recipe), model())
    with pytest.raises(ModelOptExtError, match=rf"o_proj\.{line}"):
        load(*built)


class Copying(Namespace):
    """A class that copies one stored tensor into a parameter itself, in the slices ``parts`` (gpt-oss's sinks)."""

    parts: tuple[slice, ...] = ()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        target = self.get_parameter("gain")
        for name, tensor in weights:
            if name == NORM:
                for part in self.parts:
                    target.data[part].copy_(tensor[part].float())


@pytest.mark.parametrize(
    ("parts", "is_loaded"),
    [
        ((slice(None),), True),
        ((slice(0, 100), slice(100, None)), True),
        ((slice(0, 100),), False),
        ((slice(0, 128), slice(0, 128)), False),
        ((slice(0, 150), slice(100, 250)), False),
    ],
    ids=["whole", "two slices", "one slice", "one slice twice", "two that overlap"],
)
def test_a_class_that_copies_past_the_loaders(folder: Path, parts: tuple[slice, ...], is_loaded: bool) -> None:
    """Its parameter counts as loaded once all of it is written, and the tensor as used."""
    model, checkpoint = Copying(), read_checkpoint(folder)
    model.parts = parts
    model.gain = torch.nn.Parameter(torch.full((256,), torch.nan), requires_grad=False)
    strict = StrictLoad(model, checkpoint)
    stored = [one for one in checkpoint.tensors.values() if one.name == NORM]
    strict.load(model.load_weights, ((one.name, tensor) for one, tensor in read_tensors(stored)))
    assert strict.used == {NORM}
    assert [str(error).split(": ")[1] for error in strict.missing()] == ([] if is_loaded else ["gain"])
    assert bool(model.gain.isfinite().all()) == is_loaded
