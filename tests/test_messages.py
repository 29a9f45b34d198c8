"""Messages speak the front end's language: names that are marked once, replaced in one place."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest
from helpers_messages import COMMAND_LINE, INSTALLING, marked_names, sentences
from hypothesis import given, settings
from hypothesis import strategies as st

from comfy_continual_lora import cli, errors
from comfy_continual_lora.cliflags import names_in
from comfy_continual_lora.cliprogress import Bar
from comfy_continual_lora.errors import ContinualLoraError, SettingError, spelled
from comfy_continual_lora.operations import NAMES, OPERATIONS
from comfy_continual_lora.progress import Progress, ignore
from comfy_continual_lora.webui.job import Job
from comfy_continual_lora.webui.labels import LABELS, in_labels
from comfy_continual_lora.webui.shown import status
from comfy_continual_lora.worker import run_job

KINDS = [ContinualLoraError, *ContinualLoraError.__subclasses__()]


def test_only_known_names_are_marked() -> None:
    assert {"rate", "stack", "forget", "token"} < marked_names() <= NAMES


def test_every_front_end_has_its_word_for_every_name() -> None:
    for command in OPERATIONS:
        assert names_in(command).keys() == NAMES
    assert LABELS.keys() == NAMES


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (None, "Lower rate, use another stack, or take it off (undo)."),
        (
            names_in("learn"),
            "Lower --lr, use another --stack, or take it off (continual-lora undo).",
        ),
        (LABELS, "Lower rate, use another Stack, or take it off (Undo the last change)."),
    ],
    ids=["plain", "command line", "tab"],
)
def test_the_same_message_in_each_language(names: dict[str, str] | None, text: str) -> None:
    assert spelled("Lower `rate`, use another `stack`, or take it off (`undo`).", names) == text


def test_one_commands_flags_are_in_its_own_messages() -> None:
    assert spelled("`images` `other` `closed_form`", names_in("evaluate")) == (
        "--concepts --other continual-lora consolidate --closed-form"
    )
    assert spelled("`images` `other`", names_in("merge")) == "--images other"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.text() | st.sampled_from(sorted(NAMES)) | st.just("`x`"), max_size=5))
def test_what_is_no_known_name_stays_as_it_is(parts: list[str]) -> None:
    """Names of files and words of users come through, in backquotes or not."""
    text = " ".join(part.replace("`", "") if part != "`x`" else part for part in parts)
    assert spelled(text, LABELS) == text
    assert spelled(f"{text} `rate`", {"rate": r"\1 --lr"}) == rf"{text} \1 --lr"


def test_only_the_command_line_speaks_of_commands_and_flags() -> None:
    said = []
    for module, text in sentences(*COMMAND_LINE, *INSTALLING):
        if re.search(r"pip install|(?<!comfy-)continual-lora [a-z{]|Try:|(?<![\w-])--[a-z]", text):
            said.append(f"{module}: {text}")
    assert not said


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(text=st.text())
def test_an_error_survives_a_pickle_and_hosts_show_a_short_type(kind: type, text: str) -> None:
    """ComfyUI shows "<module>.<class>" before the message; in it our module is a path."""
    assert f"{kind.__module__}.{kind.__qualname__}" == f"continual_lora.{kind.__name__}"
    for error in (kind(text), kind(f"`rate` {text}"), kind()):
        for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert (type(again), again.args, str(again)) == (kind, error.args, str(error))
            assert again.marked == error.marked


def test_every_kind_of_error_is_in_the_tree() -> None:
    assert errors.__doc__
    assert set(re.findall(r"\w+Error", errors.__doc__)) == {kind.__name__ for kind in KINDS}


def test_the_same_mistake_in_each_front_end(
    checkpoint: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["learn", "--checkpoint", checkpoint, "--images", pictures, "--token", "V1"]
    assert cli.main([*map(str, words), "--noun", " "]) == 2
    assert "--noun is empty. Say in one or two words" in capsys.readouterr().err
    request = {"checkpoint": str(checkpoint), "images": str(pictures), "token": "V1", "noun": " "}
    with pytest.raises(SettingError) as refused:
        run_job("learn", request, ignore)
    job = Job(1, [("learn", request)])
    job._end("failed", str(refused.value), refused.value.marked)
    assert "Class noun is empty." in status(job, str)
    assert "noun is empty." in status(job, str, None)
    assert in_labels(refused.value).startswith("Class noun is empty.")


def test_notes_are_in_each_front_ends_language_too(capsys: pytest.CaptureFixture[str]) -> None:
    note = Progress("load", 0, 1, note="It differs in `rate` (1, now 2).")
    bar = Bar(names_in("learn"))
    bar(note)
    bar.close()
    assert "It differs in --lr (1, now 2)." in capsys.readouterr().err
    job = Job(1, [("learn", {})])
    job.notes = [note.note]
    assert "It differs in rate (1, now 2)." in status(job, str)
    job.notes = ["Another `stack`"]
    assert status(job, str).endswith("Another Stack")
    assert status(job, str, None).endswith("Another stack")
