"""Two processes of a group, for tests of what several devices do together."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

N_RANKS = 2
WITHIN_S = 60


def on_ranks(task: Callable[[int], Any], folder: Path, backend: str = "gloo") -> list[Any]:
    """Run ``task(rank)`` in two processes of a group; what each returned, or the error of one."""
    context = spawn(_rank, (task, folder, backend), nprocs=N_RANKS, join=False)
    assert context is not None
    deadline = time.monotonic() + WITHIN_S
    try:
        while not context.join(timeout=1.0):  # raises what a rank raised
            assert time.monotonic() < deadline, f"ranks still run after {WITHIN_S} s"
    finally:
        for process in filter(None, context.processes):
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(N_RANKS)]


def _rank(rank: int, task: Callable[[int], Any], folder: Path, backend: str) -> None:
    torch.set_num_threads(1)
    if "nccl" in backend:
        os.environ["NCCL_NVLS_ENABLE"] = "0"  # NVLink multicast needs rights that not every machine gives
        torch.cuda.set_device(rank)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group(
        backend, rendezvous, timedelta(seconds=WITHIN_S / 2), world_size=N_RANKS, rank=rank
    )
    torch.save(task(rank), folder / f"{rank}.pt")
    dist.barrier()  # a rank that leaves early would look lost to the other
    dist.destroy_process_group()
    os._exit(0)  # an orderly end of the interpreter may abort amid the threads of the group that is gone
