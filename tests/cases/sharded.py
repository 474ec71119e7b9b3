"""Two processes, one SparseFFN sharded over both (FSDP2): run by tests/d2m/kernels/test_sharded.py.

Usage: python shardedcase.py PORT. Prints one line per realisation with the largest error.
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from d2m.model.experts_choice import use
from d2m.model.sparse_ffn import SparseFFN


def worker(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def build() -> SparseFFN:
        torch.manual_seed(0)
        return SparseFFN(16, 16, 4, 16, top_k=2)

    inputs = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))
    whole = build()
    for x in inputs:
        # FSDP averages the gradients of the processes.
        (whole(x).square().sum() / 2).backward()
    expected = {name: p.grad for name, p in whole.named_parameters()}
    names = ["sorted", "grouped_mm"]
    if os.environ.get("TRITON_INTERPRET"):
        names.append("triton")
    for name in names:
        sharded = build()
        fully_shard(sharded, mesh=mesh)
        with use(name):
            y = sharded(inputs[rank])
            y.square().sum().backward()
        worst = float((y - whole(inputs[rank])).detach().abs().max())
        for key, parameter in sharded.named_parameters():
            assert parameter.to_local().shape[0] == parameter.shape[0] // 2
            gradient = parameter.grad.full_tensor()
            worst = max(worst, float((gradient - expected[key]).abs().max()))
        if rank == 0:
            print(name, worst, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked: the imports above are paid once, not three times.
    mp.start_processes(worker, (int(sys.argv[1]),), nprocs=2, start_method="fork")
