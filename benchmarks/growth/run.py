r"""What grows with the number of concepts: seconds, memory and bytes of every operation on a stack.

    python benchmarks/growth/run.py OUT.json [--counts 2,10,50,200] [--against CHECKOUT]
        [--rounds 3] [--most SECONDS]

in: nothing; CHECKOUT is a checkout of an earlier commit (`git worktree add`), measured beside this one
in turns - out: OUT.json, and a line a command on the screen.

Four concepts are learned on the mini-SD by the default method in fifty steps each; a stack of any count
repeats them with other words, as format version 1, which both programs read. Each command runs in a
process of its own, imports included, on a stack its own program has brought up to date: the median
over the rounds of its wall and CPU seconds and its peak memory. What takes longer than `--most` is
not run for more concepts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from comfy_continual_lora import pipeline, requests, stackfile, stackschema, store
from comfy_continual_lora.adapters.lora import padded_to_rank
from comfy_continual_lora.adapters.packed import pack
from comfy_continual_lora.files import history_folder
from comfy_continual_lora.mini import weights, world
from comfy_continual_lora.settings import LearnSettings
from comfy_continual_lora.stack import ConceptStack
from comfy_continual_lora.targets import own_adapters

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "info": ["info"],
    "consolidate": ["consolidate", "--closed-form"],
    "export": ["export", "--out", "{folder}/out"],
    "export only the first": ["export", "--only", "V1", "--out", "{folder}/out"],
    "learn one more, one step": [
        *("learn", "--images", "{folder}/pictures", "--token", "V0", "--noun", "cat"),
        *("--steps", "1", "--batch", "1", "--size", "64"),
    ],
    "forget the first": ["forget", "--token", "V1"],
    "undo": ["undo"],
}
# one that a program of format version 2 brings a stack up to date with; it is not measured
FIRST = ["consolidate", "--closed-form"]
RANK = 16
LATER = ("watched", "features", "losses")  # fields of a record


def repeated(stack: ConceptStack, count: int) -> ConceptStack:
    """A stack of `count` concepts, as format version 1 kept it: a LoRA for every version."""
    generator = torch.Generator().manual_seed(0)
    own = own_adapters(stack)
    made = replace(stack, records=[], words={}, pool={}, targets={}, prompts={}, ordinary=None)
    assert stack.adapter
    whole = padded_to_rank(stack.adapter, RANK)
    for number in range(count):
        source = stack.records[number % len(stack.records)]
        concept, adapter = f"c{number}", own[number % len(own)]
        assert adapter
        word = stack.words[source.id]
        made.records.append(replace(source, id=concept, token=f"V{number + 1}", request=concept))
        made.words[concept] = word + 0.3 * word.std() * torch.randn(word.shape, generator=generator)
        if number:
            made.targets[concept] = pack(adapter)
        if number < count - 1:
            made.pool[concept] = whole
    made.adapter, made.rank = whole, RANK
    return made


def write_stacks(folder: Path, counts: list[int]) -> None:
    """mini.safetensors, pictures, and <count>.concepts.safetensors."""
    checkpoint = folder / "mini.safetensors"
    weights.write_checkpoint(checkpoint)
    concepts = world.concepts("development")
    for number in range(4):
        pictures = world.save_pictures(concepts[number], folder / str(number))
        settings = LearnSettings(steps=50)
        pipeline.learn_concept(
            requests.LearnRequest(
                checkpoint, pictures, f"V{number + 1}", concepts[number].noun, settings
            )
        )
    world.save_pictures(concepts[5], folder / "pictures")
    stack = store.open_stack(store.stack_path(checkpoint))
    for count in counts:
        path = folder / f"{count}.concepts.safetensors"
        made = repeated(stack, count)
        store.save_stack(made, path)
        _as_version_1(made, path)


def _as_version_1(stack: ConceptStack, path: Path) -> None:
    """In its layout, and without the fields that later releases added."""
    header = stackfile.read_header(path)
    for part in (header, header["base"], *header["concepts"]):
        part.pop("later")
    header |= {"version": 1, "concepts": [_of(one, LATER) for one in header["concepts"]]}
    header["base"] = _of(header["base"], ["clip_skip"])
    header = _of(header, ["ordinary", "change"])
    tensors = {f"word.{concept}": word for concept, word in stack.words.items()}
    tensors |= {f"adapter.{name}": tensor for name, tensor in (stack.adapter or {}).items()}
    wishes = {concept: target.adapter for concept, target in stack.targets.items()}
    for part, held in (("pool", stack.pool), ("wish", wishes)):
        for concept, adapter in held.items():
            tensors |= {f"{part}.{concept}.{name}": t.clone() for name, t in adapter.items()}
    metadata = {"format": stackschema.FORMAT, "stack": json.dumps(header)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def _of(fields: dict[str, Any], later: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in later}


def run(program: Path, arguments: list[str], folder: Path, stack: Path) -> dict[str, Any]:
    """One command of a program in a process of its own."""
    filled = [one.format(folder=folder) for one in arguments]
    place = ["--checkpoint", str(folder / "mini.safetensors"), "--stack", str(stack)]
    if arguments[0] not in ("info", "undo"):
        place += ["--device", "cpu"]
    command = [sys.executable, "-m", "comfy_continual_lora", *filled, *place]
    environment = {**os.environ, "PYTHONPATH": str(program), "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT
        )
        ended, peak = 0, 0.0
        while not ended:  # the peak that wait4 gives begins with what this process has
            peak = max(peak, _peak(child.pid))
            time.sleep(0.05)
            ended, status, usage = os.wait4(child.pid, os.WNOHANG)
        output.seek(0)
        if status:
            raise SystemExit(f"{' '.join(command)}:\n{output.read().decode()}")
    return {
        "seconds": time.perf_counter() - began,
        "cpu": usage.ru_utime + usage.ru_stime,
        "mib": peak,
    }


def _peak(process: int) -> float:
    """Most memory it has had so far, in MiB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def saved(path: Path) -> dict[str, Any]:
    """Seconds to load and to store a stack that has one earlier version, imports aside; and how far
    memory rises above what it was before loading, as a share of the file. A stack of one concept was
    loaded and stored before, since what a program loads once grows with no stack.
    """
    shutil.rmtree(history_folder(path), ignore_errors=True)
    stack, small = store.open_stack(path), path.with_name("small.concepts.safetensors")
    store.save_stack(stack, path)
    store.save_stack(stack.first(1, stack.adapter), small)
    code = (
        "import json, sys, time; from pathlib import Path\n"
        "from comfy_continual_lora import store\n"
        "def kib(name):\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith(name))\n"
        "path, small = map(Path, sys.argv[1:])\n"
        "store.save_stack(store.open_stack(small), small)\n"
        "Path('/proc/self/clear_refs').write_text('5')\n"  # the peak is what there is now
        "times, before = [time.perf_counter()], kib('VmRSS')\n"
        "stack = store.open_stack(path)\n"
        "times.append(time.perf_counter())\n"
        "store.save_stack(stack, path)\n"
        "times.append(time.perf_counter())\n"
        "share = 1024 * (kib('VmHWM') - before) / path.stat().st_size\n"
        "print(json.dumps([times[1] - times[0], times[2] - times[1], share]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        # in a shell, which is small: a process begins with the peak of the one that started it
        ["/bin/sh", "-c", '"$@"; true', "sh", sys.executable, "-c", code, str(path), str(small)],
        capture_output=True,
        env=environment,
        check=True,
    )
    load, save, share = json.loads(done.stdout)
    return {"load": load, "save": save, "memory_by_file": share}


def measure(
    program: Path, name: str, count: int, source: Path, rounds: int, skipped: set[tuple[str, str]]
) -> list[dict[str, Any]]:
    rows = []
    for command, arguments in COMMANDS.items():
        if (name, command) in skipped:
            continue
        runs = []
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for one in source.iterdir():
                if one.name == "pictures":
                    shutil.copytree(one, folder / one.name)
            os.link(source / "mini.safetensors", folder / "mini.safetensors")
            for _ in range(rounds):
                stack = folder / "s.concepts.safetensors"
                shutil.rmtree(folder / "s.concepts.history", ignore_errors=True)
                shutil.copy(_up_to_date(program, name, count, source), stack)
                if command == "undo":
                    run(program, COMMANDS["forget the first"], folder, stack)
                runs.append(run(program, arguments, folder, stack))
        row = {"program": name, "command": command, "concepts": count}
        row |= {key: statistics.median(one[key] for one in runs) for key in runs[0]}
        row["stack_bytes"] = _up_to_date(program, name, count, source).stat().st_size
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def _up_to_date(program: Path, name: str, count: int, source: Path) -> Path:
    """The stack as this program stores it."""
    path = source / f"{name}-{count}.concepts.safetensors"
    if not path.exists():
        shutil.copy(source / f"{count}.concepts.safetensors", path)
        run(program, FIRST, source, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--counts", default="2,10,50,200")
    parser.add_argument("--against", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most", type=float, default=60)
    options = parser.parse_args()
    counts = [int(one) for one in options.counts.split(",")]
    programs = {"now": ROOT}
    if options.against:
        programs["before"] = options.against.resolve()
    rows: list[dict[str, Any]] = []
    skipped: set[tuple[str, str]] = set()
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary)
        write_stacks(source, counts)
        for count in counts:
            for name, program in programs.items():
                rows += measure(program, name, count, source, options.rounds, skipped)
            skipped |= {
                (row["program"], row["command"])
                for row in rows
                if row.get("seconds", 0) > options.most
            }
            path = _up_to_date(ROOT, "now", count, source)
            rows.append({"program": "now", "command": "file", "concepts": count, **saved(path)})
            print(json.dumps(rows[-1]), flush=True)
            options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
