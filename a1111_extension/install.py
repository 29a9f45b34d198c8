"""Run by the web UI at every launch, in its own process: prepares the worker's environment once.
Nothing is installed into the web UI's.
"""

from __future__ import annotations

import sys
from pathlib import Path

EXTENSION = Path(__file__).parent
sys.path.insert(0, str(EXTENSION))
import home  # noqa: E402


def _say(line: str) -> None:
    """The web UI shows this process's output only at its end, so also print to the terminal."""
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
        f"{error}\nThe web UI starts anyway; you can try again in the tab Continual LoRA.",
        file=sys.stderr,
    )
