"""The verdict of ``verify`` without a server: an independent reading of the checkpoint stands for one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sglang_modelopt_ext.cli.verify import VerifyResult
from sglang_modelopt_ext.workflow.target import Target
from sglang_modelopt_ext.workflow.verify import FACTOR, Served, Verification, verify
from tests.support import edits
from tests.support.exports import export
from tests.support.models import TinyModel, model_dir, random_ids
from tests.support.reference import Reference

WINDOWS = [random_ids(24, seed=200 + i, vocab=511) for i in range(12)]
BASE = TinyModel("qwen2")


@pytest.fixture(scope="module")
def folder() -> Path:
    return export(model_dir(BASE), "W4A8_NVFP4_FP8_CFG")


def served(folder: Path, dtype: torch.dtype, **options: str) -> Served:
    """What a right server of ``folder`` in ``dtype`` would answer."""
    model = Reference(folder, dtype=dtype, **options)
    rows = [model.logprobs(window)[:-1].numpy() for window in WINDOWS]
    return Served(url="http://test", model=str(folder), dtype=dtype, kv_cache_dtype="auto", rows=rows, again=rows[0])


def check(folder: Path, answers: Served) -> Verification:
    return verify(folder, answers, WINDOWS, Target(None), progress=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_right_server_passes(folder: Path, dtype: torch.dtype) -> None:
    found = check(folder, served(folder, dtype))
    assert found.failures == []
    assert found.tokens == sum(len(window) - 1 for window in WINDOWS)
    assert found.limits["mean_abs_logprob"] == pytest.approx(FACTOR * found.rounding.mean_abs_logprob)


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
    assert len(found.failures) == 2
    assert not VerifyResult(verification=found).passed()
    assert "FAILED: mean_abs_logprob is" in VerifyResult(verification=found).text()


def test_a_server_that_leaves_activations_unrounded_fails(folder: Path) -> None:
    assert check(folder, served(folder, torch.float32, activation="none")).failures


def test_nan_fails(folder: Path) -> None:
    answers = served(folder, torch.bfloat16)
    answers.rows[3][5] = np.nan
    assert len(check(folder, answers).failures) == 2
