"""Which token comes next."""

import math

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError


def choose(
    logits: NDArray, temperature: float, top_k: int | None, top_p: float | None, generator: np.random.Generator
) -> NDArray:
    """Chooses a token for every row of ``logits[B, vocab]``.

    Raises:
        UserError: a setting is out of its range.
    """
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature {temperature:g} is not in [0, inf): 0 takes the likeliest token")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k {top_k} leaves no token: give at least 1, or None for all")
    if top_p is not None and not 0 <= top_p <= 1:
        raise UserError(f"top_p {top_p:g} is not in [0, 1]: it is a probability")
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
