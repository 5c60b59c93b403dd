"""A sequence classifier whose head is quantized like its other layers: SGLang builds the head as PyTorch's own linear layer."""

from __future__ import annotations

import statistics

import pytest
import torch

from tests.layers.test_recipes import relative_error
from tests.serving.tolerance import FP32_MEDIAN
from tests.support.exports import export
from tests.support.models import TinyModel, model_dir, random_ids
from tests.support.reference import Reference
from tests.support.server import Server

pytestmark = pytest.mark.server

PROMPTS = (3, 5, 8, 13, 21, 34, 55)
"""Their lengths: short ones, for the reason that :data:`FP32_MEDIAN` gives."""


@pytest.mark.full
@pytest.mark.parametrize("recipe", ["W4A8_NVFP4_FP8_CFG", "W4A8_MXFP4_FP8_CFG", "W4A8_AWQ_BETA_CFG"])
def test_scores(recipe: str) -> None:
    """The scores are those of the float32 reading, but for prompts with an activation in the middle between two codes."""
    folder = export(model_dir(TinyModel("classifier")), recipe)
    reference = Reference(folder).model
    assert "score" in Reference(folder).weights, "the head is quantized"
    prompts = [random_ids(length, seed=length) for length in PROMPTS]
    with Server(folder, dtype="float32", args=["--is-embedding"]) as server:
        answers = server.request("/encode", {"input_ids": prompts})
    with torch.no_grad():
        expected = [reference(input_ids=torch.tensor([prompt])).logits[0].float() for prompt in prompts]
    errors = [relative_error(torch.tensor(a["embedding"]), e) for a, e in zip(answers, expected, strict=True)]
    assert statistics.median(errors) < FP32_MEDIAN, errors
