"""Calibration data: reading, windows, and rejected input."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.common.text import load_tokenizer
from sglang_modelopt_ext.workflow.quantize.calibration import batch_size_for, load_calibration, read_documents
from tests.support.models import TinyModel, model_dir

TEXTS = ["import os\nprint(os.name)\n" * 6, "x = 1\n" * 30, "def f(a):\n    return a\n" * 5]
SMALL = TinyModel(dtype="float32", hidden=128, intermediate=256, heads=2, kv_heads=1)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Return a tiny model's tokenizer: no begin token in front, no chat template."""
    return load_tokenizer(model_dir(SMALL))


def write(folder: Path, suffix: str) -> list[str]:
    """Write the texts as files of one kind."""
    if suffix == ".txt":
        for number, text in enumerate(TEXTS):
            (folder / f"{number}.txt").write_text(text)
        return [str(folder / f"{number}.txt") for number in range(len(TEXTS))]
    file = folder / f"texts{suffix}"
    if suffix == ".jsonl":
        file.write_text("\n\n".join(json.dumps({"text": text, "id": 1}) for text in TEXTS))
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pytest.importorskip("pyarrow").table({"id": [1, 2, 3], "text": TEXTS})
        parquet.write_table(table, file)
    return [str(file)]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_the_same_text_in_every_kind_of_file(tmp_path: Path, tokenizer: Any, suffix: str) -> None:
    files = write(tmp_path, suffix)
    data = load_calibration(files, tokenizer, sequence_length=16, progress=False)
    expected = [tuple(tokenizer(text)["input_ids"]) for text in TEXTS]
    windows = [ids[i : i + 16] for ids in expected for i in range(0, len(ids), 16) if len(ids[i : i + 16]) > 1]
    assert list(data.windows) == windows
    record = data.record
    assert (record.samples, record.tokens) == (len(windows), sum(map(len, windows)))
    assert record.data == tuple(files)
    # The documented digest, packed by hand.
    packed = b"".join(struct.pack(f"<{len(window) + 1}i", len(window), *window) for window in windows)
    assert record.sha256 == hashlib.sha256(packed).hexdigest()


def test_batches_hold_every_window_once_and_pad_nothing(tmp_path: Path, tokenizer: Any) -> None:
    data = load_calibration(write(tmp_path, ".jsonl"), tokenizer, sequence_length=16, batch_size=4, progress=False)
    for world in (1, 3):
        batches = [batch for rank in range(world) for batch in data.batches(rank, world)]
        assert sorted(tuple(row) for batch in batches for row in batch.tolist()) == sorted(data.windows)
        assert max(len(batch) for batch in batches) == min(4, len(data.windows) // world)


def test_samples_are_spread_and_the_seed_moves_them(tmp_path: Path, tokenizer: Any) -> None:
    files = write(tmp_path, ".jsonl")
    every = load_calibration(files, tokenizer, sequence_length=8, progress=False).windows
    first, again, other = (
        load_calibration(files, tokenizer, samples=12, sequence_length=8, seed=seed, progress=False)
        for seed in (0, 0, 5)
    )
    assert len(every) > 16
    assert first.windows == tuple(every[i * len(every) // 12] for i in range(12)) == again.windows
    assert other.windows != first.windows
    assert set(other.windows) <= set(every)
    assert other.record.sha256 != first.record.sha256


def test_conversations_take_the_chat_template(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}))
    with pytest.raises(ModelOptExtError, match="line 1: expected text: the tokenizer has no chat template"):
        read_documents(str(file), tokenizer)
    templated = load_tokenizer(model_dir(SMALL))
    templated.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert read_documents(str(file), templated) == ["<user>hello"]


BAD: list[tuple[str, Callable[[Path], Any], str]] = [
    ("missing.txt", lambda file: None, "got no such file"),
    ("a.csv", lambda file: file.write_text("a,b"), "got another kind of file"),
    ("folder.txt", lambda file: file.mkdir(), "got a folder"),
    ("empty.txt", lambda file: file.touch(), "documents without a window of two tokens"),
    ("short.txt", lambda file: file.write_text("import os"), "expected at least 64 tokens, got "),
    ("bytes.txt", lambda file: file.write_bytes(b"\xff\xfe"), "expected a readable UTF-8 file"),
    ("a.jsonl", lambda file: file.write_text('{"text": "a"}\n{"text"'), "line 2: expected a JSON object"),
    ("b.jsonl", lambda file: file.write_text('{"content": "a"}'), "line 1: expected an object with a string text"),
    ("c.jsonl", lambda file: file.write_text("[1]"), "line 1: expected an object with a string text"),
    ("a.parquet", lambda file: file.write_bytes(b"PAR1"), "expected a readable parquet file"),
]


@pytest.mark.parametrize(("name", "make", "message"), BAD, ids=[name for name, _, _ in BAD])
def test_refused_by_name(tmp_path: Path, tokenizer: Any, name: str, make: Callable[[Path], Any], message: str) -> None:
    make(tmp_path / name)
    with pytest.raises(ModelOptExtError, match=message) as raised:
        load_calibration([str(tmp_path / name)], tokenizer, progress=False)
    assert name in str(raised.value)


def test_parquet_without_text(tmp_path: Path, tokenizer: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"prompt": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ModelOptExtError, match="expected a column text or messages, got prompt"):
        read_documents(str(tmp_path / "a.parquet"), tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "--samples: expected 1 or more, got 0"),
        ({"sequence_length": 0}, "--sequence-length: expected 1 or more"),
        ({"batch_size": -1}, "--batch-size: expected 1 or more"),
        ({"seed": -1}, "--seed: expected 0 or more"),
        ({"samples": 1000}, "expected 1000 windows of up to 512 tokens, as --samples says, got 3"),
    ],
)
def test_options(tmp_path: Path, tokenizer: Any, options: dict[str, int], message: str) -> None:
    with pytest.raises(ModelOptExtError, match=message):
        load_calibration(write(tmp_path, ".jsonl"), tokenizer, progress=False, **options)  # type: ignore[arg-type]


def test_a_data_set_without_network_is_one_line(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    pytest.importorskip("modelopt")
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelOptExtError, match="cnn_dailymail: expected a file, or a data set") as raised:
        read_documents("cnn_dailymail", tokenizer)
    assert "\n" not in str(raised.value)


def test_a_gpu_takes_more_windows_at_a_time() -> None:
    assert [batch_size_for("cpu", length) for length in (16, 512)] == [1, 1]
    assert [batch_size_for(device, 512) for device in ("cuda", "cuda:1", "auto")] == [8, 8, 8]
    assert [batch_size_for("cuda", length) for length in (1, 3000, 100_000)] == [4096, 1, 1]
