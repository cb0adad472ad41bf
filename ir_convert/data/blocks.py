"""Text -> token blocks, parted into what is fitted on, what sets the threshold, and what is only measured on."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from .draw import MOST_SECTIONS, SourceText, fill, shares_of
from .pieces import Reader
from .sources import Source, local_path, open_sources

BLOCK = 512
LEAST_BLOCKS = 12
# Of every four stripes of blocks: so that a source is in every part, it must have as many blocks.
PARTS = ("fit", "threshold", "fit", "test")
MOST_STRIPE = 4
ENOUGH = 0.9  # of what is asked of a source; less is said


@dataclass(frozen=True)
class Blocks:
    """Token blocks ``[count, block]`` (int64) by use.

    Attributes:
        fit: forecasters and routers are fitted on these (a half).
        threshold: the sparsity -> threshold curve is measured on these (a quarter).
        test: the figures that are reported are measured on these (a quarter).
        sources: for each of the three, where its blocks come from: indices into ``names``, ``[count]`` (int64).
        names: of the sources, without the folders that files lie in.
        asked: blocks that each source was to give by its weight; one with less text gave less, and the others more.
    """

    fit: Tensor
    threshold: Tensor
    test: Tensor
    sources: dict[str, Tensor]
    names: list[str]
    asked: list[int]

    @cached_property
    def sha256(self) -> str:
        """Hash of the blocks and their parting: of what calibration sees, wherever it came from."""
        digest = hashlib.sha256()
        for part in ("fit", "threshold", "test"):
            rows: Tensor = getattr(self, part)
            digest.update(f"{part} {tuple(rows.shape)}".encode())
            digest.update(rows.contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def shortfalls(self) -> list[str]:
        """Returns a line for each source that had much less text than was asked of it."""
        others = "; the others fill up" if len(self.names) > 1 else ""
        return [
            f"calibration text {row['source']} has {row['tokens']} of the {row['asked']} tokens that were asked of it{others}."
            for row in self.mixture()
            if int(row["tokens"]) < ENOUGH * int(row["asked"])
        ]

    def mixture(self) -> list[dict[str, str | int]]:
        """Returns, for each source, its name, the tokens asked of it and the tokens taken: ready for a metadata file."""
        taken = torch.bincount(torch.cat(list(self.sources.values())), minlength=len(self.names)).tolist()
        block = self.fit.shape[1]
        return [
            {"source": name, "asked": asked * block, "tokens": count * block}
            for name, asked, count in zip(self.names, self.asked, taken, strict=True)
        ]


def read_blocks(
    sources: Sequence[Source] | None,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    block: int = BLOCK,
    text_field: str = "text",
) -> Blocks:
    """Reads text into blocks, spread over the whole of every source. The same input gives the same blocks.

    Runs of up to four blocks go to the parts in turn, so that the parts come from different places but hold the same
    mixture. Where a source has too little text for its share, the others fill up: see ``Blocks.mixture``.

    Args:
        sources: where the text comes from; None or none for the documentation topics that come with Python.
        tokenizer: the model's own.
        tokens: upper limit, all sources and uses together.
        block: tokens a block; where the tokenizer starts texts with BOS, so does every block.
        text_field: where JSON lines, Parquet files and data sets keep their text.

    Raises:
        UserError: a source is missing, unreadable, empty, not text, too short, or too small a share.
    """
    total = tokens // block
    if total < LEAST_BLOCKS:
        raise UserError(f"--tokens {tokens} is too few: at least {LEAST_BLOCKS * block} are needed")
    readers = open_sources(sources or [], text_field)
    weights = [source.weight for source in sources] if sources else [1.0]
    asked = shares_of(total, weights)
    _check_shares(readers, asked, tokens, block)
    bos = _bos(tokenizer)
    body = block if bos is None else block - 1
    most = MOST_SECTIONS // len(readers)
    texts = [SourceText(reader, tokenizer, body, count, most) for reader, count in zip(readers, asked, strict=True)]
    try:
        counts = fill(texts, weights, total)
        _check_counts(texts, counts, body)
    finally:
        for text in texts:
            text.close()
    rows = torch.cat([text.rows(count, bos) for text, count in zip(texts, counts, strict=True)])
    use = [part for count in counts for part in _parting(count)]
    origin = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    mine = {part: torch.tensor([other == part for other in use]) for part in PARTS}
    return Blocks(
        **{part: rows[mask] for part, mask in mine.items()},
        sources={part: origin[mask] for part, mask in mine.items()},
        names=_public_names([reader.name for reader in readers]),
        asked=asked,
    )


def _public_names(names: Sequence[str]) -> list[str]:
    """Returns what files that are passed on call the sources: where they lie is nobody else's business."""
    last = [_public_name(name) for name in names]
    return [
        f"{name} ({last[:place].count(name) + 1})" if name in last[:place] else name for place, name in enumerate(last)
    ]


def _public_name(name: str) -> str:
    place, colon, rest = name, "", ""
    if local_path(name) is None:  # or a data set in a local folder, folder:configuration:split
        place, colon, rest = name.partition(":")
    return f"{path.resolve().name}{colon}{rest}" if (path := local_path(place)) else name


def _parting(count: int) -> list[str]:
    """Returns the part of each of a source's ``count`` blocks: stripes, shorter where there are few blocks."""
    stripe = max(1, min(MOST_STRIPE, count // 16))
    return [PARTS[index // stripe % len(PARTS)] for index in range(count)]


def _bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def _check_shares(readers: Sequence[Reader], asked: Sequence[int], tokens: int, block: int) -> None:
    for reader, count in zip(readers, asked, strict=True):
        if count < len(PARTS):
            raise UserError(
                f"the weight of calibration text {reader.name} leaves it {count * block} of {tokens} tokens; at least "
                f"{len(PARTS) * block} are needed: raise its weight or --tokens"
            )


def _check_counts(texts: Sequence[SourceText], counts: Sequence[int], body: int) -> None:
    for text in texts:
        if not text.ids():
            raise UserError(f"calibration text {text.name} is empty: there is no text in it")
    if sum(counts) < LEAST_BLOCKS:
        names = ", ".join(text.name for text in texts)
        total = sum(len(text.ids()) for text in texts)
        raise UserError(
            f"calibration text {names} gives {total} tokens; at least {LEAST_BLOCKS * body} are needed: give more text"
        )
    for text, count in zip(texts, counts, strict=True):
        if count < len(PARTS):
            raise UserError(
                f"calibration text {text.name} gives {len(text.ids())} tokens; at least {len(PARTS) * body} are needed "
                "of every source: give more of it, or leave it out"
            )
