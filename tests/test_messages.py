"""Messages speak the front end's language: names that are marked once, replaced in one place."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
from helpers_messages import COMMAND_LINE, INSTALLING, marked_names, sentences
from hypothesis import given, settings
from hypothesis import strategies as st

from comfy_continual_lora import errors
from comfy_continual_lora.cliflags import names_in
from comfy_continual_lora.errors import ContinualLoraError, spelled
from comfy_continual_lora.operations import NAMES, OPERATIONS
from comfy_continual_lora.webui.labels import LABELS

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
