"""The unquantized model: found, loaded from safetensors only, and checked for NaN and infinity."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sglang_modelopt_ext.checkpoint.hub import CODE_FILES, HUB_FILES
from sglang_modelopt_ext.checkpoint.quant_config import CONFIG_NAME
from sglang_modelopt_ext.checkpoint.tensors import read_json_object, weight_files
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.common import modelopt_cpu


def find_model(name: str, trust_remote_code: bool = False) -> Path:
    """Return the model's folder, downloaded from the Hugging Face Hub when ``name`` is not a folder.

    Raises:
        ModelOptExtError: neither a folder with a model nor a name the Hub knows, or a model that is already quantized.
    """
    folder = Path(name)
    if not folder.exists():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

        patterns = [*HUB_FILES, *(CODE_FILES if trust_remote_code else ())]
        try:
            folder = Path(snapshot_download(name, allow_patterns=patterns))
        except (OSError, HFValidationError, ValueError) as error:
            raise ModelOptExtError.at("MODEL", name, "a folder or a model on the Hugging Face Hub", error) from error
    if not (folder / CONFIG_NAME).is_file():
        raise ModelOptExtError.at(folder, CONFIG_NAME, "a folder with a Hugging Face model", "no such file")
    if "quantization_config" in read_json_object(folder / CONFIG_NAME):
        raise ModelOptExtError.at(
            folder / CONFIG_NAME, "quantization_config", "an unquantized model", "a quantized one"
        )
    # Check here: transformers would fall back to pickled weights, or fail with a message of many lines.
    weight_files(folder)
    return folder


def import_modelopt() -> Any:
    """Return the module ``modelopt.torch.quantization``. Raises ModelOptExtError where ModelOpt is not installed."""
    with warnings.catch_warnings():
        # ModelOpt warns on every import; this package pins the version of transformers that was tested.
        warnings.filterwarnings("ignore", message="transformers .* is not tested")
        try:
            import modelopt.torch.quantization as mtq
        except ImportError as error:
            raise ModelOptExtError.at(
                "modelopt", "import", "NVIDIA ModelOpt (pip install 'sglang-modelopt-ext[quantize]')", error
            ) from error
    return mtq


ALL_GPUS = "auto"
"""The device that stands for all GPUs of the machine together, or for the CPU where there is none."""


def device_for(asked: str | None) -> str:
    """Return the device for one that was asked for, None for ``cuda``; without a GPU that and :data:`ALL_GPUS` are ``cpu``."""
    has_gpu = torch.cuda.is_available()
    if asked is None or (asked == ALL_GPUS and not has_gpu):
        return "cuda" if has_gpu else "cpu"
    return asked


def load_model(
    folder: Path, device: str | None = None, *, trust_remote_code: bool = False, progress: bool = True
) -> tuple[Any, str]:
    """Return the model in eval mode on ``device``, and how its quantizers are simulated there: ``cuda`` or ``cpu``.

    Pickled weights are never read. Where there is no GPU, torch versions of ModelOpt's CUDA-only functions are installed.

    Args:
        folder: the model's folder.
        device: a device of PyTorch, or :data:`ALL_GPUS`; None for CUDA where there is a GPU.
        trust_remote_code: run the model's own code.
        progress: show transformers' progress bar.

    Raises:
        ModelOptExtError: a model transformers cannot load, one larger than all GPUs together, or a weight that is NaN or
            infinite.
    """
    import_modelopt()
    from transformers.utils import logging as transformers_logging

    device = device_for(device)
    messages: Any = transformers_logging
    messages.set_verbosity_error()
    (messages.enable_progress_bar if progress else messages.disable_progress_bar)()
    try:
        model = _model_class(folder, trust_remote_code).from_pretrained(
            folder,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            device_map=device_map(device),
        )
        model.eval()
    except Exception as error:  # the many ways in which a model's configuration, code or files can be wrong
        raise ModelOptExtError.at(
            folder, "model", "one that transformers can load", f"{type(error).__name__}: {error}"[:300]
        ) from error
    if device == ALL_GPUS:
        check_on_gpus(model, folder)
    check_weights(model, folder)
    return model, modelopt_cpu.NAME if modelopt_cpu.install(model.device.type) else "cuda"


def device_map(device: str) -> str | dict[str, str] | None:
    """Return the argument of ``from_pretrained`` for a device: on GPUs a tensor goes straight from its file to its GPU.

    None for the CPU, where nothing needs accelerate.
    """
    if device == "cpu":
        return None
    return device if device == ALL_GPUS else {"": device}


def check_on_gpus(model: torch.nn.Module, where: object) -> None:
    """Raise ModelOptExtError where accelerate left a parameter to the CPU or to the disk.

    It would move such a one to a GPU for each call of its layer, where calibration and packing expect it to stay.
    """
    left = [name for name, parameter in model.named_parameters() if parameter.device.type != "cuda"]
    if left:
        expected = "room for all of its weights on the GPUs, or --device cpu"
        raise ModelOptExtError.at(where, "model", expected, f"none for {left[0]}" + (" and others" * (len(left) > 1)))


def _model_class(folder: Path, trust_remote_code: bool) -> Any:
    """Return the class that the model names: the automatic one takes a multimodal model's text part, and a classifier's body.

    A model with code of its own is the automatic one's, which runs that code or says that it is not trusted.
    """
    import transformers

    config = read_json_object(folder / CONFIG_NAME)
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    own = None if trust_remote_code or "auto_map" in config else getattr(transformers, str(first), None)
    return (
        own
        if isinstance(own, type) and issubclass(own, transformers.PreTrainedModel)
        else transformers.AutoModelForCausalLM
    )


def check_weights(model: torch.nn.Module, where: object) -> None:
    """Raise ModelOptExtError naming the first parameter that holds NaN or infinity, if any."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter.detach()).all()):
            raise ModelOptExtError.at(where, name, "finite weights", "NaN or infinity")


@contextlib.contextmanager
def activations_checked(model: torch.nn.Module, where: object) -> Iterator[None]:
    """Raise ModelOptExtError when an input or output of a linear layer is NaN or infinite while the block runs."""

    def hook(name: str) -> Any:
        def check(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            for what, tensor in (("input", inputs[0] if inputs else None), ("output", output)):
                if (
                    isinstance(tensor, torch.Tensor)
                    and tensor.is_floating_point()
                    and not tensor.is_meta
                    and not bool(torch.isfinite(tensor).all())
                ):
                    raise ModelOptExtError.at(where, f"{name}: {what}", "finite activations", "NaN or infinity")

        return check

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
