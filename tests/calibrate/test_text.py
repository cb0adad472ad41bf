"""Text becomes blocks, or one clear line."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from ir_convert.calibrate import read_blocks
from ir_convert.errors import UserError

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (" \n\n ", "is empty"),
        (b"abc\xff\xfe", r"not UTF-8 text \(byte 3\)"),
        ("abc\0def", "binary"),
        ("too short", r"gives \d+ tokens.*at least 6144 are needed"),
    ],
)
def test_bad_text(content, message, tokenizer, tmp_path):
    with pytest.raises(UserError, match=message):
        read_blocks(write(tmp_path / "text", content), tokenizer, 65536)


def test_missing_text(tokenizer, tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_blocks(tmp_path / "absent", tokenizer, 65536)
    with pytest.raises(UserError, match="Is a directory"):
        read_blocks(tmp_path, tokenizer, 65536)


def test_parts_do_not_overlap_and_cover_the_text(tokenizer, tmp_path):
    text = "\n".join(f"line {number} of the text" for number in range(8000))
    blocks = read_blocks(write(tmp_path / "text", text), tokenizer, 10**9)
    rows = [tuple(row.tolist()) for part in (blocks.fit, blocks.threshold, blocks.test) for row in part]
    assert len(set(rows)) == len(rows)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert len(rows) == len(ids) // 512
    assert len(blocks.fit) >= 3 * len(blocks.test)


def test_token_limit_spreads_over_a_long_text(tokenizer, tmp_path):
    text = "".join(f"number {number}\n" for number in range(300_000))
    blocks = read_blocks(write(tmp_path / "text", text), tokenizer, 20_000)
    rows = torch.cat([blocks.fit, blocks.threshold, blocks.test])
    assert rows.numel() <= 20_000
    first_number = sorted(int(tokenizer.decode(row).split("number ")[1].split()[0]) for row in rows)
    assert first_number[0] < 1000
    assert first_number[-1] > 250_000


def test_every_block_starts_with_bos_where_the_tokenizer_adds_it(tokenizer, tmp_path):
    class WithBos:
        bos_token_id = 0

        def __call__(self, text, add_special_tokens=True, **kwargs):
            ids = tokenizer(text, add_special_tokens=False, **kwargs)["input_ids"]
            return {"input_ids": [0, *ids] if add_special_tokens else ids}

    blocks = read_blocks(write(tmp_path / "text", "some words here\n" * 9000), WithBos(), 65536)
    assert (blocks.fit[:, 0] == 0).all()
    assert blocks.fit.shape[1] == 512
