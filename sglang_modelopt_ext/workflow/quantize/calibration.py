"""Calibration data: text files or a named data set, cut into windows of tokens.

A file is ``.txt`` (one document), ``.jsonl`` or ``.parquet`` (one document a line or row, in a field or column ``text``, or a
conversation in ``messages``, for which the tokenizer's chat template is used). Anything that is no file is the name of a data
set, which ModelOpt's own loader gets from the Hugging Face Hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.common.text import begin_token, encode, split_windows, spread
from sglang_modelopt_ext.workflow.quantize.record import Calibration

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES, SEQUENCE_LENGTH, BATCH_SIZE, SEED = 128, 512, 1, 0
"""Default settings of the calibration data; BATCH_SIZE is a CPU's."""

BATCH_TOKENS = 4096
"""Tokens of a forward pass on a GPU by default. With fewer it waits for Python, which ModelOpt's quantizers keep busy."""

MIN_TOKENS = 64
"""The fewest tokens that represent a model's activations."""

SUFFIXES = (".txt", ".jsonl", ".parquet")
_DATASET_DOCUMENTS = 512
_WHERE = "calibration data"


def batch_size_for(device: str, sequence_length: int) -> int:
    """Return the default number of windows in one forward pass on a device."""
    return BATCH_SIZE if device == "cpu" else max(1, BATCH_TOKENS // max(1, sequence_length))


@dataclass(frozen=True)
class CalibrationData:
    """The calibration data of a model.

    Attributes:
        windows: token ids; each window starts with the begin token if the tokenizer has one.
        record: the origin of the data.
    """

    windows: tuple[tuple[int, ...], ...]
    record: Calibration

    def batches(self, rank: int = 0, world: int = 1) -> list[torch.Tensor]:
        """Return int64 batches ``[B, T]``: the share of process ``rank`` of ``world`` processes.

        A batch holds windows of one length, so that no padding is needed and every token counts.
        """
        own = self.windows[rank::world]
        by_length: dict[int, list[tuple[int, ...]]] = {}
        for window in own:
            by_length.setdefault(len(window), []).append(window)
        size = self.record.batch_size
        groups = by_length.values() if size > 1 else [[window] for window in own]
        return [torch.tensor(group[i : i + size]) for group in groups for i in range(0, len(group), size)]

    def check_shares(self, world: int) -> None:
        """Raise ModelOptExtError unless each of ``world`` processes has a window: one without any would find no maxima."""
        if len(self.windows) < world:
            expected = f"at least one window for each of {world} processes"
            raise ModelOptExtError.at(_WHERE, ", ".join(self.record.data), expected, len(self.windows))


def load_calibration(
    data: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int | None = None,
    sequence_length: int = SEQUENCE_LENGTH,
    batch_size: int = BATCH_SIZE,
    seed: int = SEED,
    progress: bool = True,
) -> CalibrationData:
    """Read files and data sets, and cut them into windows.

    Args:
        data: paths and names of data sets.
        tokenizer: the model's.
        samples: number of windows; None for :data:`SAMPLES`, or all where there are fewer.
        sequence_length: text tokens per window; the last one of a document is shorter.
        batch_size: the most windows in one forward pass.
        seed: 0 takes windows evenly spaced from the first on; other seeds start elsewhere.
        progress: show progress on standard error.

    Raises:
        ModelOptExtError: data that cannot be read, is empty, or is too short for the samples asked for.
    """
    for name, value in (("samples", samples), ("sequence-length", sequence_length), ("batch-size", batch_size)):
        if value is not None and value < 1:
            raise ModelOptExtError.at("command line", f"--{name}", "1 or more", value)
    if seed < 0:
        raise ModelOptExtError.at("command line", "--seed", "0 or more", seed)
    documents = []
    for name in tqdm(data, desc="reading calibration data", unit="file", dynamic_ncols=True, disable=not progress):
        documents += read_documents(name, tokenizer)
    windows = split_windows(encode(tokenizer, documents), sequence_length, begin_token(tokenizer))
    names = ", ".join(data) or "none"
    if not windows:
        raise ModelOptExtError.at(_WHERE, names, "text", f"{len(documents)} documents without a window of two tokens")
    if samples is not None and len(windows) < samples:
        raise ModelOptExtError.at(
            _WHERE, names, f"{samples} windows of up to {sequence_length} tokens, as --samples says", len(windows)
        )
    # Another seed starts elsewhere in the data; the windows still spread over all of it.
    start = random.Random(seed).randrange(len(windows)) if seed else 0
    chosen = spread(windows[start:] + windows[:start], samples or SAMPLES)
    tokens = sum(len(window) for window in chosen)
    if tokens < MIN_TOKENS:
        raise ModelOptExtError.at(_WHERE, names, f"at least {MIN_TOKENS} tokens", tokens)
    record = Calibration(
        data=tuple(data),
        sha256=tokens_digest(chosen),
        samples=len(chosen),
        tokens=tokens,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
    )
    return CalibrationData(tuple(tuple(window) for window in chosen), record)


def tokens_digest(windows: Sequence[Sequence[int]]) -> str:
    """Return the sha256 over the windows in order, each as its length and its tokens, little-endian int32."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(np.asarray([len(window), *window], dtype="<i4").tobytes())
    return digest.hexdigest()


def read_documents(name: str, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """Return the texts of a file or a named data set.

    Args:
        name: a path, or the name of a data set.
        tokenizer: its chat template turns a conversation into text.

    Raises:
        ModelOptExtError: it cannot be read, or a line or row of it holds no text.
    """
    path = Path(name)
    if not path.exists() and path.suffix not in SUFFIXES:
        return _named_dataset(name, tokenizer)
    if not path.is_file() or path.suffix not in SUFFIXES:
        got = "no such file" if not path.exists() else "another kind of file" if path.is_file() else "a folder"
        raise ModelOptExtError.at(_WHERE, name, f"a {', '.join(SUFFIXES)} file or the name of a data set", got)
    if path.suffix == ".parquet":
        return [_text_of(row, f"{name}: row {number}", tokenizer) for number, row in enumerate(_parquet_rows(path), 1)]
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelOptExtError.at(_WHERE, name, "a readable UTF-8 file", error) from error
    if path.suffix == ".txt":
        return [content]
    return [
        _text_of(_json_line(line, f"{name}: line {number}"), f"{name}: line {number}", tokenizer)
        for number, line in enumerate(content.splitlines(), 1)
        if line.strip()
    ]


def _json_line(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ModelOptExtError.at(_WHERE, where, "a JSON object", error) from error


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ModelOptExtError.at(
            _WHERE, str(path), "pyarrow to read it with (pip install 'sglang-modelopt-ext[quantize]')", error
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in ("text", "messages") if name in file.schema_arrow.names]
            if not columns:
                raise ModelOptExtError.at(
                    _WHERE, str(path), "a column text or messages", ", ".join(file.schema_arrow.names)
                )
            for batch in file.iter_batches(columns=columns):
                yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise ModelOptExtError.at(_WHERE, str(path), "a readable parquet file", error) from error


def _text_of(entry: Any, where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    fields = entry if isinstance(entry, dict) else {}
    if isinstance(text := fields.get("text"), str):
        return text
    if not isinstance(messages := fields.get("messages"), list):
        raise ModelOptExtError.at(_WHERE, where, "an object with a string text or a list messages", repr(entry)[:80])
    if tokenizer is None or not tokenizer.chat_template:
        raise ModelOptExtError.at(_WHERE, where, "text: the tokenizer has no chat template for messages", "messages")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program and may raise anything
        raise ModelOptExtError.at(_WHERE, where, "messages the chat template takes", error) from error


def _named_dataset(name: str, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Return the texts of a data set on the Hub, by ModelOpt's loader, which knows the columns of many."""
    try:
        # The loader prints, and standard output carries the result.
        with contextlib.redirect_stdout(sys.stderr):
            from modelopt.torch.utils.dataset_utils import get_dataset_samples

            samples = get_dataset_samples(name, _DATASET_DOCUMENTS, tokenizer=tokenizer)
    except Exception as error:  # no package, no network, no such data set: each raises another exception
        raise ModelOptExtError.at(
            _WHERE,
            name,
            "a file, or a data set the Hugging Face Hub can be asked for",
            f"{type(error).__name__}: {error}"[:200],
        ) from error
    return list(samples)
