"""Every dense recipe, layer by layer: SGLang's own linear layers, loaded from real exports, against an independent reading.

No server: tests/serving holds whole models to the same reference. Here every recipe is covered, on three model families with
outlier channels, split over ranks and in every floating-point type.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
pytest.importorskip("sglang")

from sglang.srt.layers.linear import MergedColumnParallelLinear, ReplicatedLinear

from sglang_modelopt_ext.checkpoint.reader import FUSED_SHARDS, assumption, check_all_values, read_checkpoint
from sglang_modelopt_ext.env import MXFP4_ACTIVATIONS, W4A8_MATH
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.loading import quantized_modules, unquantized_shape
from sglang_modelopt_ext.schemes.table import SCHEMES
from tests.layers.harness import Namespace, build, load, parallel_rank
from tests.support import edits
from tests.support.exports import Variant, export
from tests.support.models import FAMILIES, TinyModel, model_dir
from tests.support.reference import Reference

RECIPES = (
    "W4A8_NVFP4_FP8_CFG",
    "W4A8_MXFP4_FP8_CFG",
    "W4A8_AWQ_BETA_CFG",
    "INT4_AWQ_CFG",
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "NVFP4_DEFAULT_CFG",
    "NVFP4_MLP_ONLY_CFG",
    "NVFP4_OMLP_ONLY_CFG",
    "NVFP4_FOUR_OVER_SIX_CFG",
    "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG",
    "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG",
    "NVFP4_AWQ_CLIP_CFG",
    "NVFP4_AWQ_LITE_CFG",
    "NVFP4_AWQ_FULL_CFG",
    "NVFP4_SVDQUANT_DEFAULT_CFG",
    "W4A16_NVFP4_CFG",
    "NVFP4_MLP_WEIGHT_ONLY_CFG",
    "MXFP4_DEFAULT_CFG",
    "MXFP8_DEFAULT_CFG",
    "FP8_DEFAULT_CFG",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "INT8_DEFAULT_CFG",
    "INT8_SMOOTHQUANT_CFG",
    "INT8_WEIGHT_ONLY_CFG",
)
ELSEWHERE = {"MXFP4_MLP_WEIGHT_ONLY_CFG": "test_mxfp4_activations", "NVFP4_FP8_MHA_CONFIG": "test_quantized_vocabulary"}

MODEL = TinyModel("llama")
TOLERANCE = 1e-5
"""Relative error of a float32 layer: 512 float32 products accumulate to about 1e-6. Server and reference divide and multiply by
a scale in different ways, which may round an activation apart that lies in the middle between two codes: none does here."""
FLIP_TOLERANCE = 3e-3
"""Where scales are not powers of two, a few of some thousand activations lie that close to a middle; each then differs by one
step of its format, at most 1/4 of it in E2M1. A wrong scale, or a smoothing left out, errs by 1e-1 and more."""


@pytest.fixture(autouse=True)
def mxfp4_rounds_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MXFP4_ACTIVATIONS.variable, "mxfp4")


def shards_of(name: str) -> list[str]:
    """Return the checkpoint's layers that a layer of SGLang fuses."""
    parent, _, leaf = name.rpartition(".")
    return [f"{parent}.{shard}" for shard in FUSED_SHARDS.get(leaf, (leaf,))]


def layer_inputs(k: int, dtype: torch.dtype) -> torch.Tensor:
    """Return rows of different magnitude with outlier channels, one of them zero."""
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(7, k, generator=generator) * torch.logspace(-2, 1, 7).unsqueeze(1)
    x[:, :: k // 8] *= 20.0
    x[3] = 0.0
    return x.to(dtype)


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    y, expected = y.detach().double(), expected.detach().double()
    return float((y - expected).norm() / expected.norm())


def check_layers(folder: Path, dtype: torch.dtype = torch.float32, tolerance: float = FLIP_TOLERANCE) -> None:
    """Check every quantized layer of the checkpoint against the reference's layers."""
    model, _ = build(folder, dtype=dtype)
    reference = Reference(folder).model
    layers = {name: module for name, module in model.named_modules() if getattr(module, "quant_method", None)}
    assert layers
    for name, module in layers.items():
        x = layer_inputs(module.input_size, dtype)
        y = module.quant_method.apply(module, x, getattr(module, "bias", None))
        assert y.dtype == dtype
        expected = torch.cat([reference.get_submodule(shard)(x.float()) for shard in shards_of(name)], dim=-1)
        error = relative_error(y, expected)
        assert error < tolerance, f"{name}: {error}"


SEARCHED = ("NVFP4_W4A4", "NVFP4_AWQ_FULL", "NVFP4_AWQ_CLIP")
"""Recipes that differ from others only in how ModelOpt searches scales: in one family, since a search takes seconds."""


@pytest.mark.parametrize(
    ("recipe", "family"),
    [
        pytest.param(
            recipe, family, marks=pytest.mark.full if family != "llama" and recipe.startswith(SEARCHED) else ()
        )
        for family in ("llama", "qwen2", "qwen3")
        for recipe in RECIPES
    ],
)
def test_every_recipe(recipe: str, family: str) -> None:
    check_layers(export(model_dir(TinyModel(family)), recipe))


def test_every_algorithm_and_preset_is_covered() -> None:
    """Opting out is explicit: a preset ModelOpt exports for dense models is in the list above or named with its test."""
    import modelopt.torch.quantization as mtq

    algos = {read_checkpoint(export(model_dir(MODEL), recipe)).config.algo for recipe in RECIPES}
    assert algos == SCHEMES.keys()
    not_dense = ("MAMBA_MOE", "EXPERTS_ONLY", "KV")  # mixtures of experts and KV caches have tests of their own
    export_fails = ("MXFP6_DEFAULT_CFG", "MXINT8_DEFAULT_CFG")  # in ModelOpt itself
    presets = {name for name in dir(mtq) if name.endswith(("_CFG", "_CONFIG"))}
    dense = {name for name in presets if not any(part in name for part in not_dense)} - set(export_fails)
    assert dense == set(RECIPES) | ELSEWHERE.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", ["W4A8_NVFP4_FP8_CFG", "W4A8_MXFP4_FP8_CFG", "NVFP4_SVDQUANT_DEFAULT_CFG"])
def test_half_precision(recipe: str, dtype: torch.dtype) -> None:
    """The only rounding a half-precision model adds is that of the output."""
    check_layers(export(model_dir(MODEL), recipe), dtype, tolerance=FLIP_TOLERANCE + torch.finfo(dtype).eps)


@pytest.mark.parametrize("recipe", [r for r in RECIPES if not r.startswith("NVFP4_W4A4")])
def test_ranks_together_are_one(recipe: str) -> None:
    """Two tensor-parallel ranks compute what one does, per-token scales included."""
    folder = export(model_dir(MODEL), recipe)
    whole, _ = build(folder)
    parts = [build(folder, rank, 2)[0] for rank in range(2)]
    for name, module in whole.named_modules():
        if not getattr(module, "quant_method", None):
            continue
        x = layer_inputs(module.input_size, torch.float32)
        expected = module.quant_method.apply(module, x)
        ranks = [part.get_submodule(name) for part in parts]
        if name.endswith(("o_proj", "down_proj")):
            slices = x.chunk(2, dim=-1)
            for layer in ranks:
                layer.tp_group = _Together([part.abs().amax(dim=-1, keepdim=True) for part in slices])
            y = sum(layer.quant_method.apply(layer, part) for layer, part in zip(ranks, slices, strict=True))
        else:
            y = _interleave([layer.quant_method.apply(layer, x) for layer in ranks], ranks[0].output_partition_sizes)
        assert relative_error(y, expected) < TOLERANCE, name


class _Together:
    """A stand-in for the communication of two ranks, which gathers both."""

    def __init__(self, amax: list[torch.Tensor]) -> None:
        self.amax = torch.cat(amax, dim=-1)

    def all_gather(self, own: torch.Tensor, dim: int) -> torch.Tensor:
        assert dim == -1
        assert any(torch.equal(own, column) for column in self.amax.split(1, dim=-1))
        return self.amax


def _interleave(outputs: list[torch.Tensor], sizes: list[int]) -> torch.Tensor:
    """Return the outputs of a fused layer's ranks in the order of its shards."""
    shards = [output.split(sizes, dim=-1) for output in outputs]
    return torch.cat([torch.cat([shard[i] for shard in shards], dim=-1) for i in range(len(sizes))], dim=-1)


@pytest.mark.parametrize("rank", range(4))
def test_replicated_kv_heads(rank: int) -> None:
    """With more ranks than KV heads, neighbours hold the same head."""
    folder = export(model_dir(MODEL), "INT8_SMOOTHQUANT_CFG")
    layer = build(folder, rank, 4)[0].get_submodule("model.layers.0.self_attn.qkv_proj")
    reference = Reference(folder).model
    x = layer_inputs(256, torch.float32)
    q, k, v = (reference.get_submodule(f"model.layers.0.self_attn.{name}_proj")(x) for name in "qkv")
    head, kv_head = slice(rank * 64, rank * 64 + 64), slice(rank // 2 * 64, rank // 2 * 64 + 64)
    expected = torch.cat([q[:, head], k[:, kv_head], v[:, kv_head]], dim=-1)
    assert relative_error(layer.quant_method.apply(layer, x), expected) < FLIP_TOLERANCE


def test_shards_with_scales_of_their_own(tmp_path: Path) -> None:
    """No scale of one shard is used for another, global or input."""
    source = export(model_dir(TinyModel("qwen2")), "W4A8_NVFP4_FP8_CFG")
    check_layers(edits.copy_with(source, tmp_path / "checkpoint", [edits.distinct_shard_scales]))


def test_shards_with_global_scales_of_their_own_in_one_product(tmp_path: Path) -> None:
    """With one input scale the shards share a product, and still no global scale is used for another's rows."""
    factors = {"*.k_proj.weight_scale_2": 1.7, "*.v_proj.weight_scale_2": 0.6, "*.up_proj.weight_scale_2": 0.45}
    source = export(model_dir(MODEL), "W4A8_NVFP4_FP8_CFG")
    folder = edits.copy_with(source, tmp_path / "checkpoint", [edits.scale_tensors(factors)])
    check_layers(folder)
    layer = build(folder)[0].get_submodule("model.layers.0.self_attn.qkv_proj")
    assert len(layer.quant_method.groups) == 1


def test_shards_with_smoothing_of_their_own(tmp_path: Path) -> None:
    """Shards with different pre_quant_scale are computed apart, exactly."""
    source = export(model_dir(MODEL), "INT8_SMOOTHQUANT_CFG")
    changes = [
        edits.map_tensors("*.k_proj.pre_quant_scale", lambda t: t * torch.linspace(0.5, 2.0, t.numel()).to(t.dtype))
    ]
    folder = edits.copy_with(source, tmp_path / "checkpoint", changes)
    check_layers(folder)
    layer = build(folder)[0].get_submodule("model.layers.0.self_attn.qkv_proj")
    assert len(layer.quant_method.groups) == 3, "q and v are not adjacent"


@pytest.mark.parametrize("change", ["pre_quant_scale", "svdquant_lora_b"])
def test_what_is_left_out_is_noticed(tmp_path: Path, change: str) -> None:
    """The reference itself tells a layer without its smoothing or low-rank branch from the right one."""
    source = export(model_dir(MODEL), "NVFP4_SVDQUANT_DEFAULT_CFG")
    neutral = torch.ones_like if change == "pre_quant_scale" else torch.zeros_like
    folder = edits.copy_with(source, tmp_path / "checkpoint", [edits.map_tensors(f"*{change}", neutral)])
    x = layer_inputs(512, torch.float32)
    name = "model.layers.0.mlp.down_proj"
    right, wrong = (Reference(f).model.get_submodule(name)(x) for f in (source, folder))
    assert relative_error(wrong, right) > 0.05


def test_low_rank_under_the_other_names(tmp_path: Path) -> None:
    """TensorRT-LLM's names of the low-rank factors, without ModelOpt's internal prefix."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if "weight_quantizer._svdquant" in name:
                tensors[name.replace("weight_quantizer._", "")] = tensors.pop(name)

    source = export(model_dir(MODEL), "NVFP4_SVDQUANT_DEFAULT_CFG")
    check_layers(edits.copy_with(source, tmp_path / "checkpoint", [edits.edit_tensors(rename)]))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_fp8_with_smoothing(tmp_path: Path, stored: torch.dtype) -> None:
    """FP8 layers with an undeclared pre_quant_scale, in any dtype of the original model."""

    def smooth(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            k = tensors[name.replace("_scale", "")].shape[1]
            tensors[name.replace("weight_scale", "pre_quant_scale")] = torch.linspace(0.251, 4.0, k).to(stored)

    source = export(model_dir(MODEL), "FP8_DEFAULT_CFG")
    check_layers(edits.copy_with(source, tmp_path / "checkpoint", [edits.edit_tensors(smooth)]))


def test_mxfp4_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """An `mxfp4` export does not say whether activations are rounded: without an answer it is taken for MXFP4_DEFAULT."""
    monkeypatch.delenv(MXFP4_ACTIVATIONS.variable)
    rounded = export(model_dir(MODEL), "MXFP4_DEFAULT_CFG")
    assumed = assumption(read_checkpoint(rounded).config)
    assert assumed is not None
    assert re.search(
        r"hf_quant_config.json: quant_algo MXFP4 does not .*SGLANG_MODELOPT_EXT_MXFP4_ACTIVATIONS=mxfp4", assumed
    )
    assert "\n" not in assumed
    check_layers(rounded)
    monkeypatch.setenv(MXFP4_ACTIVATIONS.variable, "mxfp4")
    assert assumption(read_checkpoint(rounded).config) is None
    weight_only = export(model_dir(MODEL), "MXFP4_MLP_WEIGHT_ONLY_CFG")
    monkeypatch.setenv(MXFP4_ACTIVATIONS.variable, "none")
    assert assumption(read_checkpoint(weight_only).config) is None
    layer = build(weight_only)[0].get_submodule("model.layers.0.mlp.down_proj")
    reference = Reference(weight_only, activation="none").model.get_submodule("model.layers.0.mlp.down_proj")
    x = layer_inputs(512, torch.float32)
    assert relative_error(layer.quant_method.apply(layer, x), reference(x)) < TOLERANCE


def test_mixed_precision(tmp_path: Path) -> None:
    """One checkpoint, a different algorithm in every kind of layer; unlisted layers stay unquantized."""
    folder = mixed_checkpoint(tmp_path)
    check_layers(folder)
    checkpoint = read_checkpoint(folder)
    assert len({linear.scheme.algo for linear in checkpoint.linears.values()}) == 4
    assert "layers.1.mlp.down_proj" not in checkpoint.linears


def mixed_checkpoint(tmp_path: Path) -> Path:
    """Return a MIXED_PRECISION checkpoint put together from exports of one model."""
    sources = {
        "self_attn.q_proj": "FP8_DEFAULT_CFG",
        "self_attn.k_proj": "FP8_DEFAULT_CFG",
        "self_attn.v_proj": "FP8_DEFAULT_CFG",
        "self_attn.o_proj": "MXFP8_DEFAULT_CFG",
        "mlp.gate_proj": "W4A8_NVFP4_FP8_CFG",
        "mlp.up_proj": "W4A8_NVFP4_FP8_CFG",
        "mlp.down_proj": "W4A8_AWQ_BETA_CFG",
    }
    base = export(model_dir(MODEL), "FP8_DEFAULT_CFG")
    plain = edits.read_tensors(model_dir(MODEL))
    exports = {recipe: export(model_dir(MODEL), recipe) for recipe in set(sources.values())}
    stored = {recipe: edits.read_tensors(folder) for recipe, folder in exports.items()}
    layers: dict[str, dict[str, object]] = {}

    def mix(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers." in name and "norm" not in name]:
            del tensors[name]
        for index in range(2):
            for layer, recipe in sources.items():
                module = f"model.layers.{index}.{layer}"
                if (index, layer) == (1, "mlp.down_proj"):
                    tensors[f"{module}.weight"] = plain[f"{module}.weight"]
                    continue
                config = read_checkpoint(exports[recipe]).config
                layers[module] = {"quant_algo": config.algo, "group_size": config.group_size}
                tensors.update({k: v for k, v in stored[recipe].items() if k.startswith(module + ".")})

    section = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers, "exclude_modules": edits.REMOVE}
    folder = edits.copy_with(base, tmp_path / "mixed", [edits.drop_embedded_config, edits.edit_tensors(mix)])
    edits.set_file_config(section)(folder)
    return folder


def test_mixed_precision_inside_a_fused_group_is_refused(tmp_path: Path) -> None:
    folder = mixed_checkpoint(tmp_path)
    other = edits.read_tensors(export(model_dir(MODEL), "MXFP8_DEFAULT_CFG"))
    up = "model.layers.0.mlp.up_proj"

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(up)]:
            del tensors[name]
        tensors.update({name: tensor for name, tensor in other.items() if name.startswith(up)})

    def declare(content: dict[str, dict[str, dict[str, object]]]) -> None:
        content["quantization"]["quantized_layers"][up] = {"quant_algo": "MXFP8", "group_size": 32}

    edits.edit_tensors(swap)(folder)
    edits.edit_json(edits.QUANT_CONFIG, declare)(folder)
    with pytest.raises(ModelOptExtError, match=r"_proj: expected .*, as .*_proj it is fused with, got"):
        read_checkpoint(folder)


def test_quantized_vocabulary() -> None:
    """NVFP4_FP8_MHA quantizes lm_head and the embedding too; its KV cache tensors are known and set apart."""
    checkpoint = read_checkpoint(export(model_dir(MODEL), "NVFP4_FP8_MHA_CONFIG"))
    check_all_values(checkpoint)
    assert checkpoint.config.kv_cache_algo == "FP8"
    assert checkpoint.linears["lm_head"].scheme.algo == "NVFP4"
    assert checkpoint.linears["embed_tokens"].scheme.algo == "W4A16_NVFP4"


@pytest.mark.parametrize(
    ("exclude", "refused"), [(("*layers.0.mlp*",), False), (("*layers.0.self_attn.q_proj*",), True)]
)
def test_exclusions(exclude: tuple[str, ...], refused: bool) -> None:
    """Whole layers may be left unquantized, a single shard of a fused layer may not."""
    folder = export(model_dir(MODEL), "W4A8_NVFP4_FP8_CFG", Variant(exclude=exclude))
    if refused:
        with pytest.raises(ModelOptExtError, match=r"q_proj\.weight: expected W4A8_NVFP4_FP8, as .*, got unquantized"):
            read_checkpoint(folder)
    else:
        check_layers(folder)


def test_reload(tmp_path: Path) -> None:
    """Restoring, loading another checkpoint and preparing again serves the other checkpoint's weights."""
    first, second = (export(model_dir(TinyModel("llama", seed=seed)), "NVFP4_SVDQUANT_DEFAULT_CFG") for seed in (0, 7))
    model, _ = build(first)
    names = {name for name, _ in model.named_parameters()}
    for module, method in quantized_modules(model):
        method.restore_weights_before_loading(module)
    load(model, read_checkpoint(second))
    assert {name for name, _ in model.named_parameters()} == names
    reference = Reference(second).model
    for name, module in model.named_modules():
        if getattr(module, "quant_method", None):
            x = layer_inputs(module.input_size, torch.float32)
            expected = torch.cat([reference.get_submodule(shard)(x) for shard in shards_of(name)], dim=-1)
            assert relative_error(module.quant_method.apply(module, x), expected) < FLIP_TOLERANCE


class TestStrictLoading:
    """Errors that only loading reveals."""

    def check(self, tmp_path: Path, change: edits.Edit, message: str, recipe: str = "W4A8_NVFP4_FP8_CFG") -> None:
        folder = edits.copy_with(export(model_dir(MODEL), recipe), tmp_path / "checkpoint", [change])
        with pytest.raises(ModelOptExtError, match=message):
            build(folder)

    def test_block_scale(self, tmp_path: Path) -> None:
        def spoil(scale: torch.Tensor) -> torch.Tensor:
            raw = scale.view(torch.uint8).clone()
            raw[1, 1] = 0x7F
            return raw.view(scale.dtype)

        self.check(tmp_path, edits.map_tensors("*1.mlp.up_proj.weight_scale", spoil), r"up_proj\.weight_scale: .*NaN")

    def test_zero_block(self, tmp_path: Path) -> None:
        def zero(scale: torch.Tensor) -> torch.Tensor:
            raw = scale.view(torch.uint8).clone()
            raw[1, 1] = 0
            return raw.view(scale.dtype)

        message = r"gate_up_proj\.weight_scale: expected a zero block scale only over all-zero codes"
        self.check(tmp_path, edits.map_tensors("*1.mlp.up_proj.weight_scale", zero), message)

    def test_smoothing(self, tmp_path: Path) -> None:
        change = edits.map_tensors("*0.mlp.down_proj.pre_quant_scale", lambda t: torch.full_like(t, float("nan")))
        self.check(tmp_path, change, r"pre_quant_scale: expected finite, positive", "INT8_SMOOTHQUANT_CFG")

    def test_unused_tensor(self, tmp_path: Path) -> None:
        """A tensor the model does not read: the harness drops unknown names, like SGLang's Llama."""
        folder = edits.copy_with(export(model_dir(MODEL), "W4A8_NVFP4_FP8_CFG"), tmp_path / "checkpoint", [])
        model, _ = build(folder)
        edits.add_tensors({"model.layers.0.stray.weight": torch.zeros(3)})(folder)
        for module, method in quantized_modules(model):
            method.restore_weights_before_loading(module)
        with pytest.raises(ModelOptExtError, match=r"stray\.weight: expected a tensor the model uses, got one nothing"):
            load(model, read_checkpoint(folder))

    def test_missing_tensor(self, tmp_path: Path) -> None:
        """A parameter of the model that no tensor fills."""
        folder = edits.copy_with(export(model_dir(MODEL), "W4A8_NVFP4_FP8_CFG"), tmp_path / "checkpoint", [])
        model, _ = build(folder)
        edits.drop_tensors("model.norm.weight")(folder)
        for module, method in quantized_modules(model):
            method.restore_weights_before_loading(module)
        with pytest.raises(ModelOptExtError, match=r"model\.norm\.weight: expected a tensor for this parameter"):
            load(model, read_checkpoint(folder))

    def test_scales_outside_fp8_math(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Block scales above 448 / 6 cannot be served with weights rounded to E4M3."""
        monkeypatch.setenv(W4A8_MATH.variable, "fp8")
        change = edits.map_tensors("*0.mlp.down_proj.weight_scale", lambda t: torch.full_like(t, 448.0))
        self.check(
            tmp_path,
            change,
            r"down_proj\.weight: expected weights that a kernel with math fp8 can hold, got dense_float32: .*448",
        )

    def test_weights_beyond_float32(self, tmp_path: Path) -> None:
        """Exponents up to 2^127 are legal; with a code of 6 the weight is not a number any more."""
        change = edits.map_tensors("*0.mlp.down_proj.weight_scale", lambda t: torch.full_like(t, 254))
        self.check(tmp_path, change, r"down_proj\.weight: .*beyond float32", "W4A8_MXFP4_FP8_CFG")

    def test_short_bias(self, tmp_path: Path) -> None:
        """On a CPU SGLang would fill up a short bias with zeros."""
        source = export(model_dir(TinyModel("qwen2")), "W4A8_NVFP4_FP8_CFG")
        change = edits.map_tensors("*0.self_attn.k_proj.bias", lambda t: t[:-2])
        folder = edits.copy_with(source, tmp_path / "checkpoint", [change])
        with pytest.raises(ModelOptExtError, match=r"k_proj\.bias: .*shape \[128\] expected, \[126\] stored"):
            build(folder)

    def test_short_unquantized_weight(self) -> None:
        """An unquantized layer on a CPU, whose short weight SGLang would fill up with zeros."""
        layer = ReplicatedLinear(64, 32, bias=False, prefix="model.layers.0.self_attn.o_proj")
        assert unquantized_shape(layer, "weight", None) == (32, 64)
        with parallel_rank(0, 1):
            fused = MergedColumnParallelLinear(64, [32, 48], bias=True, prefix="model.layers.0.mlp.gate_up_proj")
        assert unquantized_shape(fused, "weight", 1) == (48, 64)
        assert unquantized_shape(fused, "bias", 0) == (32,)

    def test_ranks_that_cut_through_blocks(self) -> None:
        """512 inputs over 32 ranks leave 16 to a rank, half a block."""
        from sglang.srt.layers.linear import RowParallelLinear

        from sglang_modelopt_ext.integration.config import ModelOptExtConfig, register_methods

        register_methods()
        checkpoint = read_checkpoint(export(model_dir(MODEL), "W4A8_NVFP4_FP8_CFG"))
        config = ModelOptExtConfig("modelopt_w4a8", checkpoint.config, checkpoint)
        with (
            parallel_rank(0, 32),
            pytest.raises(ModelOptExtError, match=r"down_proj\.weight_scale: expected sizes per rank"),
        ):
            RowParallelLinear(512, 256, bias=False, quant_config=config, prefix="model.layers.0.mlp.down_proj")


@pytest.mark.parametrize("family", FAMILIES)
def test_held_out_models(family: str) -> None:
    """Other seeds and sizes than any other test uses."""
    spec = TinyModel(family, seed=1234, hidden=384, intermediate=640, heads=6, kv_heads=3, layers=1)  # type: ignore[arg-type]
    for recipe in ("W4A8_NVFP4_FP8_CFG", "W4A8_MXFP4_FP8_CFG"):
        check_layers(export(model_dir(spec), recipe))


def test_namespace_is_not_a_model() -> None:
    """The harness's stand-in for a model computes nothing itself."""
    with pytest.raises(NotImplementedError):
        Namespace()(torch.zeros(1))
