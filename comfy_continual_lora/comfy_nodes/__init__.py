"""Front end: ComfyUI nodes (V3 API).

Registering them imports nothing heavy of ours.

    nodes.py                          the table of nodes
    learning.py, using.py             the nodes: learn; draw and export
    asking.py                         the nodes: score and evaluate
    stacks.py, undoing.py             the nodes: load, forget, merge, import; undo and history
    schema.py, handle.py              how they are declared; what their wires carry
    host.py, words.py, mini.py        the interface to ComfyUI: files, progress, prompts, mini-SD
"""

from __future__ import annotations

import logging
from typing import Any


def make_extension() -> Any:
    """What ComfyUI's `comfy_entrypoint` has to return.

    ComfyUI would lose the traceback of an exception, so it is logged here.
    """
    try:
        from comfy_api.latest import ComfyExtension  # pyright: ignore[reportMissingImports] - only inside ComfyUI

        from .mini import offer_mini
        from .nodes import NODES

        class ContinualLora(ComfyExtension):
            async def get_node_list(self) -> list:
                offer_mini()  # not in on_load, which ComfyUI 0.8 does not call
                return NODES

        return ContinualLora()
    except Exception:
        logging.exception("comfy-continual-lora can't register its nodes")
        raise
