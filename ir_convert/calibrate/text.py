"""Text -> token blocks, parted into what is fitted on, what sets the threshold, and what is only measured on."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import UserError

BLOCK = 512
LEAST_BLOCKS = 12
SLICE_BLOCKS = 4
# Most tokenisers give 3 to 5 characters a token; 8 leaves room, and the surplus is cut off.
CHARACTERS_PER_TOKEN = 8


@dataclass(frozen=True)
class Blocks:
    """Token blocks ``[count, block]`` (int64) by use, and the hash of the text they came from.

    Attributes:
        fit: forecasters and routers are fitted on these (four of six blocks).
        threshold: the sparsity -> threshold curve is measured on these (one of six).
        test: the figures that are reported are measured on these (one of six).
        sha256: hash of the text file.
    """

    fit: Tensor
    threshold: Tensor
    test: Tensor
    sha256: str


def read_blocks(path: Path | None, tokenizer: PreTrainedTokenizerBase, tokens: int, block: int = BLOCK) -> Blocks:
    """Reads a text file into blocks, at most ``tokens`` tokens in all, spread over the whole file.

    Args:
        path: a UTF-8 text file; None for the documentation topics that come with Python.
        tokenizer: the model's own.
        tokens: upper limit, all uses together.
        block: tokens a block; where the tokenizer starts texts with BOS, so does every block.

    Raises:
        UserError: the file is missing, empty, not text, or too short.
    """
    text = _read_text(path) if path else "\n\n".join(topics.values())
    bos = tokenizer.bos_token_id
    starts_with_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    body = block - 1 if starts_with_bos else block
    ids: list[int] = []
    pieces = _spread(text, tokens * CHARACTERS_PER_TOKEN, max(1, tokens // (SLICE_BLOCKS * body)))
    for piece in pieces:
        ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"][: tokens // len(pieces)]
    count = min(len(ids), tokens) // body
    if count < LEAST_BLOCKS:
        raise UserError(
            f"calibration text {path or ''} gives {len(ids)} tokens (limit {tokens}); at least {LEAST_BLOCKS * body} are needed: "
            "give more text, or raise --tokens"
        )
    rows = torch.tensor(ids[: count * body]).view(count, body)
    if starts_with_bos:
        rows = torch.cat([torch.full((count, 1), bos), rows], dim=1)
    use = torch.arange(count) % 6
    return Blocks(
        rows[(use != 2) & (use != 5)], rows[use == 2], rows[use == 5], hashlib.sha256(text.encode()).hexdigest()
    )


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the calibration text {path}: {error.strerror}") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"calibration text {path} is not UTF-8 text (byte {error.start})") from error
    if "\0" in text:
        raise UserError(f"calibration text {path} is binary: it holds a NUL character")
    if not text.strip():
        raise UserError(f"calibration text {path} is empty")
    return text


def _spread(text: str, limit: int, slices: int) -> list[str]:
    """Cuts a text longer than ``limit`` characters down to evenly spaced slices that begin at a line."""
    if len(text) <= limit:
        return [text]
    starts = [index * len(text) // slices for index in range(1, slices)]
    starts = [text.find("\n", start) + 1 or start for start in starts]
    return [text[start : start + limit // slices] for start in [0, *starts]]
