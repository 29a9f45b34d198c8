r"""What learning one more concept and drawing cost at full size, by the number of concepts there are.

    python benchmarks/growth/learning.py OUT.json [--kinds sd1] [--counts 1,10,50] [--rounds 3]

in: nothing - out: OUT.json, and a line a command on the screen.

Checkpoints of full size with random weights, stacks of random numbers (full.py). `learn` takes two steps
of one picture at 64 pixels, `draw` one step at 64 pixels, so that loading, encoding and solving are most
of it: all that could grow. Each command runs in a process of its own, imports included, on one thread:
the median over the rounds of its wall and CPU seconds and its peak memory. SDXL takes 16 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from full import stack_of
from run import ROOT, run

from comfy_continual_lora import store
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.mini import world
from comfy_continual_lora.stack import CheckpointInfo

sys.path.append(str(ROOT / "tests"))
import helpers_full_size

COMMANDS = {
    "learn": [
        *("learn", "--images", "{folder}/pictures", "--token", "W1", "--noun", "cat"),
        *("--steps", "2", "--batch", "1", "--size", "64", "--method", "retention"),
    ],
    "draw": [
        *("draw", "--prompt", "a photo of a V0 mug", "--steps", "1", "--size", "64"),
        *("--out", "{folder}/drawn"),
    ],
}


def write_stacks(folder: Path, kind: str, counts: list[int]) -> None:
    """mini.safetensors, which is what `run` calls a checkpoint, and <count>.concepts.safetensors."""
    checkpoint = helpers_full_size.write(kind, folder / "mini.safetensors")
    backbone = load_backbone(checkpoint, device="cpu")
    layers = {name: len(layer.weight) for name, layer in backbone.kv_layers.items()}
    width = next(iter(backbone.kv_layers.values())).weight.shape[1]
    for count in counts:
        stack = stack_of(width, layers, count, 7, backbone.fingerprint)
        stack.checkpoint = CheckpointInfo(
            backbone.preset, backbone.prediction, backbone.word_widths, backbone.clip_skip
        )
        generator = torch.Generator().manual_seed(1)
        for concept in stack.words:
            stack.words[concept] = 0.02 * torch.randn(1, backbone.word_width, generator=generator)
        assert stack.adapter
        stack.adapter = {name: 0.01 * tensor for name, tensor in stack.adapter.items()}
        store.save_stack(stack, folder / f"{count}.concepts.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--kinds", default="sd1")
    parser.add_argument("--counts", default="1,10,50")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    counts = [int(one) for one in options.counts.split(",")]
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    for kind in options.kinds.split(","):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_stacks(folder, kind, counts)
            world.save_pictures(world.concepts("development")[5], folder / "pictures")
            for count in counts:
                for name, arguments in COMMANDS.items():
                    runs = []
                    for _ in range(options.rounds):
                        stack = folder / "s.concepts.safetensors"
                        shutil.rmtree(folder / "s.concepts.history", ignore_errors=True)
                        stack.unlink(missing_ok=True)
                        os.link(folder / f"{count}.concepts.safetensors", stack)
                        runs.append(run(ROOT, arguments, folder, stack))
                    row = {"kind": kind, "command": name, "concepts": count}
                    row |= {key: statistics.median(one[key] for one in runs) for key in runs[0]}
                    rows.append(row)
                    print(json.dumps(row), flush=True)
                    options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
