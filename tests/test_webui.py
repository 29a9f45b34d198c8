"""The tab: what a click asks for, what is shown, and the whole path in a browser with
`continual-lora ui`.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import html
import http.client
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers_browser import CHROMIUM, page, wait_for_text
from helpers_messages import marked_names
from helpers_server import free_port, heard
from helpers_webui import asks_first, fill_settings
from PIL import Image

gradio = pytest.importorskip("gradio")

from comfy_continual_lora import pipeline  # noqa: E402
from comfy_continual_lora.errors import SettingError, StackError  # noqa: E402
from comfy_continual_lora.export import export_files  # noqa: E402
from comfy_continual_lora.files import stack_path  # noqa: E402
from comfy_continual_lora.operations import OPERATIONS  # noqa: E402
from comfy_continual_lora.requests import LearnRequest, parse  # noqa: E402
from comfy_continual_lora.settings import LearnSettings  # noqa: E402
from comfy_continual_lora.store import open_stack, read_records  # noqa: E402
from comfy_continual_lora.versions import versions  # noqa: E402
from comfy_continual_lora.webui import alone, cards, host, shown, uploads  # noqa: E402
from comfy_continual_lora.webui import job as job_module  # noqa: E402
from comfy_continual_lora.webui.album import Album  # noqa: E402
from comfy_continual_lora.webui.environment import REQUIREMENTS  # noqa: E402
from comfy_continual_lora.webui.handlers import Handlers  # noqa: E402
from comfy_continual_lora.webui.job import Job  # noqa: E402
from comfy_continual_lora.webui.labels import METHOD_LABELS, label_of  # noqa: E402
from comfy_continual_lora.webui.outputs import (  # noqa: E402
    ADVANCED,
    ASKING,
    CARDS,
    DEFAULTS,
    OUTPUTS,
    PICTURES,
    SLOTS,
    STACK,
)
from comfy_continual_lora.webui.runner import Busy  # noqa: E402

ROOT = Path(__file__).parents[1]
OLD_STACK = ROOT / "tests" / "data" / "stack-8a93aef.safetensors"  # of V1 ball, V2 fish, V3 mug
# What messages may name though the tab shows no part for it: what belongs to operations and settings
# that only other front ends have
NOT_IN_THE_TAB = {
    *("import", "embedding", "trigger", "strength", "rest", "prompts", "out", "format"),
    *("settings", "optimizer", "ridge", "rows", "keep", "prediction", "other"),
}


def test_the_environment_asks_for_what_the_package_does() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    declared = re.search(r"^dependencies = \[(.*?)^\]", text, re.S | re.M)
    assert declared
    assert tuple(re.findall(r'"(.+?)"', declared[1])) == REQUIREMENTS


def test_widgets_become_the_settings_that_differ() -> None:
    names = ("adapter", "steps", "flip", "rate", "checkpointing", "seed")
    untouched = ("vera", 0, "auto", 0, False, 0)
    assert uploads.settings_of(LearnSettings, names, untouched) == {"adapter": "vera"}
    changed = (LearnSettings().adapter, 40.0, "no", 0.001, True, 3.0)
    assert uploads.settings_of(LearnSettings, names, changed) == {
        "steps": 40,
        "flip": False,
        "rate": 0.001,
        "checkpointing": True,
        "seed": 3,
    }


def test_a_card_shows_a_concept_of_a_stack(checkpoint: Path, pictures: Path) -> None:
    quick = LearnSettings(method="lora", steps=1, batch=1, rank=4, size=64)
    pipeline.learn_concept(LearnRequest(checkpoint, pictures, "V1", "<ball>", quick, device="cpu"))
    stack = stack_path(checkpoint)
    (concept,) = host.concepts_of(stack)
    face = cards.card(concept, b"", 0.5)
    assert "V1 &lt;ball&gt;" in face
    assert "<ball>" not in face
    assert "50 % kept" in face
    assert face.count("data:image/jpeg;base64,") == 1
    assert "not drawn yet" in face
    assert "learned V1 &lt;ball&gt;" in shown.history(versions(stack))
    assert host.concepts_of(stack.with_name("none")) == []
    stack.write_bytes(stack.read_bytes()[:100])
    with pytest.raises(StackError, match=r"can't be (read|used)|damaged"):
        host.concepts_of(stack)
    page = Handlers(host.Host(checkpoint.parent, checkpoint.parent / "work"))
    assert "can&#x27;t be read" in _value(page.view(checkpoint.name, ""), "none")["value"]
    assert "only letters" in _value(page.view(checkpoint.name, "../up"), "none")["value"]


def test_every_state_of_a_job_is_described() -> None:
    job = Job(1, [("learn", {})])
    assert shown.status(None) == "Ready."
    assert "Starting" in shown.status(job)
    job.progress = {"stage": "learn", "step": 3, "steps": 9, "loss": 0.125, "seconds_left": 61.0}
    assert shown.status(job) == "**learn** step 3 of 9, loss 0.1250, 1:01 left"
    job.state, job.notes = "stopping", ["Going on from step 3"]
    assert "stopping after this step" in shown.status(job)
    assert shown.status(job).endswith("\n\nGoing on from step 3")
    job.state, job.message, job.notes = "stopped", "at step 4", []
    assert "kept" in shown.status(job)
    job.state, job.message = "failed", "no room"
    assert shown.status(job) == "**learn failed.** no room"
    job.message, job.marked = "stack is 3, token_rate is 5", "`stack` is 3, `token_rate` is 5"
    assert shown.status(job, str) == "**learn failed.** Stack is 3, token rate is 5"
    assert shown.status(job, str, None) == "**learn failed.** stack is 3, token_rate is 5"
    export = {
        "lora": "/x/a-1.safetensors",
        "triggers": ["V1 ball"],
        "notes": ["V1 is another file's name there."],
    }
    job.state, job.results = "done", {"learn": {"token": "V1", "noun": "ball"}, "export": export}
    assert "a photo of a V1 ball* <lora:a-1:1>" in shown.status(job, str)
    assert "another file's name" in shown.status(job, str)
    scored = {"file": "/x/copies/1/IMG.png", "best": "V1", "sure": True}
    job.results = {"scores": {"images": [scored]}}
    assert shown.status(job, str) == "**DC scores.** IMG.png: V1"
    undone = {"change": "forgot V1 ball", "token": "V1", "noun": "ball", "tokens": ["V1"]}
    restored = {"version": 2, "change": "learned V1 ball", "tokens": []}
    job.results = {"undo": {**undone, "version": 3}, "restore": restored}
    status = shown.status(job, str)
    assert "Undone: forgot V1 ball.** The stack now holds V1." in status
    assert "Went back to version 2: learned V1 ball.** The stack now holds no concept." in status


def test_a_failed_export_hides_no_concept() -> None:
    job = Job(1, [("learn", {}), ("export", {})])
    job.results = {"learn": {"token": "V1", "noun": "ball", "losses": [], "again": False}}
    job.state, job.message, job.marked = "failed", "out is full", "`out` is full"
    assert shown.status(job, str).split("\n\n") == [
        "**Learned V1 ball**.",
        "What was done so far is stored.",
        "**export failed.** out is full",
    ]


@pytest.fixture
def handlers(checkpoint: Path, tmp_path: Path) -> Iterator[Handlers]:
    """Those of a page whose worker is not a Python, so that its jobs fail at once."""
    page_host = host.Host(checkpoint.parent, tmp_path / "work")
    page_host.runner.python = lambda: os.devnull
    yield Handlers(page_host)
    if page_host.runner.job:
        page_host.runner.job.fail("over")


def _request(handlers: Handlers, name: str) -> dict[str, Any]:
    """The job's request for this operation; all its requests are ones the worker accepts."""
    job = handlers.host.runner.job
    assert job
    requests = dict(job.jobs)
    for operation, request in job.jobs:
        parse(OPERATIONS[operation].request, request)
    return dict(requests[name])


def test_what_is_clicked_reaches_the_worker(
    handlers: Handlers, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(pictures.parent))
    place = ("mini.safetensors", "", 0)
    files = [str(path) for path in sorted(pictures.glob("*.png"))]
    beside = [((file, 0), "") for file in files]
    values = [*_untouched(), *("a caption" if n == 1 else "" for n in range(SLOTS))]
    paper = next(label for label, name in METHOD_LABELS.items() if name == "lora_dsc_ewc_dc")
    for method, chosen in ((paper, "lora_dsc_ewc_dc"), ("lora_ewc", "lora_ewc")):
        for replace in (False, True):
            words = (" V1 ", "ball", method, replace, "flow" if replace else "auto")
            outputs = handlers.learn(*place, files, beside, *words, *values)
            assert len(outputs) == len(OUTPUTS)
            request = _request(handlers, "learn")
            assert (request["token"], request["noun"], request["replace"]) == (
                "V1",
                "ball",
                replace,
            )
            assert request["prediction"] == ("flow" if replace else "auto")
            assert request["settings"] == {"method": chosen, "preview_every": 50}
            _wait(handlers)
    handlers.estimate(*place, files, beside, "V1", "ball", paper, False, "auto", *values)
    job = handlers.host.runner.job
    assert job
    parse(LearnRequest, dict(job.jobs)["plan"])
    _wait(handlers)
    for remove in (False, True):
        handlers.export(*place, remove)
        assert _request(handlers, "export")["remove_superseded"] is remove
        _wait(handlers)
        handlers.export(*place, remove, "V1, V2")
        request = _request(handlers, "export")
        assert (request["only"], request["remove_superseded"]) == (["V1", "V2"], remove)
        _wait(handlers)
    values[ADVANCED.index("dsc_steps")] = values[ADVANCED.index("steps")] = 7
    for click, arguments, name in (
        (handlers.consolidate, (files, beside, *values), "consolidate"),
        (handlers.closed_form, (), "closed_form"),
        (handlers.scores, (files,), "scores"),
        (handlers.evaluate, (), "evaluate"),
    ):
        click(*place, *arguments)
        request = _request(handlers, name)
        assert request["checkpoint"].endswith("mini.safetensors")
        assert request.get("settings", {}) == ({"dsc_steps": 7} if name == "consolidate" else {})
        _wait(handlers)
    handlers.rename(*place, "V1", " V5 ")
    assert _request(handlers, "rename")["to"] == "V5"


def test_the_prompt_for_txt2img_names_the_export(handlers: Handlers) -> None:
    """Its newest LoRA, and the word as its embedding is named, where another's has the name."""
    checkpoint = handlers.host.checkpoints()["mini.safetensors"]
    shutil.copy(OLD_STACK, stack_path(checkpoint))
    stack = open_stack(stack_path(checkpoint))
    words = list(stack.tokens)

    def sent(number: int) -> tuple[str, str]:
        prompt, said = handlers.send_card(number)("mini.safetensors", "", words)
        return prompt, html.unescape(said) if isinstance(said, str) else ""

    assert sent(1) == ("", "**There is no export with V2 yet: press Export first.**")
    out, embeddings = handlers.host.exports()
    embeddings.mkdir(parents=True)
    (embeddings / "V1.pt").write_bytes(b"another embedding")
    lora = export_files(stack, out, embeddings, "mini").lora
    assert lora
    assert [sent(number) for number in range(3)] == [
        (f"a photo of a V1-2 ball <lora:{lora.stem}:1>", ""),
        (f"a photo of a V2 fish <lora:{lora.stem}:1>", ""),
        (f"a photo of a V3 mug <lora:{lora.stem}:1>", ""),
    ]


def test_each_line_of_the_prompt_is_drawn(handlers: Handlers) -> None:
    place = ("mini.safetensors", "", 0)
    handlers.draw(*place, "a V1 ball\n\n a V1 ball and a V2 box ", 2, 10, 7, " blurred ")
    request = _request(handlers, "draw")
    assert request["prompts"] == ["a V1 ball", "a V1 ball and a V2 box"]
    assert request["settings"] == {"count": 2, "steps": 10, "seed": 7, "negative": "blurred"}
    seeds = set()
    for _ in range(3):
        _wait(handlers)
        handlers.draw(*place, "a V1 ball")
        seeds.add(_request(handlers, "draw")["settings"]["seed"])
    assert len(seeds) > 1
    assert "No prompt yet" in _value(handlers.draw(*place, " "), "said")


def _at(image: Image.Image, x: int, y: int) -> tuple[int, int, int]:
    return image.convert("RGB").load()[x, y]  # type: ignore[index,return-value]


def _untouched() -> list[Any]:
    """The values of the settings' widgets as the page begins."""
    defaults = {f.name: f.default for f in dataclasses.fields(LearnSettings)} | DEFAULTS
    shown = {"flip": "auto", "kind": "auto", "preview_prompts": ""}
    return [shown.get(name, defaults[name] or 0) for name in ADVANCED]


def _wait(handlers: Handlers) -> None:
    assert handlers.host.runner.job
    assert handlers.host.runner.job.wait(20)


def _value(outputs: list[Any], name: str) -> Any:
    return outputs[OUTPUTS.index(name)]


def test_what_is_dropped_is_used_or_named(
    handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures, captions and masks, each in a folder of its own, as gradio keeps uploads."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    files = {}
    for name in ("a.jpg", "b.PNG", "a.mask.png", "a.caption", "b.txt", "IMG_2.HEIC", "cut.jpg"):
        files[name] = tmp_path / name[::-1] / name
        files[name].parent.mkdir()
    Image.new("CMYK", (16, 12), (0, 255, 255, 0)).save(files["a.jpg"])
    Image.new("RGB", (16, 12), "blue").save(files["b.PNG"])
    Image.new("L", (16, 12), "white").save(files["a.mask.png"])
    files["a.caption"].write_bytes("on a café's table".encode("utf-16"))
    files["b.txt"].write_text("dropped")
    files["IMG_2.HEIC"].write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    files["cut.jpg"].write_bytes(files["a.jpg"].read_bytes()[:300])
    given = [str(file) for file in files.values()]
    a, b = [(str(files[name]), 0) for name in ("a.jpg", "b.PNG")]
    pictures, told = uploads.dropped(given, {b: "typed"})
    assert [(one.name, one.caption) for one in pictures] == [
        ("a.jpg", "on a café's table"),
        ("b.PNG", "typed"),
        ("cut.jpg", ""),
    ]
    image = pictures[0].image
    assert image
    assert _at(image, 8, 5)[0] > 200 > _at(image, 8, 5)[2]
    assert _at(image, 0, 5)[0] < 80  # outside the crop
    padded = uploads.dropped(given, {}, "pad")[0][0].image
    assert padded
    assert _at(padded, 0, 5)[0] > 200
    assert pictures[2].image is None
    told = told.splitlines()
    assert told[0] == (
        "3 pictures, 2 captions (.txt, .caption), 1 mask; left out: IMG_2.HEIC (convert it)"
    )
    assert told[-1].startswith("cut.jpg: can't be read as a picture")
    assert "cut.jpg can't be read" in html.unescape(
        _value(handlers.scores("mini.safetensors", "", 0, given), "said")
    )
    emptied = uploads.found_in(given[:-1], {a: ""})
    assert [one.caption for one in emptied] == ["", "dropped"]
    sent = uploads.found_in(given[:-1], {b: "typed"})
    assert [one.name for one in sent] == ["a.jpg", "b.PNG"]
    assert [one.caption for one in sent] == ["on a café's table", "typed"]
    assert [one.mask for one in sent] == [files["a.mask.png"].read_bytes(), None]
    Image.new("L", (16, 12)).save(files["a.mask.png"])
    masked = uploads.dropped(given, {})[0][0].image
    assert masked
    assert _at(masked, 8, 5)[0] < 80


def test_captions_stay_beside_their_pictures(
    handlers: Handlers, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was typed beside one goes with it when others are dropped; what is shown is escaped."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(pictures.parent))
    files = [str(path) for path in sorted(pictures.glob("*.png"))]

    first = handlers.pictures(files[1:], [], "crop", *[""] * SLOTS)
    typed = ["", "typed", *[""] * (SLOTS - 2)]
    again = handlers.pictures(files, first[0], "crop", *typed)
    names = [Path(file).name for file in files]
    thumbs = _of_kind(again, "thumb_")
    assert all(name in thumb for name, thumb in zip(names, thumbs, strict=False))
    assert _of_kind(again, "caption_")[: len(files)] == ["", "", "typed", *[""] * (len(files) - 3)]
    assert [one["visible"] for one in _of_kind(again, "slot_")].count(True) == len(files)
    assert "&lt;b&gt;.png" in cards.thumbnail("<b>.png", None)
    none = handlers.pictures([], first[0], "crop", *typed)
    assert _of_kind(none, "thumb_") == [""] * SLOTS


def _of_kind(outputs: list[Any], kind: str) -> list[Any]:
    return [value for name, value in zip(PICTURES, outputs, strict=True) if kind in name]


def _learned_from(handlers: Handlers, files: list[str], beside: Any, typed: list[str]) -> list[Any]:
    """What a click on Learn would hand in: each picture's corner, and its caption."""
    place, words = ("mini.safetensors", "", 0), ("V1", "ball", "lora", False, "auto")
    with pytest.MonkeyPatch.context() as patch:
        batches: list[Any] = []
        patch.setattr(
            handlers.host, "hand_in_or_wait", lambda *_, batch: bool(batches.append(batch))
        )
        handlers.learn(*place, files, beside, *words, *_untouched(), *typed)
    (batch,) = batches
    pictures = [Image.open(io.BytesIO(batch.files[name])) for name in batch.pictures]
    captions = [batch.files.get(f"{name}.txt", b"").decode() for name in batch.pictures]
    return list(zip([_at(picture, 0, 0) for picture in pictures], captions, strict=True))


def test_pictures_of_one_name_keep_their_own_captions(
    handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of the name, as phones give it to all, and one of them twice, which gradio keeps once."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    files = [str(tmp_path / str(number) / "image.png") for number in (0, 1)]
    colours = [(200, 0, 0), (0, 0, 200)]
    for file, colour in zip(files, colours, strict=True):
        Path(file).parent.mkdir()
        Image.new("RGB", (32, 32), colour).save(file)
    files.append(files[0])
    beside = handlers.pictures(files, [], "crop", *[""] * SLOTS)[0]
    typed = ["a red one", "a blue one", "a red one again", *[""] * (SLOTS - 3)]
    expected = list(zip([*colours, colours[0]], typed, strict=False))
    assert _learned_from(handlers, files, beside, typed) == expected
    turned = handlers.pictures(files[::-1], beside, "pad", *typed)
    assert _of_kind(turned, "caption_")[:3] == ["a red one", "a blue one", "a red one again"]
    less = handlers.pictures(files[1:2], beside, "pad", *typed)
    assert _of_kind(less, "caption_")[:2] == ["a blue one", ""]


def test_a_cleared_caption_stays_cleared(
    handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever changes after it. One that no one touched is read again from what is dropped."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    files = [str(tmp_path / name) for name in ("a.png", "b.png", "a.txt")]
    for file in files[:2]:
        Image.new("RGB", (32, 32), "red").save(file)
    Path(files[2]).write_text("from the file")
    first = handlers.pictures(files, [], "crop", *[""] * SLOTS)
    assert _of_kind(first, "caption_")[:2] == ["from the file", ""]
    typed, beside = [""] * SLOTS, first[0]
    for fit in ("pad", "crop"):
        beside, *_ = outputs = handlers.pictures(files, beside, fit, *typed)
        assert _of_kind(outputs, "caption_")[:2] == ["", ""]
    assert [text for _, text in _learned_from(handlers, files, beside, typed)] == ["", ""]
    (tmp_path / "b.txt").write_text("dropped later")
    later = [*files, str(tmp_path / "b.txt")]
    beside, *_ = outputs = handlers.pictures(later, beside, "crop", *typed)
    assert _of_kind(outputs, "caption_")[:2] == ["", "dropped later"]


def test_the_page_opens_as_it_was_left(
    learned: Callable[..., Path], handlers: Handlers, tmp_path: Path
) -> None:
    """Another checkpoint learned last: it is chosen, with its cards and the next free word."""
    folder = handlers.host.models
    shutil.copy(folder / "mini.safetensors", folder / "a-first.safetensors")
    checkpoint = learned(
        LearnSettings(method="lora", steps=1, batch=1, rank=4, size=64), "V1", "V3"
    )
    for file in checkpoint.parent.glob("*.safetensors"):
        shutil.copy(file, folder / file.name.replace(checkpoint.stem, "other"))
    choice, name, *outputs = handlers.load()
    assert (choice["value"], name) == ("other.safetensors", "")
    assert set(choice["choices"]) >= {"a-first.safetensors", "other.safetensors"}
    assert _value(outputs, "token") == "V2"
    assert _value(outputs, "tokens") == ["V3", "V1"]
    visible = [_value(outputs, f"card_{number}")["visible"] for number in range(CARDS)]
    assert visible == [True, True, *[False] * (CARDS - 2)]
    assert "V1" in _value(outputs, "face_1")
    assert "a photo of a V3" in _value(outputs, "chip_0")["value"]
    assert _value(outputs, "stop")["interactive"] is False
    assert _value(handlers.look("other.safetensors", "", 0, ("", ""), "V1"), "token") == "V2"
    assert _value(handlers.look("other.safetensors", "", 0, ("", ""), "V1", True), "token") != "V2"
    place = ("other.safetensors", "", 0, ["V3", "V1"])
    handlers.draw_card(1)(*place, 1, 5, 3, "")
    assert _request(handlers, "draw")["prompts"][0].startswith("a photo of a V1 ")
    _wait(handlers)
    handlers.export_card(0)(*place, False)
    assert _request(handlers, "export")["only"] == ["V3"]
    _wait(handlers)
    assert "V1" in handlers.ask_forget(1)("other.safetensors", "", ["V3", "V1"])[-1]["sentence"]
    gone = handlers.draw_card(0)("other.safetensors", "", 0, ["V9"], 1, 5, 3, "")
    assert "not on the stack" in _value(gone, "said")


def test_concepts_wait_for_those_before_them(
    handlers: Handlers, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A word is learned once, the next ones wait; Stop empties the queue; a failure does not."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(pictures.parent))
    host, release = handlers.host, threading.Event()

    @contextmanager
    def held(_: Job) -> Iterator[None]:
        yield
        release.wait(20)

    host.runner.around = held
    monkeypatch.setattr(
        job_module.Job, "start", lambda self, *_: release.wait(20) and self.fail("no")
    )
    files = [str(path) for path in sorted(pictures.glob("*.png"))]
    place, values = ("mini.safetensors", "", 0), [*_untouched(), *[""] * SLOTS]

    def learn(token: str) -> list[Any]:
        return handlers.learn(*place, files, [], token, "ball", "lora", False, "auto", *values)

    assert not isinstance(_value(learn("V1"), "token"), str)
    assert "is being learned already" in _value(learn("v1"), "status")
    outputs = learn("V2")
    assert _value(outputs, "token") == "V3"
    assert "Waiting: 1. V2 ball" in html.unescape(_value(outputs, "status"))
    assert _value(outputs, "queue")["visible"] is True
    outputs = handlers.learn_next(*place, _value(learn("V3"), "waits")["choices"][1])
    assert _value(outputs, "waits")["choices"] == ["1. V3 ball", "2. V2 ball"]
    assert _value(outputs, "waits")["value"] == "1. V3 ball"
    again = handlers.learn_next(*place, "2. V3 ball")
    assert "choose again" in _value(again, "status")
    assert host.waits() == ["1. V3 ball", "2. V2 ball"]
    outputs = handlers.take_off(*place, "1. V3 ball")
    assert _value(outputs, "waits")["choices"] == ["1. V2 ball"]
    assert _value(outputs, "learn")["value"] == "Add to the queue"
    assert _value(outputs, "stop")["interactive"] is True
    release.set()
    deadline = time.monotonic() + 20
    while host.is_busy:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert host.runner.job
    assert dict(host.runner.job.jobs)["learn"]["token"] == "V2"
    shown_now = _value(handlers.view(*place), "status")
    assert shown_now.count("failed.") == 2
    release.clear()
    learn("V1")
    learn("V2")
    assert len(host.waiting) == 1
    handlers.stop(*place)
    release.set()
    _wait(handlers)
    assert dict(host.runner.job.jobs)["learn"]["token"] == "V1"
    assert host.waiting == []
    assert _value(handlers.view(*place), "queue")["visible"] is False


def test_a_job_that_waited_and_can_not_start_is_told_literally(
    handlers: Handlers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its pictures could not be copied; the word is as it was typed."""
    page_host, path = handlers.host, tmp_path / "_a_.png"

    def no_room(*_: Any, **__: Any) -> None:
        raise OSError(28, "No <b>room</b>", str(path))

    monkeypatch.setattr(page_host, "hand_in", no_room)
    page_host.waiting = [([("learn", {"token": "<img src=x>", "noun": "*cat*"})], None)]
    page_host._go_on(Job(1, [("learn", {"token": "V1", "noun": "dog"})]))
    told = page_host.past[-1]
    assert not {"<", "_"} & set(told)
    assert "<img src=x>**: " in html.unescape(told)
    assert "No <b>room</b>" in html.unescape(told)


def test_a_damaged_stack_is_told_where_something_waits(
    handlers: Handlers, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its words are not known, so the page proposes none."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(pictures.parent))
    checkpoint = handlers.host.checkpoints()["mini.safetensors"]
    checkpoint.with_name("mini.concepts.safetensors").write_text("damaged")
    monkeypatch.setattr(handlers.host, "hand_in_or_wait", lambda *_, **__: True)
    files, values = [str(path) for path in pictures.glob("*.png")], [*_untouched(), *[""] * SLOTS]
    given = (files, [], "V1", "ball", "lora", False, "auto", *values)
    outputs = handlers.learn("mini.safetensors", "", 0, *given)
    assert _value(outputs, "token") == gradio.update()
    assert "can&#x27;t be read" in _value(outputs, "none")["value"]


def test_what_waits_stays_when_another_job_comes_first(
    handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The API hands one in just when the next would start; how the job before ended is told once."""
    page_host, asked = handlers.host, []

    def hand_in(*jobs: Any, batch: Any = None) -> Any:
        asked.append(jobs[0][1]["token"])
        raise OSError(28, "No room") if asked == ["V2"] else Busy("Another one")

    monkeypatch.setattr(page_host, "hand_in", hand_in)
    page_host.waiting = [([("learn", {"token": token})], None) for token in ("V2", "V3", "V4")]
    page_host._go_on(Job(1, [("learn", {"token": "V1"})]))
    assert asked == ["V2", "V3"]
    assert page_host.waits() == ["1. V3", "2. V4"]
    assert len(page_host.past) == 2


def test_a_page_opened_before_a_job_can_stop_it(handlers: Handlers) -> None:
    """One that another window started: what is refused for it shows it."""
    job = Job(1, [("learn", {"token": "V1", "stack": ""})])
    handlers.host.runner.job = job
    outputs = handlers.closed_form("mini.safetensors", "", 0)
    assert "A job is already running" in _value(outputs, "said")
    assert _value(outputs, "status") == "Starting the worker ..."
    assert _value(outputs, "halt") == gradio.update(interactive=True)
    assert "busy" in str(_value(outputs, "pulse")) or _value(outputs, "pulse")["active"]
    unchanged = handlers.look("mini.safetensors", "", 0, _value(outputs, "mark"))
    assert all(value == gradio.update() for value in unchanged)  # so that the refusal stays
    refused = handlers.draw("mini.safetensors", "", 0, "")
    assert _value(refused, "halt") == gradio.update()


def test_only_what_is_new_is_sent(handlers: Handlers) -> None:
    """While a job goes on, the pictures and cards are not sent again."""
    place = ("mini.safetensors", "", 0)
    handlers.closed_form(*place)
    _wait(handlers)
    mark = handlers.mark()
    job = handlers.host.runner.job
    assert job
    unchanged = handlers.look(*place, mark)
    assert all(value == gradio.update() for value in unchanged)
    job.losses = [1.0, 0.5]
    outputs = handlers.look(*place, mark)
    assert _value(outputs, "losses")["visible"] is True
    assert all(_value(outputs, name) == gradio.update() for name in (*STACK, "gallery"))
    assert _value(outputs, "said").startswith("**closed&#95;form failed")
    assert _value(handlers.look(*place, ("", "")), "face_0") == ""
    loss = _value(outputs, "losses")["value"]
    learned = {
        "token": "V1",
        "noun": "ball",
        "again": False,
        "watched": [[10, 0.1, 0], [20, 0.2, 0]],
    }
    job.results = {"learn": learned}
    both = _value(handlers.look(*place, mark), "losses")["value"]
    assert both.size == (loss.width, 2 * loss.height)


def test_changed_settings_are_said(handlers: Handlers) -> None:
    method, values = handlers.host.default_method(), _untouched()
    assert handlers.changed(method, "auto", *values)["value"] == ""
    values[ADVANCED.index("steps")] = 40
    told = html.unescape(handlers.changed("lora_ewc", "v", *values)["value"])
    assert told == "Changed below: method lora_ewc, What its net predicts v, steps 40."


def test_the_album_keeps_what_was_drawn_and_measured(tmp_path: Path) -> None:
    """Of concepts on the stack; a picture of two things is nobody's portrait."""
    album, stack = Album(tmp_path / "album"), tmp_path / "a.concepts.safetensors"
    one, two = (
        {"id": name, "token": name, "noun": "ball", "with_noun": True} for name in ("V1", "V2")
    )
    files = []
    for number, colour in enumerate(("red", "green", "blue")):
        files.append(str(tmp_path / f"{number}.png"))
        Image.new("RGB", (600, 600), colour).save(files[-1])
    prompts = ["a V1 ball", "a V1 ball and a V2 ball", "v2"]
    job = Job(1, [("draw", {"prompts": prompts, "settings": {"count": 1, "seed": 0}})])
    job.results = {
        "draw": {"files": files},
        "evaluate": {"kept": {"V1 ball": 0.9, "V2 ball": None}},
    }
    album.add(stack, [one, two], job)
    red, blue = (Image.open(io.BytesIO(album.drawing(stack, concept))) for concept in (one, two))
    assert red.size == (384, 384)
    assert _at(red, 9, 9)[0] > 200
    assert _at(blue, 9, 9)[2] > 200
    assert album.kept(stack) == {"V1": 0.9}
    assert album.drawing(tmp_path / "b.concepts.safetensors", one) == b""
    job.results = {}
    album.add(stack, [two], job)
    assert album.drawing(stack, one) == b""
    assert album.drawing(stack, two)


def test_the_photograph_of_the_first_concept_is_not_taken_for_the_new_one(tmp_path: Path) -> None:
    album, stack = Album(tmp_path), tmp_path / "a.concepts.safetensors"
    one, two = (
        {"id": name, "token": name, "noun": "ball", "with_noun": True} for name in ("V1", "V2")
    )
    preview = Image.new("RGB", (256, 128), "red")
    preview.paste("blue", (0, 0, 128, 128))
    buffer = io.BytesIO()
    preview.save(buffer, "JPEG")
    job = Job(1, [("learn", {})])
    job.preview, job.results = (
        base64.b64encode(buffer.getvalue()).decode(),
        {"learn": {"token": "V2"}},
    )
    album.add(stack, [one, two], job)
    new, first = (Image.open(io.BytesIO(album.drawing(stack, concept))) for concept in (two, one))
    assert _at(new, 60, 60)[2] > 200
    assert _at(first, 60, 60)[0] > 200


def test_previews_of_own_prompts_are_portraits_of_what_they_name(tmp_path: Path) -> None:
    album, stack = Album(tmp_path), tmp_path / "a.concepts.safetensors"
    one, two, three = (
        {"id": name, "token": name, "noun": "ball", "with_noun": True}
        for name in ("V1", "V2", "V3")
    )
    preview = Image.new("RGB", (384, 128), "red")
    preview.paste("blue", (128, 0, 256, 128))
    preview.paste("lime", (256, 0, 384, 128))
    buffer = io.BytesIO()
    preview.save(buffer, "JPEG")
    prompts = "a V1 ball and a V3 ball | a V3 ball on grass| a painting of a V2 ball"
    job = Job(1, [("learn", {"settings": {"preview_prompts": prompts}})])
    job.preview = base64.b64encode(buffer.getvalue()).decode()
    job.results = {"learn": {"token": "V3"}}
    album.add(stack, [one, two, three], job)
    assert album.drawing(stack, one) == b""
    second, new = (Image.open(io.BytesIO(album.drawing(stack, x))) for x in (two, three))
    assert _at(second, 60, 60)[1] > 200
    assert _at(new, 60, 60)[2] > 200
    assert max(second.width, new.width) == 128


def test_progress_is_a_share_of_the_stage() -> None:
    job = Job(1, [("learn", {})])
    assert cards.bar(None) == ""
    job.state, job.progress = "running", {"stage": "<learn>", "step": 30, "steps": 40}
    assert "aria-valuenow='75'" in cards.bar(job)
    assert "&lt;learn&gt;" in cards.bar(job)
    job.state = "done"
    assert cards.bar(job) == ""


def test_a_refusal_names_fields_by_their_labels(
    handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Choose a checkpoint first" in _value(handlers.export("", "", 0, False), "said")
    assert "No pictures yet" in _value(handlers.scores("mini.safetensors", "", 0, []), "said")

    def refuses(*_: object, **__: object) -> None:
        raise SettingError("Start another `stack`; `ewc_strength` is 3.")

    monkeypatch.setattr(handlers.host, "hand_in", refuses)
    refusal = _value(handlers.export("mini.safetensors", "", 0, False), "said")
    message = html.unescape(refusal)
    assert message == "**Start another Stack; ewc strength is 3.**"
    assert len(handlers.ask("undo")("mini.safetensors", "")) == len(OUTPUTS) + len(ASKING)


def test_the_page_has_every_part_and_label(tmp_path: Path) -> None:
    """In a process of its own: gradio leaves event loops open."""
    code = (
        "import sys, pathlib, gradio; from comfy_continual_lora.webui import host, tab\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "with gradio.Blocks() as page:\n"
        "    tab.build(host.Host(folder, folder / 'work'), page)\n"
        "for part in page.blocks.values():\n"
        "    print(getattr(part, 'label', None))\n"
        "    print(getattr(part, 'value', None))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    seen = [line.removesuffix(" ...") for line in result.stdout.splitlines()]
    named = {*ADVANCED, *marked_names()} - NOT_IN_THE_TAB
    for name in ("images", "replace", "remove_superseded", "stack", "history", *named):
        assert any(line.startswith(label_of(name)) for line in seen), (name, result.stderr)


def test_no_file_is_read_that_was_named_but_not_uploaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gradio 3 hands over a copy of whatever file of this machine a request names, and the name."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    inside, outside = tmp_path / "uploads" / "a" / "0.png", tmp_path / "secret.txt"
    for path in (inside, outside):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    link = tmp_path / "uploads" / "link.txt"
    link.symlink_to(outside)
    old = SimpleNamespace(name=str(inside), orig_name=str(inside))
    assert uploads.uploaded([str(inside), inside, old]) == [inside] * 3
    assert uploads.uploaded(None) == []
    copied = SimpleNamespace(name=str(inside), orig_name=str(outside))
    copied_by_name = SimpleNamespace(name=str(inside), orig_name="secret.txt")
    above = str(tmp_path / "uploads" / ".." / "secret.txt")
    for bad in (str(outside), outside, copied, copied_by_name, above, link, "secret.txt"):
        with pytest.raises(ValueError, match="not uploaded"):
            uploads.uploaded([inside, bad])


def test_environment_variables_choose_what_no_page_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page_host = host.Host(tmp_path, tmp_path / "work")
    assert page_host.python() == sys.executable
    assert page_host.picture_folders() == [tmp_path / "work" / "pictures"]
    monkeypatch.setenv("CONTINUAL_LORA_PYTHON", "/opt/python")
    monkeypatch.setenv("CONTINUAL_LORA_FOLDERS", os.pathsep.join(["/a b;c", "", "/d"]))
    assert page_host.python() == "/opt/python"
    assert page_host.picture_folders()[1:] == [Path("/a b;c"), Path("/d")]
    assert list(tmp_path.iterdir()) == []


LOCAL = {"host": "127.0.0.1:7860"}


@pytest.mark.parametrize(
    "headers",
    [
        LOCAL,
        {"host": "localhost"},
        {"host": "LOCALHOST:1"},
        {"host": "[::1]:7860", "origin": "http://[::1]:7860", "sec-fetch-site": "same-origin"},
        {**LOCAL, "sec-fetch-site": "none"},
        {**LOCAL, "sec-fetch-site": "cross-site", "sec-fetch-dest": "document"},
    ],
)
def test_pages_of_this_machine_are_answered(headers: dict[str, str]) -> None:
    sent = [(name.encode(), value.encode()) for name, value in headers.items()]
    assert alone.is_own("GET", sent)
    if "sec-fetch-dest" in headers:  # a link leads here; a form of another page does not
        assert not alone.is_own("POST", sent)
    assert not alone.is_own("GET", [*sent, (b"Host", b"evil.example")])


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": ""},
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "127.0.0.1@evil.example"},
        {"host": "evil.example:127.0.0.1"},
        {"host": "localhost/evil"},
        {"host": "localhost:x"},
        {"host": "0.0.0.0:7860"},
        {**LOCAL, "origin": "null"},
        {**LOCAL, "origin": "http://evil.example"},
        {**LOCAL, "origin": "http://127.0.0.1:8000"},
        {**LOCAL, "origin": ""},
        {**LOCAL, "sec-fetch-site": "cross-site"},
        {**LOCAL, "sec-fetch-site": "same-site", "sec-fetch-dest": "empty"},
        {**LOCAL, "sec-fetch-site": "cross-site", "sec-fetch-dest": "iframe"},
    ],
)
def test_other_pages_are_not_answered(headers: dict[str, str]) -> None:
    sent = [(name.encode(), value.encode()) for name, value in headers.items()]
    assert not alone.is_own("GET", sent)
    if "sec-fetch-dest" in headers:
        assert not alone.is_own("POST", sent)
    assert not alone.is_own("GET", [*sent, (b"Host", b"evil.example")])


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    """The address of `continual-lora ui` on that folder of checkpoints."""
    with _serving(folder) as (address, _):
        yield address


@contextmanager
def _serving(folder: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """Its address and its process."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "comfy_continual_lora",
        "ui",
        "--models",
        str(folder),
        "--port",
        str(port),
        "--no-browser",
    ]
    log = folder / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=output,
            **heard(),
        ) as server,
    ):
        try:
            _wait_for(f"http://127.0.0.1:{port}", server, log)
            yield f"http://127.0.0.1:{port}", server
        finally:
            server.terminate()


def _status(address: str, path: str, data: bytes | None = None, **headers: str) -> int:
    """The status of a request whose path and headers are sent as they are."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    with contextlib.closing(connection):
        connection.request("GET" if data is None else "POST", path, data, names)
        return connection.getresponse().status


FILE_PREFIXES = (
    "/gradio_api/file=",
    "/file=",
    "/static/",
    "/assets/",
    "/gradio_api/file/",
    "/file/",
)


@pytest.mark.slow
def test_the_tab_by_itself_serves_its_exports_to_its_own_pages(checkpoint: Path) -> None:
    """With real requests: no checkpoint, stack, picture, program file or system file is served, and
    nothing to other pages.
    """
    folder = checkpoint.parent
    work = folder / "continual-lora"
    files = [
        work / "exports" / "a.txt",
        work / "copies" / "a" / "b" / "000.png",
        work / "pictures" / "0.png",
        folder / "mini.concepts.safetensors",
    ]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("content")
    with _served(folder) as address:
        assert _status(address, "/") == 200
        root = "/gradio_api" if _status(address, "/gradio_api/info") == 200 else ""
        assert _status(address, f"{root}/file={files[0]}") == 200
        hidden = [
            *map(str, files[1:]),
            str(checkpoint),
            str(ROOT / "pyproject.toml"),
            "pyproject.toml",
            "/etc/passwd",
            f"{files[0]}/../../../log",
        ]
        for path in hidden:
            for prefix in FILE_PREFIXES:
                assert _status(address, f"{prefix}{path}") in (403, 404), prefix + path
        port = address.rpartition(":")[2]
        own = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}
        assert _status(address, "/config", **own) == 200
        body = json.dumps({"data": ["", ""], "fn_index": 1, "session_hash": "x"}).encode()
        routes = ("queue/join", "run/predict", "upload", "call/view")
        foreign_headers = (
            {"Host": f"evil.example:{port}"},
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Sec_Fetch_Site": "cross-site"},
            {"Sec_Fetch_Site": "same-site", "Content_Type": "text/plain"},
        )
        for path in ("/", "/config", *(f"{root}/{route}" for route in routes)):
            for headers in foreign_headers:
                assert _status(address, path, body, **headers) == 403


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_tab_by_itself_in_a_browser(tmp_path: Path) -> None:
    """From an empty folder: example pictures, Learn, the loss, the table; an occupied word is
    refused; what takes away asks first.
    """
    with _served(tmp_path) as address, page(address, height=1800) as opened:
        opened.click("#continual_lora_example")
        opened.wait_for_function(
            "document.querySelector('#continual_lora_noun input, #continual_lora_noun "
            "textarea').value === 'ball'"
        )
        field = "#continual_lora_token input, #continual_lora_token textarea"
        opened.wait_for_function(f"document.querySelector('{field}').value === 'V1'")
        assert opened.is_disabled("#continual_lora_stop")
        opened.fill("#continual_lora_caption_0 textarea", "a photo of V1 in a garden")
        opened.click("text=Method, and settings for experts")
        fill_settings(opened, steps=6, batch=2, rank=4, fisher_samples=4, preview_every=3)
        wait_for_text(opened, "#continual_lora_changed", "steps 6, rank 4, batch 2")
        opened.click("#continual_lora_learn")
        wait_for_text(opened, "#continual_lora_learn", "Add to the queue")
        opened.reload()  # the page comes back as it was
        wait_for_text(opened, "#continual_lora_learn", "Add to the queue", 30_000)
        assert not opened.is_disabled("#continual_lora_stop")
        wait_for_text(opened, "#continual_lora_status", "Learned V1 ball")
        wait_for_text(opened, "#continual_lora_card_0", "6 steps, 5 pictures")
        opened.wait_for_function(f"document.querySelector('{field}').value === 'V2'")
        assert opened.locator("#continual_lora_card_0 img").count() == 2  # photograph and drawing
        stack = stack_path(next(tmp_path.glob("*.safetensors")))
        assert "a photo of V1 in a garden" in str(read_records(stack))
        copies = (tmp_path / "continual-lora" / "copies").rglob("*")
        assert [p for p in copies if p.is_file() and p.name != "lock"] == []
        opened.click("#continual_lora_chip_1")
        for name, value in (("count", 2), ("sampling", 3)):
            opened.fill(f"#continual_lora_{name} input", str(value))
        opened.click("#continual_lora_draw")
        wait_for_text(opened, "#continual_lora_said", "Drawn.")
        opened.wait_for_function(
            "document.querySelectorAll('#continual_lora_gallery img').length >= 2", timeout=30_000
        )
        opened.click("#continual_lora_example")
        opened.wait_for_selector("#continual_lora_caption_0 textarea")
        opened.fill(field, "V1")
        opened.fill("#continual_lora_noun input, #continual_lora_noun textarea", "box")
        opened.click("#continual_lora_learn")
        wait_for_text(opened, "#continual_lora_status", "is already taken")
        opened.screenshot(path=str(tmp_path / "tab.png"), full_page=True)
        asks_first(opened, stack)
        opened.reload()
        wait_for_text(opened, "#continual_lora_card_0", "6 steps, 5 pictures")
        with urllib.request.urlopen(f"{address}/config") as answer:
            assert json.load(answer)["version"] == gradio.__version__


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_ends_it_at_once(checkpoint: Path) -> None:
    """Even while a page is open, which the server would wait for without end."""
    with _serving(checkpoint.parent) as (address, server), page(address) as opened:
        opened.wait_for_selector("#continual_lora_learn")
        server.send_signal(signal.SIGINT)
        assert server.wait(5) == 0


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_strangers_stack_runs_nothing_in_a_browser(checkpoint: Path, pictures: Path) -> None:
    """Its noun is HTML and Markdown that would set a variable of the page's; every view of it is
    opened.
    """
    noun = '<img src=x onerror="window.pwned=1">![](http://127.0.0.1/x)'
    quick = LearnSettings(method="lora", steps=1, batch=1, rank=4, size=64)
    pipeline.learn_concept(LearnRequest(checkpoint, pictures, "V1", noun, quick, device="cpu"))
    with _served(checkpoint.parent) as address, page(address, height=1800) as opened:
        wait_for_text(opened, "#continual_lora_card_0", "<img src=x")
        wait_for_text(opened, "#continual_lora_chip_0", "<img src=x")
        opened.click("text=History of the stack")
        wait_for_text(opened, "#continual_lora_history", "<img src=x")
        for button in ("undo", "forget_0"):
            opened.click(f"#continual_lora_{button}")
            wait_for_text(opened, "#continual_lora_question", "<img src=x")
            opened.click("#continual_lora_no")
        opened.click("#continual_lora_export_0")
        wait_for_text(opened, "#continual_lora_said", "<img src=x")
        opened.click("#continual_lora_undo")
        opened.click("#continual_lora_yes")
        wait_for_text(opened, "#continual_lora_said", "Undone: learned V1 <img src=x")
        assert opened.evaluate("window.pwned") is None
        images = 'img[src=x], img[src="http://127.0.0.1/x"]'
        assert opened.evaluate(f"document.querySelectorAll('{images}').length") == 0


def _wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 180
    while not _answers(address):
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=5).close()
        return True
    except OSError:
        return False
