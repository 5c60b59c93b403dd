"""The result of a run as a line, a table, JSON for the support matrix and a page of results."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.conformance.cases import Case
from tests.serving.tolerance import NOISE_FACTOR

Row = Mapping[str, Any]


@dataclass
class Outcome:
    """The outcome of one case.

    Attributes:
        case: the case.
        verdict: ``right``, ``wrong``, ``failed`` (no answers) or ``not run``.
        result: the result file of its process.
        kernels: kernels of this package that serve its layers, by the log; none where SGLang serves it.
        cache: the log's line about the KV cache, where this package has one.
        agrees: whether it matches the case it must agree with; None without one.
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
        """Return whether the outcome is that of a sound run."""
        if self.case.expect == "any":
            # Without this package SGLang may well fail.
            ran = self.verdict in ("right", "wrong") or (self.verdict == "failed" and not self.case.plugin)
            return ran and self.agrees is not False
        return self.verdict == self.case.expect and self.agrees is not False

    @property
    def served_by(self) -> str:
        """Return ``ours`` where this package serves the layers or the cache, by the log."""
        return "ours" if self.kernels or self.cache else "sglang"

    def row(self, commit: str) -> dict[str, Any]:
        """Return the case as a row of the support matrix."""
        of, judged = self.case.of, self.result.get("judgement", {})
        groups = judged.get("groups", {})
        beyond = [
            f"{name}: mean {group['mean']:.3f} (noise {group['noise_mean']:.3f}), median {group['median']:.3f} "
            f"({group['noise_median']:.3f}) of {group['tokens']}"
            for name, group in groups.items()
            if not all(group[part] <= NOISE_FACTOR * group[f"noise_{part}"] for part in ("mean", "median"))
        ]
        repeats = self.result.get("repeats")
        if repeats is not None:
            beyond.append(f"{repeats:.1%} of the long prompts' tokens repeat bit for bit")
        if self.result.get("tokens_per_step"):
            beyond.append(f"{self.result['tokens_per_step']:.2f} decoded tokens to a step of the target")
        notes = [self.note, *judged.get("faults", []), *beyond, *self.notes, *judged.get("notes", [])]
        return {
            "case": self.case.name,
            "algo": of.algo,
            "kv": self.case.kv,
            "family": of.family,
            "experts": of.mixture,
            "export": not of.large,
            "served_by": self.served_by,
            "plugin": self.case.plugin,
            "math": self.case.math,
            "tp": self.case.tp,
            "graphs": self.case.graphs,
            "chunk": self.case.chunk,
            "backend": " + ".join(self.kernels) or ("sglang" if self.result else ""),
            "attention": self.result.get("attention", ""),
            "cache": self.cache,
            "verdict": self.verdict,
            "expected": self.case.expect,
            "agrees": self.agrees,
            "median": judged.get("median"),
            "mean": judged.get("mean"),
            "noise": judged.get("noise_mean"),
            "noise_median": judged.get("noise_median"),
            "used": judged.get("used"),
            "repeats": repeats,
            "prompts": list(groups),
            "groups": groups,
            "seconds": round(self.seconds, 1),
            "commit": commit,
            "note": "; ".join(filter(None, notes)),
        }


def line(outcome: Outcome) -> str:
    """Return the case in one line."""
    row = outcome.row("")
    figures = ""
    if outcome.result:
        figures = (
            f" mean {row['mean']:.4f} (noise {row['noise']:.4f}) median {row['median']:.4f} ({row['noise_median']:.4f})"
            f" used {row['used']:.2f}"
        )
    where = f"[{row['backend']}, {row['attention']}] " if outcome.result else ""
    return f"{outcome.case.name}: {outcome.verdict}{figures} {outcome.seconds:.0f} s {where}{row['note']}"


HEADER = (
    "case",
    "algorithm",
    "KV",
    "family",
    "kernels",
    "attention",
    "verdict",
    "mean",
    "noise",
    "median",
    "noise",
    "used",
    "s",
)


def _cells(row: Row) -> list[str]:
    cells = [row[name] for name in ("case", "algo", "kv", "family", "backend", "attention", "verdict")]
    figures = [row[name] for name in ("mean", "noise", "median", "noise_median", "used")]
    return [*cells, *("-" if value is None else f"{value:.3f}" for value in figures), f"{row['seconds']:.0f}"]


def table(outcomes: Sequence[Outcome]) -> str:
    """Return one row per case, in columns."""
    rows = [HEADER, *(_cells(outcome.row("")) for outcome in outcomes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def as_json(outcomes: Sequence[Outcome], commit: str, earlier: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return JSON for the support matrix: hardware and versions, and a row for each case.

    ``earlier`` is an older result: its rows of cases that were not run now are kept.

    Raises:
        ValueError: the older result is from other hardware or versions.
    """
    rows = [outcome.row(commit) for outcome in outcomes]
    machine = next(
        ({name: o.result[name] for name in ("gpu", "capability", "versions")} for o in outcomes if o.result), None
    )
    if earlier is not None:
        machine = machine or {name: earlier[name] for name in ("gpu", "capability", "versions")}
        if any(machine[name] != earlier[name] for name in machine):
            raise ValueError(f"results of {earlier['gpu']} under {earlier['versions']} cannot be added to")
        known = {row["case"] for row in rows if row["verdict"] != "not run"}
        kept = [row for row in earlier["rows"] if row["case"] not in known]
        names = {row["case"] for row in kept}
        rows = [*kept, *(row for row in rows if row["case"] not in names)]
    unknown: dict[str, Any] = {"gpu": "unknown", "capability": None, "versions": {}}
    return {"date": datetime.date.today().isoformat(), **(machine or unknown), "commit": commit, "rows": rows}


def as_markdown(content: Mapping[str, Any]) -> str:
    """Return a page for benchmarks/results from the result of :func:`as_json`."""
    rows = content["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    verdicts = [row["verdict"] for row in rows if row["expected"] == "right"]
    count = {verdict: verdicts.count(verdict) for verdict in ("right", "wrong", "failed", "not run")}
    apart = [row["case"] for row in rows if row["agrees"] is False]
    restless = [row["case"] for row in rows if row["agrees"] is False and row["repeats"] < 1]
    lines = [
        f"# Served models on {content['gpu']}",
        "",
        f"{content['date']}, {max((row['tp'] for row in rows), default=1)} x {content['gpu']}, {versions};",
        f"commits {', '.join(dict.fromkeys(row['commit'][:7] for row in rows))}. Command: `make test-gpu-served`.",
        "",
        "Real ModelOpt exports of small models (`large-`: random weights in an 8B model's sizes) through `sglang.Engine`, judged",
        "by the log probabilities of prompts of 3 to 2100 tokens, alone and 16 at a time, in chunks and behind cached prefixes,",
        "and of decoded tokens. A case is right where, for every kind of request, mean and median of the differences from an",
        "independent float32 reading are within",
        f"{NOISE_FACTOR:g} times those of the same model in bf16 by Hugging Face (`noise`); `used` is the largest share of that",
        "tolerance. Where bf16's rounding may choose another expert of a mixture, a token is in doubt and left out; where most",
        "tokens of a kind of request are in doubt, none is left out. `wrong-scale` is a control,",
        "which a sound run finds wrong; cases named `-alone` ran without this package, whatever they give; NVFP4 experts that",
        "SGLang serves must answer as without this package: their numerics are SGLang's own.",
        "",
        "Of what must be right: "
        + ", ".join(f"{number} {verdict}" for verdict, number in count.items() if number)
        + ".",
        *(["Not the same as the case they must agree with: " + ", ".join(apart) + "."] if apart else []),
        *(["Of these, kernels do not repeat bit for bit in " + ", ".join(restless) + "."] if restless else []),
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
        *("| " + " | ".join(_cells(row)) + " |" for row in rows),
        "",
        "## Remarks",
        "",
        *(f"- `{row['case']}`: {row['note']}" for row in rows if row["note"]),
        "",
    ]
    return "\n".join(lines)
