"""Processes' shares part the whole: checked without processes, by giving out ranks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ir_convert.errors import UserError
from ir_convert.stream import Team
from ir_convert.stream import team as module

SIZES = st.integers(1, 5)


def members(size: int) -> list[Team]:
    teams = [Team() for _ in range(size)]
    for rank, team in enumerate(teams):
        team.rank, team.size = rank, size
    return teams


@given(size=SIZES, count=st.integers(1, 13), block=st.integers(1, 6))
def test_shares_part_the_blocks(size, count, block):
    tokens = torch.arange(count * block)
    shares = [team.mine(tokens.view(count, block)) for team in members(size)]
    assert torch.cat(shares).flatten().sort().values.equal(tokens)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(size=SIZES, count=st.integers(1, 13), block=st.integers(1, 6), seed=st.integers(0, 99), draws=st.integers(1, 60))
def test_draws_are_the_same_however_many_share_them(size, count, block, seed, draws):
    """Every process finds in its share its part of the tokens that one process alone would draw."""
    values = torch.randn(count, block)

    def drawn(teams):
        parts = []
        for team in teams:
            sample = team.sample(count, block, torch.device("cpu"))
            assert sample.tokens == count * block
            rows = sample.draw(draws, torch.Generator().manual_seed(seed))
            parts.append(team.mine(values).flatten()[rows])
        return torch.cat(parts)

    alone, shared = drawn(members(1)), drawn(members(size))
    assert alone.sort().values.equal(shared.sort().values)


@given(size=SIZES, count=st.integers(1, 9), axis=st.integers(0, 2), data=st.data())
def test_gathering_puts_shares_back(size, count, axis, data):
    shape = [2, 3, 2]
    shape[axis] = count
    whole = torch.randn(shape, dtype=data.draw(st.sampled_from([torch.float32, torch.float64])))
    teams, parts = members(size), []
    for team in teams:  # what each process adds to the sum
        team.sum = lambda tensors: parts.append(tensors[0].clone()) or list(tensors)
        mine = team.mine(whole.movedim(axis, 0)).movedim(0, axis)
        gathered = team.gather(mine, count, axis)
        assert gathered.shape == whole.shape
    if size > 1:
        gathered = sum(parts).movedim(0, axis)
    assert torch.equal(gathered, whole)


def test_mean_is_over_all_processes_tokens(monkeypatch):
    monkeypatch.setattr(module, "PART", 7)
    values = torch.randn(6 * 4, 5)
    sums = []
    for team in members(3):
        team.sum = lambda tensors: sums.append(tensors[0].clone()) or list(tensors)
        mine = team.mine(values.view(6, 4, 5)).flatten(0, 1)
        team.sample(6, 4, torch.device("cpu")).mean(mine)
    torch.testing.assert_close((sum(sums) / 24).float(), values.mean(0))
    alone = Team().sample(6, 4, torch.device("cpu")).mean(values, torch.square)
    torch.testing.assert_close(alone, values.square().mean(0))
    assert alone.dtype == torch.float32


def test_gpus_are_counted_on_each_machine(monkeypatch):
    """As processes are."""
    joined = []
    monkeypatch.setattr(module, "PartialState", lambda **settings: joined.append(settings["cpu"]))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    Team.assemble(torch.device("cuda"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    Team.assemble(torch.device("cpu"))
    assert joined == [False, True]
    with pytest.raises(UserError, match="3 processes were started for 2 GPUs"):
        Team.assemble(torch.device("cuda"))


def test_one_process_is_a_team():
    team = Team()
    assert (team.rank, team.size) == (0, 1)
    x = torch.randn(3)
    assert team.sum([x])[0] is x
    assert team.agree(True)
    assert not team.agree(False)
    team.wait()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_nccl_adds_up_what_lies_on_the_cpu(tmp_path):
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        team = Team()
        team.size = 2  # so that it asks the other one, who is not there: sums stay what they are
        x, y = torch.randn(4), torch.randn(4, device="cuda")
        before = x.clone(), y.clone()
        for tensor, was, given_ in zip(team.sum([x, y]), before, (x, y), strict=True):
            assert tensor is given_
            assert torch.equal(tensor, was)
        assert team.agree(True)
        assert not team.agree(False)
    finally:
        torch.distributed.destroy_process_group()


@given(sizes=st.lists(st.integers(0, 12), max_size=7), limit=st.integers(0, 12), data=st.data())
def test_small_tensors_are_added_up_together(sizes, limit, data):
    """In place and each to its own place, in as few exchanges as there are kinds of small tensors, and large tensors."""
    kinds = data.draw(st.lists(st.sampled_from([torch.float32, torch.float64]), min_size=7, max_size=7))
    tensors = [torch.randn(size, 1, dtype=kind) for size, kind in zip(sizes, kinds, strict=False)]
    before, exchanged = [tensor.clone() for tensor in tensors], []

    def doubled(tensor):  # as if another process had the same
        exchanged.append(tensor.mul_(2))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.dist, "all_reduce", doubled)
        patch.setattr(module, "SMALL", limit)
        summed = members(2)[0].sum(tensors)
    assert all(given is returned for given, returned in zip(tensors, summed, strict=True))
    assert all(torch.equal(after, 2 * value) for after, value in zip(tensors, before, strict=True))
    small = {tensor.dtype for tensor in tensors if tensor.numel() <= limit}
    assert len(exchanged) == len(small) + sum(tensor.numel() > limit for tensor in tensors)


def test_what_lies_on_the_cpu_is_added_up_on_gpus(monkeypatch):
    """NCCL takes what is on GPUs alone: a lone tensor of any shape goes there and back, as several do."""
    monkeypatch.setattr(module.dist, "all_reduce", lambda tensor: tensor.mul_(2))
    monkeypatch.setattr(torch.Tensor, "cuda", torch.Tensor.clone)
    (team,) = members(1)
    team.size, team._on_gpu = 2, True
    for shapes in ([()], [(3, 4)], [(2, 3), (), (5,)], [(0,)]):
        tensors = [torch.randn(shape) for shape in shapes]
        expected = [2 * tensor for tensor in tensors]
        for tensor, added, same in zip(team.sum(tensors), expected, tensors, strict=True):
            assert tensor is same
            assert torch.equal(tensor, added)
    assert team.agree(True)
    assert not team.agree(False)
