"""Stage 2: what a folder holds is used, or left out by name."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from comfy_continual_lora.errors import CheckpointError, ConceptImagesError
from comfy_continual_lora.inventory import Inventory, groups, inventory, read_caption, sorted_out
from comfy_continual_lora.operations import OPERATIONS


def _pictures(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        kind = "GIF" if name.endswith(".gif") else "PNG"  # Pillow goes by the content
        Image.new("RGB", (16, 16), (number * 20, 9, 9)).save(folder / name, kind)


def _names(found: Inventory) -> list[str]:
    return [file.name for file in found.files]


def test_one_line_says_what_is_used_and_what_is_not(tmp_path: Path) -> None:
    _pictures(tmp_path, "a.png", "b.JPG", "c.jfif", "d.gif", "e.TIFF", "a.mask.png", "z.MASK.png")
    (tmp_path / "IMG_2.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    for name, text in (("a.txt", "one"), ("b.JPG.TXT", "two"), ("c.caption", "3"), ("d.txt", " ")):
        (tmp_path / name).write_text(text)
    for name in ("Thumbs.db", ".DS_Store", "._a.png", "notes.txt", "raw.CR2"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("e.txt", "raw", "@eaDir", ".ipynb_checkpoints", "__MACOSX", "$RECYCLE.BIN"):
        (tmp_path / name).mkdir()
    os.symlink(tmp_path / "gone.png", tmp_path / "link.png")
    found = inventory(tmp_path)
    assert _names(found) == ["a.png", "b.JPG", "c.jfif", "d.gif", "e.TIFF"]
    assert [picture.caption for picture in found.pictures] == ["one", "two", "3", None, None]
    assert [bool(picture.mask) for picture in found.pictures] == [True, False, False, False, False]
    assert found.notes() == [
        "5 pictures, 3 captions (.txt, .caption), 1 mask; left out: IMG_2.HEIC (convert it), "
        "Thumbs.db (no picture), e.txt (a folder), link.png (not a file), "
        "notes.txt (no picture has this name), raw (a folder), raw.CR2 (convert it), "
        "z.MASK.png (a mask without picture)"
    ]


def test_few_pictures_and_choices_are_told(tmp_path: Path) -> None:
    _pictures(tmp_path, "a.png", "a.mask.png", "a_mask.png", "b_mask.png")
    for name in ("a.txt", "a.png.txt", "a.caption"):
        (tmp_path / name).write_text(f"from {name}")
    found = inventory(tmp_path)
    assert _names(found) == ["a.png", "b_mask.png"]  # of which no b.png is there
    assert found.pictures[0].caption == "from a.png.txt"
    summary, few, captions, masks = found.notes()
    assert summary == "2 pictures, 1 caption (.txt), 1 mask"
    assert few.startswith("2 pictures: too few")
    assert captions == "a.png: 3 captions, a.png.txt, a.txt, a.caption; the first counts."
    assert masks == "a.png: 2 masks, a.mask.png, a_mask.png; the first counts."


def test_what_belongs_to_a_mask_is_named(tmp_path: Path) -> None:
    _pictures(tmp_path, "a.png", "a_mask.png", "a_mask_mask.png")
    (tmp_path / "a_mask.txt").write_text("a mask")
    assert inventory(tmp_path).summary() == (
        "1 picture, no captions, 1 mask; left out: a_mask.txt (no picture has this name), "
        "a_mask_mask.png (a mask without picture)"
    )


def test_what_is_left_out_is_named_up_to_ten(tmp_path: Path) -> None:
    _pictures(tmp_path, "a.png")
    for number in range(12):
        (tmp_path / f"{number:02d}.bin").touch()
    assert inventory(tmp_path).summary().endswith("09.bin (no picture), 2 more")


def test_a_list_is_taken_as_given_with_what_lies_beside(tmp_path: Path) -> None:
    _pictures(tmp_path, "a.png", "a_mask.png", "b.png")
    (tmp_path / "a.txt").write_text("a ball")
    given = [tmp_path / "a_mask.png", tmp_path / "a.png"]
    found = inventory(given)
    assert found.files == given
    assert [picture.caption for picture in found.pictures] == [None, "a ball"]
    assert not any(picture.mask for picture in found.pictures)
    with pytest.raises(ConceptImagesError, match=r"no picture .*c\.png"):
        inventory([tmp_path / "c.png"])


def test_uploads_belong_together_by_name_wherever_they_lie(tmp_path: Path) -> None:
    _pictures(tmp_path / "1", "a.png")
    _pictures(tmp_path / "2", "A.mask.jpg")
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "a.TXT").write_text("a ball")
    files = [tmp_path / "2" / "A.mask.jpg", tmp_path / "3" / "a.TXT", tmp_path / "1" / "a.png"]
    found = sorted_out(files)
    assert found.summary() == "1 picture, 1 caption (.txt), 1 mask"


def test_what_is_of_several_pictures_of_one_name_is_left_out(tmp_path: Path) -> None:
    """Each upload in a folder of its own; the same picture twice is one file, given twice."""
    _pictures(tmp_path / "1", "image.jpg", "a.png", "twice.png")
    _pictures(tmp_path / "2", "image.jpg", "image_mask.png", "a_mask.png", "image.mask.png")
    _pictures(tmp_path / "3", "image.jpg", "image_mask.png", "a_mask.png")
    for name in ("1/image.txt", "2/image.jpg.caption", "2/a.txt", "3/a.txt", "1/twice.txt"):
        (tmp_path / name).write_text(name)
    files = sorted(file for file in tmp_path.rglob("*") if file.is_file())
    found = sorted_out([*files, tmp_path / "1" / "twice.png"])
    assert _names(found) == [
        "a.png",
        "image.jpg",
        "twice.png",
        "image.jpg",
        "image.jpg",
        "twice.png",
    ]
    captions = [picture.caption for picture in found.pictures]
    assert captions == ["3/a.txt", None, "1/twice.txt", None, None, "1/twice.txt"]
    masks = [picture.mask for picture in found.pictures]
    assert masks == [tmp_path / "3" / "a_mask.png", *[None] * 5]
    shared, another = (
        "several pictures have this name; rename them",
        "another one of this name counts",
    )
    assert found.left_out == (
        f"image.txt ({shared})",
        f"a.txt ({another})",
        f"a_mask.png ({another})",
        f"image.jpg.caption ({shared})",
        f"image.mask.png ({shared})",
        f"image_mask.png ({shared})",
        f"image_mask.png ({shared})",
    )


def test_the_folder_one_is_in_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the label of its pictures."""
    _pictures(tmp_path / "V1", "a.png")
    (tmp_path / "V1" / "sub").mkdir()
    for place, name in (("V1", "."), ("V1/sub", "..")):
        monkeypatch.chdir(tmp_path / place)
        assert [label for label, _ in groups(Path(name))[0]] == ["V1"]


def test_folders_of_other_programs_are_no_groups(tmp_path: Path) -> None:
    _pictures(tmp_path, "0.png", "1.png")
    _pictures(tmp_path / "@eaDir" / "0.png", "thumb.jpg")
    _pictures(tmp_path / "V1", "2.png")
    (tmp_path / "V1" / "x.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    (tmp_path / "empty").mkdir()
    found, whole = groups(tmp_path)
    assert [(name, [one.name for one in pictures]) for name, pictures in found] == [
        (tmp_path.name, ["0.png", "1.png"]),
        ("V1", ["V1/2.png"]),
    ]
    assert whole.rest() == "; left out: V1/x.heic (convert it)"
    for name in ("0.png", "1.png", "V1/2.png"):
        (tmp_path / name).unlink()
    with pytest.raises(ConceptImagesError, match=r"No pictures in .*x\.heic \(convert it\)"):
        groups(tmp_path)


def test_a_folder_without_access_is_named(tmp_path: Path) -> None:
    for wrong in (tmp_path / "none", tmp_path / "file" / "in"):
        (tmp_path / "file").touch()
        with pytest.raises(ConceptImagesError, match="There is no folder"):
            inventory(wrong)
    if os.name == "posix" and os.geteuid():
        (tmp_path / "closed").mkdir(mode=0)
        with pytest.raises(ConceptImagesError, match="can't be read"):
            inventory(tmp_path / "closed")


def test_what_belongs_to_several_pictures_is_told(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "b.jpg", "b.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    Image.new("L", (64, 64)).save(tmp_path / "a.mask.png")
    for name in ("a.txt", "b.txt", "b.jpg.txt"):
        (tmp_path / name).write_text(f"a V1 ball of {name}")
    notes = inventory(tmp_path).notes()
    assert [one for one in notes if "counts for all" in one] == [
        f"a.jpg, a.png: {name} counts for all of these; one named as x.jpg.txt is for x.jpg alone."
        for name in ("a.txt", "a.mask.png")
    ]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("a V1 ball".encode("utf-8-sig"), "a V1 ball"),
        ("a V1 ball".encode("utf-16"), "a V1 ball"),
        (b"\xfe\xff" + "é".encode("utf-16-be"), "é"),
        ("ball".encode("utf-32"), "ball"),
        ("in a café".encode(), "in a café"),
        ("in a café".encode("cp1252"), "in a café"),
        (b"\xef\xbb\xbf", ""),
        (b"\n one \r\n\n two, three\n", "one two, three"),
    ],
)
def test_captions_as_other_programs_write_them(tmp_path: Path, data: bytes, text: str) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(data)
    caption, notes = read_caption(file)
    assert caption == text
    assert ("Windows-1252" in "".join(notes)) == (data == "in a café".encode("cp1252"))
    assert ("2 lines" in "".join(notes)) == ("two" in text)


@pytest.mark.parametrize(
    "data",
    [
        b"\x89PNG\r\n\x1a\n\0\0",
        "ball".encode("utf-16-le"),
        b"\xff\xfea",
        b"\x81 ball",
        b"x" * 10**6,
    ],
)
def test_what_is_no_caption_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    _pictures(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes(data)
    for read in (Inventory.notes, lambda found: found.pictures[0].feed(hashlib.sha256())):
        with pytest.raises(ConceptImagesError, match=r"caption .*a\.txt .*remove it"):
            read(inventory(tmp_path))


@given(
    st.one_of(
        st.binary(max_size=40),
        st.text(max_size=20).map(lambda text: text.encode("utf-16", "surrogatepass")),
    )
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_caption_is_one_line_of_text_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "caption.txt"
    file.write_bytes(data)
    try:
        text, _ = read_caption(file)
    except ConceptImagesError:
        return
    assert text == text.strip()
    assert len(text.splitlines()) <= 1
    assert "\0" not in text
    text.encode()


@pytest.mark.parametrize("operation", ["learn", "scores"])
def test_all_is_told_before_the_checkpoint_is_opened(tmp_path: Path, operation: str) -> None:
    _pictures(tmp_path / "p", "a.png", "b.gif")
    (tmp_path / "p" / "IMG_2.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    images, words = tmp_path / "p", {"token": "V1", "noun": "ball"}
    notes: list[str] = []
    of = OPERATIONS[operation]
    rest = words if operation == "learn" else {}
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a checkpoint")
    request = of.request(broken, images=images, **rest)
    with pytest.raises(CheckpointError):
        of(request, lambda progress: notes.append(progress.note))
    assert notes[0].startswith("2 pictures")
    assert notes[0].endswith("; left out: IMG_2.HEIC (convert it)")
    if operation == "learn":
        assert notes[1].startswith("2 pictures: too few")
        return
    (images / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ConceptImagesError, match=r"cut\.jpg can't be read"):
        of(request)
