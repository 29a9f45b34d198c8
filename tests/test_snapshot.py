"""A snapshot is data: what `write_snapshot` would not write is refused, even with a right checksum."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

from comfy_continual_lora.lossscale import LossScale
from comfy_continual_lora.progress import Progress
from comfy_continual_lora.session import Snapshots
from comfy_continual_lora.settings import LearnSettings
from comfy_continual_lora.snapshot import (
    DamagedSnapshot,
    Snapshot,
    _checksum,
    identity,
    other_runs,
    read_snapshot,
    write_snapshot,
)
from comfy_continual_lora.training import Run

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
        ("identity", "../../a"),
        ("identity", ""),
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


# --- what a run does with the tensors -------------------------------------------------------------


def _trained(path: Path, stop: int = 6) -> tuple[Tensor, list[str]]:
    """A run of six steps on two numbers up to this step: what it learned, and what it said."""
    parameter = nn.Parameter(torch.ones(2))
    run = Run(
        "learn",
        {"a": parameter},
        torch.optim.AdamW([{"params": [parameter], "lr": 0.1}]),
        LearnSettings(steps=6, snapshot_every=1).resolved("mini"),
        6,
        LossScale(),
        path,
        ASKED,
    )
    notes = []

    def on_progress(progress: Progress) -> None:
        notes.append(progress.note)
        if progress.step == stop < 6:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        run.train(lambda _step, _rows: {"loss": parameter.square().mean()}, 1, on_progress)
    return parameter.detach(), list(filter(None, notes))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("scale", torch.ones(1)),
        ("scale", torch.tensor([0.5, 0.0])),
        ("scale", torch.tensor([1e30, 0.0])),
        ("scale", torch.tensor([1.0, -3.0])),
        ("scale", torch.ones(2, dtype=torch.complex64)),
        ("value.a", None),
        ("value.a", torch.ones(2, dtype=torch.int64)),
        ("value.a", torch.ones(2, dtype=torch.complex64)),
        ("value.a", torch.ones(2, 1)),
        ("state.exp_avg.a", None),
        ("state.exp_avg.a", torch.ones(3)),
        ("state.exp_avg_sq.a", torch.tensor([1.0, -1.0])),
        ("state.exp_avg_sq.a", torch.ones(2, dtype=torch.float8_e4m3fn)),
        ("state.step.a", torch.tensor(-1.0)),
        ("state.step.a", torch.tensor(4.0)),
        ("state.step.a", torch.ones(2)),
    ],
)
def test_tensors_that_no_run_wrote_are_not_gone_on_from(
    tmp_path: Path, name: str, tensor: Tensor | None
) -> None:
    path = tmp_path / "x.snapshot"
    _trained(path, stop=3)
    header = dict(HEADER, step="3", losses="[1.0, 1.0, 1.0]")
    tensors = load(path.read_bytes()) | ({} if tensor is None else {name: tensor})
    if tensor is None:
        del tensors[name]
    learned, notes = _trained(_written(path, header, tensors))
    assert "damaged" in notes[0]
    assert torch.equal(learned, _trained(tmp_path / "undisturbed")[0])


def test_a_run_goes_on_from_what_it_wrote(tmp_path: Path) -> None:
    _trained(tmp_path / "x.snapshot", stop=3)
    learned, notes = _trained(tmp_path / "x.snapshot")
    assert notes == ["Resuming from step 3 of 6."]
    assert torch.equal(learned, _trained(tmp_path / "undisturbed")[0])


def test_a_snapshot_that_can_not_be_removed_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows removes no file that another program reads, and the result is stored by then."""
    snapshots = Snapshots(tmp_path / "mini.concepts.safetensors", "V1", {"token": "V1"})
    snapshots.path("dsc").touch()

    def in_use(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", in_use)
        snapshots.remove()
    assert snapshots.path("dsc").exists()
    snapshots.remove()
    assert not snapshots.path("dsc").exists()
