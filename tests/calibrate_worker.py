"""What tests of calibration run in processes of their own."""

import multiprocessing
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from calibrations import random_blocks, shorten

from ir_convert.calibrate import Options, calibrate
from ir_convert.checkpoint import Checkpoint
from ir_convert.stream import Team, Work

# Blocks by part, and options; some parts do not divide by two.
SHARED = {
    "even": ((8, 6, 4), Options(sparsity=0.3)),
    "odd": ((9, 5, 3), Options(sparsity=0.3, seed=1)),
    "strict": ((7, 5, 3), Options(sparsity=0.35, kv_cache="strict")),
    "mlp": ((8, 4, 4), Options(sparsity=0.2, units=("mlp",))),
}


class Killed(BaseException):
    pass


def start(target, *args) -> BaseProcess:
    """Starts a process that has imported what is slow to import, but has computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "accelerate"])
    process = context.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def dawdle(model: str, folder: Path, options: Options) -> None:
    """Calibrates with its work in ``folder``, and waits before each step that it saves: it is to be killed on the way."""
    torch.set_num_threads(1)
    patch, save = pytest.MonkeyPatch(), Work.save

    def dawdling_save(work: Work, step: str, result: dict) -> None:
        time.sleep(0.1)
        save(work, step, result)

    shorten(patch)
    patch.setattr(Work, "save", dawdling_save)
    calibrate(Checkpoint.open(model), random_blocks(), options, work=Work(folder))


def share(model: str, out: Path, rank: int, size: int) -> None:
    """Calibrates as one of several processes; writes its routings into ``out``, their names ending in its rank.

    First each of ``SHARED``; then ``odd`` again with a work folder, all processes killed, a step apart, at every step.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=size)
    checkpoint, team = Checkpoint.open(model), Team()
    shorten(pytest.MonkeyPatch())
    for name, (counts, options) in SHARED.items():
        routing = calibrate(checkpoint, random_blocks(*counts), options, team=team)
        routing.save(out / f"{name}.{rank}")

    counts, options = SHARED["odd"]
    killed = 0
    while True:
        with pytest.MonkeyPatch.context() as deadly:
            _die_a_step_apart(deadly, at=2)
            try:
                work = Work(out / f"work.{rank}")
                routing = calibrate(checkpoint, random_blocks(*counts), options, work=work, team=team)
                break
            except Killed:
                killed += 1
        dist.barrier()
    routing.save(out / f"resumed.{rank}")
    (out / f"killed.{rank}").write_text(str(killed))
    Team().disband()


def _die_a_step_apart(patch: pytest.MonkeyPatch, at: int) -> None:
    """Kills the first process when it has saved its ``at``-th step, and the others before they have."""
    save, saves = Work.save, []

    def dying_save(work: Work, step: str, result: dict) -> None:
        saves.append(step)
        if len(saves) == at:
            if Team().rank > 0:
                raise Killed
            patch.setattr(Team, "wait", die)
        save(work, step, result)

    def die(team: Team) -> None:
        raise Killed

    patch.setattr(Work, "save", dying_save)
