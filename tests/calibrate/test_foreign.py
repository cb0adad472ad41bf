"""Some fit blocks hold random tokens."""

import torch
from calibrations import random_blocks, shorten
from hypothesis import given
from hypothesis import strategies as st

from ir_convert.calibrate import Options, calibrate, foreign, local
from ir_convert.calibrate.threshold import Meter


@given(
    count=st.integers(1, 40),
    block=st.integers(1, 30),
    bos=st.booleans(),
    seed=st.integers(0, 9),
    vocabulary=st.sets(st.integers(100, 140), min_size=1),
)
def test_every_fourth_block_is_random(count, block, bos, seed, vocabulary):
    fit = torch.randint(50, (count, block), generator=torch.Generator().manual_seed(seed))
    fit[0, 0], fit[-1, 0] = 50, 51  # no common first token, if there are two blocks
    if bos:
        fit[:, 0] = 7
    before, allowed = fit.clone(), torch.tensor(sorted(vocabulary))
    mixed, mask = foreign.with_foreign(fit, allowed, seed), foreign.foreign(count)
    assert torch.equal(fit, before)
    assert mask.nonzero().flatten().tolist() == list(range(3, count, 4))
    assert torch.equal(mixed[~mask], fit[~mask])
    drawn = mixed[mask]
    if bos:
        assert (drawn[:, 0] == 7).all()
        drawn = drawn[:, 1:]
    assert torch.isin(drawn, allowed).all()
    assert torch.equal(mixed, foreign.with_foreign(fit, allowed, seed))


def test_every_token_is_as_likely_as_another():
    vocabulary = torch.tensor([3, 5, 900])
    mixed = foreign.with_foreign(torch.randint(3, (60, 500)), vocabulary, 0)[foreign.foreign(60)]
    shares = torch.stack([(mixed == token).float().mean() for token in vocabulary])
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3), atol=0.03, rtol=0)
    assert not torch.equal(mixed, foreign.with_foreign(torch.ones(60, 500).long(), vocabulary, 1)[foreign.foreign(60)])


def test_none_where_it_is_turned_off(monkeypatch):
    monkeypatch.setattr(foreign, "EVERY", 0)
    fit = torch.randint(9, (13, 4))
    assert torch.equal(foreign.with_foreign(fit, torch.tensor([99]), 0), fit)


def test_random_blocks_change_the_fit_and_nothing_is_said_of_them(checkpoint, monkeypatch):
    """Costs that are reported are those of the text."""
    shorten(monkeypatch)
    seen = []
    monkeypatch.setattr(local, "foreign", lambda count: seen.append(count) or foreign.foreign(count))
    mixed = calibrate(checkpoint, random_blocks(), Options(sparsity=0.3))
    monkeypatch.setattr(foreign, "EVERY", 0)
    plain = calibrate(checkpoint, random_blocks(), Options(sparsity=0.3))
    assert seen == [8, 8]
    key = (0, "mlp")
    assert not torch.equal(mixed.units[key].router.hidden, plain.units[key].router.hidden)
    assert mixed.metadata["calibration_sha256"] == plain.metadata["calibration_sha256"]


def test_what_is_reported_is_of_the_text(checkpoint, monkeypatch):
    """Costs and scores of random blocks count nowhere but in the fits."""
    shorten(monkeypatch)
    backward, near, seen = local.run_backward, Meter.near, []

    def spoilt(decoder, ids, *rest):
        learnt, random = backward(decoder, ids, *rest), foreign.foreign(len(ids))
        for unit in learnt.values():
            unit.costs.view(len(unit.costs), len(ids), -1)[:, random] = 1e9
            unit.scores.view(len(ids), -1)[random] = 1e9
        return learnt

    def watched(self, units, scores, *rest):
        seen.extend(scores.values())
        return near(self, units, scores, *rest)

    monkeypatch.setattr(local, "run_backward", spoilt)
    monkeypatch.setattr(Meter, "near", watched)
    made = calibrate(checkpoint, random_blocks(), Options(sparsity=0.3))
    assert all(entry["cost_nats"] < 1e6 for entry in made.metadata["per_unit"])
    assert seen
    assert all(scores.max() < 1e6 for scores in seen)
