"""Train the tiny Llama that the demo and the tests convert.

    python examples/train_tiny_llama.py --out examples/tiny-llama [--minutes 60] [--device cpu] [TEXT_FILE ...]

Text: the standard library's sources and a third of its documentation topics (``stdlib_text.py``), plus any text files
given (``training.py`` says how). The checkpoint is written whole, at the end. A run is reproducible from its seed, up
to the number of steps that fit in ``--minutes`` (``--steps`` fixes it).
"""

import argparse
import json
import math
import platform
from pathlib import Path

import torch
from stdlib_text import sources, topics
from training import (
    BATCH_TOKENS,
    BLOCK,
    add_options,
    parse,
    perplexity,
    round_weights,
    save,
    tokenise,
    train,
    train_tokenizer,
)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2048
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="*", type=Path, help="further text files to train on")
    add_options(parser)
    args = parse(parser)
    torch.manual_seed(args.seed)

    train_topics, train_sources = topics("train"), sources("train")
    extra = [path.read_text("utf-8") for path in args.text]
    tokenizer = train_tokenizer(train_topics * 8 + train_sources + extra, VOCABULARY)
    # The topics are few: four rounds of them for each of the sources teach prose without much repetition.
    stream = tokenise(tokenizer, train_topics * 4 + train_sources + extra)
    model = make_model(tokenizer).to(args.device)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(stream) / 1e6:.2f} M training tokens", flush=True)

    step, minutes = train(model, stream, minutes=args.minutes, steps=args.steps, lr=args.lr)
    measured = round_weights(model)
    figures = {}
    for name, documents in {"topics": topics("test"), "sources": sources("test")}.items():
        held_out = tokenise(tokenizer, documents)
        figures[f"{name}_perplexity"], nats = perplexity(measured, held_out)
        figures[f"{name}_bytes"] = nats / math.log(2) / sum(len(document.encode()) for document in documents)
    print(json.dumps(figures))

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
    save(measured, tokenizer, args.out, card)


if __name__ == "__main__":
    main()
