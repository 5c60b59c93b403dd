"""Names of modules: the wrappers around a decoder, the layers that SGLang fuses, and which names an exclusion pattern covers."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterable, Iterator, Sequence

FUSED_SHARDS: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""SGLang's fused linear layers, and the checkpoint's layers that each is made of, in order."""

EXPERT = re.compile(r"(?P<layer>.+\.experts)\.(?P<number>\d+)\.(?P<projection>\w+)")
"""The pattern of the name of one projection of one expert."""

EMBEDDINGS = frozenset({"embed_tokens", "embeddings", "word_embeddings", "wte"})
"""Names of token embeddings; SGLang supports a quantized one only in a mix, in NVFP4."""

HEAD = "lm_head"

_FUSED_NAMES = {shard: fused for fused, shards in FUSED_SHARDS.items() for shard in shards}
_NOT_NAMED = ("", "model", "language_model")
_WRAPPERS = ("model.", "model.language_model.", "language_model.model.")


def canonical_name(module: str) -> str:
    """Return a module's name without the wrappers around the decoder.

    One linear layer is ``model.layers.0.mlp.up_proj`` in a text model's checkpoint, ``model.language_model.layers...`` in a
    multimodal one and ``language_model.model.layers...`` in SGLang's module tree; a class that joins an empty prefix begins with a
    dot. Only leading parts are dropped.
    """
    parts = module.split(".")
    while len(parts) > 1 and parts[0] in _NOT_NAMED:
        parts.pop(0)
    return ".".join(parts)


def is_vocabulary(module: str) -> bool:
    """Return whether a module, by the last part of its name, is a token embedding or the head."""
    return module.rpartition(".")[2] in EMBEDDINGS | {HEAD}


class Exclusions:
    """Names of modules that are not quantized, as a list of patterns.

    They cover every module that SGLang's ModelOpt classes exclude (``is_layer_skipped`` and ``is_layer_excluded``), which is more
    than ModelOpt documents:

    - A pattern is a wildcard over a whole name or over one of its parts (``self_attn*``), or a run of whole parts anywhere in the
      name (``mlp.gate``, ``model.layers.1.``).
    - A pattern that covers a fused layer (``*self_attn.qkv_proj``) covers its shards.
    - Wrappers around the decoder are ignored.

    The patterns are compiled once, since a large checkpoint asks about tens of thousands of names.

    Args:
        patterns: ``exclude_modules`` or ``ignore`` of a checkpoint, up to a few hundred.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        patterns = [pattern.rstrip(".") for pattern in patterns]
        wildcards = [pattern for pattern in patterns if set("*?[") & set(pattern)]
        self._runs = frozenset(patterns) - set(wildcards)
        self._whole = _alternatives(wildcards)
        self._part = _alternatives([pattern for pattern in wildcards if "." not in pattern])
        wrapped = any("language_model" in pattern for pattern in patterns)
        self._wrappers = ("", *_WRAPPERS) if wrapped else ("", _WRAPPERS[0])

    def cover(self, module: str) -> bool:
        """Return whether ``module``, by its name in the checkpoint or in SGLang, is excluded."""
        return any(map(self._covers, self._spellings(module)))

    def _spellings(self, module: str) -> Iterator[str]:
        """Yield the spellings of ``module`` that a pattern may be written for: with each wrapper, and as its fused layer."""
        bare = canonical_name(module)
        parent, dot, last = bare.rpartition(".")
        fused = None if EXPERT.fullmatch(bare) else _FUSED_NAMES.get(last)
        for wrapper in self._wrappers:
            yield wrapper + bare
            if fused is not None:
                yield wrapper + parent + dot + fused

    def _covers(self, name: str) -> bool:
        parts = name.split(".")
        if self._runs and any(
            ".".join(parts[start:end]) in self._runs
            for start in range(len(parts))
            for end in range(start + 1, len(parts) + 1)
        ):
            return True
        if self._whole is not None and self._whole.match(name):
            return True
        return self._part is not None and any(map(self._part.match, parts))


def _alternatives(wildcards: Sequence[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(fnmatch.translate, wildcards))) if wildcards else None


def matches(pattern: str, module: str) -> bool:
    """Return whether one exclusion pattern covers ``module``, by the rules of :class:`Exclusions`."""
    return _one(pattern).cover(module)


@functools.lru_cache(maxsize=1024)
def _one(pattern: str) -> Exclusions:
    return Exclusions((pattern,))
