"""Front end: ComfyUI nodes (V3 API). The pack loads in ComfyUI; it registers no nodes yet."""

from __future__ import annotations

from typing import Any


def make_extension() -> Any:
    """What ComfyUI's `comfy_entrypoint` has to return."""
    from comfy_api.latest import ComfyExtension  # pyright: ignore[reportMissingImports] - only inside ComfyUI

    class ContinualLora(ComfyExtension):
        async def get_node_list(self) -> list:
            return []

    return ContinualLora()
