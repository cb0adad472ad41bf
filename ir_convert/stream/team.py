"""Processes that share a calibration's blocks: each takes every n-th block, and what they measure is added up."""

import gc
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from ..errors import UserError

PART = 8192  # tokens that a mean takes at once: a copy of all in float64 would be the largest thing in memory
SMALL = 1 << 20  # elements of a tensor that is not sent on its own
# One process writes what the others wait for; launchers stop all where one fails, so nobody waits in vain.
PATIENCE = timedelta(days=1)


class Team:
    """One process, or those that ``accelerate launch`` (or torchrun) started.

    Attributes:
        rank: this process, from 0.
        size: of how many.
    """

    def __init__(self, alone: bool = False) -> None:
        together = not alone and dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1
        self._on_gpu = together and "nccl" in dist.get_backend()

    @classmethod
    def assemble(cls, device: torch.device) -> "Team":
        """Joins the processes that a launcher started, if one did."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            if device.type == "cuda" and here > (count := torch.cuda.device_count()):
                raise UserError(
                    f"{here} processes were started for {count} GPUs: start one for each, or give --device cpu"
                )
            PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
        return cls()

    def disband(self) -> None:
        """Ends the processes' being together, when all have done their work."""
        if self.size > 1:
            gc.collect()  # a group that some model still holds would end with the interpreter, which may abort it
            self.wait()
            dist.destroy_process_group()

    def device(self, device: torch.device) -> torch.device:
        """Returns this process's own device of that type."""
        return PartialState().device if self.size > 1 and device.type != "cpu" else device

    def mine(self, blocks: Tensor) -> Tensor:
        """Returns this process's share of ``blocks[count, ...]``."""
        return blocks[self.rank :: self.size]

    def local(self, tokens: Tensor, block: int) -> Tensor:
        """Picks, of token numbers over all blocks of ``block`` tokens, this process's, as places in its share."""
        if self.size == 1:
            return tokens
        blocks = tokens // block
        return ((blocks // self.size) * block + tokens % block)[blocks % self.size == self.rank]

    def sum(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Adds up tensors over all processes, in place, and returns them."""
        tensors = list(tensors)
        if self.size > 1:
            for group in _parcels(tensors):
                together = torch.cat([tensor.flatten() for tensor in group]) if len(group) > 1 else group[0]
                # NCCL adds up what is on GPUs alone.
                there = together.cuda() if self._on_gpu else together
                dist.all_reduce(there)
                if there is group[0]:
                    continue
                parts = there.flatten().split([tensor.numel() for tensor in group])
                for tensor, part in zip(group, parts, strict=True):
                    tensor.copy_(part.view_as(tensor))
        return tensors

    def gather(self, values: Tensor, count: int, axis: int = 0) -> Tensor:
        """Puts every process's values back in the order of all ``count`` blocks along ``axis``; on the CPU."""
        if self.size == 1:
            return values.cpu()
        values = values.movedim(axis, 0)
        whole = torch.zeros(count, *values.shape[1:], dtype=values.dtype, device=values.device)
        whole[self.rank :: self.size] = values
        return self.sum([whole])[0].movedim(0, axis).cpu()

    def sample(self, blocks: int, block: int, device: torch.device) -> "Sample":
        """Returns what draws tokens from ``blocks`` blocks of ``block`` tokens, counted over all processes."""
        return Sample(self, blocks, block, device)

    def agree(self, yes: bool) -> bool:
        """Returns whether all processes say yes."""
        return not self.sum([torch.tensor(0.0 if yes else 1.0)])[0]

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.size > 1:
            dist.barrier()


def _parcels(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Puts small tensors of a kind together: an exchange takes a millisecond on CPUs, however little is in it."""
    small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    large = []
    for tensor in tensors:
        if tensor.numel() <= SMALL:
            small[tensor.dtype, tensor.device].append(tensor)
        else:
            large.append([tensor])
    return [*small.values(), *large]


@dataclass(frozen=True)
class Sample:
    """Draws the same tokens however many processes share them; each gets those that are its own.

    Attributes:
        blocks, block: how many blocks there are over all processes, of how many tokens.
    """

    team: Team
    blocks: int
    block: int
    device: torch.device

    @property
    def tokens(self) -> int:
        return self.blocks * self.block

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws ``count`` tokens over all processes; returns the places of this process's (a CPU generator decides)."""
        rows = torch.randint(self.tokens, (count,), generator=generator)
        return self.team.local(rows, self.block).to(self.device)

    def mean(self, values: Tensor, of: Callable[[Tensor], Tensor] = lambda part: part) -> Tensor:
        """Returns the mean over all processes' tokens of ``of(values[tokens, ...])``, fp32, computed a part at a time."""
        total = torch.stack([of(part).double().sum(0) for part in values.split(PART)]).sum(0)
        return self.team.sum([total])[0].div(self.tokens).float()
