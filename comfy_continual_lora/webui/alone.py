"""The standalone tab, `continual-lora ui`: a page for this machine that no other site can access.

A malicious site open in the same browser can reach every server on this machine: with forms and
requests whose responses it can't read, and through DNS rebinding with readable ones too.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import gradio as gr
from starlette.middleware import Middleware

from ..files import OWN_FOLDER
from .host import Host, leave
from .tab import build

NAMES = ("127.0.0.1", "localhost", "::1")
_DAY = 86_400


class OwnPagesOnly:
    """ASGI middleware: refuses requests that do not name this machine as host, or that come from
    another site's page.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or (
            scope["type"] == "http" and is_own(scope["method"], scope["headers"])
        ):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await send(
                {
                    "type": "http.response.start",
                    "status": 403,
                    "headers": [(b"content-type", b"text/plain")],
                }
            )
            await send(
                {
                    "type": "http.response.body",
                    "body": b"This page is for this machine, at 127.0.0.1 or localhost.",
                }
            )
        else:
            await send({"type": "websocket.close", "code": 1008})  # the tab opens none


def is_own(method: str, headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether a request comes from our own page or directly from the user. Browsers since 2023 send
    the headers that tell.
    """
    pairs = [(name.lower().decode("latin-1"), value.decode("latin-1")) for name, value in headers]
    sent = dict(pairs)
    host, origin = sent.get("host", ""), sent.get("origin")
    if len([name for name, _ in pairs if name == "host"]) != 1 or _name(host) not in NAMES:
        return False
    if origin is not None and origin.lower() not in (
        f"http://{host}".lower(),
        f"https://{host}".lower(),
    ):
        return False
    if sent.get("sec-fetch-site", "none") in ("none", "same-origin"):
        return True
    # following a link to the page, which opens it as a document, is allowed
    return method == "GET" and sent.get("sec-fetch-dest") == "document"


def _name(host: str) -> str | None:
    try:
        parts = urlsplit(f"//{host}")
        parts.port  # noqa: B018 - raises if it is not a number
        return parts.hostname if not parts.path and parts.username is None else None
    except ValueError:
        return None


def launch(models: Path, port: int | None, browser: bool) -> None:
    """Serve the tab for the checkpoints of a folder, until Ctrl-C.

    Errors: OSError, Gradio's own, without a number, for a port that can't be used.
    """
    host = Host(models, models / OWN_FOLDER)
    with gr.Blocks(title="Continual LoRA", delete_cache=(3600, _DAY)) as page:
        gr.Markdown(
            "# Continual LoRA\nTeach a checkpoint one thing after another, without old pictures "
            "and without forgetting."
        )
        build(host, page)
    page.queue().launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        inbrowser=browser,
        allowed_paths=[str(folder.resolve()) for folder in host.exports()],
        app_kwargs={"middleware": [Middleware(OwnPagesOnly)]},
        prevent_thread_lock=True,
    )
    print("Press Ctrl-C to end it.", flush=True)
    with suppress(KeyboardInterrupt):
        threading.Event().wait()
    _leave(host)


def _leave(host: Host) -> NoReturn:
    """End this process at once: the server would wait for open pages. A job's worker finishes its
    step, keeps what was learned and ends by itself.
    """
    if host.runner.is_busy:
        print("A job was running. What it learned so far is kept; the same request resumes it.")
    leave()
    sys.stdout.flush()
    os._exit(0)
