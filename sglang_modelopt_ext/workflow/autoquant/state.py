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
ScoredAs = Literal["simulation", "export"]
MODEL_OF: dict[ScoredAs, str] = {"simulation": "fake-quantized", "export": "decoded"}
"""The model that the perplexity of a choice is measured on."""

Unit = Literal["bits", "us"]
FLAGS: dict[Unit, str] = {"bits": "--bits", "us": "--target-latency"}
"""The option that gives a target in each unit."""


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The base class of every object in the file: unknown fields are errors."""


class Target(Struct, frozen=True):
    """A budget: stored bits per weight, or the microseconds of all counted layers together.

    Attributes:
        value: the budget.
        unit: its unit.
    """

    value: float
    unit: Unit = "bits"

    @property
    def name(self) -> str:
        """Return the name of the folder of its result, such as ``4.5-bits``."""
        return f"{self.value:g}-{self.unit}"


class Latency(Struct, frozen=True, kw_only=True):
    """The measurement that the candidates' times are of.

    Attributes:
        gpu: the name of the GPU.
        tokens: the number of tokens at a time.
        versions: the versions of the packages that kernels came from.
    """

    gpu: str
    tokens: int
    versions: dict[str, str]


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
        us: microseconds of its layers; None where they were not measured.
    """

    cost: int
    score: float | None
    us: float | None = None


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

    def spent(self, name: str, unit: Unit) -> float | None:
        """Return what a candidate takes of a budget in ``unit``; None where its time was not measured.

        A recipe may count a part of the weights of experts; their time counts whole, or not at all.
        """
        candidate = self.candidates[name]
        if unit == "bits":
            return self.weight * candidate.cost
        return None if candidate.us is None else candidate.us * (self.weight > 0)

    @property
    def modules(self) -> tuple[str, ...]:
        """Return the names of its modules."""
        return tuple(dict.fromkeys(layer.name for layer in self.layers))

    @property
    def is_searched(self) -> bool:
        """Return whether it has a choice."""
        return len(self.candidates) > 1


class KVLayer(Struct, frozen=True, kw_only=True):
    """The KV cache of one layer.

    Attributes:
        number: of the layer.
        elements: entries of the keys of one token; the values have as many.
        k_amax, v_amax: the largest magnitudes of keys and values over the calibration text.
        scores: sensitivity of each recipe, in the unit of the method.
    """

    number: int
    elements: int
    k_amax: float
    v_amax: float
    scores: dict[str, float]


class KVSearch(Struct, frozen=True, kw_only=True):
    """The measurements that recipes for the layers' KV caches are chosen from.

    Attributes:
        bits: bits of a cached element by recipe, block scales included.
        layers: every layer.
    """

    bits: dict[str, float]
    layers: tuple[KVLayer, ...]


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
        latency: what the candidates' times are of; None where none were measured.
        scored_as: what is scored, and perplexity measured of: ModelOpt's ``simulation``, or what is decoded from the ``export``.
        kv_formats: the candidates for the KV cache of each layer; empty where it is not searched over.
        kv: what was measured of them; None before.
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
    latency: Latency | None = None
    scored_as: ScoredAs = "simulation"
    kv_formats: tuple[str, ...] = ()
    kv: KVSearch | None = None

    @property
    def weights(self) -> float:
        """Return the number of counted weights."""
        return sum(group.weights for group in self.groups)

    def least(self, unit: Unit) -> float:
        """Return the smallest target in ``unit`` that a choice reaches."""
        each = ([group.spent(name, unit) for name in group.candidates] for group in self.groups)
        return sum(min(cost for cost in costs if cost is not None) for costs in each) / self.divisor(unit)

    def unquantized(self, unit: Unit) -> float:
        """Return what the unquantized model takes, infinity where a group cannot be left unquantized or was not measured so."""
        if unit == "bits":
            return self.unquantized_bits
        times = [group.spent(UNQUANTIZED, unit) if UNQUANTIZED in group.candidates else None for group in self.groups]
        return sum(math.inf if time is None else time for time in times)

    def divisor(self, unit: Unit) -> float:
        """Return what a sum over the groups is divided by to be a target: bits are per weight, times are not."""
        return self.weights if unit == "bits" else 1.0

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
            candidates = {
                name: msgspec.structs.replace(c, score=measured[name]) for name, c in group.candidates.items()
            }
            groups.append(msgspec.structs.replace(group, candidates=candidates))
        return msgspec.structs.replace(self, groups=tuple(groups), loss_scale=loss_scale)


class KVChoice(Struct, frozen=True, kw_only=True):
    """A recipe for the KV cache of every layer.

    Attributes:
        target: requested bits per cached element.
        bits: those of the choice.
        score: the sum of its scores (``gradient``) or the largest one (``kl_div``).
        formats: the recipe of each layer by its number.
    """

    target: float
    bits: float
    score: float
    formats: dict[str, str]


class Choice(Struct, frozen=True, kw_only=True):
    """A format for every group, for one target.

    Attributes:
        target: the requested budget.
        unit: its unit.
        bits: bits per weight by the state's costs.
        us: microseconds by the state's times; None where they were not measured.
        score: the sum of its scores (``gradient``) or the largest one (``kl_div``).
        formats: the format of every group by name; ``none``: unquantized.
        kv: the KV cache's; None where it is not searched over.
    """

    target: float
    bits: float
    score: float
    formats: dict[str, str]
    unit: Unit = "bits"
    us: float | None = None
    kv: KVChoice | None = None

    @property
    def asked(self) -> Target:
        """Return the target."""
        return Target(self.target, self.unit)


class Measured(Struct, frozen=True, kw_only=True):
    """Measurements of an applied choice.

    Attributes:
        folder: the checkpoint, relative to the report; None where nothing was exported.
        algo: its ``quant_algo``.
        stored_bits: stored bits per counted weight, measured from the checkpoint's tensors.
        quantized_bits: stored bits per weight of the quantized layers only (``bits_per_weight`` of the checkpoint).
        perplexity: of ModelOpt's fake-quantized model, or the decoded one, on the held-out text.
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


def check_target(state: State, target: Target) -> None:
    """Raise ModelOptExtError for a target that no choice reaches, or that leaves everything unquantized."""
    flag, value, unit = FLAGS[target.unit], f"{target.value:g}", target.unit
    if unit == "us" and state.latency is None:
        raise ModelOptExtError.at(flag, value, "a search with --latency-table, which measures times", "one without")
    most, of = state.unquantized(unit), "bits of an unquantized weight" if unit == "bits" else "time of all unquantized"
    if not target.value < most:
        raise ModelOptExtError.at(flag, value, f"less than {most:g}, the {of}", value)
    least = state.least(unit)
    if target.value < least:
        left = [layer.name for group in state.groups if group.excluded for layer in group.layers]
        counted = f" with {len(left)} unquantized layers counted ({', '.join(left[:3])}{', ...' * (len(left) > 3)})"
        fewest = "fewest" if unit == "bits" else "least"
        expected = f"at least {_round_up(least)}, the {fewest} the formats reach{counted if left else ''}"
        raise ModelOptExtError.at(flag, value, expected, value)


def _round_up(value: float) -> str:
    return f"{math.ceil(value * 10000 - 1e-6) / 10000:g}"


def choose(state: State, target: Target) -> Choice:
    """Return the best choice within ``target``. Raises ModelOptExtError when there is none."""
    check_target(state, target)
    names, costs, scores = [], [], []
    for group in state.groups:
        spent = {name: group.spent(name, target.unit) for name in group.candidates}
        timed = {name: cost for name, cost in spent.items() if cost is not None}
        names.append(list(timed))
        costs.append(list(timed.values()))
        scores.append([_score(state, group.candidates[name]) for name in timed])
    picked = solve(state.method, costs, scores, target.value * state.divisor(target.unit))
    chosen = [scores[g][c] for g, c in enumerate(picked)]
    formats = {group.name: names[g][picked[g]] for g, group in enumerate(state.groups)}
    return Choice(
        target=target.value,
        unit=target.unit,
        bits=_total(state, formats, "bits") or 0.0,
        us=None if state.latency is None else _total(state, formats, "us"),
        score=sum(chosen) if state.method == "gradient" else max(chosen),
        formats=formats,
    )


def _total(state: State, formats: Mapping[str, str], unit: Unit) -> float | None:
    """Return what a choice takes, None where a time was not measured."""
    each = [group.spent(formats[group.name], unit) for group in state.groups]
    if None in each:
        return None
    return sum(cost for cost in each if cost is not None) / state.divisor(unit)


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
        if state.latency is not None and all(c.us is None for c in group.candidates.values()):
            raise ModelOptExtError.at(file, f"{group.name}: us", "the time of a candidate", "none")
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
            if candidate.us is not None and not 0 < candidate.us < math.inf:
                raise ModelOptExtError.at(file, f"{group.name}: {name}: us", "a time above zero", candidate.us)
            if candidate.score is None or not 0 <= candidate.score < math.inf:
                raise ModelOptExtError.at(
                    file, f"{group.name}: {name}: score", "a finite number, not negative", candidate.score
                )
