"""What end-to-end stages minimise: a loss on the routed model's predictions, and the distance from the asked sparsity."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...flops import Budget, Key
from ...progress import Reporter
from .gates import Gates, logistic_noise
from .model import RoutedModel
from .train import Descent, Trace, batches, cut, descend
from .workers import Workers


@dataclass(frozen=True)
class Objective:
    """Attributes:
    distil: instead of the text's cross-entropy, KL(dense || routed) of the next-token distributions.
    sparsity: share of FLOPs to save; None: no penalty.
    penalty: weight of |sparsity - share of FLOPs saved|, in nats.
    """

    distil: bool = False
    sparsity: float | None = None
    penalty: float = 8.0


def prediction_loss(logits: Tensor, ids: Tensor, dense: Tensor | None) -> Tensor:
    """Returns the summed loss in nats of ``logits[batch, sequence, vocabulary]`` against the text or the dense model's logits."""
    logits = logits[:, :-1].flatten(0, 1)
    if dense is None:
        return F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
    target = F.log_softmax(dense[:, :-1].flatten(0, 1), -1)
    return F.kl_div(F.log_softmax(logits, -1), target, log_target=True, reduction="none").sum(-1).sum()


def share_saved(gates: dict[Key, Tensor], budget: Budget) -> Tensor:
    """Returns the share of FLOPs saved under gates ``[batch, sequence]`` by (layer, unit), overhead subtracted."""
    saved = [budget.share(unit) * (1 - gate.mean()) for (_, unit), gate in gates.items()]
    return torch.stack(saved).sum() - budget.overhead_share


def train_routed(
    stage: str,
    model: RoutedModel,
    groups: list[tuple[list[nn.Parameter], float]],
    blocks: Tensor,
    objective: Objective,
    rule: Callable[[float], Gates],
    descent: Descent,
    *,
    budget: Budget,
    seed: int,
    workers: Workers,
    report: Reporter,
) -> Trace:
    """Trains parameters of a routed model on token blocks ``[blocks, sequence]``; all processes hold all blocks.

    Args:
        groups: (parameters, learning rate).
        rule: how to decide, by progress from 0 to 1.
        seed: of the batches and the gates' noise, which is drawn for the whole batch: the number of processes is not seen.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = cut(blocks, descent.length)
    order, parts = batches(len(blocks), descent, generator), workers.rows(descent.batch, descent.micro_batch)
    keys = list(budget.overhead)

    def compute(step: int) -> Tensor:
        gates, ids = rule(step / max(1, descent.steps - 1)), blocks[order[step]]
        noise = logistic_noise((len(keys), *ids.shape), generator) if gates.rule == "gumbel" else None
        predicted = ids[:, 1:].numel()
        figures = torch.zeros(3, device=workers.device)

        def run(part: slice) -> tuple[Tensor, Tensor]:
            """Returns a part's logits and the share of FLOPs that it saves."""
            mine = {} if noise is None else {k: noise[i, part].to(workers.device) for i, k in enumerate(keys)}
            logits, taken = model(ids[part].to(workers.device), gates, mine)
            return logits, share_saved(taken, budget)

        everyone = None
        if objective.sparsity is not None and len(parts) > 1:  # the penalty's slope is that of the whole batch
            with torch.no_grad():
                everyone = workers.mean(torch.stack([run(part)[1] for part in parts]).mean())
        for part in parts:
            dense = None
            if objective.distil:
                with torch.no_grad():
                    dense = model(ids[part].to(workers.device), Gates("dense")).logits
            logits, saved = run(part)
            # The mean over processes of these is the batch's mean over tokens.
            language = prediction_loss(logits, ids[part].to(workers.device), dense) * workers.count / predicted
            loss = language
            if objective.sparsity is not None:
                # All processes see the sparsity of all; the gradient is of one's own part.
                batch = workers.mean(saved.detach()) if everyone is None else everyone
                distance = (saved - saved.detach() + batch - objective.sparsity).abs()
                loss = loss + objective.penalty * distance / len(parts)
            loss.backward()
            figures += torch.stack([loss, language, saved / len(parts)]).detach()
        return figures

    return descend(stage, groups, compute, descent, workers, report, descent.batch * blocks.shape[1])
