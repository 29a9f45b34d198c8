"""Windows, emulated: no file is replaced, renamed or removed while this program has it open or mapped,
and names and paths are ones that Windows takes.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers_learn import NOUNS, QUICK
from helpers_store import FINGERPRINT, make_stack, same
from helpers_windows import NEEDS_PROC, Windows, as_on_windows, in_use
from safetensors.torch import load_file, save_file

from comfy_continual_lora import export, files, pipeline, requests, store
from comfy_continual_lora.errors import StackError
from comfy_continual_lora.progress import Progress
from comfy_continual_lora.settings import DrawSettings, EvaluateSettings, TrainSettings


@pytest.fixture
def windows() -> Iterator[Windows]:
    """Nothing that is left to the garbage collector is closed meanwhile."""
    gc.disable()
    try:
        with as_on_windows() as system:
            yield system
            assert not system.refused
    finally:
        gc.enable()


# --- files that are in use ------------------------------------------------------------------------


@NEEDS_PROC
def test_what_is_mapped_or_open_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(5000)}, path)
    with as_on_windows() as system:
        tensors = load_file(path)
        with pytest.raises(PermissionError):
            path.unlink()
        with pytest.raises(PermissionError):
            files.write_whole(path, b"")
        assert in_use(path) == "mapped"
        del tensors
        with path.open("rb"), pytest.raises(PermissionError):
            path.replace(tmp_path / "b")
        path.rename(tmp_path / "b")
        path.touch()
        with pytest.raises(FileExistsError):
            path.rename(tmp_path / "b")
    assert [line.rpartition(" ")[2] for line in system.refused[-2:]] == ["open", "exists"]


@NEEDS_PROC
def test_a_stack_lives_without_touching_files_in_use(
    windows: Windows, checkpoint: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    settings = replace(QUICK, method="retention", steps=4, snapshot_every=1)
    stack = store.stack_path(checkpoint)

    def learn(token: str, stop: int = 0, path: Path | None = None) -> None:
        def report(progress: Progress) -> None:
            if progress.stage == "learn" and progress.step == stop:
                raise KeyboardInterrupt

        images, noun = folders[token], NOUNS[token]
        request = requests.LearnRequest(
            checkpoint, images, token, noun, settings, stack=path, device="cpu"
        )
        pipeline.learn_concept(request, report)

    def exported(out: str, **rest: str | bool) -> Path:
        done = pipeline.export(requests.ExportRequest(checkpoint, tmp_path / out, **rest))
        assert done.lora
        return done.lora

    learn("V1")
    with pytest.raises(KeyboardInterrupt):
        learn("V2", stop=2)
    learn("V2")
    first = exported("loras")
    pipeline.undo(requests.UndoRequest(checkpoint))
    pipeline.restore(requests.RestoreRequest(checkpoint, 2))
    pipeline.rename(requests.RenameRequest(checkpoint, "V2", "Rexo"))
    second = exported("loras", remove_superseded=True)
    assert second != first
    assert not first.exists()
    assert exported("loras") == second
    exported("peft", format="peft")
    pipeline.consolidate(
        requests.ConsolidateRequest(
            checkpoint, folders["V2"], TrainSettings(dsc_steps=2, size=64), device="cpu"
        )
    )
    exported("peft", format="peft", remove_superseded=True)
    pipeline.consolidate_in_closed_form(requests.SolveRequest(checkpoint))
    learn("V3", path=tmp_path / "other.concepts.safetensors")
    pipeline.merge(requests.MergeRequest(checkpoint, tmp_path / "other.concepts.safetensors"))
    lora = exported("other")
    pipeline.import_concept(
        requests.ImportRequest(
            checkpoint, lora, "Kado", "cup", embedding=lora.with_name("V1.safetensors")
        )
    )
    lora.unlink()
    lora.with_name("V1.safetensors").unlink()
    draw = DrawSettings(steps=1, size=64)
    request = requests.DrawRequest(checkpoint, ["a V1 ball"], draw, out=tmp_path / "drawn")
    pipeline.draw(request)
    pipeline.draw(request)
    pipeline.evaluate(
        requests.EvaluateRequest(checkpoint, settings=EvaluateSettings(1, 1, trials=1, size=64))
    )
    pipeline.forget(requests.ForgetRequest(checkpoint, "V1"))
    stack.write_bytes(stack.read_bytes()[:-8])
    restored = pipeline.restore(requests.RestoreRequest(checkpoint, 6))
    assert restored.version.number == 6
    pipeline.history(requests.HistoryRequest(checkpoint, 0))
    assert not files.history_folder(stack).exists()
    assert any(line.startswith("replace") and line.endswith(".snapshot") for line in windows.done)
    assert any(line.startswith("replace") and line.endswith(stack.name) for line in windows.done)


# --- names and paths ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["con.concepts.safetensors", "a.safetensors.", "a.safetensors "])
def test_a_stack_gets_no_name_that_windows_changes(tmp_path: Path, name: str) -> None:
    files.check_names(tmp_path / name)
    with as_on_windows(), pytest.raises(StackError, match="can't be used on Windows"):
        files.check_names(tmp_path / name)


def test_a_path_that_is_too_long_is_refused_before_the_work(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120) / ("y" * 120)
    stack, short = folder / "mini.concepts.safetensors", tmp_path / "mini.concepts.safetensors"
    files.check_names(stack)
    with as_on_windows():
        files.check_names(short)
        with pytest.raises(StackError, match=r"characters; Windows takes 259.*LongPathsEnabled"):
            files.check_names(stack)
        with pytest.raises(StackError, match="Windows takes 259"), store.writing(stack):
            pass
        store.save_stack(make_stack(1), short)
        with pytest.raises(StackError, match="Windows takes 259"):
            pipeline.export(requests.ExportRequest(tmp_path / "x", folder, stack=short))
        with mock.patch.object(files, "_takes_long_paths", return_value=True):
            files.check_names(stack)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("stem", "start"),
    [
        ('a"b\\c\td', "a-b-c-d-V1-"),
        ("con.", "_con.-V1-"),
        ("NUL.x", "_NUL.x-V1-"),
        ("console", "console-V1-"),
    ],
)
def test_exports_have_names_that_every_system_takes(stem: str, start: str) -> None:
    name = export.lora_name(stem, ["V1"], "1a2b3c4d5e")
    assert name == f"{start}1a2b3c4d"
    assert not files.is_reserved(f"{name}.safetensors")


def test_a_reserved_word_of_an_old_stack_is_not_exported(tmp_path: Path) -> None:
    stack = make_stack(1)
    stack = replace(stack, records=[replace(stack.records[0], token="NUL")])
    with pytest.raises(StackError, match=r"'NUL' can't be a file name.*another word"):
        export.export_files(stack, tmp_path, tmp_path, "mini")


def test_words_that_differ_in_case_do_not_share_a_file(tmp_path: Path) -> None:
    """V1 was forgotten, and v1 learned: its export is not written over the other's."""
    store.save_stack(stack := make_stack(1), tmp_path / "mini.concepts.safetensors")
    stack = replace(stack, adapter=None)
    export.export_files(stack, tmp_path, tmp_path, "mini")
    before = (tmp_path / "V1.safetensors").read_bytes()
    other = replace(stack, records=[replace(stack.records[0], token="v1")])
    done = export.export_files(other, tmp_path, tmp_path, "mini")
    assert [path.name for path in done.embeddings] == ["v1-2.safetensors"]
    assert (tmp_path / "V1.safetensors").read_bytes() == before


# --- without fcntl --------------------------------------------------------------------------------


def test_without_locks_what_was_just_begun_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "x.concepts.safetensors"
    running, dead = (tmp_path / f".continual-lora-{digit * 16}.tmp" for digit in "01")
    running.touch()
    dead.touch()
    os.utime(dead, times=(time.time() - 7200,) * 2)
    with as_on_windows(), store.writing(path):
        store.save_stack(make_stack(2), path)
        with pytest.raises(StackError, match="Another program"), store.writing(path):
            pass
    assert running.exists()
    assert not dead.exists()
    assert same(store.open_stack(path), make_stack(2))


@NEEDS_PROC
def test_a_file_that_is_read_for_a_moment_is_replaced_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "x.concepts.safetensors"
    store.save_stack(make_stack(1), path)
    waits: list[float] = []
    with as_on_windows() as system, path.open("rb") as reader:

        def wait(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 2:
                reader.close()

        with mock.patch.object(time, "sleep", wait):
            store.save_stack(make_stack(2), path)
    assert len(waits) == len(system.refused) == 2
    assert same(store.load_stack(path, FINGERPRINT), make_stack(2))


@NEEDS_PROC
def test_a_file_that_stays_in_use_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.concepts.safetensors"
    store.save_stack(make_stack(1), path)
    with as_on_windows(), path.open("rb"), pytest.raises(StackError, match="can't be written"):
        store.save_stack(make_stack(2), path)
    assert same(store.load_stack(path, FINGERPRINT), make_stack(1))
    assert not list(tmp_path.glob(".continual-lora-*.tmp"))
