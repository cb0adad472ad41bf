"""Trains small language models from scratch: tokenizer, optimisers, schedule, held-out perplexity."""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from muon import Muon
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

BLOCK, BATCH_TOKENS = 512, 4096


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that every training script has."""
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60, help="training time, unless --steps is given")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=0.02, help="Muon's learning rate; AdamW's is a fifth of it")
    parser.add_argument("--device", default="cpu")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Reads the command line; nothing that exists is written over."""
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists: name a folder that does not")
    return args


def train_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        documents, vocab_size=vocabulary, special_tokens=["<s>", "</s>"], min_frequency=2, show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def tokenise(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Tensor:
    ids: list[int] = []
    for document in documents:
        ids += [tokenizer.bos_token_id, *tokenizer.backend_tokenizer.encode(document).ids, tokenizer.eos_token_id]
    return torch.tensor(ids)


def train(
    model: PreTrainedModel,
    stream: Tensor,
    *,
    minutes: float,
    steps: int | None,
    lr: float,
    autocast: bool | None = None,
) -> tuple[int, float]:
    """Trains on random blocks of ``stream[tokens]`` for so many minutes, or steps where given.

    Runs in bfloat16 where ``autocast`` says so; by default on CUDA, and on processors that multiply it (AVX-512 or AMX).
    Matrices are trained with Muon, the rest with AdamW at a fifth of its learning rate. The learning rate warms up over
    the first 2 %, holds, and falls linearly to zero over the last half.

    Returns:
        Steps taken (of ``BATCH_TOKENS`` each) and minutes spent.
    """
    device = model.device
    if autocast is None:
        autocast = device.type != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=lr, weight_decay=0.05, momentum=0.95),
        torch.optim.AdamW(others, lr=lr / 5, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    start, step, smoothed = time.monotonic(), 0, 0.0
    while (progress := step / steps if steps else (time.monotonic() - start) / (60 * minutes)) < 1:
        factor = min(progress / 0.02 + 0.01, 1.0, 2 * (1 - progress))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group.setdefault("peak", group["lr"])
        block = BLOCK // 2 if progress < 0.75 else BLOCK  # short blocks first: attention is dear on a CPU
        at = torch.randint(len(stream) - block, (BATCH_TOKENS // block,))
        batch = torch.stack([stream[i : i + block] for i in at]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        smoothed = 0.98 * smoothed + 0.02 * loss.item() if step else loss.item()
        step += 1
        if step % 100 == 0:
            rate = step * BATCH_TOKENS / (time.monotonic() - start)
            print(f"step {step}  {100 * progress:.1f} %  loss {smoothed:.3f}  {rate:.0f} tokens/s", flush=True)
    return step, (time.monotonic() - start) / 60


def round_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model as its bfloat16 checkpoint will be read, in fp32 on the CPU: figures are of what is written."""
    return model.cpu().bfloat16().float().eval()


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: Tensor) -> tuple[float, float]:
    """Returns the perplexity per token over consecutive blocks, and the summed loss in nats."""
    blocks = ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)
    total = sum(float(model(input_ids=rows, labels=rows).loss) * len(rows) for rows in blocks.split(16))
    return math.exp(total / len(blocks)), total / len(blocks) * (len(ids) - 1)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path, card: str) -> None:
    """Writes the checkpoint in bfloat16, with its model card."""
    model = model.bfloat16()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # transformers 4 does not know the class name that 5 writes; both know the older one.
    settings = json.loads((out / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (out / "README.md").write_text(card)
