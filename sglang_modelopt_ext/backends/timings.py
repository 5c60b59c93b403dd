"""Tuning files: which backends were measured for which layers, on one GPU with one set of versions.

A file is made by ``python -m sglang_modelopt_ext.tuning`` (:mod:`sglang_modelopt_ext.tuning.run`) and read by the dispatch. It only
orders the backends that take a layer anyway: a layer that no file knows keeps the built-in order, and so does every layer when
the file is another GPU's or other versions'.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from pathlib import Path

import msgspec
import torch
import triton

from sglang_modelopt_ext import __version__
from sglang_modelopt_ext.backends.base import LinearRequest
from sglang_modelopt_ext.backends.experts.base import ExpertRequest
from sglang_modelopt_ext.backends.packages import installed
from sglang_modelopt_ext.env import TUNING
from sglang_modelopt_ext.errors import ModelOptExtError

logger = logging.getLogger(__name__)

FORMAT = 1
"""Raised when a file of an older version can no longer be read."""

SHIPPED = Path(__file__).parents[1] / "tuning_results"
"""Files that come with the package, for GPUs that were measured."""


class LayerKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What of a layer decides how fast a backend serves it.

    Attributes:
        weight, activation: names of the formats, None for activations that are not rounded.
        smoothing, low_rank: as the scheme has them.
        math: the numerics of its weights.
        dtype: the model's type, such as ``bfloat16``.
        n, k: output and input features of a rank's part, of experts those of one.
        experts, top_k: how many experts a rank holds and a token goes to; 0 for a linear layer.
    """

    weight: str
    activation: str | None
    smoothing: bool
    low_rank: int
    math: str
    dtype: str
    n: int
    k: int
    experts: int = 0
    top_k: int = 0


class Result(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was measured for one layer.

    Attributes:
        layer: the layer.
        us: microseconds of the whole layer, rounding of activations included, by backend and then by ``TuningFile.tokens``.
        refused: the backends that did not pass their check, with the reason.
    """

    layer: LayerKey
    us: dict[str, list[float]]
    refused: dict[str, str] = {}


class TuningFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of a file: one GPU, one set of versions, one list of numbers of tokens."""

    format: int
    gpu: str
    versions: dict[str, str]
    tokens: list[int]
    results: list[Result]


def key_of(request: LinearRequest) -> LayerKey:
    """The layer of a request."""
    scheme = request.scheme
    return LayerKey(
        weight=scheme.weight.name,
        activation=scheme.activation.name if scheme.activation else None,
        smoothing=scheme.smoothing,
        low_rank=scheme.low_rank,
        math=request.math,
        dtype=str(request.dtype).removeprefix("torch."),
        n=request.n,
        k=request.k,
        experts=request.experts if isinstance(request, ExpertRequest) else 0,
        top_k=request.top_k if isinstance(request, ExpertRequest) else 0,
    )


def gpu_of(device: torch.device) -> str:
    """The name that files know ``device`` by: the GPU's, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def versions() -> dict[str, str]:
    """Everything here whose version may change how fast a backend is."""
    own = {"sglang-modelopt-ext": __version__, "torch": str(torch.__version__), "triton": triton.__version__}
    return {**own, **installed()}


def file_name(gpu: str) -> str:
    """The name of the file for ``gpu`` and the versions here."""
    parts = [gpu, "torch", versions()["torch"], "triton", versions()["triton"]]
    return re.sub(r"[^a-z0-9.]+", "-", "-".join(parts).lower()) + ".json"


def read(path: Path) -> TuningFile:
    """The content of ``path``. Raises ModelOptExtError naming it when it is not a tuning file, or not a sensible one."""
    try:
        content = msgspec.json.decode(path.read_bytes(), type=TuningFile)
    except OSError as error:
        raise ModelOptExtError.at(path, "file", "a tuning file", error.strerror) from error
    except msgspec.DecodeError as error:  # malformed JSON, and JSON of another shape
        raise ModelOptExtError.at(
            path, "content", "what `python -m sglang_modelopt_ext.tuning` writes", error
        ) from error
    if content.format != FORMAT:
        raise ModelOptExtError.at(path, "format", str(FORMAT), content.format)
    layers = set()
    for result in content.results:
        if result.layer in layers:
            raise ModelOptExtError.at(path, "results", "every layer once", result.layer)
        layers.add(result.layer)
        for name, times in result.us.items():
            if len(times) != len(content.tokens) or not all(time > 0 and math.isfinite(time) for time in times):
                expected = f"{len(content.tokens)} times above zero"
                raise ModelOptExtError.at(path, f"results.us.{name}", expected, times)
    return content


def write(path: Path, content: TuningFile) -> None:
    """Writes ``content`` to ``path``, in one step."""
    scratch = path.with_name(path.name + ".part")
    scratch.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")
    scratch.replace(path)


def objection(content: TuningFile, gpu: str) -> str | None:
    """Why ``content`` says nothing about ``gpu`` with the versions here; None when it does."""
    if content.gpu != gpu:
        return f"was measured on {content.gpu}, this is {gpu}"
    for name in sorted(content.versions.keys() | versions().keys()):
        there, here = content.versions.get(name, "none"), versions().get(name, "none")
        if there != here:
            return f"was measured with {name} {there}, here is {here}"
    return None


def score(times: list[float]) -> float:
    """What backends are ranked by, smallest first: the geometric mean over the numbers of tokens, each counting alike."""
    return sum(math.log(time) for time in times) / len(times)


def ranking(request: LinearRequest) -> list[str]:
    """The backends measured for the layer of ``request``, best first, ties by name; none where no file applies.

    Raises ModelOptExtError when the file that ``SGLANG_MODELOPT_EXT_TUNING`` names is not one.
    """
    table = _table(TUNING.read(), request.gpu)
    times = table.get(key_of(request), {})
    return sorted(times, key=lambda name: (score(times[name]), name))


@functools.cache
def _table(named: str, gpu: str) -> dict[LayerKey, dict[str, list[float]]]:
    """Times by layer: of the file that is named, before those that were shipped."""
    table: dict[LayerKey, dict[str, list[float]]] = {}
    for path in [*([Path(named)] if named else []), *sorted(SHIPPED.glob("*.json"))]:
        content = read(path)
        reason = objection(content, gpu)
        if reason is not None:
            log = logger.warning if named and path == Path(named) else logger.debug
            log("modelopt_ext: tuning file %s is not used: it %s", path, reason)
            continue
        logger.info("modelopt_ext: tuning file %s: %d layers", path, len(content.results))
        for result in content.results:
            table.setdefault(result.layer, result.us)
    return table
