r"""What learning loses on a busy machine, by how its OpenMP threads wait for each other.

    python benchmarks/speed/busy.py [--beside 0,1,2] [--waits default,passive,1000] [--minutes 8]

Input: nothing. Output: results/<date>-busy.json: seconds a step, medians and spread.

Learning on the mini-SD (method `lora`, its own batch), with as many threads as torch takes by itself,
beside none, one or two processes that multiply matrices on one thread each. The ways of waiting are a
process each, all loaded before, and take turns of a few steps:

    default     as the OpenMP library waits by itself
    passive     OMP_WAIT_POLICY=PASSIVE
    NUMBER      GOMP_SPINCOUNT=NUMBER: a thread looks that often, then sleeps
    one         one thread, which waits for none

What other programs of the machine take meanwhile is measured: one that takes a whole core counts as
one more busy process, and turns in which they take a part of one (more than a tenth) do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

STEPS, SECONDS = 6, 10.0  # of a turn, whichever ends first
PART = 0.1  # of a core, that other programs may take or leave
MULTIPLY = "import torch; torch.set_num_threads(1); a = torch.rand(512, 512)\nwhile True: a @ a"
WAITING = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
TICKS = os.sysconf("SC_CLK_TCK")
Turn = dict[str, Any]  # seconds of "clock" and "cpu" a step; cores that "others" took


class _End(Exception):
    """The last turn is over."""


def take_turns(path: Path) -> None:
    """In a process of its own: a turn for each line of the input, then a line of JSON."""
    import torch

    from comfy_continual_lora.adapters.adapter import new_adapter
    from comfy_continual_lora.checkpoint.load import load_backbone
    from comfy_continual_lora.learn import TrainingInputs, learn
    from comfy_continual_lora.settings import LearnSettings

    backbone, generator = load_backbone(path, device="cpu"), torch.Generator().manual_seed(0)
    settings = LearnSettings(method="lora", steps=100_000, snapshot_every=100_000)
    resolved = settings.resolved(backbone.preset)
    pictures = torch.rand(resolved.batch, 3, 128, 128, generator=generator) * 2 - 1
    inputs = TrainingInputs(
        backbone.encode_images(pictures),
        [["a photo of a V1 mug"]],
        "V1",
        {},
        new_adapter(backbone, resolved.rank, generator),
        backbone.word_start("mug", generator),
    )
    started: tuple[float, float] = (0.0, 0.0)
    steps = 0

    def step(_: object) -> None:
        nonlocal started, steps
        steps += 1
        clock, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
        if steps < STEPS and clock < SECONDS:
            return
        print(json.dumps({"clock": clock / steps, "cpu": cpu / steps}), flush=True)
        if not sys.stdin.readline():
            raise _End
        started, steps = (time.perf_counter(), time.process_time()), 0

    with tempfile.TemporaryDirectory() as folder, suppress(_End):
        learn(backbone, inputs, resolved, Path(folder) / "snapshot", step)


class Learner:
    """A process that learns when it is its turn."""

    def __init__(self, path: Path, wait: str) -> None:
        command = [sys.executable, __file__, "--learn", str(path)]
        self.process = subprocess.Popen(
            command,
            env=environment(wait),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        for _ in range(2):  # the first steps are slower
            self._read()
            self._go()
        self._read()

    def turn(self) -> dict[str, float]:
        self._go()
        return self._read()

    def _go(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")

    def _read(self) -> dict[str, float]:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())


def environment(wait: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if name not in WAITING}
    if wait == "passive":
        return {**plain, "OMP_WAIT_POLICY": "PASSIVE"}
    if wait == "one":
        return {**plain, "OMP_NUM_THREADS": "1"}
    return plain if wait == "default" else {**plain, "GOMP_SPINCOUNT": wait}


def measured(
    learner: Learner, busy: list[subprocess.Popen[bytes]], others: list[int]
) -> dict[str, float]:
    """A turn beside these processes; `others` are all processes of ours."""

    def not_ours() -> float:
        return _all_cpu() - time.process_time() - sum(map(_cpu_of, others))

    for one in busy:
        one.send_signal(signal.SIGCONT)
    try:
        clock, before = time.perf_counter(), not_ours()
        taken = learner.turn()
        share = (not_ours() - before) / (time.perf_counter() - clock)
    finally:
        for one in busy:
            one.send_signal(signal.SIGSTOP)
    return {**taken, "others": share}


def _all_cpu() -> float:
    """Seconds that all cores were not idle."""
    values = [int(one) for one in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(values) - values[3] - values[4]) / TICKS


def _cpu_of(process: int) -> float:
    values = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(values[11]) + int(values[12])) / TICKS


def measure(path: Path, counts: list[int], waits: list[str], minutes: float) -> list[Turn]:
    turns: list[Turn] = []
    processes = []
    try:
        learners = {}
        for wait in waits:
            learners[wait] = Learner(path, wait)
            processes.append(learners[wait].process)
        command = [sys.executable, "-c", MULTIPLY]
        busy = [subprocess.Popen(command, env=environment("one")) for _ in range(max(counts))]
        processes += busy
        time.sleep(10 if busy else 0)  # until torch is imported
        for one in busy:
            one.send_signal(signal.SIGSTOP)
        ours = [one.pid for one in processes]
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            for count in counts:
                for wait, learner in learners.items():
                    turn = measured(learner, busy[:count], ours)
                    turns.append({"beside": count, "wait": wait, **turn})
                    print(json.dumps(turns[-1]), flush=True)
    finally:
        for one in processes:
            one.kill()
            one.wait()
    return turns


def by_load(turns: list[Turn]) -> dict[str, dict[str, list[Turn]]]:
    """The turns that count, by the number of busy processes, others' too, and the way of waiting."""
    found: dict[str, dict[str, list[Turn]]] = {}
    for turn in turns:
        others = round(turn["others"])
        if abs(turn["others"] - others) <= PART:
            beside = found.setdefault(str(turn["beside"] + others), {})
            beside.setdefault(turn["wait"], []).append(turn)
    return {count: found[count] for count in sorted(found)}


def summary(turns: list[Turn]) -> dict[str, Any]:
    row: dict[str, Any] = {"turns": len(turns)}
    for key in ("clock", "cpu"):
        values = [turn[key] for turn in turns]
        row[f"{key}_seconds"] = {
            "median": statistics.median(values),
            "spread": [min(values), max(values)],
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure learning on a busy machine.")
    parser.add_argument("--beside", default="0,1,2", help="numbers of busy processes")
    parser.add_argument("--waits", default="default,passive,1000,one")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--learn", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.learn:
        take_turns(arguments.learn)
        return
    from machine import described, write_result

    from comfy_continual_lora.mini.weights import write_checkpoint

    machine = described(os.cpu_count() or 1)
    counts, waits = [int(one) for one in arguments.beside.split(",")], arguments.waits.split(",")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mini.safetensors"
        write_checkpoint(path)
        turns = measure(path, counts, waits, arguments.minutes)
    rows = {
        count: {wait: summary(own) for wait, own in by_wait.items()}
        for count, by_wait in by_load(turns).items()
    }
    write_result("busy", {"machine": machine, "beside": rows})
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
