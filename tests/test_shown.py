"""What is shown of a job and of a stack: in every field, words and files of strangers are shown and
never obeyed.
"""

from __future__ import annotations

import base64
import copy
import html.parser
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from comfy_continual_lora.versions import Version
from comfy_continual_lora.webui import cards, shown
from comfy_continual_lora.webui.job import Job

markdown_it = pytest.importorskip("markdown_it")

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "</td></tr></table><iframe src=//evil.example>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "![x](http://evil.example/p.png)",
    "[click](javascript:alert(1))",
    "<http://evil.example>",
    "https://evil.example/?q=1",
    "`</code><b>`",
    "```\n<b>out</b>\n```\n# big",
    "````\n```\n\n<b>out</b>",
    "~~~\n<b>",
    "**bold** _it_ ~~gone~~",
    "a\n\n# heading\n\n- item\n\n1. item\n\n> quote\n\n---\n\n    code",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "&lt;b&gt; &#60;b&#62; &amp;",
    "\\<b\\> \\`",
    "$\\href{javascript:alert(1)}{x}$",
    "a\rb\x00c\u2028d\u202ee\ud800f\x85g",
    "[x]: http://evil.example\n\n[x]",
    "{{constructor.constructor('alert(1)')()}}",
    "<!-- ",
    "<![CDATA[",
    "<?php",
    "&",
    "\t<b>",
]
PLAIN_TAGS = {"p", "br", "strong", "em", "pre", "code", "table", "tr", "th", "td", "b", "img"}
DONE = {
    "plan": {
        "again": True,
        "device": "cpu",
        "exported": 400_000,
        "peak": 3e9,
        "seconds": [60.0, 180.0],
        "size": 512,
        "stack_file": 700_000,
    },
    "learn": {"token": "V1", "noun": "ball", "again": False},
    "consolidate": {"token": "V1", "losses": [1.0]},
    "closed_form": {"rank": 4, "before": {"V1": 0.5}, "after": {"V1": 0.25}},
    "forget": {"token": "V1", "noun": "ball"},
    "undo": {"change": "learned V1 ball", "tokens": ["V2"], "token": "V1", "noun": "ball"},
    "restore": {"version": 2, "change": "learned V1 ball", "tokens": ["V1"]},
    "scores": {"images": [{"file": "/a/b.png", "best": "V1", "sure": False}]},
    "evaluate": {"table": "V1 ball  50 %"},
    "export": {
        "lora": "/a/b.safetensors",
        "triggers": ["V1 ball"],
        "notes": ["One is still there."],
    },
}


class _Seen(html.parser.HTMLParser):
    """Tags, attributes and text of a piece of HTML."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {f"{name}={value}" for name, value in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.tags.add("comment")

    handle_decl = handle_pi = unknown_decl = handle_comment


def _rendered(text: str) -> _Seen:
    """As a renderer with raw HTML, tables and bare links does, which is the most that any gradio
    does.
    """
    renderer = markdown_it.MarkdownIt("gfm-like" if _linkifies() else "default", {"html": True})
    seen = _Seen(renderer.render(text))
    assert seen.tags <= PLAIN_TAGS, (seen.tags, text)
    return seen


def _linkifies() -> bool:
    try:
        import linkify_it  # noqa: F401
    except ImportError:
        return False
    return True


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [leaf for name, one in value.items() for leaf in _leaves(one, (*path, name))]
    if isinstance(value, list):
        return [leaf for number, one in enumerate(value) for leaf in _leaves(one, (*path, number))]
    return [path] if isinstance(value, str) else []


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_what_was_said(text: str) -> None:
    seen = _rendered(f"**{shown.markdown(text)}** and on")
    assert seen.tags <= {"p", "strong", "br"}
    visible = "".join(seen.text.replace("\N{NO-BREAK SPACE}", " ").split())
    assert visible == "".join("".join(map(shown.visible, text.splitlines())).split()) + "andon"


@pytest.mark.parametrize("text", HOSTILE)
def test_a_block_of_code_is_not_left(text: str) -> None:
    seen = _rendered(f"before\n\n{shown.code(text)}\n\nafter")
    assert seen.tags == {"p", "pre", "code"}


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("path", _leaves(DONE), ids=lambda path: ".".join(map(str, path)))
def test_every_result_is_shown_and_not_obeyed(path: tuple[Any, ...], text: str) -> None:
    job = Job(1, [("learn", {})])
    job.state, job.results = "done", copy.deepcopy(DONE)
    place: Any = job.results
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = text
    expected = {"p", "strong", "em", "pre", "code", "br"}
    assert _rendered(shown.status(job)).tags <= expected


@pytest.mark.parametrize("text", HOSTILE)
def test_messages_and_names_of_a_job(text: str) -> None:
    solved = Job(1, [("closed_form", {})])
    solved.state, solved.results = (
        "done",
        {"closed_form": {"rank": 4, "before": {text: 0.5}, "after": {text: 0.25}}},
    )
    assert _rendered(shown.status(solved)).tags <= {"p", "strong", "br"}
    for state in ("starting", "running", "stopping", "failed", "stopped"):
        job = Job(1, [(text, {})])
        job.state, job.message = (
            state,
            f'Traceback (most recent call last):\n  File "x.py", line 1\n{text}',
        )
        job.notes = [text, "Going on from step 3"]
        job.progress = {"stage": text, "step": 3, "steps": 9, "loss": 0.125, "seconds_left": 61.0}
        assert _rendered(shown.status(job)).tags <= {"p", "strong", "br"}


def _concept(**changes: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    plain = {
        "token": "V1",
        "noun": "ball",
        "with_noun": True,
        "preview": base64.b64encode(buffer.getvalue()).decode(),
        "learned": "2026-11-28T10:00:00",
        "method": "lora",
        "steps": 5,
        "images": 4,
    }
    return {**plain, **changes}


@pytest.mark.parametrize("text", [*HOSTILE, 5, None, ["<b>"], {"<b>": 1}, True])
@pytest.mark.parametrize("field", _concept())
def test_a_card_shows_every_field_and_obeys_none(field: str, text: Any) -> None:
    seen = _Seen(cards.card(_concept(**{field: text}), b"", 0.5))
    assert seen.tags <= {"div", "figure", "b", "img"}
    names = {one.split("=")[0] for one in seen.attributes}
    assert names <= {"class", "alt", "src"}
    assert all(
        one.startswith("src=data:image/jpeg;base64,/9j/")
        for one in seen.attributes
        if one.startswith("src")
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_the_history_shows_every_field_and_obeys_none(text: str) -> None:
    versions = [
        Version(2, 1, text, text, [text, "V1"], "", 1_000_000, True, Path("x")),
        Version(1, None, text, "", [], "", 1, False, Path(text)),
    ]
    seen = _Seen(shown.history(versions))
    assert seen.tags == {"table", "tr", "th", "td"}
    assert {one.split("=")[0] for one in seen.attributes} == {"align"}


@pytest.mark.parametrize(
    ("stage", "resumes"),
    [("", False), ("load", False), ("draw", False), ("evaluate", False), ("learn", True)],
)
def test_only_what_a_stopped_job_can_go_on_with_is_told(stage: str, resumes: bool) -> None:
    job = Job(1, [("learn", {})])
    job.progress = {"stage": stage, "step": 1, "steps": 9} if stage else None
    job.stop()
    told = shown.status(job, str)
    assert told.startswith("**Stopped.**")
    assert ("resumes from here" in told) == resumes


def test_a_preview_is_a_jpeg_or_nothing() -> None:
    assert "<img" in cards.card(_concept(), b"", None)
    for bad in (
        "",
        '"onerror="alert(1)',
        base64.b64encode(b"<svg onload=alert(1)>").decode(),
        "/9j/\n",
        "ÿ",
        "x" * 9,
    ):
        assert "<img" not in cards.card(_concept(preview=bad), b"", None)
        assert shown.picture_of(bad) is None
    assert shown.picture_of(_concept()["preview"]).size == (8, 8)
