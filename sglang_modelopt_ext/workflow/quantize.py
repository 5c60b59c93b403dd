"""Quantizes a model with NVIDIA ModelOpt into a checkpoint this package has read back and found valid.

Command line::

    python -m sglang_modelopt_ext.workflow.quantize MODEL --recipe W4A8_NVFP4_FP8 --text calibration.txt --output DIR
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sglang_modelopt_ext import __version__
from sglang_modelopt_ext.checkpoint.quant_config import OWN_KEY, QUANT_CONFIG_NAME, ROUNDS_ACTIVATIONS
from sglang_modelopt_ext.checkpoint.reader import bits_per_weight, check_all_values, read_checkpoint
from sglang_modelopt_ext.checkpoint.tensors import read_json_object
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow import modelopt_cpu
from sglang_modelopt_ext.workflow.progress import ticking
from sglang_modelopt_ext.workflow.text import begin_token, encode, load_tokenizer, split_windows, spread

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
)
_CONFIG_SUFFIXES = ("", "_CFG", "_CONFIG")


@dataclass(frozen=True)
class QuantizedModel:
    """What :func:`quantize` wrote.

    Attributes:
        folder: the checkpoint.
        algo: its ``quant_algo``.
        linears: how many linear layers are quantized.
        bits_per_weight: stored bits for each of their weights, scales included.
    """

    folder: Path
    algo: str
    linears: int
    bits_per_weight: float


def quantize(
    model: Path,
    recipe: str,
    output: Path,
    calibration_texts: Sequence[str],
    *,
    window: int = 512,
    max_windows: int = 64,
    device: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> QuantizedModel:
    """Calibrates ``model`` on text, quantizes it with ModelOpt and exports it to ``output``.

    The export is written to a folder beside ``output``, read back with the strict reader, every scale checked, and only
    then renamed: ``output`` is a whole, valid checkpoint or is left as it was.

    Args:
        model: folder of the unquantized Hugging Face model.
        recipe: a ``modelopt.torch.quantization`` configuration, with or without its ``_CFG``.
        output: folder to write.
        calibration_texts: documents, cut into windows as by :func:`~sglang_modelopt_ext.workflow.text.split_windows`.
        window: tokens in a calibration window.
        max_windows: how many windows to run, spread evenly over the text.
        device: where to calibrate, by default CUDA where there is a GPU.
        overwrite: replace the checkpoint in ``output``.
        progress: show progress on standard error.

    Raises:
        ModelOptExtError: no ModelOpt, an unknown recipe, an output that exists, or a model ModelOpt cannot export.
    """
    _check_folders(model, output, overwrite)
    with ticking("importing ModelOpt", progress):
        config = find_config(recipe)
    tokenizer = load_tokenizer(model)
    windows = spread(split_windows(encode(tokenizer, calibration_texts), window, begin_token(tokenizer)), max_windows)
    if not windows:
        raise ModelOptExtError.at("calibration text", "tokens", "at least one window of text", "none")

    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        _run_modelopt(model, recipe, config, windows, scratch, device, progress)
        _copy_tokenizer(model, scratch)
        with ticking("checking the export", progress):
            checkpoint = read_checkpoint(scratch)
            check_all_values(checkpoint)
        _make_readable(scratch)
        _move_into_place(scratch, output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    algo = checkpoint.config.algo or "none"
    return QuantizedModel(output, algo, len(checkpoint.linears), bits_per_weight(checkpoint))


def find_config(recipe: str) -> dict[str, Any]:
    """ModelOpt's configuration of that name. Raises ModelOptExtError when ModelOpt is missing or does not know it."""
    with warnings.catch_warnings():
        # Said on every import; what was tested is in this package's requirements.
        warnings.filterwarnings("ignore", message="transformers .* is not tested")
        try:
            import modelopt.torch.quantization as mtq
        except ImportError as error:
            raise ModelOptExtError.at(
                "modelopt", "import", "NVIDIA ModelOpt (pip install 'sglang-modelopt-ext[quantize]')", error
            ) from error
    for suffix in _CONFIG_SUFFIXES:
        if recipe.upper() + suffix in mtq.config.choices:
            config: dict[str, Any] = getattr(mtq, recipe.upper() + suffix)
            return config
    raise ModelOptExtError.at("--recipe", recipe, f"one of {', '.join(sorted(mtq.config.choices))}", "no such name")


def _check_folders(model: Path, output: Path, overwrite: bool) -> None:
    if not (model / "config.json").is_file():
        raise ModelOptExtError.at(model, "config.json", "a folder with a Hugging Face model", "no such file")
    if output.resolve() == model.resolve() or output.resolve() in model.resolve().parents:
        raise ModelOptExtError.at(output, "output", "another folder than the model's", "that one")
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise ModelOptExtError.at(output, "output", "a folder that does not exist, or overwrite", "an existing one")
    # Never delete a folder that holds something else.
    if not output.is_dir() or (any(output.iterdir()) and not (output / "config.json").is_file()):
        raise ModelOptExtError.at(output, "output", "an old checkpoint to overwrite", "something else")


def _run_modelopt(
    folder: Path,
    recipe: str,
    config: dict[str, Any],
    windows: Sequence[Sequence[int]],
    scratch: Path,
    device: str | None,
    progress: bool,
) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    messages: Any = transformers_logging
    messages.disable_progress_bar()
    messages.set_verbosity_error()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    calibrated = False

    def calibrate(model: torch.nn.Module) -> None:
        nonlocal calibrated
        calibrated = True
        for ids in tqdm(windows, desc="calibrating", unit="window", dynamic_ncols=True, disable=not progress):
            model(torch.tensor([list(ids)], device=device), use_cache=False)

    try:
        with ticking("loading the model", progress):
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
            model.to(device).eval()
        simulated = modelopt_cpu.install(device)
        with torch.no_grad():
            mtq.quantize(model, config, calibrate)
        rounds_activations = _rounds_activations(model)
        if progress and not calibrated:
            tqdm.write(f"{recipe} needs no calibration: nothing was run on the text", file=sys.stderr)
        with ticking("exporting", progress), torch.no_grad():
            export_hf_checkpoint(model, export_dir=scratch)
        simulation = modelopt_cpu.NAME if simulated else "cuda"
        _record(
            scratch / QUANT_CONFIG_NAME,
            {"recipe": recipe, "simulation": simulation, ROUNDS_ACTIVATIONS: rounds_activations},
        )
    except Exception as error:  # ModelOpt fails with assertions and errors of every kind
        raise ModelOptExtError.at(
            folder, recipe, "ModelOpt to quantize and export it", f"{type(error).__name__}: {error}"
        ) from error


def _rounds_activations(model: torch.nn.Module) -> bool:
    """Whether any linear layer's input is rounded; to be asked before the export, which takes quantizers away."""
    inputs = [module for name, module in model.named_modules() if name.endswith(".input_quantizer")]
    return any(bool(getattr(module, "is_enabled", False)) for module in inputs)


def _record(file: Path, facts: dict[str, Any]) -> None:
    """Adds to hf_quant_config.json what ModelOpt's export loses, under a key that other tools ignore.

    ``simulation`` says how ModelOpt's CUDA-only quantizers were simulated while calibrating.
    """
    content = read_json_object(file)
    content[OWN_KEY] = {"version": __version__, **facts}
    file.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def _copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer's files as they are; loading and saving it could change them."""
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copy(file, target / file.name)


def _make_readable(folder: Path) -> None:
    """Gives the folder and its files the permissions of newly made ones; temporary ones are the owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for file in folder.rglob("*"):
        file.chmod((0o777 if file.is_dir() else 0o666) & ~mask)


def _move_into_place(scratch: Path, output: Path) -> None:
    if not os.path.lexists(output):
        scratch.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}-old-", dir=output.parent)) / output.name
    output.rename(old)
    try:
        scratch.rename(output)
    except OSError:
        old.rename(output)
        raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_modelopt_ext.workflow.quantize",
        description="Quantize a Hugging Face model with NVIDIA ModelOpt and check what it exported.",
    )
    parser.add_argument("model", type=Path, help="folder of the unquantized model")
    parser.add_argument("--recipe", required=True, help="a ModelOpt configuration, such as W4A8_NVFP4_FP8")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="calibration text, one document a file")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--window", type=int, default=512, help="tokens in a calibration window (default: 512)")
    parser.add_argument("--max-windows", type=int, default=64, help="windows to run (default: 64)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is a GPU)")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint in --output")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parse_args(argv)
    try:
        texts = [_read_text(file) for file in args.text]
        done = quantize(
            args.model,
            args.recipe,
            args.output,
            texts,
            window=args.window,
            max_windows=args.max_windows,
            device=args.device,
            overwrite=args.overwrite,
        )
    except ModelOptExtError as error:
        print(error.one_line(), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"{done.folder}: {done.algo}, {done.linears} linear layers, {done.bits_per_weight:.2f} bits per weight")
    return 0


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelOptExtError.at(file, "--text", "a readable UTF-8 file", error) from error


if __name__ == "__main__":
    sys.exit(main())
