"""Mixtures of experts, layer by layer: SGLang's own fused experts, loaded from real exports, against an independent reading."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.runtime_context import get_parallel

from sglang_modelopt_ext import env
from sglang_modelopt_ext.backends.experts.flashinfer import CutlassNvfp4Experts
from sglang_modelopt_ext.checkpoint.reader import read_checkpoint
from sglang_modelopt_ext.env import FP4_ACTIVATIONS, MXFP4_ACTIVATIONS, W4A8_MATH
from sglang_modelopt_ext.integration.loading import quantized_modules
from tests.layers.harness import load
from tests.layers.moe_harness import build, published, run
from tests.layers.test_recipes import FLIP_TOLERANCE, TOLERANCE, layer_inputs, relative_error
from tests.support import edits, fused_kernel
from tests.support.exports import Variant, export
from tests.support.models import MOE_FAMILIES, Family, TinyModel, model_dir
from tests.support.moe import EXPERTS, TOP_K, mixed_checkpoint, one_expert_off, swap_format, tiny, unquantize
from tests.support.reference import Reference

RECIPES = (
    "W4A8_NVFP4_FP8_CFG",
    "W4A8_MXFP4_FP8_CFG",
    "NVFP4_DEFAULT_CFG",
    "NVFP4_EXPERTS_ONLY_CFG",
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
"""One preset, or more, for each algorithm that ModelOpt 0.47 exports for fused experts. It fails for those named AWQ and SVD."""
MORE_RECIPES = (
    "MAMBA_MOE_FP8_AGGRESSIVE_CFG",
    "MAMBA_MOE_FP8_CONSERVATIVE_CFG",
    "MAMBA_MOE_NVFP4_AGGRESSIVE_CFG",
    "MAMBA_MOE_NVFP4_CONSERVATIVE_CFG",
    "NVFP4_AWQ_CLIP_CFG",
    "NVFP4_FOUR_OVER_SIX_CFG",
    "NVFP4_MLP_ONLY_CFG",
    "NVFP4_OMLP_ONLY_CFG",
    "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG",
    "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG",
)
"""Presets that differ from one of ``RECIPES`` in the search for scales, or in the other quantized layers."""
ELSEWHERE = {"MXFP4_MLP_WEIGHT_ONLY_CFG": "test_mxfp4_activations", "NVFP4_FP8_MHA_CONFIG": "test_quantized_vocabulary"}
EXPORT_FAILS = {
    *(
        "INT4_AWQ_CFG",
        "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
        "W4A8_AWQ_BETA_CFG",
        "NVFP4_AWQ_LITE_CFG",
        "NVFP4_AWQ_FULL_CFG",
    ),
    *("NVFP4_SVDQUANT_DEFAULT_CFG", "MXFP6_DEFAULT_CFG", "MXINT8_DEFAULT_CFG"),
}
W4A8 = "W4A8_NVFP4_FP8_CFG"


@pytest.fixture(autouse=True)
def mxfp4_rounds_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MXFP4_ACTIVATIONS.variable, "mxfp4")


def routing(tokens: int, experts: int = EXPERTS, top_k: int = TOP_K) -> tuple[torch.Tensor, torch.Tensor]:
    """Return distinct experts for each token, and weights that sum to one."""
    generator = torch.Generator().manual_seed(tokens)
    weights, chosen = torch.rand(tokens, experts, generator=generator).topk(top_k, dim=-1)
    return chosen, weights / weights.sum(dim=-1, keepdim=True)


def expert_layers(model: torch.nn.Module) -> dict[str, FusedMoE]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedMoE)}


def reference_layer(folder: Path, name: str, **options: str) -> Callable[..., torch.Tensor]:
    """Return the reference's experts of the layer that SGLang calls ``name``."""
    layer: Callable[..., torch.Tensor] = Reference(folder, **options).model.get_submodule(  # type: ignore[arg-type]
        name.replace("block_sparse_moe", "mlp")
    )
    return layer


def check_experts(folder: Path, tolerance: float = FLIP_TOLERANCE, **options: str) -> dict[str, FusedMoE]:
    """Check every layer of experts of the checkpoint against the reference's, and return SGLang's."""
    model, checkpoint = build(folder)
    layers = expert_layers(model)
    assert len(layers) == len(checkpoint.experts) > 0
    for name, layer in layers.items():
        x = layer_inputs(layer.hidden_size, torch.float32)
        assert layer.top_k is not None
        chosen, weights = routing(len(x), layer.num_experts, layer.top_k)
        expected = reference_layer(folder, name, **options)(x, chosen, weights)
        error = relative_error(run(layer, x, chosen, weights), expected)
        assert error < tolerance, f"{name}: {error}"
    return layers


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_every_recipe(recipe: str, family: Family) -> None:
    check_experts(export(model_dir(tiny(family)), recipe))


def test_every_preset_is_covered() -> None:
    """Opting out is explicit: a preset that ModelOpt exports for mixtures is in a list above or named with its test."""
    import modelopt.torch.quantization as mtq

    presets = {name for name in dir(mtq) if name.endswith(("_CFG", "_CONFIG")) and "KV" not in name}
    assert presets == {*RECIPES, *MORE_RECIPES, *ELSEWHERE, *EXPORT_FAILS}


@pytest.mark.full
@pytest.mark.parametrize("recipe", MORE_RECIPES)
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_every_other_preset(recipe: str, family: Family) -> None:
    check_experts(export(model_dir(tiny(family)), recipe))


@pytest.mark.full
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_held_out_models(recipe: str, family: Family) -> None:
    """Seeds, sizes and numbers of experts that no other test has."""
    spec = TinyModel(family, seed=4321, hidden=384, intermediate=384, heads=6, kv_heads=3, layers=1, experts=7, top_k=3)
    check_experts(export(model_dir(spec), recipe))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", [W4A8, "W4A8_MXFP4_FP8_CFG"])
def test_half_precision(recipe: str, dtype: torch.dtype) -> None:
    """No further from float32 than twice the same layer run in that type by Hugging Face's arithmetic.

    The inputs are small enough for float16, which the product of gate and up would leave.
    """
    folder = export(model_dir(tiny("qwen3_moe")), recipe)
    wide, narrow = (Reference(folder, dtype=t).model for t in (torch.float32, dtype))
    for name, layer in expert_layers(build(folder, dtype=dtype)[0]).items():
        x = layer_inputs(layer.hidden_size, dtype) * 2.0**-5
        chosen, weights = routing(len(x))
        expected = wide.get_submodule(name)(x.float(), chosen, weights)
        noise = relative_error(narrow.get_submodule(name)(x, chosen, weights), expected)
        y = run(layer, x, chosen, weights)
        assert y.dtype == dtype
        assert relative_error(y, expected) < 2 * noise, name


def test_mxfp4_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MXFP4_ACTIVATIONS.variable, "none")
    folder = export(model_dir(tiny("qwen3_moe")), "MXFP4_MLP_WEIGHT_ONLY_CFG")
    check_experts(folder, tolerance=TOLERANCE, activation="none")


@pytest.mark.parametrize("gate_beside_up", [True, False])
@pytest.mark.parametrize(("family", "recipe"), [("mixtral", W4A8), ("qwen3_moe", "NVFP4_DEFAULT_CFG")])
def test_experts_with_scales_of_their_own(tmp_path: Path, family: Family, recipe: str, gate_beside_up: bool) -> None:
    """No scale of an expert, or of gate, is used for another; gate and up share a product where their inputs are rounded alike."""
    change = edits.distinct_expert_scales(gate_beside_up)
    layers = check_experts(edits.copy_with(export(model_dir(tiny(family)), recipe), tmp_path / "checkpoint", [change]))
    for layer in layers.values():
        (part,) = layer.quant_method.products["w13"].parts
        groups = part.product.groups
        assert [len(group.each) for group in groups] == ([1] if gate_beside_up else [1, 1])


def test_smoothing_of_experts(tmp_path: Path) -> None:
    """Experts with a pre_quant_scale each, which no preset exports yet."""

    def smooth(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name and name.endswith(".weight_scale")]:
            k = tensors[name.replace("_scale", "")].shape[1]
            factor = 1.0 + int(name.split(".experts.")[1].split(".")[0])
            scale = torch.linspace(0.25, 4.0, k) * factor
            tensors[name.replace("weight_scale", "pre_quant_scale")] = scale.to(torch.bfloat16)

    source = export(model_dir(tiny("qwen3_moe")), "FP8_DEFAULT_CFG")
    check_experts(edits.copy_with(source, tmp_path / "checkpoint", [edits.edit_tensors(smooth)]))


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_mixed_precision(tmp_path: Path, family: Family) -> None:
    """Experts and attention in different formats."""
    check_experts(mixed_checkpoint(family, tmp_path / "mixed"))


@pytest.mark.parametrize(
    "recipe", ["W4A8_MXFP4_FP8_CFG", W4A8, "INT8_SMOOTHQUANT_CFG", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"]
)
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_one_expert_unquantized(family: Family, recipe: str) -> None:
    """ModelOpt exports it in the model's type and does not list it; its input is not rounded."""
    for layer in check_experts(export(model_dir(tiny(family)), one_expert_off(recipe))).values():
        method = layer.quant_method
        assert [part.members for part in method.products["w13"].parts] == [(0, 1, 3), (2,)]
        assert [part.product.scheme.algo for part in method.products["w2"].parts][1:] == ["unquantized"]


def test_experts_of_several_formats(tmp_path: Path) -> None:
    """Two formats in one product, unquantized experts in the other, and both in one."""
    folder = mixed_checkpoint("qwen3_moe", tmp_path / "mixed")
    swap_format(folder, "down_proj", range(2, 3))
    unquantize(folder, "*.0.*.experts.[03].gate_proj", "*.0.*.experts.[03].up_proj", "*.0.*.experts.1.down_proj")
    layer = check_experts(folder)["model.layers.0.mlp.experts"]
    assert {
        name: {part.product.scheme.algo: part.members for part in products.parts}
        for name, products in layer.quant_method.products.items()
    } == {
        "w13": {"W4A8_NVFP4_FP8": (1, 2), "unquantized": (0, 3)},
        "w2": {"W4A8_NVFP4_FP8": (0, 3), "MXFP8": (2,), "unquantized": (1,)},
    }


def test_quantized_vocabulary(tmp_path: Path) -> None:
    """NVFP4 experts in the mix that ModelOpt itself writes; its KV cache is taken out."""
    changes = [
        edits.drop_embedded_config,
        edits.set_file_config({"kv_cache_quant_algo": None}),
        edits.drop_tensors("*.[kv]_scale"),
    ]
    source = export(model_dir(tiny("mixtral")), "NVFP4_FP8_MHA_CONFIG")
    layers = check_experts(edits.copy_with(source, tmp_path / "checkpoint", changes))
    assert {one.scheme.algo for layer in layers.values() for one in layer.quant_method.sets["w13"]} == {"NVFP4"}


def test_fp8_math(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other numerics of W4A8_NVFP4_FP8 reach the experts."""
    monkeypatch.setenv(W4A8_MATH.variable, "fp8")
    check_experts(export(model_dir(tiny("mixtral")), W4A8), math="fp8")


def test_a_shared_expert() -> None:
    """Qwen2-MoE: the expert that every token goes to is linear layers like any other, beside the routed ones."""
    folder = export(model_dir(tiny("qwen2_moe")), W4A8)
    check_experts(folder)
    model, checkpoint = build(folder)
    reference = Reference(folder).model
    assert len(checkpoint.experts) == 2
    for number in range(2):
        name = f"model.layers.{number}.mlp.shared_expert.down_proj"
        layer = model.get_submodule(name)
        x = layer_inputs(layer.input_size, torch.float32)
        assert relative_error(layer.quant_method.apply(layer, x), reference.get_submodule(name)(x)) < FLIP_TOLERANCE


@pytest.mark.parametrize(("recipe", "unused"), [(W4A8, (0, 1)), ("NVFP4_DEFAULT_CFG", (3, 2))])
def test_experts_without_tokens(recipe: str, unused: tuple[int, int]) -> None:
    """Two experts get every token, the others none; and a batch without tokens."""
    folder = export(model_dir(tiny("qwen3_moe")), recipe)
    name, layer = next(iter(expert_layers(build(folder)[0]).items()))
    x = layer_inputs(layer.hidden_size, torch.float32)
    used = [number for number in range(EXPERTS) if number not in unused]
    chosen, weights = torch.tensor([used] * len(x)), routing(len(x))[1]
    expected = reference_layer(folder, name)(x, chosen, weights)
    assert relative_error(run(layer, x, chosen, weights), expected) < FLIP_TOLERANCE
    assert run(layer, x[:0], chosen[:0], weights[:0]).shape == (0, layer.hidden_size)


def test_padded_tokens_have_no_expert() -> None:
    """SGLang marks the rows that fill up a batch with -1: they change nothing and come out as zero."""
    layer = next(iter(expert_layers(build(export(model_dir(tiny("qwen3_moe")), W4A8))[0]).values()))
    x = layer_inputs(layer.hidden_size, torch.float32)
    chosen, weights = routing(len(x))
    expected = run(layer, x, chosen, weights)
    chosen[-2:] = -1
    y = run(layer, x, chosen, weights)
    assert torch.equal(y[:-2], expected[:-2])
    assert not bool(y[-2:].any())


def test_router_weights_on_the_input() -> None:
    """Like in Llama 4, the token is weighted before its expert reads it."""
    folder = export(model_dir(tiny("qwen3_moe")), "NVFP4_MLP_WEIGHT_ONLY_CFG")
    name, layer = next(iter(expert_layers(build(folder)[0]).items()))
    layer.quant_method._config.apply_router_weight_on_input = True
    x = layer_inputs(layer.hidden_size, torch.float32)
    chosen, weights = routing(len(x))
    reference = reference_layer(folder, name)
    one = torch.ones(len(x), 1)
    expected = sum(reference(x * weights[:, i : i + 1], chosen[:, i : i + 1], one) for i in range(TOP_K))
    assert relative_error(run(layer, x, chosen, weights), torch.as_tensor(expected)) < TOLERANCE


class Together:
    """A stand-in for the communication of ranks: a first pass records what each sends, a second gathers it."""

    def __init__(self) -> None:
        self.sent: list[torch.Tensor] = []
        self.gathers = False

    def all_gather(self, own: torch.Tensor, dim: int) -> torch.Tensor:
        assert dim == -1
        if not self.gathers:
            self.sent.append(own)
            return own
        assert any(torch.equal(own, other) for other in self.sent)
        return torch.cat(self.sent, dim=-1)


def sum_of_ranks(
    ranks: Sequence[FusedMoE], x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, tp: int, ep: int
) -> torch.Tensor:
    """Return the sum of what ``ranks`` compute one after another, each with what the others send."""
    groups = {rank.moe_ep_rank: Together() for rank in ranks}
    for gathers in (False, True):
        outputs = []
        for number, rank in enumerate(ranks):
            group = groups[rank.moe_ep_rank]
            group.gathers = gathers
            with published(number, tp, ep), get_parallel().override(moe_tp_group=group):
                outputs.append(run(rank, x, chosen, weights))
    return torch.stack(outputs).sum(dim=0)


@pytest.mark.parametrize(
    ("recipe", "tp", "ep"),
    [
        (W4A8, 2, 1),
        ("W4A8_MXFP4_FP8_CFG", 2, 1),
        ("NVFP4_DEFAULT_CFG", 2, 1),
        ("FP8_PER_CHANNEL_PER_TOKEN_CFG", 2, 1),
        ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", 2, 1),
        ("INT8_DEFAULT_CFG", 2, 1),
        ("MXFP8_DEFAULT_CFG", 2, 1),
        (W4A8, 2, 2),
        ("W4A8_MXFP4_FP8_CFG", 4, 2),
        ("W4A8_MXFP4_FP8_CFG without an expert", 2, 1),
        ("W4A8_MXFP4_FP8_CFG without an expert", 2, 2),
        ("W4A8_MXFP4_FP8_CFG without an expert", 4, 2),
        ("W4A8_MXFP4_FP8_CFG without an expert", 4, 4),
    ],
)
def test_ranks_together_are_one(recipe: str, tp: int, ep: int) -> None:
    """Slices of experts, whole experts, and both: the ranks' sum is what one rank computes, per-token scales included."""
    name, _, without = recipe.partition(" ")
    folder = export(model_dir(tiny("mixtral", layers=1)), one_expert_off(name) if without else name)
    model, checkpoint = build(folder)
    name, whole = next(iter(expert_layers(model).items()))
    models = [build(folder, rank, tp, ep)[0] for rank in range(tp)]
    ranks = [model.get_submodule(name) for model in models]
    assert {rank.num_local_experts for rank in ranks} == {EXPERTS // ep}
    assert set().union(*(model.used for model in models)) == set(checkpoint.tensors)
    if ep > 1:
        assert all(".experts.3." not in used for used in models[0].used), "an expert of another rank"
    x = layer_inputs(whole.hidden_size, torch.float32)
    chosen, weights = routing(len(x))
    total = sum_of_ranks(ranks, x, chosen, weights, tp, ep)
    assert relative_error(total, run(whole, x, chosen, weights)) < TOLERANCE


def test_excluded_experts_stay_unquantized() -> None:
    folder = export(model_dir(tiny("qwen3_moe")), "FP8_DEFAULT_CFG", Variant(exclude=("*mlp*",)))
    model, checkpoint = build(folder)
    assert not checkpoint.experts
    for name, layer in expert_layers(model).items():
        assert isinstance(layer.quant_method, UnquantizedFusedMoEMethod)
        stored = edits.read_tensors(folder)[f"{name}.3.down_proj.weight"]
        assert torch.equal(layer.w2_weight[3], stored.float())


@pytest.mark.parametrize(
    ("recipe", "fp4"), [(W4A8, "round"), ("NVFP4_DEFAULT_CFG", "keep"), (f"{W4A8} without an expert", "round")]
)
def test_reload(recipe: str, fp4: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Restoring, loading another checkpoint and preparing again serves the other checkpoint's experts."""
    monkeypatch.setenv(FP4_ACTIVATIONS.variable, fp4)
    config, _, without = recipe.partition(" ")
    first, second = (
        export(model_dir(tiny("qwen3_moe", seed=seed)), one_expert_off(config) if without else config)
        for seed in (0, 7)
    )
    model, _ = build(first)
    names = {name for name, _ in model.named_parameters()}
    for module, method in quantized_modules(model):
        method.restore_weights_before_loading(module)
    load(model, read_checkpoint(second))
    assert {name for name, _ in model.named_parameters()} == names
    for name, layer in expert_layers(model).items():
        x = layer_inputs(layer.hidden_size, torch.float32)
        chosen, weights = routing(len(x))
        activation = {"activation": "none"} if fp4 == "keep" else {}
        expected = reference_layer(second, name, **activation)(x, chosen, weights)
        assert relative_error(run(layer, x, chosen, weights), expected) < FLIP_TOLERANCE


def test_one_kernel_for_a_whole_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package's kernel by name, replaced by PyTorch: loaded from an export, and again from another.

    No further from float32, token for token, than twice the two products that it stands for.
    """
    backend = CutlassNvfp4Experts
    folders = [export(model_dir(tiny("qwen3_moe", seed=seed)), "NVFP4_DEFAULT_CFG") for seed in (0, 7)]
    two_products = [expert_layers(build(folder, dtype=torch.bfloat16)[0]) for folder in folders]
    monkeypatch.setitem(sys.modules, "flashinfer.fused_moe", fused_kernel.module())
    monkeypatch.setattr(backend, "supports", lambda *_: None)
    monkeypatch.setenv(env.EXPERTS.variable, backend.name)
    model, _ = build(folders[0], dtype=torch.bfloat16)
    names = {name for name, _ in model.named_parameters()}
    for folder, others in zip(folders, two_products, strict=True):
        if folder != folders[0]:
            for module, method in quantized_modules(model):
                method.restore_weights_before_loading(module)
            load(model, read_checkpoint(folder))
        assert {name for name, _ in model.named_parameters()} == names
        for name, layer in expert_layers(model).items():
            assert set(layer.quant_method.kernels.values()) == {(backend.name,)}
            x = layer_inputs(layer.hidden_size, torch.bfloat16)
            chosen, weights = routing(len(x))
            expected = reference_layer(folder, name)(x.float(), chosen, weights).double()
            own, other = (
                float(((run(served, x, chosen, weights) - expected).norm(dim=1) / (expected.norm(dim=1) + 1e-9)).max())
                for served in (layer, others[name])
            )
            assert own < 2 * other, name
