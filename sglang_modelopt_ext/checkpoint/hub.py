"""Models on the Hugging Face Hub: which of their files are used, and the names of their tensors before these are downloaded."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from collections.abc import Collection
from pathlib import Path
from urllib.parse import quote

from sglang_modelopt_ext.env import ERROR_FILE

logger = logging.getLogger(__name__)

HUB_FILES = ("*.safetensors", "*.json", "tokenizer*", "merges.txt", "*.tiktoken", "chat_template*")
"""Patterns of the files of an unquantized model: weights, configuration and tokenizer."""

CODE_FILES = ("*.py",)
"""Patterns of the model's own code, which runs with ``--trust-remote-code`` only."""

SINGLE_FILE = "model.safetensors"
"""The file of a checkpoint without an index."""


def hub_model(folder: Path) -> tuple[str, str] | None:
    """Return the name and the revision of the hub model whose files ``folder`` of the hub's cache has; None for another folder."""
    kind, _, name = folder.parent.parent.name.partition("--")
    if folder.parent.name != "snapshots" or kind != "models" or not name:
        return None
    return name.replace("--", "/", 1), folder.name


@functools.lru_cache(maxsize=8)
def hub_tensor_names(name: str, revision: str) -> Collection[str]:
    """Return the names of the tensors of a hub model of one file, by its header.

    All processes of a server have one answer, the first that any of them got, good or bad: a request that fails in one process
    must not make it decide otherwise than another. Arguments and result are those of :func:`ask_hub`.
    """
    channel = ERROR_FILE.read()
    if not channel:
        return ask_hub(name, revision)
    file = Path(channel).with_name(f"hub-{quote(name, safe='')}-{revision}.json")
    if not file.exists():
        own = file.with_suffix(f".{os.getpid()}")
        own.write_text(json.dumps(sorted(ask_hub(name, revision))), encoding="utf-8")
        with contextlib.suppress(FileExistsError):  # another process was faster: its answer counts
            os.link(own, file)
        own.unlink()
    return frozenset(json.loads(file.read_text(encoding="utf-8")))


def ask_hub(name: str, revision: str) -> Collection[str]:
    """Ask the hub for the header of a model's only file: one request of 100 kB.

    Args:
        name: of the model, such as ``nvidia/Llama-3.1-8B-Instruct-FP8``.
        revision: the commit.

    Returns:
        The names of its tensors; empty where the hub is not asked (offline), does not answer, or has no such file.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return ()
    try:
        header = HfApi().parse_safetensors_file_metadata(name, SINGLE_FILE, revision=revision)
    except Exception as error:  # of any of its libraries: without an answer only the configuration is known, as offline
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.warning("modelopt_ext: the tensors of %s are not known before its download: %s", name, reason)
        return ()
    return header.tensors.keys()
