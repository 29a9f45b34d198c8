"""ComfyUI's entry point: a clone of this repository in custom_nodes is the node pack.

Nothing is imported before ComfyUI asks.
"""

WEB_DIRECTORY = "web"  # help pages


async def comfy_entrypoint():
    from .comfy_continual_lora.comfy_nodes import make_extension

    return make_extension()
