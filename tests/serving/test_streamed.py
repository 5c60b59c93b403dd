"""``--load-format runai_streamer``: the same strict account of every tensor, and the same answers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sglang_modelopt_ext.integration.streaming import in_memory_of_their_own
from tests.support import edits
from tests.support.kv_exports import kv_export
from tests.support.models import random_ids
from tests.support.server import Server, failing_start

STREAMED = ("--load-format", "runai_streamer")
installed = pytest.mark.skipif(
    importlib.util.find_spec("runai_model_streamer") is None, reason="runai-model-streamer is not installed"
)


@pytest.mark.full
@pytest.mark.server
@installed
def test_a_streamed_checkpoint_answers_as_a_plain_one() -> None:
    """Weights, and the scales of an NVFP4 cache: bit for bit."""
    folder = kv_export("nvfp4", "llama", "W4A8_NVFP4_FP8_CFG")
    prompt = random_ids(24, 1)
    answers = []
    for args in ((), STREAMED):
        with Server(folder, dtype="float32", args=args) as server:
            answers.append(server.full_logprobs(prompt))
            assert "modelopt_ext: KV cache nvfp4" in server.output()
    assert torch.equal(*answers)


@pytest.mark.full
@pytest.mark.server
@installed
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edits.drop_tensors("model.norm.weight"), "model.norm.weight"),
        (edits.add_tensors({"model.layers.0.stray.weight": torch.zeros(3)}), "stray.weight: expected a tensor"),
    ],
    ids=["missing", "stray"],
)
def test_a_streamed_checkpoint_is_read_strictly(change: edits.Edit, message: str, tmp_path: Path) -> None:
    folder = kv_export("nvfp4", "llama", "W4A8_NVFP4_FP8_CFG")
    broken = edits.copy_with(folder, tmp_path / "checkpoint", [change])
    failed = failing_start(broken, dtype="float32", args=STREAMED)
    assert failed.exit_code != 0
    assert message in failed.output
    assert not failed.left_behind


def test_memory_that_is_used_again_is_copied() -> None:
    """A loader that keeps a tensor for longer than a step still has its values."""
    from sglang.srt.model_loader.weight_utils import RUNAI_STREAMER_TENSOR_ATTR

    buffer = torch.zeros(2)

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(3):
            buffer.fill_(number)
            tensor = buffer.view(2)
            setattr(tensor, RUNAI_STREAMER_TENSOR_ATTR, True)
            yield str(number), tensor

    kept = list(in_memory_of_their_own(stream()))
    assert [tensor.tolist() for _, tensor in kept] == [[0, 0], [1, 1], [2, 2]]
    plain = torch.ones(2)
    assert next(tensor for _, tensor in in_memory_of_their_own([("plain", plain)])) is plain, "nothing else is copied"
