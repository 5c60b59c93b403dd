"""The state of a search: its measurements, as readable JSON that executes nothing.

``DIR/autoquant.json`` is a :class:`Report`: the state and the results chosen from it. New targets are solved from the
state alone. A pickle, a torch file or any other JSON raises an error that says so.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.autoquant.solve import Method, solve
from sglang_modelopt_ext.workflow.quantize.record import Calibration

SCHEMA: Literal["sglang-modelopt-ext/autoquant/1"] = "sglang-modelopt-ext/autoquant/1"
FILE_NAME = "autoquant.json"
UNQUANTIZED = "none"
"""The candidate that leaves a group unquantized."""

LmHead = Literal["excluded", "counted", "searched"]


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The base class of every object in the file: unknown fields are errors."""


class Format(Struct, frozen=True, kw_only=True):
    """The description of one candidate format.

    Attributes:
        name: ModelOpt's configuration.
        algo: the ``quant_algo`` its export declares.
        group_size: inputs under one block scale, 0 without blocks.
        bits: stored bits per weight with block scales, but without scales of whole tensors and smoothing.
        algorithm: ModelOpt's calibration algorithm.
        served_by: the kernels that serve it on the target in the layers of this model, best first.
        served_as: the numerics of the kernels, for example FP4 activations that are not rounded before Blackwell.
    """

    name: str
    algo: str
    group_size: int
    bits: float
    algorithm: str
    served_by: tuple[str, ...]
    served_as: str


class Layer(Struct, frozen=True, kw_only=True):
    """A linear layer, or layers of one size in the experts of a mixture.

    Attributes:
        name: the module that holds it.
        n, k: its outputs and inputs.
        count: 1; of experts the number of such layers in the module, gates and ups counted together.
        experts: whether it is of experts.
    """

    name: str
    n: int
    k: int
    count: int = 1
    experts: bool = False

    @property
    def weights(self) -> int:
        """Return its number of weights."""
        return self.n * self.k * self.count


class Candidate(Struct, frozen=True, kw_only=True):
    """A candidate format for one group.

    Attributes:
        cost: stored bits of its layers, scales included; an upper bound where ModelOpt folds the smoothing of AWQ into
            the layer before.
        score: sensitivity in the unit of the method; None before it is measured.
    """

    cost: int
    score: float | None


class Group(Struct, frozen=True, kw_only=True):
    """Layers that must share a format, because a server fuses them.

    Attributes:
        name: the name that ModelOpt's search gives it.
        layers: its layers.
        excluded: left unquantized by a pattern or because no format fits its sizes; its bits count.
        candidates: by name of the format; ``none`` among them, where the group may stay unquantized.
        weight: the factor by which its weights and bits count: 1, or what a recipe's cost model says.
    """

    name: str
    layers: tuple[Layer, ...]
    excluded: bool
    candidates: dict[str, Candidate]
    weight: float = 1.0

    @property
    def weights(self) -> float:
        """Return the number of weights in its layers, as they count."""
        return self.weight * sum(layer.weights for layer in self.layers)

    @property
    def modules(self) -> tuple[str, ...]:
        """Return the names of its modules."""
        return tuple(dict.fromkeys(layer.name for layer in self.layers))

    @property
    def is_searched(self) -> bool:
        """Return whether it has a choice."""
        return len(self.candidates) > 1


class State(Struct, frozen=True, kw_only=True):
    """The measurements of a search.

    Attributes:
        model: folder of the unquantized model, as given.
        model_sha256: of its configuration and weights.
        method: ``gradient`` (a score is the sum of (gradient x change of a layer's output)^2 over the scored tokens) or
            ``kl_div`` (a score is KL(unquantized || this group quantized), summed over the scored tokens, in nats).
        loss_scale: factor of the loss while scoring; divided out of the scores.
        calibration, scored: the text of the two steps.
        gpu: the target.
        lm_head: whether the ``lm_head`` is searched over, or, unquantized, counts in bits per weight.
        excluded: the patterns of layers left unquantized.
        unquantized_bits: bits of an unquantized weight.
        simulation: how ModelOpt's CUDA-only quantizers were simulated, ``cpu`` (torch versions of this package) or ``cuda``.
        versions: versions of the packages that measured.
        formats, groups: the candidates, and the groups in the order of the model.
        recipe, recipe_sha256: the recipe file that describes the search, and the digest of its content; None without one.
        cost_model: ModelOpt's name of the rule by which groups count.
    """

    model: str
    model_sha256: str
    method: Method
    loss_scale: float
    calibration: Calibration
    scored: Calibration
    gpu: str
    lm_head: LmHead
    excluded: tuple[str, ...]
    unquantized_bits: int
    simulation: str
    versions: dict[str, str]
    formats: tuple[Format, ...]
    groups: tuple[Group, ...]
    recipe: str | None = None
    recipe_sha256: str | None = None
    cost_model: str = "weight"

    @property
    def weights(self) -> float:
        """Return the number of counted weights."""
        return sum(group.weights for group in self.groups)

    @property
    def least_bits(self) -> float:
        """Return the fewest bits per weight that any choice reaches."""
        least = (group.weight * min(c.cost for c in group.candidates.values()) for group in self.groups)
        return sum(least) / self.weights

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the whole state."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()

    def with_scores(self, scores: Mapping[str, Mapping[str, float]], loss_scale: float) -> State:
        """Return the state with ``scores[group][format]``."""
        groups = []
        for group in self.groups:
            only = {} if group.is_searched else dict.fromkeys(group.candidates, 0.0)
            measured = {UNQUANTIZED: 0.0, **only, **scores.get(group.name, {})}
            candidates = {name: Candidate(cost=c.cost, score=measured[name]) for name, c in group.candidates.items()}
            groups.append(msgspec.structs.replace(group, candidates=candidates))
        return msgspec.structs.replace(self, groups=tuple(groups), loss_scale=loss_scale)


class Choice(Struct, frozen=True, kw_only=True):
    """A format for every group, for one target.

    Attributes:
        target: requested bits per weight.
        bits: bits per weight by the state's costs.
        score: the sum of its scores (``gradient``) or the largest one (``kl_div``).
        formats: the format of every group by name; ``none``: unquantized.
    """

    target: float
    bits: float
    score: float
    formats: dict[str, str]


class Measured(Struct, frozen=True, kw_only=True):
    """Measurements of an applied choice.

    Attributes:
        folder: the checkpoint, relative to the report; None where nothing was exported.
        algo: its ``quant_algo``.
        stored_bits: stored bits per counted weight, measured from the checkpoint's tensors.
        quantized_bits: stored bits per weight of the quantized layers only (``bits_per_weight`` of the checkpoint).
        perplexity: of ModelOpt's fake-quantized model on the held-out text.
    """

    folder: str | None
    algo: str | None
    stored_bits: float | None
    quantized_bits: float | None
    perplexity: float | None


class Result(Struct, frozen=True, kw_only=True):
    """The result for one target: the choice and its measurements."""

    choice: Choice
    measured: Measured


class Report(Struct, frozen=True, kw_only=True):
    """The content of ``autoquant.json``.

    Attributes:
        schema: version of this file's schema.
        state: the measurements that targets are solved from.
        results: one for each target.
        held_out: the text perplexity was measured on; None where it was not measured.
        unquantized_perplexity: of the unquantized model.
    """

    schema: Literal["sglang-modelopt-ext/autoquant/1"] = SCHEMA
    state: State
    results: tuple[Result, ...]
    held_out: Calibration | None
    unquantized_perplexity: float | None


def check_target(state: State, target: float) -> None:
    """Raise ModelOptExtError for a target that no choice reaches, or that leaves everything unquantized."""
    if not target < state.unquantized_bits:
        raise ModelOptExtError.at(
            "--bits",
            f"{target:g}",
            f"less than {state.unquantized_bits}, the bits of an unquantized weight",
            f"{target:g}",
        )
    if target < state.least_bits:
        left = [layer.name for group in state.groups if group.excluded for layer in group.layers]
        counted = f" with {len(left)} unquantized layers counted ({', '.join(left[:3])}{', ...' * (len(left) > 3)})"
        raise ModelOptExtError.at(
            "--bits",
            f"{target:g}",
            f"at least {_round_up(state.least_bits)}, the fewest the formats reach{counted if left else ''}",
            f"{target:g}",
        )


def _round_up(bits: float) -> str:
    return f"{math.ceil(bits * 10000 - 1e-6) / 10000:g}"


def choose(state: State, target: float) -> Choice:
    """Return the best choice of at most ``target`` bits per weight. Raises ModelOptExtError when there is none."""
    check_target(state, target)
    names = [list(group.candidates) for group in state.groups]
    candidates = [list(group.candidates.values()) for group in state.groups]
    costs = [
        [group.weight * candidate.cost for candidate in own]
        for group, own in zip(state.groups, candidates, strict=True)
    ]
    scores = [[_score(state, candidate) for candidate in group] for group in candidates]
    picked = solve(state.method, costs, scores, target * state.weights)
    chosen = [scores[g][c] for g, c in enumerate(picked)]
    return Choice(
        target=target,
        bits=sum(costs[g][c] for g, c in enumerate(picked)) / state.weights,
        score=sum(chosen) if state.method == "gradient" else max(chosen),
        formats={group.name: names[g][picked[g]] for g, group in enumerate(state.groups)},
    )


def _score(state: State, candidate: Candidate) -> float:
    if candidate.score is None:
        raise ModelOptExtError.at(state.model, "scores", "a finished search", "one that has not measured every layer")
    return candidate.score


def write_json(file: Path, content: msgspec.Struct) -> None:
    """Write ``content`` to a temporary file beside ``file`` and rename it."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")
    partial.replace(file)


def read_report(file: Path) -> Report:
    """Read and check an ``autoquant.json``.

    Raises:
        ModelOptExtError: the file cannot be read, is a pickle or other JSON, or has inconsistent values.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ModelOptExtError.at(file, "--from-state", f"a readable {FILE_NAME}", error) from error
    if content[:2] == b"PK" or content[:1] == b"\x80":
        kind = "a torch checkpoint (pickle)" if content[:2] == b"PK" else "a pickle"
        raise ModelOptExtError.at(
            file, "--from-state", f"the {FILE_NAME} of an earlier run", f"{kind}, which is never read"
        )
    try:
        report = msgspec.json.decode(content, type=Report)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelOptExtError.at(file, "--from-state", f"the {FILE_NAME} of an earlier run", error) from error
    _check(file, report.state)
    return report


def _check(file: Path, state: State) -> None:
    formats = {row.name for row in state.formats}
    if not state.groups or not state.weights:
        raise ModelOptExtError.at(file, "groups", "layers that count", "none")
    names = [group.name for group in state.groups]
    if len(set(names)) != len(names):
        raise ModelOptExtError.at(file, "groups", "names that differ", "one twice")
    for group in state.groups:
        if not group.candidates or not group.candidates.keys() - {UNQUANTIZED} <= formats:
            raise ModelOptExtError.at(
                file,
                group.name,
                f"candidates among {', '.join([UNQUANTIZED, *sorted(formats)])}",
                list(group.candidates),
            )
        if not 0 <= group.weight < math.inf:
            raise ModelOptExtError.at(file, f"{group.name}: weight", "a finite number, not negative", group.weight)
        for name, candidate in group.candidates.items():
            if candidate.cost <= 0:
                raise ModelOptExtError.at(
                    file, f"{group.name}: {name}: cost", "a positive number of bits", candidate.cost
                )
            if candidate.score is None or not 0 <= candidate.score < math.inf:
                raise ModelOptExtError.at(
                    file, f"{group.name}: {name}: score", "a finite number, not negative", candidate.score
                )
