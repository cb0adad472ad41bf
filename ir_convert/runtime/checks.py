"""What a caller hands over, checked before anything is computed."""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UserError


def tokens_of(input_ids: ArrayLike) -> NDArray:
    """Returns token ids ``[B, S]`` as int64; raises UserError where they are something else."""
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
    return ids.astype(np.int64)


def require_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises UserError where a setting of the sampling is out of its range."""
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature {temperature:g} is not in [0, inf): 0 takes the likeliest token")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k {top_k} leaves no token: give at least 1, or None for all")
    if top_p is not None and not 0 <= top_p <= 1:
        raise UserError(f"top_p {top_p:g} is not in [0, 1]: it is a probability")
