"""Lookup of a model's folder and of the dtype SGLang serves it in."""

from __future__ import annotations

from pathlib import Path

import torch

from sglang_modelopt_ext.checkpoint.hub import HUB_FILES
from sglang_modelopt_ext.checkpoint.quant_config import text_config
from sglang_modelopt_ext.errors import ModelOptExtError

DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
    "float32": torch.float32,
    "float": torch.float32,
}
"""Values of SGLang's ``--dtype`` other than ``auto``."""


def find_folder(name: str, flag: str) -> Path:
    """Return a model's folder: ``name`` itself where it is a folder, else the Hub's snapshot of that name.

    Files in the local Hub cache are used without a network too (``HF_HUB_OFFLINE=1``).

    Raises:
        ModelOptExtError: ``name`` is neither; the message names the argument ``flag``.
    """
    if Path(name).is_dir():
        return Path(name).resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    expected = "a folder or a model on the Hugging Face Hub"
    # Do not look up a missing path on the Hub, where names have at most one slash.
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelOptExtError.at("command line", f"{flag} {name}", expected, "no such folder")
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except (OSError, HFValidationError, ValueError) as error:
        raise ModelOptExtError.at("command line", f"{flag} {name}", expected, error) from error


def served_dtype(folder: Path, flag: str) -> torch.dtype:
    """Return the dtype SGLang computes in under ``--dtype flag``.

    ``auto`` is the model's own dtype, but float16 (bfloat16 for Gemma) for a float32 model.
    """
    if flag != "auto":
        if flag not in DTYPES:
            raise ModelOptExtError.at("command line", "--dtype", f"auto or one of {', '.join(DTYPES)}", flag)
        return DTYPES[flag]
    fields = text_config(folder)
    declared = DTYPES.get(str(fields.get("dtype", fields.get("torch_dtype"))), torch.float32)
    if declared != torch.float32:
        return declared
    return torch.bfloat16 if str(fields.get("model_type")).startswith("gemma") else torch.float16
