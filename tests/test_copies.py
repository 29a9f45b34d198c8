"""Copies of training pictures: written when a job starts, gone when it is over; compared by what
lies on the disk.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers_learn import QUICK
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from comfy_continual_lora import worker
from comfy_continual_lora.errors import ConceptImagesError
from comfy_continual_lora.files import snapshots_of
from comfy_continual_lora.inventory import inventory
from comfy_continual_lora.listing import checkpoints_in
from comfy_continual_lora.webui.copies import Copies, Sent, file_name

ROOT = Path(__file__).parents[1]


def _picture(kind: str = "PNG", color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, kind)
    return buffer.getvalue()


def _left(folder: Path) -> list[str]:
    """What is there but locks and empty folders."""
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.name != "lock")


def _written(copies: Copies, stack: Path, token: str = "V1") -> list[Path]:
    batch = copies.batch([Sent("a.png", _picture(), "a red one")], stack, token)
    copies.write(batch)
    return [Path(path) for path in batch.paths]


def test_the_same_pictures_are_the_same_copies(tmp_path: Path) -> None:
    copies = Copies(tmp_path)
    pictures = [Sent("a.png", _picture(), "a red one"), Sent("b.jpg", _picture("JPEG"))]
    first = copies.batch(pictures, "s", "V1")
    assert not list(tmp_path.iterdir())
    assert copies.batch(pictures, "s", "V1").paths == first.paths
    others = [
        copies.batch(pictures[:1], "s", "V1"),
        copies.batch([Sent("a.png", _picture()), pictures[1]], "s", "V1"),
        copies.batch([pictures[0], Sent("b.jpg", _picture("JPEG"), mask=_picture())], "s", "V1"),
        copies.batch(pictures, "t", "V1"),
        copies.batch(pictures, "s", "V2"),
    ]
    assert len({other.folder for other in (first, *others)}) == 6
    copies.write(first)
    paths = [Path(path) for path in first.paths]
    assert [p.read_bytes() for p in paths] == [one.data for one in pictures]
    assert [p.name for p in paths] == ["a.png", "b.jpg"]
    assert inventory(paths).summary() == "2 pictures, 1 caption (.txt)"


def test_captions_and_masks_lie_beside_their_copies(tmp_path: Path) -> None:
    names = ("a.png", "a.jpg", "a_mask.png", "../x/../CON.png", "\ud800\0" * 200, "")
    sent = [Sent(name, _picture(), f"of {name[:5]!a}", _picture("JPEG")) for name in names]
    copies = Copies(tmp_path)
    batch = copies.batch(sent, "s")
    copies.write(batch)
    found = inventory(batch.paths)
    assert found.summary() == "6 pictures, 6 captions (.txt), 6 masks"
    assert {file.parent.parent for file in found.files} == {batch.folder}
    assert [picture.name for picture in found.pictures[:3]] == [*names[:3]]
    assert [picture.caption for picture in found.pictures[:2]] == ["of 'a.png'", "of 'a.jpg'"]
    mask = _picture()[:50]
    with pytest.raises(ConceptImagesError, match=r"The mask of a\.png can't be read"):
        copies.batch([Sent("a.png", _picture(), mask=mask)], "s")
    for caption in ("\ud800", "\0", "x" * 100_000):  # typed: nothing about files
        with pytest.raises(ConceptImagesError, match=r"The caption of a\.png (contains|is long)"):
            copies.batch([Sent("a.png", _picture(), caption)], "s")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no picture",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        _picture("PCX"),
        _picture()[:30],
    ],
)
def test_what_is_no_picture_is_refused_before_anything_is_written(
    tmp_path: Path, data: bytes
) -> None:
    with pytest.raises(ConceptImagesError, match=r"^a\.png can't be read as an image"):
        Copies(tmp_path).batch([Sent("b.png", _picture()), Sent("a.png", data)], "s")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "copy"),
    [
        ("IMG (1), é.JPG", "IMG (1), é.JPG"),
        ("picture 3", "picture 3"),
        ("Screenshot at 10.00.00\u202fAM.png", "Screenshot at 10.00.00 AM.png"),
        (".hidden.png", "hidden.png"),
        ("con.png", "_con.png"),
        ("a/b\\c:d\n.png", "a_b_c_d .png"),
        ("x" * 100 + ".jpeg", "x" * 60 + ".jpeg"),
    ],
)
def test_a_copy_has_the_name_that_its_user_knows(name: str, copy: str) -> None:
    assert file_name(name) == copy


def test_what_is_said_of_copies_names_what_was_sent(tmp_path: Path, learned: Any) -> None:
    """By an operation in the worker, which sees the copies alone: never a path of theirs."""
    checkpoint, copies, said = learned(QUICK, "V1"), Copies(tmp_path / "work"), []
    frames = io.BytesIO()
    blue, green = Image.new("RGB", (64, 64), "blue"), Image.new("RGB", (64, 64), "green")
    blue.save(frames, "GIF", save_all=True, append_images=[green])
    black = io.BytesIO()
    Image.new("L", (32, 32)).save(black, "PNG")
    sent = [
        Sent("IMG (1).png", _picture()),
        Sent("picture 2", frames.getvalue()),
        Sent("IMG (1).png", _picture(), mask=black.getvalue()),
    ]

    def run(name: str, pictures: list[Sent], **given: Any) -> dict[str, Any]:
        batch = copies.batch(pictures, "s")
        copies.write(batch)
        request = {"checkpoint": str(checkpoint), "images": batch.paths, "device": "cpu", **given}
        return worker.run_job(name, request, lambda progress: said.append(progress.note))

    words = {"token": "V2", "noun": "ball", "settings": {"steps": 1, "size": 64}}
    with pytest.raises(ConceptImagesError, match=r"^The mask of IMG \(1\)\.png is black") as error:
        run("learn", sent, **words)
    run("learn", sent[:2] * 2, **words)
    scores = run("scores", sent[:2], settings={"trials": 1, "stages": 1})
    assert [one["file"] for one in scores["images"]] == ["IMG (1).png", "picture 2"]
    notes = "\n".join(said)
    assert "picture 2: several frames or pages" in notes
    assert "IMG (1).png: the same picture as IMG (1).png" in notes
    for text in (str(error.value), notes):
        assert str(tmp_path / "work") not in text
        assert copies.mine.name not in text


@given(st.text(st.characters(exclude_categories=()), max_size=300))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_name_becomes_that_of_a_file(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    """Beside which a caption and a mask have room, and are found."""
    folder, copy = tmp_path_factory.getbasetemp() / "copies", file_name(name)
    assert Path(copy).name == copy
    folder.mkdir(exist_ok=True)
    files = [folder / f"{copy}{ending}" for ending in ("", ".txt", ".mask.png")]
    for file in files:
        file.write_text("a ball")
    (found,) = inventory(files[:1]).pictures
    assert (found.caption, found.mask) == ("a ball", files[2])
    shutil.rmtree(folder)


def test_copies_stay_exactly_while_a_snapshot_needs_them(tmp_path: Path) -> None:
    stack, copies = tmp_path / "a[1].concepts.safetensors", Copies(tmp_path / "work")
    snapshot = tmp_path / "a[1].concepts.V1.0123abcd.dsc.snapshot"
    other = tmp_path / "a[1].concepts.V11.0123abcd.snapshot"
    (kept,) = _written(copies, stack)
    _written(copies, stack, "V2")
    for path in (snapshot, other):
        path.touch()
    copies.tidy()
    assert _left(tmp_path / "work") == ["a.png", "a.png.txt", "of.json"]
    assert kept.exists()
    snapshot.unlink()
    copies.tidy()
    assert _left(tmp_path / "work") == []
    assert not copies.mine.exists()
    assert _written(copies, stack)[0].exists()  # and again
    assert snapshots_of(stack, "V11") == [other]


def test_charts_go_with_the_next_job(tmp_path: Path) -> None:
    copies = Copies(tmp_path)
    folders = [copies.charts(), copies.charts()]
    copies.live()
    for folder in folders:
        Path(folder).mkdir()
        (Path(folder) / "scores.png").touch()
    copies.tidy(shown=folders[1:])
    assert not Path(folders[0]).exists()
    assert _left(tmp_path) == ["scores.png"]
    copies.tidy()
    assert _left(tmp_path) == []


ANOTHER = """
import sys, time
from pathlib import Path
sys.path[:0] = [{tests!r}]
from test_copies import Copies, _written
copies = Copies(Path({folder!r}))
_written(copies, Path({stack!r}), "V1")
_written(copies, Path({stack!r}), "V2")
print("written", flush=True)
time.sleep(100)
"""


def test_another_programs_copies_are_left_alone_until_it_is_gone(tmp_path: Path) -> None:
    """Two web UIs on one folder: the one that dies the hard way leaves what the other's next start
    removes.
    """
    stack, folder = tmp_path / "a.concepts.safetensors", tmp_path / "work"
    code = ANOTHER.format(tests=str(ROOT / "tests"), folder=str(folder), stack=str(stack))
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as another:
        assert another.stdout
        assert another.stdout.readline() == "written\n"
        copies = Copies(folder)
        _written(copies, stack, "V3")
        copies.tidy()
        assert _left(folder) == 2 * ["a.png"] + 2 * ["a.png.txt"] + 2 * ["of.json"]
        os.kill(another.pid, signal.SIGKILL) if os.name != "nt" else another.kill()
    (tmp_path / "a.concepts.V2.snapshot").touch()
    Copies(folder).tidy()
    assert _left(folder) == ["a.png", "a.png.txt", "of.json"]
    (tmp_path / "a.concepts.V2.snapshot").unlink()
    Copies(folder).tidy()
    assert _left(folder) == []


def test_what_is_not_ours_is_never_removed(tmp_path: Path) -> None:
    copies, outside = Copies(tmp_path / "work"), tmp_path / "outside"
    for folder in (outside, copies.root / "dead"):
        folder.mkdir(parents=True)
    (outside / "mine.png").touch()
    (copies.root / "notes.txt").touch()
    (copies.root / "link").symlink_to(outside)
    (copies.root / "dead" / "link").symlink_to(outside)
    copies.tidy()
    assert (outside / "mine.png").exists()
    assert (copies.root / "notes.txt").exists()


def test_checkpoints_are_listed_while_a_folder_goes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's copies lie below the folder of checkpoints and are removed when it ends."""
    for name in ("a.safetensors", "b/c.safetensors", "a.concepts.safetensors", "gone/0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    scandir = os.scandir

    def removing(path: Any) -> Any:
        if not isinstance(path, int) and Path(path).name == "gone":
            shutil.rmtree(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", removing)
    assert checkpoints_in(tmp_path) == [
        tmp_path / "a.safetensors",
        tmp_path / "b" / "c.safetensors",
    ]
    assert not (tmp_path / "gone").exists()
