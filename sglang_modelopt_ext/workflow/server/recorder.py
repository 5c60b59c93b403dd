"""Log probabilities of a whole window from inside the server, as one binary file instead of JSON over HTTP.

SGLang's ``--forward-hooks`` names :func:`make_hook`, which runs in every process of the server that computes logits. A client
says in the file ``wanted.json`` of a folder that both know which tokens it is about to send; when these come by, the hook
computes the logits of all their positions with the server's own ``LogitsProcessor`` and writes the log probabilities beside
it. A window then costs one forward pass, whatever the size of the vocabulary: over HTTP, SGLang sorts each row and turns it into
lists of Python numbers.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Logprobs = NDArray[np.float32]

_WANTED = "wanted.json"
_ROWS = 128
"""Positions whose logits are held at a time."""

_RELATIVE, _ABSOLUTE = 0.02, 0.1
"""Agreement of the last position's logits with SGLang's own; two products of other shapes may round bf16 differently."""

_NOT_WITH = (
    "--forward-hooks",
    "--speculative",
    "--dp",
    "--data-parallel",
    "--enable-dp",
    "--attn-dp",
    "--pp",
    "--pipeline-parallel",
    "--elastic-ep",
)
"""Arguments of a server, by their beginnings, under which a process computes other logits or only some of them."""


def can_record(arguments: Sequence[str]) -> bool:
    """Return whether a server with these further arguments can record."""
    return not any(argument.startswith(_NOT_WITH) for argument in arguments)


class Recorder:
    """The client's side of a recording.

    Args:
        folder: a new folder that the server's processes can write to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._number = 0

    def arguments(self) -> list[str]:
        """Return the server's arguments that install the hook."""
        spec = {
            "name": "sglang-modelopt-ext log probabilities",
            "target_modules": ["logits_processor", "*.logits_processor"],
            "hook_factory": f"{__name__}:{make_hook.__name__}",
            "config": {"folder": str(self.folder)},
        }
        return ["--forward-hooks", json.dumps([spec])]

    def record(
        self, ids: Sequence[int], last: int, vocabulary: int, send: Callable[[], object]
    ) -> tuple[Logprobs, Logprobs] | None:
        """Send a request for the tokens and return what the server recorded of it, None where it recorded nothing.

        Args:
            ids: the tokens of the request.
            last: the number of tokens at the end whose whole distribution is recorded.
            vocabulary: the number of logits.
            send: sends the request and waits for the answer.

        Returns:
            The log probability of every token but the first, ``[len(ids) - 1]``, and ``[last, vocabulary]``.
        """
        self._number += 1
        wanted = self.folder / _WANTED
        temporary = wanted.with_suffix(".tmp")
        content = {"number": self._number, "ids": list(ids), "last": last, "vocabulary": vocabulary}
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(wanted)
        try:
            send()
            files = sorted(self.folder.glob(f"{self._number}-*.f32"))
            values = np.fromfile(files[0], dtype=np.float32) if files else np.empty(0, dtype=np.float32)
        finally:
            for file in [wanted, *self.folder.glob(f"{self._number}-*")]:
                file.unlink(missing_ok=True)
        if values.size != last * vocabulary + len(ids) - 1 or np.isnan(values).any():
            return None
        return values[last * vocabulary :], values[: last * vocabulary].reshape(last, vocabulary)


@dataclass
class _Window:
    """A window that is being recorded.

    Attributes:
        number: of the recording.
        ids: its tokens.
        last: the number of tokens at the end whose whole distribution is written.
        vocabulary: the number of logits.
        done: the number of tokens that came by.
        own: the log probabilities of the tokens so far, without the first.
    """

    number: int
    ids: list[int]
    last: int
    vocabulary: int
    done: int = 0
    own: list[Logprobs] = field(default_factory=list)


def make_hook(config: dict[str, Any]) -> Callable[[Any, tuple[Any, ...], Any], None]:
    """Return the forward hook of a ``LogitsProcessor``; SGLang calls this once for each model.

    Args:
        config: ``{"folder": PATH}``.
    """
    return _Hook(Path(config["folder"]))


class _Hook:
    """Writes the window that is wanted when its tokens come by, in one or several chunks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._window: _Window | None = None
        self._failed = False

    def __call__(self, module: Any, arguments: tuple[Any, ...], output: Any) -> None:
        """Record a chunk of the wanted window, if this is one; after an error nothing any more, so that the server goes on.

        Args:
            module: the ``LogitsProcessor``.
            arguments: of its ``forward``: token ids, hidden states, the head and the batch come first.
            output: its result.
        """
        if self._failed:
            return
        try:
            self._record(module, arguments, output)
        except Exception:  # whatever another version of SGLang or another model does differently
            self._failed = True
            logger.exception("log probabilities are not recorded in this process")

    def _record(self, module: Any, arguments: tuple[Any, ...], output: Any) -> None:
        window = self._wanted()
        if window is None or window.done == len(window.ids) or len(arguments) < 4:
            return
        ids, hidden, head, batch = arguments[:4]
        chunk = ids.tolist() if ids is not None else []
        if chunk != window.ids[window.done : window.done + len(chunk)] or len(hidden) != len(chunk) or not chunk:
            return
        file = self.folder / f"{window.number}-{os.getpid()}"
        with file.open("ab") as rows:
            for start in range(0, len(chunk), _ROWS):
                logits = module._get_logits(hidden[start : start + _ROWS], head, batch, use_logits_buffer=False).float()
                self._write(window, logits, rows)
        if window.done < len(window.ids):
            return
        # SGLang's own logits of the last position show whether this is the computation that it samples from.
        if torch.allclose(logits[-1], output.next_token_logits[-1].float(), rtol=_RELATIVE, atol=_ABSOLUTE):
            file.rename(file.with_suffix(".f32"))

    @staticmethod
    def _write(window: _Window, logits: torch.Tensor, rows: Any) -> None:
        """Take the logits ``[T, V]`` of the window's next T positions; the last position of all is for a new token."""
        begin, whole = window.done, len(window.ids) - 1
        window.done += len(logits)
        targets = window.ids[begin + 1 : window.done + 1]
        logprobs = torch.log_softmax(logits[: len(targets), : window.vocabulary], dim=-1)
        picked = torch.tensor(targets, device=logprobs.device)[:, None]
        window.own.append(logprobs.gather(1, picked)[:, 0].cpu().numpy())
        from_here = max(0, whole - window.last - begin)
        logprobs[from_here:].cpu().numpy().tofile(rows)
        if window.done == len(window.ids):
            np.concatenate(window.own).tofile(rows)

    def _wanted(self) -> _Window | None:
        """Return the wanted window: the one in progress, or a new one."""
        content = None
        with contextlib.suppress(OSError, ValueError):
            content = json.loads((self.folder / _WANTED).read_text(encoding="utf-8"))
        if content is None:
            self._window = None
        elif self._window is None or self._window.number != content["number"]:
            self._window = _Window(**content)
        return self._window
