"""The worker's Python environment: made once, beside the host's own, in which nothing is installed. Standard library alone.

The environment is a venv of the host's Python. The host's packages stand behind its own ones (a .pth file), so that a torch that is new enough is
used and not downloaded again; what is too old there, or missing, is installed here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

REQUIREMENTS = (
    "torch>=2.1", "numpy>=1.26", "pillow>=10", "safetensors>=0.4", "diffusers>=0.31", "transformers>=4.46", "peft>=0.13", "filelock>=3.12",
)  # fmt: skip
_READY = "ready.json"


class NotReady(Exception):
    """The environment is not there, or made for another Python; says what to do."""


def python_of(folder: Path) -> str:
    """The environment's Python. Errors: NotReady."""
    if not _is_ready(folder):
        raise NotReady(f"The worker's environment in {folder} is not prepared yet. Prepare it (this needs the package index once), then try again.")
    return str(_python(folder))


def prepare(folder: Path, say: Callable[[str], object] = print) -> None:
    """Make the environment if it is not there; quick and silent if it is.

    Errors: NotReady with the last lines of what failed.
    """
    if _is_ready(folder):
        return
    say(f"Preparing the environment for learning in {folder}; nothing is installed into this program's own. This is done once.")
    _run([sys.executable, "-m", "venv", str(folder)], say)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([str(_python(folder)), "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    own = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    (packages / "host.pth").write_text("\n".join(dict.fromkeys(own)) + "\n")
    _run([str(_python(folder)), "-m", "pip", "install", "--disable-pip-version-check", "--prefer-binary", *REQUIREMENTS], say)
    (folder / _READY).write_text(json.dumps(_wanted()))
    say("The environment for learning is ready.")


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
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as process:
        for line in process.stdout or ():
            lines.append(line.rstrip())
            say(lines[-1])
    if process.returncode:
        raise NotReady(f"{' '.join(command[:4])} ... failed; its last lines:\n" + "\n".join(lines[-8:]))
