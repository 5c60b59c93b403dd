"""Training of the small Python-source language model in this folder, from tokenizer to checkpoint.

Everything is derived from the running interpreter's standard library and a seed; run it with

    python examples/stdlib_lm/train.py
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from corpus import collect, digest, split, write_heldout
from scoring import BOS, EOS, encode, heldout_windows, mean_loss
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

HERE = Path(__file__).resolve().parent
VOCABULARY = 2048
LOG_EVERY = 50


COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}
"""Settings that all architectures share."""


def llama_config(bos: int, eos: int) -> PreTrainedConfig:
    """Return a small Llama with grouped-query attention and a query width unlike the hidden width."""
    return LlamaConfig(
        intermediate_size=1024,
        bos_token_id=bos,
        eos_token_id=eos,
        **COMMON,
    )


def qwen3_moe_config(bos: int, eos: int) -> PreTrainedConfig:
    """Return a mixture of eight experts of which each token takes two, with as many parameters as the Llama."""
    return Qwen3MoeConfig(
        moe_intermediate_size=128,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        bos_token_id=bos,
        eos_token_id=eos,
        **COMMON,
        experts_implementation="eager",  # the others have no deterministic kernels
    )


ARCHITECTURES: dict[str, Callable[[int, int], PreTrainedConfig]] = {
    "llama": llama_config,
    "qwen3_moe": qwen3_moe_config,
}


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer that puts the begin token in front, like in every training window."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def training_batches(
    documents: list[list[int]], bos: int, context: int, size: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield endless shuffled batches of non-overlapping windows over the packed documents.

    Every epoch cuts the stream at another phase, so window borders fall elsewhere each time. A window's
    input begins with the begin token even in the middle of a document: the tokenizer always adds it, and
    held-out windows are scored that way too.
    """
    stream = torch.tensor([token for document in documents for token in (bos, *document)])
    rng = np.random.default_rng(seed)
    starts: list[int] = []
    while True:
        while len(starts) < size:
            epoch = np.arange(rng.integers(context), len(stream) - context + 1, context)
            starts.extend(rng.permutation(epoch).tolist())
        chosen, starts = starts[:size], starts[size:]
        targets = torch.stack([stream[start : start + context] for start in chosen])
        inputs = torch.cat([torch.full((size, 1), bos), targets[:, :-1]], dim=1)
        yield inputs, targets


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Return the factor of the learning rate: linear warmup, then a cosine down to a tenth of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: PreTrainedModel, rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW with weight decay for matrices only, not for norm weights."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def fit(
    model: PreTrainedModel,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    heldout_loss: Callable[[], float],
    args: argparse.Namespace,
) -> list[dict[str, float]]:
    """Run the optimisation and return the loss curve."""
    # Compiling fuses the elementwise work, about a quarter of a step here; it needs a C++ compiler.
    forward = torch.compile(model) if args.compile else model
    optimizer = make_optimizer(model, args.learning_rate, args.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, args.steps, args.warmup)
    )
    curve: list[dict[str, float]] = []
    recent: list[float] = []
    model.train()
    with tqdm(range(1, args.steps + 1), unit="step", dynamic_ncols=True) as progress:
        for step in progress:
            inputs, targets = (tensor.to(args.device) for tensor in next(batches))
            # Autocast keeps the weights and the optimizer in fp32; the matrix products run in bf16, which
            # is the faster of the two wherever the processor has bf16 instructions.
            with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.bf16):
                logits = forward(input_ids=inputs, use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            recent.append(loss.item())
            rate = progress.format_dict["rate"] or 0.0
            progress.set_postfix(loss=f"{recent[-1]:.3f}", tok_s=f"{rate * inputs.numel():.0f}", refresh=False)
            if step % LOG_EVERY == 0 or step == args.steps:
                point = {"step": step, "train_loss": round(sum(recent) / len(recent), 4)}
                recent.clear()
                if step % args.eval_every == 0 or step == args.steps:
                    model.eval()
                    point["heldout_loss"] = round(heldout_loss(), 4)
                    model.train()
                curve.append(point)
                progress.write(json.dumps(point))
    model.eval()
    return curve


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer files under the class name that every transformers release can load."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    ).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def save_model(model: PreTrainedModel, bos: int, eos: int, folder: Path) -> None:
    """Write the checkpoint in bf16, with greedy decoding as the default."""
    model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=eos, do_sample=False)
    model.to("cpu", torch.bfloat16).save_pretrained(folder)


def sample(folder: Path, prompt: str) -> str:
    """Return a greedy continuation by the saved checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokens = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=64, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def parse_args() -> argparse.Namespace:
    """Parse the command line; except for the device, the defaults are those of the shipped model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--stdlib", type=Path, default=None, help="standard library to train on (default: this interpreter's)"
    )
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), default="llama")
    parser.add_argument("--out", type=Path, default=HERE / "model", help="folder for the checkpoint")
    parser.add_argument("--heldout", type=Path, default=HERE / "heldout.txt", help="held-out text to write")
    parser.add_argument("--log", type=Path, default=HERE / "training_log.json", help="training record to write")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--context", type=int, default=512, help="tokens per window")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear warmup")
    parser.add_argument("--eval-every", type=int, default=1100, help="steps between held-out scores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bf16 autocast")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile")
    return parser.parse_args()


def main() -> None:
    """Build the corpus, the tokenizer and the model, and write all of them with a record of the run."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)

    parts = split(collect(args.stdlib))
    write_heldout(parts.heldout, args.heldout)
    tokenizer = train_tokenizer([d.text for d in parts.train])
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    save_tokenizer(tokenizer, args.out)
    documents = encode(tokenizer, parts.train)
    corpus_tokens = sum(len(document) + 1 for document in documents)
    windows = heldout_windows(encode(tokenizer, parts.heldout), args.context)

    model = AutoModelForCausalLM.from_config(ARCHITECTURES[args.arch](bos, eos), dtype=torch.float32).to(args.device)
    print(f"{len(parts.train)} training files, {corpus_tokens} tokens; {len(parts.heldout)} held-out files")
    print(f"{sum(p.numel() for p in model.parameters())} parameters")

    batches = training_batches(documents, bos, args.context, args.batch, args.seed)
    begin = time.perf_counter()
    curve = fit(model, batches, lambda: mean_loss(model, windows, bos, args.context), args)
    wall = time.perf_counter() - begin
    save_model(model, bos, eos, args.out)

    record = {
        "arch": args.arch,
        "parameters": sum(p.numel() for p in model.parameters()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} CPU threads",
        "train_sha256": digest(parts.train),
        "train_files": len(parts.train),
        "train_bytes": sum(len(d.text.encode()) for d in parts.train),
        "train_tokens": corpus_tokens,
        "heldout_files": len(parts.heldout),
        "heldout_tokens": sum(len(window) for window in windows),
        "heldout_max_12gram_overlap": round(parts.max_overlap, 4),
        "seed": args.seed,
        "threads": args.threads,
        "bf16_autocast": args.bf16,
        "compiled": args.compile,
        "steps": args.steps,
        "batch": args.batch,
        "context": args.context,
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
        "warmup": args.warmup,
        "tokens_seen": args.steps * args.batch * args.context,
        "wall_seconds": round(wall, 1),
        "curve": curve,
    }
    args.log.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"trained {record['tokens_seen']} tokens in {wall:.1f} s; last train loss {curve[-1]['train_loss']}")
    print(sample(args.out, "def read_lines(path):\n"))


if __name__ == "__main__":
    main()
