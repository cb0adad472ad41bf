"""What a caller hands over, checked before anything is computed."""

import math
from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import ArrayLike, NDArray

from ..errors import UserError
from .dtypes import NUMPY


def tokens_of(input_ids: ArrayLike, vocabulary: int) -> NDArray:
    """Returns token ids ``[B, S]`` as int64; raises UserError where they are something else, or not of the vocabulary."""
    try:
        ids = np.asarray(input_ids)
    except ValueError as error:
        raise UserError("input_ids are texts of different lengths: pad them, with an attention_mask") from error
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
    if (shape := list(np.shape(attention_mask))) != [batch, total]:
        raise UserError(
            f"attention_mask {shape} is not [{batch}, {total}]: give 0 or 1 for every token, cached ones before new ones"
        )
    mask = np.asarray(attention_mask)
    if not ((mask == 0) | (mask == 1)).all():
        raise UserError("attention_mask holds values other than 0 and 1: give 1 for every token that is no padding")
    return mask.astype(np.int64)


def require_cache(past: Sequence[NDArray], inputs: Sequence[ort.NodeArg], batch: int) -> None:
    """Raises UserError where keys and values are not those of ``batch`` texts, of one length in all layers."""
    if len(past) != len(inputs):
        raise UserError(f"past holds {len(past)} arrays, not {len(inputs)}: give all that the call before returned")
    for array, value in zip(past, inputs, strict=True):
        wanted = [batch, value.shape[1], *np.shape(past[0])[2:3], value.shape[3]]
        if list(array.shape) != wanted or array.dtype != NUMPY[value.type]:
            raise UserError(
                f"{value.name} is {array.dtype} {list(array.shape)}, not {np.dtype(NUMPY[value.type])} {wanted}: give what "
                "the call before returned for the same texts"
            )


def require_positions(position_ids: ArrayLike | None, shape: tuple[int, ...]) -> None:
    """Raises UserError where there are positions, but not one for each new token."""
    if position_ids is not None and np.shape(position_ids) != shape:
        raise UserError(
            f"position_ids {list(np.shape(position_ids))} are not {list(shape)}: give one for every new token, or None"
        )


def require_count(name: str, count: int, what: str, least: int) -> None:
    """Raises UserError where a count is no whole number, or less than ``least``."""
    if not isinstance(count, int | np.integer) or count < least:
        raise UserError(f"{name} is {count!r}: give {what}, {least} or more")


def require_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises UserError where a setting of the sampling is out of its range."""
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature {temperature:g} is not in [0, inf): 0 takes the likeliest token")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k {top_k} leaves no token: give at least 1, or None for all")
    if top_p is not None and not 0 <= top_p <= 1:
        raise UserError(f"top_p {top_p:g} is not in [0, 1]: it is a probability")
