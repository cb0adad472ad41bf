"""The processes of one training run: which share of a batch is whose, and how their gradients become one.

Base weights are frozen and the trainable parameters few, so each process holds all of the latter and their gradients are
averaged in one all-reduce. Under FSDP (``accelerate launch --use_fsdp``) the frozen weights are sharded; on CPUs accelerate
also wants ``--fsdp_cpu_ram_efficient_loading false --fsdp_sync_module_states false``, which are of no use here.
"""

import os
from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ...errors import UserError
from ...progress import Reporter, Silent


class Workers:
    """The processes that ``accelerate launch`` started, seen from one of them.

    Args:
        device: where a lone process computes; one of several computes where its accelerator says.
    """

    def __init__(self, device: torch.device | str) -> None:
        device = torch.device(device)
        self._accelerator = Accelerator(cpu=device.type == "cpu")
        self.count, self.index = self._accelerator.num_processes, self._accelerator.process_index
        self.device = device if self.count == 1 else self._accelerator.device
        fsdp = self._accelerator.distributed_type == DistributedType.FSDP
        # accelerate itself knows FSDP on accelerators only: on CPUs it leaves the type at MULTI_CPU.
        fsdp = fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        self._fsdp = fsdp and self.count > 1

    def reporter(self, report: Reporter | None) -> Reporter:
        """Returns the reporter of the first process, a silent one elsewhere."""
        return report if report is not None and self._accelerator.is_main_process else Silent()

    def rows(self, batch: int, micro_batch: int | None) -> list[slice]:
        """Returns this process's part of a batch's blocks, cut into pieces of at most ``micro_batch``.

        Raises:
            UserError: the processes cannot have equal parts.
        """
        if batch % self.count:
            raise UserError(f"a batch of {batch} blocks cannot be shared by {self.count} processes: use a multiple")
        share = batch // self.count
        step, start = micro_batch or share, self.index * share
        if share % step:
            raise UserError(f"{share} blocks a process cannot be cut into equal pieces of {step}: use a divisor")
        return [slice(first, first + step) for first in range(start, start + share, step)]

    def mean(self, tensor: Tensor) -> Tensor:
        """Returns the mean over processes."""
        return tensor if self.count == 1 else self._accelerator.reduce(tensor.clone(), "mean")

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces every gradient by its mean over processes."""
        if self.count == 1:
            return
        parameters = list(parameters)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = self.mean(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def shard(self) -> Callable[[nn.Module], None] | None:
        """Returns what shards a module's frozen weights over the processes, or None where they stay whole."""
        if not self._fsdp:
            return None
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.count,))

        def shard(module: nn.Module) -> None:
            trainable = {parameter for parameter in module.parameters() if parameter.requires_grad}
            fully_shard(module, mesh=mesh, ignored_params=trainable)

        return shard
