"""The tab Continual LoRA in AUTOMATIC1111 and the Forge family, and what it does while they draw.

Run again at every "Reload UI"; the state that survives it is in webui/a1111.py and webui/apart.py.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gradio as gr
from modules import (  # pyright: ignore[reportMissingImports] - only inside the web UI
    script_callbacks,
    scripts,
)

EXTENSION = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("continual_lora_home", EXTENSION / "home.py")
_home = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_home)
_home.load_package()

from comfy_continual_lora.webui import a1111, api, tab  # noqa: E402
from comfy_continual_lora.webui.apart import APART  # noqa: E402

host = a1111.host(EXTENSION)


class SeveralLearnedThings(scripts.Script):
    """Keeps the looks of several learned things in one prompt apart."""

    def title(self) -> str:
        return "Continual LoRA"

    def show(self, is_img2img: bool) -> object:
        return scripts.AlwaysVisible

    def process_batch(self, p: object, *_: object, **__: object) -> None:
        APART.begin(p)

    def process_before_every_sampling(self, p: object, *_: object, **__: object) -> None:
        APART.before_sampling(p)

    def postprocess_batch(self, p: object, *_: object, **__: object) -> None:
        APART.finish(p)


def on_ui_tabs() -> list:
    with gr.Blocks(analytics_enabled=False) as page:
        tab.build(host, page)
    return [(page, "Continual LoRA", "continual_lora")]


def on_app_started(_demo: object, app: object) -> None:
    if host.serves_api:
        api.add_routes(app, host)


script_callbacks.on_ui_settings(host.add_settings)
script_callbacks.on_ui_tabs(on_ui_tabs)
script_callbacks.on_app_started(on_app_started)
