"""Requests are data, whoever makes them: what is no request is refused by name, in one place."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comfy_continual_lora import upkeep
from comfy_continual_lora.errors import SettingError, StackError, excerpt
from comfy_continual_lora.fields import check_names
from comfy_continual_lora.operations import OPERATIONS
from comfy_continual_lora.requests import (
    DrawRequest,
    ForgetRequest,
    ImportRequest,
    LearnRequest,
    RestoreRequest,
    parse,
)
from comfy_continual_lora.settings import LearnSettings

COMPLETE: dict[str, Any] = {
    "checkpoint": "a.safetensors",
    "images": ["a.png"],
    "token": "V1",
    "noun": "ball",
    "other": "b",
    "lora": "c",
    "prompts": ["a ball"],
    "out": "d",
    "version": 1,
    "settings": {"steps": 5, "rate": 0.1, "method": "lora", "flip": True, "rank": 4},
}
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["\0", "\ud800", "x" * 5000, 10**400, -(10**30), 1e308, "1", "yes", ""])
)
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@pytest.mark.parametrize("name", OPERATIONS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_json_is_a_valid_request_or_refused(name: str, data: st.DataObject) -> None:
    kind = OPERATIONS[name].request
    known = {field: COMPLETE[field] for field in kind.__dataclass_fields__ if field in COMPLETE}
    own = kind.__dataclass_fields__.get("settings")
    if own is not None:
        names = own.default.__dataclass_fields__
        known["settings"] = {k: v for k, v in COMPLETE["settings"].items() if k in names}
        field = data.draw(st.sampled_from(list(names)))
        if data.draw(st.booleans()):
            known["settings"] = {**known["settings"], field: data.draw(VALUES)}
    body = {
        **known,
        **data.draw(st.dictionaries(st.sampled_from([*known, "x"]), VALUES, max_size=2)),
    }
    message = ""
    try:
        parse(kind, body).check()
    except SettingError as error:
        message = str(error)
    else:
        json.dumps(body, allow_nan=False)  # every number is finite
    assert len(message) < 3000


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (ForgetRequest, {"token": "V\0"}, "`token` is 'V\\x00', which is not valid text"),
        (LearnRequest, {"noun": "\ud800"}, "`noun` is '\\ud800', which is not valid text"),
        (LearnRequest, {"noun": True}, "`noun` is True; it has to be text"),
        (LearnRequest, {"images": [1]}, "`images` contains 1; all of it has to be strings"),
        (DrawRequest, {"prompts": ["a", ["b", 3]]}, "`prompts` contains 3"),
        (DrawRequest, {"prompts": ["a\0"]}, "not valid text"),
        (DrawRequest, {"settings": {"seed": "3"}}, "`seed` is '3'; it has to be a whole number"),
        (DrawRequest, {"settings": {"seed": 3.0}}, "`seed` is 3.0"),
        (DrawRequest, {"settings": {"mixed": 1}}, "`mixed` is 1; it has to be true or false"),
        (LearnRequest, {"settings": {"clip": 10**400}}, "that number is too large"),
        (RestoreRequest, {"version": 10**30}, "that number is too large"),
        (LearnRequest, {"setting": {}}, "no field 'setting'. Did you mean `settings`?"),
        (LearnRequest, {"settings": {"step": 5}}, "no setting 'step'. Did you mean `steps`?"),
        (ImportRequest, {"strength": float("nan")}, "`strength` is nan"),
    ],
)
def test_what_is_wrong_is_named(kind: type, change: dict[str, Any], message: str) -> None:
    body = {field: COMPLETE[field] for field in kind.__dataclass_fields__ if field in COMPLETE}
    body.pop("settings", None)
    with pytest.raises(SettingError) as error:
        parse(kind, {**body, **change})
    assert message in error.value.args[0]


def test_front_ends_that_make_requests_themselves_are_checked_too() -> None:
    place = Path("a.safetensors")
    for request in (
        ImportRequest(place, Path("b"), "V1", strength=float("inf")),
        DrawRequest(place, ["a \udcff"]),
        LearnRequest(place, Path("c"), "V1", 5),  # type: ignore[arg-type]
        LearnRequest(place, Path("c"), "V1", "x", LearnSettings(rate="1")),  # type: ignore[arg-type]
    ):
        with pytest.raises(SettingError):
            request.check()
    DrawRequest(place, [("a", "b")], out=Path("d")).check()
    LearnRequest(place, [Path("c")], "V1", "x").check()


@pytest.mark.parametrize("given", [".", "..", "inner/..", "../here", os.sep])
@pytest.mark.parametrize(
    "name", ["info", "history", "undo", "restore", "rename", "forget", "export"]
)
def test_a_stack_that_is_a_folder_is_refused_however_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, name: str
) -> None:
    here = tmp_path / "here"
    (here / "inner").mkdir(parents=True)
    monkeypatch.chdir(here)
    kind = OPERATIONS[name].request
    more = {"token": "V1", "to": "V2", "version": 1, "out": "out"}
    body = {field: more[field] for field in kind.__dataclass_fields__ if field in more}
    request = parse(kind, {"checkpoint": "a.safetensors", "stack": given, **body})
    with pytest.raises(StackError):
        OPERATIONS[name](request)
    assert not Path("out").exists()


@pytest.fixture
def hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that the user who runs the test may not enter, with links to it beside it."""
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("two users, so root")
    folder = tmp_path / "hidden"
    folder.mkdir()
    for name in ("a.safetensors", "a.concepts.safetensors"):
        (folder / name).touch()
        (tmp_path / name).symlink_to(folder / name)
    folder.chmod(0o700)
    for outer in (tmp_path, *tmp_path.parents[:3]):
        outer.chmod(outer.stat().st_mode | 0o055)
    monkeypatch.chdir(tmp_path)
    os.seteuid(65534)
    try:
        yield folder
    finally:
        os.seteuid(0)


def test_a_path_without_access_is_named_by_every_request(hidden: Path) -> None:
    given = {**COMPLETE, "checkpoint": "sd.safetensors", "images": "pictures", "to": "V2"}
    for operation in OPERATIONS.values():
        fields = operation.request.__dataclass_fields__
        body = {name: value for name, value in given.items() if name in fields}
        body.pop("settings", None)
        parse(operation.request, body)
        for name, field in fields.items():
            if "Path" not in str(field.type):
                continue
            for path in (hidden / "a.safetensors", hidden / "new", hidden.parent / "a.safetensors"):
                with pytest.raises(SettingError, match=rf"^{name} is {path}, which can't be acc"):
                    parse(operation.request, {**body, name: str(path)})
            if "list" in str(field.type):
                with pytest.raises(SettingError, match=rf"^{name} is {hidden}.b.png, which"):
                    parse(operation.request, {**body, name: ["a.png", str(hidden / "b.png")]})


def test_a_folder_is_listed_as_far_as_there_is_access(hidden: Path) -> None:
    (row,) = upkeep.stacks_in(hidden.parent).rows
    assert row.checkpoint == hidden.parent / "a.safetensors"
    assert "can't be accessed (Permission denied)" in row.problem
    for folder in (hidden, hidden / "inner"):
        with pytest.raises(SettingError, match=r"can't be read \(Permission denied\)"):
            upkeep.stacks_in(folder)


def test_an_excerpt_of_anything_is_short() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, "x" * 10**6, 10**4000, [1] * 10**6, {str(n): n for n in range(10**5)}):
        assert len(excerpt(value)) < 200


def test_a_name_that_resembles_none_lists_them() -> None:
    with pytest.raises(SettingError, match=r"no field 'q'\. There are: a, b\."):
        check_names("field", ["a", "q"], ("a", "b"))
