"""What the tests that learn on the mini-SD share: three concepts, the quickest settings, and how to
compare what was learned.
"""

from __future__ import annotations

from pathlib import Path

import torch

from comfy_continual_lora import requests, store
from comfy_continual_lora.adapters.adapter import new_adapter
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.mini import world
from comfy_continual_lora.plan import Plan, plan
from comfy_continual_lora.settings import LearnSettings

NOUNS = {"V1": "ball", "V2": "fish", "V3": "mug"}

QUICK = LearnSettings(
    method="lora_dsc_ewc_dc",
    steps=2,
    batch=3,
    rank=4,
    size=64,
    fisher_samples=3,
    dsc_steps=2,
    c_lora_weight=1.0,
    ewc_strength=10.0,
)


def save_concept(folder: Path, index: int, count: int = 4) -> Path:
    world.save_pictures(world.concepts("development")[index], folder, count)
    return folder


def learn_request(
    checkpoint: Path, folders: dict[str, Path], token: str, settings: LearnSettings
) -> requests.LearnRequest:
    return requests.LearnRequest(
        checkpoint, folders[token], token, NOUNS[token], settings, device="cpu"
    )


def plan_of(checkpoint: Path, settings: LearnSettings, device: str = "cpu") -> Plan:
    """What a first concept takes, learned from pictures that nobody looks at."""
    return plan(requests.LearnRequest(checkpoint, Path("p"), "V1", "ball", settings, device=device))


def stack_of(checkpoint: Path) -> store.ConceptStack:
    path = store.stack_path(checkpoint)
    return store.load_stack(path, store.read_header(path)["fingerprint"])


def tensors_of(stack: store.ConceptStack) -> dict[str, torch.Tensor]:
    parts = {"adapter": stack.adapter or {}, "words": stack.words}
    for part, held in (("pool", stack.pool), ("fisher", stack.fishers)):
        parts |= {f"{part} {k}": v for k, v in held.items()}
    for k, target in stack.targets.items():
        parts |= {f"wish {k}": target.numbers, f"scale {k}": target.scales}
    for k, kept in stack.prompts.items():
        parts[f"prompts {k}"] = {"alone": kept.alone, "shared": kept.shared}
    return {f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()}


def same_stack(a: store.ConceptStack, b: store.ConceptStack) -> bool:
    left, right = tensors_of(a), tensors_of(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def random_adapter(
    backbone: Backbone, kind: str, seed: int, rank: int = 4
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        k: 0.1 * torch.randn(t.shape, generator=generator)
        for k, t in new_adapter(backbone, rank, generator, kind).items()
    }
