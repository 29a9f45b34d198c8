"""A snapshot is data: what `write_snapshot` would not write is refused, even with a right checksum."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from comfy_continual_lora.snapshot import (
    DamagedSnapshot,
    Snapshot,
    _checksum,
    identity,
    other_runs,
    read_snapshot,
    write_snapshot,
)

ASKED = {"token": "V1", "noun": "ball", "settings": {"steps": 5, "rate": 0.1}}
TENSORS = {"value.a": torch.ones(2, 3), "state.step.a": torch.tensor(2)}
HEADER = {
    "identity": identity(ASKED),
    "step": "2",
    "losses": "[0.5, 0.25]",
    "asked": json.dumps(ASKED),
}


def _written(path: Path, header: dict[str, str], tensors: dict[str, torch.Tensor]) -> Path:
    path.write_bytes(save(tensors, {**header, "checksum": _checksum(tensors, header)}))
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.snapshot"
    write_snapshot(path, Snapshot(identity(ASKED), 2, [0.5, 0.25], ASKED, TENSORS))
    read = read_snapshot(path)
    assert (read.identity, read.step, read.losses, read.asked) == (
        identity(ASKED),
        2,
        [0.5, 0.25],
        ASKED,
    )
    (note,) = other_runs([path], {**ASKED, "settings": {"steps": 6, "rate": 0.1}})
    assert "`steps` (5, now 6)" in note


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", "-1"),
        ("step", "3"),
        ("step", "9" * 5000),
        ("losses", "[NaN, 1]"),
        ("losses", "[1e999, 1]"),
        ("losses", f"[{10**400}, 1]"),
        ("losses", "{}"),
        ("asked", "[1]"),
        ("asked", '{"settings": [1]}'),
        ("asked", "[" * 50_000),
    ],
)
def test_headers_that_are_none_are_refused(tmp_path: Path, name: str, value: str) -> None:
    path = _written(tmp_path / "x.snapshot", {**HEADER, name: value}, TENSORS)
    with pytest.raises(DamagedSnapshot):
        read_snapshot(path)
    (note,) = other_runs([path], ASKED)
    assert "can't be used" in note
    assert len(note) < 500


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    for bad in (float("nan"), float("-inf")):
        tensors = {**TENSORS, "value.a": torch.full((2, 3), bad)}
        with pytest.raises(DamagedSnapshot, match="infinite or NaN"):
            read_snapshot(_written(tmp_path / "x.snapshot", HEADER, tensors))


_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(asked=_ANY | st.fixed_dictionaries({"settings": _ANY}), losses=_ANY, cut=st.integers(0, 900))
def test_any_content_is_used_or_refused(
    tmp_path_factory: pytest.TempPathFactory, asked: Any, losses: Any, cut: int
) -> None:
    header = {**HEADER, "asked": json.dumps(asked), "losses": json.dumps(losses)}
    path = _written(tmp_path_factory.getbasetemp() / "any.snapshot", header, TENSORS)
    assert len(other_runs([path], ASKED)) <= 1
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DamagedSnapshot):
        read_snapshot(path)
