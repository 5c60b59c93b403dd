"""Quantization at load: under a flag of this package an unquantized model is quantized before anything starts, and that is served.

SGLang's own steps of argument resolution replace ``model_path`` in the same way (GGUF and ModelScope models). Every process then
sees the path of a quantized checkpoint, so that nothing else has to know how it was made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang_modelopt_ext.checkpoint.hub import CODE_FILES, HUB_FILES
from sglang_modelopt_ext.checkpoint.quant_config import CONFIG_NAME, QUANT_CONFIG_NAME, quantization_sections
from sglang_modelopt_ext.checkpoint.tensors import read_json_object
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.env import ONLINE_CACHE
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.online.convert import convert
from sglang_modelopt_ext.online.recipe import ONLINE_FLAGS, recipe_for


def is_asked_for(folder: Path, flag: str | None) -> bool:
    """Return whether ``--quantization flag`` quantizes the model in ``folder``: it names a recipe, and nothing is quantized."""
    if flag not in ONLINE_FLAGS or (folder / QUANT_CONFIG_NAME).exists() or not (folder / CONFIG_NAME).is_file():
        return False
    return not quantization_sections(read_json_object(folder / CONFIG_NAME))


def quantize(server_args: Any, flag: str, device: Device) -> Path:
    """Quantize the model that is to be served, unless that was done before, and serve the result in its place.

    It keeps the name by which clients ask for it, and its tokenizer. Weights are rounded on ``device``, that of the server.

    Returns:
        The folder of the quantized checkpoint.

    Raises:
        ModelOptExtError: the model cannot be quantized.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    args = resolving_view(server_args)
    source = _downloaded(args)
    cache = Path(ONLINE_CACHE.read()).expanduser()
    gpu = args.base_gpu_id if device.kind == "cuda" else None
    made = convert(source, recipe_for(flag), cache, args.trust_remote_code, gpu=gpu)
    names = {
        "served_model_name": args.served_model_name or args.model_path,
        "tokenizer_path": args.tokenizer_path or args.model_path,
    }
    declare_resolution(server_args, "modelopt_ext", model_path=str(made.folder), **names)
    return made.folder


def _downloaded(args: Any) -> Path:
    """Return the folder with the model's files, after downloading those of a hub model."""
    if Path(args.model_path).is_dir():
        return Path(args.model_path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = [*HUB_FILES, *(CODE_FILES if args.trust_remote_code else ())]
    try:
        found = snapshot_download(
            args.model_path, revision=args.revision, cache_dir=args.download_dir, allow_patterns=patterns
        )
    except (OSError, HFValidationError, ValueError) as error:
        expected = "a folder or a model on the Hugging Face Hub"
        raise ModelOptExtError.at("command line", f"--model-path {args.model_path}", expected, error) from error
    return Path(found)
