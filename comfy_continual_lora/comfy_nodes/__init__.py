"""Front end: ComfyUI nodes (V3 API).

Registering them imports nothing heavy of ours; nodes.py has the nodes, host.py what they need of
ComfyUI.
"""

from __future__ import annotations

import logging
from typing import Any


def make_extension() -> Any:
    """What ComfyUI's `comfy_entrypoint` has to return.

    An exception in there would lose its traceback, so it is logged here.
    """
    try:
        from comfy_api.latest import ComfyExtension  # pyright: ignore[reportMissingImports] - only inside ComfyUI

        from . import host
        from .nodes import NODES

        class ContinualLora(ComfyExtension):
            async def get_node_list(self) -> list:
                host.offer_mini()  # not in on_load, which ComfyUI 0.8 does not call
                return NODES

        return ContinualLora()
    except Exception:
        logging.exception("comfy-continual-lora can't register its nodes")
        raise
