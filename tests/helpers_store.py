"""Small stacks, made without learning."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from comfy_continual_lora import store
from comfy_continual_lora.stack import Ordinary, PromptRows

FINGERPRINT = "f" * 64


def make_record(number: int) -> store.ConceptRecord:
    return store.ConceptRecord(
        f"id{number}",
        f"V{number}",
        "mug",
        "lora",
        3,
        10,
        0,
        ["a photo"],
        ["h"],
        "2026-01-01T00:00:00+00:00",
        0.1,
        "",
        {},
    )


def make_stack(count: int, size: int = 4) -> store.ConceptStack:
    stack = store.ConceptStack(FINGERPRINT, rank=2, identity="ab" * 8)
    for n in range(1, count + 1):
        stack = stack.learned(
            make_record(n),
            torch.full((1, 8), float(n)),
            {
                "layer.to_k.A": torch.full((2, size), float(n)),
                "layer.to_k.B": torch.ones(size, 2) * n,
            },
        )
    return stack


def same(a: store.ConceptStack, b: store.ConceptStack) -> bool:
    def flat(s: store.ConceptStack) -> dict[str, torch.Tensor]:
        parts = {"adapter": s.adapter or {}, "words": s.words, **s.pool}
        return {
            f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()
        }

    left, right = flat(a), flat(b)
    return (
        a.records == b.records
        and a.rank == b.rank
        and left.keys() == right.keys()
        and all(torch.equal(left[k], right[k]) for k in left)
    )


@contextmanager
def writer(path: Path, stacks: str, work: str) -> Iterator[Callable[[float], None]]:
    """`kill_after(seconds)`: a process that does `work` over and over is killed after so long.

    Both are Python, with `path`, `stacks`, `store`, `history` and `versions` to use. One process imports what
    they need, and each that is killed is a copy of it: POSIX only.
    """
    code = (
        "import os, sys; from pathlib import Path; sys.path[:0] = ['tests']\n"
        "from helpers_store import make_stack\n"
        "from comfy_continual_lora import history, store, versions\n"
        f"path = Path({str(path)!r}); stacks = {stacks}\n"
        "for _ in sys.stdin:\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        try:\n"
        "            while True:\n"
        f"                {work}\n"
        "        finally:\n"
        "            os._exit(1)\n"
        "    print(child, flush=True)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    begin, output = parent.stdin, parent.stdout
    assert begin
    assert output

    def kill_after(seconds: float) -> None:
        print(file=begin, flush=True)
        child = int(output.readline())
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        assert int(output.readline()) == -signal.SIGKILL  # it had not failed before

    yield kill_after
    parent.communicate()
    assert parent.returncode == 0


def solved_stack(count: int) -> store.ConceptStack:
    """With what the closed form keeps of each concept: a target, prompts, and ordinary ones."""
    stack, generator = make_stack(count, 8), torch.Generator().manual_seed(0)
    rows = torch.randn(40, 8, generator=generator)
    ordinary = Ordinary(rows.T @ rows, 40, ("mug", "box"), rows.T @ rows / 2, 0.5)
    prompts = {}
    for number, record in enumerate(stack.records):
        target = {
            "layer.to_k.A": torch.randn(number + 1, 8, generator=generator),
            "layer.to_k.B": torch.randn(8, number + 1, generator=generator),
        }
        stack = stack.with_target(record.id, target)
        alone, shared = rows[: number + 2].half(), rows[:number].half()
        prompts[record.id] = PromptRows(alone, shared)
    return stack.with_prompts(prompts, ordinary)
