"""What a run found, as a line, a table, JSON for the support matrix and a page of results."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.conformance.cases import Case


@dataclass
class Outcome:
    """One case that ran.

    Attributes:
        case: the case.
        verdict: ``right``, ``wrong``, ``failed`` (no answers) or ``not run``.
        result: what its process wrote.
        kernels: those of this package that serve its layers, by the log; none where SGLang serves it.
        cache: the log's line about the KV cache, where this package has one.
        agrees: whether it gave the same as the case it must agree with; None where there is none.
    """

    case: Case
    verdict: str
    note: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    kernels: list[str] = field(default_factory=list)
    cache: str = ""
    seconds: float = 0.0
    agrees: bool | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def as_expected(self) -> bool:
        """Whether a sound run has this."""
        if self.case.expect == "any":
            return self.verdict != "not run" and self.agrees is not False
        return self.verdict == self.case.expect and self.agrees is not False

    @property
    def backend(self) -> str:
        """The kernels of the layers, and the attention."""
        kernels = " + ".join(self.kernels) or ("SGLang" if self.result else "-")
        return kernels if not self.result else f"{kernels}, {self.result['attention']}"

    @property
    def served_by(self) -> str:
        """``ours`` where this package serves the layers or the cache, by the log."""
        return "ours" if self.kernels or self.cache else "sglang"

    @property
    def remarks(self) -> str:
        """Everything said about it."""
        judged = self.result.get("judgement", {})
        groups = [
            f"{name}: mean {group['mean']:.3f} (noise {group['noise_mean']:.3f}), median {group['median']:.3f} "
            f"({group['noise_median']:.3f}) of {group['tokens']}"
            for name, group in judged.get("groups", {}).items()
            if self.verdict == "wrong"
            and not (group["mean"] <= 2 * group["noise_mean"] and group["median"] <= 2 * group["noise_median"])
        ]
        return "; ".join(
            filter(None, [self.note, *judged.get("faults", []), *groups, *self.notes, *judged.get("notes", [])])
        )


def line(outcome: Outcome) -> str:
    """The case in one line."""
    figures = ""
    if outcome.result:
        judged = outcome.result["judgement"]
        figures = (
            f" mean {judged['mean']:.4f} (noise {judged['noise_mean']:.4f}) median {judged['median']:.4f}"
            f" ({judged['noise_median']:.4f}) used {judged['used']:.2f}"
        )
    return (
        f"{outcome.case.name}: {outcome.verdict}{figures} {outcome.seconds:.0f} s [{outcome.backend}] {outcome.remarks}"
    )


def _cells(outcome: Outcome) -> list[str]:
    of = outcome.case.of
    cells = [outcome.case.name, of.algo, outcome.case.kv, of.family, outcome.backend, outcome.verdict]
    judged = outcome.result.get("judgement")
    figures = ["mean", "noise_mean", "median", "noise_median", "used"]
    cells += [f"{judged[name]:.3f}" if judged else "-" for name in figures]
    return [*cells, f"{outcome.seconds:.0f}"]


HEADER = ["case", "algorithm", "KV", "family", "served by", "verdict", "mean", "noise", "median", "noise", "used", "s"]


def table(outcomes: Sequence[Outcome]) -> str:
    """One row a case, in columns."""
    rows = [HEADER, *(_cells(outcome) for outcome in outcomes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def machine(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The hardware and the versions, by the first case that answered."""
    for outcome in outcomes:
        if outcome.result:
            return {name: outcome.result[name] for name in ("gpu", "capability", "versions")}
    return {"gpu": "unknown", "capability": None, "versions": {}}


def as_json(outcomes: Sequence[Outcome], commit: str) -> dict[str, Any]:
    """What the support matrix reads."""
    return {
        "date": datetime.date.today().isoformat(),
        **machine(outcomes),
        "commit": commit,
        "rows": [_row(outcome) for outcome in outcomes],
    }


def _row(outcome: Outcome) -> dict[str, Any]:
    of, judged = outcome.case.of, outcome.result.get("judgement", {})
    return {
        "case": outcome.case.name,
        "algo": of.algo,
        "kv": outcome.case.kv,
        "family": of.family,
        "experts": of.mixture,
        "served_by": outcome.served_by,
        "plugin": outcome.case.plugin,
        "math": outcome.case.math,
        "tp": outcome.case.tp,
        "graphs": outcome.case.graphs,
        "chunk": outcome.case.chunk,
        "backend": " + ".join(outcome.kernels) or ("sglang" if outcome.result else ""),
        "attention": outcome.result.get("attention", ""),
        "verdict": outcome.verdict,
        "expected": outcome.case.expect,
        "agrees": outcome.agrees,
        "median": judged.get("median"),
        "mean": judged.get("mean"),
        "noise": judged.get("noise_mean"),
        "used": judged.get("used"),
        "prompts": list(judged.get("groups", {})),
        "groups": judged.get("groups", {}),
        "seconds": round(outcome.seconds, 1),
        "note": outcome.remarks,
    }


def as_markdown(outcomes: Sequence[Outcome], commit: str, args: argparse.Namespace) -> str:
    """A page for benchmarks/results."""
    found = machine(outcomes)
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    verdicts = [outcome.verdict for outcome in outcomes if outcome.case.expect == "right"]
    count = {verdict: verdicts.count(verdict) for verdict in ("right", "wrong", "failed", "not run")}
    lines = [
        f"# Served models on {found['gpu']}",
        "",
        f"{datetime.date.today().isoformat()}, {args.tp} x {found['gpu']}, {versions}; commit {commit[:12]}.",
        f"Command: `python tests/conformance run --tp {args.tp}`. Real ModelOpt exports of small models through `sglang.Engine`,",
        "judged by the log probabilities of prompts of 3 to 2100 tokens, alone and 16 at a time, in chunks and behind cached",
        "prefixes, and of decoded tokens. A case is right where, for every kind of request, mean and median of the differences",
        "from an independent float32 reading are within twice those of the same model in bf16 by Hugging Face (`noise`); `used`",
        "is the largest share of that tolerance. Cases that a sound run finds wrong are controls; those named `-alone` ran",
        "without this package, whatever they give.",
        "",
        "Of what must be right: "
        + ", ".join(f"{number} {verdict}" for verdict, number in count.items() if number)
        + ".",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
        *("| " + " | ".join(_cells(outcome)) + " |" for outcome in outcomes),
        "",
        "## Remarks",
        "",
        *(f"- `{outcome.case.name}`: {outcome.remarks}" for outcome in outcomes if outcome.remarks),
        "",
    ]
    return "\n".join(lines)
