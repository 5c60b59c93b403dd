"""``sglang-modelopt repair``: mend an export that contradicts itself or lacks scales, into a new folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from sglang_modelopt_ext.cli.command import Command, Result
from sglang_modelopt_ext.workflow.common.models import find_folder
from sglang_modelopt_ext.workflow.repair.run import TRUSTED, repair
from sglang_modelopt_ext.workflow.repair.working_copy import Step

SHOWN = 6
"""Changes of one rule that the text lists; ``--json`` lists all."""


class RepairResult(Result, frozen=True, kw_only=True):
    """The changes, and the faults that no rule covers.

    Attributes:
        folder: the checkpoint.
        output: the repaired checkpoint, None where none was written.
        steps: the changes, in order.
        problems: the faults that would remain, one line each; with one of them nothing is written.
    """

    folder: str
    output: str | None
    steps: list[Step]
    problems: list[str]

    def passed(self) -> bool:
        """Return whether nothing is wrong, or the repaired checkpoint was written."""
        return not self.problems and (self.output is not None or not self.steps)

    def text(self) -> str:
        """Return the changes by rule, what remains, and what was written."""
        parts = [self.folder]
        rules = list(dict.fromkeys(step.rule for step in self.steps))
        for rule in rules:
            steps = [step for step in self.steps if step.rule == rule]
            lines = [f"  {step.file}: {step.subject}: {step.change}" for step in steps[:SHOWN]]
            more = [f"  and {len(steps) - SHOWN} more"] if len(steps) > SHOWN else []
            parts.append("\n".join([f"{rule} ({len(steps)}):", *lines, *more]))
        if self.problems:
            remaining = [f"  {problem}" for problem in self.problems]
            parts.append("\n".join([f"not repaired ({len(self.problems)}), so that nothing is written:", *remaining]))
        elif not self.steps:
            parts.append("nothing to repair")
        elif self.output is None:
            parts.append("nothing was written: --output NEW writes the repaired checkpoint")
        else:
            parts.append(f"written and read back: {self.output}")
        return "\n\n".join(parts)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Repair an export: names with ModelOpt's left-over marker, configuration files that disagree, layers that are declared as "
        "quantized and stored in 16 bits (multi-token prediction), and input scales of experts that calibration never "
        "reached. Without --output it says what it would do. The checkpoint is never changed."
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder, or a name on the Hugging Face Hub")
    parser.add_argument("--output", type=Path, metavar="NEW", help="folder to write the repaired checkpoint to")
    parser.add_argument(
        "--trust",
        choices=TRUSTED,
        help="the file that is right where the two configuration files disagree and the tensors fit both",
    )
    parser.add_argument("--copy", action="store_true", help="copy all files (default: hard links to unchanged weights)")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint in NEW")


def _run(args: argparse.Namespace) -> RepairResult:
    folder = find_folder(args.checkpoint, "CHECKPOINT")
    done = repair(folder, args.output, trust=args.trust, link=not args.copy, overwrite=args.overwrite)
    return RepairResult(
        folder=str(folder),
        output=str(args.output) if done.written else None,
        steps=list(done.steps),
        problems=list(done.problems),
    )


COMMAND = Command(
    "repair", "Repair an export that contradicts itself or lacks scales.", _add_arguments, _run, RepairResult
)
