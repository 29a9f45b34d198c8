"""What a drawn picture says of itself, as text in its PNG. Light.

parameters        AUTOMATIC1111's text, which its PNG Info reads; ComfyUI makes a graph of it when
                  the picture is dropped there, as it does for every PNG without a graph of its own
continual_lora    everything that decided the picture, as JSON
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from . import __version__
from .settings import DrawSettings

# The web UI's names. Without a schedule it would take Karras' for DPM++ 2M; its DDIM has one alone
_SAMPLERS = {"dpm++": "DPM++ 2M", "ddim": "DDIM"}
_SCHEDULES = {"dpm++": "SGM Uniform"}  # from the last timestep down in even steps, as `sample` does


@dataclass(frozen=True)
class Origin:
    """What all pictures of a drawing share; `concepts`: how prompts name those that were in use."""

    checkpoint: str  # its file's name, without the ending
    fingerprint: str
    prediction: str  # what its net predicts: epsilon, v or flow
    stack: str  # its file's name
    version: int | None  # of the stack; None if there is none
    concepts: Sequence[str]
    only: Sequence[str]  # the words that were solved for, if not all
    clip_skip: int = 1


def texts(
    origin: Origin, prompts: Sequence[str], seed: int, size: tuple[int, int], settings: DrawSettings
) -> dict[str, str]:
    """The texts by name, of a picture of prompts from left to right; `size`: width and height;
    `settings` are resolved.
    """
    everything = {
        "prompts": list(prompts),
        "settings": {**asdict(settings), "seed": seed, "count": 1},
        "size": list(size),
        **asdict(origin),
        "program": __version__,
    }
    return {
        "parameters": _parameters(origin, prompts, seed, size, settings),
        "continual_lora": json.dumps(everything),
    }


def _parameters(
    origin: Origin, prompts: Sequence[str], seed: int, size: tuple[int, int], settings: DrawSettings
) -> str:
    """ComfyUI needs the line of the negative prompt, even if it is empty."""
    flow = origin.prediction == "flow"  # integrated by Euler's method, whatever the solver
    pairs: dict[str, Any] = {
        "Steps": settings.steps,
        "Sampler": "Euler" if flow else _SAMPLERS[settings.solver],
        "CFG scale": settings.guidance,
        "Seed": seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": origin.checkpoint,
        "RNG": "CPU",
    }
    if not flow and settings.solver in _SCHEDULES:
        pairs["Schedule type"] = _SCHEDULES[settings.solver]
    if origin.clip_skip != 1:
        pairs["Clip skip"] = origin.clip_skip
    if flow:
        pairs["Shift"] = settings.flow_shift
    if origin.version is not None:
        pairs["Concepts"] = ", ".join(origin.concepts)
        pairs["Concept stack"] = f"{origin.stack} version {origin.version}"
    if settings.mixed:
        pairs["Looks"] = "mixed"
    if len(prompts) > 1:
        pairs["Prompts side by side"] = len(prompts)
    pairs["Version"] = f"continual-lora {__version__}"
    return "\n".join(
        [
            " | ".join(map(_line, prompts)),
            f"Negative prompt: {_line(settings.negative)}",
            _listed(pairs),
        ]
    )


def _line(text: str) -> str:
    """A line break would end a prompt."""
    return " ".join(text.split())


def _listed(pairs: Mapping[str, Any]) -> str:
    """ "Steps: 25, Seed: 3"; values with a comma or a colon are quoted, as JSON."""
    texts = {name: str(value) for name, value in pairs.items()}
    quoted = {
        n: json.dumps(text) if re.search(r'[,:"]', text) else text for n, text in texts.items()
    }
    return ", ".join(f"{name}: {text}" for name, text in quoted.items())
