"""torchrun's processes: who and where this one is, and what is done to the model for them."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dfm_fast import _checks


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether it is true on some rank: on the host, no accelerator waits."""
        if self.size == 1:
            return flag
        found = torch.tensor(int(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def sum(self, x: Tensor) -> Tensor:
        """Over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def share(self, make: Callable[[], Any]) -> Any:
        """What rank 0 makes."""
        found = [make() if self.main else None]
        if self.size > 1:
            dist.broadcast_object_list(found, 0)
        return found[0]

    def barrier(self) -> None:
        self.any(False)


def start(device: str = "auto") -> World:
    """The world that torchrun's environment describes, or one process."""
    device = device_named("train", device)
    at = torch.device(device)
    if device == "cuda":
        at = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(at)
    if not (dist.is_initialized() or "WORLD_SIZE" in os.environ):
        return World(0, 1, at)
    if not dist.is_initialized():
        # Decisions are taken between the hosts, by gloo, so that no stream waits for them.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), at)


def device_named(op: str, device: str) -> str:
    """ "auto" resolved; an error for a GPU that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        _checks.fail(op, "device", "cuda on this machine", "none")
    return device


def leave(status: int) -> int:
    """The end of a process: one among others ends without the interpreter's shutdown, in which a
    thread of gloo that still frees a tensor would abort (pytorch/pytorch#179291)."""
    if not (dist.is_initialized() and "WORLD_SIZE" in os.environ):
        return status  # one process, or a group that is not torchrun's
    if status == 0:
        # Only when all are done, or the first to go would take the others' connections along.
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def wrap(model: nn.Module, kind: str, world: World, compiled: Iterable[nn.Module]) -> nn.Module:
    """What the loss calls. "fsdp" shards the model itself, each block and then the rest. Of the
    networks in it, those to be compiled are, in place."""
    sharded = world.size > 1 and kind == "fsdp"
    for network in compiled:
        # FSDP2 gathers a block's weights before it: between blocks, graphs have to end.
        for module in (_blocks(network) if sharded else ()) or [network]:
            module.compile()
    if world.size == 1:
        return model
    if not sharded:
        ddp, ids = nn.parallel.DistributedDataParallel, None
        if world.device.type == "cuda":
            ids = [world.device.index]
        # Buffers are tables, the same on all ranks; what says so has another name from torch 2.13.
        known = inspect.signature(ddp).parameters
        buffers = next(k for k in ("forward_sync_buffers", "broadcast_buffers") if k in known)
        options: dict[str, Any] = {"gradient_as_bucket_view": True, buffers: False}
        return ddp(model, device_ids=ids, **options)
    shard(model, world)
    return model


def shard(model: nn.Module, world: World) -> None:
    """FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def reshard(model: Any) -> None:
    """Of one that `shard` was given: free what forward gathered."""
    model.reshard()


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Of a transformer, or of those in a model: whose weights nothing else reads. A UNet has none
    such, as keys, values and time shifts of all its blocks are made at once."""
    lists = (getattr(module, "blocks", None) for module in model.modules())
    return [b for blocks in lists if isinstance(blocks, nn.ModuleList) for b in blocks]


def hollow(module: nn.Module) -> nn.Module:
    """A copy without memory, to load weights into."""
    meta = {id(p): nn.Parameter(p.detach().to("meta"), False) for p in module.parameters()}
    return copy.deepcopy(module, meta)


def local_parameters(model: nn.Module) -> list[Tensor]:
    """This rank's part of sharded ones."""
    return [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]


@contextlib.contextmanager
def local_gradients(wrapped: nn.Module, local: bool) -> Iterator[None]:
    """Gradients of a part that is not a step's last stay on the rank."""
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        with wrapped.no_sync() if local else contextlib.nullcontext():
            yield
        return
    module: Any = wrapped
    if hasattr(module, "set_requires_gradient_sync"):  # FSDP2's
        module.set_requires_gradient_sync(not local)
    yield
