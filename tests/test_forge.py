"""The extension in a real Forge, found through FORGE_PATH, else ~/stable-diffusion-webui-forge:
what its own gradio and memory management touch.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_browser import CHROMIUM
from helpers_webui import (
    WebUI,
    find_webui,
    freeze,
    keeps_things_apart,
    learns_and_draws,
    learns_in_a_browser,
)

FOUND = find_webui("FORGE_PATH", "stable-diffusion-webui-forge")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        FOUND is None, reason="no Forge with a venv at FORGE_PATH or ~/stable-diffusion-webui-forge"
    ),
]


def test_what_is_learned_acts_in_txt2img_at_once(host: WebUI, pictures: Path) -> None:
    learns_and_draws(host, pictures)


def test_several_learned_things_in_one_prompt_are_kept_apart(host: WebUI, pictures: Path) -> None:
    keeps_things_apart(host, pictures)


def test_forges_packages_are_what_they_were(host: WebUI, frozen: str) -> None:
    assert freeze(host.webui) == frozen


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_tab_learns_from_a_browser(host: WebUI, pictures: Path, tmp_path: Path) -> None:
    learns_in_a_browser(host, pictures, tmp_path / "forge.png")
