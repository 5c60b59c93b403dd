"""Locations of a model's files: a local folder, or the cache of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sglang_modelopt_ext.checkpoint.quant_config import CONFIG_NAME, QUANT_CONFIG_NAME
from sglang_modelopt_ext.checkpoint.tensors import INDEX_NAME

if TYPE_CHECKING:
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig


def config_folder(model_path: str, revision: str | None) -> Path | None:
    """Return the local folder with the checkpoint's configuration files, after downloading only these of a hub model.

    The index of the weights is downloaded too: names of tensors tell recipes apart that have equal configurations.

    Returns:
        None when ``model_path`` is neither a folder nor a hub model that can be reached; SGLang then reports that itself.
    """
    if Path(model_path).is_dir():
        return Path(model_path)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    folder = None
    for name in (INDEX_NAME, CONFIG_NAME, QUANT_CONFIG_NAME):
        try:
            folder = Path(hf_hub_download(model_path, name, revision=revision)).parent
        except (EntryNotFoundError, HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError):
            continue
    return folder


def downloaded_folder(model_path: str, revision: str | None, download_dir: str | None) -> Path | None:
    """Return the local folder with the checkpoint's tensors, without asking the hub; None where they are not there (yet).

    Args:
        model_path: a folder, or the name of a model on the hub.
        revision: the revision of a hub model.
        download_dir: SGLang's ``--download-dir``, None for the hub's own cache.
    """
    if Path(model_path).is_dir():
        return Path(model_path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(model_path, revision=revision, cache_dir=download_dir, local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None
    return Path(found) if any(Path(found).glob("*.safetensors")) else None


def weights_folder(model_config: ModelConfig, load_config: LoadConfig) -> Path:
    """Return the local folder with the checkpoint's tensors, after SGLang's own loader has downloaded those of a hub model."""
    if Path(model_config.model_path).is_dir():
        return Path(model_config.model_path)
    from sglang.srt.model_loader.loader import DefaultModelLoader, RunaiModelStreamerLoader

    if str(getattr(load_config.load_format, "value", load_config.load_format)) == "runai_streamer":
        streamed: str = RunaiModelStreamerLoader(load_config)._prepare_weights(
            model_config.model_path, model_config.revision
        )[0]
        return Path(streamed)
    folder, _, _ = DefaultModelLoader(load_config)._prepare_weights(
        model_config.model_path, model_config.revision, fall_back_to_pt=False
    )
    return Path(folder)
