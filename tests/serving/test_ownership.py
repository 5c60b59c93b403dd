"""Served models whose files are in doubt: SGLang's where they may be, with one line why, and strict where they are ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.serving.checks import check_logprobs
from tests.support import edits
from tests.support.exports import export
from tests.support.models import TinyModel, model_dir
from tests.support.server import Server

pytestmark = [pytest.mark.server, pytest.mark.full]


def test_what_is_not_understood_is_left_to_sglang_with_one_line(tmp_path: Path) -> None:
    """A left-over file of an unknown algorithm, beside an unquantized model."""

    def leave(folder: Path) -> None:
        (folder / edits.QUANT_CONFIG).write_text(json.dumps({"quantization": {"quant_algo": "W2A2"}}))

    folder = edits.copy_with(model_dir(TinyModel("qwen2")), tmp_path / "model", [leave])
    with Server(folder, dtype="float32") as server:
        assert len(server.generate_ids([1, 2, 3], 4)) == 4
        lines = [line for line in server.output().splitlines() if "modelopt_ext: left to SGLang" in line]
    assert len(lines) == 1, lines
    assert "quant_algo: expected one of" in lines[0]


def test_files_that_exclude_different_modules(tmp_path: Path) -> None:
    """Each file excludes a layer that is quantized, and a layer that is not; the tensors decide."""
    source = export(model_dir(TinyModel("llama")), "W4A8_NVFP4_FP8_CFG")
    changes = [
        edits.set_file_config({"exclude_modules": ["lm_head", "model.layers.0.mlp.down_proj"]}),
        edits.set_embedded_config({"ignore": ["model.embed_tokens"]}),
    ]
    folder = edits.copy_with(source, tmp_path / "checkpoint", changes)
    with Server(folder, dtype="float32") as server:
        check_logprobs(server, source, "float32")  # the reference trusts the files, which agree about these layers
        noted = [line for line in server.output().splitlines() if "the tensors decide" in line]
    assert len(noted) == 1, noted
