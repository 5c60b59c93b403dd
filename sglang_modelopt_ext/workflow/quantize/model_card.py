"""The model card of a checkpoint: README.md, from the metadata in the folder."""

from __future__ import annotations

from pathlib import Path

from sglang_modelopt_ext.workflow.quantize.record import Record

CARD_NAME = "README.md"


def render_card(folder: Path, record: Record, size: int) -> str:
    """Return the model card.

    Args:
        folder: the final path of the checkpoint, for the launch command.
        record: its metadata.
        size: bytes of its safetensors files.
    """
    base = record.base_model
    lines = [
        "---",
        "library_name: sglang",
        "tags:",
        "- modelopt",
        "- quantized",
        # A path on a disk is not a name on the Hub.
        *([f"base_model: {base}"] if _is_hub_name(base) else []),
        "---",
        f"# {folder.name}",
        "",
        f"`{base}`, quantized with NVIDIA ModelOpt {record.versions['nvidia-modelopt']} through sglang-modelopt-ext "
        f"{record.version}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _rows(record, size)),
        "",
        "## Serve",
        "",
        "In an environment with `sglang` and `sglang-modelopt-ext`:",
        "",
        "```",
        f"python -m sglang.launch_server --model-path {folder}",
        "```",
        "",
        "The quantization and the KV cache are detected; no flag has to name them.",
        "",
        "## Quality",
        "",
        *_quality(record),
        "",
        "## How it was made",
        "",
        *_how(record),
        "",
        "Everything above is recorded in `hf_quant_config.json` under `sglang_modelopt_ext`.",
        "",
    ]
    return "\n".join(lines)


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith(("/", ".", "~"))


def _rows(record: Record, size: int) -> list[tuple[str, str]]:
    rows = [("base model", f"`{record.base_model}`"), ("recipe", f"`{record.recipe}`")]
    for group in record.formats:
        details = [f"blocks of {group.group_size}"] if group.group_size else []
        details += [f"activations {group.activation}"] if group.activation else []
        details += ["smoothed inputs"] if group.pre_quant_scale else []
        details += [f"low rank {group.low_rank}"] if group.low_rank else []
        rows.append((f"{len(group.layers)} linear layers", ", ".join([group.algo, *details])))
    if record.bits_per_weight is not None:
        rows.append(("bits per quantized weight", f"{record.bits_per_weight:.2f}, scales included"))
    rows.append(("KV cache", f"`{record.kv_cache_recipe}`" if record.kv_cache_recipe else "not quantized"))
    rows.append(("size of the weights", f"{size / 1e6:,.1f} MB"))
    return rows


def _quality(record: Record) -> list[str]:
    if not record.quality:
        return ["Not measured. `sglang-modelopt evaluate` and `sglang-modelopt verify` measure it."]
    return ["| | |", "|---|---|", *(f"| {name} | {value:.6g} |" for name, value in record.quality.items())]


def _how(record: Record) -> list[str]:
    methods = " then ".join(str(step.get("method")) for step in record.algorithm) or "none"
    lines = [f"- calibration algorithm: {methods}"]
    if (data := record.calibration) is not None:
        lines.append(
            f"- calibration data: {', '.join(f'`{name}`' for name in data.data)}; {data.samples} windows, "
            f"{data.tokens} tokens, seed {data.seed}, sha256 of the tokens `{data.sha256}`"
        )
    if record.simulation == "cpu":
        lines.append("- ModelOpt's CUDA-only quantizers were simulated in torch on a CPU")
    lines.append("- " + ", ".join(f"{package} {version}" for package, version in record.versions.items()))
    return lines
