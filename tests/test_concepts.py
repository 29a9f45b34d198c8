"""Stage 2: every kind of picture people have, and every kind of wrong one."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_learn import save_concept
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from comfy_continual_lora import concepts
from comfy_continual_lora.errors import ConceptImagesError, TokenError


def _gradient(mode: str = "RGB") -> Image.Image:
    values = np.linspace(0, 255, 64, dtype=np.uint8)
    return Image.fromarray(np.stack([np.tile(values, (48, 1))] * 3, -1)).convert(mode)


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.png", "a.webp", "a.bmp", "a.tiff"])
def test_formats(tmp_path: Path, name: str) -> None:
    _gradient().save(tmp_path / name)
    images = concepts.load_images(tmp_path, 64).images
    assert [image.shape for image in images] == [(3, 64, 64)]
    assert images[0][:, :, 0].mean() < -0.6
    assert images[0][:, :, -1].mean() > 0.6  # left is dark, right is bright


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    _gradient().save(tmp_path / "a.jpg", exif=exif)
    image = concepts.load_images(tmp_path, 64).images[0]
    assert image[:, :, 0].mean() > image[:, :, -1].mean()


def test_modes_become_rgb(tmp_path: Path) -> None:
    Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(tmp_path / "deep.png")
    _gradient("L").save(tmp_path / "grey.png")
    _gradient("P").save(tmp_path / "palette.png")
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    clear.save(tmp_path / "transparent.png")
    deep, grey, palette, transparent = concepts.load_images(tmp_path, 32).images
    assert torch.allclose(deep, torch.full_like(deep, 40_000 / 65_535 * 2 - 1), atol=0.02)
    assert grey.shape == palette.shape == (3, 32, 32)
    assert (transparent == 1).all()  # laid on white


def test_crop_keeps_the_middle_and_pad_keeps_everything() -> None:
    wide = Image.new("RGB", (200, 100), "black")
    wide.paste("white", (0, 0, 20, 100))
    assert np.asarray(concepts.fitted(wide, 100, "crop")).max() == 0
    padded = np.asarray(concepts.fitted(wide, 100, "pad"))
    assert padded.shape == (100, 100, 3)
    assert padded[:, :5].min() > 200


def test_captions_lie_beside_the_pictures(tmp_path: Path) -> None:
    save_concept(tmp_path / "p", 0, 2)
    (tmp_path / "p" / "0.txt").write_text("V1 ball on a shelf\n")
    images = concepts.load_images(tmp_path / "p", 32)
    assert images.captions == ("V1 ball on a shelf", None)
    assert concepts.prompts_for("V1", "ball", ["a photo of a {}"], images.captions[0]) == [
        "V1 ball on a shelf"
    ]
    assert concepts.prompts_for("V1", "ball", ["a photo of a {}"], "on a shelf") == [
        "a photo of a V1 ball, on a shelf"
    ]
    assert concepts.prompts_for("V1", "ball", ["a photo of a {}"], None) == ["a photo of a V1 ball"]


def test_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(ConceptImagesError, match="it is empty"):
        concepts.load_images(tmp_path, 32)
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ConceptImagesError, match=r"left out: notes\.txt"):
        concepts.load_images(tmp_path, 32)
    with pytest.raises(ConceptImagesError, match="There is no folder"):
        concepts.load_images(tmp_path / "missing", 32)


def test_a_truncated_picture_among_good_ones_is_named(tmp_path: Path) -> None:
    save_concept(tmp_path / "p", 0, 2)
    _gradient().resize((400, 400)).save(tmp_path / "p" / "cut.jpg")
    data = (tmp_path / "p" / "cut.jpg").read_bytes()
    (tmp_path / "p" / "cut.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(ConceptImagesError, match=r"cut\.jpg can't be read") as error:
        concepts.load_images(tmp_path / "p", 32)
    assert "0.png" not in str(error.value)


def test_what_is_too_narrow_is_refused_and_what_is_narrow_is_padded(tmp_path: Path) -> None:
    Image.new("RGB", (1, 4000), "red").save(tmp_path / "line.png")
    with pytest.raises(ConceptImagesError, match=r"line\.png is too narrow: 1 x 4000 pixels"):
        concepts.load_images(tmp_path, 64)
    Image.new("RGB", (8, 4000), "red").save(tmp_path / "line.png")
    for fit in ("crop", "pad", "bucket"):
        assert concepts.load_images(tmp_path, 64, fit=fit).images[0].isfinite().all()


def test_transparent_parts_of_a_mask_are_not_learned_from(tmp_path: Path) -> None:
    _gradient().save(tmp_path / "a.png")
    mask = Image.new("RGBA", (64, 48), (255, 255, 255, 0))
    mask.paste("white", (0, 0, 32, 48))
    mask.save(tmp_path / "a.MASK.PNG")
    masks = concepts.load_images(tmp_path, 32).masks
    assert masks
    assert masks[0][..., :12].min() > 0.95
    assert masks[0][..., 20:].max() < 0.05


def test_a_header_of_60000_by_60000_is_refused_unread(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(ConceptImagesError, match=r"too large|60000 x 60000"):
        concepts.load_images(tmp_path, 32)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("my dog", "may contain only"),
        ("a/b", "may contain only"),
        ("../x", "may contain only"),
        ("v1", "taken"),
        ("dog", "a word the"),
    ],
)
def test_bad_tokens(token: str, message: str) -> None:
    with pytest.raises(TokenError, match=message):
        concepts.check_token(token, ["V1"], lambda word: word == "dog")


@given(st.integers(20, 4000), st.integers(20, 4000), st.sampled_from([64, 128, 512, 768, 1024]))
def test_buckets_keep_the_shape_and_never_cost_more_than_the_square(
    width: int, height: int, size: int
) -> None:
    step = min(64, size // 8)
    sides = concepts.bucket(width, height, size)
    assert all(side % step == 0 and side > 0 for side in sides)
    assert sides[0] * sides[1] <= size * size
    wanted = min(4, max(1 / 4, width / height))
    assert abs(np.log(sides[0] / sides[1] / wanted)) < np.log(1.3)
    assert concepts.bucket(height, width, size) == sides[::-1]


def test_bucketed_pictures_keep_their_shapes_with_their_masks(tmp_path: Path) -> None:
    for name, shape in (("a", (300, 150)), ("b", (150, 300)), ("c", (200, 200))):
        Image.new("RGB", shape, "red").save(tmp_path / f"{name}.png")
    Image.new("L", (300, 150), "white").save(tmp_path / "a.mask.png")
    found = concepts.load_images(tmp_path, 128, fit="bucket")
    assert [tuple(image.shape) for image in found.images] == [
        (3, 80, 176),
        (3, 176, 80),
        (3, 128, 128),
    ]
    assert [tuple(mask.shape) for mask in found.masks or ()] == [
        (1, 80, 176),
        (1, 176, 80),
        (1, 128, 128),
    ]


@given(st.text(max_size=12))
def test_a_token_is_refused_or_safe_in_a_file_name(token: str) -> None:
    try:
        concepts.check_token(token, [], lambda _: False)
    except TokenError:
        return
    assert Path(token).name == token
    assert token.strip(".") == token


def test_masks(tmp_path: Path) -> None:
    _gradient().save(tmp_path / "a.png")
    _gradient().save(tmp_path / "b.png")
    assert concepts.load_images(tmp_path, 32).masks is None
    half = np.zeros((48, 64), np.uint8)
    half[:, 32:] = 255
    Image.fromarray(half).save(tmp_path / "a.mask.png")
    found = concepts.load_images(tmp_path, 32)
    assert len(found.images) == 2
    assert found.masks is not None
    assert found.masks[0][0, :, :12].max() < 0.05
    assert found.masks[0][0, :, 20:].min() > 0.95
    assert (found.masks[1] == 1).all()
    notes: list[str] = []
    Image.fromarray(half[:, ::2]).save(tmp_path / "b.mask.png")
    again = concepts.load_images(tmp_path, 32, tell=notes.append)
    assert again.masks is not None
    assert torch.allclose(again.masks[1], again.masks[0], atol=0.3)
    assert notes == [
        "b.png: its mask of 32 x 48 pixels is scaled to the picture's 64 x 48.",
        "b.png: the same picture as a.png.",
    ]
    Image.fromarray(half * 0).save(tmp_path / "b.mask.png")
    with pytest.raises(
        ConceptImagesError, match=r"^The mask of b\.png is black where the picture is used"
    ):
        concepts.load_images(tmp_path, 32)
