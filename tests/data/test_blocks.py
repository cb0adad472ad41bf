"""Text becomes blocks, in the shares asked for, or one clear line."""

import json
import os
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ir_convert.data import Source, read_blocks
from ir_convert.data.draw import _word_end, fill, shares_of
from ir_convert.errors import UserError

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"
PARTS = ("fit", "threshold", "test")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


class Words:
    """A tokenizer with a number for each word, fast enough to try many texts; 0 is BOS, 1 is EOS."""

    def __init__(self, bos=False, eos=True):
        self.bos_token_id, self.eos_token_id, self._bos = 0, 1 if eos else None, bos

    def __call__(self, text, add_special_tokens=True, verbose=False):
        ids = [int(word) if word.isdigit() else 2 for word in text.split()] or [2]
        return {"input_ids": [0, *ids] if self._bos and add_special_tokens else ids}


def write(path: Path, content: str | bytes) -> Source:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Source(str(path))


def numbers(path: Path, count: int, first: int = 10) -> Source:
    return write(path, "".join(f"{number}\n" for number in range(first, first + count)))


def rows(blocks):
    return torch.cat([getattr(blocks, part) for part in PARTS])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (" \n\n ", "is empty"),
        (b"abc\xff\xfe", r"not UTF-8 text \(byte 3\)"),
        ("abc\0def", "binary"),
        ("too short", r"gives \d+ tokens; at least 6144 are needed"),
    ],
)
def test_bad_text(content, message, tokenizer, tmp_path):
    with pytest.raises(UserError, match=message):
        read_blocks([write(tmp_path / "text", content)], tokenizer, 65536)


def test_python_topics_by_default(tokenizer):
    blocks = read_blocks(None, tokenizer, 16384)
    assert rows(blocks).shape == (32, 512)
    assert "documentation" in blocks.names[0]
    assert blocks.sha256 == read_blocks([], tokenizer, 16384).sha256


def test_parts_do_not_overlap_and_cover_the_text(tokenizer, tmp_path):
    text = "\n".join(f"line {number} of the text" for number in range(8000))
    blocks = read_blocks([write(tmp_path / "text", text)], tokenizer, 10**9)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    whole = torch.tensor(ids[: len(ids) // 512 * 512]).view(-1, 512)
    assert sorted(rows(blocks).tolist()) == sorted(whole.tolist())
    assert abs(len(blocks.fit) - len(whole) / 2) <= 4
    assert abs(len(blocks.test) - len(blocks.threshold)) <= 4


def test_token_limit_spreads_over_a_long_text(tokenizer, tmp_path):
    source = write(tmp_path / "text", "".join(f"number {number}\n" for number in range(300_000)))
    blocks = read_blocks([source], tokenizer, 20_000)
    assert 19_000 < rows(blocks).numel() <= 20_000
    for part in PARTS:
        first = sorted(int(tokenizer.decode(row).split("number ")[1].split()[0]) for row in getattr(blocks, part))
        assert first[0] < 100_000
        assert first[-1] > 200_000


def test_more_is_read_where_tokens_are_long(tmp_path):
    """At 50 characters a token the first guess of what to read is far too little."""
    source = write(tmp_path / "text", "".join(f"{number:050}\n" for number in range(20_000)))
    assert rows(read_blocks([source], Words(), 16_000, block=16)).numel() == 16_000


def test_text_is_cut_before_a_space():
    """With most tokenizers it belongs to the word that follows."""
    assert _word_end("one two six", 9) == 7
    assert _word_end("one\ntwo six", 9) == 4
    assert _word_end("one", 9) == 3
    assert _word_end("x" * 20, 9) == 9


def test_few_files_are_open_at_once(tmp_path):
    """A process may have 256 on some systems."""
    sources = [numbers(tmp_path / f"{name}.txt", 200_000) for name in "abc"]
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 80, most))
    try:
        blocks = read_blocks(sources, Words(), 40_000, block=16)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))
    assert rows(blocks).numel() == 40_000


def test_every_block_starts_with_bos_where_the_tokenizer_adds_it(tmp_path):
    blocks = read_blocks([numbers(tmp_path / "a.txt", 2000)], Words(bos=True), 1000, block=32)
    assert rows(blocks).shape == (1000 // 32, 32)
    assert (rows(blocks)[:, 0] == 0).all()
    assert (rows(blocks)[:, 1:] > 1).all()
    assert (rows(read_blocks([numbers(tmp_path / "a.txt", 2000)], Words(), 1000, block=32)) > 1).all()


@pytest.mark.parametrize(("eos", "separator"), [(True, 1), (False, 2)])
def test_documents_are_joined_with_eos_or_two_newlines(eos, separator, tmp_path):
    texts = [f"{number} {number + 1} {number + 2}" for number in range(10, 310, 3)]
    source = write(tmp_path / "a.jsonl", "".join(json.dumps({"body": text}) + "\n" for text in texts))
    blocks = read_blocks([source], Words(eos=eos), 10_000, block=8, text_field="body")
    ids = sorted(rows(blocks).tolist(), key=lambda row: max(row[:2]))
    flat = [token for row in ids for token in row]
    expected = [token for text in texts for token in [*map(int, text.split()), separator]][: len(flat)]
    assert flat == expected


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 900), st.sampled_from([0.5, 1, 1, 2, 3])), min_size=1, max_size=4),
    st.integers(1, 2000),
    st.sampled_from([4, 7, 16]),
    st.booleans(),
)
def test_every_block_is_in_one_part_and_shares_are_kept(tmp_path_factory, texts, tokens, block, bos):
    folder, body = tmp_path_factory.mktemp("texts"), block - bos
    sources = [
        Source(numbers(folder / f"{index}.txt", count, 10_000 * (index + 1)).location, weight)
        for index, (count, weight) in enumerate(texts)
    ]
    total, weights = tokens // block, [weight for _, weight in texts]
    shares = [total * weight / sum(weights) for weight in weights]
    available = [count // body for count, _ in texts]
    try:
        blocks = read_blocks(sources, Words(bos=bos), tokens, block)
    except UserError:
        assert total < 12 or min(shares) < 5 or min(available) < 4 or sum(available) < 12
        return
    everything = rows(blocks)
    assert everything.numel() <= tokens
    assert len(everything) == min(total, sum(available))
    # No token twice, and every source in every part, in about the proportion of the parts.
    content = everything[:, int(bos) :]
    assert content.unique().numel() == content.numel()
    origin = torch.cat([blocks.sources[part] for part in PARTS])
    assert torch.equal(content // 10_000 - 1, origin[:, None].expand_as(content))
    taken = origin.bincount(minlength=len(texts)).tolist()
    for index, count in enumerate(taken):
        by_part = [int((blocks.sources[part] == index).sum()) for part in PARTS]
        assert sum(by_part) == count
        for share, of_part in zip((0.5, 0.25, 0.25), by_part, strict=True):
            assert of_part > 0
            assert abs(of_part - share * count) <= 4
    # A source gives its share; less only where it has no more, more only where another gives less.
    for count, share, most in zip(taken, shares, available, strict=True):
        assert count >= min(share - 1, most)
    if all(most >= share for most, share in zip(available, shares, strict=True)):
        assert all(abs(count - share) <= 1 for count, share in zip(taken, shares, strict=True))
    assert blocks.mixture() == [
        {"source": Path(source.location).name, "asked": asked * block, "tokens": count * block}
        for source, asked, count in zip(sources, blocks.asked, taken, strict=True)
    ]


@given(st.integers(0, 10**9), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20))
def test_shares(total, weights):
    shares = shares_of(total, weights)
    assert sum(shares) == total
    assert all(
        abs(share - total * weight / sum(weights)) < 1 + 1e-6 * total
        for share, weight in zip(shares, weights, strict=True)
    )


class Tank:
    def __init__(self, content):
        self.content = content

    def grow(self, length):
        return min(length, self.content)


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0.01, 10)), min_size=1, max_size=9), st.integers(0, 300))
def test_filling(tanks, total):
    contents = [content for content, _ in tanks]
    lengths = fill([Tank(content) for content in contents], [weight for _, weight in tanks], total)
    assert sum(lengths) == min(total, sum(contents))
    assert all(length <= content for length, content in zip(lengths, contents, strict=True))


def test_a_short_source_is_filled_up_and_reported(tmp_path):
    sources = [numbers(tmp_path / "short.txt", 100), numbers(tmp_path / "long.txt", 5000, 1000)]
    blocks = read_blocks(sources, Words(), 1600, block=16)
    assert [entry["tokens"] for entry in blocks.mixture()] == [96, 1504]
    assert [entry["asked"] for entry in blocks.mixture()] == [800, 800]
    (line,) = blocks.shortfalls()
    assert line == "calibration text short.txt has 96 of the 800 tokens that were asked of it; the others fill up."
    (line,) = read_blocks([Source(str(tmp_path / "long.txt"))], Words(), 8000, block=16).shortfalls()
    assert line == "calibration text long.txt has 4992 of the 8000 tokens that were asked of it."
    assert not read_blocks([Source(str(tmp_path / "long.txt"))], Words(), 4992, block=16).shortfalls()


def test_what_is_too_little_is_named(tmp_path):
    short, long = numbers(tmp_path / "short.txt", 60), numbers(tmp_path / "long.txt", 5000, 1000)
    with pytest.raises(UserError, match=r"short\.txt gives 60 tokens; at least 64 are needed of every source"):
        read_blocks([short, long], Words(), 1600, block=16)
    with pytest.raises(
        UserError, match=r"weight of calibration text .*long\.txt leaves it 16 of 1600 tokens; at least 64"
    ):
        read_blocks([short, Source(long.location, 0.01)], Words(), 1600, block=16)
    with pytest.raises(UserError, match=r"--tokens 100 is too few: at least 192 are needed"):
        read_blocks([long], Words(), 100, block=16)
    other = numbers(tmp_path / "other.txt", 90)
    with pytest.raises(UserError, match=r"short\.txt, .*other\.txt gives 150 tokens; at least 192 are needed"):
        read_blocks([short, other], Words(), 1600, block=16)
    with pytest.raises(UserError, match=r"empty\.txt is empty"):
        read_blocks([write(tmp_path / "empty.txt", ""), long], Words(), 1600, block=16)


def test_hash_is_of_the_blocks(tokenizer, tmp_path):
    first = read_blocks([numbers(tmp_path / "a.txt", 2000)], Words(), 1000, block=16)
    assert first.sha256 == read_blocks([numbers(tmp_path / "b.txt", 2000)], Words(), 1000, block=16).sha256
    assert first.sha256 != read_blocks([numbers(tmp_path / "b.txt", 2000, 11)], Words(), 1000, block=16).sha256
    assert first.sha256 != read_blocks([numbers(tmp_path / "a.txt", 2000)], Words(), 1000, block=20).sha256
    assert len(first.sha256) == 64
    # Of how they are parted as well.
    moved = replace(first, fit=first.fit[:-1], threshold=torch.cat([first.fit[-1:], first.threshold]))
    halved = replace(first, **{part: getattr(first, part).view(-1, 8) for part in PARTS})
    assert len({first.sha256, moved.sha256, halved.sha256}) == 3


def test_every_kind_of_source_at_once(tokenizer, tmp_path):
    pytest.importorskip("datasets")
    for kind in ("folder", "set"):
        (tmp_path / kind).mkdir()
    for number in range(30):
        write(tmp_path / "folder" / f"{number}.md", f"page {number}\n" * 300)
    lines = "".join(json.dumps({"text": f"record {number} " * 30}) + "\n" for number in range(500))
    write(tmp_path / "a.jsonl", lines)
    write(tmp_path / "set" / "train.jsonl", lines.replace("record", "row"))
    locations = [tmp_path / "folder", tmp_path / "a.jsonl", f"{tmp_path / 'set'}:"]
    blocks = read_blocks([Source(str(location)) for location in locations], tokenizer, 48 * 256, block=256)
    assert [entry["tokens"] for entry in blocks.mixture()] == [16 * 256] * 3
    for index, word in enumerate(["page", "record", "row"]):
        for part in PARTS:
            own = getattr(blocks, part)[blocks.sources[part] == index]
            assert all(word in tokenizer.decode(row) for row in own)
    assert (rows(blocks) == tokenizer.eos_token_id).any()
    assert blocks.names == ["folder", "a.jsonl", "set::train"]
