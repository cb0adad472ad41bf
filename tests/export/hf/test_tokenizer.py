"""The exported folder's tokenizer is the base's, whatever class the base's author named."""

import json
import re

import pytest
from models import random_routing, save_random
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer

from ir_convert.checkpoint import Checkpoint
from ir_convert.export.hf import load, write
from ir_convert.export.hf.loader import load_tokenizer

TEXT = "12345 (foo) in 2024: it's DON'T\n\n\n  x=foo(bar)<|end|>\nHello there"
SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>"]


def byte_level() -> Tokenizer:
    """Of bytes, but with words and numbers that are not those of GPT-2."""
    tokenizer = Tokenizer(BPE())
    words = Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    split = pre_tokenizers.Split(words, "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


def with_normalizer() -> Tokenizer:
    """Spaces are written out before, and so after every special token."""
    tokenizer = Tokenizer(BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(TEXT.split("\n") * 3, trainer)
    return tokenizer


CASES = {
    "olmo2": ("GPT2Tokenizer", byte_level),
    "olmo3": ("GPT2Tokenizer", byte_level),
    "exaone4": ("GPT2Tokenizer", byte_level),
    "granite": ("GPT2Tokenizer", byte_level),
    "phi3": ("GPT2Tokenizer", byte_level),
    "phi3-long": ("LlamaTokenizer", with_normalizer),
    "mistral": ("LlamaTokenizer", with_normalizer),
    "qwen2": ("PreTrainedTokenizerFast", byte_level),
    "llama": ("GPT2Tokenizer", byte_level),
}


@pytest.fixture
def folders(tmp_path):
    """(the base's folder, the exported one), the base of a family with a tokenizer of a class."""

    def make(family, named, tokenizer):
        base, folder = tmp_path / "base", tmp_path / "ir"
        save_random(family, base)
        tokenizer.save(str(base / "tokenizer.json"))
        values = {"tokenizer_class": named, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        values |= {"legacy": False, "add_bos_token": False} if named == "LlamaTokenizer" else {}
        (base / "tokenizer_config.json").write_text(json.dumps(values), "utf-8")
        checkpoint = Checkpoint.open(str(base))
        folder.mkdir()
        write(checkpoint, random_routing(checkpoint), folder)
        return base, folder

    return make


@pytest.mark.parametrize("family", CASES)
def test_ids_are_the_base_models(folders, family):
    named, make = CASES[family]
    base, folder = folders(family, named, make())
    expected = AutoTokenizer.from_pretrained(base)(TEXT)
    encoded = load_tokenizer(folder, load(folder))(TEXT)
    assert encoded["input_ids"] == expected["input_ids"]
    if family not in ("exaone4", "qwen2", "llama"):  # version 4 of transformers writes it for version 5 too
        written = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert set(encoded) == {"input_ids", "attention_mask"}


def test_class_that_does_not_load_is_kept(folders, monkeypatch):
    def fail(*_, **__):
        raise ValueError("it needs a package that is not here")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    _, folder = folders("llama", "LlamaTokenizer", byte_level())
    assert json.loads((folder / "tokenizer_config.json").read_text("utf-8"))["tokenizer_class"] == "LlamaTokenizer"


def test_model_card_trusts_the_folders_code(folders):
    """For the tokenizer too: its class is looked up by way of the configuration, and version 5 of transformers asks."""
    _, folder = folders("llama", "GPT2Tokenizer", byte_level())
    calls = re.findall(r"\w+\.from_pretrained\(.*\)", (folder / "README.md").read_text("utf-8"))
    assert len(calls) == 2
    assert all("trust_remote_code=True" in call for call in calls)
