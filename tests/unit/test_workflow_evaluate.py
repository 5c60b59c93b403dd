"""The arithmetic behind the table, against direct computations, and how held-out text is cut."""

from __future__ import annotations

import math
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from sglang_modelopt_ext.workflow.common.text import begin_token, encode, load_tokenizer, split_windows, spread
from sglang_modelopt_ext.workflow.evaluate.measure import (
    Logprobs,
    Plan,
    Row,
    describe,
    divergences,
    folder_size,
    format_legend,
    format_table,
    mean_divergence,
    measure,
    perplexity,
    positions_within,
)
from sglang_modelopt_ext.workflow.server.client import Completion
from sglang_modelopt_ext.workflow.server.process import ServerProcess
from tests.support.models import BOS, SPECIAL_TOKENS, TinyModel, model_dir

VOCABULARY = 11


def random_logprobs(seed: int, rows: int) -> Logprobs:
    """Return log probabilities of random distributions."""
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(3 * torch.randn(rows, VOCABULARY, generator=generator), dim=-1).numpy()


def test_perplexity_weighs_tokens_not_windows() -> None:
    windows = [np.log(np.array(p, dtype=np.float32)) for p in ([0.5, 0.25, 0.125], [0.5])]
    assert perplexity(windows) == pytest.approx((0.5 * 0.25 * 0.125 * 0.5) ** (-1 / 4))


def test_divergence_agrees_with_torch() -> None:
    p, q = random_logprobs(0, 7), random_logprobs(1, 7)
    log_p, log_q = (torch.from_numpy(rows).double() for rows in (p, q))
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    assert divergences(p, q) == pytest.approx(expected.numpy())
    assert divergences(p, p) == pytest.approx(np.zeros(7))
    assert not np.allclose(divergences(p, q), divergences(q, p)), "the order of the arguments matters"


def test_divergence_of_impossible_tokens() -> None:
    p = np.log(np.array([[0.5, 0.5, 0.0]], dtype=np.float32), where=[True, True, False], out=np.full((1, 3), -np.inf))
    q = np.log(np.array([[0.25, 0.25, 0.5]], dtype=np.float32))
    assert divergences(p, p).tolist() == [0.0]
    assert divergences(p, q).tolist() == pytest.approx([math.log(2)])
    assert divergences(q, p).tolist() == [math.inf]


def test_divergence_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="one shape"):
        divergences(random_logprobs(0, 2), random_logprobs(0, 3))
    with pytest.raises(ValueError, match="shorter"):
        mean_divergence([random_logprobs(0, 2)], [])


def test_mean_divergence_weighs_positions_not_windows() -> None:
    p, q = [random_logprobs(0, 1), random_logprobs(1, 9)], [random_logprobs(2, 1), random_logprobs(3, 9)]
    assert mean_divergence(p, q) == pytest.approx(divergences(np.concatenate(p), np.concatenate(q)).mean())


def test_windows_with_and_without_a_begin_token() -> None:
    documents = [[10, 11, 12, 13, 14], [20], []]
    assert split_windows(documents, 2, 1) == [[1, 10, 11], [1, 12, 13], [1, 14], [1, 20]]
    assert split_windows(documents, 2, None) == [[10, 11], [12, 13]]


@given(st.lists(st.lists(st.integers(2, 99), max_size=30), max_size=5), st.integers(1, 12))
def test_every_token_is_scored_once_behind_a_begin_token(documents: list[list[int]], length: int) -> None:
    windows = split_windows(documents, length, 1)
    assert [token for window in windows for token in window[1:]] == [t for ids in documents for t in ids]
    assert all(window[0] == 1 and len(window) <= length + 1 for window in windows)


@given(st.integers(0, 50), st.integers(1, 60))
def test_spread_is_in_order_without_repeats(size: int, count: int) -> None:
    chosen = spread(range(size), count)
    assert len(chosen) == min(size, count)
    assert chosen == sorted(set(chosen))


def test_begin_token_and_plain_tokens() -> None:
    tokenizer = load_tokenizer(model_dir(TinyModel()))
    assert begin_token(tokenizer) is None, "it has one, but puts none in front of a text"
    plain = encode(tokenizer, ["import os"])
    begin = (SPECIAL_TOKENS[BOS], BOS)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    assert begin_token(tokenizer) == BOS
    assert encode(tokenizer, ["import os"]) == plain


@pytest.mark.parametrize(("vocabulary", "positions"), [(2048, 682), (151_936, 9), (1 << 30, 1)])
def test_positions_within_a_budget(vocabulary: int, positions: int) -> None:
    assert positions_within(1 << 24, vocabulary, 12) == positions


class FakeServer:
    """A stand-in for a server whose distributions are random but depend on the tokens."""

    def __init__(self, model: Path, seed: int) -> None:
        self.model, self.seed, self.flushed = model, seed, 0

    def full_vocab_logprobs(self, ids: list[int], last: int) -> Logprobs:
        """Stand for :meth:`ServerClient.full_vocab_logprobs`."""
        return random_logprobs(self.seed + sum(ids), len(ids) - 1)[-last:]

    def input_logprobs(self, ids: list[int]) -> Logprobs:
        """Stand for :meth:`ServerClient.input_logprobs`."""
        return self.full_vocab_logprobs(ids, len(ids) - 1)[np.arange(len(ids) - 1), ids[1:]]

    def window_logprobs(self, ids: list[int], last: int) -> tuple[Logprobs, Logprobs]:
        """Stand for :meth:`ServerClient.window_logprobs`."""
        return self.input_logprobs(ids), self.full_vocab_logprobs(ids, last)

    def generate(self, prompts: list[str], max_new_tokens: int, *, ignore_eos: bool) -> list[Completion]:
        """Stand for :meth:`ServerClient.generate`."""
        assert ignore_eos
        return [Completion("", max_new_tokens)] * len(prompts)

    def flush_cache(self) -> None:
        """Stand for :meth:`ServerClient.flush_cache`."""
        self.flushed += 1


@pytest.mark.parametrize("positions", [2, 100])
def test_measure(tmp_path: Path, positions: int) -> None:
    (tmp_path / "config.json").write_text('{"dtype": "bfloat16"}')
    windows = [[0, 5, 6, 7], [0, 8, 9]]
    plan = Plan(windows, positions, ["a", "b"], 4)
    fake, other = FakeServer(tmp_path, 0), FakeServer(tmp_path, 1)
    row, reference = measure(cast(ServerProcess, fake), plan, progress=False)
    quantized, full = measure(cast(ServerProcess, other), plan, reference, progress=False)

    direct = np.concatenate([fake.input_logprobs(window) for window in windows])
    assert row.perplexity == pytest.approx(math.exp(-direct.mean()), rel=1e-5)
    assert row.divergence is None
    assert quantized.divergence == pytest.approx(mean_divergence(reference, full))
    assert (row.name, row.bits, row.size) == ("bf16", 16.0, folder_size(tmp_path))
    assert row.speed > 0
    assert fake.flushed == 1
    assert plan.scored_tokens == 5
    assert plan.compared_tokens == sum(len(rows) for rows in full) == (4 if positions == 2 else 5)


def test_folder_size_and_kind(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"torch_dtype": "float32"}')
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "weights").write_bytes(bytes(1000))
    assert folder_size(tmp_path) == 1000 + len('{"torch_dtype": "float32"}')
    assert describe(tmp_path) == ("fp32", 32.0)


def test_table_is_aligned() -> None:
    rows = [
        Row("bf16", 11_543_152, 16.0, 7.125, None, 101.25),
        Row("W4A8_NVFP4_FP8", 4_621_520, 4.25, 1234.5678, 0.01234567, 9.0),
    ]
    assert format_table(rows).splitlines() == [
        "recipe          size on disk  bits/weight  perplexity  KL (nats)  tokens/s",
        "--------------  ------------  -----------  ----------  ---------  --------",
        "bf16                11.54 MB        16.00       7.125          -     101.2",
        "W4A8_NVFP4_FP8       4.62 MB         4.25    1234.568    0.01235       9.0",
    ]
    legend = format_legend(Plan([[0, 1, 2]] * 3, 1, ["a"] * 8, 64))
    assert "over 6 held-out tokens in 3 separate windows" in legend
    assert "at 3 of these positions" in legend
    assert "one batch of 8 x 64 new tokens" in legend
