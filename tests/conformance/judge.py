"""The verdict on an engine's answers: their distance from the float32 reading, by the noise of the same model in bf16.

The tolerance is that of tests/serving/tolerance.py: a bf16 engine may be NOISE_FACTOR times as far from the float32 reading as
the same model run in bf16 by Hugging Face. Both are one draw of rounding errors, which happen at other places. It is held for
each kind of request by itself, by the mean and by the median over its tokens.

In a mixture of experts rounding may choose another expert where two router logits are nearly equal; that token then moves by
whole units, in a sound engine as well. Such tokens, which :func:`in_doubt` finds without regard to what the engine answered, are
left out of all figures of their group. Where that would be more than half of the group, it leaves out none: so many ties fall the
other way in the noise as well, and its mean bounds them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.conformance.cases import Case
from tests.conformance.drive import LONG, WHOLE, Scored
from tests.conformance.reading import Reader, Reading, first_raw
from tests.serving.tolerance import FP32_MEDIAN, NOISE_FACTOR


@dataclass(frozen=True)
class Group:
    """The judged tokens of one kind of request.

    Attributes:
        tokens: number of compared log probabilities; those in doubt are excluded, unless ``all_compared``.
        mean, median: of the absolute differences between engine and reading.
        noise_mean, noise_median: of the absolute differences between Hugging Face's bf16 and the reading.
        noise_all: ``noise_mean`` over all tokens, including those in doubt.
        unrounded: mean difference of the reading from one without the cache's rounding; None without a quantized cache.
        in_doubt: number of tokens in doubt by their routing.
        all_compared: whether these are more than half, so that none is excluded.
    """

    tokens: int
    mean: float
    median: float
    noise_mean: float
    noise_median: float
    noise_all: float
    unrounded: float | None = None
    in_doubt: int = 0
    all_compared: bool = False

    @property
    def all_tokens(self) -> int:
        """Return the number of tokens, including the excluded ones."""
        return self.tokens if self.all_compared else self.tokens + self.in_doubt

    @property
    def used(self) -> float:
        """Return the largest used share of a tolerance; NaN where an answer is not finite."""
        if not math.isfinite(self.mean):
            return math.nan
        pairs = ((self.mean, self.noise_mean), (self.median, self.noise_median))
        return max(part / (NOISE_FACTOR * noise) if noise else math.inf for part, noise in pairs)

    @property
    def right(self) -> bool:
        """Return whether the deciding figures are within the tolerance; NaN is not."""
        return self.mean <= NOISE_FACTOR * self.noise_mean and self.median <= NOISE_FACTOR * self.noise_median


@dataclass
class Judgement:
    """All groups of a case, with further findings."""

    groups: dict[str, Group]
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """Return ``right`` or ``wrong``."""
        return "wrong" if self.faults or not all(group.right for group in self.groups.values()) else "right"

    def figures(self) -> dict[str, float]:
        """Return mean, median and noise over all compared tokens, and the largest share of a tolerance that any group uses."""
        groups = self.groups.values()
        tokens = sum(group.tokens for group in groups)
        names = ("mean", "median", "noise_mean", "noise_median")
        pooled = {name: sum(getattr(group, name) * group.tokens for group in groups) / tokens for name in names}
        noise = sum(group.noise_all * group.all_tokens for group in groups) / sum(g.all_tokens for g in groups)
        used = [group.used for group in groups]
        worst = math.nan if any(math.isnan(value) for value in used) else max(used)
        return {"tokens": tokens, **pooled, "noise_all": noise, "used": worst}

    def as_json(self) -> dict[str, Any]:
        """Return the judgement as JSON."""
        return {
            "verdict": self.verdict,
            "groups": {name: asdict(group) for name, group in self.groups.items()},
            "notes": self.notes,
            "faults": self.faults,
            **self.figures(),
        }


class Judge:
    """A judge of the answers of one case.

    Args:
        folder: the checkpoint of the reading.
        case: the case.
        reading: the numerics of the reading.
        device: device of the readings.
        known: the manifest's log probabilities of the reading, made on a CPU, and their prompts.
        adapter: the LoRA adapter of every request.
    """

    def __init__(
        self,
        folder: Path,
        case: Case,
        reading: Reading,
        device: str,
        known: tuple[Sequence[float], Sequence[Sequence[int]]] | None = None,
        adapter: Path | None = None,
    ) -> None:
        self.case, self.reading = case, reading
        self.exact = Reader(folder, reading, torch.float32, device, adapter=adapter)
        self.rough = Reader(folder, reading, torch.bfloat16, device, adapter=adapter)
        rounded = reading.kv not in ("none", "unquantized")
        self.unrounded = Reader(folder, reading, torch.float32, device, "unquantized", adapter) if rounded else None
        self.known = known
        self.experts = self.exact.experts_per_token
        if (self.experts is None) == case.of.mixture:
            raise ValueError(f"{folder}: whether it is a mixture is told otherwise by its case")

    def judge(self, scored: Sequence[Scored]) -> Judgement:
        """Return the verdict on all of ``scored``."""
        rows: dict[str, list[tuple[torch.Tensor, ...]]] = {}
        for one in scored:
            raw = (
                None
                if self.reading.own_chunk
                else first_raw(len(one.ids), one.prompt, one.cached, self.case.chunk or WHOLE)
            )
            served = torch.tensor(one.values)
            readers = (self.exact, self.rough, *([self.unrounded] if self.unrounded else []))
            read = [reader.scores_and_routing(one.ids, raw) for reader in readers]
            doubt = torch.zeros(len(one.ids) - 1, dtype=torch.bool)
            if self.experts is not None:
                doubt = in_doubt(read[0][1], read[1][1], self.experts)
            parts = (*(scores for scores, _ in read[:2]), doubt, *(scores for scores, _ in read[2:]))
            rows.setdefault(one.group, []).append((served, *(part[one.start - 1 :][: len(served)] for part in parts)))
        groups = {
            name: compared(*(torch.cat(parts) for parts in zip(*found, strict=True))) for name, found in rows.items()
        }
        judgement = Judgement(groups)
        self._check_reading(judgement)
        self._check_rounding(judgement)
        judgement.notes += doubt_notes(groups)
        for name in [name for name in rows if f"{name}, fresh" in rows]:
            self._compare_cached(judgement, name, rows[name], rows[f"{name}, fresh"])
            judgement.notes[-1] += f", the same {same_tokens(scored, name)} tokens follow"
        return judgement

    def _check_reading(self, judgement: Judgement) -> None:
        """Check that the reading here agrees with the one made on a CPU."""
        if self.known is None:
            return
        values, prompts = self.known
        found = torch.cat([self.exact.plain_scores(ids) for ids in prompts])
        # A rounding that falls the other way (FP32_MEDIAN explains it) moves that token and later ones, not earlier ones.
        apart = float((found - torch.tensor(values)).abs().quantile(0.25))
        judgement.notes.append(f"reading against a CPU's {apart:.1e}")
        if not apart < FP32_MEDIAN:
            judgement.faults.append(
                f"three quarters of the reading are {apart:.1e} or more from a CPU's, more than {FP32_MEDIAN:.0e}"
            )

    def _check_rounding(self, judgement: Judgement) -> None:
        """Check that the judge would notice a missing cache rounding."""
        shares = {
            name: group.unrounded / (NOISE_FACTOR * group.noise_mean)
            for name, group in judgement.groups.items()
            if group.unrounded is not None and group.noise_mean > 0
        }
        if shares:
            name, share = max(shares.items(), key=lambda item: item[1])
            judgement.notes.append(f"without the cache's rounding {share:.1f} tolerances away ({name})")

    def _compare_cached(
        self,
        judgement: Judgement,
        name: str,
        hit: Sequence[Sequence[torch.Tensor]],
        fresh: Sequence[Sequence[torch.Tensor]],
    ) -> None:
        """Compare tokens after a cached prefix with those without one: in the engine's answers, and in the readings."""
        (served, read), (served_fresh, read_fresh) = (
            [torch.cat([row[place][-len(row[0]) :] for row in rows]) for place in (0, 1)] for rows in (hit, fresh)
        )
        length = min(len(served), len(served_fresh))
        apart = float((served[-length:] - served_fresh[-length:]).abs().mean())
        meant = float((read[-length:] - read_fresh[-length:]).abs().mean())
        judgement.notes.append(f"{name}: {apart:.3f} from fresh, the reading {meant:.3f}")


def same_tokens(scored: Sequence[Scored], name: str) -> str:
    """Return how many of the tokens after a prompt are the same after a cached prefix: ``23 of 24``."""
    hit, fresh = (
        [token for one in scored if one.group == group for token in one.follow] for group in (name, f"{name}, fresh")
    )
    return f"{sum(a == b for a, b in zip(hit, fresh, strict=True))} of {len(hit)}"


def in_doubt(exact: Sequence[torch.Tensor], rough: Sequence[torch.Tensor], experts: int) -> torch.Tensor:
    """Return which tokens of a sequence may reach other experts by rounding alone, ``[T]``.

    A router chooses the ``experts`` largest logits; the margin of a token is the last that is chosen minus the first that is not.
    Where rounding moves a logit by eps at most, it moves a margin by 2 eps at most. For each mixture eps is the largest difference
    of a logit between the two readings. That is one draw of rounding errors and the engine another, hence NOISE_FACTOR: a token
    is in doubt where a margin is below ``NOISE_FACTOR * 2 * eps``.

    A token in doubt says nothing of the rounding in later mixtures, since the readings may differ there by whole experts: it does
    not count for their eps.

    Args:
        exact: the router logits of each mixture in float32, ``[T, number of experts]``, from the first layer on.
        rough: these logits in bf16.
        experts: number of chosen experts; if all are chosen, no token is in doubt.
    """
    doubt = torch.zeros(len(exact[0]), dtype=torch.bool)
    for logits, rounded in zip(exact, rough, strict=True):
        if bool(doubt.all()) or experts >= logits.shape[1]:
            continue
        eps = (logits - rounded).abs().amax(dim=1)[~doubt].max()
        largest = logits.topk(experts + 1).values
        doubt |= largest[:, -2] - largest[:, -1] < NOISE_FACTOR * 2 * eps
    return doubt


def doubt_notes(groups: Mapping[str, Group]) -> list[str]:
    """Return notes on the tokens excluded for their routing, and on groups where none was excluded."""
    left_out = [
        f"{g.in_doubt} of {g.all_tokens} ({name})" for name, g in groups.items() if g.in_doubt and not g.all_compared
    ]
    all_compared = [f"{g.in_doubt} of {g.all_tokens} ({name})" for name, g in groups.items() if g.all_compared]
    return [
        *([f"left out, their routing in doubt: {', '.join(left_out)}"] if left_out else []),
        *([f"none left out, the routing of most in doubt: {', '.join(all_compared)}"] if all_compared else []),
    ]


def compared(
    served: torch.Tensor,
    exact: torch.Tensor,
    rough: torch.Tensor,
    doubt: torch.Tensor,
    unrounded: torch.Tensor | None = None,
) -> Group:
    """Return one group from the log probabilities of all its tokens: answers, float32 and bf16 readings, tokens in doubt."""
    count = int(doubt.sum())
    all_compared = 2 * count > len(doubt)
    # Rounding cannot explain an answer that is not finite, so it always counts.
    kept = torch.ones_like(doubt) if all_compared else ~doubt | ~served.isfinite()
    apart, noise = (served - exact).abs(), (rough - exact).abs()
    return Group(
        tokens=int(kept.sum()),
        mean=float(apart[kept].mean()),
        median=float(apart[kept].median()),
        noise_mean=float(noise[kept].mean()),
        noise_median=float(noise[kept].median()),
        noise_all=float(noise.mean()),
        unrounded=None if unrounded is None else float((unrounded - exact).abs()[kept].mean()),
        in_doubt=count,
        all_compared=all_compared,
    )


def compare(
    case: Case,
    mine: Sequence[Mapping[str, Any]],
    other: Sequence[Mapping[str, Any]],
    noise: float,
    variation: float = 0.0,
) -> dict[str, Any]:
    """Compare two engines that must agree, on prompts that do not depend on their answers.

    With and without the plugin the same kernels run on the same tokens: at least half of the tokens agree to float32's noise. Where
    the kernels themselves do not repeat (SGLang's Marlin products of experts sum by atomics), the long prompts of the two engines
    differ like two sendings to one engine: both means are over the same thousands of tokens, so that twice is ample. Over
    more ranks, sums are rounded elsewhere, which the noise of bf16 bounds as it does for an engine and the reading.

    Args:
        case: the one that must agree with ``case.same_as``.
        mine, other: the answers of the two.
        noise: the mean difference that bf16 makes.
        variation: the larger of the two engines' mean differences between two sendings of the long prompts.
    """
    apart: list[float] = []
    long: list[float] = []
    for a, b in zip(mine, other, strict=True):
        if a["ids"] == b["ids"] and a["group"] != "batch of 16":
            differences = [abs(x - y) for x, y in zip(a["values"], b["values"], strict=True)]
            apart += differences
            long += differences if a["group"] in map(str, LONG) else []
    mean, median, mean_long = statistics.fmean(apart), statistics.median(apart), statistics.fmean(long or apart)
    if case.tp > 1:
        right = mean <= NOISE_FACTOR * noise
    else:
        right = median < FP32_MEDIAN or mean_long <= NOISE_FACTOR * variation
    equal = sum(value == 0 for value in apart) / len(apart)
    note = f"from {case.same_as}: mean {mean:.1e}, median {median:.1e}, largest {max(apart):.1e}, equal {equal:.0%}"
    if variation and case.tp == 1:
        note += f"; long prompts {mean_long:.1e}, sent twice to one engine {variation:.1e}"
    return {"right": right, "note": note}
