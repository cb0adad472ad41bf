"""The cost that routers learn is what approximating really costs: against brute force in float64, a token at a time."""

import pytest
import torch
from calibrations import random_blocks, shorten
from models import save_random

from ir_convert.calibrate import Options, dense
from ir_convert.checkpoint import Checkpoint
from ir_convert.decoder import Decoder
from ir_convert.families import UNITS
from ir_convert.progress import Silent
from ir_convert.stream import Team, Work

BLOCKS, LENGTH, PROBES = 2, 6, 600
KEYS = [(layer, unit) for layer in range(3) for unit in UNITS]
# A cost is a mean of squares of PROBES Gaussians: its relative standard error, and that of the mean over all tokens at most.
ERROR = (2 / PROBES) ** 0.5


@pytest.fixture(scope="module")
def dense_pass(tmp_path_factory):
    """(checkpoint, ids, candidate ranks, what the dense passes learnt, from many probes)."""
    path = tmp_path_factory.mktemp("model")
    save_random("llama", path)
    checkpoint = Checkpoint.open(str(path))
    ids = torch.randint(3, 131, (BLOCKS, LENGTH), generator=torch.Generator().manual_seed(1))
    options = Options(rank=4).settled(checkpoint.config)
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        patch.setattr(dense, "PROBES", PROBES)
        decoder = Decoder(checkpoint, torch.device("cpu"))
        states = dense.run_forward(decoder, ids, Work(), Silent())
        learnt = dense.run_backward(decoder, ids, BLOCKS, states, options, Work(), Team(), Silent())
    return checkpoint, ids, dense.candidate_ranks(4, checkpoint.config.hidden_size), learnt


@torch.no_grad()
def moved(decoder: Decoder, ids: torch.Tensor, key: tuple[int, str], shift: torch.Tensor | float) -> torch.Tensor:
    """Returns logits ``[blocks, sequence, vocabulary]`` with ``shift`` added to one unit's output."""
    x = decoder.embed(ids)
    for index, layer in decoder.layers():
        for unit in UNITS:
            x = x + layer.contribution(unit, x) + (shift if (index, unit) == key else 0)
    return decoder.head()(x).double()[:, :-1]  # the last position has no target


@torch.no_grad()
def error_of(decoder: Decoder, ids: torch.Tensor, key: tuple[int, str], forecaster) -> torch.Tensor:
    """Returns the forecasts' errors ``[blocks, sequence, hidden]``, each where the stream before it is dense."""
    x = decoder.embed(ids)
    for index, layer in decoder.layers():
        for unit in UNITS:
            h = layer.norm(unit, x)
            y = layer.contribution(unit, x)
            if (index, unit) == key:
                return forecaster(h.float()).double() - y
            x = x + y
    raise AssertionError(key)


@pytest.mark.parametrize("key", KEYS)
def test_cost_is_the_gauss_newton_form_and_the_loss_to_second_order(key, dense_pass):
    checkpoint, ids, ranks, learnt = dense_pass
    decoder = Decoder(checkpoint, torch.device("cpu"), torch.float64)
    unit, rank = learnt[key], ranks.index(4)
    error = error_of(decoder, ids, key, unit.at(4).forecaster)
    form, loss = torch.zeros(BLOCKS, LENGTH), torch.zeros(BLOCKS, LENGTH)
    for block in range(BLOCKS):
        # One copy of the block for each token, in which this token alone is moved along its error.
        copies = ids[block].expand(LENGTH, LENGTH)
        alone = torch.diag_embed(error[block].T).permute(1, 2, 0)
        size = 1e-3 * decoder.embed(copies).norm() / LENGTH / alone.norm(dim=-1).max()
        plus, base, minus = (moved(decoder, copies, key, sign * size * alone) for sign in (1, 0, -1))
        p = base.softmax(-1)
        change = (plus - minus) / (2 * size)
        form[block] = 0.5 * ((p * change**2).sum(-1) - (p * change).sum(-1) ** 2).sum(-1)
        kl = sum((p * (base.log_softmax(-1) - to.log_softmax(-1))).sum(-1).sum(-1) for to in (plus, minus)) / 2
        loss[block] = kl / size**2
    assert (form.flatten() - loss.flatten()).abs().max() < 1e-3 * loss.max()  # the two references agree
    measured = unit.costs[rank].view(BLOCKS, LENGTH)
    last_of_all = key == (2, "mlp")
    counts = torch.ones(LENGTH, dtype=torch.bool)
    counts[-1] = False  # at the last layer's MLP, moving the last token changes no prediction that has a target
    if last_of_all or key == (2, "attention"):
        assert (measured[:, -1] <= 1e-9 * measured.max()).all()
    ratio = measured[:, counts] / loss[:, counts]
    assert (ratio - 1).abs().max() < 5 * ERROR
    assert abs(float(ratio.mean()) - 1) < 2 * ERROR


def test_costs_fall_with_rank(dense_pass):
    *_, ranks, learnt = dense_pass
    for unit in learnt.values():
        totals = unit.costs.sum(1).tolist()
        assert len(totals) == len(ranks)
        assert totals[0] > totals[-1]


def test_few_probes_give_the_same_mean(dense_pass, monkeypatch):
    """Unbiased: a handful of probes over both blocks lies around the mean of many, and other seeds lie elsewhere."""
    checkpoint, ids, ranks, learnt = dense_pass
    shorten(monkeypatch)
    monkeypatch.setattr(dense, "PROBES", 4)
    decoder, totals = Decoder(checkpoint, torch.device("cpu")), []
    for seed in range(12):
        options = Options(rank=4, seed=seed, router_width=0).settled(checkpoint.config)
        states = dense.run_forward(decoder, ids, Work(), Silent())
        again = dense.run_backward(decoder, ids, BLOCKS, states, options, Work(), Team(), Silent())
        totals.append(sum(float(unit.costs[ranks.index(4)].sum()) for unit in again.values()))
    many = sum(float(unit.costs[ranks.index(4)].sum()) for unit in learnt.values())
    values = torch.tensor(totals) / many
    assert values.std() > 0
    assert abs(float(values.mean()) - 1) < 4 * float(values.std()) / len(totals) ** 0.5 + 0.05


@pytest.mark.parametrize("kv_cache", ["full", "strict"])
def test_routers_learn_the_cost_of_the_mean_rank_by_what_the_unit_saves(kv_cache, dense_pass, monkeypatch):
    """Also where keys and values are saved as well."""
    checkpoint, seen, fit = dense_pass[0], [], dense.fit_router
    shorten(monkeypatch)

    def watched(h, cost, width, share, *rest):
        seen.append((cost, share))
        return fit(h, cost, width, share, *rest)

    monkeypatch.setattr(dense, "fit_router", watched)
    decoder, ids = Decoder(checkpoint, torch.device("cpu")), random_blocks().fit
    options = Options(rank=4, kv_cache=kv_cache).settled(checkpoint.config)
    states = dense.run_forward(decoder, ids, Work(), Silent())
    learnt = dense.run_backward(decoder, ids, len(ids), states, options, Work(), Team(), Silent())
    budget, ranks = options.budget(checkpoint.config), dense.candidate_ranks(4, checkpoint.config.hidden_size)
    visited = [(layer, unit) for layer in (2, 1, 0) for unit in options.units]
    for key, (cost, share) in zip(visited, seen, strict=True):
        assert torch.equal(cost, learnt[key].costs[ranks.index(4)])
        assert share == budget.share(key[1])
