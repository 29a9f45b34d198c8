"""Prompts as users write them, with which hosts' text features are compared with ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from torch import Tensor

from comfy_continual_lora.checkpoint.stable import StableBackbone
from comfy_continual_lora.emphasis import CHUNK, Token

Habits = dict[str, tuple[str, int]]

_PHRASE = "a small red ball on green grass"  # 7 tokens
_LONG = " ".join([_PHRASE] * 11)
# prompts by what they try, with their clip skip; all hosts agree on those
HABITS: Habits = {
    "long": (f"a V1 ball and {_LONG} at night", 1),
    "word in the second chunk": (f"{_LONG} and a V1 ball at night", 1),
    "clip skip": (f"{_LONG} and a V1 ball at night", 2),
}
WEIGHTS = "a (V1 ball:1.3) on ((grass)) at night"
# ComfyUI has rules of its own for commas and marks
IN_WEB_UIS: Habits = {
    "weights": (r"a (V1 ball:1.3) on [grass], ((at) night), \(sharp\)", 1),
    "weights and clip skip": (WEIGHTS, 2),
    "BREAK": ("a V1 ball BREAK on grass BREAK at night", 1),
    "commas": (f"{_LONG[:-30]}, golden hour, a V1 ball, dramatic shadows, " * 3, 1),
    # 18 tokens behind it have room in the first chunk: within 20, not within 16, which is Neo's setting
    "a far comma": (f"{' '.join([_PHRASE] * 8)}, {' '.join([_PHRASE] * 3)}", 1),
    "weights in the second chunk": (f"{_LONG} and a (V1 ball:1.3), (at night:0.7)", 1),
}
# 64 tokens to the comma; of what follows, the first 11 have room in the first chunk, and V1 is there
MOVED = f"{' '.join([_PHRASE] * 9)}, a (V1:1.2) ball on grass at night in deep white winter snow"


def own(backbone: StableBackbone, words: Mapping[str, Tensor], habits: Habits) -> dict[str, Tensor]:
    """What cross-attention sees of the prompts when we draw them."""
    return {
        name: backbone.context(
            backbone.with_clip_skip(clip_skip).encode_drawn(prompt, words)
        ).contiguous()
        for name, (prompt, clip_skip) in habits.items()
    }


def moved_by_web_uis(backbone: StableBackbone, words: Mapping[str, Tensor]) -> Tensor:
    """What AUTOMATIC1111 and its family make of `MOVED`, whose learned word first stands at the end of
    the first chunk, and then goes into the second with all that follows the comma.

    Only its place goes: there it reads "!" (id 0). Its vectors stay in the first chunk, in place of
    end tokens (`fixes` of modules/sd_hijack_clip.py and backend/text_processing/classic_engine.py).
    """
    first, second = backbone.chunks(MOVED, words)
    assert 0 < CHUNK - len(first) < len(second)  # it had room, and what follows had not
    end = int(backbone.tokenizer.eos_token_id)  # type: ignore[arg-type]
    stay = [replace(t, weight=1.0) if t.vector >= 0 else Token(end) for t in second]
    go = [Token(0, weight=t.weight) if t.vector >= 0 else t for t in second]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableBackbone, "chunks", lambda *_: [[*first, *stay][:CHUNK], go])
        return backbone.context(backbone.encode_drawn(MOVED, words)).contiguous()
