"""The extension in a real Forge, reForge and Forge Neo, each found through its variable, else in the
home folder: what their own gradio, memory management and embeddings touch.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_browser import CHROMIUM
from helpers_webui import (
    FAMILY,
    WebUI,
    freeze,
    is_calm_without_a_model,
    keeps_things_apart,
    learns_and_draws,
    learns_in_a_browser,
    of_the_family,
    stops_when_interrupted,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=FAMILY)
def webui(request: pytest.FixtureRequest) -> Path:
    return of_the_family(request.param)


def test_what_is_learned_acts_in_txt2img_at_once(host: WebUI, pictures: Path) -> None:
    learns_and_draws(host, pictures)


def test_several_learned_things_in_one_prompt_are_kept_apart(host: WebUI, pictures: Path) -> None:
    keeps_things_apart(host, pictures)


def test_a_model_that_is_not_loaded_is_no_trouble(host: WebUI, pictures: Path) -> None:
    is_calm_without_a_model(host, pictures)


def test_interrupt_stops_a_job(host: WebUI, pictures: Path) -> None:
    stops_when_interrupted(host, pictures)


def test_the_web_uis_packages_are_what_they_were(host: WebUI, frozen: str) -> None:
    assert freeze(host.webui) == frozen


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_tab_learns_from_a_browser(host: WebUI, pictures: Path, tmp_path: Path) -> None:
    learns_in_a_browser(host, pictures, tmp_path / "page.png")
