r"""The closed form and the stack's file at full size, by the number of concepts.

    python benchmarks/growth/full.py OUT.json [--kinds sd15,sdxl,anima] [--counts 2,10,50]
        [--rank 7] [--threads 2]

in: nothing - out: OUT.json, and a line a row on the screen.

Stacks with the layers of SD1.5, SDXL and Anima are made of random numbers: what is measured depends
on sizes alone. A concept's target has rank 7 and its prompts 100 rows, a little more than on the
mini-SD; all targets lie in 30 directions, about the rank of the solution for fifty there (LOG.md).
Each row is measured in a process of its own: seconds to consolidate (without imports), to store and
to load, bytes of the file, peak memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from comfy_continual_lora import consolidation, store
from comfy_continual_lora.settings import SolveSettings
from comfy_continual_lora.stack import ConceptRecord, ConceptStack, Ordinary, PromptRows

# d_text, and how many cross-attentions have how many outputs
SHAPES = {
    "sd15": (768, {320: 5, 640: 5, 1280: 6}),
    "sdxl": (2048, {640: 10, 1280: 60}),
    "anima": (1024, {2048: 28}),
}
COMMON = 30  # directions of a layer's output that all targets share
ALONE, SHARED = 70, 30  # rows of a concept's prompts


def layers_of(kind: str) -> dict[str, int]:
    """The outputs of each layer; the names are nobody's."""
    outputs = [out for out, blocks in SHAPES[kind][1].items() for _ in range(2 * blocks)]
    return {f"block.{n}.to_k": out for n, out in enumerate(outputs)}


def stack_of(
    width: int, layers: Mapping[str, int], count: int, rank: int, fingerprint: str = "0" * 64
) -> ConceptStack:
    """`width`: of the text features; `layers`: the outputs of each layer."""
    generator = torch.Generator().manual_seed(0)
    common = {out: torch.randn(out, COMMON, generator=generator) for out in set(layers.values())}

    def lora(of_rank: int) -> dict[str, torch.Tensor]:
        made = {}
        for layer, out in layers.items():
            made[f"{layer}.A"] = torch.randn(of_rank, width, generator=generator)
            made[f"{layer}.B"] = common[out] @ torch.randn(COMMON, of_rank, generator=generator)
        return made

    rows = torch.randn(2 * width, width, generator=generator)
    ordinary = rows.T @ rows / len(rows)
    stack = ConceptStack(fingerprint, rank=16, adapter=lora(16), identity="ab" * 8)
    prompts = {}
    for number in range(count):
        concept = f"c{number}"
        record = ConceptRecord(
            *(concept, f"V{number}", "mug", "retention", 5, 200, 0, ["a photo"], ["h"]),
            *("2026-11-29T00:00:00+00:00", 0.1, "", {"rank": 16}),
        )
        stack.records.append(record)
        stack.words[concept] = torch.randn(1, width, generator=generator)
        stack = stack.with_target(concept, lora(rank))
        alone, shared = (
            torch.randn(size, width, generator=generator).half() for size in (ALONE, SHARED)
        )
        prompts[concept] = PromptRows(alone, shared)
    return stack.with_prompts(prompts, Ordinary(ordinary, 1000, ("mug",), ordinary))


def measure(kind: str, count: int, rank: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    stack = stack_of(SHAPES[kind][0], layers_of(kind), count, rank)
    began = time.perf_counter()
    solved, result = consolidation.consolidated(stack, SolveSettings())
    seconds = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.concepts.safetensors"
        began = time.perf_counter()
        store.save_stack(solved, path)
        saved = time.perf_counter() - began
        began = time.perf_counter()
        store.open_stack(path)
        return {
            "kind": kind,
            "concepts": count,
            "rank": result.rank,
            "consolidate": seconds,
            "save": saved,
            "load": time.perf_counter() - began,
            "bytes": path.stat().st_size,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--kinds", default=",".join(SHAPES))
    parser.add_argument("--counts", default="2,10,50")
    parser.add_argument("--rank", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", help="KIND,COUNT: measure only this, and print it")
    options = parser.parse_args()
    if options.one:
        kind, count = options.one.split(",")
        print(json.dumps(measure(kind, int(count), options.rank, options.threads)))
        return
    rows = []
    for kind in options.kinds.split(","):
        for count in options.counts.split(","):
            command = [sys.executable, __file__, str(options.out), "--one", f"{kind},{count}"]
            command += ["--rank", str(options.rank), "--threads", str(options.threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout))
            print(json.dumps(rows[-1]), flush=True)
            options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
