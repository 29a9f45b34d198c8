"""What a stack does not have is said, by every operation: no stack, no concept, no such word, no such
version.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_learn import QUICK, save_concept

from comfy_continual_lora import store
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.errors import ContinualLoraError
from comfy_continual_lora.operations import OPERATIONS
from comfy_continual_lora.progress import Progress
from comfy_continual_lora.settings import (
    DrawSettings,
    EvaluateSettings,
    LearnSettings,
    ScoreSettings,
)
from comfy_continual_lora.stack import ConceptStack

DRAWING = DrawSettings(steps=1, size=64)
EVALUATING = EvaluateSettings(pictures=1, steps=1, trials=1, size=64)
LEARNING = LearnSettings(method="lora", steps=1, batch=1, rank=4, size=64)


def _said(name: str, checkpoint: Path, **given: Any) -> str:
    """The notes of an operation, and its summary or its error."""
    operation, notes = OPERATIONS[name], []

    def on_progress(progress: Progress) -> None:
        if progress.note:
            notes.append(progress.note)

    if name not in ("undo", "history", "restore", "rename", "info"):
        given["device"] = "cpu"
    try:
        result = operation(operation.request(checkpoint, **given), on_progress)
    except ContinualLoraError as error:
        return "\n".join([*notes, error.marked])
    return "\n".join([*notes, result.summary()])


def _fields(name: str, tmp_path: Path, pictures: Path) -> dict[str, Any]:
    """What a request of this operation needs besides the checkpoint."""
    fields: dict[str, dict[str, Any]] = {
        "learn": {
            "images": pictures,
            "token": "V1",
            "noun": "ball",
            "settings": LEARNING,
            "replace": True,
        },
        "consolidate": {"images": pictures},
        "forget": {"token": "V9"},
        "merge": {"other": tmp_path / "other.concepts.safetensors"},
        "scores": {"images": pictures},
        "draw": {"prompts": ["a ball"], "settings": DRAWING},
        "export": {"out": tmp_path / "out"},
        "restore": {"version": 7},
        "rename": {"token": "V9", "to": "V8"},
    }
    return fields.get(name, {})


# importing needs no concept
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "import"])
@pytest.mark.parametrize("is_empty", [False, True], ids=["no stack", "empty"])
def test_no_concept(
    name: str, is_empty: bool, checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    if is_empty:
        empty = ConceptStack(load_backbone(checkpoint, device="cpu").fingerprint)
        for path in (store.stack_path(checkpoint), tmp_path / "other.concepts.safetensors"):
            store.save_stack(empty, path)
    said = _said(name, checkpoint, **_fields(name, tmp_path, pictures))
    nothing = {
        "learn": "no V1 to replace",
        "consolidate": "nothing to consolidate: .* needs at least two concepts",
        "closed_form": "nothing to consolidate: .* needs at least two concepts",
        "forget": "no concept 'V9' on the stack. It has: none",
        "merge": "holds no concept, so there is nothing to merge",
        "scores": "holds no concept yet, so there is nothing to score",
        "evaluate": "holds no concept yet, so there is nothing to evaluate",
        "draw": "holds no concept yet, so the checkpoint draws as it is",
        "export": "holds no concept, so there is nothing to export",
        "undo": "nothing to undo: the stack is empty",
        "history": r"\[\]",
        "restore": "no version 7 of .*Available: 1",
        "rename": "no concept 'V9' on the stack. It has: none",
        "info": "no concepts yet",
    }
    missing = {
        "merge": "no concept stack at .*other",
        "export": "no concept stack at",
        "undo": "no concept stack at",
        "history": "Nothing has been learned yet: there is no stack .*mini.concepts.safetensors",
        "restore": "no concept stack at",
        "rename": "no concept stack at",
        "info": "Nothing has been learned yet. It will be stored in .*mini.concepts.safetensors",
    }
    expected = nothing if is_empty else {**nothing, **missing}
    _matches(expected[name], said)


def _matches(pattern: str, text: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("forget", {"token": "V9"}, "no concept 'V9' on the stack. It has: V1, V2"),
        ("draw", {"prompts": ["a ball"], "only": ["V9"]}, "no concept 'V9'.*It has: V1, V2"),
        ("draw", {"prompts": ["a V9 ball"], "settings": DRAWING}, "V9 is not a learned word"),
        ("export", {"out": Path("none"), "only": ["V1", "V9"]}, "no concept 'V9'.*It has: V1, V2"),
        ("restore", {"version": 9}, "no version 9 of .*Available: 2, 1"),
        ("undo", {"version": 9}, "it is at version 2 now"),
    ],
)
def test_no_such_word_or_version(
    name: str, given: dict[str, Any], expected: str, learned: Callable[..., Path], tmp_path: Path
) -> None:
    if "out" in given:
        given = {**given, "out": tmp_path / "out"}
    _matches(expected, _said(name, learned(QUICK, "V1", "V2"), **given))
    assert not (tmp_path / "out").exists()


def test_folders_are_told_that_are_named_after_no_concept(
    learned: Callable[..., Path], tmp_path: Path
) -> None:
    """Pictures that lie beside them are not: the folder that holds all may have any name."""
    checkpoint, photos = learned(QUICK, "V1", "V2"), tmp_path / "photos"
    save_concept(photos / "V1", 0, 1)
    save_concept(photos / "V9", 1, 1)
    save_concept(photos, 2, 1)
    scoring = ScoreSettings(trials=1, stages=1, size=64)
    said = _said("scores", checkpoint, images=photos, settings=scoring)
    assert "No concept is named V9, so these pictures are scored, but count neither" in said
    assert "named photos" not in said
    assert "of 1 (" in said  # V1's picture alone is right or wrong
    assert "No concept is named" not in _said(
        "scores", checkpoint, images=photos / "V1", settings=scoring
    )
    said = _said("evaluate", checkpoint, images=photos, settings=EVALUATING)
    assert "Left out: the pictures in V9; no concept has this name." in said
    assert f"Left out: the pictures beside the folders in {photos}." in said
    said = _said("evaluate", checkpoint, images=photos / "V9", settings=EVALUATING)
    assert "Expected V1, V2; found no folder with pictures." in said
