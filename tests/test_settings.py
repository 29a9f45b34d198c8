"""Every setting arrives where the work is done, from the command line, the worker and the JSON API.
The nodes' are in test_comfy_nodes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from comfy_continual_lora import cli, early, pipeline, solving, worker
from comfy_continual_lora.errors import Cancelled, SettingError
from comfy_continual_lora.fields import check_field, from_widget
from comfy_continual_lora.progress import ignore
from comfy_continual_lora.settings import (
    DrawSettings,
    EvaluateSettings,
    LearnSettings,
    ScoreSettings,
    SolveSettings,
    TrainSettings,
)

# what is typed, which function of the pipeline gets the settings
COMMANDS = {
    "learn --images i --token V1 --noun n": ("learn_concept", LearnSettings),
    "consolidate --images i": ("consolidate", TrainSettings),
    "consolidate --closed-form": ("consolidate_in_closed_form", SolveSettings),
    "forget --token V1": ("forget", SolveSettings),
    "merge other": ("merge", SolveSettings),
    "import --lora l --token V1": ("import_concept", SolveSettings),
    "scores --images i": ("dc_scores", ScoreSettings),
    "evaluate": ("evaluate", EvaluateSettings),
    "draw --prompt p": ("draw", DrawSettings),
}
# the job of the worker, what its request has besides, which function gets the settings
JOBS: dict[str, tuple[dict[str, Any], str, type]] = {
    "learn": (
        {"images": "i", "token": "V1", "noun": "n"},
        "learn_concept",
        LearnSettings,
    ),
    "consolidate": ({"images": "i"}, "consolidate", TrainSettings),
    "closed_form": ({}, "consolidate_in_closed_form", SolveSettings),
    "forget": ({"token": "V1"}, "forget", SolveSettings),
    "scores": ({"images": "i"}, "dc_scores", ScoreSettings),
    "evaluate": ({}, "evaluate", EvaluateSettings),
    "draw": ({"prompts": ["p"]}, "draw", DrawSettings),
}


def _others(settings: type) -> list[tuple[str, Any]]:
    """Every setting, and a value in its range that is not its default."""
    values = []
    for f in dataclasses.fields(settings):
        kind = str(f.type).split(" ")[0]
        if kind == "bool":
            value: Any = not f.default
        elif f.metadata["choices"]:
            value = next(c for c in f.metadata["choices"] if c != f.default)
        else:
            value = {"int": 72, "float": 0.75, "str": "text"}[kind]
            if kind != "str" and f.metadata["high"] is not None:
                value = min(value, type(value)(f.metadata["high"]))
        assert value != f.default
        settings(**{f.name: value}).check()
        values.append((f.name, value))
    return values


@pytest.fixture
def arrived(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What the pipeline was asked for, by function; it does nothing of it."""
    requests: list[tuple[str, Any]] = []

    def stand_in(name: str) -> Any:
        def stand_in_call(request: Any, *_: object) -> None:
            requests.append((name, request))
            raise Cancelled("asked")

        return stand_in_call

    for name in {name for name, _ in COMMANDS.values()}:
        for module in (pipeline, solving):
            monkeypatch.setattr(module, name, stand_in(name), raising=False)
    monkeypatch.setattr(early, "check", lambda _: None)  # the files are not there
    monkeypatch.setattr(pipeline, "learned_before", lambda _: None, raising=False)
    return requests


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_has_a_flag_that_reaches_it(
    command: str, arrived: list[tuple[str, Any]]
) -> None:
    function, settings = COMMANDS[command]
    for name, value in _others(settings):
        flag = "--lr" if name == "rate" else f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words = [flag if value else flag.replace("--", "--no-")]
        else:
            words = [flag, str(value)]
        assert cli.main([*command.split(), "--checkpoint", "c", *words]) == 130
        called, request = arrived.pop()
        assert called == function
        assert request.settings == settings(**{name: value})


@pytest.mark.parametrize("job", JOBS)
def test_every_setting_of_a_job_reaches_the_pipeline(
    job: str, arrived: list[tuple[str, Any]]
) -> None:
    given, function, settings = JOBS[job]
    for name, value in _others(settings):
        with pytest.raises(Cancelled):
            worker.JOBS[job]({"checkpoint": "c", **given, "settings": {name: value}}, ignore)
        called, request = arrived.pop()
        assert called == function
        assert request.settings == settings(**{name: value})


@pytest.mark.parametrize("job", [job for job in JOBS if job != "draw"])
def test_every_setting_reaches_the_worker_through_the_api(
    job: str, checkpoint: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gradio")
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from comfy_continual_lora.webui import api
    from comfy_continual_lora.webui.tab import Host

    class Recorded(Host):
        def hand_in(self, *jobs: tuple[str, dict[str, Any]], batch: Any = None) -> Any:
            handed.append(jobs[0])
            return type("Job", (), {"number": len(handed)})

        def picture_folders(self) -> list[Path]:
            return [pictures]

    handed: list[tuple[str, dict[str, Any]]] = []
    app = FastAPI()
    api.add_routes(app, Recorded(checkpoint.parent, tmp_path / "work"))
    given, _, settings = JOBS[job]
    body = {**given, "checkpoint": checkpoint.name}
    if "images" in given:
        body["images"] = str(pictures)
    for name, value in _others(settings):
        answer = TestClient(app).post(
            f"{api.PREFIX}/{job}", json={**body, "settings": {name: value}}
        )
        assert answer.status_code == 200, answer.text
        handed_job, request = handed.pop()
        assert handed_job == job
        assert request["settings"] == {name: value}


@pytest.mark.parametrize(
    ("preset", "given", "steps", "rate"),
    [
        ("sd1", {}, 1000, 2e-4),
        ("sd1", {"batch": 4}, 1000, 2e-4),
        ("sd1", {"kind": "thing"}, 1000, 2e-4),
        ("sd1", {"kind": "thing", "batch": 4}, 250, 2e-4),
        ("sd1", {"kind": "person"}, 4000, 1e-4),
        ("sdxl", {"kind": "person", "batch": 4}, 1000, 5e-5),
        ("sd1", {"kind": "person", "steps": 70, "rate": 3e-4}, 70, 3e-4),
        ("sd1", {"kind": "style"}, 4000, 2e-4),
        ("mini", {"kind": "person"}, 1200, 6.5e-4),
    ],
)
def test_a_kind_sets_the_pictures_seen_and_the_rate(
    preset: str, given: dict[str, Any], steps: int, rate: float
) -> None:
    resolved = LearnSettings(**given).resolved(preset)
    assert (resolved.steps, resolved.rate) == (steps, pytest.approx(rate))


@pytest.mark.parametrize("field", dataclasses.fields(LearnSettings), ids=lambda field: field.name)
@pytest.mark.parametrize("value", [[], [1], {}, {"a": 1}, [[]], (1, 2)], ids=repr)
def test_what_no_widget_gives_is_refused_by_name(field: dataclasses.Field, value: Any) -> None:
    """A page's handlers can be called with any JSON."""
    with pytest.raises(SettingError, match=f"`?{field.name}`?"):
        check_field(field, from_widget(field, value))


@pytest.mark.parametrize("text", ["1e300", "-1e19", "9" * 400])
def test_a_number_typed_without_measure_is_told_as_it_was_typed(text: str) -> None:
    fields = {field.name: field for field in dataclasses.fields(LearnSettings)}
    with pytest.raises(SettingError, match=r"^rate is (-?1e|inf)") as refused:
        check_field(fields["rate"], from_widget(fields["rate"], text))
    assert len(str(refused.value)) < 100


@pytest.mark.parametrize(
    "settings", [SolveSettings(ordinary_weight=1e308), LearnSettings(retention_ordinary=1e308)]
)
def test_a_weight_that_no_equation_can_be_solved_with_is_refused(settings: Any) -> None:
    with pytest.raises(SettingError, match=r"is 1e\+308; the range is 0 to 1000000\."):
        settings.check()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (LearnSettings(steps=1_000_001), "steps is 1000001; the range is 1 to 1000000."),
        (DrawSettings(seed=2**63 - 1), f"seed is {2**63 - 1}; the range is 0 to {2**63 - 10_000}."),
        (DrawSettings(guidance=100.0001), "guidance is 100.0001; the range is 0 to 100."),
    ],
)
def test_a_number_just_out_of_its_range_is_told_from_the_last_in_it(
    settings: DrawSettings, said: str
) -> None:
    with pytest.raises(SettingError, match=f"^{said}$"):
        settings.check()
