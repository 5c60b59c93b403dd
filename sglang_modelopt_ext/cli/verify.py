"""``sglang-modelopt verify``: check a server's answers against its checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from sglang_modelopt_ext.cli.command import Command, Result
from sglang_modelopt_ext.cli.serving import (
    add_server_arguments,
    add_text_arguments,
    log_files,
    server_arguments,
    text_windows,
)
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.workflow.common.formatting import format_columns
from sglang_modelopt_ext.workflow.common.models import find_folder, served_dtype
from sglang_modelopt_ext.workflow.common.text import load_tokenizer
from sglang_modelopt_ext.workflow.server.client import ServerClient
from sglang_modelopt_ext.workflow.server.process import ServerProcess
from sglang_modelopt_ext.workflow.verify.run import Difference, Served, Verification, ask_server, check_base, verify

SAMPLES, SEQUENCE_LENGTH = 16, 128


class VerifyResult(Result, frozen=True, kw_only=True):
    """The result of ``verify``."""

    verification: Verification

    def passed(self) -> bool:
        """Return whether the server is within the limits."""
        return not self.verification.failures

    def text(self) -> str:
        """Return the differences, the limits, the worst tokens and the verdict."""
        found = self.verification
        cache = f", KV cache {found.kv_cache}" if found.kv_cache else ""
        parts = [
            f"{found.folder}\n  served in {found.dtype} on {found.target}{cache} ({found.server}, {found.served_model})\n"
            f"  against its decoded export, at {found.tokens} tokens in {found.windows} windows",
            self._differences(),
        ]
        if found.base:
            parts.append(self._base())
        parts.append(self._worst())
        parts += [f"note: {note}" for note in found.notes]
        parts.append("\n".join(f"FAILED: {failure}" for failure in found.failures) or "passed")
        return "\n\n".join(parts)

    def _differences(self) -> str:
        found = self.verification
        mean, median, divergence = (f"{limit:.3g}" for limit in found.limits.values())
        rows = [
            ("the server", *_cells(found.served)),
            (f"noise floor: {found.dtype} rounding", *_cells(found.rounding)),
            *([("  with ties rounded the other way", *_cells(found.ties))] if found.ties else []),
            ("served twice", *_cells(found.repeated)),
            *([("ModelOpt's simulation", *_cells(found.simulated))] if found.simulated else []),
            (f"limit: noise x {found.factor:g} (KL: x {found.factor**2:g})", mean, median, "-", divergence, "-"),
        ]
        return format_columns(("", "mean |d log p|", "median", "3rd quartile", "KL (nats)", "same top token"), rows)

    def _base(self) -> str:
        base = self.verification.base
        assert base is not None, "called where there is one"
        rows = [
            ("base model", f"{base.perplexity:.3f}", "-"),
            ("decoded export", f"{base.export_perplexity:.3f}", f"{base.export_divergence:.5f}"),
            ("the server", f"{base.served_perplexity:.3f}", f"{base.served_divergence:.5f}"),
        ]
        return format_columns((f"against {base.base}", "perplexity", "KL (nats)"), rows)

    def _worst(self) -> str:
        rows = [
            (repr(token.text), str(token.window), str(token.position), f"{token.served:.4f}", f"{token.expected:.4f}")
            for token in self.verification.worst
        ]
        return format_columns(("worst tokens", "window", "position", "served", "expected"), rows)


def _cells(difference: Difference) -> list[str]:
    found = (
        difference.mean_abs_logprob,
        difference.median_abs_logprob,
        difference.upper_quartile_abs_logprob,
        difference.divergence,
    )
    return [*(f"{value:.3g}" for value in found), f"{difference.same_top:.4f}"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``verify``."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder, or a name on the Hugging Face Hub")
    parser.add_argument(
        "--base",
        help="the unquantized model, to show the cost of quantization and, where it can be made, ModelOpt's simulation",
    )
    parser.add_argument(
        "--no-simulation",
        action="store_true",
        help="skip ModelOpt's simulation, which calibrates the base model again and takes as long as quantizing it did",
    )
    parser.add_argument(
        "--url", help="query this running server (such as http://127.0.0.1:30000) instead of starting one"
    )
    parser.add_argument("--gpu", help="the target of that server: cpu, sm90, ... (default: this machine)")
    add_text_arguments(parser, SAMPLES, SEQUENCE_LENGTH, "modules of Python's library")
    add_server_arguments(parser, "CHECKPOINT")


def run(args: argparse.Namespace) -> VerifyResult:
    """Query a server and compare its answers."""
    target = Device.here() if args.gpu is None else Device.parse(args.gpu)
    folder = find_folder(args.checkpoint, "CHECKPOINT")
    base = find_folder(args.base, "--base") if args.base else None
    # Report bad input before a server is started.
    served_dtype(folder, args.dtype)
    if base:
        check_base(base)
    tokenizer = load_tokenizer(folder)
    windows = text_windows(args, folder, tokenizer)
    served = _ask(args, folder, windows)
    found = verify(
        folder,
        served,
        windows,
        target,
        base=base,
        simulate=not args.no_simulation,
        show=lambda token: tokenizer.decode([token]),
    )
    return VerifyResult(verification=found)


def _ask(args: argparse.Namespace, folder: Path, windows: list[list[int]]) -> Served:
    if args.url:
        return ask_server(ServerClient(args.url, folder), windows)
    with (
        log_files(args.log) as log,
        ServerProcess(folder, log=log, quantization=args.quantization, arguments=server_arguments(args)) as server,
    ):
        return ask_server(server, windows)


COMMAND = Command(
    "verify",
    "Check that a server computes what the checkpoint holds.",
    add_arguments,
    run,
    VerifyResult,
    takes_rest=True,
)
