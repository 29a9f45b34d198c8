"""The worker's Python environment: created once, beside the host's own, which is left untouched.
Standard library only.

It is a venv of the host's Python. The host's torch, with the GPU libraries that came with it, is
linked into it if it is new enough, so that gigabytes are not downloaded again; everything else is
installed here. (Exposing all of the host's packages does not work: their versions satisfy our
requirements on paper, and fail on import.)
"""

from __future__ import annotations

import collections
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

REQUIREMENTS = (
    "torch>=2.1",
    "numpy>=1.26",
    "pillow>=10",
    "safetensors>=0.4",
    "diffusers>=0.31",
    "transformers>=4.46",
    "peft>=0.13",
    "filelock>=3.12",
    "tomli>=2; python_version < '3.11'",
)
OLDEST_TORCH = (2, 1)
CAUTIOUS = (
    "transformers<4.50",
    "diffusers<0.33",
    "peft<0.15",
    "accelerate<1.3",
    "huggingface_hub<0.30",
)  # newer ones require a torch newer than 2.5
_GPU_LIBRARIES = ("nvidia", "triton", "pytorch-triton", "cuda", "intel-")
_READY = "ready.json"


class NotReady(Exception):
    """The environment is missing, or was made for another Python. The message says what to do."""


def home_of(extension: Path) -> Path:
    """Our folder in a web UI, beside its extensions; a link to the extension is not followed, so
    each web UI has its own.
    """
    return extension.parent.parent / "continual-lora"


def environment_of(home: Path) -> Path:
    return home / "environment"


def python_of(folder: Path) -> str:
    """The environment's Python. Errors: NotReady."""
    if not _is_ready(folder):
        raise NotReady(
            f"The worker's environment in {folder} is not prepared yet. Press Prepare environment "
            "in the tab (this needs the package index once), then try again."
        )
    return str(_python(folder))


def prepare(folder: Path, say: Callable[[str], object] = print) -> None:
    """Create the environment if it is missing; quick and silent otherwise.

    Errors: NotReady with the last lines of output of the command that failed.
    """
    if _is_ready(folder):
        return
    say(
        f"Preparing the environment for learning in {folder}; nothing is installed into this "
        "program's own. This is done once."
    )
    _run([sys.executable, "-m", "venv", "--clear", str(folder)], say)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(
        subprocess.run(
            [str(_python(folder)), "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    bounds: list[str] = []
    torch = _version_of("torch")
    if torch >= OLDEST_TORCH and _link(["torch"], packages):
        bounds = [
            f"torch=={metadata.version('torch')}",
            *(CAUTIOUS if torch < (2, 6) else ()),
            *_same_numpy(),
        ]
        say(f"Its torch {metadata.version('torch')} is used.")
    _run(
        [
            str(_python(folder)),
            "-m",
            "pip",
            "install",
            "--disable-pip-version-check",
            "--prefer-binary",
            *REQUIREMENTS,
            *bounds,
        ],
        say,
    )
    (folder / _READY).write_text(json.dumps(_wanted()))
    say("The environment for learning is ready.")


class Preparation:
    """Runs `work` in the background and keeps what a page shows of it: the lines `work` reports."""

    def __init__(self, work: Callable[[Callable[[str], object]], object]) -> None:
        self.work = work
        self.lines: collections.deque[str] = collections.deque(maxlen=12)
        self.error = ""
        self.is_running = self.is_done = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Does nothing if it is already running."""
        with self._lock:
            if self.is_running:
                return
            self.is_running, self.error = True, ""
            self.lines.clear()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self.work(self.lines.append)
            self.is_done = True
        except Exception as error:  # whatever it is, the page has to show it
            self.error = str(error) or type(error).__name__
        finally:
            self.is_running = False


def _version_of(name: str) -> tuple[int, ...]:
    """The first two numbers of the version installed in this Python; empty if it is not."""
    try:
        return tuple(int(part) for part in re.findall(r"\d+", metadata.version(name))[:2])
    except metadata.PackageNotFoundError:
        return ()


def _same_numpy() -> list[str]:
    """torch before 2.3 works with numpy 1 only, so the host's torch needs the host's numpy."""
    return [f"numpy=={metadata.version('numpy')}"] if _version_of("numpy") >= (1, 26) else []


def _link(names: list[str], packages: Path) -> bool:
    """Link these packages and the GPU libraries they require into the folder `packages`; returns
    whether that was possible.
    """
    visited: set[str] = set()
    waiting = list(names)
    entries: dict[str, Path] = {}
    while waiting:
        name = waiting.pop()
        visited.add(name)
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # for another system
        entries |= {
            part: Path(str(package.locate_file(part)))
            for file in package.files or ()
            if (part := file.parts[0]) not in ("..", "__pycache__")
        }
        for requirement in package.requires or ():
            match = re.match(r"[\w.-]+", requirement)
            if match and match[0].startswith(_GPU_LIBRARIES) and match[0] not in visited:
                waiting.append(match[0])
    try:
        for part, source in entries.items():
            _link_one(source, packages / part)
    except OSError:
        return False
    return bool(entries)


def _link_one(source: Path, target: Path) -> None:
    if target.exists():
        return
    try:
        os.symlink(source, target, target_is_directory=source.is_dir())
    except OSError:
        if os.name != "nt" or not source.is_dir():
            raise
        import _winapi

        _winapi.CreateJunction(str(source), str(target))  # pyright: ignore[reportAttributeAccessIssue] - Windows needs a privilege for links


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _wanted() -> dict[str, object]:
    return {"requirements": list(REQUIREMENTS), "python": sys.version, "host": sys.prefix}


def _is_ready(folder: Path) -> bool:
    try:
        return json.loads((folder / _READY).read_text()) == _wanted() and _python(folder).exists()
    except (OSError, ValueError):
        return False


def _run(command: list[str], say: Callable[[str], object]) -> None:
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout or ():
            lines.append(line.rstrip())
            say(lines[-1])
    if process.returncode:
        raise NotReady(
            f"{' '.join(command[:4])} ... failed; its last lines:\n" + "\n".join(lines[-8:])
        )
