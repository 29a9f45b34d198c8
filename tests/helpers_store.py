"""Small stacks, made without learning."""

from __future__ import annotations

import torch

from comfy_continual_lora import store

FINGERPRINT = "f" * 64


def make_record(number: int) -> store.ConceptRecord:
    return store.ConceptRecord(
        f"id{number}",
        f"V{number}",
        "mug",
        "lora",
        3,
        10,
        0,
        ["a photo"],
        ["h"],
        "2026-01-01T00:00:00+00:00",
        0.1,
        "",
        {},
    )


def make_stack(count: int, size: int = 4) -> store.ConceptStack:
    stack = store.ConceptStack(FINGERPRINT, rank=2, identity="ab" * 8)
    for n in range(1, count + 1):
        stack = stack.learned(
            make_record(n),
            torch.full((1, 8), float(n)),
            {
                "layer.to_k.A": torch.full((2, size), float(n)),
                "layer.to_k.B": torch.ones(size, 2) * n,
            },
        )
    return stack


def same(a: store.ConceptStack, b: store.ConceptStack) -> bool:
    def flat(s: store.ConceptStack) -> dict[str, torch.Tensor]:
        parts = {"adapter": s.adapter or {}, "words": s.words, **s.pool}
        return {
            f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()
        }

    left, right = flat(a), flat(b)
    return (
        a.records == b.records
        and a.rank == b.rank
        and left.keys() == right.keys()
        and all(torch.equal(left[k], right[k]) for k in left)
    )
