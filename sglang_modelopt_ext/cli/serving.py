"""What the subcommands that ask servers have in common: their arguments, texts and logs."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_modelopt_ext.checkpoint.quant_config import text_config
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.common.text import begin_token, builtin_texts, encode, split_windows, spread
from sglang_modelopt_ext.workflow.quantize.calibration import read_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def add_server_arguments(parser: argparse.ArgumentParser, positional: str) -> None:
    """How the servers are started; ``positional`` is what the usage calls the subcommand's own arguments."""
    parser.usage = f"%(prog)s {positional} [options] [-- arguments of the server]"
    group = parser.add_argument_group("the server")
    group.add_argument("--quantization", help="--quantization of the server (default: the checkpoint decides)")
    group.add_argument("--dtype", default="auto", help="--dtype of the server (default: auto)")
    group.add_argument("--kv-cache-dtype", default="auto", help="--kv-cache-dtype of the server (default: auto)")
    group.add_argument(
        "--log",
        type=Path,
        help="file for the server's output; every server replaces it (default: a temporary file, kept on failure)",
    )


def server_arguments(args: argparse.Namespace) -> list[str]:
    """The same as SGLang's command line has them, but ``--quantization``, and what stands behind ``--``."""
    return ["--dtype", args.dtype, "--kv-cache-dtype", args.kv_cache_dtype, *args.rest]


def add_text_arguments(parser: argparse.ArgumentParser, samples: int, length: int, default: str) -> None:
    """Which text is scored."""
    group = parser.add_argument_group("the text")
    group.add_argument(
        "--data", nargs="+", metavar="FILE", help=f".txt, .jsonl or .parquet files, or a data set (default: {default})"
    )
    group.add_argument(
        "--samples", type=int, default=samples, help=f"windows of the text to score (default: {samples})"
    )
    group.add_argument("--sequence-length", type=int, default=length, help=f"tokens in a window (default: {length})")


def text_windows(args: argparse.Namespace, folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The windows, evenly spread over the text. Raises ModelOptExtError when there are none, or the model takes none so long."""
    for name in ("samples", "sequence_length"):
        if getattr(args, name) < 1:
            raise ModelOptExtError.at("command line", f"--{name.replace('_', '-')}", "1 or more", getattr(args, name))
    longest = text_config(folder).get("max_position_embeddings")
    if longest is not None and args.sequence_length >= longest:
        raise ModelOptExtError.at(
            "command line",
            "--sequence-length",
            f"less than the {longest} positions of {folder.name}",
            args.sequence_length,
        )
    texts: Sequence[str] = builtin_texts()
    if args.data:
        texts = [text for name in args.data for text in read_documents(name, tokenizer)]
    windows = split_windows(encode(tokenizer, texts), args.sequence_length, begin_token(tokenizer))
    if not windows:
        raise ModelOptExtError.at("command line", "--data", "text of two tokens or more", "none")
    return spread(windows, args.samples)


@contextlib.contextmanager
def log_files(log: Path | None) -> Iterator[Path]:
    """The file of a server's output: ``log``, or a temporary one that is removed when nothing went wrong."""
    if log is not None:
        yield log
        return
    folder = Path(tempfile.mkdtemp(prefix="sglang-modelopt-"))
    yield folder / "server.log"
    shutil.rmtree(folder, ignore_errors=True)
