"""Two processes that share a calibration end where one process ends."""

import pytest
import torch
from calibrate_worker import SHARED, share, start
from calibrations import assert_same, furthest, normalised, random_blocks, shorten, what_it_gave
from models import save_random

from ir_convert.calibrate import calibrate
from ir_convert.checkpoint import Checkpoint
from ir_convert.routing import Routing


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """(checkpoint, folder with what two processes wrote)."""
    path = tmp_path_factory.mktemp("shared")
    save_random("llama", path / "model")
    processes = [start(share, str(path / "model"), path, rank, 2) for rank in range(2)]
    for process in processes:
        process.join(timeout=120)
    ended = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert ended == [0, 0]
    return Checkpoint.open(str(path / "model")), path


@pytest.fixture(scope="module")
def alone(shared):
    """What one process gives, by name."""
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        return {
            name: calibrate(shared[0], random_blocks(*counts), options) for name, (counts, options) in SHARED.items()
        }


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_end_where_one_does(name, shared, alone):
    checkpoint, path = shared
    one, two = alone[name], Routing.load(path / f"{name}.0")
    assert list(one.units) == list(two.units)
    forecasts, scores = furthest(one.units, two.units, normalised(checkpoint))
    assert {key: unit.forecaster.rank for key, unit in one.units.items()} == {
        key: unit.forecaster.rank for key, unit in two.units.items()
    }
    assert forecasts < 3e-3
    assert scores < 1e-3
    torch.testing.assert_close(two.curve.sparsity, one.curve.sparsity, atol=5e-3, rtol=0)
    torch.testing.assert_close(two.curve.threshold, one.curve.threshold, atol=1e-2, rtol=0)


@pytest.mark.parametrize("name", SHARED)
def test_all_processes_have_the_same(name, shared):
    _, path = shared
    first, second = (Routing.load(path / f"{name}.{rank}") for rank in range(2))
    assert_same(first, second)


def test_killed_a_step_apart(shared):
    """One process had saved a step when all were killed, the other had not: they go on together."""
    _, path = shared
    unbroken = Routing.load(path / "odd.0")
    for rank in range(2):
        assert_same(Routing.load(path / f"resumed.{rank}"), unbroken)
        assert int((path / f"killed.{rank}").read_text()) > 10
    assert what_it_gave(unbroken)["seed"] == 1
