"""The API's routes on a server of our own: logins, refusals, the folder of pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("gradio")

from fastapi import FastAPI
from fastapi.testclient import TestClient

from comfy_continual_lora.webui import api
from comfy_continual_lora.webui.environment import NotReady
from comfy_continual_lora.webui.tab import Host


class Guarded(Host):
    def logins(self) -> dict[str, str]:
        return {"ann": "secret"}

    def python(self) -> str:
        raise NotReady("not prepared")


def _client(host: Host) -> TestClient:
    app = FastAPI()
    api.add_routes(app, host)
    return TestClient(app)


def test_logins_are_asked_for_and_a_missing_environment_is_told(checkpoint: Path, tmp_path: Path) -> None:
    client = _client(Guarded(checkpoint.parent, tmp_path / "work"))
    for login in (None, ("ann", "wrong"), ("bob", "secret"), ("", "")):
        assert client.get(f"{api.PREFIX}/jobs", auth=login).status_code == 401
        assert client.post(f"{api.PREFIX}/undo", json={}, auth=login).status_code == 401
    right = ("ann", "secret")
    assert client.get(f"{api.PREFIX}/jobs", auth=right).json() == {"job": None, "state": "idle"}
    answer = client.post(f"{api.PREFIX}/undo", json={"checkpoint": "mini.safetensors"}, auth=right)
    assert (answer.status_code, answer.json()["detail"]) == (503, "not prepared")


def test_pictures_come_from_the_hosts_folders_alone(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    host = Host(checkpoint.parent, tmp_path / "work")
    client = _client(host)
    inside = host.folder / "pictures" / "mine"
    inside.mkdir(parents=True)
    asked = {"checkpoint": "mini.safetensors", "token": "V1", "noun": "ball"}
    for folder, message in ((pictures, "outside"), (inside / ".." / ".." / "..", "outside"), (inside, "no pictures")):
        answer = client.post(f"{api.PREFIX}/learn", json={**asked, "images": str(folder)})
        assert answer.status_code == 422
        assert message in answer.json()["detail"]
