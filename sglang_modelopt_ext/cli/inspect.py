"""``sglang-modelopt inspect``: show the contents of a checkpoint and the kernels that serve it."""

from __future__ import annotations

import argparse
import json

from sglang_modelopt_ext.cli.command import Command, Result
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.workflow.common.formatting import format_bytes, format_columns
from sglang_modelopt_ext.workflow.common.models import find_folder
from sglang_modelopt_ext.workflow.inspect.run import Contents, LayerGroup, inspect_checkpoint


class InspectResult(Result, frozen=True, kw_only=True):
    """The result of ``inspect``."""

    contents: Contents

    def passed(self) -> bool:
        """Return whether no problem is known that would stop a server."""
        return not self.contents.problems

    def text(self) -> str:
        """Return a summary, tables of the layers and tensors, and the problems."""
        parts = [self._summary(), self._serving()]
        if self.contents.layers:
            parts.append(self._layers())
        if any(group.scales for group in self.contents.layers):
            parts.append(self._scales())
        if self.contents.plain:
            parts.append(self._plain())
        if self.contents.record:
            record = (f"  {name}: {_shortened(name, value)}" for name, value in self.contents.record.items())
            parts.append("\n".join(["metadata:", *record]))
        parts.append(self._loading())
        if self.contents.remarks:
            remarks = (f"  {remark}" for remark in self.contents.remarks)
            parts.append("\n".join(["objections of this package:", *remarks]))
        parts += [f"note: {note}" for note in self.contents.notes]
        problems = self.contents.problems
        parts.append("\n".join([f"problems: {len(problems) or 'none'}", *(f"  {problem}" for problem in problems)]))
        return "\n\n".join(parts)

    def _summary(self) -> str:
        found = self.contents
        lines = [found.folder, f"  model: {found.architecture or 'no config.json'}"]
        algo = found.algo or ("unquantized" if found.kv_cache is None else "KV cache only")
        count = sum(group.count for group in found.layers)
        bits = f", {count} layers, {found.bits_per_weight:.2f} bits per weight" if found.bits_per_weight else ""
        lines.append(f"  quantization: {algo}{bits}")
        quantized = f", {format_bytes(found.quantized_bytes)} of them in quantized layers" if found.layers else ""
        lines.append(f"  weights: {format_bytes(found.bytes)} in {found.files} files{quantized}")
        lines.append(f"  KV cache: {self._kv_cache()}")
        if found.exclude_modules:
            lines.append(f"  excluded from quantization: {', '.join(found.exclude_modules)}")
        return "\n".join(lines)

    def _kv_cache(self) -> str:
        cache = self.contents.kv_cache
        if cache is None:
            return "not quantized"
        bits = f", {cache.bits:g} bits per element" if cache.bits else ""
        return f"{cache.recipe}{bits}, {cache.layers or 'no'} layers with scales of their own ({cache.source})"

    def _serving(self) -> str:
        serving = self.contents.serving
        served = f"served by {serving.owner}" if serving.owner else "not served"
        lines = [f"on {serving.target}: {served}: {serving.why}"]
        if serving.flags:
            ways = " or ".join(f"--quantization {flag}" for flag in serving.flags)
            lines.append(f"  {'to have it served by this package' if serving.owner == 'SGLang' else 'flags'}: {ways}")
        lines += [f"  SGLang alone, {algo}: {what}" for algo, what in serving.stock.items()]
        reasons: dict[str, None] = {}
        for group in self.contents.layers:
            for name, reason in group.rejected.items():
                reasons[f"  {group.weight}: {group.kernel or 'no kernel'}; rejected: {name} {reason}"] = None
        return "\n".join([*lines, *reasons])

    def _loading(self) -> str:
        loading = self.contents.loading
        if not loading.checked:
            return f"loads: not checked: {loading.why_not}"
        if loading.loads:
            left_out = f"; {loading.left_out} stored tensors are not needed" if loading.left_out else ""
            return f"loads: into {loading.model} of SGLang, by names, types and shapes; values were not read{left_out}"
        names = [f"  missing: {name}" for name in loading.missing] + [
            f"  left over: {name}" for name in loading.left_over
        ]
        return "\n".join(["loads: no, see the problems", *names])

    def _layers(self) -> str:
        header = ["quantized layers", "algorithm", "weight", "activation", "kernel"]
        header += ["count", "N x K", "group", "extra", "size"]
        return format_columns(header, [self._layer(group) for group in self.contents.layers], left=5)

    def _layer(self, group: LayerGroup) -> tuple[str, ...]:
        extra = [f"rank {group.low_rank}"] if group.low_rank else []
        if group.smoothing:
            extra.append("smoothing")
        return (
            group.name,
            group.algo,
            group.weight,
            group.activation,
            group.kernel or ("SGLang's" if self.contents.serving.owner == "SGLang" else "none"),
            str(group.count),
            f"{group.n} x {group.k}",
            str(group.group_size or "-"),
            " ".join(extra) or "-",
            format_bytes(group.bytes),
        )

    def _scales(self) -> str:
        rows = [
            (group.name, name, f"{found.smallest:.4g}", f"{found.largest:.4g}")
            for group in self.contents.layers
            for name, found in group.scales.items()
        ]
        return format_columns(("scales", "tensor", "smallest", "largest"), rows, left=2)

    def _plain(self) -> str:
        rows = [
            (group.name, group.dtype, str(group.count), str(group.shape), format_bytes(group.bytes))
            for group in self.contents.plain
        ]
        return format_columns(("other tensors", "type", "count", "shape", "size"), rows, left=2)


MOST_CHARACTERS = 160
"""Length of a recorded value in the text; ``--json`` prints all of it."""


def _shortened(name: str, value: object) -> str:
    if name == "formats" and isinstance(value, list):
        value = [
            {**part, "layers": len(part["layers"])} if isinstance(part.get("layers"), list) else part for part in value
        ]
    text = json.dumps(value)
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " ..."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``inspect``."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder, or a name on the Hugging Face Hub")
    parser.add_argument("--gpu", help="the target that is to serve it: cpu, sm80, sm90, ... (default: this machine)")
    parser.add_argument("--layers", action="store_true", help="list every layer and tensor separately")
    parser.add_argument(
        "--scales",
        action="store_true",
        help="read all scales, check them and show their ranges (default: read headers only)",
    )
    parser.add_argument(
        "--headers-only",
        action="store_true",
        help="do not load the headers into SGLang's model class, which imports SGLang",
    )


def run(args: argparse.Namespace) -> InspectResult:
    """Inspect the checkpoint."""
    target = Device.here() if args.gpu is None else Device.parse(args.gpu)
    folder = find_folder(args.checkpoint, "CHECKPOINT")
    contents = inspect_checkpoint(
        folder, target, each_layer=args.layers, scales=args.scales, rehearse=not args.headers_only
    )
    return InspectResult(contents=contents)


COMMAND = Command(
    "inspect",
    "Show the contents of a checkpoint and the kernels that will serve it.",
    add_arguments,
    run,
    InspectResult,
)
