"""Text that continues a prompt, piece by piece."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from ir_convert.export import hf
from ir_convert.generate import _pieces, generate

TEXT = "Hello there, he's not here. Don't you see: x = foo(bar) ? naïve café 日本語 \n" * 3
RARE = "ሰላምታለዓለም 🙂‍🙂‍🙂 ok "  # bytes, where a tokenizer does not know the characters


def spaces_in_front() -> Tokenizer:
    """As Llama 2's: words begin with their space, and a text loses its first when it is decoded."""
    inner = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.train_from_iterator([TEXT], BpeTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False))
    learnt = json.loads(inner.to_str())["model"]
    vocabulary = learnt["vocab"] | {f"<0x{byte:02X}>": len(learnt["vocab"]) + byte for byte in range(256)}
    merges = [tuple(merge) for merge in learnt["merges"]]
    inner.model = BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>")
    return inner


def of_bytes() -> Tokenizer:
    inner = Tokenizer(BPE())
    inner.pre_tokenizer, inner.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = ByteLevel.alphabet()
    inner.train_from_iterator([TEXT], BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    return inner


TOKENIZERS = {
    kind: PreTrainedTokenizerFast(tokenizer_object=make(), clean_up_tokenization_spaces=True)
    for kind, make in (("spaces", spaces_in_front), ("bytes", of_bytes))
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data())
def test_prompt_and_pieces_are_the_text(kind, data):
    """Wherever the prompt ends between tokens; also within a character."""
    tokenizer = TOKENIZERS[kind]
    text = data.draw(st.sampled_from(["", "a"])) + data.draw(st.sampled_from([TEXT, RARE * 2 + TEXT, TEXT + RARE * 2]))
    ids = tokenizer(text[: data.draw(st.integers(20, len(text)))], add_special_tokens=False)["input_ids"]
    cut = data.draw(st.integers(1, len(ids)))

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    prompt, whole = decode(ids[:cut]), decode(ids)
    continued = prompt + "".join(_pieces(tokenizer, ids[:cut], ids[cut:]))
    if not prompt.endswith("\ufffd"):
        assert continued == whole


def test_a_checkpoint_samples_from_all_tokens(tmp_path, monkeypatch):
    """As an ONNX file does: transformers alone would take the 50 likeliest."""
    seen = {}

    class Model:
        generation_config = SimpleNamespace(bos_token_id=None, eos_token_id=0, pad_token_id=None)

        def to(self, _):
            return self

        def eval(self):
            return self

        def generate(self, streamer, **settings):
            seen.update(settings, eos_token_id=self.generation_config.eos_token_id)
            streamer.end()

    monkeypatch.setattr(hf, "load", lambda _: Model())
    monkeypatch.setattr(hf, "load_tokenizer", lambda *_: TOKENIZERS["bytes"])
    assert "".join(generate(tmp_path, "one", max_new_tokens=3, temperature=0.7)) == ""
    names = ("do_sample", "temperature", "top_k", "max_new_tokens", "eos_token_id")
    assert [seen[name] for name in names] == [True, 0.7, 0, 3, 0]
