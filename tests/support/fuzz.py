"""Random damage to the files of a checkpoint: their JSON, their bytes, the headers of safetensors files. A seed repeats it."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**64), 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *(
        "",
        "0",
        "x" * 5000,
        "\x00",
        "a\nb",
        "\ud800",
        "\u202e",
        "../../etc/passwd",
        "/dev/zero",
        "*",
        "[",
        "model.layers.0",
    ),
    *("FP8", "NVFP4", "W4A8_AWQ", "MIXED_PRECISION", "F8_E4M3", "F4", "modelopt", [], {}, [None], [[]], {"": None}),
    *([0] * 1000, ["*[a-z]*?" * 20], {"quant_algo": "FP8"}, {"a": {"b": {"c": []}}}),
)
"""Values that take the place of others: of every JSON type, at the edges of number types, and names that mean something."""

DEEP = 200_000
"""Nested brackets: more than any parser's recursion."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside a JSON value, without its own."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*path, key)
        yield from places(entry, (*path, key))


def damaged(content: Any, generator: random.Random) -> Any:
    """Return a copy of a JSON value with one to three entries replaced, removed, renamed or exchanged."""
    content = copy.deepcopy(content)
    for _ in range(generator.randint(1, 3)):
        known = list(places(content))
        if not known:
            return generator.choice(VALUES)
        path = generator.choice(known)
        holder = content
        for key in path[:-1]:
            holder = holder[key]
        kind = generator.random()
        if kind < 0.6:
            holder[path[-1]] = copy.deepcopy(generator.choice(VALUES))
        elif kind < 0.75:
            del holder[path[-1]]
        elif kind < 0.9 and isinstance(holder, dict):
            name = generator.choice([value for value in VALUES if isinstance(value, str)])
            holder[name] = holder.pop(path[-1])
        else:
            other = generator.choice(known)
            value: Any = content
            for key in other:
                if not isinstance(value, (dict, list)):
                    break
                try:
                    value = value[key]
                except (KeyError, IndexError):
                    break
            holder[path[-1]] = copy.deepcopy(value)
    return content


def damaged_bytes(content: bytes, generator: random.Random) -> bytes:
    """Return bytes with a few changed, a part cut out, the end cut off, or something else in their place."""
    kind = generator.randrange(7)
    if kind == 0:
        return content[: generator.randrange(len(content) + 1)]
    if kind == 1:
        first, end = sorted(generator.randrange(len(content) + 1) for _ in range(2))
        return content[:first] + content[end:]
    if kind == 2:
        return generator.randbytes(generator.randrange(200))
    if kind == 3:
        nested = b"[" * 900 + b"]" * 900
        return generator.choice(
            (b"[" * DEEP, b'{"a":' * DEEP, content.replace(b": ", b": [" + nested + b'], "x": ', 1))
        )
    if kind == 4:
        return b'{"quant_algo": ' + b"9" * 10_000 + b"}"
    if kind == 5:
        return b"\xef\xbb\xbf" + content
    changed = bytearray(content)
    for _ in range(generator.randint(1, 8)):
        if changed:
            changed[generator.randrange(len(changed))] = generator.randrange(256)
    return bytes(changed)


def encode(content: Any) -> bytes:
    """Return JSON that may hold what JSON must not: NaN and single surrogates."""
    return json.dumps(content).encode("utf-8")


def damaged_values(content: bytes, generator: random.Random) -> bytes | None:
    """Return JSON with damaged values, None where the content is no JSON any more."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return encode(damaged(value, generator))


def damage_json(file: Path, generator: random.Random) -> None:
    """Damage a JSON file: mostly its values, at times its bytes."""
    content = file.read_bytes()
    changed = damaged_values(content, generator) if generator.random() < 0.75 else None
    file.write_bytes(damaged_bytes(content, generator) if changed is None else changed)


def damage_safetensors(file: Path, generator: random.Random) -> None:
    """Damage a safetensors file: the values of its header, the header's length, or bytes anywhere."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size], content[8 + size :]
    kind = generator.random()
    changed = damaged_values(header, generator) if kind < 0.6 else None
    if changed is not None:
        header = changed + b" " * (-len(changed) % 8)
        content = len(header).to_bytes(8, "little") + header + data
    elif kind < 0.8:
        length = generator.choice((0, 1, size - 1, size + 1, len(content), 2**31, 2**40, 2**63, 2**64 - 1))
        content = (length % 2**64).to_bytes(8, "little") + header + data
    elif kind < 0.9:
        content = content[:8] + damaged_bytes(header, generator) + data
    else:
        content = damaged_bytes(content, generator)
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path, random.Random], None]] = {
    "config.json": damage_json,
    "hf_quant_config.json": damage_json,
    "model.safetensors.index.json": damage_json,
    ".safetensors": damage_safetensors,
}
"""By the end of a file's name."""


def damage(folder: Path, generator: random.Random) -> str:
    """Damage one file of a checkpoint; return its name."""
    files = [file for file in sorted(folder.iterdir()) if any(file.name.endswith(end) for end in DAMAGE)]
    file = generator.choice(files)
    if file.suffix == ".json" and generator.random() < 0.02:
        file.unlink()
        return f"{file.name} (removed)"
    next(change for end, change in DAMAGE.items() if file.name.endswith(end))(file, generator)
    return file.name
