"""What the tests' host programs have in common: a process that serves JSON over HTTP on a free
port.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comfy_continual_lora.cliprogress import STOPPING


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def heard() -> dict[str, Any]:
    """Arguments of a process that hears the signals that stop it, which `nohup` and shells have what
    they start ignore.
    """

    def hear() -> None:
        for one in STOPPING:
            signal.signal(one, signal.SIG_DFL)

    return {"preexec_fn": hear} if os.name == "posix" else {}


class Server:
    """`launch` runs a command on a free port and waits until it is ready; then get and post."""

    address: str
    log: Path
    process: subprocess.Popen[bytes]

    def launch(
        self,
        command: list[str],
        port: int,
        ready: Callable[[], bool],
        *,
        cwd: Path,
        env: dict[str, str],
    ) -> None:
        """Errors: RuntimeError with the end of the log when it ends or takes five minutes."""
        self.address = f"http://127.0.0.1:{port}"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env
            )
        deadline = time.monotonic() + 300
        while not ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"{command[1]} did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.5)

    def stop(self, *, kill: bool = False) -> None:
        (self.process.kill if kill else self.process.terminate)()
        self.process.wait(60)

    def answers(self, path: str) -> bool:
        try:
            self.get(path)
            return True
        except OSError:
            return False

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.address + path, timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: Any) -> Any:
        """Errors: RuntimeError with the status and the server's words."""
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{error.code} {error.read().decode()}") from None
