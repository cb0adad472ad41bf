"""Continues a prompt with either artifact."""

from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from .errors import UserError


def generate(
    artifact: Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    sparsity: float | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """Yields the prompt, then its continuation piece by piece.

    Args:
        artifact: an ``.onnx`` file or a checkpoint folder that ir-convert wrote.
        prompt: text.
        max_new_tokens: at most so many.
        sparsity: share of FLOPs to save; None for the artifact's own.
        temperature: 0 for greedy decoding.
        seed: of sampling.

    Raises:
        UserError: the artifact is missing or not one of ours.
    """
    if not artifact.exists():
        raise UserError(f"artifact '{artifact}' does not exist: name an .onnx file or a checkpoint folder")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise UserError(f"sparsity {sparsity:g} is not in [0, 1): it is the share of FLOPs to save, e.g. 0.4")
    run = _hugging_face if artifact.is_dir() else _onnx
    yield prompt
    yield from run(artifact, prompt, max_new_tokens, sparsity, temperature, seed)
