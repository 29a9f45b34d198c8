"""Going back: undo takes the last change back whatever it was, and nothing that was learned is lost
with it.
"""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_learn import NOUNS, tensors_of
from helpers_store import FINGERPRINT, make_stack, same, writer
from hypothesis import given, settings
from hypothesis import strategies as st

from comfy_continual_lora import (
    consolidation,
    files,
    history,
    pipeline,
    requests,
    stackfile,
    stackschema,
    store,
    versions,
)
from comfy_continual_lora.errors import (
    Cancelled,
    ConceptImagesError,
    ContinualLoraError,
    StackError,
    TokenError,
)
from comfy_continual_lora.operations import OPERATIONS
from comfy_continual_lora.progress import Progress
from comfy_continual_lora.settings import LearnSettings, TrainSettings

QUICK = LearnSettings(
    method="lora",
    steps=2,
    batch=1,
    rank=2,
    size=64,
    fisher_samples=2,
    dsc_steps=2,
    snapshot_every=1,
)


def _learn(
    checkpoint: Path, folders: dict[str, Path], token: str, **rest: object
) -> requests.LearnRequest:
    return requests.LearnRequest(
        checkpoint, folders[token], token, NOUNS[token], QUICK, device="cpu", **rest
    )  # type: ignore[arg-type]


def _tokens(checkpoint: Path) -> list[str]:
    return [record.token for record in store.read_records(store.stack_path(checkpoint))]


@pytest.fixture
def two(learned: Callable[..., Path]) -> Path:
    """A mini-SD that knows V1 and V2."""
    return learned(QUICK, "V1", "V2")


def test_undo_takes_back_every_kind_of_change(
    two: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    path, solving = store.stack_path(two), requests.SolveRequest(two, device="cpu")
    other = tmp_path / "other" / "mini.safetensors"
    other.parent.mkdir()
    shutil.copy(two, other)
    pipeline.learn_concept(_learn(other, folders, "V3"))
    lora = pipeline.export(requests.ExportRequest(other, tmp_path / "theirs")).lora
    assert lora
    consolidating = TrainSettings(batch=1, size=64, dsc_steps=2, fisher_samples=2)
    changes = {
        "forgot V1 ball": lambda: pipeline.forget(requests.ForgetRequest(two, "V1", device="cpu")),
        "forgot V2 fish": lambda: pipeline.forget(requests.ForgetRequest(two, "V2", device="cpu")),
        "consolidated V2 fish": lambda: pipeline.consolidate(
            requests.ConsolidateRequest(two, folders["V2"], consolidating, device="cpu")
        ),
        "consolidated all in closed form (V1 ball, V2 fish)": lambda: (
            pipeline.consolidate_in_closed_form(solving)
        ),
        "merged V3 mug from another stack": lambda: pipeline.merge(
            requests.MergeRequest(two, store.stack_path(other), device="cpu")
        ),
        "imported W1 mug": lambda: pipeline.import_concept(
            requests.ImportRequest(two, lora, "W1", "mug", trigger="sks", device="cpu")
        ),
        "learned V3 mug": lambda: pipeline.learn_concept(_learn(two, folders, "V3")),
    }
    before = store.open_stack(path)
    for description, change in changes.items():
        change()
        changed = store.open_stack(path)
        assert not same(changed, before)
        assert description in versions.undo_preview(path)
        undone = pipeline.undo(requests.UndoRequest(two))
        assert (undone.change, undone.tokens) == (description, ["V1", "V2"])
        assert same(store.open_stack(path), before)
        pipeline.restore(requests.RestoreRequest(two, undone.version))
        assert same(store.open_stack(path), changed)
        pipeline.undo(requests.UndoRequest(two))


def test_undo_goes_back_step_by_step_and_not_to_and_fro(two: Path) -> None:
    pipeline.forget(requests.ForgetRequest(two, "V1", device="cpu"))
    seen = [pipeline.undo(requests.UndoRequest(two)).tokens for _ in range(3)]
    assert seen == [["V1", "V2"], ["V1"], []]
    assert "nothing to undo" in versions.undo_preview(store.stack_path(two))
    with pytest.raises(StackError, match="nothing to undo"):
        pipeline.undo(requests.UndoRequest(two))
    assert [
        (one.number, one.change) for one in pipeline.history(requests.HistoryRequest(two)).versions
    ][1:] == [
        (3, "forgot V1 ball"),
        (2, "learned V2 fish"),
        (1, "learned V1 ball"),
    ]


def test_what_is_confirmed_is_what_is_undone(two: Path) -> None:
    with pytest.raises(StackError, match="at version 2 now"):
        pipeline.undo(requests.UndoRequest(two, version=1))
    assert _tokens(two) == ["V1", "V2"]
    assert pipeline.undo(requests.UndoRequest(two, version=2)).tokens == ["V1"]


@settings(deadline=None)
@given(
    st.integers(0, 4),
    st.lists(st.sampled_from("ssssur"), min_size=1, max_size=12),
    st.randoms(use_true_random=False),
)
def test_any_sequence_of_changes_can_be_gone_back_through(
    tmp_path_factory: pytest.TempPathFactory, keep: int, steps: list[str], rnd: random.Random
) -> None:
    """Against a model: what each number held.

    No more is kept than was said, the parent always is, and numbers are never given twice.
    """
    path = tmp_path_factory.mktemp("history") / "mini.concepts.safetensors"
    held: dict[int, int] = {}
    stack = make_stack(1)
    stack.history = keep
    for step, kind in enumerate(["s", *steps]):
        now = {one.number: one for one in versions.versions(path)}
        if kind == "s":
            stack = make_stack(step % 3 + 1)
            stack.history = keep
            store.save_stack(stack, path)
        elif kind == "u":
            parent = versions.parent_of(path)
            left = history.undo(path)
            if parent:
                assert (left.version, len(store.read_records(path))) == (
                    next(n for n, one in now.items() if one.current),
                    held[parent.number],
                )
            if not store.read_records(path):
                return
        elif kind == "r":
            number = rnd.choice(list(now))
            assert history.restore(path, number).number == number
            assert len(store.read_records(path)) == held[number]
        kept = versions.versions(path)
        current = next(one for one in kept if one.current)
        held[current.number] = len(current.tokens)
        assert len(kept) <= keep + 1
        assert all(len(one.tokens) == held[one.number] for one in kept)
        assert keep == 0 or kind != "s" or not now or versions.parent_of(path) is not None


def test_a_setting_says_how_many_versions_are_kept(two: Path, folders: dict[str, Path]) -> None:
    pipeline.history(requests.HistoryRequest(two, keep=1))
    pipeline.learn_concept(_learn(two, folders, "V3"))
    assert [one.number for one in pipeline.history(requests.HistoryRequest(two)).versions] == [3, 2]
    assert sum(one.size for one in pipeline.history(requests.HistoryRequest(two)).versions) == sum(
        p.stat().st_size for p in (store.stack_path(two), *two.parent.glob("*.history/*"))
    )
    pipeline.history(requests.HistoryRequest(two, keep=0))
    assert [one.number for one in pipeline.history(requests.HistoryRequest(two)).versions] == [3]
    assert not files.history_folder(store.stack_path(two)).exists()
    assert "takes back: learned V3 mug" in versions.undo_preview(store.stack_path(two))
    assert pipeline.undo(requests.UndoRequest(two)).tokens == ["V1", "V2"]
    pipeline.forget(requests.ForgetRequest(two, "V1", device="cpu"))
    with pytest.raises(StackError, match="no longer kept"):
        pipeline.undo(requests.UndoRequest(two))
    assert _tokens(two) == ["V2"]
    with pytest.raises(StackError, match="0 to 1000"):
        pipeline.history(requests.HistoryRequest(two, keep=-1))


def test_what_is_gone_back_to_is_a_change_of_its_file(tmp_path: Path) -> None:
    """Programs that look at time and size run again what they did before."""
    path = tmp_path / "x.concepts.safetensors"
    seen = set()
    for step in ("1", "2", "undo", "restore", "undo"):
        if step == "undo":
            history.undo(path)
        elif step == "restore":
            history.restore(path, 2)
        else:
            stack = make_stack(int(step))
            store.save_stack(stack, path, store.change("learned", stack.records[-1:]))
        stat = path.stat()
        seen.add((stat.st_mtime_ns, stat.st_size))
    assert len(seen) == 5


def test_a_merge_is_undone_without_the_version_before(
    two: Path, checkpoint: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Into a new stack, and into one that keeps no earlier versions."""
    merging = requests.MergeRequest(two, store.stack_path(two), device="cpu")
    fresh = tmp_path / "fresh.concepts.safetensors"
    pipeline.merge(dataclasses.replace(merging, stack=fresh))
    assert versions.undo_preview(fresh).startswith(
        "Undo takes back: merged V1 ball, V2 fish from another stack ("
    )
    assert versions.undo_preview(fresh).endswith("The stack then holds no concept.")
    undone = pipeline.undo(requests.UndoRequest(two, stack=fresh))
    assert undone.tokens == []
    assert store.open_stack(fresh).adapter is None
    pipeline.restore(requests.RestoreRequest(two, undone.version, stack=fresh))
    assert same(store.open_stack(fresh), store.open_stack(store.stack_path(two)))

    pipeline.learn_concept(_learn(checkpoint, folders, "V3"))
    path = store.stack_path(checkpoint)
    was = store.open_stack(path)
    pipeline.history(requests.HistoryRequest(checkpoint, keep=0))
    pipeline.merge(dataclasses.replace(merging, checkpoint=checkpoint))
    assert _tokens(checkpoint) == ["V3", "V1", "V2"]
    assert versions.undo_preview(path).endswith("The stack then holds V3.")
    assert pipeline.undo(requests.UndoRequest(checkpoint)).tokens == ["V3"]
    assert same(store.open_stack(path), was)


def test_a_version_that_can_not_be_removed_fails_no_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows removes no file that another program reads. The change is stored by then, and the next
    one removes the version.
    """
    path = tmp_path / "mini.concepts.safetensors"
    for count in (1, 2, 3):
        store.save_stack(dataclasses.replace(make_stack(count), history=1), path)
    unlink = Path.unlink

    def in_use(self: Path, missing_ok: bool = False) -> None:
        if self.suffix == ".stack":
            raise PermissionError(13, "Permission denied", str(self))
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", in_use)
        store.save_stack(dataclasses.replace(make_stack(4), history=1), path)
        assert [one.number for one in versions.versions(path)] == [4, 3, 2]
        history.keep_versions(path, 2)
        assert history.restore(path, 3).tokens == ["V1", "V2", "V3"]
        assert [one.number for one in versions.versions(path)] == [4, 3, 2]
    history.keep_versions(path, 1)
    assert [one.number for one in versions.versions(path)] == [3, 2]


def test_a_stack_from_elsewhere_takes_nothing_out_of_the_history(tmp_path: Path) -> None:
    """Its numbers are its own: a version here that has the same one stays."""
    path, theirs = tmp_path / "a.concepts.safetensors", tmp_path / "b.concepts.safetensors"
    for count in (1, 2, 3):
        store.save_stack(make_stack(count), path)
    history.undo(path)
    for count in (3, 2, 1):
        store.save_stack(dataclasses.replace(make_stack(count), identity="cd" * 8), theirs)
    shutil.copy(theirs, path)
    assert versions.parent_of(path) is None  # version 2 here is another stack's
    store.save_stack(make_stack(2), path)
    held = sorted(
        len(store.read_records(one.file)) for one in versions.versions(path) if not one.current
    )
    assert held == [1, 1, 3]
    assert history.undo(path).tokens == ["V1"]


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("learned", "12", "123"),
        ("imported", "12", "123"),
        ("merged", "12", "1234"),
        ("replaced", "12", "13"),
        ("forgot", "123", "13"),
        ("consolidated", "12", "12"),
        ("solved", "12", "12"),
        ("renamed", "12", "12"),
    ],
)
def test_undo_goes_to_no_version_of_another_copy(
    tmp_path: Path, kind: str, before: str, after: str
) -> None:
    """A stack is copied, both copies are changed, and one takes the place of the other: their
    versions have the same numbers, and are of the same stack.
    """
    path, copy = tmp_path / "a.concepts.safetensors", tmp_path / "b.concepts.safetensors"

    def save(path: Path, kind: str, numbers: str) -> None:
        whole = make_stack(9)
        stack = dataclasses.replace(
            make_stack(1), records=[whole.records[int(number) - 1] for number in numbers]
        )
        stack.words = {one.id: whole.words[one.id] for one in stack.records}
        store.save_stack(stack, path, store.change(kind, stack.records[-1:]))

    save(path, "learned", "9")
    save(copy, "learned", "9")
    save(path, "learned", "91")
    save(copy, "learned", before)
    save(path, "learned", "914")
    save(copy, kind, after)
    parent = versions.parent_of(copy)
    assert parent
    assert parent.tokens == [f"V{number}" for number in before]
    shutil.copy(copy, path)
    assert [one.number for one in versions.versions(path)] == [3, 2, 1]
    assert versions.parent_of(path) is None


# --- replacing -----------------------------------------------------------------------------------


def test_replacing_is_one_step(two: Path, folders: dict[str, Path]) -> None:
    """A refused input, a cancel and a kill leave the old concept; then the new one takes its place,
    and undo brings the old one back.
    """
    path = store.stack_path(two)
    was = store.open_stack(path)
    new = _learn(two, {**folders, "V2": folders["V3"]}, "V2", replace=True)

    def cancel(progress: Progress) -> None:
        if progress.stage == "learn":
            raise Cancelled("stopped")

    others = {**folders, "V1": folders["V3"], "V2": folders["V3"]}
    with pytest.raises(TokenError, match="taken"):
        pipeline.learn_concept(_learn(two, others, "V2"))
    with pytest.raises(ConceptImagesError):
        pipeline.learn_concept(_learn(two, {"V2": two.parent / "nothing"}, "V2", replace=True))
    with pytest.raises(TokenError, match="V2 was learned after it"):
        pipeline.learn_concept(_learn(two, others, "V1", replace=True))
    assert pipeline.learn_concept(_learn(two, folders, "V1", replace=True)).again
    with pytest.raises(Cancelled):
        pipeline.learn_concept(new, cancel)
    assert same(store.open_stack(path), was)
    pipeline.learn_concept(new)
    now = store.open_stack(path)
    assert _tokens(two) == ["V1", "V2"]
    assert now.records[1].hashes != was.records[1].hashes
    assert same(consolidation.as_of(now, 1), consolidation.as_of(was, 1))
    undone = pipeline.undo(requests.UndoRequest(two))
    assert undone.change == "replaced V2 fish by learning it again"
    assert same(store.open_stack(path), was)


# --- links, modes, names, temporary files ---------------------------------------------------------


def test_a_linked_stack_is_written_through_its_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real" / "x.concepts.safetensors", tmp_path / "x.concepts.safetensors"
    real.parent.mkdir()
    link.symlink_to(real)
    for use in (
        lambda: store.load_stack(link, FINGERPRINT),
        lambda: store.save_stack(make_stack(1), link),
        lambda: versions.versions(link),
    ):
        with pytest.raises(StackError, match=r"link to .*does not exist"):
            use()
    store.save_stack(make_stack(1), real)
    store.save_stack(make_stack(2), link)
    assert link.is_symlink()
    assert same(store.open_stack(real), make_stack(2))
    with (
        store.writing(real),
        pytest.raises(StackError, match="Another program"),
        store.writing(link),
    ):
        pass
    assert history.undo(link).tokens == ["V1"]
    assert same(store.open_stack(real), make_stack(1))
    assert not files.history_folder(link).exists()


def test_a_linked_checkpoint_has_the_stack_of_its_target(checkpoint: Path, tmp_path: Path) -> None:
    link = tmp_path / "models" / "other-name.safetensors"
    link.parent.mkdir()
    link.symlink_to(checkpoint)
    assert store.stack_path(link) == store.stack_path(checkpoint)
    assert store.stack_path(link, "pets") == store.stack_path(checkpoint, "pets")
    own = link.with_name("other-name.concepts.safetensors")
    own.write_bytes(b"")  # as earlier programs left it
    assert store.stack_path(link) == own


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_get_the_mode_the_umask_leaves_or_keep_theirs(tmp_path: Path, umask: int) -> None:
    path, before = tmp_path / "x.concepts.safetensors", os.umask(umask)
    try:
        store.save_stack(make_stack(1), path)
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
        path.chmod(0o664)
        store.save_stack(make_stack(2), path)
        history.undo(path)
        pipeline.export(
            requests.ExportRequest(tmp_path / "x.safetensors", tmp_path / "out", stack=path)
        )
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o664
    assert {
        p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir() if p.suffix != ".lock"
    } == {0o666 & ~umask}


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="two users, so root")
def test_an_error_for_another_user_names_the_permission(tmp_path: Path) -> None:
    path = tmp_path / "x.concepts.safetensors"
    store.save_stack(make_stack(1), path)
    store.save_stack(make_stack(2), path)
    path.chmod(0o600)
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        with pytest.raises(StackError, match="Permission denied") as caught:
            store.open_stack(path)
    finally:
        os.seteuid(0)
    assert "truncated" not in str(caught.value)
    assert "restore" not in str(caught.value)


def test_a_name_too_long_is_refused_before_training(
    mini_file: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    long = tmp_path / f"{'x' * 215}.safetensors"
    shutil.copy(mini_file, long)
    seen: list[Progress] = []
    with pytest.raises(StackError, match=r"bytes long; the file system .* allows 255.*Shorten"):
        pipeline.learn_concept(_learn(long, folders, "V1"), seen.append)
    assert not seen
    assert [p.name for p in tmp_path.iterdir()] == [long.name]


def test_what_killed_writers_left_is_cleaned_up_and_what_living_ones_write_is_not(
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.concepts.safetensors"
    store.save_stack(make_stack(1), path)
    dead, older = tmp_path / f".continual-lora-{'0' * 16}.tmp", tmp_path / f".{path.name}.ab_12xyz"
    others = [
        tmp_path / name
        for name in (
            ".continual-lora-notes.tmp",
            f".{path.name}.mine",
            ".y.concepts.safetensors.ab_12xyz",
        )
    ]
    for file in (dead, older, *others):
        file.write_bytes(b"half")
    with files._temporary(tmp_path) as living, store.writing(path):
        assert Path(living.name).exists()
    assert not dead.exists()
    assert not older.exists()
    assert all(file.exists() for file in others)


def test_readers_see_one_version_while_another_program_writes(tmp_path: Path) -> None:
    """A thousand reads of a stack that is replaced all the time: each is whole, and none fails."""
    path = tmp_path / "x.concepts.safetensors"
    code = (
        "import sys; from pathlib import Path; sys.path[:0] = ['tests']; from helpers_store import "
        "make_stack; from comfy_continual_lora import store\n"
        f"path = Path({str(path)!r}); stacks = [make_stack(n, 300) for n in (1, 2)]\n"
        "store.save_stack(stacks[0], path); print('ready', flush=True)\n"
        "while True: [store.save_stack(s, path) for s in stacks]"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert writer.stdout
    assert writer.stdout.readline() == "ready\n"
    try:
        counts = set()
        for _ in range(1000):
            stack = store.load_stack(path, FINGERPRINT)
            assert same(stack, make_stack(len(stack.records), 300))
            counts.add(len(stack.records))
        assert counts == {1, 2}  # it was replaced meanwhile
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()


def test_versions_are_listed_while_another_program_removes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file is removed or replaced once its header is read, also the version in use."""
    path, checked = tmp_path / "x.concepts.safetensors", stackfile.checked
    stacks = [make_stack(count) for count in (1, 2, 3, 1)]

    def then_removed(file: Path, *rest: Any) -> dict[str, Any]:
        header = checked(file, *rest)
        file.unlink()
        return header

    for stack in stacks:
        store.save_stack(stack, path)
    whole = versions.versions(path)
    monkeypatch.setattr(stackfile, "checked", then_removed)
    assert versions.versions(path) == whole
    monkeypatch.undo()
    assert versions.versions(path) == []

    def then_replaced(file: Path, *rest: Any) -> dict[str, Any]:
        header = checked(file, *rest)
        file.write_bytes(b"shorter")
        return header

    for stack in stacks:
        store.save_stack(stack, path)
    monkeypatch.setattr(stackfile, "checked", then_replaced)
    assert len(versions.versions(path)) == len(stacks)
    monkeypatch.undo()
    assert versions.earlier(path) == []


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_a_stack_that_was_read_is_not_mapped(tmp_path: Path) -> None:
    """On Windows a mapped file can't be replaced."""
    path = tmp_path / "x.concepts.safetensors"
    store.save_stack(make_stack(2, 4000), path)
    stack = store.open_stack(path)
    assert path.name not in Path("/proc/self/maps").read_text()
    assert torch.equal(stack.words["id1"], torch.ones(1, 8))


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_kill_9_at_any_moment_leaves_a_whole_history(tmp_path: Path) -> None:
    """While it saves, undoes and restores: the stack reads, so does every version, and none is
    another's.
    """
    path = tmp_path / "x.concepts.safetensors"
    work = (
        "[store.save_stack(s, path, store.change('learned', s.records[-1:])) for s in stacks]; "
        "history.undo(path); history.restore(path, versions.versions(path)[-1].number)"
    )
    rnd, killed = random.Random(0), 0
    with writer(path, "[make_stack(n, 3000) for n in (1, 2, 3)]", work) as kill_after:
        for _ in range(12):
            kill_after(rnd.uniform(0, 0.3))
            if not path.exists():
                continue
            killed += 1
            with store.writing(path):
                pass
            left = [path, *files.history_folder(path).glob("*")]
            for file in left:
                stack = store.open_stack(file)
                assert same(stack, make_stack(len(stack.records), 3000))
            assert not [p for p in tmp_path.rglob(".*") if p.suffix != ".lock"]
            assert len(left) <= stackschema.HISTORY + 2
    assert killed > 6


def test_errors_of_going_back_leave_everything(two: Path) -> None:
    path = store.stack_path(two)
    before = path.read_bytes()
    with pytest.raises(StackError, match=r"no version 9.*Available: 2, 1"):
        pipeline.restore(requests.RestoreRequest(two, 9))
    broken = files.history_folder(path) / "1.stack"
    broken.write_bytes(broken.read_bytes()[:-8])
    for wrong in (lambda: pipeline.restore(requests.RestoreRequest(two, 1)),):
        with pytest.raises(ContinualLoraError):
            wrong()
    assert path.read_bytes() == before


# --- another word --------------------------------------------------------------------------------


def _rename(path: Path, token: str, to: str) -> Any:
    request = requests.RenameRequest(path.with_name("none"), token, to, stack=path)
    return OPERATIONS["rename"](request)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A stack of V1 and V2, whose captions name both."""
    path = tmp_path / "s.concepts.safetensors"
    stack = make_stack(2)
    for number, prompts in enumerate((["a V1 mug, v1's handle, V10"], ["a V2 mug beside V1"])):
        stack.records[number] = dataclasses.replace(
            stack.records[number], prompts=prompts, request="abc", later={"new": [1]}
        )
    store.save_stack(stack, path, store.change("learned", stack.records[-1:]))
    return path


def test_rename_changes_a_word_and_nothing_else(stored: Path) -> None:
    before = store.open_stack(stored)
    result = _rename(stored, "v1", "Rexo")
    after = store.open_stack(stored)
    assert [record.token for record in after.records] == ["Rexo", "V2"]
    assert [record.prompts for record in after.records] == [
        ["a Rexo mug, Rexo's handle, V10"],
        ["a V2 mug beside Rexo"],
    ]
    assert [record.request for record in after.records] == ["", "abc"]
    assert [record.later for record in after.records] == [{"new": [1]}] * 2
    assert list(after.tokens) == ["Rexo", "V2"]
    assert tensors_of(after).keys() == tensors_of(before).keys()
    assert all(torch.equal(one, tensors_of(after)[key]) for key, one in tensors_of(before).items())
    assert (after.identity, after.fingerprint) == (before.identity, before.fingerprint)
    assert "prompts say Rexo mug" in result.summary()
    newest = versions.in_use(stored)
    assert newest
    assert newest.change == "renamed V1 mug to Rexo mug"
    assert history.undo(stored).tokens == ["V1", "V2"]
    assert same(store.open_stack(stored), before)


@pytest.mark.parametrize(
    ("token", "to", "message"),
    [
        ("V1", "v2", "another concept's word"),
        ("V1", "v1", "the same word"),
        ("V1", "dog", "already knows"),
        ("V1", "a/b", "may contain only"),
        ("V1", "NUL", "Windows"),
        ("V1", "mug", r"already knows|contains mug itself"),
        ("V3", "V4", "no concept 'V3'"),
    ],
)
def test_rename_refuses_what_can_not_be_a_word(
    stored: Path, token: str, to: str, message: str
) -> None:
    before = stored.read_bytes()
    with pytest.raises((TokenError, StackError), match=message):
        _rename(stored, token, to)
    assert stored.read_bytes() == before
    assert not files.history_folder(stored).exists()


def test_rename_tells_of_unfinished_runs_and_exports_follow(stored: Path, tmp_path: Path) -> None:
    run = files.snapshot_path(stored, "V1", "0" * 12, "dsc")
    run.touch()
    out = tmp_path / "out"
    request = requests.ExportRequest(stored, out, stack=stored)
    assert (out / "V1.safetensors") in pipeline.export(request).embeddings
    assert _rename(stored, "V1", "Rexo").unfinished == [run]
    exported = pipeline.export(request)
    assert exported.triggers == ["Rexo mug", "V2 mug"]
    assert (out / "V1.safetensors") in exported.superseded


def test_a_version_is_restored_without_reading_its_tensors_as_numbers(stored: Path) -> None:
    """With another history length, the header is written again and the tensors are copied."""
    _rename(stored, "V1", "Rexo")
    history.keep_versions(stored, 3)
    before = store.open_stack(files.history_folder(stored) / "1.stack")
    restored = history.restore(stored, 1)
    after = store.open_stack(stored)
    assert (restored.number, restored.change) == (1, "learned V2 mug")
    assert after.history == 3
    assert same(after, before)
    assert after.records == before.records
