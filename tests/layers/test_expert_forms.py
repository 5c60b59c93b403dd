"""Experts of other forms than SwiGLU stored one by one: SGLang's own layers from real exports, against an independent reading.

gpt-oss, Llama 4, Nemotron-H and GLM-4-MoE, exported by ModelOpt. What it cannot export is written by hand in its layout, and the
test says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

from sglang_modelopt_ext.checkpoint.reader import Checkpoint, bits_per_weight, check_all_values, read_checkpoint
from sglang_modelopt_ext.env import MXFP4_ACTIVATIONS
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.config import ModelOptExtConfig, register_methods
from sglang_modelopt_ext.integration.loading import StrictLoad, quantized_modules
from sglang_modelopt_ext.schemes.table import UMBRELLA
from tests.layers.harness import load
from tests.layers.moe_harness import MoeNamespace, published, run
from tests.layers.test_moe import routing, sum_of_ranks
from tests.layers.test_recipes import FLIP_TOLERANCE, TOLERANCE, layer_inputs, relative_error
from tests.support import edits
from tests.support.expert_models import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    MODELS,
    ExpertReading,
    Kind,
    model_dir,
    pack_experts,
    transpose_packed,
)
from tests.support.exports import Variant, export
from tests.support.quantizing import calibration_file
from tests.support.quantizing import run as run_quantize

NVFP4, W4A8, MXFP4, FP8 = "NVFP4_DEFAULT_CFG", "W4A8_NVFP4_FP8_CFG", "W4A8_MXFP4_FP8_CFG", "FP8_DEFAULT_CFG"
EXPORTS: tuple[tuple[Kind, str], ...] = (
    ("gpt_oss", NVFP4),
    ("gpt_oss", "W4A16_NVFP4_CFG"),
    ("gpt_oss", "NVFP4_MLP_WEIGHT_ONLY_CFG"),
    ("gpt_oss", FP8),
    ("gpt_oss", "FP8_PER_CHANNEL_PER_TOKEN_CFG"),
    ("llama4", NVFP4),
    ("llama4", FP8),
    ("nemotron_h", W4A8),
    ("nemotron_h", MXFP4),
    ("nemotron_h", NVFP4),
    ("nemotron_h", "MXFP8_DEFAULT_CFG"),
    ("nemotron_h", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"),
    ("glm4_moe", W4A8),
)
"""What ModelOpt 0.47 exports with blocks along K; of experts without a gate one recipe of each kind of scale."""
ALONG_N = (W4A8, MXFP4, "MXFP8_DEFAULT_CFG")
"""Recipes that it exports for packed experts with blocks along N, though its own simulation has them along K."""


@pytest.fixture(autouse=True)
def mxfp4_rounds_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MXFP4_ACTIVATIONS.variable, "mxfp4")


class Experts(MoeNamespace):
    """A model of one layer of experts, whose loader skips the tensors of all other modules."""

    def load_weights(self, weights: Any) -> None:
        """Load the layer's experts by SGLang's own table of names."""
        super().load_weights((name, tensor) for name, tensor in weights if ".experts." in name)


def build(
    folder: Path, kind: Kind, rank: int = 0, tp: int = 1, ep: int = 1, fused: int = 0
) -> tuple[FusedMoE, Checkpoint]:
    """Return one layer of experts as one rank has it, built like SGLang's model class builds it, loaded and prepared.

    ``fused`` is the number of shared experts among the routed ones.
    """
    register_methods()
    checkpoint = read_checkpoint(folder)
    described = MODELS[kind]
    config = ModelOptExtConfig(UMBRELLA, checkpoint.config, checkpoint)
    name = experts_name(checkpoint)
    model = Experts(FusedMoE.make_expert_params_mapping(*described.names, EXPERTS + fused))
    with published(rank, tp, ep):
        layer = FusedMoE(
            num_experts=EXPERTS + fused,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            layer_id=1,
            top_k=described.top_k + fused,
            num_fused_shared_experts=fused,
            params_dtype=torch.float32,
            quant_config=config,
            prefix=name,
            **described.options,
        )
        model.put(name, layer)
        if fused:
            rename_shared(model, EXPERTS)
        used = load(model, checkpoint, set(checkpoint.tensors))
    owned = {tensor for tensor in checkpoint.tensors if tensor.startswith(f"{name}.")}
    if tp == ep == 1:
        assert owned <= used
    return layer, checkpoint


def experts_name(checkpoint: Checkpoint) -> str:
    """Return the name of the last layer's experts: of Nemotron-H's, ModelOpt has two, by recipe."""
    return sorted(layer.name for layer in checkpoint.experts.values())[-1]


def rename_shared(model: Experts, number: int) -> None:
    """Make the loader read the shared expert as one more, like SGLang's model classes do where it is fused."""
    inner = model.load_weights
    shared = f".experts.{number}."
    model.load_weights = lambda weights: inner(  # type: ignore[method-assign]
        (name.replace(".shared_experts.", shared), tensor) for name, tensor in weights
    )


def check(folder: Path, kind: Kind, reading: Path | None = None, tolerance: float = FLIP_TOLERANCE) -> FusedMoE:
    """Check a layer of experts against the reading of ``reading``, by default of the same folder, and return SGLang's layer."""
    layer, checkpoint = build(folder, kind)
    x = layer_inputs(HIDDEN, torch.float32)
    chosen, weights = routing(len(x), EXPERTS, MODELS[kind].top_k)
    weights = weights * torch.linspace(0.5, 1.0, len(x)).unsqueeze(1)  # one expert of a token has another weight than 1
    expected = ExpertReading(reading or folder, kind, experts_name(checkpoint))(x, chosen, weights)
    error = relative_error(run(layer, x, chosen, weights), expected)
    assert error < tolerance, error
    return layer


@pytest.mark.parametrize(("kind", "recipe"), EXPORTS)
def test_every_form(kind: Kind, recipe: str) -> None:
    folder = export(model_dir(kind), recipe)
    check(folder, kind)
    checkpoint = read_checkpoint(folder)
    check_all_values(checkpoint)
    assert 4 <= bits_per_weight(checkpoint) < 9
    (described,) = {(layer.gated, layer.bias, layer.packed is not None) for layer in checkpoint.experts.values()}
    assert described == (kind != "nemotron_h", kind == "gpt_oss", MODELS[kind].packed)


@pytest.mark.parametrize("recipe", [NVFP4, FP8])
@pytest.mark.parametrize("kind", ["gpt_oss", "llama4"])
def test_packed_like_linear_layers(tmp_path: Path, kind: Kind, recipe: str) -> None:
    """By hand: ``[E, N, K]``, which no exporter of ModelOpt 0.47 writes."""
    folder = export(model_dir(kind), recipe)
    turned = edits.copy_with(folder, tmp_path / "turned", [edits.edit_tensors(transpose_packed)])
    check(turned, kind, folder)
    check_all_values(read_checkpoint(turned))


@pytest.mark.parametrize("recipe", [*ALONG_N, FP8])
def test_packed_in_other_formats(tmp_path: Path, recipe: str) -> None:
    """By hand, from experts stored one by one: every expert with scales of its own, blocks along K of ``[E, K, N]``."""
    folder = export(model_dir("glm4_moe"), recipe)
    name = MODELS["glm4_moe"].experts
    pack = edits.edit_tensors(lambda tensors: pack_experts(tensors, name))
    packed = edits.copy_with(folder, tmp_path / "packed", [pack])
    check(packed, "glm4_moe", folder)


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        pytest.param(kind, recipe, marks=() if (kind == "gpt_oss") == (recipe in (W4A8, MXFP4)) else pytest.mark.full)
        for kind in ("gpt_oss", "llama4")
        for recipe in (*ALONG_N, "MXFP4_DEFAULT_CFG")
    ],
)
def test_packed_by_quantize(tmp_path: Path, kind: Kind, recipe: str) -> None:
    """``quantize`` has blocks along K: its export is served, and read, as it is."""
    check(run_quantize(model_dir(kind), tmp_path / "out", calibration_file(tmp_path), recipe).exported.folder, kind)


@pytest.mark.parametrize("recipe", ALONG_N)
@pytest.mark.parametrize("kind", ["gpt_oss", "llama4"])
def test_blocks_along_n_are_an_error(kind: Kind, recipe: str) -> None:
    """Real exports that stock readers would take for transposed ones."""
    with pytest.raises(
        ModelOptExtError, match=r"experts\.gate_up_proj(_weight_scale)?: expected codes and scales of blocks along K"
    ):
        read_checkpoint(export(model_dir(kind), recipe))


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4"])
def test_blocks_of_several_rows_are_an_error(kind: Kind) -> None:
    """Real exports of packed experts in 128 x 128 blocks decode to other weights than those that were quantized."""
    line = r"experts\.gate_up_proj: expected a recipe without blocks of several rows, .*, got FP8_PB_WO"
    with pytest.raises(ModelOptExtError, match=line):
        read_checkpoint(export(model_dir(kind), "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"))


@pytest.mark.parametrize(("kind", "recipe"), [case for case in EXPORTS if MODELS[case[0]].packed])
def test_packed_weights_are_those_of_the_model(kind: Kind, recipe: str) -> None:
    """Decoded experts are as far from the weights that ModelOpt quantized as their formats round: no layout is misread."""
    folder = export(model_dir(kind), recipe)
    before, tensors = edits.read_tensors(model_dir(kind)), edits.read_tensors(folder)
    for layer in read_checkpoint(folder).experts.values():
        assert layer.packed is not None
        for projection in layer.packed.projections:
            for expert in range(EXPERTS):
                stored = {
                    name: projection.of_expert(name, tensors[header.name], expert).contiguous()
                    for name, header in projection.one.stored.items()
                }
                weight = projection.one.scheme.weight.decode(stored).dequantize()
                expected = before[projection.stored["weight"].name][expert].T.float()
                assert relative_error(weight, expected) < 0.12


@pytest.mark.parametrize(
    ("kind", "recipe", "tp", "ep"),
    [
        ("gpt_oss", NVFP4, 2, 1),
        ("gpt_oss", FP8, 2, 2),
        ("llama4", NVFP4, 2, 1),
        ("nemotron_h", W4A8, 2, 1),
        ("nemotron_h", NVFP4, 4, 2),
    ],
)
def test_ranks_together_are_one(kind: Kind, recipe: str, tp: int, ep: int) -> None:
    """Slices of packed experts and of those without a gate; of the ranks that hold slices one adds the bias of their sum."""
    folder = export(model_dir(kind), recipe)
    whole, _ = build(folder, kind)
    ranks = [build(folder, kind, rank, tp, ep)[0] for rank in range(tp)]
    x = layer_inputs(HIDDEN, torch.float32)
    chosen, weights = routing(len(x), EXPERTS, MODELS[kind].top_k)
    total = sum_of_ranks(ranks, x, chosen, weights, tp, ep)
    assert relative_error(total, run(whole, x, chosen, weights)) < TOLERANCE


def test_a_fused_shared_expert() -> None:
    """One more expert, which every token goes to with the weight that SGLang's router gives it."""
    folder = export(model_dir("glm4_moe"), W4A8)
    layer, _ = build(folder, "glm4_moe", fused=1)
    x = layer_inputs(HIDDEN, torch.float32)
    chosen, weights = routing(len(x))
    reading = ExpertReading(folder, "glm4_moe", MODELS["glm4_moe"].experts)
    assert reading.shared is not None
    expected = reading(x, chosen, weights) + 0.4 * reading.of_expert(reading.shared, x)
    column = torch.full((len(x), 1), EXPERTS)
    y = run(layer, x, torch.cat([chosen, column], dim=1), torch.cat([weights, torch.full((len(x), 1), 0.4)], dim=1))
    assert relative_error(y, expected) < FLIP_TOLERANCE


def test_a_shared_expert_of_another_kind() -> None:
    """Left as a layer of its own: SGLang's DeepSeek classes ask, and for the others the error names the flag."""
    folder = export(model_dir("glm4_moe"), W4A8, Variant(exclude=("*shared_experts*",)))
    checkpoint = read_checkpoint(folder)
    assert not ModelOptExtConfig(UMBRELLA, checkpoint.config, checkpoint).can_fuse_shared_expert()
    with pytest.raises(ModelOptExtError, match=r"mlp\.shared_experts: expected .* or --disable-shared-experts-fusion"):
        build(folder, "glm4_moe", fused=1)
    whole = read_checkpoint(export(model_dir("glm4_moe"), W4A8))
    assert ModelOptExtConfig(UMBRELLA, whole.config, whole).can_fuse_shared_expert()


FAULTS: dict[str, tuple[edits.Edit, str]] = {
    "no scale": (
        edits.drop_tensors("*.experts.down_proj_weight_scale_2"),
        r"down_proj\.weight_scale_2: expected a tensor of NVFP4",
    ),
    "no down projection": (
        edits.drop_tensors("*.1.*.experts.down_proj*"),
        r"experts\.down_proj: expected a quantized tensor beside",
    ),
    "one bias": (
        edits.drop_tensors("*.experts.down_proj_bias"),
        r"down_proj_bias: expected a bias of both projections, or of none",
    ),
    "an expert less": (
        edits.map_tensors("*.1.*.experts.down_proj", lambda t: t[:3].clone()),
        r"experts\.down_proj: expected 3 dimensions, the first of 4 experts, got \[3,",
    ),
    "another size": (
        edits.map_tensors("*.1.*.experts.down_proj", lambda t: t[:, :-16].clone()),
        r"experts\.gate_up_proj, down_proj: expected \[E, K, N\] or \[E, N, K\]",
    ),
    "a scale of another size": (
        edits.map_tensors("*.1.*.experts.down_proj_weight_scale", lambda t: t[:, :-1].clone()),
        r"experts\.down_proj_weight_scale: expected shape \[256, 32\], got \[256, 31\]",
    ),
    "a bias of another size": (
        edits.map_tensors("*.1.*.experts.down_proj_bias", lambda t: t[:, :-1].clone()),
        r"experts\.down_proj_bias: expected shape \[256\], got \[255\]",
    ),
    "a scale that is no number": (
        edits.map_tensors("*.1.*.experts.down_proj_weight_scale_2", lambda t: torch.full_like(t, float("nan"))),
        r"down_proj_weight_scale_2: expected finite, positive",
    ),
    "a zero scale": (
        edits.map_tensors("*.1.*.experts.gate_up_proj_weight_scale", torch.zeros_like),
        r"gate_up_proj_weight_scale: expected a zero block scale only over all-zero codes",
    ),
    "an unknown tensor": (
        edits.edit_tensors(
            lambda tensors: tensors.update({"model.layers.1.mlp.experts.down_proj_zero": torch.ones(4)})
        ),
        r"down_proj_zero: expected only the tensors of NVFP4",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_packed_experts(tmp_path: Path, fault: str) -> None:
    change, message = FAULTS[fault]
    folder = edits.copy_with(export(model_dir("gpt_oss"), NVFP4), tmp_path / "checkpoint", [change])
    with pytest.raises(ModelOptExtError, match=message):
        check_all_values(read_checkpoint(folder))


def test_a_bias_that_no_model_has(tmp_path: Path) -> None:
    """An expert's values must be finite, and a model with biases needs them."""
    source = export(model_dir("gpt_oss"), NVFP4)
    spoilt = edits.map_tensors("*.1.*.experts.gate_up_proj_bias", lambda t: torch.full_like(t, float("inf")))
    with pytest.raises(ModelOptExtError, match="gate_up_proj_bias: expected finite values"):
        build(edits.copy_with(source, tmp_path / "spoilt", [spoilt]), "gpt_oss")
    without = edits.drop_tensors("*.experts.*_bias")
    with pytest.raises(ModelOptExtError, match="experts: expected experts with a bias, as the model has them"):
        build(edits.copy_with(source, tmp_path / "without", [without]), "gpt_oss")


def test_experts_with_biases_of_their_own(tmp_path: Path) -> None:
    """By hand: experts stored one by one may have biases, too; the weights are those of an export."""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        for name in [name for name in tensors if ".experts." in name and name.endswith(".weight")]:
            rows = tensors[name].shape[0]
            tensors[name.replace(".weight", ".bias")] = torch.randn(rows, generator=generator).to(torch.bfloat16)

    folder = export(model_dir("nemotron_h"), W4A8)
    biased = edits.copy_with(folder, tmp_path / "biased", [edits.edit_tensors(add)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS["nemotron_h"].options, "with_bias", True)
        check(biased, "nemotron_h")


def test_reload_of_packed_experts() -> None:
    """Restoring, loading another checkpoint and preparing again serves the other checkpoint's experts."""
    first, second = (export(model_dir("gpt_oss", seed), NVFP4) for seed in (0, 7))
    layer, _ = build(first, "gpt_oss")
    model = Experts([])
    model.put(MODELS["gpt_oss"].experts, layer)
    for module, method in quantized_modules(model):
        method.restore_weights_before_loading(module)
    checkpoint = read_checkpoint(second)
    load(model, checkpoint, set(checkpoint.tensors))
    x = layer_inputs(HIDDEN, torch.float32)
    chosen, weights = routing(len(x))
    expected = ExpertReading(second, "gpt_oss", MODELS["gpt_oss"].experts)(x, chosen, weights)
    assert relative_error(run(layer, x, chosen, weights), expected) < FLIP_TOLERANCE


def test_dummy_weights() -> None:
    """Without a checkpoint the configuration decides, for experts without a gate and for those with biases."""
    for kind in ("gpt_oss", "nemotron_h"):
        config = read_checkpoint(export(model_dir(kind), NVFP4)).config
        described = MODELS[kind]
        with published():
            layer = FusedMoE(
                num_experts=EXPERTS,
                hidden_size=HIDDEN,
                intermediate_size=INTERMEDIATE,
                layer_id=1,
                top_k=2,
                quant_config=ModelOptExtConfig(UMBRELLA, config, None),
                prefix=described.experts,
                **described.options,
            )
            method = layer.quant_method
            method.fill_dummy(layer)
            method.process_weights_after_loading(layer)
            assert bool(torch.isfinite(run(layer, torch.randn(5, HIDDEN), *routing(5))).all())


def test_unquantized_packed_experts_stay_sglangs() -> None:
    """Experts that a recipe leaves out are loaded by SGLang, gate and up of all experts at once, and strictly."""
    folder = export(model_dir("gpt_oss"), NVFP4, Variant(exclude=("*mlp*",)))
    checkpoint = read_checkpoint(folder)
    assert not checkpoint.experts
    described = MODELS["gpt_oss"]
    register_methods()
    with published():
        config = ModelOptExtConfig(UMBRELLA, checkpoint.config, checkpoint)
        layer = FusedMoE(
            num_experts=EXPERTS,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            layer_id=1,
            top_k=2,
            params_dtype=torch.bfloat16,
            quant_config=config,
            prefix=described.experts,
            use_weight_loader_fused=True,
            **described.options,
        )
        assert isinstance(layer.quant_method, UnquantizedFusedMoEMethod)
        model = Experts([])
        model.put(described.experts, layer)
        strict = StrictLoad(model, checkpoint)
        stored = edits.read_tensors(folder)

        def of_model(weights: Any) -> None:
            parameters = dict(model.named_parameters())
            for name, tensor in weights:
                for old, new, shard in (("gate_up_proj", "w13_weight", "w13"), ("down_proj", "w2_weight", "w2")):
                    if name.startswith(f"{described.experts}.{old}"):
                        full = name.replace(old, new)
                        turned = tensor if "bias" in name else tensor.transpose(-2, -1)
                        parameters[full].weight_loader(parameters[full], turned, full, shard_id=shard)

        strict.load(of_model, stored.items())
        assert not list(strict.missing())
        assert torch.equal(layer.w2_weight[3], stored[f"{described.experts}.down_proj"][3].T)
