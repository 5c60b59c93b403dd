"""Names of a hub model's tensors, before its weights are downloaded."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection
from pathlib import Path

logger = logging.getLogger(__name__)

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
        logger.info("modelopt_ext: the tensors of %s are not known before its download: %s", name, error)
        return ()
    return header.tensors.keys()
