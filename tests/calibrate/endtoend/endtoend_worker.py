"""Trains short end-to-end runs; started by ``test_endtoend_processes.py``, on one process or on several that share the work.

Usage: endtoend_worker.py MODEL ROUTING OUT. The first process writes OUT, a file of {run: [tensors]}.
"""

import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from ir_convert.calibrate.endtoend import Descent, train_lora, train_paper, train_polish, uniform_shapes
from ir_convert.calibrate.endtoend import model as routed_model
from ir_convert.checkpoint import Checkpoint
from ir_convert.routing import Routing
from ir_convert.stream import Team

SHORT = Descent(steps=4, batch=4, lr=3e-3)


def flat(units):
    return [tensor for routed in units.values() for tensor in routed.tensors().values()]


def runs(model: str, routing: str) -> dict[str, list[torch.Tensor]]:
    """Returns what each run of this process count ends with."""
    checkpoint, units = Checkpoint.open(model), Routing.load(Path(routing)).units
    ids = torch.randint(3, checkpoint.config.vocab_size, (8, 16), generator=torch.Generator().manual_seed(5))
    shapes = uniform_shapes(checkpoint.config, rank=3, width=4)
    options = {"threshold": 0.3, "sparsity": 0.3, "descent": SHORT}
    paper, _ = train_paper(checkpoint, ids, shapes, sparsity=0.3, forecasters=SHORT, routers=SHORT)
    plain, _ = train_polish(checkpoint, units, ids, forecaster_lr=1e-3, **options)
    checkpointed, _ = train_polish(checkpoint, units, ids, kv_cache="strict", gradient_checkpointing=True, **options)
    distilled, _ = train_polish(checkpoint, units, ids, distil=True, **options)
    lora, _ = train_lora(checkpoint, units, ids, threshold=0.3, rank=2, descent=SHORT)
    return {
        "paper": flat(paper),
        "polish": flat(plain),
        "strict polish, checkpointed": flat(checkpointed),
        "distilled polish": flat(distilled),
        "lora": [tensor for pair in lora.values() for tensor in pair],
    }


def main() -> None:
    torch.set_num_threads(1)
    model, routing, out = sys.argv[1:]
    results = {"data": runs(model, routing)}
    if PartialState().num_processes > 1:
        os.environ["ACCELERATE_USE_FSDP"] = "true"  # as accelerate launch --use_fsdp sets it
        sharded = []
        original = routed_model.RoutedModel.forward

        def forward(self, *arguments):
            # The root's own weights stay gathered from its forward pass on; a layer's are given back every time.
            sharded.append(hasattr(self.base.model.layers[0].mlp.inner.up_proj.weight, "placements"))
            return original(self, *arguments)

        routed_model.RoutedModel.forward = forward
        results["fsdp"] = runs(model, routing)
        results["sharded"] = {"every pass": [torch.tensor(sharded).all()]}
    if PartialState().is_main_process:
        torch.save(results, out)
    Team().disband()


if __name__ == "__main__":
    main()
