"""Several processes that train one model: each takes its share of every batch, and all take the same step.

``torchrun --nproc-per-node N -m hgadlib -p dataset NAME`` starts them. A batch's mean loss is the sum over
processes of their own means, weighted by their share of the images; so are its gradients. Each then takes
the same step on its copy of the model, and losses are, to rounding, those of one process with all the batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hgadlib.errors import InputError

# Processes wait this long for the first one, which alone evaluates in between.
_TIMEOUT = timedelta(hours=4)


@dataclass(frozen=True)
class Group:
    """Those that train together, seen from one of them.

    Attributes:
        rank: This process's number, from 0; the first one writes the record.
        size: How many processes there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes and shows things."""
        return self.rank == 0

    def share(self, batch: Tensor) -> tuple[Tensor, float]:
        """Take this process's part of a batch, and what its mean counts for in the batch's mean.

        The batch's indices, (B,), are the same in every process. One for which nothing is left computes on an
        image all the same, counting 0, so that every process has gradients of the same parameters.
        """
        part = batch.tensor_split(self.size)[self.rank]
        return (part, len(part) / len(batch)) if len(part) else (batch[:1], 0.0)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up the gradients of all processes, in place, as one message."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def sum_(self, values: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def align(self, module: nn.Module) -> None:
        """Give every process the first one's parameters and buffers, bit for bit."""
        if self.size > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


ALONE = Group()


@contextmanager
def process_group(device: str = "auto") -> Iterator[tuple[Group, str]]:
    """Join the processes that torchrun has started, else be alone: the group, and this process's device.

    Args:
        device: As in the configuration. With CUDA, each process takes the device of its local number.
    Raises:
        InputError: More processes than CUDA devices, or one device named for several processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE, device
        return
    on_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_cuda:
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if ":" in device:
            raise InputError(f"device {device!r}: expected cuda for {size} processes, found one device")
        if local >= count:
            raise InputError(
                f"--nproc-per-node: expected at most {count} processes, one a device, found {local + 1}"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else "gloo", timeout=_TIMEOUT)
    try:
        yield Group(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()
