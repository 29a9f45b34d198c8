"""Image files are opened as the formats we name, and written over nothing but our own."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from comfy_continual_lora import concepts, imagefile
from comfy_continual_lora.errors import ConceptImagesError, SettingError
from comfy_continual_lora.inventory import inventory

POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(MARK) (w) file "
    b"closefile\nshowpage\n%%EOF\n"
)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tiff"])
def test_postscript_starts_no_interpreter(tmp_path: Path, name: str) -> None:
    """A stand-in for Ghostscript stands in front of the real one and says when it is started."""
    program, mark = tmp_path / "bin" / "gs", tmp_path / "started"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {mark}\nexit 1\n")
    program.chmod(0o755)
    (tmp_path / name).write_bytes(POSTSCRIPT)
    code = (
        "import sys; from pathlib import Path; from comfy_continual_lora import concepts\n"
        "from comfy_continual_lora.errors import ConceptImagesError\n"
        "try: concepts.read_image(Path(sys.argv[1]))\n"
        "except ConceptImagesError as error: print(error)"
    )
    environment = {**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / name)],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert name in done.stdout
    assert "Expected JPEG, PNG" in done.stdout
    assert not mark.exists()


@pytest.mark.parametrize(
    "kind", ["PCX", "TGA", "ICO", "PSD", "SGI", "IM", "DDS", "JPEG2000", "XBM"]
)
def test_other_formats_are_refused_whatever_their_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    if kind == "PSD":
        path.write_bytes(b"8BPS\0\1" + bytes(20))
    elif kind == "XBM":
        path.write_bytes(
            b"#define a_width 1\n#define a_height 1\nstatic char a_bits[] = {\n0x01 };\n"
        )
    else:
        Image.new("RGB", (64, 64), "red").save(path, kind)
    with pytest.raises(ConceptImagesError, match=r"a\.png can't be read"):
        concepts.read_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
def test_the_formats_we_name_are_read_whatever_their_name(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (64, 48), (200, 30, 30)).save(tmp_path / "a.jpg", kind)
    image = concepts.read_image(tmp_path / "a.jpg")
    pixel = image.getpixel((5, 5))
    assert image.size == (64, 48)
    assert isinstance(pixel, tuple)
    assert pixel[0] > 150 > pixel[1]


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read_where_pillow_can(tmp_path: Path) -> None:
    Image.new("RGB", (64, 48), (200, 30, 30)).save(tmp_path / "a.avif")
    assert inventory(tmp_path).files == [tmp_path / "a.avif"]
    assert concepts.read_image(tmp_path / "a.avif").size == (64, 48)


@pytest.mark.parametrize(
    ("brand", "format_name"), [(b"heic", "HEIC"), (b"mif1", "HEIC"), (b"avif", "AVIF")]
)
def test_what_this_pillow_has_no_decoder_for_is_to_be_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, brand: bytes, format_name: str
) -> None:
    monkeypatch.setattr(imagefile, "FORMATS", ("JPEG", "PNG"))
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(100))
    with pytest.raises(
        ConceptImagesError, match=rf"IMG_1\.HEIC is an {format_name} image.*Convert it"
    ):
        concepts.load_images([tmp_path / "IMG_1.HEIC"], 32)
    with pytest.raises(ConceptImagesError, match=r"left out: IMG_1\.HEIC \(convert it\)"):
        concepts.load_images(tmp_path, 32)


def test_an_image_in_memory_is_opened_in_the_same_way() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    with imagefile.opened(io.BytesIO(buffer.getvalue())) as image:
        assert image.size == (8, 8)
    with pytest.raises(ConceptImagesError), imagefile.opened(io.BytesIO(POSTSCRIPT)):
        pass


# --- what cameras, scanners and other programs write ------------------------------------------------


def _exif(tag: int, kind: int, count: int, value: bytes) -> bytes:
    """EXIF of a picture turned by 90 degrees, with one more tag of any type."""
    entries = [
        struct.pack("<HHII", 0x0112, 3, 1, 6),
        struct.pack("<HHII", tag, kind, count, 38),
    ]
    entries.sort(key=lambda entry: entry[1::-1])
    head = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2)
    return head + b"".join(entries) + bytes(4) + value


@given(
    st.one_of(st.integers(0x0100, 0x0132), st.sampled_from([0x8769, 0x8825, 0xA005, 0x9003])),
    st.integers(0, 14),
    st.sampled_from([0, 1, 2, 1000, 2**32 - 1]),
    st.binary(max_size=12),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_no_malformed_tag_costs_a_picture(tag: int, kind: int, count: int, value: bytes) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 16), "red").save(buffer, "JPEG", exif=_exif(tag, kind, count, value))
    found = imagefile.read(buffer)
    assert found.size in ((32, 16), (16, 32))
    assert found.image.size == found.size
    assert found.size == (16, 32) or tag == 0x0112 or found.notes


@pytest.mark.parametrize(
    "exif", [_exif(0x0112, 2, 4, b""), b"Exif\0\0" + b"\xff" * 30, b"Exif\0\0II*\0\x08\0\0\0\xff\0"]
)
def test_an_orientation_that_can_not_be_read_is_told(exif: bytes) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 16), "red").save(buffer, "JPEG", exif=exif)
    assert "orientation was ignored" in "".join(imagefile.read(buffer).notes)


def _saved(image: Image.Image, kind: str = "TIFF", **given: Any) -> imagefile.Read:
    buffer = io.BytesIO()
    image.save(buffer, kind, **given)
    return imagefile.read(buffer)


def _mean(found: imagefile.Read) -> float:
    return float(np.asarray(found.image, np.float64).mean())


@pytest.mark.parametrize(
    ("values", "kind", "mean"),
    [
        (np.full((16, 16), 20_000, np.uint16), "PNG", 20_000 / 65_535),
        (np.full((16, 16), 200, np.uint16), "PNG", 0),
        (np.full((16, 16), 20_000, np.uint16), "TIFF", 20_000 / 65_535),
        (np.full((16, 16), 2**30, np.int32), "TIFF", 1 / 2),
        (np.full((16, 16), 200, np.int32), "TIFF", 0),
        (np.full((16, 16), 0.3, np.float32), "TIFF", 0.3),
        (np.full((16, 16), 0.001, np.float32), "TIFF", 0),
        (np.full((16, 16), 102, np.float32), "TIFF", 0.4),
    ],
)
def test_greyscale_is_scaled_by_its_format(values: Any, kind: str, mean: float) -> None:
    found = _saved(Image.fromarray(values), kind)
    assert abs(_mean(found) / 255 - mean) < 0.005
    assert bool(found.notes) == (mean == 0 or values.max() == 102)


def test_unsigned_integers_of_32_bits_have_twice_the_range() -> None:
    image = Image.fromarray(np.full((16, 16), -(2**30), np.int32))  # the bits of 3/4 of 2**32
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    sample_format = struct.pack("<HHI", 339, 3, 1)
    signed, unsigned = sample_format + b"\2", sample_format + b"\1"
    assert buffer.getvalue().count(signed) == 1
    found = imagefile.read(io.BytesIO(buffer.getvalue().replace(signed, unsigned)))
    assert abs(_mean(found) / 255 - 0.75) < 0.005


@pytest.mark.parametrize("value", [np.nan, np.inf, -1, 1000])
def test_floats_of_no_known_range_are_refused(value: float) -> None:
    values = np.full((16, 16), 0.5, np.float32)
    values[3, 3] = value
    with pytest.raises(ConceptImagesError, match="expected 0 to 1, or 0 to 255"):
        _saved(Image.fromarray(values))


def test_the_first_frame_is_read_and_that_is_told() -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        found = _saved(frames[0], kind, save_all=True, append_images=frames[1:])
        assert found.notes == ("several frames or pages, of which the first is used",)
        assert _mean(found) == pytest.approx(85, abs=1)
        color = found.image.getpixel((5, 5))
        assert isinstance(color, tuple)
        assert color[0] > 240
        assert _saved(frames[0], kind).notes == ()


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's count of a process's memory")
def test_large_pictures_are_read_smaller_within_a_gigabyte(tmp_path: Path) -> None:
    """Each in a process of its own; the system's ru_maxrss would count what its parent took."""
    path, code = (
        tmp_path / "large",
        (
            "import sys; from pathlib import Path; from comfy_continual_lora import imagefile\n"
            "found = imagefile.read(Path(sys.argv[1]))\n"
            "peak = Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0]\n"
            "print(*found.size, *found.image.size, peak)"
        ),
    )
    for kind, mode, size, options in (
        ("JPEG", "RGB", (13_000, 13_000), {}),
        ("JPEG", "L", (60_000, 900), {"progressive": True}),
        ("PNG", "RGB", (7_000, 7_000), {"compress_level": 1}),
        ("PNG", "I;16", (7_000, 7_000), {"compress_level": 1}),
        ("GIF", "P", (7_000, 7_000), {}),
    ):
        Image.new(mode, size, 100 if len(mode) < 3 else None).save(path, kind, **options)
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        )
        width, height, *smaller, memory = map(int, done.stdout.split())
        assert (width, height) == size
        assert smaller[0] * smaller[1] <= 17_000_000
        assert smaller[0] / smaller[1] == pytest.approx(width / height, rel=0.01)
        assert memory * 1024 < 1e9, (kind, mode)


def test_a_small_file_of_a_huge_picture_is_refused_unread(tmp_path: Path) -> None:
    for name, options in (("bomb.png", {}), ("bomb.jpg", {"progressive": True})):
        Image.new("L", (10_000, 10_000)).save(tmp_path / name, **options)
        with pytest.raises(ConceptImagesError, match=rf"{name} is too large: 10000 x 10000 pixels"):
            imagefile.read(tmp_path / name)


def _samples() -> dict[str, bytes]:
    image = Image.effect_noise((40, 48), 80)
    samples = {}
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"):
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, kind)
        samples[kind] = buffer.getvalue()
    return samples


SAMPLES = _samples()


@given(st.sampled_from(sorted(SAMPLES)), st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_damaged_file_is_read_or_refused(kind: str, data: st.DataObject) -> None:
    damaged = bytearray(SAMPLES[kind])
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, min(300, len(damaged) - 1)))
        damaged[place] = data.draw(st.integers(0, 255))
    try:
        found = imagefile.read(io.BytesIO(bytes(damaged)))
    except ConceptImagesError:
        return
    assert found.image.mode == "RGB"


# --- written --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", imagefile.ENDINGS)
def test_an_output_replaces_our_own_and_nothing_else(tmp_path: Path, ending: str) -> None:
    ours, theirs = tmp_path / f"ours{ending}", tmp_path / f"theirs{ending}"
    Image.new("RGB", (8, 8), "blue").save(theirs)
    before = theirs.read_bytes()
    for color in ("red", "green"):
        imagefile.save_own(Image.new("RGB", (8, 8), color), ours)
    with Image.open(ours) as image:
        assert image.convert("RGB").getpixel((4, 4)) in {
            (0, 128, 0),
            (0, 127, 1),
            (0, 128, 1),
            (1, 128, 1),
            (0, 127, 0),
            (1, 127, 0),
        }
    for refuse in (
        lambda: imagefile.check_output(theirs),
        lambda: imagefile.save_own(Image.new("RGB", (8, 8)), theirs),
    ):
        with pytest.raises(SettingError, match="did not write it"):
            refuse()
    assert theirs.read_bytes() == before
    with pytest.raises(SettingError, match="has to end in one of"):
        imagefile.check_output(tmp_path / "scores")


@pytest.mark.parametrize("ending", imagefile.ENDINGS)
def test_an_output_is_written_whatever_its_size_or_refused(tmp_path: Path, ending: str) -> None:
    """The scores of 800 pictures are a chart of 83,200 rows."""
    long = Image.new("1", (8, 83_200))
    if ending == ".png":
        imagefile.save_own(long, tmp_path / "scores.png")
        return
    with pytest.raises(SettingError, match=rf"8 x 83200 pixels.*\{ending} holds .*\.png"):
        imagefile.save_own(long, tmp_path / f"scores{ending}")
    assert not list(tmp_path.iterdir())


def test_an_output_of_any_size_is_known_as_our_own(tmp_path: Path) -> None:
    """The chart of 50 concepts has more pixels than pictures may have that are learned from."""
    path = tmp_path / "retention.png"
    large = Image.new("L", (10_130, 6_100))
    for _ in range(2):
        imagefile.save_own(large, path)
    large.save(path)
    with pytest.raises(SettingError, match="did not write it"):
        imagefile.check_output(path)
