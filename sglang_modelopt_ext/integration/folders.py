"""Where a model's files are: a local folder, or the cache of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sglang_modelopt_ext.checkpoint.quant_config import CONFIG_NAME, QUANT_CONFIG_NAME
from sglang_modelopt_ext.checkpoint.tensors import INDEX_NAME

if TYPE_CHECKING:
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig


def config_folder(model_path: str, revision: str | None) -> Path | None:
    """The local folder with the checkpoint's configuration files, downloading just those of a hub model.

    The index of its weights comes along: the names of the tensors tell recipes apart that the configuration calls the same.

    Returns None when ``model_path`` is neither a folder nor a hub model that can be reached; SGLang then reports that itself.
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
    """The local folder with the checkpoint's tensors once SGLang has downloaded them, without asking the hub again.

    Args:
        model_path: a folder, or a model on the hub.
        revision: of a model on the hub.
        download_dir: where SGLang was told to download to; the hub's own cache otherwise.

    Returns:
        None where there are none (yet).
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
    """The local folder with the checkpoint's tensors; a hub model is downloaded by SGLang's own loader first."""
    if Path(model_config.model_path).is_dir():
        return Path(model_config.model_path)
    from sglang.srt.model_loader.loader import DefaultModelLoader

    folder, _, _ = DefaultModelLoader(load_config)._prepare_weights(
        model_config.model_path, model_config.revision, fall_back_to_pt=False
    )
    return Path(folder)
