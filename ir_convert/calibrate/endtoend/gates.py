"""How the routed model decides during training: a gate is 1 where a unit executes a token, 0 where it is approximated.

Every rule's value is a hard 0 or 1; they differ in what it depends on and in the gradient that passes through it.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["dense", "hard", "straight_through", "gumbel"]


@dataclass(frozen=True)
class Gates:
    """A rule for one forward pass.

    Attributes:
        rule: ``dense``: every unit executes, forecasters and routers are not run. ``hard``: 1[score > threshold], what runs
            at inference, without a gradient. ``straight_through``: the same value, with the gradient of
            sigmoid((score - threshold) / temperature). ``gumbel``: hard Gumbel-softmax over the logits
            (score - threshold, 0), straight-through (arXiv 2510.13831); the difference of two Gumbel variables is a logistic
            one, so this is 1[x > 0] with the gradient of sigmoid(x / temperature), x = score - threshold + noise.
        threshold: execute where score > threshold.
        temperature: of the gradient; larger reaches tokens farther from the threshold.
        into_stream: whether a gate's gradient reaches the hidden states that its router reads, and by them all that came
            before. False where forecasters train: through later gates they learn to make later routers execute.
    """

    rule: Rule
    threshold: float = 0.0
    temperature: float = 1.0
    into_stream: bool = True

    def decide(self, score: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns gates 0. or 1. for scores, both ``[batch, sequence]``; ``gumbel`` adds ``noise[batch, sequence]``."""
        margin = score - self.threshold
        if self.rule == "gumbel":
            if noise is None:
                raise ValueError("the gumbel rule needs noise")
            margin = margin + noise
        # Compared as at inference: a rounded difference could fall on the other side.
        hard = (margin > 0 if self.rule == "gumbel" else score > self.threshold).to(score.dtype)
        if self.rule == "hard":
            return hard
        soft = torch.sigmoid(margin / self.temperature)
        return hard + (soft - soft.detach())


def logistic_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Returns standard logistic noise, the difference of two Gumbel variables, on the CPU."""
    uniform = torch.rand(shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    return torch.logit(uniform)
