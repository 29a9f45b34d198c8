"""Run by the web UI at every launch, in a process of its own: prepares the worker's environment
once. Nothing is installed into the web UI's.
"""

from __future__ import annotations

import sys
from pathlib import Path

EXTENSION = Path(__file__).parent
sys.path.insert(0, str(EXTENSION))
import home  # noqa: E402


def _say(line: str) -> None:
    """The web UI holds back what this process prints until it ends; a terminal shows it at once."""
    print(line, flush=True)
    try:
        with open("/dev/tty", "w") as terminal:
            terminal.write(f"continual-lora: {line}\n")
    except OSError:
        pass


home.load_package()
from comfy_continual_lora.webui.environment import NotReady, environment_of, home_of, prepare  # noqa: E402

try:
    prepare(environment_of(home_of(EXTENSION)), _say)
except NotReady as error:
    print(
        f"{error}\nThe web UI starts all the same; the tab Continual LoRA can try again.",
        file=sys.stderr,
    )
