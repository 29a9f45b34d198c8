"""The command line as a user types it: every command, Ctrl-C, kill -9, and mistakes without a
traceback.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_learn import save_concept
from PIL import Image

from comfy_continual_lora import cli, store

COMMAND = [sys.executable, "-m", "comfy_continual_lora"]
ROOT = Path(__file__).parents[1]
QUICK = [
    "--steps",
    "4",
    "--batch",
    "2",
    "--rank",
    "4",
    "--device",
    "cpu",
    "--fisher-samples",
    "4",
    "--dsc-steps",
    "2",
]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=1200
    )


@pytest.fixture
def run_here(capsys: pytest.CaptureFixture[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The same without the seconds that a process needs to begin."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = [*map(str, arguments)]
        capsys.readouterr()
        return subprocess.CompletedProcess(words, cli.main(words), *capsys.readouterr())

    return run


def test_mini_learn_learn_info_draw_undo(
    tmp_path: Path, run_here: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    run = run_here
    checkpoint, out = tmp_path / "models" / "mini.safetensors", tmp_path / "drawn"
    assert run("mini", checkpoint).returncode == 0
    for token, noun, index in (("V1", "ball", 0), ("V2", "fish", 6)):
        folder = save_concept(tmp_path / token, index)
        done = run(
            "learn",
            "--checkpoint",
            checkpoint,
            "--images",
            folder,
            "--token",
            token,
            "--noun",
            noun,
            *QUICK,
        )
        assert (done.returncode, f"Learned {token}" in done.stdout) == (0, True), done.stderr
    found = json.loads(run("info", "--checkpoint", checkpoint, "--json").stdout)
    assert [
        (c["token"], c["noun"], c["images"], c["steps"], c["method"]) for c in found["concepts"]
    ] == [
        ("V1", "ball", 4, 4, "retention"),
        ("V2", "fish", 4, 4, "retention"),
    ]
    assert found["rank"] >= 4  # or what two concepts ask for
    assert found["trainable_parameters"] == found["rank"] * (256 * 14 + 192 * 8 + 64 * 6) + 4 * 256
    assert len(found["fingerprint"]) == 64
    assert Path(found["stack_file"]).parent == checkpoint.parent
    both = ["--prompt", "a V1 ball", "--beside", "a V2 fish"]
    drawn = run(
        "draw",
        "--checkpoint",
        checkpoint,
        *both,
        "-n",
        2,
        "--steps",
        2,
        "--out",
        out,
        "--device",
        "cpu",
    )
    assert drawn.returncode == 0, drawn.stderr
    assert sorted(p.name for p in out.iterdir()) == [
        "a-V1-ball-a-V2-fish-0.png",
        "a-V1-ball-a-V2-fish-1.png",
        "grid.png",
    ]
    with Image.open(out / "a-V1-ball-a-V2-fish-0.png") as picture:
        assert picture.size == (224, 128)
    plot = ["--plot", out / "scores.png"]
    scored = run(
        "scores",
        "--checkpoint",
        checkpoint,
        "--images",
        tmp_path / "V1",
        "--trials",
        4,
        "--json",
        *plot,
        "--device",
        "cpu",
    )
    assert scored.returncode == 0, scored.stderr
    rows = json.loads(scored.stdout)
    assert [row["label"] for row in rows["images"]] == ["V1"] * 4
    assert rows["accuracy"] == sum(row["right"] for row in rows["images"]) / 4
    assert (out / "scores.png").stat().st_size > 1000
    plot = ["--plot", out / "retention.png"]
    kept = run(
        "evaluate",
        "--checkpoint",
        checkpoint,
        "--pictures",
        1,
        "--steps",
        2,
        "--trials",
        2,
        "--json",
        *plot,
        "--device",
        "cpu",
    )
    assert kept.returncode == 0, kept.stderr
    assert json.loads(kept.stdout)["concepts"] == ["V1 ball", "V2 fish"]
    assert (out / "retention.png").stat().st_size > 1000
    done = run(
        "consolidate",
        "--checkpoint",
        checkpoint,
        "--images",
        tmp_path / "V2",
        "--batch",
        3,
        "--dsc-steps",
        2,
        "--fisher-samples",
        4,
    )
    assert "Consolidated V2" in done.stdout, done.stderr
    listed = run("history", "--checkpoint", checkpoint).stdout.splitlines()
    assert [line.split("MB  ")[1].split("  ")[0] for line in listed[:3]] == [
        "consolidated V2 fish",
        "learned V2 fish",
        "learned V1 ball",
    ]
    assert (
        "Took back: consolidated V2 fish. The stack now holds V1, V2."
        in run("undo", "--checkpoint", checkpoint).stdout
    )
    assert (
        "Took back: learned V2 fish. The stack now holds V1."
        in run("undo", "--checkpoint", checkpoint).stdout
    )
    assert "holds V1, V2" in run("restore", "--checkpoint", checkpoint, 3).stdout
    assert json.loads(run("undo", "--checkpoint", checkpoint, "--version", 3, "--json").stdout)[
        "tokens"
    ] == ["V1", "V2"]
    assert not list(checkpoint.parent.glob("*.snapshot"))


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_stopped_by_ctrl_c_or_killed_goes_on(
    checkpoint: Path, pictures: Path, how: signal.Signals
) -> None:
    learn = [
        *[
            "learn",
            "--checkpoint",
            checkpoint,
            "--images",
            pictures,
            "--token",
            "V1",
            "--noun",
            "ball",
        ],
        *["--method", "lora", "--steps", "40", "--batch", "2"],
    ]
    learn = [*map(str, learn), "--snapshot-every", "4", "--device", "cpu"]
    process = subprocess.Popen([*COMMAND, *learn], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    for line in process.stderr:
        if "learn 1" in line:  # step 12 or later
            process.send_signal(how)
            break
    rest = process.stderr.read()
    process.stderr.close()
    process.wait(60)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert ("the same command goes on" in rest) == (how == signal.SIGINT)
    assert not store.stack_path(checkpoint).exists()
    done = run(*learn)
    assert done.returncode == 0, done.stderr
    first = next(line for line in done.stderr.splitlines() if "learn" in line)
    assert int(first.split()[1].split("/")[0]) > 8  # it did not begin again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--token", "a/b"], "may hold only letters"),
        (["--token", "dog"], "a word the checkpoint knows"),
        (["--images", "EMPTY"], "it is empty"),
        (["--checkpoint", "missing.safetensors"], "There is no checkpoint"),
        (["--lr", "7"], "rate is 7; the range is 0 to 1"),
    ],
)
def test_a_mistake_is_one_paragraph_and_status_2(
    checkpoint: Path,
    pictures: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    run_here: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    (tmp_path / "empty").mkdir()
    arguments = [str(tmp_path / "empty") if a == "EMPTY" else a for a in arguments]
    done = run_here(
        "learn",
        "--checkpoint",
        checkpoint,
        "--images",
        pictures,
        "--token",
        "V1",
        "--noun",
        "ball",
        *QUICK,
        *arguments,
    )
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not store.stack_path(checkpoint).exists()


def test_a_reader_that_leaves_early_meets_no_traceback(checkpoint: Path) -> None:
    command = shlex.join([*COMMAND, "info", "--checkpoint", str(checkpoint), "--json"])
    assert (
        subprocess.run(
            f"{command} | true", shell=True, cwd=ROOT, capture_output=True, text=True, timeout=600
        ).stderr
        == ""
    )


def test_an_unknown_flag_and_a_missing_one_end_with_2() -> None:
    assert run("learn").returncode == 2
    assert run("draw", "--checkpoint", "x", "--prompt", "y", "--nonsense").returncode == 2


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "mini",
        "learn",
        "consolidate",
        "scores",
        "evaluate",
        "draw",
        "export",
        "info",
        "undo",
    ],
)
def test_help(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    assert "usage: continual-lora" in done.stdout


@pytest.mark.slow
def test_the_demo(tmp_path: Path) -> None:
    done = (
        run("demo", "--out", tmp_path / "demo")
        if os.environ.get("CI")
        else pytest.skip("takes minutes; CI runs it")
    )
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "demo" / "report.html").read_text()
    assert report.count("<svg") == 2
    assert report.count("<img") == 5 + 4 + 5 + 8 + 4 + 4
    assert "http" not in report.replace("http://www.w3.org", "")
