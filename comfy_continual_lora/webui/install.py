"""`continual-lora install-webui`: installs the extension into a web UI's extensions folder, as a
link to this clone or as a copy.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..errors import SettingError

NAME = "continual-lora"
PACKAGE = Path(__file__).resolve().parents[1]


def install(webui: Path, *, copy: bool) -> str:
    """Install the extension; returns a message on what was done.

    Errors: SettingError for a folder that is not a web UI, or if something else has the name.
    """
    extensions = webui / "extensions"
    if not extensions.is_dir() or not any(
        (webui / name).exists() for name in ("webui.py", "launch.py", "models")
    ):
        raise SettingError(
            f"{webui} is not an AUTOMATIC1111 or Forge folder: it has no extensions folder beside "
            "webui.py or models. Give the folder that contains webui.py, or its --data-dir."
        )
    sources = (PACKAGE.parent / "a1111_extension", PACKAGE / "a1111_extension")
    source = next((path for path in sources if path.is_dir()), None)
    assert source, "a1111_extension is missing from the package"
    target = extensions / NAME
    if target.exists() and not (target / "home.py").exists():
        raise SettingError(
            f"{target} already exists and is not this extension. Move it away, then try again."
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
    done = f"Copied the extension to {target}."
    if linked:
        done = f"Linked {source} as {target}; updating the clone updates the tab."
    return (
        f"{done}\nStart the web UI: the first start prepares an environment for learning in "
        f"{webui / NAME}; nothing is installed into the web UI's own."
    )


def _linked(source: Path, target: Path) -> bool:
    try:
        os.symlink(source, target, target_is_directory=True)
        return True
    except OSError:  # Windows needs a privilege for links
        return False


def _remove(target: Path) -> None:
    """Remove an earlier installation; a link is not followed."""
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)
