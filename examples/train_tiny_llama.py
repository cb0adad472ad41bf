"""Train the tiny Llama that the demo and the tests convert.

    python examples/train_tiny_llama.py --out examples/tiny-llama [--minutes 60] [--device cpu] [TEXT_FILE ...]

Text: the standard library's sources and a third of its documentation topics (``stdlib_text.py``), plus any text files
given. Matrices are trained with Muon, the rest with AdamW. The checkpoint is written whole, at the end. A run is
reproducible from its seed, up to the number of steps that fit in ``--minutes`` (``--steps`` fixes it).
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
from stdlib_text import sources, topics
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, BLOCK, BATCH_TOKENS = 2048, 512, 4096
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# tiny-llama

A small, really trained Llama for demonstrations and tests: {parameters:.2f} M parameters, {layers} layers, width {width},
{heads} query and {kv_heads} key/value heads, byte-level BPE of {vocabulary} tokens, tied embeddings. It writes recognisable
Python and documentation prose, and is of no other use.

| | |
|---|---|
| data | Python {python} standard library: {train_modules} modules and {train_topics} documentation topics{extra} |
| training | {tokens:.1f} M tokens in {steps} steps, {minutes:.0f} minutes on {device}, seed {seed} |
| held-out perplexity, documentation topics | {topics_perplexity:.2f} a token ({topics_bytes:.3f} bits a byte) |
| held-out perplexity, Python modules | {sources_perplexity:.2f} a token ({sources_bytes:.3f} bits a byte) |

Perplexity is per token of this tokenizer, over consecutive blocks of {block} tokens. Made by `examples/train_tiny_llama.py`.
"""


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        documents, vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], min_frequency=2, show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def tokenise(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    ids: list[int] = []
    for document in documents:
        ids += [tokenizer.bos_token_id, *tokenizer.backend_tokenizer.encode(document).ids, tokenizer.eos_token_id]
    return torch.tensor(ids)


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: torch.Tensor) -> tuple[float, float]:
    """Returns the perplexity per token over consecutive blocks, and the summed loss in nats."""
    blocks = ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)
    total = sum(float(model(input_ids=rows, labels=rows).loss) * len(rows) for rows in blocks.split(16))
    return math.exp(total / len(blocks)), total / len(blocks) * (len(ids) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="*", type=Path, help="further text files to train on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60, help="training time, unless --steps is given")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=0.02, help="Muon's learning rate; AdamW's is a fifth of it")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists: name a folder that does not")
    torch.manual_seed(args.seed)

    train_topics, train_sources = topics("train"), sources("train")
    extra = [path.read_text("utf-8") for path in args.text]
    tokenizer = train_tokenizer(train_topics * 8 + train_sources + extra)
    # The topics are few: four rounds of them for each of the sources teach prose without much repetition.
    stream = tokenise(tokenizer, train_topics * 4 + train_sources + extra)
    model = make_model(tokenizer).to(args.device)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(stream) / 1e6:.2f} M training tokens", flush=True)

    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.05, momentum=0.95),
        torch.optim.AdamW(others, lr=args.lr / 5, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    start, step, smoothed = time.monotonic(), 0, None
    while (progress := step / args.steps if args.steps else (time.monotonic() - start) / (60 * args.minutes)) < 1:
        # Warm up over the first 2 %, hold, then decay linearly to zero over the last half.
        factor = min(progress / 0.02 + 0.01, 1.0, 2 * (1 - progress))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group.setdefault("peak", group["lr"])
        block = BLOCK // 2 if progress < 0.75 else BLOCK  # short blocks first: attention is dear on a CPU
        at = torch.randint(len(stream) - block, (BATCH_TOKENS // block,))
        batch = torch.stack([stream[i : i + block] for i in at]).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        smoothed = loss.item() if smoothed is None else 0.98 * smoothed + 0.02 * loss.item()
        step += 1
        if step % 100 == 0:
            rate = step * BATCH_TOKENS / (time.monotonic() - start)
            print(f"step {step}  {100 * progress:.1f} %  loss {smoothed:.3f}  {rate:.0f} tokens/s", flush=True)

    minutes = (time.monotonic() - start) / 60
    model = model.to("cpu", torch.bfloat16)
    measured = model.float().eval()  # the perplexity of the rounded weights, the ones that are written
    figures = {}
    for name, documents in {"topics": topics("test"), "sources": sources("test")}.items():
        held_out = tokenise(tokenizer, documents)
        figures[f"{name}_perplexity"], nats = perplexity(measured, held_out)
        figures[f"{name}_bytes"] = nats / math.log(2) / sum(len(document.encode()) for document in documents)
    print(json.dumps(figures))

    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    # transformers 4 does not know the class name that 5 writes; both know the older one.
    settings = json.loads((args.out / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (args.out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    card = CARD.format(
        parameters=model.num_parameters() / 1e6,
        layers=model.config.num_hidden_layers,
        width=model.config.hidden_size,
        heads=model.config.num_attention_heads,
        kv_heads=model.config.num_key_value_heads,
        vocabulary=VOCABULARY,
        python=platform.python_version(),
        train_modules=len(train_sources),
        train_topics=len(train_topics),
        extra="".join(f", {path.name}" for path in args.text),
        tokens=step * BATCH_TOKENS / 1e6,
        steps=step,
        block=BLOCK,
        minutes=minutes,
        device=args.device.upper(),
        seed=args.seed,
        **figures,
    )
    (args.out / "README.md").write_text(card)


if __name__ == "__main__":
    main()
