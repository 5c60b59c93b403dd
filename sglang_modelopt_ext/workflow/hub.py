"""A model by its folder, or by its name on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from sglang_modelopt_ext.errors import ModelOptExtError

HUB_FILES = ("*.safetensors", "*.json", "tokenizer*", "merges.txt", "*.tiktoken", "chat_template*")
"""What is downloaded: never code, never a pickle."""


def find_model(name: str, flag: str) -> Path:
    """The model's folder: ``name`` itself where it is a folder, else the Hub's snapshot of that name.

    What is in the local Hub cache is taken from there, also without a network (``HF_HUB_OFFLINE=1``).

    Raises:
        ModelOptExtError: neither; ``flag`` is the argument it names.
    """
    if Path(name).is_dir():
        return Path(name).resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    expected = "a folder or a model on the Hugging Face Hub"
    # A path that is not there must not be looked up on the Hub, where names have one slash at most.
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelOptExtError.at("command line", f"{flag} {name}", expected, "no such folder")
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except (OSError, HFValidationError, ValueError) as error:
        raise ModelOptExtError.at("command line", f"{flag} {name}", expected, error) from error
