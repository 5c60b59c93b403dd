"""A model that was trained with its quantizers in place (QAT) exports, reads and serves like any other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_modelopt_ext.checkpoint.reader import check_all_values, read_checkpoint
from sglang_modelopt_ext.workflow.common import modelopt_cpu
from sglang_modelopt_ext.workflow.common.text import builtin_texts, encode, load_tokenizer, split_windows, spread
from sglang_modelopt_ext.workflow.verify.reference import ReferenceModel
from tests.serving.checks import check_logprobs
from tests.support.cache import REPOSITORY
from tests.support.reference import Reference, difference
from tests.support.server import Server

MODEL = REPOSITORY / "examples" / "stdlib_lm" / "model"
RECIPE, STEPS, RATE = "W4A8_NVFP4_FP8_CFG", 4, 0.5
LENGTH = 48


@pytest.fixture(scope="module")
def windows() -> list[list[int]]:
    return spread(split_windows(encode(load_tokenizer(MODEL), builtin_texts()), LENGTH - 1, 0), 12)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, windows: list[list[int]]) -> tuple[Path, torch.Tensor]:
    """Return the export of a model after a few steps of SGD, and the log probabilities of ModelOpt's simulation of it."""
    pytest.importorskip("modelopt")
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    modelopt_cpu.install("cpu")
    folder = tmp_path_factory.mktemp("qat") / "export"
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    batch = torch.tensor(windows[:8])

    def calibrate(model: Any) -> None:
        with torch.no_grad():
            model(batch)

    mtq.quantize(model, getattr(mtq, RECIPE), calibrate)
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    model.train()
    for _ in range(STEPS):
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0], losses
    model.eval()
    with torch.no_grad():
        # The type of the export; ModelOpt's simulation is then of the weights that are exported.
        model.to(torch.bfloat16).float()
        rows = [torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1], -1) for ids in windows]
        export_hf_checkpoint(model.to(torch.bfloat16), export_dir=folder)
    for file in MODEL.glob("tokenizer*"):
        shutil.copy(file, folder / file.name)
    return folder, torch.cat(rows)


def logprobs(reference: Reference, windows: list[list[int]]) -> torch.Tensor:
    return torch.cat([reference.logprobs(ids)[:-1] for ids in windows])


def test_reads_and_computes_what_was_trained(trained: tuple[Path, torch.Tensor], windows: list[list[int]]) -> None:
    folder, simulated = trained
    checkpoint = read_checkpoint(folder)
    check_all_values(checkpoint)
    assert len(checkpoint.linears) == 4 * 7
    own = ReferenceModel(folder)
    got = torch.cat([torch.from_numpy(own.logprobs(ids)) for ids in windows])
    moved = difference(got, logprobs(Reference(MODEL), windows))
    # Two readings of the export agree with ModelOpt's simulation while training, and differ from the model before it.
    assert difference(got, logprobs(Reference(folder), windows)).divergence < moved.divergence / 100
    assert difference(got, simulated).divergence < moved.divergence / 10


@pytest.mark.full
@pytest.mark.server
def test_serves(trained: tuple[Path, torch.Tensor]) -> None:
    folder, _ = trained
    with Server(folder) as server:
        check_logprobs(server, folder, "bfloat16")
