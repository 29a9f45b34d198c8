"""What the command line writes and prints: mistakes in names are found before the work, and a result
that can't be written is printed all the same.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers_learn import save_concept
from PIL import Image, ImageColor

from comfy_continual_lora import cli, imagefile
from comfy_continual_lora.errors import SettingError
from comfy_continual_lora.report import save_picture
from comfy_continual_lora.results import Drawn
from comfy_continual_lora.settings import LearnSettings

resource = pytest.importorskip("resource", reason="Windows has no limits of this kind")
QUICK = ["--size", 64, "--steps", 1, "--device", "cpu"]


@pytest.mark.parametrize("command", ["draw", "export"])
def test_a_file_in_place_of_a_folder_is_refused_before_the_work(
    command: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = ["--prompt", "a ball", *QUICK] if command == "draw" else []
    inside = checkpoint / "deeper"
    for out in (checkpoint, inside):
        words = [command, "--checkpoint", checkpoint, "--out", out, *prompt]
        assert cli.main([str(word) for word in words]) == 2
        seen = capsys.readouterr()
        assert f"{checkpoint} is a file. Give a folder" in seen.err.replace("\n", " ")
        assert "draw 1/1" not in seen.err


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SettingError, match="no permission"):
        imagefile.check_folder(tmp_path / "new")


def _run(
    *words: object, room: int | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """The command in a process of its own, which may write files of `room` bytes at most."""

    def limit() -> None:
        if room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    command = [sys.executable, "-m", "comfy_continual_lora", *map(str, words)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        encoding="utf-8",
        preexec_fn=limit,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
    )


def test_without_room_nothing_is_half_written(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = _run(
        "draw", "--checkpoint", checkpoint, "--prompt", "a ball", "--out", out, *QUICK, room=1000
    )
    assert done.returncode == 2
    assert "a-ball-0.png can't be written" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert list(out.iterdir()) == []


def test_a_result_is_printed_if_its_plot_can_not_be_written(
    learned: Callable[..., Path], tmp_path: Path
) -> None:
    settings = LearnSettings(method="lora", steps=1, batch=1, rank=2, size=64)
    checkpoint = learned(settings, "V1")
    plot = ["--plot", tmp_path / "plot.png", "--json"]
    few = ["--pictures", 1, "--trials", 1, *QUICK]
    done = _run("evaluate", "--checkpoint", checkpoint, *few, *plot, room=1000)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["concepts"], result["chart"]) == (["V1 ball"], None)
    assert "plot.png can't be written" in done.stderr.replace("\n", " ")


def test_a_console_without_the_letters_of_a_name(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "狗"
    words = ["draw", "--checkpoint", checkpoint, "--prompt", "a ball", "--out", out, *QUICK]
    done = _run(*words, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "\\u72d7/a-ball-0.png" in done.stdout.replace(os.sep, "/")


def test_two_that_draw_at_once_lose_no_picture(tmp_path: Path) -> None:
    colors = ["red", "blue", "green"]
    for number in range(5):
        ready, folder = threading.Barrier(len(colors)), tmp_path / str(number)

        def draw(color: str, ready: threading.Barrier, folder: Path) -> Path:
            picture = Drawn("a V1 dog", 1, Image.new("RGB", (8, 8), color))
            ready.wait()
            return save_picture(picture, folder)

        with ThreadPoolExecutor(len(colors)) as pool:
            drawn = [pool.submit(draw, color, ready, folder) for color in colors]
        files = [one.result() for one in drawn]
        found = [Image.open(file).getpixel((0, 0)) for file in files]
        assert found == [ImageColor.getrgb(color) for color in colors]


def test_the_next_command_can_be_pasted(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = checkpoint.rename(tmp_path / "my model's [v1] 狗.safetensors")
    stack, folder = tmp_path / "x y.concepts.safetensors", save_concept(tmp_path / "p", 0, 3)
    words = ["learn", "--checkpoint", odd, "--stack", stack, "--images", folder, "--token", "V1"]
    words += ["--noun", "ball", "--method", "textual_inversion", "--batch", 1, *QUICK]
    assert cli.main([str(word) for word in words]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("Try: "))
    program, *pasted = shlex.split(line.removeprefix("Try: "))
    assert program == "continual-lora"
    out = tmp_path / "drawn"
    assert cli.main([*pasted, "--out", str(out), *map(str, QUICK)]) == 0
    assert [path.name for path in out.iterdir()] == ["a-photo-of-a-V1-ball-0.png"]
    assert "not a learned word" not in capsys.readouterr().err


@pytest.mark.parametrize("closed", ["1", "2", "both"])
def test_closed_outputs_are_no_error(checkpoint: Path, tmp_path: Path, closed: str) -> None:
    """As `>&-` closes them, and some programs that start others."""
    close = {"1": ">&- 2>err", "2": "2>&- >out", "both": ">&- 2>&-"}[closed]
    program = shlex.join([sys.executable, "-m", "comfy_continual_lora"])
    for words, status in ((f"info --checkpoint {checkpoint}", 0), ("info --checkpoint none", 2)):
        done = subprocess.run(f"{program} {words} {close}", shell=True, cwd=tmp_path, check=False)
        assert done.returncode == status
    error = tmp_path / "err"
    assert "Traceback" not in (error.read_text() if error.exists() else "")
