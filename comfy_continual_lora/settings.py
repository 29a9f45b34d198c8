"""Every choice a user has, declared once: default, range, unit, help. Every front end makes its
widgets, flags and checks from here. Light.

A default of None means "what suits the checkpoint": `resolved` fills it from presets.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .fields import Settings, setting
from .presets import ADAPTERS, METHODS

SOLVERS = ("dpm++", "ddim")
MOST_VECTORS = 16  # of a word: prompts about two have to fit into 77 positions
FITS = ("crop", "pad", "bucket")
FORMATS = ("kohya", "diffusers", "peft")  # of an exported LoRA
FIT_HELP = (
    "pictures that are not square are cropped to the middle, padded with their edge, or keep "
    "their shape (aspect buckets)"
)
# Settings that change how a result is computed, not the result: a run may resume with others of them
EXECUTION_SETTINGS = (
    "snapshot_every",
    "preview_every",
    "checkpointing",
    "accumulate",
    "compile",
    "channels_last",
)


@dataclass(frozen=True)
class LoopSettings(Settings):
    """The training loop."""

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


@dataclass(frozen=True)
class EwcSettings(Settings):
    """DC scores, and what holds concepts by their Fisher."""

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


@dataclass(frozen=True)
class RetentionSettings(Settings):
    """What holds prompts in text space."""

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
        "share of the hold that is on what prompts say, beside the padding behind them; if not "
        "given, every position counts alike",
        low=0,
        high=1,
        by_checkpoint=False,
        group="retention",
    )
    retention_apart: float = setting(
        0.0,
        "weight of doing nothing behind the end of the concept's own prompts, as a share of "
        "that; less bleeds more in pictures of two",
        low=0,
        group="retention",
    )


@dataclass(frozen=True)
class DscSettings(Settings):
    """Diffusion Scores Consolidation."""

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
class TrainSettings(DscSettings, RetentionSettings, EwcSettings, LoopSettings):
    """What learning and consolidating have in common."""


@dataclass(frozen=True)
class LearnSettings(TrainSettings):
    """How to learn one concept."""

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
        choices=ADAPTERS,
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

    def resolved(self, preset: str) -> ResolvedSettings:
        """Every None is what suits the checkpoint; checked."""
        return ResolvedSettings(**dataclasses.asdict(super().resolved(preset)))


def _required() -> Any:
    return dataclasses.field()


@dataclass(frozen=True, kw_only=True)
class ResolvedSettings(LearnSettings):
    """Settings in which nothing is left open: what training takes."""

    batch: int = _required()
    rate: float = _required()
    flip: bool = _required()
    ewc_strength: float = _required()
    dsc_steps: int = _required()
    steps: int = _required()
    weighting: str = _required()
    rank: int = _required()
    vectors: int = _required()
    token_rate: float = _required()


@dataclass(frozen=True)
class SolveSettings(Settings):
    """How stored prompts are held in closed form, without pictures: consolidate, forget, merge."""

    energy: float = setting(
        0.999, "share of what is asked for that the rank must hold", low=0.5, high=1
    )
    rank: int | None = setting(
        None,
        "rank of the solution; if not given what the LoRA has, or more for the energy",
        low=1,
        high=1024,
        by_checkpoint=False,
    )
    ridge: float = setting(
        1e-4, "weight of staying small, as a share of the mean second moment", low=1e-12, high=1
    )
    ordinary_weight: float = setting(
        0.33, "weight of ordinary prompts, as a share of all concepts' together", low=0
    )


@dataclass(frozen=True)
class ScoreSettings(Settings):
    """How pictures are compared with concepts."""

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
    """How what is kept is measured."""

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
    """How pictures are drawn."""

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
