"""One pass over the layers: forwards, backwards, stopped anywhere and gone on with."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ir_convert.errors import UserError
from ir_convert.progress import Silent
from ir_convert.stream import Work, by_layer, named, require_finite, sweep

LAYERS, SHAPE = 5, (3, 4)
DECODER = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=LAYERS), layer=lambda index: f"layer {index}")
START = torch.arange(12.0).view(SHAPE)


class Killed(BaseException):
    pass


class Walk:
    """A pass that multiplies and adds, so that the order of the layers shows; counts what it does."""

    def __init__(self, fails_at=None, halfway=False):
        self.done, self.starts, self.fails_at, self.halfway = [], 0, fails_at, halfway

    def start(self, target):
        self.starts += 1
        target[slice(0, 3)] = START

    def step(self, index, layer, source, target):
        assert layer == f"layer {index}"
        before = source[slice(0, 3)].clone()
        if index == self.fails_at and self.halfway:
            target[slice(0, 2)] = torch.full((2, 4), -99.0)
        if index == self.fails_at:
            raise Killed
        self.done.append(index)
        target[slice(0, 3)] = before * 2 + index
        return {"sum": before.sum(), "view": before.T}

    def run(self, work, **options):
        return sweep(DECODER, work, "walk", Silent(), SHAPE, self.start, self.step, tokens=12, **options)


def expected(order):
    states = [START]
    for index in order:
        states.append(states[-1] * 2 + index)
    return states


def whole(states):
    return [x[slice(0, 3)] for x in states]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("folder", [None, "work"])
def test_order_results_and_states(folder, backwards, keep, tmp_path):
    work, walk = Work(tmp_path / folder if folder else None), Walk()
    results, states = walk.run(work, backwards=backwards, keep=keep)
    order = list(range(LAYERS))[:: -1 if backwards else 1]
    assert walk.done == order
    assert walk.starts == 1
    want = expected(order)
    assert all(map(torch.equal, whole(states), want if keep else want[-1:]))
    assert len(states) == (LAYERS + 1 if keep else 1)
    # Results in the order of layers, whichever way they were visited.
    sums = {index: x.sum() for index, x in zip(order, want, strict=False)}
    assert [result["sum"] for result in results] == [sums[index] for index in range(LAYERS)]
    if folder:
        assert len(list(work.folder.glob("*.states"))) == len(states)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("halfway", [False, True])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_stopped_pass_goes_on_where_it_was(layer, halfway, backwards, keep, tmp_path):
    unbroken = Walk().run(Work(), backwards=backwards, keep=keep)
    first = Walk(fails_at=layer, halfway=halfway)
    with pytest.raises(Killed):
        first.run(Work(tmp_path), backwards=backwards, keep=keep)
    work, second = Work(tmp_path), Walk()
    results, states = second.run(work, backwards=backwards, keep=keep)
    assert first.done + second.done == list(range(LAYERS))[:: -1 if backwards else 1]
    assert work.resumed == len(first.done)
    assert second.starts == (0 if first.done else 1)
    assert all(map(torch.equal, whole(states), whole(unbroken[1])))
    for result, other in zip(results, unbroken[0], strict=True):
        assert result.keys() == other.keys()
        assert all(torch.equal(result[name], other[name]) for name in result)


def test_a_finished_pass_is_not_done_again(tmp_path):
    unbroken, states = Walk().run(Work(tmp_path))
    walk = Walk()
    results, again = walk.run(Work(tmp_path))
    assert not walk.done
    assert not walk.starts
    assert torch.equal(again[0][slice(0, 3)], states[0][slice(0, 3)])
    assert [result["sum"] for result in results] == [result["sum"] for result in unbroken]


@pytest.mark.parametrize("after", range(LAYERS))
def test_stopped_between_saving_and_tidying(after, tmp_path, monkeypatch):
    """The step is done; the states before it are still there, and do no harm."""
    saves, save = [], Work.save

    def save_and_die(work, step, result):
        save(work, step, result)
        saves.append(step)
        if len(saves) == after + 1:
            raise Killed

    monkeypatch.setattr(Work, "save", save_and_die)
    with pytest.raises(Killed):
        Walk().run(Work(tmp_path))
    monkeypatch.undo()
    walk = Walk()
    _, states = walk.run(Work(tmp_path))
    assert walk.done == list(range(after + 1, LAYERS))
    assert torch.equal(states[0][slice(0, 3)], expected(range(LAYERS))[-1])


def test_steps_start_from_states_that_are_on_the_disk(tmp_path, monkeypatch):
    """A step counts as done once it is saved, so what it wrote must have been made durable before."""
    order = []
    monkeypatch.setattr("ir_convert.stream.work.States.finish", lambda states: order.append("states"))
    monkeypatch.setattr(Work, "save", lambda work, step, result: order.append("step"))
    Walk().run(Work(tmp_path))
    assert order == ["states", *["states", "step"] * LAYERS]


@given(
    bad=st.integers(0, 6), start=st.integers(0, 50), value=st.sampled_from([float("nan"), float("inf"), -float("inf")])
)
def test_require_finite_names_the_place(bad, start, value):
    x = torch.randn(7, 3, 2)
    require_finite(x, 4, "mlp", slice(start, start + 7))
    x[bad, 1, 1] = value
    x[6, 0, 0] = value  # the first one is named
    with pytest.raises(UserError, match=rf"layer 4, mlp: NaN or infinity in the hidden states.* block {start + bad}:"):
        require_finite(x, 4, "mlp", slice(start, start + 7))
    with pytest.raises(UserError, match="in the gradients"):
        require_finite(x, 4, "mlp", slice(start, start + 7), "gradients")


def test_by_layer_parts_units():
    results = [
        named("attention", {"a.b": torch.ones(1)}) | named("mlp", {"a.b": torch.zeros(1)}),
        {"done": torch.ones(1)},
    ]
    parted = by_layer(results, ("attention", "mlp"))
    assert parted[0, "attention"]["a.b"] == 1
    assert parted[0, "mlp"]["a.b"] == 0
    assert parted[1, "mlp"] == {}
