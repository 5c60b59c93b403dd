"""SGLang's model classes, parsed from their sources: the layers they fuse, and the names they give quantization.

Parsed, not imported: some need packages for a GPU.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from sglang_modelopt_ext.checkpoint.names import FUSED_SHARDS

_PACKAGE = "sglang.srt.models"
_BUILDING_BLOCKS = ("MLP", "Attention", "DecoderLayer", "Model", "ForCausalLM")
"""Parts of the names of classes that models build layers from, often another model's."""

_LANGUAGE_MODELS = ("ForCausalLM", "ForConditionalGeneration")
"""Ends of the names of the architectures that are listed."""


@dataclass
class _Module:
    fused: frozenset[str]
    renames_block_scales: bool
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)
    entries: list[str] = field(default_factory=list)


@functools.cache
def _modules() -> dict[str, _Module]:
    spec = find_spec("sglang")
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0]) / "srt" / "models"
    found = {}
    for path in sorted(root.rglob("*.py")):
        name = ".".join((_PACKAGE, *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
        found[name] = _parse(path.read_text(encoding="utf-8"))
    return found


def _parse(source: str) -> _Module:
    module = _Module(
        frozenset(fused for fused in FUSED_SHARDS if f"self.{fused} =" in source),
        any(f'{dot}weight_scale") + "{dot}weight_scale_inv"' in source for dot in ("", ".")),
    )
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            module.classes[node.name] = node
        elif isinstance(node, ast.ImportFrom) and node.module:
            module.imports |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "EntryClass":
            values = node.value.elts if isinstance(node.value, ast.List | ast.Tuple) else [node.value]
            module.entries = [value.id for value in values if isinstance(value, ast.Name)]
    return module


def _ancestry(module: str, name: str) -> Iterator[tuple[str, ast.ClassDef]]:
    """Yield a class and its bases, each with the module it is in, in the order of attribute look-up (near enough)."""
    found = _modules().get(module)
    if found is None:
        return
    node = found.classes.get(name)
    if node is None:
        if name in found.imports:
            yield from _ancestry(*found.imports[name])
        return
    yield module, node
    for base in node.bases:
        if isinstance(base, ast.Name):
            yield from _ancestry(module, base.id)


def _mapping(module: str, name: str) -> dict[str, list[str]]:
    """Return a class's ``packed_modules_mapping``, empty without one."""
    for home, node in _ancestry(module, name):
        for statement in node.body:
            if (
                isinstance(statement, ast.Assign)
                and getattr(statement.targets[0], "id", "") == "packed_modules_mapping"
            ):
                return _value(home, statement.value)
    return {}


def _value(home: str, value: ast.expr) -> dict[str, list[str]]:
    """Evaluate a mapping; an entry that the source does not spell out maps everything."""
    if isinstance(value, ast.Dict):
        found: dict[str, list[str]] = {}
        for key, parts in zip(value.keys, value.values, strict=True):
            found |= _value(home, parts) if key is None else {ast.literal_eval(key): ast.literal_eval(parts)}
        return found
    if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name):
        return _mapping(home, value.value.id)
    return {fused: list(shards) for fused, shards in FUSED_SHARDS.items()}


def _sources(module: str, name: str) -> set[str]:
    """Return the modules whose code builds the layers of a class."""
    wanted = {home for home, _ in _ancestry(module, name)}
    while True:
        borrowed = {
            other
            for home in wanted
            for symbol, (other, original) in _modules()[home].imports.items()
            if other in _modules() and any(part in symbol + original for part in _BUILDING_BLOCKS)
        }
        if borrowed <= wanted:
            return wanted
        wanted |= borrowed


def unmapped_layers() -> dict[str, frozenset[str]]:
    """Return by architecture the fused layers whose shards its class does not map; none that map all they fuse."""
    result = {}
    for module, parsed in _modules().items():
        for name in parsed.entries:
            if not name.endswith(_LANGUAGE_MODELS):
                continue
            fused = frozenset().union(*(_modules()[home].fused for home in _sources(module, name)))
            # Some map the fused layer to pairs of a name and a number, which SGLang's configuration of a mix cannot read.
            mapped = {shard for shards in _mapping(module, name).values() for shard in shards}
            missing = frozenset(layer for layer in fused if not set(FUSED_SHARDS[layer]) <= mapped)
            if missing:
                result[name] = missing
    return result


def models_that_rename_block_scales() -> frozenset[str]:
    """Return the architectures whose own loader maps ``weight_scale`` to ``weight_scale_inv``."""
    loaders = {"sglang.srt.models.deepseek_common.deepseek_weight_loader"}
    homes = loaders | {module for module, parsed in _modules().items() if parsed.renames_block_scales}
    return frozenset(
        name
        for module, parsed in _modules().items()
        for name in parsed.entries
        if name.endswith(_LANGUAGE_MODELS) and homes & {home for home, _ in _ancestry(module, name)}
    )
