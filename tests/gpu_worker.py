"""Does things on a GPU that is none and on the CPU, in a process of its own: ``python gpu_worker.py FOLDER``."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calibrations import random_blocks, shorten
from fake_gpu import gpu
from models import CONFIGS, random_routing, save_random

from ir_convert.calibrate import Options, calibrate
from ir_convert.checkpoint import Checkpoint
from ir_convert.export import hf
from ir_convert.stream import Work

OPTIONS = Options(sparsity=0.2, rank=3, router_width=4)
RECIPES = [
    OPTIONS,
    replace(OPTIONS, rank=0),
    replace(OPTIONS, polish=2, gradient_checkpointing=True, kv_cache="strict"),
    replace(OPTIONS, recipe="paper", steps=2, lora=True),
    replace(OPTIONS, recipe="greedy", steps=2, rank=None),
]


def recipes(folder: Path) -> None:
    for index, options in enumerate(RECIPES):
        _calibrate("llama", options, folder / str(index))


def families(folder: Path) -> None:
    for family in ("gemma3", "phi3-long", "olmo2", "smollm3", "qwen3_moe"):
        _calibrate(family, replace(OPTIONS, polish=1), folder / family)


def _calibrate(family: str, options: Options, folder: Path) -> None:
    save_random(family, folder)
    checkpoint = Checkpoint.open(str(folder))
    expected = calibrate(checkpoint, random_blocks(), options)
    with gpu():
        made = calibrate(checkpoint, random_blocks(), options, device="gpu", work=Work(folder / "work"))
    made.save(folder / "r.safetensors")
    for key, unit in expected.units.items():
        for name, tensor in unit.tensors().items():
            torch.testing.assert_close(made.units[key].tensors()[name], tensor, atol=1e-3, rtol=1e-3)


def checkpoints(folder: Path) -> None:
    """Left-padded texts through what was exported, with a cache and a controller."""
    ids = torch.randint(3, 131, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[2, :1] = 0
    for family in CONFIGS:
        for kv_cache in ("full", "strict"):
            save_random(family, folder / family)
            checkpoint = Checkpoint.open(str(folder / family))
            routing = random_routing(checkpoint)
            routing.metadata["kv_cache"] = kv_cache
            out = folder / f"{family}-{kv_cache}"
            out.mkdir()
            hf.write(checkpoint, routing, out, torch.float32)
            model = hf.load(out, dtype=torch.float32).eval()
            with torch.no_grad():
                here = _answers(model, ids, mask)
                with gpu():
                    there = [answer.cpu() for answer in _answers(model.to("gpu"), ids.to("gpu"), mask.to("gpu"))]
            torch.testing.assert_close(there[0][mask.bool()], here[0][mask.bool()], atol=1e-4, rtol=0)
            assert torch.equal(there[1], here[1]), out.name
            torch.testing.assert_close(there[2], here[2], atol=1e-4, rtol=0)


def _answers(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    model.set_sparsity(0.2)
    answers = [model(input_ids=ids, attention_mask=mask).logits]
    answers.append(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False))
    with model.hold_sparsity(0.3):
        for _ in range(2):
            held = model(input_ids=ids).logits
    return [*answers, held]


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        for do in (recipes, families, checkpoints):
            do(Path(sys.argv[1]) / do.__name__)
