"""Fixtures of every test: tiny models and real ModelOpt exports of them, built on first use and kept.

The cache is ``.export-cache`` in the repository, or the folder in ``SGLANG_MODELOPT_EXT_EXPORT_CACHE``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.cache import one_thread
from tests.support.exports import DEFAULT, Variant, export
from tests.support.models import TinyModel, model_dir

Builder = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """Limit torch to one thread: no test is large enough for two, which suffer on a busy machine."""
    with one_thread():
        yield


@pytest.fixture(scope="session")
def tiny_model() -> Builder:
    """Return a factory, ``tiny_model("qwen2", tied=True)``: the folder of a :class:`tests.support.models.TinyModel`."""
    pytest.importorskip("transformers", reason="builds Hugging Face models")

    def build(family: str = "llama", **fields: Any) -> Path:
        return model_dir(TinyModel(family, **fields))  # type: ignore[arg-type]

    return build


@pytest.fixture(scope="session")
def tiny_export(tiny_model: Builder) -> Builder:
    """Return a factory, ``tiny_export("W4A8_NVFP4_FP8_CFG", "qwen2", tied=True)``: the folder of such a model's export."""
    pytest.importorskip("modelopt", reason="needs nvidia-modelopt to make exports")

    def make(recipe: str | Mapping[str, Any], family: str = "llama", variant: Variant = DEFAULT, **fields: Any) -> Path:
        return export(tiny_model(family, **fields), recipe, variant)

    return make
