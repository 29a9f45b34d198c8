"""The command line as a user types it: every command, Ctrl-C, kill -9, and mistakes without a
traceback.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from helpers_learn import save_concept
from helpers_server import heard
from helpers_store import make_stack
from PIL import Image

from comfy_continual_lora import cli, cliflags, demo, store
from comfy_continual_lora.cliprogress import STOPPING
from comfy_continual_lora.errors import Cancelled
from comfy_continual_lora.files import snapshot_path, stack_path
from comfy_continual_lora.keeping import writing
from comfy_continual_lora.operations import OPERATIONS
from comfy_continual_lora.settings import (
    DrawSettings,
    EvaluateSettings,
    LearnSettings,
    ScoreSettings,
    SolveSettings,
    TrainSettings,
)

COMMAND = [sys.executable, "-m", "comfy_continual_lora"]
ROOT = Path(__file__).parents[1]
QUICK = [
    *("--steps", "4", "--batch", "2", "--rank", "4", "--device", "cpu"),
    *("--fisher-samples", "4", "--dsc-steps", "2"),
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


@pytest.mark.slow
def test_mini_learn_learn_info_draw_undo(
    tmp_path: Path, run_here: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    run = run_here
    checkpoint, out = tmp_path / "models" / "mini.safetensors", tmp_path / "drawn"
    assert run("mini", checkpoint).returncode == 0
    for token, noun, index in (("V1", "ball", 0), ("V2", "fish", 6)):
        folder = save_concept(tmp_path / token, index)
        concept = ["--images", folder, "--token", token, "--noun", noun]
        done = run("learn", "--checkpoint", checkpoint, *concept, *QUICK)
        assert (done.returncode, f"Learned {token}" in done.stdout) == (0, True), done.stderr
    info = json.loads(run("info", "--checkpoint", checkpoint, "--json").stdout)
    assert [
        (c["token"], c["noun"], c["images"], c["steps"], c["method"]) for c in info["concepts"]
    ] == [("V1", "ball", 4, 4, "retention"), ("V2", "fish", 4, 4, "retention")]
    assert info["rank"] >= 4  # or what two concepts ask for
    assert info["trainable_parameters"] == info["rank"] * (256 * 14 + 192 * 8 + 64 * 6) + 4 * 256
    assert len(info["fingerprint"]) == 64
    assert Path(info["stack_file"]).parent == checkpoint.parent
    both = ["--prompt", "a V1 ball", "--beside", "a V2 fish"]
    on = ["--checkpoint", checkpoint, "--device", "cpu"]
    drawn = run("draw", *on, *both, "-n", 2, "--steps", 2, "--out", out)
    assert drawn.returncode == 0, drawn.stderr
    assert sorted(p.name for p in out.iterdir()) == [
        "a-V1-ball-a-V2-fish-0.png",
        "a-V1-ball-a-V2-fish-1.png",
        "grid.png",
    ]
    with Image.open(out / "a-V1-ball-a-V2-fish-0.png") as picture:
        assert picture.size == (224, 128)
    plot = ["--plot", out / "scores.png"]
    scored = run("scores", *on, "--images", tmp_path / "V1", "--trials", 4, "--json", *plot)
    assert scored.returncode == 0, scored.stderr
    rows = json.loads(scored.stdout)
    assert [row["label"] for row in rows["images"]] == ["V1"] * 4
    assert rows["accuracy"] == sum(row["right"] for row in rows["images"]) / 4
    assert (out / "scores.png").stat().st_size > 1000
    plot = ["--plot", out / "retention.png"]
    few = ["--pictures", 1, "--steps", 2, "--trials", 2]
    evaluated = run("evaluate", *on, *few, "--json", *plot)
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["concepts"] == ["V1 ball", "V2 fish"]
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
    assert [re.split("[kM]B  ", line)[1].split("  ")[0] for line in listed[:3]] == [
        "consolidated V2 fish",
        "learned V2 fish",
        "learned V1 ball",
    ]
    assert (
        "Undone: consolidated V2 fish. The stack now holds V1, V2."
        in run("undo", "--checkpoint", checkpoint).stdout
    )
    assert (
        "Undone: learned V2 fish. The stack now holds V1."
        in run("undo", "--checkpoint", checkpoint).stdout
    )
    assert "holds V1, V2" in run("restore", "--checkpoint", checkpoint, 3).stdout
    assert json.loads(run("undo", "--checkpoint", checkpoint, "--version", 3, "--json").stdout)[
        "tokens"
    ] == ["V1", "V2"]
    assert not list(checkpoint.parent.glob("*.snapshot"))


@pytest.mark.slow
@pytest.mark.parametrize("how", [*STOPPING, signal.SIGKILL])
def test_a_run_that_is_stopped_or_killed_goes_on(
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
    process = subprocess.Popen(
        [*COMMAND, *learn], cwd=ROOT, stderr=subprocess.PIPE, text=True, **heard()
    )
    assert process.stderr
    for line in process.stderr:
        if re.search(r"learn 1\d/", line):  # step 10 or later
            process.send_signal(how)
            break
    rest = process.stderr.read()
    process.stderr.close()
    process.wait(60)
    killed = how == signal.SIGKILL
    assert process.returncode == (-how if killed else 128 + how)
    assert ("the same command resumes" in rest) != killed
    assert not stack_path(checkpoint).exists()
    done = run(*learn)
    assert done.returncode == 0, done.stderr
    first = next(line for line in done.stderr.splitlines() if "learn" in line)
    assert int(first.split()[1].split("/")[0]) > 8  # it did not begin again


@pytest.mark.parametrize("stack", ["", ".", "/"])
@pytest.mark.parametrize(
    "words",
    [
        "learn --images PICTURES --token V1 --noun ball",
        "learn --images PICTURES --token V1 --noun ball --plan",
        "import --lora CHECKPOINT --token V1 --noun ball",
        "rename V1 V2",
        "restore 1",
        "draw --prompt a",
        *("undo", "history", "history --keep 2", "info", "consolidate --closed-form"),
    ],
)
def test_a_stack_without_a_name_is_refused(
    run_here: Callable[..., subprocess.CompletedProcess[str]],
    checkpoint: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    stack: str,
) -> None:
    """An unset variable of a shell is an empty word."""
    monkeypatch.chdir(checkpoint.parent)
    given = [
        {"PICTURES": pictures, "CHECKPOINT": checkpoint}.get(one, one) for one in words.split()
    ]
    before = {*checkpoint.parent.iterdir()}
    done = run_here(*given, "--checkpoint", checkpoint, "--stack", stack)
    assert done.returncode == 2
    assert "--stack is" in done.stderr
    assert "which is a folder. Name the file of a concept stack" in " ".join(done.stderr.split())
    assert {*checkpoint.parent.iterdir()} == before


# Presses Ctrl-C so many times as a module is about to be imported
PRESSING = """
import runpy, signal, sys

module, times = sys.argv.pop(1), int(sys.argv.pop(1))
signal.signal(signal.SIGINT, signal.default_int_handler)

class Press:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            sys.meta_path.remove(self)
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Press())
runpy.run_module("comfy_continual_lora", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("module", "times"),
    [
        ("comfy_continual_lora.cli", 1),
        ("comfy_continual_lora.settings", 1),
        ("comfy_continual_lora.early", 2),
        ("torch", 2),
    ],
)
def test_ctrl_c_ends_in_one_line_wherever_it_is_pressed(
    checkpoint: Path, module: str, times: int
) -> None:
    words = [sys.executable, "-c", PRESSING, module, str(times)]
    words += ["draw", "-c", str(checkpoint), "-p", "a mug", "--device", "cpu"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "continual-lora: stopped.\n"


def test_ctrl_c_pressed_before_anything_is_read_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press(*_: object) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "with_config", press)
    assert cli.main(["info", "-c", "none"]) == 130
    assert capsys.readouterr().err == "continual-lora: stopped.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--token", "a/b"], "may contain only letters"),
        (["--token", "dog"], "a word the checkpoint already knows"),
        (["--images", "EMPTY"], "it is empty"),
        (["--checkpoint", "missing.safetensors"], "There is no checkpoint"),
        (["--lr", "7"], "--lr is 7; the range is 0 to 1"),
        (["--method", "retention", "--adapter", "vera"], "--adapter"),
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
    assert not stack_path(checkpoint).exists()


@pytest.mark.slow
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


@pytest.mark.parametrize("command", sorted(cli.parser().commands()))
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All flags are in one of the two levels, and the first has about ten."""
    own = cli.parser().commands()[command]
    shown = {}
    for flag in ("--help", *(["--help-all"] if own.experts else [])):
        with pytest.raises(SystemExit) as end:
            cli.main([command, flag])
        assert end.value.code == 0
        shown[flag] = capsys.readouterr().out
    assert shown["--help"].startswith(f"usage: continual-lora {command}")
    names = [max(one.option_strings, key=len) for one in own._actions if one.option_strings]
    assert sum(f"{name} " in shown["--help"] for name in names) <= 14
    assert all(re.search(rf"{name}\b", [*shown.values()][-1]) for name in names)


def test_without_a_command_all_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    for command in cli.parser().commands():
        assert len(re.findall(rf"^  {command}\b", shown, re.MULTILINE)) == 1


def _refused(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said of a command line that can't be read."""
    with pytest.raises(SystemExit) as end:
        cli.main(words.split())
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("lern", "there is no command 'lern'. Did you mean learn?"),
        ("--verson", "there is no flag --verson. Did you mean --version?"),
        ("learn --tokn V1", "there is no flag --tokn. Did you mean --token?"),
        ("info -x", "there is no flag -x."),
        ("learn -c c -i i -t V1 -n n --method retntion", "Did you mean retention?"),
        ("learn -c c -i i -t V1 -n n --precision no", "There are: auto, fp32, bf16, fp16, fp8."),
        ("learn -c c -i i -n n", "-t/--token missing."),
        ("draw -c c -p p -s x", "-s/--steps: invalid int value: 'x'."),
        ("completion fish", "shell can't be 'fish'. There are: bash, zsh, tcsh."),
    ],
)
def test_a_mistyped_command_line_is_one_line(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = _refused(words, capsys)
    assert message in error
    assert error.count("\n") == 1
    assert "--help.\n" in error


@pytest.mark.parametrize("port", ["0", "-1", "65536", "9" * 99])
def test_a_port_that_no_machine_has_is_refused(
    port: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["ui", "--models", str(tmp_path), "--port", port]) == 2
    assert "; the range is 1 to 65535." in " ".join(capsys.readouterr().err.split())
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("port", "said"), [(["--port", "80"], "the port 80"), ([], "7860 on")])
def test_a_port_that_is_taken_is_told(
    port: list[str],
    said: str,
    thin_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("gradio")
    from comfy_continual_lora.webui import alone

    class Page(nullcontext[Any]):
        def __init__(self, **_: object) -> None:
            super().__init__(self)

        def queue(self) -> Page:
            return self

        def launch(self, **_: object) -> None:
            raise OSError("Cannot find empty port in range: 80-80.")  # as Gradio's

    monkeypatch.setattr(alone, "build", lambda *_: None)
    monkeypatch.setattr(alone.gr, "Markdown", lambda _: None)
    monkeypatch.setattr(alone.gr, "Blocks", Page)
    assert cli.main(["ui", "--models", str(thin_file.parent), *port]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"{said} is taken" in error
    assert "file" not in error


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert re.fullmatch(r"continual-lora \S+, Python 3\S+, torch \S+\n", capsys.readouterr().out)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", ["--version", "learn --help-all", "list ."])
def test_output_that_can_not_be_written_is_told_in_a_sentence(
    tmp_path: Path, words: str, unbuffered: str
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    command = [*COMMAND, *words.split()]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
        )
    assert done.returncode == 2
    assert " ".join(done.stderr.split()) == (
        "continual-lora: A file or the output can't be read or written (No space left on device)."
    )
    # one whose reader is gone has nobody to tell
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("words", "rest"),
    [("scores -c c -i A B", "'B'"), ("draw -c c -p a photo of a V1 dog", "'photo of a V1 dog'")],
)
def test_a_word_that_no_flag_takes_is_told(
    words: str, rest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = _refused(words, capsys)
    command = f"continual-lora {words.split()[0]}"
    assert message.startswith(
        f"{command}: no flag takes {rest}. Most take one value: put a text of "
    )
    assert message.endswith(f"and pictures in one folder. See {command} --help.\n")


def test_a_stack_that_can_not_be_stored_is_refused_before_anything_is_loaded(
    run_here: Callable[..., subprocess.CompletedProcess[str]],
    checkpoint: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learn = ["learn", "-c", checkpoint, "-i", pictures, "-t", "V1", "-n", "ball", "--plan"]
    done = run_here(*learn, "--stack", checkpoint / "s.safetensors")
    assert (done.returncode, f"stored in {checkpoint}: it" in done.stderr.replace("\n", " ")) == (
        2,
        True,
    )
    monkeypatch.setattr(os, "access", lambda *_: False)
    done = run_here(*learn)
    assert done.returncode == 2
    assert "no permission to write in it" in done.stderr.replace("\n", " ")


# --- what needs no torch -------------------------------------------------------------------------

WORKS, FAILS = 0, 2
LEARN = "learn -c MINI -i PICTURES -t V3 -n ball "


@pytest.fixture(scope="module")
def two_learned(
    tmp_path_factory: pytest.TempPathFactory, thin_file: Path, folders: dict[str, Path]
) -> Path:
    """A folder with a checkpoint, its stack of V1 and V2 and its pictures. Not to be changed."""
    root = tmp_path_factory.mktemp("light")
    stack = stack_path(shutil.copy(thin_file, root / "mini.safetensors"))
    for count in (1, 2):
        whole = make_stack(count)
        store.save_stack(whole, stack, store.change("learned", whole.records[-1:]))
    shutil.copytree(folders["V1"], root / "pictures")
    return root


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("--help", WORKS),
        ("--version", WORKS),
        ("learn --help-all", WORKS),
        ("info -c MINI", WORKS),
        ("history -c MINI", WORKS),
        ("history -c MINI --keep 4", WORKS),
        ("undo -c MINI", WORKS),
        ("rename -c MINI V1 W1", WORKS),
        ("list FOLDER", WORKS),
        ("info -c missing", FAILS),
        ("undo -c missing", FAILS),
        ("restore -c MINI 7", FAILS),
        ("rename -c MINI V1 dog", FAILS),
        (LEARN.replace("MINI", "missing"), FAILS),
        (LEARN.replace("PICTURES", "missing"), FAILS),
        (LEARN.replace("PICTURES", "missing") + "--plan", FAILS),
        (LEARN.replace("V3", "V1"), FAILS),
        (LEARN.replace("V3", "a/b") + "--plan", FAILS),
        (LEARN.replace("V3", "dog") + "--plan", FAILS),
        (LEARN.replace("V3", "V1") + "--replace", FAILS),
        (LEARN.replace("ball", "V3") + "--plan", FAILS),
        (LEARN + "--rank 1000", FAILS),
        ("draw -c missing -p p", FAILS),
        ("draw -c MINI -p p -o MINI", FAILS),
        ("draw -c MINI -p p --only V7", FAILS),
        ("forget -c MINI -t V7", FAILS),
        ("merge -c MINI missing", FAILS),
        ("import -c MINI --lora missing -t W1", FAILS),
        ("scores -c MINI -i missing", FAILS),
        ("evaluate -c MINI --plot a.txt", FAILS),
        ("export -c MINI -o MINI", FAILS),
        ("consolidate -c MINI -i missing", FAILS),
    ],
)
def test_torch_is_not_imported(words: str, status: int, two_learned: Path, tmp_path: Path) -> None:
    """Importing it takes seconds, which who only looks or mistypes should not wait for."""
    root = Path(shutil.copytree(two_learned, tmp_path / "copy"))
    paths = {"MINI": root / "mini.safetensors", "PICTURES": root / "pictures", "FOLDER": root}
    code = (
        "import sys; from comfy_continual_lora.cli import main\n"
        "try: status = main(sys.argv[1:])\n"
        "except SystemExit as end: status = end.code\n"
        "print([name for name in ('torch', 'transformers', 'diffusers') if name in sys.modules])\n"
        "sys.exit(status)"
    )
    given = [str(paths.get(word, word)) for word in words.split()]
    done = subprocess.run(
        [sys.executable, "-c", code, *given],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == status, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert "Traceback" not in done.stderr
    assert bool(done.stderr) == (status == FAILS)
    assert not list(tmp_path.rglob("*missing*"))  # nor is anything left where nothing was


_VALUES = {int: 65, float: 0.5, str: None}
_COMMANDS = {
    "learn": "learn --checkpoint c --images i --token V1 --noun n",
    "consolidate": "consolidate --checkpoint c --images i",
    "closed_form": "consolidate --checkpoint c --closed-form",
    "forget": "forget --checkpoint c --token V1",
    "rename": "rename --checkpoint c V1 V2",
    "merge": "merge --checkpoint c o",
    "import": "import --checkpoint c --lora l --token W1",
    "scores": "scores --checkpoint c --images i",
    "evaluate": "evaluate --checkpoint c",
    "draw": "draw --checkpoint c --prompt p",
    "export": "export --checkpoint c --out o",
    "undo": "undo --checkpoint c",
    "history": "history --checkpoint c",
    "restore": "restore --checkpoint c 3",
    "info": "info --checkpoint c",
}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("learn", LearnSettings),
        ("consolidate", TrainSettings),
        ("closed_form", SolveSettings),
        ("forget", SolveSettings),
        ("merge", SolveSettings),
        ("import", SolveSettings),
        ("scores", ScoreSettings),
        ("evaluate", EvaluateSettings),
        ("draw", DrawSettings),
    ],
)
def test_every_setting_has_a_flag_that_reaches_it(name: str, settings: type) -> None:
    for f in dataclasses.fields(settings):
        kind = {"int": int, "float": float}.get(str(f.type).split(" ")[0], str)
        choices = [c for c in f.metadata["choices"] if c != f.default] or ["text"]
        flips = str(f.type).startswith("bool")
        value = (not f.default) if flips else choices[0] if kind is str else kind(_VALUES[kind])
        flag = f"--{'lr' if f.name == 'rate' else f.name.replace('_', '-')}"
        words = [flag if value else flag.replace("--", "--no-")] if flips else [flag, str(value)]
        parsed = cli.parser().parse_args([*_COMMANDS[name].split(), *words])
        request: Any = cliflags.request_of(OPERATIONS[name], parsed)
        assert request.settings == dataclasses.replace(settings(), **{f.name: value})


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_a_command_with_the_defaults_of_its_request(name: str) -> None:
    words = _COMMANDS[name].split()
    request = cliflags.request_of(OPERATIONS[name], cli.parser().parse_args(words))
    for field in dataclasses.fields(request):
        value = getattr(request, field.name)
        if field.default is not dataclasses.MISSING and (name, field.name) != ("draw", "out"):
            assert value == field.default, field.name
        else:
            assert value, field.name
    request = cliflags.request_of(
        OPERATIONS[name], cli.parser().parse_args([*words, "--stack", "s", "--json"])
    )
    assert request.stack == Path("s")


@pytest.mark.parametrize(
    ("command", "fields"),
    [
        ("learn --checkpoint c --images i --token V1 --noun n --replace", {"replace": True}),
        ("draw --checkpoint c --prompt a --prompt b --only V1 V2 -n 3", {"only": ["V1", "V2"]}),
        ("draw --checkpoint c --prompt a", {"prompts": ["a"], "out": Path("drawn")}),
        (
            "evaluate --checkpoint c --concepts f --clip g --plot p.png",
            {"images": Path("f"), "clip": Path("g"), "plot": Path("p.png")},
        ),
        ("merge --checkpoint c o --device cpu", {"other": Path("o"), "device": "cpu"}),
        ("restore --checkpoint c 3", {"version": 3}),
        ("history --checkpoint c --keep 0", {"keep": 0}),
        ("undo --checkpoint c --version 2", {"version": 2}),
        (
            "export --checkpoint c --out o --embeddings e --format peft --remove-superseded",
            {"embeddings": Path("e"), "format": "peft", "remove_superseded": True},
        ),
        (
            "import --checkpoint c --lora l --token W1 --trigger sks --strength 0.5",
            {"lora": Path("l"), "trigger": "sks", "strength": 0.5, "noun": ""},
        ),
    ],
)
def test_flags_reach_the_fields_of_requests(command: str, fields: dict[str, object]) -> None:
    parsed = cli.parser().parse_args(command.split())
    request = cliflags.request_of(OPERATIONS[parsed.command], parsed)
    assert {name: getattr(request, name) for name in fields} == fields


@pytest.mark.slow
def test_the_same_request_again_is_no_mistake(checkpoint: Path, pictures: Path) -> None:
    learn = ["learn", "--checkpoint", checkpoint, "--images", pictures, "--token", "V1"]
    learn += ["--noun", "ball", "--method", "lora", *QUICK]
    assert run(*learn).returncode == 0
    before = stack_path(checkpoint).read_bytes()
    again = run(*learn)
    assert again.returncode == 0
    assert "V1 ball is already on the stack" in again.stdout
    assert "nothing was done" in again.stdout
    assert json.loads(run(*learn, "--json").stdout)["again"] is True
    assert stack_path(checkpoint).read_bytes() == before


def test_errors_name_flags(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, flags in (
        (["draw", "--prompt", "a", "--guidance", "500"], ["--guidance"]),
        (["consolidate"], ["--images", "--closed-form"]),
        (["history", "--keep", "-1"], ["--keep"]),
    ):
        assert cli.main([words[0], "--checkpoint", str(checkpoint), *words[1:]]) == 2
        message = capsys.readouterr().err
        assert "`" not in message
        for flag in flags:
            assert flag in message


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--images i --energy .9", "--energy is for the closed form"),
        ("--closed-form --images i", "--images is for DSC"),
        ("--closed-form --no-flip", "--flip is for DSC"),
        ("--energy .9", "--energy is for the closed form"),
    ],
)
def test_what_a_way_to_consolidate_would_ignore_is_refused(
    words: str, said: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["consolidate", "--checkpoint", str(checkpoint), *words.split()]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_the_demo_keeps_what_was_learned_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Begun(Exception):
        pass

    def begin(_: Path) -> None:
        raise Begun

    monkeypatch.setattr(demo, "write_checkpoint", begin)
    out = tmp_path / "demo"
    stack = out / "mini.concepts.safetensors"
    with pytest.raises(Begun):
        cli.main(["demo", "--out", str(out)])
    store.save_stack(make_stack(3), stack)
    before = stack.read_bytes()
    assert cli.main(["demo", "--out", str(out)]) == 2
    assert "has learned V3 mug since the demo" in capsys.readouterr().err.replace("\n", " ")
    assert stack.read_bytes() == before
    store.save_stack(make_stack(2), stack)
    with pytest.raises(Begun):
        cli.main(["demo", "--out", str(out)])
    assert not stack.exists()


@pytest.mark.skipif(os.name != "posix", reason="file size limits of POSIX")
def test_a_full_disk_is_told_with_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        assert cli.main(["mini", str(tmp_path / "mini.safetensors")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = " ".join(capsys.readouterr().err.split())
    assert f"{tmp_path / 'mini.safetensors'} can't be read or written (File too large)" in said
    assert not list(tmp_path.iterdir())


def test_a_stopped_demo_starts_from_scratch_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise Cancelled("(learn, step 3 of 5) The same command resumes from here.")

    monkeypatch.setattr(demo, "write_checkpoint", stop)
    out = tmp_path / "demo"
    command = ["demo", "--out", str(out)]
    assert cli.main(command) == 130
    said = " ".join(capsys.readouterr().err.split())
    assert said == "continual-lora: stopped. The demo starts from scratch when it is run again."
    stack = out / "mini.concepts.safetensors"
    snapshot_path(stack, "V2", "0" * 12).touch()
    with writing(stack):
        assert cli.main(command) == 2
    assert "Another program is changing" in capsys.readouterr().err
    assert list(out.glob("*snapshot"))
    store.save_stack(make_stack(2), stack)  # whether its checkpoint is there or not
    assert cli.main(command) == 130
    assert not list(out.glob("*snapshot"))
    assert not stack.exists()


@pytest.mark.slow
def test_the_demo(tmp_path: Path) -> None:
    done = (
        run("demo", "--out", tmp_path / "demo", "--steps", "100")
        if os.environ.get("CI")
        else pytest.skip("takes minutes; CI runs it")
    )
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "demo" / "report.html").read_text()
    assert report.count("<svg") == 2
    assert report.count("<img") == 5 + 4 + 5 + 8 + 4 + 4 + 2 * 3
    assert "to be learned again" not in report
    # no base64 has a colon; "http" occurs in pictures by chance
    assert "://" not in report.replace("http://www.w3.org", "")
