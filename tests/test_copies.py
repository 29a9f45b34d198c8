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
from PIL import Image

from comfy_continual_lora.errors import ConceptImagesError
from comfy_continual_lora.files import checkpoints_in, snapshots_of
from comfy_continual_lora.inventory import inventory
from comfy_continual_lora.webui.copies import Copies, Sent, suffix_of

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
    assert [p.name for p in paths] == ["1-a.png", "2-b.jpg"]
    assert inventory(paths).summary() == "2 pictures, 1 caption (.txt)"


def test_captions_and_masks_lie_beside_their_copies(tmp_path: Path) -> None:
    names = ("a.png", "a.jpg", "a_mask.png", "../x/../CON.png", "\ud800\0" * 200, "")
    sent = [Sent(name, _picture(), f"of {name[:5]!a}", _picture("JPEG")) for name in names]
    copies = Copies(tmp_path)
    batch = copies.batch(sent, "s")
    copies.write(batch)
    found = inventory(batch.paths)
    assert found.summary() == "6 pictures, 6 captions (.txt), 6 masks"
    assert {file.parent for file in found.files} == {batch.folder}
    assert [picture.caption for picture in found.pictures[:2]] == ["of 'a.png'", "of 'a.jpg'"]
    mask = _picture()[:50]
    with pytest.raises(ConceptImagesError, match=r"The mask of a\.png can't be read"):
        copies.batch([Sent("a.png", _picture(), mask=mask)], "s")
    for caption in ("\ud800", "\0", "x" * 100_000):
        with pytest.raises(ConceptImagesError, match=r"The caption of a\.png is"):
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


def test_a_picture_is_named_after_what_it_holds() -> None:
    for kind, suffix in (
        ("PNG", ".png"),
        ("JPEG", ".jpg"),
        ("WEBP", ".webp"),
        ("BMP", ".bmp"),
        ("TIFF", ".tif"),
    ):
        assert suffix_of("any.thing", _picture(kind)) == suffix


def test_copies_stay_exactly_while_a_snapshot_needs_them(tmp_path: Path) -> None:
    stack, copies = tmp_path / "a[1].concepts.safetensors", Copies(tmp_path / "work")
    snapshot = tmp_path / "a[1].concepts.V1.0123abcd.dsc.snapshot"
    other = tmp_path / "a[1].concepts.V11.0123abcd.snapshot"
    (kept,) = _written(copies, stack)
    _written(copies, stack, "V2")
    for path in (snapshot, other):
        path.touch()
    copies.tidy()
    assert _left(tmp_path / "work") == ["1-a.png", "1-a.txt", "of.json"]
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
        assert _left(folder) == 2 * ["1-a.png"] + 2 * ["1-a.txt"] + 2 * ["of.json"]
        os.kill(another.pid, signal.SIGKILL) if os.name != "nt" else another.kill()
    (tmp_path / "a.concepts.V2.snapshot").touch()
    Copies(folder).tidy()
    assert _left(folder) == ["1-a.png", "1-a.txt", "of.json"]
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
