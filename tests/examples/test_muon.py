"""The examples' Muon against torch's own."""

import copy

import torch
from muon import Muon, orthogonal


def test_steps_are_torchs():
    """torch's iteration runs in bfloat16, and so differs by about a hundredth of a step."""
    torch.manual_seed(0)
    ours = [torch.randn(shape) for shape in ((24, 16), (24, 16), (16, 40))]
    theirs = copy.deepcopy(ours)
    settings = {"lr": 0.1, "weight_decay": 0.5, "momentum": 0.9}
    optimizers = Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        before = [x.clone() for x in ours]
        for optimizer in optimizers:
            optimizer.step()
    for one, other, old in zip(ours, theirs, before, strict=True):
        assert (one - other).norm() < 0.05 * (one - old).norm()


def test_orthogonal():
    for shape in ((3, 20, 8), (2, 8, 20)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert values.min() > 0.5
        assert values.max() < 1.3
