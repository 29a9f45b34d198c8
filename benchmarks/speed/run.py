r"""How fast and how small is a step, beside others' on the same machine, checkpoint, batch and number
format; and how many calls a DC decision takes.

    python benchmarks/speed/run.py [--checkpoints mini,sd15] [--peers ours,kohya] [--rounds 3] \
        [--threads 1] [--keep FOLDER]

Input: nothing (SD1.5 is full-size with random weights; others' programs are found where programs.py
says). Output: results/<date>-<checkpoint>.json, and -scores.json.

The peers (peers.py) run one process each, in turns, so that noise of the machine meets all; the
first steps of each are not counted. The DC decisions are those of scores.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import described, write_result
from peers import JOBS, PEERS, RANK
from programs import PROGRAMS, checkout
from scores import scores

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # peers puts ROOT there


def measure_peer(peer: str, path: Path, name: str, threads: int) -> dict[str, Any]:
    """One run of one peer; {"failed": why} if it came to nothing."""
    from helpers_comfyui import python_of

    program = peer.removesuffix(" kv")
    try:
        host = checkout(program) if program in PROGRAMS else None
    except FileNotFoundError as error:
        return {"failed": str(error)}
    python = python_of(host) if host else sys.executable
    script = Path(__file__).resolve().with_name("peers.py")
    result = subprocess.run(
        [python, str(script), peer, name, str(path.resolve())],
        capture_output=True,
        text=True,
        cwd=host or ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""},
    )
    if result.returncode:
        return {"failed": result.stderr.strip().splitlines()[-1]}
    return json.loads(result.stdout.splitlines()[-1])


def compare(name: str, path: Path, peers: list[str], rounds: int, threads: int) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {peer: [] for peer in peers}
    for _ in range(rounds):
        for peer in peers:
            runs[peer].append(measure_peer(peer, path, name, threads))
            print(name, peer, runs[peer][-1], flush=True)
    table = {peer: _summary(own) for peer, own in runs.items()}
    measured = {peer: row for peer, row in table.items() if "failed" not in row}
    others = [row for peer, row in measured.items() if not peer.startswith("ours")]
    of_best = {}
    if "ours" in measured and others:
        for key in ("cpu_seconds", "peak_mib"):
            best = min(row[key]["median"] for row in others)
            of_best[key] = table["ours"][key]["median"] / best
    return {
        "checkpoint": name,
        "job": JOBS[name],
        "rank": RANK,
        "format": "fp32",
        "rounds": rounds,
        "peers": table,
        "ours_of_best_peer": of_best,
    }


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and spread of each figure over the runs that succeeded; else the first failure."""
    succeeded = [run for run in runs if "failed" not in run]
    if not succeeded:
        return runs[0]
    summary = {}
    for key in succeeded[0]:
        values = [run[key] for run in succeeded]
        summary[key] = {"median": statistics.median(values), "spread": [min(values), max(values)]}
    return summary


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    import helpers_full_size as full_size

    from comfy_continual_lora.mini.weights import write_checkpoint

    machine = described(arguments.threads)
    for name in filter(None, arguments.checkpoints.split(",")):
        path = folder / f"{name}.safetensors"
        if not path.exists() and name == "mini":
            write_checkpoint(path, stock=True)
        elif not path.exists():
            full_size.write("sd1", path)
        peers = arguments.peers.split(",")
        row = compare(name, path, peers, arguments.rounds, arguments.threads)
        write_result(name, {"machine": machine, **row})
    if arguments.pictures:
        torch.set_num_threads(arguments.threads)
        path = folder / "small.safetensors"
        write_checkpoint(path)
        row = scores(path, arguments.pictures, arguments.trials)
        write_result("scores", {"machine": machine, **row})
        print(json.dumps(row["ways"], indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a step and a DC decision beside others'.")
    parser.add_argument("--checkpoints", default="mini,sd15")
    parser.add_argument("--peers", default=",".join(PEERS), help="whose steps are measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--pictures", type=int, default=24, help="pictures the DC scores judge; 0: none"
    )
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument(
        "--keep", type=Path, help="folder for the checkpoints (deleted at the end unless given)"
    )
    arguments = parser.parse_args()
    peers = arguments.peers.split(",")
    if not {"ours"} < set(peers) - {"ours compiled"} <= set(PEERS):
        parser.error(
            f"--peers is {arguments.peers!r}; ours and at least one more of "
            f"{', '.join(list(PEERS)[2:])} are needed"
        )
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, arguments.keep or Path(folder))


if __name__ == "__main__":
    main()
