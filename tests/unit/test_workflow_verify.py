"""The verdict of ``verify`` without a server: an independent reading of the checkpoint stands for one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sglang_modelopt_ext.cli.verify import VerifyResult
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.env import MXFP4_ACTIVATIONS
from sglang_modelopt_ext.workflow.evaluate.measure import assumptions
from sglang_modelopt_ext.workflow.verify.reference import TIE, DecodedLinear, ReferenceModel
from sglang_modelopt_ext.workflow.verify.run import FACTOR, RESOLUTION, Served, Verification, verify
from tests.support import edits
from tests.support.exports import export
from tests.support.models import TinyModel, model_dir, random_ids
from tests.support.recipes import Activation
from tests.support.reference import QuantLinear, Reference

WINDOWS = [random_ids(24, seed=200 + i, vocab=511) for i in range(12)]
BASE = TinyModel("qwen2")
TIES = TinyModel("llama")


@pytest.fixture(scope="module")
def folder() -> Path:
    return export(model_dir(BASE), "W4A8_NVFP4_FP8_CFG")


def served(
    folder: Path, dtype: torch.dtype, windows: Sequence[Sequence[int]] = WINDOWS, activation: Activation = "recipe"
) -> Served:
    """Return the answers of a correct server of ``folder`` in ``dtype``."""
    model = Reference(folder, dtype=dtype, activation=activation)
    rows = [model.logprobs(window)[:-1].numpy() for window in windows]
    return Served(url="http://test", model=str(folder), dtype=dtype, kv_cache_dtype="auto", rows=rows, again=rows[0])


def check(folder: Path, answers: Served) -> Verification:
    return verify(folder, answers, WINDOWS, Device.cpu(), progress=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_right_server_passes(folder: Path, dtype: torch.dtype) -> None:
    found = check(folder, served(folder, dtype))
    assert found.failures == []
    assert found.tokens == sum(len(window) - 1 for window in WINDOWS)
    assert (found.ties is None) == (dtype == torch.bfloat16)
    floor = found.ties or found.rounding
    assert found.limits["mean_abs_logprob"] == pytest.approx(FACTOR * floor.mean_abs_logprob)


@pytest.mark.parametrize(
    "factors",
    [
        {"model.layers.1.mlp.down_proj.weight_scale_2": 1.25},
        {"model.layers.0.self_attn.v_proj.weight_scale": 1.5},
        {"model.layers.0.mlp.up_proj.input_scale": 0.5},
        {"model.norm.weight": 1.1},
    ],
    ids=lambda factors: next(iter(factors)),
)
def test_one_wrong_tensor_fails(folder: Path, tmp_path: Path, factors: dict[str, float]) -> None:
    """The server's numbers are those of ``folder``, the checkpoint on disk is another."""
    other = edits.copy_with(folder, tmp_path / "other", [edits.scale_tensors(factors)])
    found = check(other, served(folder, torch.float32))
    assert found.failures[0].startswith("mean_abs_logprob")
    assert len(found.failures) >= 2
    assert not VerifyResult(verification=found).passed()
    assert "FAILED: mean_abs_logprob is" in VerifyResult(verification=found).text()


def test_an_mxfp4_export_without_an_answer_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reading that a server takes by itself is verified, and said; with the answer given there is nothing to say."""
    monkeypatch.delenv(MXFP4_ACTIVATIONS.variable, raising=False)
    folder = export(model_dir(TIES), "MXFP4_DEFAULT_CFG")
    found = check(folder, served(folder, torch.float32))
    assert found.failures == []
    (note,) = found.notes
    assert "taken for MXFP4_DEFAULT, which rounds them (SGLANG_MODELOPT_EXT_MXFP4_ACTIVATIONS=mxfp4)" in note
    assert f"note: {note}" in VerifyResult(verification=found).text()
    monkeypatch.setenv(MXFP4_ACTIVATIONS.variable, "mxfp4")
    assert assumptions(folder) == []


def first_rank(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Multiply the first half of the rows, those of rank 0 of 2; E8M0 bytes have exponents, of which 1 is taken off."""

    def change(scale: torch.Tensor) -> torch.Tensor:
        half = len(scale) // 2
        first = scale[:half] - 1 if scale.dtype == torch.uint8 else (scale[:half].float() * factor).to(scale.dtype)
        return torch.cat([first, scale[half:]])

    return change


@pytest.mark.parametrize("recipe", ["INT8_DEFAULT_CFG", "MXFP4_DEFAULT_CFG"])
@pytest.mark.parametrize("layer", ["0.self_attn.k_proj", "1.self_attn.o_proj", "1.mlp.up_proj"])
def test_one_ranks_wrong_scale_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recipe: str, layer: str) -> None:
    """In float32, where the limit of the means allows for ties, half of one layer's scales x 1.25 (MXFP4: / 2)."""
    monkeypatch.setenv(MXFP4_ACTIVATIONS.variable, "mxfp4")
    folder = export(model_dir(TIES), recipe)
    change = edits.map_tensors(f"model.layers.{layer}.weight_scale", first_rank(1.25))
    other = edits.copy_with(folder, tmp_path / "other", [change])
    found = check(other, served(folder, torch.float32))
    assert any(failure.startswith("median_abs_logprob") for failure in found.failures), found


def test_the_other_side_of_a_tie_passes() -> None:
    """A server is right that rounds the activation nearest a tie the other way, and beyond what one float32 run is off by."""
    folder = export(model_dir(TIES), "INT8_DEFAULT_CFG")
    model = Reference(folder)
    layers = {n: m for n, m in model.model.named_modules() if isinstance(m, QuantLinear)}
    inputs: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, x, name=name: inputs.__setitem__(name, x[0][0]))
    for seed in itertools.count(200):
        window = random_ids(24, seed=seed, vocab=511)
        model.logprobs(window)
        near = []
        for name, x in inputs.items():
            codes = (x.double() / layers[name].parts["input_scale"].double())[:-1]
            apart = ((codes.abs() % 1) - 0.5).abs() / codes.abs().clamp_min(0.5)
            place = int(apart.argmin())
            near.append((float(apart.flatten()[place]), name, *divmod(place, x.shape[1])))
        nearest, name, row, column = min(near)
        if nearest < TIE / 2:
            break

    def flip(layer: nn.Module, args: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
        assert isinstance(layer, QuantLinear)
        scale = layer.parts["input_scale"].to(torch.float32)
        code = args[0][0, row, column] / scale
        other = code.floor() if code.round() > code else code.ceil()
        step = (other - code.round()) * scale
        weight = layer.weight_parts.units * layer.weight_parts.scale.reshape(-1, 1)
        changed = y.clone()
        changed[0, row] += step * weight[:, column]
        return changed

    windows = [window, *WINDOWS]
    answers = served(folder, torch.float32, windows)
    for other, layer in layers.items():  # Layers that share an input share its rounding.
        if torch.equal(inputs[other], inputs[name]):
            layer.register_forward_hook(flip)
    answers.rows[0] = model.logprobs(window)[:-1].numpy()
    found = verify(folder, answers, windows, Device.cpu(), progress=False)
    assert found.served.mean_abs_logprob > FACTOR * max(found.rounding.mean_abs_logprob, RESOLUTION)
    assert found.served.median_abs_logprob < RESOLUTION
    assert found.failures == []


def test_ties_hold_the_errors_of_float32() -> None:
    """Of what float32 makes the inputs of quantized layers differ by, 90 % lies within :data:`TIE` of them."""
    folder = export(model_dir(TIES), "INT8_DEFAULT_CFG")
    inputs: dict[torch.dtype, list[torch.Tensor]] = {torch.float32: [], torch.float64: []}
    for dtype, found in inputs.items():
        model = ReferenceModel(folder, dtype)
        for layer in model.model.modules():
            if isinstance(layer, DecodedLinear):
                layer.register_forward_pre_hook(lambda _, x, found=found: found.append(x[0].double()))
        for window in WINDOWS:
            model.logprobs(window)
    error, within = 0.0, 0.0
    for rounded, exact in zip(inputs[torch.float32], inputs[torch.float64], strict=True):
        difference = (rounded - exact).abs()
        # Beyond a flip in an earlier layer everything differs, by much more.
        if float(difference.norm() / exact.norm()) < 1e-5:
            error += float(difference.sum())
            within += float(torch.minimum(difference, TIE * exact.abs()).sum())
    assert 0.9 < within / error < 1


def test_a_server_that_leaves_activations_unrounded_fails(folder: Path) -> None:
    assert check(folder, served(folder, torch.float32, activation="none")).failures


def test_nan_fails(folder: Path) -> None:
    answers = served(folder, torch.bfloat16)
    answers.rows[3][5] = np.nan
    assert len(check(folder, answers).failures) == 3
