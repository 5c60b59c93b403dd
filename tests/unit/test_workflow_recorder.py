"""What a server records of a window: the hook on a stand-in for SGLang's ``LogitsProcessor``, and its client."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sglang_modelopt_ext.workflow.server.recorder import Recorder, can_record

VOCABULARY, HIDDEN = 11, 6
WINDOW = [3, 1, 4, 1, 5, 9, 2, 6]


class Processor:
    """A stand-in for a ``LogitsProcessor`` and its head: logits scaled, and padded by SGLang's own means.

    Args:
        hook: what SGLang registers.
        scale: of the logits that are sampled from, over that of ``_get_logits``.
    """

    def __init__(self, hook: Callable[..., None], scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.head = torch.randn(VOCABULARY, HIDDEN, generator=generator)
        self.embedding = torch.randn(VOCABULARY, HIDDEN, generator=generator)
        self.hook, self.scale = hook, scale

    def _get_logits(
        self, hidden: torch.Tensor, head: torch.Tensor, batch: object, use_logits_buffer: bool = True
    ) -> torch.Tensor:
        assert not use_logits_buffer, "the buffer is SGLang's own"
        return 3 * hidden @ head.T

    def forward(self, ids: list[int]) -> None:
        """Take a chunk of tokens, as one forward pass of the model does."""
        hidden = self.embedding[ids]
        logits = self.scale * self._get_logits(hidden[-1:], self.head, None, use_logits_buffer=False)
        output = SimpleNamespace(next_token_logits=logits)
        self.hook(self, (torch.tensor(ids), hidden, self.head, object()), output)

    def expected(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """Return the log probabilities after every token but the last."""
        return torch.log_softmax(3 * self.embedding[ids[:-1]] @ self.head.T, dim=-1).numpy()


def hook_of(recorder: Recorder) -> Callable[..., None]:
    """Return the hook as SGLang makes it from the command line."""
    flag, text = recorder.arguments()
    (spec,) = json.loads(text)
    module, _, factory = spec["hook_factory"].partition(":")
    assert (flag, spec["target_modules"][0]) == ("--forward-hooks", "logits_processor")
    hook: Callable[..., None] = getattr(importlib.import_module(module), factory)(spec["config"])
    return hook


@pytest.mark.parametrize("chunks", [[8], [5, 3], [7, 1], [1] * 8])
@pytest.mark.parametrize("last", [1, 3, 7])
def test_a_window_is_recorded_in_one_or_several_chunks(tmp_path: Path, chunks: list[int], last: int) -> None:
    recorder = Recorder(tmp_path)
    processor = Processor(hook_of(recorder))

    def send() -> None:
        start = 0
        for size in chunks:
            processor.forward(WINDOW[start : start + size])
            start += size
        processor.forward([7])  # a new token

    for _ in range(2):
        processor.forward(WINDOW)  # not asked for
        found = recorder.record(WINDOW, last, VOCABULARY, send)
        assert found is not None
        rows = processor.expected(WINDOW)
        np.testing.assert_allclose(found[0], rows[np.arange(7), WINDOW[1:]], rtol=1e-5)
        np.testing.assert_allclose(found[1], rows[-last:], rtol=1e-5)
        assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_the_last_position_is_the_one_that_sglang_samples_from(tmp_path: Path) -> None:
    """Logits of another scale than those that are sampled from are not taken for them."""
    recorder = Recorder(tmp_path)
    processor = Processor(hook_of(recorder), scale=1.5)
    assert recorder.record(WINDOW, 2, VOCABULARY, lambda: processor.forward(WINDOW)) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seen", [[], WINDOW[1:], WINDOW[:-1], [3, 1, 4, 1, 5, 9, 2, 7]])
def test_other_tokens_are_not_recorded(tmp_path: Path, seen: list[int]) -> None:
    """A prefix that was cached, a shorter window, another one, or a forward pass without the hook."""
    recorder = Recorder(tmp_path)
    processor = Processor(hook_of(recorder))
    send = (lambda: processor.forward(seen)) if seen else (lambda: None)
    assert recorder.record(WINDOW, 2, VOCABULARY, send) is None
    assert list(tmp_path.iterdir()) == []


def test_an_error_ends_the_recording_and_not_the_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(tmp_path)
    hook = hook_of(recorder)
    arguments = (torch.tensor(WINDOW), torch.zeros(8, HIDDEN), None, None)
    assert recorder.record(WINDOW, 2, VOCABULARY, lambda: hook(object(), arguments, None)) is None
    assert "log probabilities are not recorded" in caplog.text
    processor = Processor(hook)
    assert recorder.record(WINDOW, 2, VOCABULARY, lambda: processor.forward(WINDOW)) is None


@pytest.mark.parametrize(
    ("arguments", "records"),
    [
        ([], True),
        (["--dtype", "float32", "--tp-size", "2"], True),
        (["--forward-hooks", "[]"], False),
        (["--speculative-algorithm=EAGLE"], False),
        (["--enable-dp-attention"], False),
        (["--pp-size", "2"], False),
    ],
)
def test_servers_that_can_record(arguments: list[str], records: bool) -> None:
    assert can_record(arguments) == records
