"""Image files are opened as the formats we name, and written over nothing but our own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, features

from comfy_continual_lora import concepts, imagefile
from comfy_continual_lora.errors import ConceptImagesError, SettingError

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
    assert concepts.find_images(tmp_path) == [tmp_path / "a.avif"]
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
        concepts.load_images(tmp_path, 32)


def test_an_image_in_memory_is_opened_in_the_same_way() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    with imagefile.opened(io.BytesIO(buffer.getvalue())) as image:
        assert image.size == (8, 8)
    with pytest.raises(ConceptImagesError), imagefile.opened(io.BytesIO(POSTSCRIPT)):
        pass


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
