"""Two ranks under torchrun's environment, gloo: DDP and FSDP2 train through both stages."""

import os
import socket
import sys

import pytest
import torch
import torch.distributed as dist
from helpers import run_python
from torch import nn

from dfm_fast._library import INTERPRET

STEPS = 12

pytestmark = [
    pytest.mark.skipif(INTERPRET, reason="nothing of it runs in a kernel"),
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo"),
]


class Model(nn.Module):
    """A trunk for all, a head for every level; notes what it was called with."""

    def __init__(self, levels=2, channels=2):
        super().__init__()
        self.trunk = nn.Conv2d(channels, channels, 1)
        self.heads = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(levels))
        self.seen = []

    def forward(self, levels, t, active):
        self.seen.append((active[0].sum().item(), levels[0].detach().clone(), t.clone()))
        return [
            None if v is None else head(self.trunk(v))
            for v, head in zip(levels, self.heads, strict=True)
        ]


def train(kind: str, per_sample: bool) -> None:
    """What each rank runs; a failure there fails the process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from dfm_fast.flow import DecomposableFlow, Laplacian

    rank = dist.get_rank()
    torch.manual_seed(0)  # the same on both ranks: data and noise must differ all the same
    model = Model()
    wrapped = model
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    flow = DecomposableFlow(Laplacian(2), stage_probs=[0.5, 0.5], per_sample=per_sample, seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.zeros(2, 2, 8, 8)  # noise alone tells the ranks apart
    for step in range(STEPS):
        seed = None if step % 2 else 100 + step
        loss = flow.loss(wrapped, x, seed=seed).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters()), f"step {step}: no gradient"
        optimizer.step()
    for step, (levels, coarse, t) in enumerate(model.seen):
        both = [torch.empty_like(coarse) for _ in range(2)]
        dist.all_gather(both, coarse)
        assert not torch.isclose(*both, atol=1e-6).any(), f"step {step}: both ranks saw one noise"
        times = [torch.empty_like(t) for _ in range(2)]
        dist.all_gather(times, t)
        assert not torch.isclose(times[0][:, 0], times[1][:, 0]).any(), f"step {step}: one t"
        if not per_sample:
            counts = [torch.empty((), dtype=torch.int64) for _ in range(2)]
            dist.all_gather(counts, torch.tensor(levels))
            assert counts[0] == counts[1], f"step {step}: stages differ"
    if not per_sample:
        assert {levels for levels, *_ in model.seen} == {1, 2}, "one stage never came"
    print(f"rank {rank} done")


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_both_stages_train_on_two_ranks(kind, per_sample):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}")
    result = run_python(
        *launcher, __file__, kind, str(int(per_sample)), env={"OMP_NUM_THREADS": "1"}, timeout=180
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "rank 0 done" in result.stdout
    assert "rank 1 done" in result.stdout


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train(sys.argv[1], bool(int(sys.argv[2])))
    # Only now: a DistributedDataParallel that outlives its process group may never return from its
    # destructor.
    dist.destroy_process_group()
    # No shutdown of the interpreter: a thread of gloo that still frees a tensor would abort it
    # (pytorch/pytorch#179291).
    sys.stdout.flush()
    os._exit(0)
