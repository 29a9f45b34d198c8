"""Every choice a user has, declared once: default, range, unit, help. Every front end makes its
widgets, flags and checks from here.

A default of None means "what suits the checkpoint": `LearnSettings.resolved` fills it from PRESETS
and METHOD_PRESETS.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .errors import SettingError

METHODS = (
    "textual_inversion",
    "custom_diffusion",
    "custom_diffusion_ewc",
    "lora",
    "c_lora",
    "lora_ewc",
    "lora_ewc_dc",
    "lora_dsc",
    "lora_dsc_ewc",
    "lora_dsc_ewc_dc",
    "retention",
    "closed_form",
)
SOLVERS = ("dpm++", "ddim")
MOST_VECTORS = 16  # of a word: prompts about two have to fit into 77 positions
FITS = ("crop", "pad", "bucket")
FORMATS = ("kohya", "diffusers", "peft")  # of an exported LoRA
FIT_HELP = (
    "pictures that are not square are cropped to the middle, padded with their edge, or keep "
    "their shape (aspect buckets)"
)
# Settings that say how the same numbers are come to: a run may go on with others of them.
MEANS = (
    "snapshot_every",
    "preview_every",
    "checkpointing",
    "accumulate",
    "compile",
    "channels_last",
)
TEMPLATES = (
    "a photo of a {}",
    "photo of a {}",
    "a picture of a {}",
    "a photo of the {}",
    "a good photo of a {}",
    "a close-up photo of a {}",
    "{}",
)

_STOCK = {
    "rank": 16, "vectors": 1, "steps": 1000, "batch": 1, "rate": 2e-4, "token_rate": 1e-3,
    "weighting": "uniform", "flip": True, "ewc_strength": 1e-2, "dsc_steps": 200, "guidance": 7.5,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {  # only the mini-SD's were measured
    "sd1": _STOCK,
    "sd2": _STOCK,
    "sdxl": {**_STOCK, "rate": 1e-4, "guidance": 7.0},
    "mini": {
        "rank": 16,
        "vectors": 4,
        "steps": 300,
        "batch": 8,
        "rate": 3e-4,
        "token_rate": 1e-2,
        "weighting": "debiased",
        "flip": False,
        "ewc_strength": 1e-2,
        "dsc_steps": 60,
        "guidance": 4.0,
    },
}
# What suits a method on a checkpoint better than the checkpoint's row; measured ones only
# (benchmarks/LOG.md).
METHOD_PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    ("mini", "lora_dsc_ewc"): {"ewc_strength": 3e-3},
    ("mini", "lora_dsc_ewc_dc"): {"ewc_strength": 3e-3},
    ("mini", "retention"): {"rate": 1e-3},
}
# its few numbers scale fixed random matrices: at the rate of LoRA's they stay about where they are
# (measured on the mini-SD)
VERA_SPEED = 30
WITH_VERA = (
    "lora",
    "lora_ewc",
    "lora_ewc_dc",
    "lora_dsc",
    "lora_dsc_ewc",
    "lora_dsc_ewc_dc",
    "retention",
)


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    multiple: int = 1,
    unit: str = "",
    group: str = "",
) -> Any:
    """A dataclass field that knows its range, what to tell the user, and under which heading."""
    meta = {
        "help": help,
        "low": low,
        "high": high,
        "choices": choices,
        "multiple": multiple,
        "unit": unit,
        "group": group,
    }
    return dataclasses.field(default=default, metadata=meta)


def explained(f: dataclasses.Field) -> str:
    """A setting's help; where its default is "what suits the checkpoint", also how a widget says
    that, and what it comes to.
    """
    if f.default is not None:
        return f.metadata["help"]
    nothing = "Auto" if str(f.type).startswith("bool") else "0"
    return f"{f.metadata['help']}. {nothing}: what suits the checkpoint" + (
        f" ({suits})" if (suits := suiting(f)) else ""
    )


def suiting(f: dataclasses.Field) -> str:
    """What suits the checkpoint, in words: "2e-4, sdxl 1e-4, mini 3e-4"; nothing where that is the
    checkpoint's own.
    """
    values = {preset: chosen[f.name] for preset, chosen in PRESETS.items() if f.name in chosen}
    others = [
        f"{preset} {said(value)}" for preset, value in values.items() if value != values["sd1"]
    ]
    others += [
        f"{method} on {preset} {said(chosen[f.name])}"
        for (preset, method), chosen in METHOD_PRESETS.items()
        if f.name in chosen
    ]
    others += [f"VeRA {VERA_SPEED} times as much"] if f.name == "rate" else []
    return ", ".join([said(values["sd1"]), *others]) if values else ""


def said(value: Any) -> str:
    """A value as users read it."""
    return (
        {True: "yes", False: "no", "": "nothing"}.get(value, str(value))
        if isinstance(value, (bool, str))
        else str(value)
    )


def from_widget(f: dataclasses.Field, value: Any) -> Any:
    """A widget's value -> the setting's; 0 and "auto" become None again where None is the default."""
    if str(f.type) == "bool | None":
        return {"auto": None, "yes": True, "no": False}.get(value, value)
    if f.default is None and not value:
        return None
    return int(value) if str(f.type).startswith("int") and value is not None else value


class Settings:
    """Checks shared by all settings: `check()` raises SettingError for the first value out of its
    range.
    """

    def check(self) -> None:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value, meta = getattr(self, f.name), f.metadata
            if value is None or not meta:
                continue
            if meta["choices"]:
                if value not in meta["choices"]:
                    raise SettingError(
                        f"{f.name} is {value!r}; it has to be one of {', '.join(meta['choices'])}."
                    )
                continue
            low, high, unit = meta["low"], meta["high"], f" {meta['unit']}" if meta["unit"] else ""
            if (low is not None and not value >= low) or (high is not None and not value <= high):
                raise SettingError(
                    f"{f.name} is {value:g}; the range is "
                    f"{low:g}{' and more' if high is None else f' to {high:g}'}{unit}."
                )
            if meta["multiple"] > 1 and value % meta["multiple"]:
                raise SettingError(
                    f"{f.name} is {value:g}; it has to be a multiple of {meta['multiple']}{unit}."
                )

    def resolved(self, preset: str) -> Any:
        """A copy in which every None is what suits the checkpoint; checked."""
        suits = PRESETS[preset] | METHOD_PRESETS.get((preset, getattr(self, "method", "")), {})
        if getattr(self, "adapter", "") == "vera":
            suits["rate"] = VERA_SPEED * PRESETS[preset]["rate"]
        fill = {k: v for k, v in suits.items() if getattr(self, k, 0) is None}
        done = dataclasses.replace(self, **fill)  # type: ignore[type-var]
        done.check()
        return done


@dataclass(frozen=True)
class ConsolidateSettings(Settings):
    """What learning and consolidating have in common."""

    batch: int | None = setting(None, "pictures a step", low=1, high=256)
    rate: float | None = setting(None, "learning rate of the LoRA", low=0, high=1)
    warmup: int = setting(20, "steps over which the rate rises", low=0, high=100_000)
    clip: float = setting(
        1.0, "largest gradient norm; a longer gradient is shortened to it", low=1e-6
    )
    seed: int = setting(0, "seed of every random draw", low=0, high=2**63 - 1)
    size: int | None = setting(
        None, "side of the training pictures", low=64, high=4096, unit="pixels", multiple=8
    )
    fit: str = setting("crop", FIT_HELP, choices=FITS)
    flip: bool | None = setting(
        None, "also learn from the mirrored pictures; switch off for things with writing on them"
    )
    precision: str = setting(
        "auto",
        "number format of the frozen checkpoint while learning; auto takes bf16 or fp16 where "
        "the device is faster with it, fp8 stores it in half "
        "as much again",
        choices=("auto", "fp32", "bf16", "fp16", "fp8"),
    )
    checkpointing: bool = setting(
        False, "gradient checkpointing: less memory, about a third more time"
    )
    accumulate: int = setting(
        1,
        "parts a step's pictures are taken in, one after the other: less memory, the same step",
        low=1,
        high=256,
    )
    optimizer: str = setting(
        "adamw",
        "adamw, or adamw8bit of bitsandbytes: its state takes a quarter, which counts where all "
        "of K and V learn (custom_diffusion)",
        choices=("adamw", "adamw8bit"),
    )
    compile: bool = setting(
        False,
        "torch.compile the net first: minutes at the start; meant for long runs on a GPU, a CPU "
        "can get slower",
    )
    channels_last: bool = setting(
        False,
        "lay the net's weights out channels-last: known to help many GPUs, made little "
        "difference on a CPU",
    )
    snapshot_every: int = setting(
        50, "steps between snapshots; an interrupted run goes on from the last", low=1
    )
    dc_scale: str = setting(
        "calibrated",
        "temperature of the DC scores: calibrated on the first concept, or 1 on mean or on "
        "summed errors (for comparison)",
        choices=("calibrated", "mean", "sum"),
        group="DC scores, EWC",
    )
    subset: int = setting(
        5,
        "concepts the Fisher compares at a time: the newest, its class noun, and earlier ones",
        low=2,
        high=64,
        group="DC scores, EWC",
    )
    ewc_strength: float | None = setting(
        None, "weight of the EWC penalty (lambda)", low=0, group="DC scores, EWC"
    )
    ewc_mode: str = setting(
        "online",
        "one running Fisher around the newest adapter, or one for each concept around its own",
        choices=("online", "separate"),
        group="DC scores, EWC",
    )
    ewc_decay: float = setting(
        1.0,
        "what is left of the Fishers so far when one is added (gamma, online only)",
        low=0,
        high=1,
        group="DC scores, EWC",
    )
    fisher_samples: int = setting(
        256,
        "single gradients the Fisher is averaged over",
        low=1,
        high=1_000_000,
        group="DC scores, EWC",
    )
    fisher_space: str = setting(
        "factors",
        "take the Fisher of A and B, or of their product (much larger to store)",
        choices=("factors", "delta"),
        group="DC scores, EWC",
    )
    retention_weight: float = setting(
        0.0,
        "weight of holding what is done to ordinary prompts, and to earlier concepts' where the "
        "method does not solve for them afterwards; "
        "0: the method's own",
        low=0,
        group="retention",
    )
    retention_ordinary: float = setting(
        1.0,
        "weight of ordinary prompts in that, all earlier concepts together having 3; less learns "
        "more and leaks more",
        low=0,
        group="retention",
    )
    retention_words: float | None = setting(
        None,
        "share of the hold that is on what prompts say, beside the padding behind them; not "
        "said: every position counts alike",
        low=0,
        high=1,
        group="retention",
    )
    retention_apart: float = setting(
        0.0,
        "weight of doing nothing behind the end of the concept's own prompts, as a share of "
        "that; less bleeds more in pictures of two",
        low=0,
        group="retention",
    )
    dsc_steps: int | None = setting(
        None, "steps of Diffusion Scores Consolidation", low=1, high=1_000_000, group="DSC"
    )
    dsc_rate: float = setting(
        0.5, "its learning rate, as a share of the rate", low=0, high=100, group="DSC"
    )
    dsc_a1: float = setting(
        1.0, "weight of agreeing with the newest adapter's scores", low=0, group="DSC"
    )
    dsc_a2: float = setting(
        0.5, "weight of agreeing with a past adapter's scores", low=0, group="DSC"
    )
    dsc_b1: float = setting(1.0, "weight of keeping the newest concept", low=0, group="DSC")
    dsc_b2: float = setting(1.0, "weight of keeping the past ones", low=0, group="DSC")
    dsc_redraw: str = setting(
        "step",
        "draw another past adapter at every step, or one for the whole run",
        choices=("step", "once"),
        group="DSC",
    )


@dataclass(frozen=True)
class LearnSettings(ConsolidateSettings):
    method: str = setting("retention", "how to learn; README has the table", choices=METHODS)
    steps: int | None = setting(None, "training steps", low=1, high=1_000_000)
    weighting: str | None = setting(
        None,
        "what an error counts at each timestep: uniform, as in the paper; debiased counts more "
        "where the noise hides the picture",
        choices=("uniform", "debiased"),
    )
    preview_every: int = setting(
        0,
        "steps between pictures of the new concept, and of the first one where it is held "
        "meanwhile; 0 draws none",
        low=0,
    )
    adapter: str = setting(
        "lora",
        "kind of adapter for the lora methods: lora, or the smaller vera",
        choices=("lora", "vera"),
    )
    rank: int | None = setting(
        None,
        "rank of the LoRA; a stack keeps the one it began with, unless its concepts ask for more",
        low=1,
        high=256,
    )
    vectors: int | None = setting(
        None,
        "vectors of the word: positions it takes in a prompt; more hold more of the look",
        low=1,
        high=MOST_VECTORS,
    )
    token_rate: float | None = setting(None, "learning rate of the word's vectors", low=0, high=1)
    c_lora_weight: float = setting(1e8, "weight of C-LoRA's penalty", low=0, group="C-LoRA")
    c_lora_variant: str = setting(
        "sequential",
        "one adapter that goes on, or as published one for each concept, summed",
        choices=("sequential", "published"),
        group="C-LoRA",
    )

    def check(self) -> None:
        super().check()
        if self.adapter == "vera" and self.method not in WITH_VERA:
            raise SettingError(
                f"{self.method} can't learn with VeRA. Leave adapter out, or take one of "
                f"{', '.join(WITH_VERA)}."
            )


@dataclass(frozen=True)
class SolveSettings(Settings):
    """How stored prompts are held in closed form, without pictures: consolidate, forget, merge."""

    energy: float = setting(
        0.999, "share of what is asked for that the rank must hold", low=0.5, high=1
    )
    rank: int | None = setting(
        None,
        "rank of the solution; where it is not said what the LoRA has, or more for the energy",
        low=1,
        high=1024,
    )
    ridge: float = setting(
        1e-4, "weight of staying small, as a share of the mean second moment", low=1e-12, high=1
    )
    ordinary_weight: float = setting(
        0.33, "weight of ordinary prompts, as a share of all concepts' together", low=0
    )


@dataclass(frozen=True)
class ScoreSettings(Settings):
    trials: int = setting(
        32,
        "noisy versions of a picture that the likeliest concepts are compared on",
        low=1,
        high=10_000,
    )
    stages: int = setting(
        3,
        "elimination stages; after each the less likely half drops out. 1 compares all concepts "
        "on all trials",
        low=1,
        high=16,
    )
    weighting: str = setting(
        "uniform",
        "weight of a timestep: all alike, or falling with the noise",
        choices=("uniform", "linear"),
    )
    rows: int = setting(32, "net calls at a time", low=1, high=4096)
    seed: int = setting(0, "seed of timesteps and noise", low=0, high=2**63 - 1)
    size: int | None = setting(
        None, "side the pictures are scaled to", low=64, high=4096, unit="pixels", multiple=8
    )
    fit: str = setting("crop", FIT_HELP, choices=FITS)


@dataclass(frozen=True)
class EvaluateSettings(Settings):
    pictures: int = setting(4, "pictures of each concept and version", low=1, high=1000)
    steps: int = setting(20, "sampling steps", low=1, high=1000)
    guidance: float | None = setting(
        None, "classifier-free guidance; 1 switches it off", low=0, high=100
    )
    trials: int = setting(
        8, "noisy versions of a picture that the DC scores compare", low=1, high=10_000
    )
    seed: int = setting(0, "seed of the first picture; the next ones follow", low=0, high=2**63 - 1)
    size: int | None = setting(
        None, "side of the drawn pictures", low=64, high=4096, unit="pixels", multiple=8
    )


@dataclass(frozen=True)
class DrawSettings(Settings):
    count: int = setting(1, "pictures per prompt", low=1, high=10_000)
    steps: int = setting(25, "sampling steps", low=1, high=1000)
    guidance: float | None = setting(
        None, "classifier-free guidance; 1 switches it off", low=0, high=100
    )
    solver: str = setting("dpm++", "dpm++ (fast, 2M) or ddim", choices=SOLVERS)
    seed: int = setting(0, "seed of the first picture; the next ones follow", low=0, high=2**63 - 1)
    size: int | None = setting(
        None, "side of the drawn pictures", low=64, high=4096, unit="pixels", multiple=8
    )
    negative: str = setting("", "what not to draw")
