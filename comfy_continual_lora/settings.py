"""Every user setting, declared once: default, range, unit, help. All front ends make their widgets,
flags and checks from here. Light.

A default of None means "what suits the checkpoint": `resolved` fills it from presets.py. Each class
says where its other defaults are from; "measured" means on the miniature only (benchmarks/LOG.md).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .fields import Settings, setting
from .language import LANGUAGE
from .presets import ADAPTERS, KINDS, METHODS

SOLVERS = ("dpm++", "ddim")
MOST_VECTORS = 16  # of a word: prompts about two concepts have to fit into 77 positions
FITS = ("crop", "pad", "bucket")
FORMATS = ("kohya", "diffusers", "peft")  # of an exported LoRA
_MOST_PICTURES = 10_000
_MOST_WEIGHT = 1e6  # of moments that equations are solved with, which more makes infinite
_FIRST = 2**63 - _MOST_PICTURES  # the largest seed that so many can follow
FIT_HELP = (
    "crop pictures that are not square to the middle, pad them with their edge pixels, or keep "
    "their aspect ratio (bucket)"
)
# Settings that change how a result is computed, not the result: a run may resume with other values
EXECUTION_SETTINGS = (
    "snapshot_every",
    "preview_every",
    "preview_prompts",
    "checkpointing",
    "accumulate",
    "compile",
    "channels_last",
)


@dataclass(frozen=True)
class LoopSettings(Settings):
    """The training loop.

    `clip` 1: diffusers' training scripts. `warmup` 20: our choice (OneTrainer's presets: 200).
    """

    batch: int | None = setting(None, "pictures per step", low=1, high=256)
    rate: float | None = setting(None, "learning rate of the LoRA", low=0, high=1)
    warmup: int = setting(20, "warm-up steps of the learning rate", low=0, high=100_000)
    clip: float = setting(1.0, "largest gradient norm; larger gradients are clipped", low=1e-6)
    seed: int = setting(0, "seed of every random draw", low=0, high=2**63 - 1)
    size: int | None = setting(
        None, "side of the training pictures", low=64, high=4096, unit="pixels", multiple=8
    )
    fit: str = setting("crop", FIT_HELP, choices=FITS)
    flip: bool | None = setting(
        None, "also learn from mirrored pictures; turn off for things with writing on them"
    )
    precision: str = setting(
        "auto",
        "number format of the frozen checkpoint while learning; auto uses bf16 or fp16 if the device "
        "is faster with it; fp8 stores it in half the memory of those",
        choices=("auto", "fp32", "bf16", "fp16", "fp8"),
    )
    checkpointing: bool = setting(
        False, "gradient checkpointing: less memory, about a third more time"
    )
    accumulate: int = setting(
        1,
        "parts a step's pictures are split into, one after the other: less memory, the same step",
        low=1,
        high=256,
    )
    optimizer: str = setting(
        "adamw",
        "adamw, or bitsandbytes' adamw8bit, whose state takes a quarter of the memory; that matters "
        "when all of K and V is trained (custom_diffusion)",
        choices=("adamw", "adamw8bit"),
    )
    compile: bool = setting(
        False,
        "torch.compile the net first, which takes minutes: for long runs on a GPU; a CPU can get "
        "slower",
    )
    channels_last: bool = setting(
        False,
        "store the net's weights channels-last: faster on many GPUs, little difference on a CPU",
    )
    snapshot_every: int = setting(
        50, "steps between snapshots; an interrupted run resumes from the last", low=1
    )


@dataclass(frozen=True)
class EwcSettings(Settings):
    """DC scores, and EWC.

    From Jha et al. 2025 (arXiv 2410.00700), its slides and reviews: `subset` 5, at least 200
    `fisher_samples`, `ewc_mode` online. `ewc_decay` and `fisher_space` are our choice, and so is the
    calibrated `dc_scale`, beside which the others measured the same.
    """

    dc_scale: str = setting(
        "calibrated",
        "temperature of the DC scores: calibrated on the first concept, or 1 on mean or summed "
        "errors (for comparison)",
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
        "decay of the previous Fishers when one is added (gamma, online only)",
        low=0,
        high=1,
        group="DC scores, EWC",
    )
    fisher_samples: int = setting(
        256,
        "number of per-sample gradients the Fisher is averaged over",
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
    """The retention penalty in text space; it is ours, and its defaults were measured."""

    retention_weight: float = setting(
        0.0,
        "weight of the penalty that protects ordinary prompts, and those of earlier concepts if the "
        "method does not solve for them afterwards; 0: the method's own",
        low=0,
        group="retention",
    )
    retention_ordinary: float = setting(
        1.0,
        "weight of ordinary prompts in that penalty, where an earlier concept has 1, and all "
        "together at most 3; a lower one learns more and leaks more",
        low=0,
        high=_MOST_WEIGHT,
        group="retention",
    )
    retention_language: float = setting(
        LANGUAGE,
        "share of ordinary prompts that is drawn from the tokenizer's whole vocabulary; the rest is "
        "made from lists of common words. 0: the lists alone, which protect few other words",
        low=0,
        high=1,
        group="retention",
    )
    retention_words: float | None = setting(
        None,
        "share of that penalty on the words of prompts, the rest being on their padding; if not "
        "given, as on the stack, where at first all positions weigh the same",
        low=0,
        high=1,
        by_checkpoint=False,
        group="retention",
    )
    retention_apart: float = setting(
        0.0,
        "weight of leaving the padding of the concept's own prompts unchanged, as a share of that "
        "penalty; a lower one bleeds more in pictures of two concepts",
        low=0,
        group="retention",
    )


@dataclass(frozen=True)
class DscSettings(Settings):
    """Diffusion Scores Consolidation (Jha et al. 2025), whose weights are not published.

    `dsc_a1` to `dsc_b2` are our choice: other weights measured within noise of them. `dsc_rate` and
    `dsc_redraw` were not measured.
    """

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
        "draw a new past adapter at every step, or one for the whole run",
        choices=("step", "once"),
        group="DSC",
    )


@dataclass(frozen=True)
class TrainSettings(DscSettings, RetentionSettings, EwcSettings, LoopSettings):
    """What learning and consolidating have in common."""


@dataclass(frozen=True)
class LearnSettings(TrainSettings):
    """How to learn one concept.

    `kind`: as in presets.py. `c_lora_weight` 1e8: C-LoRA (arXiv 2304.06027).
    """

    method: str = setting(
        "retention", "how to learn; docs/how-it-works.md has a table", choices=METHODS
    )
    kind: str | None = setting(
        None,
        "what is learned: sets the steps and the rate that are not given, whatever the batch; thing: "
        "1,000 pictures seen, person: 4,000 at half the rate, style: 4,000, place: 1,000 (the "
        "mini-SD: 2,400, and as many times more)",
        choices=tuple(KINDS),
        by_checkpoint=False,
    )
    steps: int | None = setting(None, "training steps", low=1, high=1_000_000)
    weighting: str | None = setting(
        None,
        "weight of an error at each timestep while learning: uniform, as in the paper, or debiased, "
        "which weighs high noise more if the net predicts noise; Fishers, DC scores and DSC are "
        "uniform",
        choices=("uniform", "debiased"),
    )
    preview_every: int = setting(
        0,
        "steps between previews of the new concept, and of the first one if it is protected while "
        "learning; 0 for none",
        low=0,
    )
    preview_prompts: str = setting(
        "",
        "what previews show instead: one prompt or several with | between, such as a V1 dog on grass "
        "| a painting of a V1 dog",
    )
    adapter: str = setting(
        "lora",
        "kind of adapter for the lora methods: lora, or the smaller vera",
        choices=ADAPTERS,
    )
    rank: int | None = setting(
        None,
        "rank of the LoRA; a stack keeps its first one, unless its concepts need more",
        low=1,
        high=256,
    )
    vectors: int | None = setting(
        None,
        "vectors of the word, each taking one position in a prompt; more capture more of the look. "
        "On Anima a concept's name is plain text, without vectors",
        low=0,
        high=MOST_VECTORS,
    )
    token_rate: float | None = setting(None, "learning rate of the word's vectors", low=0, high=1)
    watch_every: int = setting(
        0,
        "steps between looks at how it is going: likeness to one picture in five, which is held out "
        "(of five or more), and how far earlier concepts move; 0: no looks, or, until good, a "
        "twentieth of the steps",
        low=0,
    )
    until: str = setting(
        "steps",
        "when learning ends: after all steps, or when the likeness to the pictures held out no longer "
        "rises; the best version is kept",
        choices=("steps", "good"),
    )
    keep_features: bool = setting(
        False,
        "keep what evaluate needs to compare with these pictures once they are gone: some hundred "
        "numbers for each of at most 16, which say how the thing looks but not where anything is; "
        "they go wherever the stack file goes. Otherwise it has a thumbnail of the first",
    )
    clip_skip: int | None = setting(
        None,
        "of an SD1.x checkpoint, the layer of the text encoder that is used, counted from the end: 2 "
        "for fine-tunes whose pages say clip skip 2, as many for anime do; a stack keeps its first "
        "one, which is 1 unless you say 2",
        low=1,
        high=2,
        by_checkpoint=False,
    )
    c_lora_weight: float = setting(1e8, "weight of C-LoRA's penalty", low=0, group="C-LoRA")
    c_lora_variant: str = setting(
        "sequential",
        "one adapter trained further, or, as published, one for each concept, summed",
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
    """Settings without None for "what suits the checkpoint": what training takes."""

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
    """The closed form over stored prompts, without pictures: consolidate, forget, merge.

    It is ours; `energy`, `ridge`, `ordinary_weight` and `language` were measured.
    """

    energy: float = setting(
        0.999, "share of the solution's energy that the rank has to keep", low=0.5, high=1
    )
    rank: int | None = setting(
        None,
        "rank of the solution; if not given, the LoRA's, or more if the energy needs it",
        low=1,
        high=1024,
        by_checkpoint=False,
    )
    ridge: float = setting(
        6e-3,
        "ridge regularisation, as a share of the mean second moment, its largest direction aside",
        low=1e-12,
        high=1,
    )
    ordinary_weight: float = setting(
        0.33,
        "weight of ordinary prompts, as a share of all concepts' together",
        low=0,
        high=_MOST_WEIGHT,
    )
    language: float = setting(
        LANGUAGE,
        "share of ordinary prompts that is drawn from the tokenizer's whole vocabulary; 0: lists of "
        "common words alone",
        low=0,
        high=1,
    )


@dataclass(frozen=True)
class ScoreSettings(Settings):
    """How pictures are compared with concepts.

    Stages and uniform weights: Li et al. 2023 (arXiv 2303.16203) and arXiv 2505.17955; the numbers of
    `trials` and `stages` are our choice.
    """

    trials: int = setting(
        32,
        "noisy versions of a picture on which the likeliest concepts are compared",
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
        "weight of a timestep: the same for all, or falling with the noise",
        choices=("uniform", "linear"),
    )
    rows: int = setting(
        32, "pairs of picture and prompt that go through the net at once", low=1, high=4096
    )
    seed: int = setting(0, "seed of timesteps and noise", low=0, high=2**63 - 1)
    size: int | None = setting(
        None,
        "side the pictures are scaled to, if not the one that the first concept was learned at",
        low=64,
        high=4096,
        unit="pixels",
        multiple=8,
        by_checkpoint=False,
    )
    fit: str = setting("crop", FIT_HELP, choices=FITS)


@dataclass(frozen=True)
class EvaluateSettings(Settings):
    """How retention is measured; the numbers are our choice."""

    pictures: int = setting(4, "pictures of each concept and version", low=1, high=1000)
    steps: int = setting(20, "sampling steps", low=1, high=1000)
    guidance: float | None = setting(
        None, "classifier-free guidance; 1 turns it off", low=0, high=100
    )
    trials: int = setting(
        8, "noisy versions of a picture that the DC scores compare", low=1, high=10_000
    )
    seed: int = setting(0, "seed of the first picture; the next ones follow", low=0, high=_FIRST)
    size: int | None = setting(
        None, "side of the drawn pictures", low=64, high=4096, unit="pixels", multiple=8
    )


@dataclass(frozen=True)
class DrawSettings(Settings):
    """How pictures are drawn.

    A flow takes evenly spaced steps by Euler's method. `steps` are our choice.
    """

    count: int = setting(1, "pictures per prompt", low=1, high=_MOST_PICTURES)
    steps: int = setting(25, "sampling steps", low=1, high=1000)
    guidance: float | None = setting(
        None, "classifier-free guidance; 1 turns it off", low=0, high=100
    )
    solver: str = setting("dpm++", "dpm++ (fast, 2M) or ddim", choices=SOLVERS)
    seed: int = setting(0, "seed of the first picture; the next ones follow", low=0, high=_FIRST)
    size: int | None = setting(
        None, "side of the drawn pictures", low=64, high=4096, unit="pixels", multiple=8
    )
    width: int | None = setting(
        None,
        "width of the drawn pictures, if it is not the size",
        low=64,
        high=4096,
        unit="pixels",
        multiple=8,
        by_checkpoint=False,
    )
    height: int | None = setting(
        None,
        "height of the drawn pictures, if it is not the size",
        low=64,
        high=4096,
        unit="pixels",
        multiple=8,
        by_checkpoint=False,
    )
    negative: str = setting("", "what not to draw")
    flow_shift: float | None = setting(
        None,
        "of a rectified-flow checkpoint, how far the steps move towards high noise, as in ComfyUI's "
        "ModelSamplingSD3",
        low=0.01,
        high=100,
    )
    mixed: bool = setting(
        False,
        "let the looks of several learned things in one prompt mix, as a program without this one "
        "draws them, in place of keeping each to the area where its noun is",
    )
