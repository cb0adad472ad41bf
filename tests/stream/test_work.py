"""The work folder: nothing counts as done before it is whole, and disk and memory are the same."""

import pytest
import torch

from ir_convert.stream import States, Team, Work

RESULT = {"fp32": torch.randn(3, 4), "fp64": torch.randn(2, dtype=torch.float64), "flags": torch.tensor([True, False])}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


@pytest.fixture(params=["memory", "files"])
def any_work(request, tmp_path):
    return Work(tmp_path / "work" if request.param == "files" else None)


def test_states_keep_what_is_written(any_work):
    values = torch.randn(7, 3, 4)
    states = any_work.states("x.0", values.shape)
    assert len(states) == 7
    for rows in (slice(4, 7), slice(0, 2), slice(2, 4)):
        states[rows] = values[rows]
    states.finish()
    assert torch.equal(states[slice(0, 7)], values)
    assert torch.equal(states[slice(3, 5)], values[3:5])
    states[slice(3, 4)] = torch.zeros(1, 3, 4)
    assert not states[slice(3, 4)].any()
    assert torch.equal(states[slice(4, 7)], values[4:])
    states.discard()
    states.discard()  # again is no error


def test_states_of_an_earlier_run_keep_their_content(tmp_path):
    values = torch.randn(5, 2)
    Work(tmp_path).states("x.1", (5, 2))[slice(0, 5)] = values
    assert torch.equal(Work(tmp_path).states("x.1", (5, 2))[slice(0, 5)], values)
    # A file of another size is not this one's.
    other = States((6, 2), tmp_path / "x.1.states")
    other[slice(2, 3)] = torch.ones(1, 2)
    assert other[slice(0, 6)].sum() == 2


def test_states_take_no_room_before_they_are_written(tmp_path):
    states = Work(tmp_path).states("x.2", (5, 2))
    assert not list(tmp_path.iterdir())
    states.discard()
    states[slice(0, 1)] = torch.ones(1, 2)
    assert (tmp_path / "x.2.states").stat().st_size == 4 * 5 * 2
    states.discard()
    assert not list(tmp_path.iterdir())


def test_a_step_is_done_only_when_saved(tmp_path):
    work = Work(tmp_path / "deep" / "folder")
    assert work.load("a") is None
    work.states("x", (2, 2))[slice(0, 2)] = torch.zeros(2, 2)
    assert not work.begun
    work.save("a", RESULT)
    assert work.begun
    work.states("x", (2, 2)).discard()
    again = Work(work.folder)
    assert same(again.load("a"), RESULT)
    assert again.load("b") is None
    assert again.resumed == 1
    assert [path.name for path in work.folder.iterdir()] == ["a.safetensors"]


def test_what_is_saved_may_be_any_tensor(tmp_path):
    """On a graph, a view, not contiguous."""
    base = torch.randn(4, 6, requires_grad=True)
    Work(tmp_path).save("a", {"view": base.T, "part": base[1:3], "expanded": base[0, 0].expand(5)})
    again = Work(tmp_path).load("a")
    assert same(again, {"view": base.detach().T, "part": base.detach()[1:3], "expanded": base.detach()[0, 0].expand(5)})
    assert not again["view"].requires_grad


def test_memory_alone_forgets():
    work = Work()
    work.save("a", RESULT)
    assert work.load("a") is None
    assert work.resumed == 0
    work.clear()


def test_once_computes_once(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return RESULT

    for _ in range(3):
        assert same(Work(tmp_path).once("a", compute), RESULT)
    assert len(calls) == 1
    Work().once("a", compute)
    assert len(calls) == 2


def test_once_that_fails_is_not_done(tmp_path):
    with pytest.raises(ZeroDivisionError):
        Work(tmp_path).once("a", lambda: {"x": torch.ones(1 // 0)})
    assert Work(tmp_path).load("a") is None


def test_half_written_files_are_ignored(tmp_path, monkeypatch):
    work = Work(tmp_path)
    work.save("a", RESULT)
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "b.tmp").write_bytes(whole[: len(whole) // 2])
    assert Work(tmp_path).load("b") is None
    work.save("b", RESULT)
    assert same(Work(tmp_path).load("b"), RESULT)
    assert not (tmp_path / "b.tmp").exists()

    # Killed before what was written is known to be on the disk: not done.
    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("ir_convert.stream.work.sync", killed)
    with pytest.raises(KeyboardInterrupt):
        work.save("c", RESULT)
    assert Work(tmp_path).load("c") is None


def test_cleared_work_is_gone(tmp_path):
    work = Work(tmp_path / "work")
    work.save("a", RESULT)
    work.states("x.0", (2, 2))
    work.clear()
    assert not (tmp_path / "work").exists()
    work.clear()


def test_a_step_is_done_when_all_processes_have_it(tmp_path, monkeypatch):
    """One that was a step ahead when the run was killed does that step again, with the others."""
    work = Work(tmp_path)
    work.save("a", RESULT)
    others = {"say": True}
    monkeypatch.setattr(Team, "agree", lambda team, yes: yes and others["say"])
    assert Work(tmp_path).load("a") is not None
    others["say"] = False
    resumed = Work(tmp_path)
    assert resumed.load("a") is None
    assert resumed.resumed == 0


def test_saving_waits_for_the_other_processes(tmp_path, monkeypatch):
    """What only that step needed may go after it, and must not while another process may have to do the step again."""
    seen = []
    monkeypatch.setattr(Team, "wait", lambda team: seen.append((tmp_path / "a.safetensors").is_file()))
    Work(tmp_path).save("a", RESULT)
    assert seen == [True]


def test_a_damaged_step_is_done_again(tmp_path):
    work = Work(tmp_path)
    work.save("forward.1", RESULT)
    (tmp_path / "forward.1.safetensors").write_bytes(b"")
    assert work.load("forward.1") is None
    assert same(work.once("forward.1", lambda: RESULT), RESULT)
    assert same(work.load("forward.1"), RESULT)
