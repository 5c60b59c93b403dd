"""A measurement of the recipes on the model of `make real-model`, on natural text; writes tables and a picture into docs/.

    make real-model && python examples/real_quality.py            # everything
    python examples/real_quality.py FP8_DEFAULT kv:fp8            # some of it; what was measured before is kept
    python examples/real_quality.py --as-measured                 # nothing: the documents from what is there

Text: the Python Language Reference as it ships with every Python (``pydoc_data.topics``, PSF licence). ModelOpt calibrates on every
other topic; windows of the rest are scored, none of which has a passage in common with the calibration. One process quantizes,
this one reads each export in fp32 without SGLang: the reading of ``sglang-modelopt verify``, from which a server differs by
rounding noise only. What was measured is kept in --output, where several runs can share the work.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from pydoc_data.topics import topics

import msgspec
import numpy as np
from demo import HERE, hardware, versions
from pages import replace_part
from real_model import FOLDER

from sglang_modelopt_ext.checkpoint.kv_cache import read_plan
from sglang_modelopt_ext.checkpoint.quant_config import read_quant_config
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.common.text import begin_token, encode, load_tokenizer, split_windows, spread
from sglang_modelopt_ext.workflow.evaluate.measure import Logprobs, describe, divergences
from sglang_modelopt_ext.workflow.evaluate.plots import find_pyplot
from sglang_modelopt_ext.workflow.evaluate.score import (
    Interval,
    Scores,
    divergence_interval,
    perplexity_interval,
    ratio_interval,
)

FIGURES = HERE / "real_quality.json"
DOCS = HERE.parent / "docs"
PICTURE = DOCS / "bits-perplexity.svg"
BASE = "bf16"
DENSE = (
    "NVFP4_DEFAULT",
    "W4A8_NVFP4_FP8",
    "W4A8_MXFP4_FP8",
    "MXFP4_DEFAULT",
    "FP8_DEFAULT",
    "INT8_DEFAULT",
    "INT8_SMOOTHQUANT",
    "W4A16_NVFP4",
    "NVFP4_AWQ_LITE",
    "MXFP8_DEFAULT",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY",
    "INT8_WEIGHT_ONLY",
    "NVFP4_MLP_WEIGHT_ONLY",
    "NVFP4_FOUR_OVER_SIX",
    "NVFP4_SVDQUANT_DEFAULT",
    "NVFP4_AWQ_CLIP",
    "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP",
    "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN",
)
UNFIT = ("INT4_BLOCKWISE_WEIGHT_ONLY", "INT4_AWQ", "W4A8_AWQ_BETA")
"""Recipes with blocks of 128 along K, which ModelOpt 0.47 cannot pack for this model's K of 576."""

AUTO = "auto:"
SEARCHES = (f"{AUTO}4.5",)
"""Mixes that ``auto-quantize`` chooses, for so many bits."""
SEARCHED = "W4A16_NVFP4,W4A8_NVFP4_FP8,INT8_WEIGHT_ONLY"
SCORED_SAMPLES = 4

KV = "kv:"
CACHES = ("fp8", "nvfp4", "fp8_affine", "nvfp4_affine", "nvfp4_rotate")
CACHE_BITS = {"fp8": 8.0, "nvfp4": 4.5}
CASES = (*DENSE[:8], *(KV + name for name in CACHES), *DENSE[8:], *SEARCHES)
PAIRS = (
    ("W4A8_NVFP4_FP8", "NVFP4_DEFAULT"),
    ("W4A8_MXFP4_FP8", "MXFP4_DEFAULT"),
    ("W4A8_NVFP4_FP8", "FP8_DEFAULT"),
    ("W4A8_MXFP4_FP8", "W4A8_NVFP4_FP8"),
    ("MXFP4_DEFAULT", "NVFP4_DEFAULT"),
    ("W4A8_NVFP4_FP8", "W4A16_NVFP4"),
    ("NVFP4_SVDQUANT_DEFAULT", "NVFP4_DEFAULT"),
    ("NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN", "NVFP4_DEFAULT"),
    ("NVFP4_AWQ_LITE", "NVFP4_DEFAULT"),
    ("NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP", "NVFP4_DEFAULT"),
    ("NVFP4_AWQ_CLIP", "NVFP4_DEFAULT"),
    ("NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN", "W4A8_NVFP4_FP8"),
    ("NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN", "W4A16_NVFP4"),
    ("NVFP4_FOUR_OVER_SIX", "NVFP4_DEFAULT"),
    ("FP8_PER_CHANNEL_PER_TOKEN", "FP8_DEFAULT"),
    ("MXFP8_DEFAULT", "FP8_DEFAULT"),
    ("FP8_2D_BLOCKWISE_WEIGHT_ONLY", "FP8_DEFAULT"),
    ("INT8_WEIGHT_ONLY", "FP8_DEFAULT"),
    ("INT8_SMOOTHQUANT", "INT8_DEFAULT"),
    *(
        ("auto:4.5", name)
        for name in ("W4A16_NVFP4", "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN", "NVFP4_AWQ_LITE", "W4A8_NVFP4_FP8")
    ),
    ("kv:nvfp4_affine", "kv:nvfp4"),
    ("kv:nvfp4_rotate", "kv:nvfp4"),
    ("kv:fp8_affine", "kv:fp8"),
)
"""Cases that are compared with each other."""

KINDS = {
    "4-bit weights, 8-bit activations": ("W4A8",),
    "4-bit weights and activations": ("NVFP4_DEFAULT", "NVFP4_AWQ", "NVFP4_SVD", "NVFP4_FOUR", "NVFP4_W4A4", "MXFP4"),
    "8-bit weights and activations": ("FP8_DEFAULT", "FP8_PER", "MXFP8", "INT8_DEFAULT", "INT8_SMOOTH"),
    "chosen by auto-quantize": (AUTO,),
}
COLORS = {
    **dict(zip(KINDS, ("tab:blue", "tab:red", "tab:green", "tab:purple"), strict=True)),
    "weights only": "tab:gray",
}
WINDOWS, LENGTH = 16, 128
PASSAGE = 16
"""Tokens in a row that a scored window and the calibration data must not have in common."""

SAMPLES, CALIBRATION_LENGTH = 8, 256
_POLL_SECONDS = 2.0


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """The measurement of one case.

    Attributes:
        name: of the case.
        algorithm: of the export.
        bits: stored bits for each weight of the quantized layers, or for each element of the cache.
        losses: of each window the sum of -log p of its tokens, in nats.
        divergences: of each window the sum of KL(bf16 || this), in nats.
    """

    name: str
    algorithm: str
    bits: float
    losses: list[float]
    divergences: list[float]


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """All measurements.

    Attributes:
        setting: what they were made with.
        tokens: of each window the number that is scored.
        rows: the cases.
    """

    setting: dict[str, str]
    tokens: list[int]
    rows: list[Row]

    def scores(self, name: str) -> Scores:
        """Return the scores of a case."""
        (row,) = [row for row in self.rows if row.name == name]
        tokens = np.asarray(self.tokens)
        return Scores(np.asarray(row.losses), tokens, [], np.asarray(row.divergences), tokens)


def texts(part: int) -> list[str]:
    """Return every other topic of the reference: part 0 to calibrate on, part 1 to score."""
    return [topics[name] for name in sorted(topics)[part::2]]


def make(model: Path, output: Path, cases: list[str], samples: int) -> None:
    """Quantize the model for every case whose folder is not there; each folder appears when it is whole."""
    from sglang_modelopt_ext.workflow.quantize.recipes import NONE, Changes
    from sglang_modelopt_ext.workflow.quantize.run import Options, quantize

    data = output / "calibration.txt"
    data.write_text("\n\n".join(texts(0)), encoding="utf-8")
    for case in cases:
        folder = folder_of(output, case)
        if folder.exists():
            continue
        if case.startswith(AUTO):
            search(model, folder, case.removeprefix(AUTO), data, samples)
            continue
        cache = case.removeprefix(KV) if case.startswith(KV) else None
        begin = time.perf_counter()
        options = Options(
            recipe=NONE if cache else case,
            changes=Changes(kv=cache),
            data=(str(data),),
            samples=samples,
            sequence_length=CALIBRATION_LENGTH,
            layerwise=False,
        )
        try:
            quantize(str(model), folder, options, progress=False)
        except ModelOptExtError as error:
            failure_of(folder).write_text(error.one_line(), encoding="utf-8")
        print(f"{case}: quantized in {time.perf_counter() - begin:.0f} s", flush=True)


def search(model: Path, folder: Path, bits: str, data: Path, samples: int) -> None:
    """Have ``auto-quantize`` choose a format for every layer, and export the mix to ``folder``."""
    from sglang_modelopt_ext.cli.main import main as command

    begin = time.perf_counter()
    words = ["auto-quantize", str(model), "--bits", bits, "--formats", SEARCHED, "--data", str(data), "--gpu", "sm90"]
    words += ["--samples", str(samples), "--score-samples", str(SCORED_SAMPLES)]
    words += ["--sequence-length", str(CALIBRATION_LENGTH), "--output", str(folder)]
    if command(words):
        failure_of(folder).write_text("see make.log", encoding="utf-8")
    print(f"{AUTO}{bits}: searched in {time.perf_counter() - begin:.0f} s", flush=True)


def folder_of(output: Path, case: str) -> Path:
    """Return the folder of a case's export."""
    return output / case.replace(":", "-")


def failure_of(folder: Path) -> Path:
    """Return the file that says why a folder could not be made."""
    return folder.with_name(f"{folder.name}.failed")


def read(folder: Path, windows: list[list[int]], reference: Scores | None) -> Scores:
    """Score the windows with a checkpoint's reading; keep the distributions where there is no reference."""
    from sglang_modelopt_ext.workflow.verify.reference import ReferenceModel

    config = read_quant_config(folder)
    model = ReferenceModel(folder, kv_cache=None if config is None else read_plan(folder, config, "auto"))
    losses, sums = [], []
    rows: list[Logprobs] = []
    for index, window in enumerate(windows):
        found = model.logprobs(window)
        losses.append(-found[np.arange(len(found)), window[1:]].astype(np.float64).sum())
        if reference is None:
            rows.append(found)
        else:
            sums.append(divergences(reference.rows[index], found).sum())
    tokens = np.asarray([len(window) - 1 for window in windows])
    if reference is None:
        return Scores(np.asarray(losses), tokens, rows)
    return Scores(np.asarray(losses), tokens, [], np.asarray(sums), tokens)


def measure(case: str, folder: Path, windows: list[list[int]], reference: Scores) -> Row:
    """Return the row of a checkpoint."""
    scores = read(folder, windows, reference)
    algorithm, bits = describe(folder)
    if case.startswith(KV):
        algorithm, bits = case.removeprefix(KV), CACHE_BITS["nvfp4" if "nvfp4" in case else "fp8"]
    assert scores.divergences is not None, "scored against a reference"
    return Row(
        name=case,
        algorithm=algorithm,
        bits=bits,
        losses=scores.losses.tolist(),
        divergences=scores.divergences.tolist(),
    )


def wait_for(folder: Path, maker: subprocess.Popen[bytes]) -> str | None:
    """Wait until a folder is there; return None, or the reason where it will not come."""
    while not folder.exists():
        if failure_of(folder).exists() or maker.poll() is not None:
            return failure_of(folder).read_text(encoding="utf-8") if failure_of(folder).exists() else "see make.log"
        time.sleep(_POLL_SECONDS)
    return None


def setting(windows: list[list[int]], samples: int) -> dict[str, str]:
    """Return what the figures depend on, as text."""
    digest = hashlib.sha256("".join(texts(0) + texts(1)).encode()).hexdigest()
    return {
        "command": f"python examples/real_quality.py --windows {len(windows)} --samples {samples}",
        "date": str(datetime.date.today()),
        "hardware": hardware().partition(":")[2].strip().partition(", no GPU")[0],
        "versions": versions().partition(":")[2].strip(),
        "text": f"pydoc_data.topics of Python {sys.version_info.major}.{sys.version_info.minor}, sha256 {digest[:12]}",
        "scored": f"{sum(len(window) - 1 for window in windows)} tokens in {len(windows)} windows",
        "calibrated": f"{samples} windows of up to {CALIBRATION_LENGTH} tokens",
    }


def run(args: argparse.Namespace) -> Figures:
    """Measure the cases that were not measured before, and return all in the order of ``CASES``."""
    if not (FOLDER / "config.json").is_file():
        raise ModelOptExtError.at(FOLDER, "model", "the model of `make real-model`", "no such folder")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / ".gitignore").write_text("*\n", encoding="utf-8")
    windows = windows_of(texts(1), LENGTH, args.windows)
    check_apart(windows, windows_of(["\n\n".join(texts(0))], CALIBRATION_LENGTH, args.samples))
    given = setting(windows, args.samples)
    tokens = [len(window) - 1 for window in windows]
    kept = args.output / "figures"
    kept.mkdir(exist_ok=True)

    def keep(row: Row) -> None:
        """Write a row to a file of its own, so that several runs can share the work."""
        figures = Figures(setting=given, tokens=tokens, rows=[row])
        (kept / f"{folder_of(kept, row.name).name}.json").write_bytes(msgspec.json.encode(figures))

    wanted = [case for case in args.cases if case not in read_figures(kept, given, tokens)]
    if wanted and not args.as_measured:
        for case in wanted:
            failure_of(folder_of(args.output, case)).unlink(missing_ok=True)
        command = [sys.executable, __file__, "--make", "--output", str(args.output), "--samples", str(args.samples)]
        with (args.output / "make.log").open("ab") as log:
            maker = subprocess.Popen([*command, *wanted], stdout=log, stderr=log)
            try:
                reference = read(FOLDER, windows, None)
                losses = reference.losses.tolist()
                keep(Row(name=BASE, algorithm=BASE, bits=16.0, losses=losses, divergences=[0.0] * len(windows)))
                for case in wanted:
                    if reason := wait_for(folder_of(args.output, case), maker):
                        print(f"{case}: not made: {reason}", flush=True)
                        continue
                    begin = time.perf_counter()
                    keep(measure(case, folder_of(args.output, case), windows, reference))
                    print(f"{case}: read in {time.perf_counter() - begin:.0f} s", flush=True)
            finally:
                maker.terminate()
                maker.wait()
    rows = read_figures(kept, given, tokens)
    return Figures(setting=given, tokens=tokens, rows=[rows[name] for name in (BASE, *CASES) if name in rows])


def windows_of(documents: list[str], length: int, count: int) -> list[list[int]]:
    """Return windows of the texts, chosen as ``sglang-modelopt`` chooses them."""
    tokenizer = load_tokenizer(FOLDER)
    return spread(split_windows(encode(tokenizer, documents), length, begin_token(tokenizer)), count)


def check_apart(scored: list[list[int]], calibrated: list[list[int]]) -> None:
    """Raise ModelOptExtError where a scored window has a passage in common with the calibration: topics share some."""
    seen = {tuple(window[i : i + PASSAGE]) for window in calibrated for i in range(len(window) - PASSAGE + 1)}
    for number, window in enumerate(scored):
        if any(tuple(window[i : i + PASSAGE]) in seen for i in range(len(window) - PASSAGE + 1)):
            expected = "no passage of the calibration data; choose another --samples or --windows"
            raise ModelOptExtError.at("scored text", f"window {number}", expected, f"{PASSAGE} tokens of it")


def read_figures(folder: Path, given: dict[str, str], tokens: list[int]) -> dict[str, Row]:
    """Return what was measured before in this setting, by name. Raises ModelOptExtError for another setting."""
    rows = {}
    for file in sorted(folder.glob("*.json")):
        kept = msgspec.json.decode(file.read_bytes(), type=Figures)
        for name in ("text", "scored", "calibrated"):
            if kept.setting[name] != given[name]:
                raise ModelOptExtError.at(file, name, f"{given[name]}, or another --output", kept.setting[name])
        assert kept.tokens == tokens, "the same text in the same windows"
        rows.update({row.name: row for row in kept.rows})
    return rows


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 140, break_long_words=False, break_on_hyphens=False)


def _cell(interval: Interval | None, digits: int) -> str:
    if interval is None:
        return "-"
    return f"{interval.value:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def differences(figures: Figures, first: str, second: str) -> Interval:
    """Return the mean KL of the first case less that of the second in nats, from paired windows."""
    one, other = figures.scores(first), figures.scores(second)
    assert one.divergences is not None
    assert other.divergences is not None
    return divergence_interval(dataclasses.replace(one, divergences=one.divergences - other.divergences))


def tables(figures: Figures) -> str:
    """Return the part of docs/quality.md."""
    names = [row.name for row in figures.rows]
    given, base = figures.setting, figures.scores(BASE)
    missing = [case for case in CASES if case not in names]
    lines = [
        _paragraph(
            f"{given['scored']} of {given['text']}, calibrated on {given['calibrated']} of the other topics. Perplexity of bf16: "
            f"{_cell(perplexity_interval(base), 2)}. In brackets 95 % intervals from a bootstrap over windows, paired with bf16 "
            "(ratio of perplexities) or with the other recipe."
        ),
        "",
    ]
    for title, cases in (("recipe", (*DENSE, *SEARCHES)), ("KV cache", tuple(KV + name for name in CACHES))):
        bits = "bits/element" if title == "KV cache" else "bits/weight"
        if not any(row.name in cases for row in figures.rows):
            continue
        lines += [f"| {title} | algorithm | {bits} | perplexity / bf16's | KL (nats) |", "|---|---|---|---|---|"]
        rows = [row for row in figures.rows if row.name in cases]
        for row in sorted(rows, key=lambda row: sum(row.divergences)):
            scores = figures.scores(row.name)
            ratio, divergence = ratio_interval(scores, base), divergence_interval(scores)
            shown = row.name.removeprefix(KV)
            lines.append(f"| {shown} | {row.algorithm} | {row.bits:.2f} | {_cell(ratio, 4)} | {_cell(divergence, 4)} |")
        lines.append("")
    lines += ["| question | KL of the first less the second's (nats) | of the second's KL |", "|---|---|---|"]
    for first, second in PAIRS:
        if first in names and second in names:
            found, whole = differences(figures, first, second), divergence_interval(figures.scores(second)).value
            lines.append(f"| {first} against {second} | {_cell(found, 4)} | {found.value / whole:+.0%} |")
    lines += [
        "",
        _paragraph(
            f"ModelOpt 0.47 cannot export {', '.join(UNFIT)}: this model's K of 576 is no multiple of their blocks of 128."
        ),
    ]
    lines += [
        "",
        _paragraph(
            f"auto:4.5 is a mix for at most 4.5 bits a weight out of {SEARCHED.replace(',', ', ')}, chosen by "
            f"`sglang-modelopt auto-quantize` (gradients of {SCORED_SAMPLES} windows): at that size the best uniform recipes are "
            "the ones it is compared with."
        ),
    ]
    if missing:
        lines += ["", _paragraph(f"Not measured yet: {', '.join(missing)}.")]
    lines += [
        "",
        _paragraph(
            f"Made by `{given['command']}`, {given['date']}, on {given['hardware']} ({given['versions']}); every export read in "
            "fp32 without SGLang, as `sglang-modelopt verify` reads it."
        ),
    ]
    return "\n".join(lines)


def draw(figures: Figures, file: Path) -> None:
    """Draw stored bits against the perplexity of every dense recipe."""
    pyplot = find_pyplot()
    base = figures.scores(BASE)
    figure, axis = pyplot.subplots(figsize=(9, 5.5))
    for row in figures.rows:
        if row.name not in (*DENSE, *SEARCHES):
            continue
        ratio = ratio_interval(figures.scores(row.name), base)
        error = [[ratio.value - ratio.low], [ratio.high - ratio.value]]
        (kind,) = [label for label, prefixes in KINDS.items() if row.name.startswith(prefixes)] or ["weights only"]
        axis.errorbar(row.bits, ratio.value, yerr=error, fmt="o", capsize=3, color=COLORS[kind])
        # Labels of neighbouring formats stand on either side.
        left = row.bits < 4.4
        place = {"xytext": (-6 if left else 6, -3), "ha": "right" if left else "left"}
        axis.annotate(row.name, (row.bits, ratio.value), textcoords="offset points", fontsize=7, **place)
    for kind, color in COLORS.items():
        axis.plot([], [], "o", color=color, label=kind)
    axis.axhline(1.0, color="gray", linewidth=0.8)
    axis.set_xlim(2.0, 10.5)
    axis.set_yscale("log")
    ticks = [1.0, 1.25, 1.5, 2.0, 3.0, 4.0]
    axis.set_yticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("stored bits for each weight of the quantized layers")
    axis.set_ylabel("perplexity / that of bf16")
    axis.set_title("SmolLM2-135M-Instruct; bars are 95 % intervals, paired with bf16")
    axis.legend(loc="upper right")
    figure.tight_layout()
    with pyplot.rc_context({"svg.hashsalt": "sglang-modelopt-ext", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def write(figures: Figures) -> None:
    """Write the figures, the tables and the picture."""
    FIGURES.write_bytes(msgspec.json.format(msgspec.json.encode(figures), indent=1) + b"\n")
    replace_part(DOCS / "quality.md", "SmolLM2", tables(figures))
    draw(figures, PICTURE)


def main() -> int:
    """Measure the cases named on the command line, or all, and write the documents."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(CASES), help="ModelOpt configurations, kv:NAME (default: all)")
    parser.add_argument("--output", type=Path, default=FOLDER.parent / "quality", help="where checkpoints and logs go")
    parser.add_argument("--windows", type=int, default=WINDOWS, help=f"windows to score (default: {WINDOWS})")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"windows to calibrate on (default: {SAMPLES})")
    parser.add_argument("--as-measured", action="store_true", help="measure nothing, write what is in --output")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        if args.make:
            make(FOLDER, args.output, args.cases, args.samples)
            return 0
        write(run(args))
    except ModelOptExtError as error:
        print(error.one_line(), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
