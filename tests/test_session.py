"""A checkpoint is gigabytes: when an operation is done, its memory is free at once, whatever the garbage
collector does.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_learn import QUICK, learn_request

from comfy_continual_lora import pipeline, requests, store
from comfy_continual_lora.checkpoint import load
from comfy_continual_lora.errors import SettingError, StackError
from comfy_continual_lora.keeping import writing
from comfy_continual_lora.settings import DrawSettings, EvaluateSettings, ScoreSettings

DRAWN = DrawSettings(steps=1, size=64)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[torch.nn.Module]]]:
    """The nets of every checkpoint that was loaded, while nothing is collected."""
    nets: list[weakref.ref[torch.nn.Module]] = []
    load_backbone = load.load_backbone

    def watched(*args: Any, **options: Any) -> Any:
        backbone = load_backbone(*args, **options)
        nets.append(weakref.ref(backbone.unet))
        return backbone

    monkeypatch.setattr(load, "load_backbone", watched)
    gc.collect()
    gc.disable()
    yield nets
    gc.enable()


@pytest.mark.parametrize(
    "operation", ["learn", "draw", "scores", "evaluate", "consolidate", "forget", "merge"]
)
def test_a_checkpoint_is_freed_when_an_operation_is_done(
    learned: Callable[..., Path],
    folders: dict[str, Path],
    tmp_path: Path,
    loaded: list[weakref.ref[torch.nn.Module]],
    operation: str,
) -> None:
    quick = replace(QUICK, method="retention")
    checkpoint = learned(quick, "V1", "V2")
    place: dict[str, Any] = {"device": "cpu"}
    if operation == "learn":
        pipeline.learn_concept(learn_request(learned(quick, "V1"), folders, "V2", quick))
    elif operation == "draw":
        pipeline.draw(requests.DrawRequest(checkpoint, ["a photo of a V1 ball"], DRAWN, **place))
    elif operation == "scores":
        settings = ScoreSettings(trials=2)
        pipeline.dc_scores(requests.ScoreRequest(checkpoint, folders["V1"], settings, **place))
    elif operation == "evaluate":
        few = EvaluateSettings(pictures=1, steps=1, trials=1, size=64)
        pipeline.evaluate(requests.EvaluateRequest(checkpoint, settings=few, **place))
    elif operation == "consolidate":
        images = folders["V2"]
        pipeline.consolidate(
            requests.ConsolidateRequest(checkpoint, images, replace(quick, steps=1), **place)
        )
    elif operation == "forget":
        pipeline.forget(requests.ForgetRequest(checkpoint, "V1", **place))
    else:
        other = store.stack_path(learned(quick, "V2"))
        pipeline.merge(requests.MergeRequest(learned(quick, "V1"), other, **place))
    assert loaded
    assert [net() for net in loaded] == [None] * len(loaded)


def test_what_is_refused_anyway_loads_no_checkpoint(
    learned: Callable[..., Path],
    folders: dict[str, Path],
    loaded: list[weakref.ref[torch.nn.Module]],
) -> None:
    checkpoint = learned(QUICK, "V1")
    loaded.clear()
    file = store.stack_path(checkpoint)
    with writing(file), pytest.raises(StackError, match="Another program is changing"):
        pipeline.learn_concept(learn_request(checkpoint, folders, "V2", QUICK))
    wordless = requests.ImportRequest(checkpoint, file, "W1", "ball", device="cpu")
    for request in (wordless, replace(wordless, embedding=file, trigger="red")):
        with pytest.raises(SettingError, match="needs its word"):
            pipeline.import_concept(request)
    assert not loaded
