"""Stage 6: what is stored comes back, and nothing that goes wrong harms what was stored."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_store import FINGERPRINT, make_record, make_stack, same, writer
from safetensors.torch import save_file

from comfy_continual_lora import consolidation, history, store
from comfy_continual_lora.adapters.packed import pack
from comfy_continual_lora.errors import StackError


def test_round_trip_and_undo(tmp_path: Path) -> None:
    path = tmp_path / "x.concepts.safetensors"
    stack = make_stack(3)
    store.save_stack(stack, path)
    assert same(store.load_stack(path, FINGERPRINT), stack)
    for left in (2, 1, 0):
        stack = consolidation.undone(stack)
        assert same(stack, make_stack(left)) or left == 0
    with pytest.raises(StackError, match="stack is empty"):
        stack = consolidation.undone(stack)


def test_a_concept_without_adapter_can_lie_under_one_with(tmp_path: Path) -> None:
    stack = store.ConceptStack(FINGERPRINT)
    stack = stack.learned(make_record(1), torch.ones(1, 8), None)
    stack = stack.learned(
        make_record(2), torch.ones(1, 8), {"l.A": torch.ones(2, 2), "l.B": torch.ones(2, 2)}
    )
    store.save_stack(stack, tmp_path / "s")
    loaded = store.load_stack(tmp_path / "s", FINGERPRINT)
    loaded = consolidation.undone(loaded)
    assert loaded.adapter is None


def test_words_of_old_stacks_have_one_vector(tmp_path: Path) -> None:
    stack = make_stack(2)
    words, stack.words = stack.words, {concept: word[0] for concept, word in stack.words.items()}
    store.save_stack(stack, tmp_path / "s")
    assert {
        concept: word.tolist()
        for concept, word in store.load_stack(tmp_path / "s", FINGERPRINT).words.items()
    } == {concept: word.tolist() for concept, word in words.items()}


def test_the_header_reads_without_tensors(tmp_path: Path) -> None:
    store.save_stack(make_stack(2), tmp_path / "s")
    assert [c["token"] for c in store.read_header(tmp_path / "s")["concepts"]] == ["V1", "V2"]


def test_stack_files_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store.save_stack(make_stack(1), path)
    store.save_stack(make_stack(2), path)
    with pytest.raises(StackError, match="made for another checkpoint"):
        store.load_stack(path, "0" * 64)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        StackError, match=r"truncated.*s\.history/1\.stack: go back to it \(restore\)"
    ):
        store.load_stack(path, FINGERPRINT)
    assert same(store.load_stack(tmp_path / "s.history" / "1.stack", FINGERPRINT), make_stack(1))
    history.restore(path, 1)
    assert same(store.load_stack(path, FINGERPRINT), make_stack(1))
    assert (tmp_path / "s.damaged").read_bytes() == whole[: len(whole) // 2]
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(StackError, match="not a concept stack"):
        store.load_stack(path, FINGERPRINT)
    newer = json.dumps({"version": store.VERSION + 1})
    save_file({"a": torch.zeros(1)}, path, {"format": store.FORMAT, "stack": newer})
    with pytest.raises(StackError, match=rf"format version {store.VERSION + 1}.*Update"):
        store.load_stack(path, FINGERPRINT)


@pytest.mark.slow
def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "s"
    other = (
        "import sys; from pathlib import Path; from comfy_continual_lora import store\n"
        f"with store.writing(Path({str(path)!r})): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", other],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(StackError, match="Another program"), store.writing(path):
        pass
    holder.communicate("")
    with store.writing(path):
        pass


@pytest.mark.skipif(os.name != "posix", reason="users and permissions of POSIX")
def test_a_read_only_folder(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store.save_stack(make_stack(1), path)
    tmp_path.chmod(0o555)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        with pytest.raises(StackError, match=r"can't be (accessed|written)"), store.writing(path):
            pass
    finally:
        if root:
            os.seteuid(0)
        tmp_path.chmod(0o755)


@pytest.mark.skipif(os.name != "posix", reason="file size limits of POSIX")
def test_a_full_disk_keeps_the_old_version(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store.save_stack(make_stack(1), path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(StackError, match="untouched"):
            store.save_stack(make_stack(2, size=4000), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".s.*"))


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_kill_9_while_saving_leaves_a_whole_version(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store.save_stack(make_stack(1, 20000), path)
    stacks, work = (
        "[make_stack(n, 20000) for n in (1, 2)]",
        "[store.save_stack(s, path) for s in stacks]",
    )
    with writer(path, stacks, work) as kill_after:
        for delay in (0.0, 0.03, 0.07, 0.11):
            kill_after(delay)
            loaded = store.load_stack(path, FINGERPRINT)
            assert same(loaded, make_stack(len(loaded.records), 20000))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("words", r"the word V2 has .*in word\.id2"),
        ("adapter", r"the adapter has .*in adapter\.layer\.to_k\.A"),
        ("unconsolidated", "the adapter before it was consolidated has"),
        ("pool", "the adapter after V1 has"),
        ("targets", "the target of V2 has"),
        ("fishers", "the Fisher of V2 has"),
        ("loss", r"the loss of V2 has"),
        ("tau", "the temperature of the DC scores has"),
    ],
)
def test_what_is_not_finite_is_never_stored(
    tmp_path: Path, part: str, message: str, value: float
) -> None:
    path = tmp_path / "s"
    store.save_stack(make_stack(1), path)
    before = path.read_bytes()
    stack = make_stack(2)
    bad = {"layer.to_k.A": torch.full((2, 4), value, dtype=torch.float64)}
    changes = {
        "words": {**stack.words, "id2": bad["layer.to_k.A"]},
        "adapter": {**(stack.adapter or {}), **bad},
        "pool": {"id1": bad},
        "targets": {"id2": pack({**(stack.adapter or {}), **bad})},
        "loss": [stack.records[0], replace(stack.records[1], loss=value)],
        "tau": value,
    }
    name = {"loss": "records"}.get(part, part)
    of_second = bad if part == "unconsolidated" else {"id2": bad}
    with pytest.raises(StackError, match=f"Nothing was stored, because {message}.*s is unchanged"):
        store.save_stack(replace(stack, **{name: changes.get(part, of_second)}), path)
    assert path.read_bytes() == before
    assert not (tmp_path / "s.history").exists()
