"""Random tokens among the calibration text, so that what is learnt holds on text that is unlike it.

On foreign text a forecaster fitted to calibration text alone says too much, as directions that the text hardly has are as good
as free to it, and its router thinks it right. Blocks of random tokens are as foreign as can be, and need no other text.
"""

import torch
from torch import Tensor

EVERY = 4  # the last block of so many; 0 leaves the text as it is


def foreign(count: int) -> Tensor:
    """Returns which of ``count`` fit blocks hold random tokens, ``[count]`` (bool)."""
    return torch.arange(1, count + 1) % EVERY == 0 if EVERY else torch.zeros(count, dtype=torch.bool)


def with_foreign(fit: Tensor, vocabulary: Tensor, seed: int) -> Tensor:
    """Returns fit blocks ``[count, block]`` with random tokens in some, each of ``vocabulary[tokens]`` equally likely.

    A token that all blocks begin with (BOS) stays.
    """
    drawn = torch.randint(len(vocabulary), fit.shape, generator=torch.Generator().manual_seed(seed))
    mixed = torch.where(foreign(len(fit)).unsqueeze(1), vocabulary[drawn], fit)
    if begin_alike(fit):
        mixed[:, 0] = fit[:, 0]
    return mixed


def begin_alike(blocks: Tensor) -> bool:
    """Whether all blocks ``[count, sequence]``, more than one, begin with the same token."""
    return len(blocks) > 1 and bool((blocks[:, 0] == blocks[0, 0]).all())
