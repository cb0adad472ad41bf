"""What a caller hands over, checked before anything is computed."""

import math
from collections.abc import Collection, Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import ArrayLike, NDArray

from ..errors import UserError
from .dtypes import NUMPY


def tokens_of(input_ids: ArrayLike, vocabulary: int) -> NDArray:
    """Returns token ids ``[B, S]`` as int64; raises UserError where they are something else, or not of the vocabulary."""
    ids = _array("input_ids", input_ids)
    whole = np.issubdtype(ids.dtype, np.integer) or not ids.size
    if ids.ndim != 2 or not whole or (ids < 0).any():
        what = f"{ids.dtype} {list(ids.shape)}" + (" with negative ones" if whole and ids.ndim == 2 else "")
        raise UserError(
            f"input_ids are {what}: give token ids [texts, tokens], as a tokenizer with return_tensors='np' does"
        )
    if ids.size and ids.max() >= vocabulary:
        raise UserError(f"input_ids hold {ids.max()}, the model has 0 to {vocabulary - 1}: use its own tokenizer")
    return ids.astype(np.int64)


def mask_of(attention_mask: ArrayLike | None, batch: int, total: int) -> NDArray:
    """Returns an attention mask ``[B, T]`` as int64, all ones by default; raises UserError where shape or values are others."""
    if attention_mask is None:
        return np.ones((batch, total), np.int64)
    mask = _array("attention_mask", attention_mask)
    if list(mask.shape) != [batch, total]:
        raise UserError(
            f"attention_mask {list(mask.shape)} is not [{batch}, {total}]: give 0 or 1 for every token, cached ones before new ones"
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise UserError("attention_mask holds values other than 0 and 1: give 1 for every token that is no padding")
    return mask.astype(np.int64)


def require_cache(past: Sequence[NDArray], inputs: Sequence[ort.NodeArg], batch: int) -> None:
    """Raises UserError where keys and values are not those of ``batch`` texts, of one length in all layers."""
    if len(past) != len(inputs):
        raise UserError(f"past holds {len(past)} arrays, not {len(inputs)}: give all that the call before returned")
    first, *_ = arrays = [_array("past", array) for array in past]
    for array, value in zip(arrays, inputs, strict=True):
        wanted = [batch, value.shape[1], *first.shape[2:3], value.shape[3]]
        if list(array.shape) != wanted or array.dtype != NUMPY[value.type]:
            raise UserError(
                f"{value.name} is {array.dtype} {list(array.shape)}, not {np.dtype(NUMPY[value.type])} {wanted}: give what "
                "the call before returned for the same texts"
            )


def require_positions(position_ids: ArrayLike | None, shape: tuple[int, ...]) -> None:
    """Raises UserError where there are positions, but not one for each new token."""
    if position_ids is not None and (given := _array("position_ids", position_ids).shape) != shape:
        raise UserError(f"position_ids {list(given)} are not {list(shape)}: give one for every new token, or None")


def require_count(name: str, count: int, what: str, least: int) -> None:
    """Raises UserError where a count is no whole number, or less than ``least``."""
    if not isinstance(count, int | np.integer) or count < least:
        raise UserError(f"{name} is {count!r}: give {what}, {least} or more")


def ends_of(eos_ids: Collection[int] | int) -> NDArray:
    """Returns the tokens that end a text ``[n]``, int64; raises UserError where they are no numbers of tokens."""
    ids = np.array([eos_ids] if isinstance(eos_ids, int | np.integer) else list(eos_ids))
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"eos_ids {eos_ids!r} are no token ids: give numbers, as a tokenizer's eos_token_id is one")
    return ids.astype(np.int64)


def require_sampling(temperature: float, top_k: int | None, top_p: float | None, seed: int | None) -> None:
    """Raises UserError where a setting of the sampling is out of its range."""
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature {temperature:g} is not in [0, inf): 0 takes the likeliest token")
    if top_k is not None:
        require_count("top_k", top_k, "from how many of the likeliest tokens to sample", 1)
    if seed is not None:
        require_count("seed", seed, "a whole number", 0)
    if top_p is not None and not 0 <= top_p <= 1:
        raise UserError(f"top_p {top_p:g} is not in [0, 1]: it is a probability")


def _array(name: str, values: ArrayLike) -> NDArray:
    try:
        return np.asarray(values)
    except ValueError as error:
        raise UserError(f"{name} are texts of different lengths: pad them, with an attention_mask") from error
