"""Tokens drawn from sources in shares: what is not needed is neither read nor tokenised."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .pieces import Pieces, Reader

SECTION_BLOCKS = 4
MOST_SECTIONS = 64  # of all sources together, or one for each: a section may hold a file open
# Most tokenizers give 3 to 5 characters a token; 8 leaves room, and where it does not reach more is read.
CHARACTERS_PER_TOKEN = 8


class _Growing(Protocol):
    def grow(self, length: int) -> int:
        """Reads on to ``length`` of its units; returns that, or what there is."""


class _Section:
    """Tokens of one stretch of text, read and tokenised only as far as asked."""

    def __init__(self, pieces: Pieces, tokenize: Callable[[str], list[int]], separator: list[int]):
        self.ids: list[int] = []
        self.pieces, self._tokenize, self._separator, self._text = pieces, tokenize, separator, ""

    def grow(self, length: int) -> int:
        while (missing := length - len(self.ids)) > 0:
            if not self._text:
                piece = next(self.pieces, None)
                if piece is None:
                    break
                self.ids += self._separator if piece.begins else []
                self._text = piece.text
            cut = _word_end(self._text, max(1024, missing * CHARACTERS_PER_TOKEN))
            self.ids += self._tokenize(self._text[:cut])
            self._text = self._text[cut:]
        return min(length, len(self.ids))


class SourceText:
    """Blocks of one source, drawn in equal shares from sections all over it."""

    def __init__(
        self,
        reader: Reader,
        tokenizer: PreTrainedTokenizerBase,
        body: int,
        blocks: int,
        most_sections: int,
    ):
        def tokenize(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

        eos = getattr(tokenizer, "eos_token_id", None)
        self._separator = tokenize("\n\n") if eos is None else [eos]
        self._body, self._lengths, self.name = body, [0], reader.name
        count = max(1, min(most_sections, blocks // SECTION_BLOCKS))
        self._sections = [_Section(pieces, tokenize, self._separator) for pieces in reader.sections(count)]

    def grow(self, blocks: int) -> int:
        # Somewhat more than the blocks need: the separator before the first document is dropped.
        total = blocks * self._body + len(self._separator)
        self._lengths = fill(self._sections, [1.0] * len(self._sections), total)
        return min(blocks, len(self.ids()) // self._body)

    def ids(self) -> list[int]:
        ids = [
            token
            for section, length in zip(self._sections, self._lengths, strict=True)
            for token in section.ids[:length]
        ]
        first = len(self._separator)
        return ids[first:] if ids[:first] == self._separator else ids

    def rows(self, count: int, bos: int | None) -> Tensor:
        """Returns ``[count, block]``."""
        rows = torch.tensor(self.ids()[: count * self._body]).view(count, self._body)
        return rows if bos is None else torch.cat([torch.full((count, 1), bos), rows], dim=1)

    def close(self) -> None:
        for section in self._sections:
            section.pieces.close()


def fill(texts: Sequence[_Growing], weights: Sequence[float], total: int) -> list[int]:
    """Grows all to ``total`` together, in shares by weight; where some have not enough, the others fill up."""
    lengths, live = [0] * len(texts), list(range(len(texts)))
    while live and (missing := total - sum(lengths)) > 0:
        going = []
        for index, extra in zip(live, shares_of(missing, [weights[index] for index in live]), strict=True):
            goal = lengths[index] + extra
            lengths[index] = texts[index].grow(goal)
            if lengths[index] == goal:
                going.append(index)
        live = going
    return lengths


def shares_of(total: int, weights: Sequence[float]) -> list[int]:
    """Parts ``total`` by weight into whole numbers, none further than 1 from its exact share."""
    # Fractions: rounding must not let the whole parts add up to more than the total.
    unit = Fraction(total) / sum(map(Fraction, weights))
    exact = [Fraction(weight) * unit for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda index: shares[index] - exact[index])
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares


def _word_end(text: str, limit: int) -> int:
    """Returns where to cut ``text`` at about ``limit``: after a line, before a space, or there."""
    if len(text) <= limit:
        return len(text)
    return text.rfind("\n", 0, limit) + 1 or max(0, text.rfind(" ", 0, limit)) or limit
