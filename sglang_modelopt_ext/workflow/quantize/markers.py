"""The marker that ModelOpt 0.47 leaves behind names in an export's configuration, taken off.

ModelOpt puts it behind a module's name while it renames it (``quant_aware_conversion.py``), and fails to take it off where the
renaming changed the marker too: with transformers 5.19 in every export of Nemotron-H.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_modelopt_ext.errors import ModelOptExtError

MARKER = re.compile(r"\.\x00.*?(\.?\*)?$", re.DOTALL)
"""The rest of a marker behind a name. A wildcard behind it belongs to the name."""

LISTED = "quantized_layers"
_EXCLUSIONS = ("exclude_modules", "ignore")


def without_markers(section: Mapping[str, Any], file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a quantization section without markers, and the names that had one with what they became.

    Args:
        section: of ``config.json`` or ``hf_quant_config.json``.
        file: the file that an error names.

    Raises:
        ModelOptExtError: two entries that differ become one.
    """
    names: dict[str, str] = {}
    cleaned = dict(section)
    for key in _EXCLUSIONS:
        if isinstance(section.get(key), list):
            cleaned[key] = _clean_list(section[key], names)
    if isinstance(section.get(LISTED), dict):
        layers: dict[str, Any] = {}
        for name, entry in section[LISTED].items():
            if layers.setdefault(_clean(name, names), entry) != entry:
                raise ModelOptExtError.at(
                    file, name, "one entry for a layer, without the marker behind its name", "two that differ"
                )
        cleaned[LISTED] = layers
    groups = section.get("config_groups")
    if isinstance(groups, dict):
        cleaned["config_groups"] = {
            name: {**group, "targets": _clean_list(group["targets"], names)}
            if isinstance(group, dict) and isinstance(group.get("targets"), list)
            else group
            for name, group in groups.items()
        }
    return cleaned, names


def _clean(name: Any, names: dict[str, str]) -> Any:
    """Return a name without the marker, and note it in ``names`` where it had one."""
    if not isinstance(name, str) or "\x00" not in name:
        return name
    return names.setdefault(name, MARKER.sub(r"\1", name))


def _clean_list(entries: list[Any], names: dict[str, str]) -> list[Any]:
    cleaned = [_clean(entry, names) for entry in entries]
    return list(dict.fromkeys(cleaned)) if names and all(isinstance(entry, str) for entry in cleaned) else cleaned
