"""Stage 8: the report is one safe file that reads well on a phone, in the dark, and aloud."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers_browser import CHROMIUM, page
from PIL import Image

from comfy_continual_lora import reportpage

NASTY = '<b>"V1" & more</b>'


def _report() -> str:
    picture = Image.new("RGB", (128, 128), "teal")
    return reportpage.page(
        NASTY,
        NASTY,
        [
            (NASTY, [reportpage.figure([picture] * 5, NASTY)]),
            ("Curve", [reportpage.curve([3.0, 2.0, 1.0], NASTY)]),
            ("Pair", [reportpage.first_and_now(NASTY, [(picture, NASTY)] * 3, NASTY, False)]),
            ("Settings", [reportpage.settings_table({NASTY: NASTY})]),
            (
                "Next",
                [reportpage.command(NASTY, ["continual-lora", "draw", "--prompt", "x" * 400])],
            ),
        ],
    )


def test_text_is_text_and_every_picture_says_what_it_shows() -> None:
    report = _report()
    assert "<b>" not in report
    assert "<script" not in report
    assert "://" not in report
    alts = re.findall(r'<img alt="([^"]*)"', report)
    assert len(alts) == report.count("<img") == 8
    assert all("V1" in alt for alt in alts)
    assert 'aria-label="&lt;b&gt;' in report


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.2, "1 second"),
        (40, "40 seconds"),
        (1440, "24 minutes"),
        (3900, "65 minutes"),
        (7200, "2 hours"),
        (9060, "2 hours 31 minutes"),
    ],
)
def test_durations_are_said_as_people_say_them(seconds: float, said: str) -> None:
    assert reportpage.duration(seconds) == said


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_phone_shows_all_of_it_without_scrolling_sideways(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(_report(), encoding="utf-8")
    with page(file.as_uri(), 420, 900) as opened:
        assert opened.evaluate("document.documentElement.scrollWidth") <= 420
        light = opened.evaluate("getComputedStyle(document.body).backgroundColor")
        opened.emulate_media(color_scheme="dark")
        assert opened.evaluate("getComputedStyle(document.body).backgroundColor") != light
