"""Tables: the methods' names, what suits each checkpoint, and the prompts that training uses. Light.

Only the mini-SD's row and its exceptions were measured (benchmarks/LOG.md).
"""

from __future__ import annotations

from typing import Any

METHODS = [  # lists, so that an extension can add to them
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
]
ADAPTERS = ["lora", "vera"]
TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012  # of Stable Diffusion's noise schedule, scaled linear
# what a checkpoint's net predicts: the name here, and diffusers'
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "flow": "flow_prediction"}
PREDICTION_NAMES = {value: name for name, value in PREDICTIONS.items()}
CLIP_SKIP_PRESETS = ("sd1", "mini")  # of checkpoints that take `clip_skip`
PLAIN_NAME_PRESETS = ("anima",)  # of checkpoints whose concepts' names have no vectors
FLOW_PRESETS = ("anima",)  # of checkpoints that are always flows
CLIP_SKIP_2 = (  # what users of other programs have to set
    "It was learned with clip skip 2, so draw with that: in ComfyUI CLIP Set Last Layer at -2, in "
    "AUTOMATIC1111 and Forge Clip skip at 2."
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

# Where the values for published checkpoints are from; LoRAs there are at other scales (alpha / rank)
# and of more layers than K and V, and nothing was measured on such a checkpoint here.
#   rank          16: C-LoRA (arXiv 2304.06027), sd-scripts' documentation, OneTrainer's presets; 4 in
#                 Mix-of-Show (arXiv 2305.18292), 32 in Hugging Face's SDXL scripts
#   vectors       1: textual inversion (arXiv 2208.01618). 2 in Mix-of-Show and Hugging Face's SDXL
#                 scripts; but of a word with capitals, such as V1, diffusers' pipelines read the first
#                 vector alone (`maybe_convert_prompt` looks for it in lower case)
#   steps, batch  1,000 pictures seen: Custom Diffusion's README (250 x 4, as many again of the class),
#                 Mix-of-Show's things (500 x 2)
#   rate          SD1.x 2e-4: between Mix-of-Show's, sd-scripts' and cloneofsimo/lora's 1e-4 and
#                 OneTrainer's 3e-4; SDXL 1e-4: Hugging Face's SDXL scripts. SD2.x: as SD1.x
#   token_rate    SD1.x 1e-3: Mix-of-Show (5e-4 in cloneofsimo/lora); SDXL 3e-4: Hugging Face's SDXL
#                 scripts. SD2.x: as SD1.x
#   weighting     uniform: the paper (arXiv 2410.00700)
#   guidance      SD1.x and SD2.x 7.5: diffusers' pipeline; SDXL 7: our choice (diffusers' pipeline: 5)
#   flow_shift    6: bigASP 2.5's model card, for flows that were Stable Diffusions
#   anima         rate 1e-4: sd-scripts' docs/anima_train_network.md. guidance 4: diffusers'
#                 AnimaTextEncoderStep. flow_shift 3: ComfyUI's supported_models.Anima. Names are plain
#                 text, so no vectors. The rest as SD1.x
#   flip, dsc_steps, ewc_strength: our choice; the last means the same on any net (benchmarks/LOG.md,
#                 2026-11-28) and was chosen on the mini-SD. The paper's own are not published
_STOCK = {
    "rank": 16, "vectors": 1, "steps": 1000, "batch": 1, "rate": 2e-4, "token_rate": 1e-3,
    "weighting": "uniform", "flip": True, "ewc_strength": 3.0, "dsc_steps": 200, "guidance": 7.5,
    "flow_shift": 6.0,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "sd1": _STOCK,
    "sd2": _STOCK,
    "sdxl": {**_STOCK, "rate": 1e-4, "token_rate": 3e-4, "guidance": 7.0},
    "anima": {
        **_STOCK,
        "vectors": 0,
        "rate": 1e-4,
        "token_rate": 0.0,
        "guidance": 4.0,
        "flow_shift": 3.0,
    },
    "mini": {  # measured on development concepts (benchmarks/LOG.md)
        "rank": 16,
        "vectors": 4,
        "steps": 300,
        "batch": 8,
        "rate": 3e-4,
        "token_rate": 1e-2,
        "weighting": "debiased",
        "flip": False,
        "ewc_strength": 3.0,
        "dsc_steps": 60,
        "guidance": 4.0,
        "flow_shift": 6.0,
    },
}
# Exceptions for a method on a checkpoint: on the mini-SD measured ones (benchmarks/LOG.md); on others
# full K and V are learned at the rate of Custom Diffusion's README, per image and GPU there
METHOD_PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    **{
        (preset, method): {"rate": 1e-5}
        for preset in ("sd1", "sd2", "sdxl", "anima")
        for method in ("custom_diffusion", "custom_diffusion_ewc")
    },
    ("mini", "lora_dsc_ewc"): {"ewc_strength": 1.0},
    ("mini", "lora_dsc_ewc_dc"): {"ewc_strength": 1.0},
    ("mini", "retention"): {"rate": 1.3e-3},
}
# What is learned: pictures to see and learning rate, as multiples of the checkpoint's own. A thing
# sees 1,000 pictures and a person 4,000 (Mix-of-Show's EDLoRA settings, arXiv 2305.18292), faces at
# half the rate (Custom Diffusion's README, arXiv 2212.04488). For a style and a place nothing was
# found that is published for this way of learning: a style sees as much as a person, from which no
# single thing has to be exact; a place is learned as a thing. None of it was measured here.
KINDS: dict[str, dict[str, float]] = {
    "thing": {"pictures": 1, "rate": 1},
    "person": {"pictures": 4, "rate": 0.5},
    "style": {"pictures": 4, "rate": 1},
    "place": {"pictures": 1, "rate": 1},
}
# An adapter's learning rate as a multiple of LoRA's, measured on the mini-SD. VeRA's few parameters
# scale fixed random matrices: at LoRA's rate they hardly move.
ADAPTER_RATES = {"vera": 30}
