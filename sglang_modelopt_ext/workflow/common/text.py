"""Text as windows of tokens, for calibration and scoring."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sglang_modelopt_ext.errors import ModelOptExtError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer in ``folder``.

    Args:
        folder: the model.
        trust_remote_code: run the tokenizer's own code.

    Raises:
        ModelOptExtError: there is none that transformers can load, or it has code of its own that must not run.
    """
    from transformers import AutoTokenizer

    try:
        # Not left out: transformers would ask on the terminal whether to run the code.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelOptExtError.at(folder, "tokenizer", "one that transformers can load", error) from error
    return tokenizer


def begin_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the begin token if the tokenizer puts one in front of a text, else None."""
    bos = tokenizer.bos_token_id
    ids = tokenizer.encode("a")
    return int(bos) if bos is not None and ids and ids[0] == bos else None


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of every text, without special tokens."""
    # verbose=False: the warning about texts beyond the model's context is moot, they are cut into windows.
    return [list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in texts]


def builtin_texts() -> list[str]:
    """Return text that is on every machine, for checks that need any text: sources of Python's library."""
    import bisect
    import heapq
    import inspect
    import textwrap

    return [inspect.getsource(module) for module in (heapq, textwrap, bisect)]


def split_windows(documents: Sequence[Sequence[int]], length: int, begin: int | None) -> list[list[int]]:
    """Cut every document into consecutive windows of ``length`` tokens, the last one shorter.

    No window spans two documents and no token is in two windows. Each window starts with ``begin``, if given, so that
    all its tokens can be scored; otherwise its first token is only context. Windows without a token to score are
    dropped.
    """
    front = [] if begin is None else [begin]
    windows = [front + list(ids[i : i + length]) for ids in documents for i in range(0, len(ids), length)]
    return [window for window in windows if len(window) > 1]


def spread(items: Sequence[T], count: int) -> list[T]:
    """Return ``count`` of the items, evenly spaced from the first on; all items where there are no more than that."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]
