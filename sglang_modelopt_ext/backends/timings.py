"""Tuning files: the measured times of the backends for the layers of a model, on one GPU with one set of versions.

A file is made by ``python -m sglang_modelopt_ext.tuning`` (:mod:`sglang_modelopt_ext.tuning.run`) and read by
:mod:`sglang_modelopt_ext.backends.select`. It only orders the backends that support a layer: a layer that is in no file keeps the
built-in order, and so does every layer where the file is of another GPU or of other versions.
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
"""The version of the file format; it is raised when older files can no longer be read."""

UNQUANTIZED = "none"
"""The weight of an unquantized layer's key."""

SHIPPED = Path(__file__).parents[1] / "tuning" / "results"
"""The folder of the files that come with the package."""


class LayerKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The properties of a layer on which the times of the backends depend.

    Attributes:
        weight, activation: names of the formats; None for activations that are not rounded.
        smoothing, low_rank: those of the scheme.
        math: the numerics of its weights.
        dtype: the model's type, such as ``bfloat16``.
        n, k: output and input features of one rank's part of the layer, or of one expert.
        experts, top_k: the experts that a rank holds and that a token goes to; 0 for a linear layer.
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
    """The measurements of one layer.

    Attributes:
        layer: the layer.
        us: microseconds of the whole layer, rounding of activations included, by backend, one for each of ``TuningFile.tokens``.
        refused: the reasons why backends were rejected, by backend.
    """

    layer: LayerKey
    us: dict[str, list[float]]
    refused: dict[str, str] = {}


class TuningFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of a tuning file.

    Attributes:
        format: :data:`FORMAT`.
        gpu: the GPU's name.
        versions: the versions of the packages that kernels come from, by name.
        tokens: the numbers of tokens that were measured.
        results: one for each layer.
        device: the GPU's architecture, as ``--gpu`` names it; empty in files that do not say.
    """

    format: int
    gpu: str
    versions: dict[str, str]
    tokens: list[int]
    results: list[Result]
    device: str = ""


def key_of(request: LinearRequest) -> LayerKey:
    """Return the key of a request's layer."""
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
    """Return the name of ``device`` in tuning files: the GPU's, or its type without one."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of the installed packages that times depend on, by name."""
    own = {"sglang-modelopt-ext": __version__, "torch": str(torch.__version__), "triton": triton.__version__}
    return {**own, **installed()}


def file_name(gpu: str) -> str:
    """Return the default name of a tuning file for ``gpu`` and the installed versions."""
    parts = [gpu, "torch", versions()["torch"], "triton", versions()["triton"]]
    return re.sub(r"[^a-z0-9.]+", "-", "-".join(parts).lower()) + ".json"


def read(path: Path) -> TuningFile:
    """Read a tuning file. Raises ModelOptExtError, with the field, where ``path`` is none or its content is not legal."""
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
    """Write ``content`` to ``path``, atomically."""
    scratch = path.with_name(path.name + ".part")
    scratch.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")
    scratch.replace(path)


def merged(before: TuningFile, content: TuningFile) -> TuningFile:
    """Return ``content`` with the further layers of ``before``, of the same GPU, versions and numbers of tokens."""
    measured = {result.layer for result in content.results}
    kept = [result for result in before.results if result.layer not in measured]
    return msgspec.structs.replace(content, results=[*kept, *content.results])


def objection(content: TuningFile, gpu: str) -> str | None:
    """Return why the times of ``content`` do not apply to ``gpu`` and the installed versions, or None."""
    if content.gpu != gpu:
        return f"was measured on {content.gpu}, this is {gpu}"
    for name in sorted(content.versions.keys() | versions().keys()):
        there, here = content.versions.get(name, "none"), versions().get(name, "none")
        if there != here:
            return f"was measured with {name} {there}, here is {here}"
    return None


def score(times: list[float]) -> float:
    """Return the logarithm of the geometric mean of ``times``, over numbers of tokens that count alike: backends rank by it."""
    return sum(math.log(time) for time in times) / len(times)


def ranking(request: LinearRequest) -> list[str]:
    """Return the backends measured for the layer of ``request``, fastest first, ties by name; none where no file applies.

    Raises:
        ModelOptExtError: the file that ``SGLANG_MODELOPT_EXT_TUNING`` names is not a tuning file.
    """
    table = _table(TUNING.read(), request.gpu)
    times = table.get(key_of(request), {})
    return sorted(times, key=lambda name: (score(times[name]), name))


@functools.cache
def _table(named: str, gpu: str) -> dict[LayerKey, dict[str, list[float]]]:
    """Return the times by layer and backend: of the file ``named`` first, then of those that come with the package."""
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
