"""Train a reference model for the quality tables on a folder of books (``books.py`` says which part of them).

    python benchmarks/train_reference.py novels --books FOLDER --out DIR [--minutes 60] [--device cpu]

- novels: Llama, 8 layers, width 192, all the books. Much text for its size, so there is slack for routing to use.
- diary: Qwen3, 10 layers, width 128, Pepys's diary alone, many times over. Narrow text, little slack.
- large: Llama, 12 layers, width 512, all the books; wants a GPU.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from books import books
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
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

MODELS = {
    "novels": ("*", {"model_type": "llama", "vocab_size": 4096, "hidden_size": 192, "intermediate_size": 512,
                         "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 2}),
    "diary": ("*pepys*", {"model_type": "qwen3", "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384, "head_dim": 32,
                              "num_hidden_layers": 10, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "large": ("*", {"model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408,
                        "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 4}),
}  # fmt: skip
CARD = """# {name}

A reference model for routing's quality tables, made by `benchmarks/train_reference.py {name}`: {parameters:.2f} M parameters
({model_type}, {layers} layers, width {width}), {tokens:.1f} M tokens in {steps} steps, {minutes:.0f} minutes on {device},
seed {seed}. Held-out perplexity {perplexity:.2f} a token, over consecutive blocks of {block} tokens of the test part.
"""


def configure(name: str, bos: int, eos: int) -> PretrainedConfig:
    fields = dict(MODELS[name][1])
    return AutoConfig.for_model(
        fields.pop("model_type"),
        **fields,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--books", type=Path, required=True, help="a folder of .txt files")
    add_options(parser)
    args = parse(parser)
    torch.manual_seed(args.seed)

    pattern, fields = MODELS[args.model]
    documents = books(args.books, "train", pattern)
    tokenizer = train_tokenizer(documents, fields["vocab_size"])
    stream = tokenise(tokenizer, documents)
    config = configure(args.model, tokenizer.bos_token_id, tokenizer.eos_token_id)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(args.device)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(stream) / 1e6:.2f} M training tokens", flush=True)
    steps, minutes = train(model, stream, minutes=args.minutes, steps=args.steps, lr=args.lr)

    measured = round_weights(model)
    held_out, _ = perplexity(measured, tokenise(tokenizer, books(args.books, "test", pattern)))
    print(json.dumps({"perplexity": held_out}))
    card = CARD.format(
        name=args.model,
        parameters=model.num_parameters() / 1e6,
        model_type=config.model_type,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        tokens=steps * BATCH_TOKENS / 1e6,
        steps=steps,
        minutes=minutes,
        device=args.device.upper(),
        seed=args.seed,
        perplexity=held_out,
        block=BLOCK,
    )
    save(measured, tokenizer, args.out, card)


if __name__ == "__main__":
    main()
