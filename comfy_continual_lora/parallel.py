"""Data-parallel learning of one concept in several processes, started by `accelerate launch` or
`torchrun`: each takes its share of every batch.

Every draw is a function of (seed, step), so each process knows the whole batch. All they exchange,
once per step, is the gradient of the few trained parameters. All end with the same values; the
first one stores them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn


def rank_and_world_size() -> tuple[int, int]:
    """This process's number, from 0, and how many there are."""
    return (
        (dist.get_rank(), dist.get_world_size())
        if dist.is_available() and dist.is_initialized()
        else (0, 1)
    )


def is_first() -> bool:
    return rank_and_world_size()[0] == 0


def wait() -> None:
    """Wait until all processes get here."""
    if rank_and_world_size()[1] > 1:
        dist.barrier()


@contextmanager
def together(device: str) -> Iterator[str]:
    """Join the processes this one was launched with, for the block; yields its device.

    Nothing happens if it was launched alone.
    """
    launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    if not launched or int(os.environ["WORLD_SIZE"]) < 2 or dist.is_initialized():
        yield device
        return
    cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else device
    finally:
        dist.destroy_process_group()


def shares(n: int, accumulate: int) -> list[tuple[slice, float]]:
    """This process's share of n rows, in at most `accumulate` parts, and the weight of each part's
    mean.

    The sum of the weighted means, averaged over the processes (`average`), is the mean over all
    rows.
    """
    number, count = rank_and_world_size()
    bounds = [n * i // (accumulate * count) for i in range(accumulate * count + 1)]
    parts = [
        slice(*ends)
        for i, ends in enumerate(pairwise(bounds))
        if i % count == number and ends[0] < ends[1]
    ]
    return [(rows, (rows.stop - rows.start) * count / n) for rows in parts]


def average(parameters: Sequence[nn.Parameter], value: float) -> float:
    """Give every parameter its mean gradient over all processes (zero for a missing one) and return
    the mean of `value`.
    """
    if rank_and_world_size()[1] == 1:
        return value
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    whole = torch.cat([*(g.flatten() for g in gradients), gradients[0].new_tensor([value])])
    dist.all_reduce(whole)
    whole /= rank_and_world_size()[1]
    for p, part in zip(parameters, whole[:-1].split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p).clone()
    return float(whole[-1])
