"""Which token comes next."""

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError


def require_numbers(logits: NDArray, rows: NDArray) -> None:
    """Raises UserError where those ``rows[B]`` of ``logits[B, vocab]`` hold NaN, whose place would be taken for a token."""
    if np.isnan(logits.max(axis=-1)[rows]).any():  # logits[rows] would be a copy in every step
        raise UserError(
            "the model gives NaN in place of logits: float16 may not hold its activations; convert with --dtype float32"
        )


def choose(
    logits: NDArray, temperature: float, top_k: int | None, top_p: float | None, generator: np.random.Generator
) -> NDArray:
    """Chooses a token for every row of ``logits[B, vocab]``, by settings that ``require_sampling`` lets pass."""
    if temperature == 0:
        return logits.argmax(axis=-1)
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
    ordered = np.take_along_axis(logits, order, axis=-1).astype(np.float64)
    p = np.exp((ordered - ordered[:, :1]) / temperature)
    p /= p.sum(axis=-1, keepdims=True)
    if top_p is not None:
        beyond = np.cumsum(p, axis=-1) - p >= top_p  # keeps the token that crosses the line, and the first in any case
        p[:, 1:][beyond[:, 1:]] = 0
        p /= p.sum(axis=-1, keepdims=True)
    draws = generator.random((len(p), 1))
    picked = np.minimum((np.cumsum(p, axis=-1) <= draws).sum(axis=-1), (p > 0).sum(axis=-1) - 1)
    return np.take_along_axis(order, picked[:, None], axis=-1)[:, 0]
