"""`continual-lora install-webui`: the extension into a web UI's extensions folder, as a link to
this clone or as a copy.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..errors import SettingError

NAME = "continual-lora"
PACKAGE = Path(__file__).resolve().parents[1]


def install(webui: Path, *, copy: bool) -> str:
    """Put it there; says what was done.

    Errors: SettingError for a folder that is no web UI, or where something else has the name.
    """
    extensions = webui / "extensions"
    if not extensions.is_dir() or not any(
        (webui / name).exists() for name in ("webui.py", "launch.py", "models")
    ):
        raise SettingError(
            f"{webui} is no AUTOMATIC1111 or Forge folder: it has no extensions folder beside "
            "webui.py or models. "
            "Give the folder that holds webui.py, or the one given to it as --data-dir."
        )
    source = next(
        (
            p
            for p in (PACKAGE.parent / "a1111_extension", PACKAGE / "a1111_extension")
            if p.is_dir()
        ),
        None,
    )
    assert source, "the package has lost its a1111_extension"
    target = extensions / NAME
    if target.exists() and not (target / "home.py").exists():
        raise SettingError(
            f"{target} is there already and is something else. Move it away, then try again."
        )
    _remove(target)
    linked = not copy and source.parent == PACKAGE.parent and _linked(source, target)
    if not linked:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, target, ignore=ignore)
        shutil.copytree(
            PACKAGE,
            target / PACKAGE.name,
            ignore=shutil.ignore_patterns("__pycache__", "a1111_extension"),
        )
    done = (
        f"Linked {source} as {target}; updating the clone updates the tab."
        if linked
        else f"Copied the extension to {target}."
    )
    return (
        f"{done}\nStart the web UI: the first start prepares an environment for learning in "
        f"{webui / NAME}, nothing is installed into its own."
    )


def _linked(source: Path, target: Path) -> bool:
    try:
        os.symlink(source, target, target_is_directory=True)
        return True
    except OSError:  # Windows asks for a right to make links
        return False


def _remove(target: Path) -> None:
    """Take an earlier installation away; a link is not followed."""
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)
