"""The API's routes on a server of our own: logins, what a request has to be, the folders of
pictures, what is left on disk.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from comfy_continual_lora import upkeep
from comfy_continual_lora.inventory import inventory
from comfy_continual_lora.operations import OPERATIONS
from comfy_continual_lora.requests import parse
from comfy_continual_lora.webui import api
from comfy_continual_lora.webui.environment import NotReady
from comfy_continual_lora.webui.host import Host
from comfy_continual_lora.webui.job import Job

POSTS = (
    "learn",
    "consolidate",
    "closed_form",
    "forget",
    "scores",
    "evaluate",
    "export",
    "undo",
    "restore",
    "jobs/stop",
)
WHERE = {"checkpoint": "mini.safetensors"}
JSON = {"content-type": "application/json"}


class Guarded(Host):
    def logins(self) -> dict[str, str] | None:
        return {"ann": "secret"}

    def python(self) -> str:
        raise NotReady("not prepared")


class Closed(Host):
    def logins(self) -> dict[str, str] | None:
        return {}


def _client(host: Host) -> TestClient:
    app = FastAPI()
    api.add_routes(app, host)
    return TestClient(app)


@pytest.fixture
def host(checkpoint: Path, tmp_path: Path) -> Iterator[Host]:
    """One whose worker is not a Python, so that its jobs fail at once."""
    host = Host(checkpoint.parent, tmp_path / "work")
    host.runner.python = lambda: os.devnull
    yield host
    if host.runner.job:
        host.runner.job.fail("over")


def _encoded(color: str = "red") -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _files(folder: Path) -> list[Path]:
    """Files in the folder, which need not exist, but for locks."""
    return [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]


def test_a_login_is_required_and_a_missing_environment_is_reported(
    checkpoint: Path, tmp_path: Path
) -> None:
    client = _client(Guarded(checkpoint.parent, tmp_path / "work"))
    for login in (None, ("ann", "wrong"), ("bob", "secret"), ("", ""), ("ann", ""), ("", "secret")):
        assert client.get(f"{api.PREFIX}/jobs", auth=login).status_code == 401
        for path in POSTS:
            assert client.post(f"{api.PREFIX}/{path}", json={}, auth=login).status_code == 401
    right = ("ann", "secret")
    assert client.get(f"{api.PREFIX}/jobs", auth=right).json() == {"job": None, "state": "idle"}
    body = {**WHERE, "images": [_encoded()], "token": "V1", "noun": "ball"}
    answer = client.post(f"{api.PREFIX}/learn", json=body, auth=right)
    assert (answer.status_code, answer.json()["detail"]) == (503, "not prepared")
    assert not _files(tmp_path / "work")


def test_stop_starts_none_of_those_that_wait(host: Host) -> None:
    host.runner.job = Job(1, [("learn", {"token": "V1"})])
    host.waiting = [([("learn", {"token": "V2"})], None)]
    for _ in range(2):
        answer = _client(host).post(f"{api.PREFIX}/jobs/stop", json={})
        assert (answer.status_code, answer.json()["job"]) == (200, 1)
    assert host.waiting == []


def test_the_pages_own_exports_are_no_checkpoints(host: Host, checkpoint: Path) -> None:
    models = checkpoint.parent
    own = Host(models, models / "continual-lora")
    for folder in {*own.exports(), own.drawn()}:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(checkpoint, folder / "V1.safetensors")
    inner = models / "more" / "sd.safetensors"
    inner.parent.mkdir()
    shutil.copy(checkpoint, inner)
    expected = [checkpoint, inner]
    assert sorted(own.checkpoints().values()) == expected
    assert [row.checkpoint for row in upkeep.stacks_in(models).rows] == expected


def test_logins_that_name_nobody_let_nobody_in(checkpoint: Path, tmp_path: Path) -> None:
    client = _client(Closed(checkpoint.parent, tmp_path / "work"))
    for login in (None, ("", ""), ("", "secret"), ("ann", "secret")):
        assert client.get(f"{api.PREFIX}/jobs", auth=login).status_code == 401
        assert client.post(f"{api.PREFIX}/jobs/stop", json={}, auth=login).status_code == 401


@pytest.mark.parametrize("path", POSTS)
def test_a_post_is_a_json_object_sent_as_one(host: Host, path: str) -> None:
    client, address = _client(host), f"{api.PREFIX}/{path}"
    for kind in (
        None,
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "application/jsonp",
        "text/json; application/json",
    ):
        headers = {} if kind is None else {"content-type": kind}
        answer = client.post(address, content=json.dumps(WHERE), headers=headers)
        assert answer.status_code == 415
    for body in (
        b"",
        b"{",
        b"[]",
        b"null",
        b"5",
        b'"x"',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff",
        b"{}{}",
    ):
        answer = client.post(address, content=body, headers=JSON)
        assert answer.status_code == 422
    assert host.runner.job is None
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    answer = client.post(address, content=b"{}", headers=headers)
    assert answer.status_code == (200 if path == "jobs/stop" else 422)


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint": 5},
        {"checkpoint": "\ud800"},
        {"checkpoint": ["mini.safetensors"]},
        {"checkpoint": "../mini.safetensors"},
        {"stack": "../x"},
        {"stack": 5},
        {"stack": "\ud800"},
        {"stack": {}},
        {"stack": "a\0"},
        {"stack": "x" * 65},
        {"token": 5},
        {"token": " "},
        {"token": None},
        {"noun": ["ball"]},
        {"noun": ""},
        {"settings": []},
        {"settings": 3},
        {"settings": {"stepz": 3}},
        {"settings": {"steps": "many"}},
        {"settings": {"steps": 0}},
        {"settings": {"rate": [1]}},
        {"settings": {"method": "magic"}},
        {"settings": {"\ud800": 1}},
        {"settings": {"flip": "yes"}},
        {"settings": {"steps": True}},
        {"settings": {"rate": float("nan")}},
        {"replace": "yes"},
        {"replace": 1},
        {"images": None},
        {"images": []},
        {"images": [5]},
        {"images": ["?"]},
        {"images": [[]]},
        {"images": {"0": "x"}},
        {"images": 5},
        {"images": ["data:image/png;base64,"]},
        {"images": [base64.b64encode(b"no picture").decode()]},
        {"images": ["\ud800"]},
        {"images": "\0"},
        {"images": "x" * 5000},
        {"images": "\ud800"},
        {"images": "/"},
        {"images": ""},
        {"images": ".."},
        {"images": "~"},
    ],
)
def test_an_invalid_request_is_refused_and_leaves_nothing(
    host: Host, change: dict[str, Any]
) -> None:
    body = {
        **WHERE,
        "images": [_encoded()],
        "token": "V1",
        "noun": "ball",
        "settings": {"steps": 5},
        "stack": "x",
        **change,
    }
    # as text, since not every value here can be sent as JSON by the client itself
    answer = _client(host).post(f"{api.PREFIX}/learn", content=json.dumps(body), headers=JSON)
    assert answer.status_code == 422, answer.text
    assert isinstance(answer.json()["detail"], str)
    assert host.runner.job is None
    assert not _files(host.folder)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("export", {"only": "V1"}, "only is 'V1'; it has to be a list of strings"),
        ("export", {"remove_superseded": "yes"}, "remove_superseded is 'yes'"),
        ("undo", {"version": "3"}, "version is '3'; it has to be a whole number"),
        ("restore", {}, "version is missing"),
        ("evaluate", {"settings": {"pictures": 0}}, "pictures is 0; the range is 1 to"),
        ("closed_form", {"settings": {"energy": 2}}, "energy is 2"),
        ("closed_form", {"settings": {"energy": "0.9"}}, "energy is '0.9'; it has to be a number"),
        ("closed_form", {"settings": {"energi": 0.9}}, "no setting 'energi'. Did you mean energy?"),
        ("closed_form", {"setings": {}}, "no field 'setings'. Did you mean settings?"),
        ("forget", {"token": "V1", "device": "cpu"}, "no field 'device'. There are: checkpoint,"),
        ("learn", {"plot": "/x.png"}, "no field 'plot'"),
        ("undo", {"version": 10**400}, "version is 1000"),
        ("restore", {"version": True}, "version is True; it has to be a whole number"),
    ],
)
def test_fields_are_named_as_in_json(
    host: Host, path: str, body: dict[str, Any], message: str
) -> None:
    answer = _client(host).post(f"{api.PREFIX}/{path}", json={**WHERE, **body})
    assert (answer.status_code, message in answer.json()["detail"]) == (422, True), answer.text
    assert host.runner.job is None


def test_a_name_that_occurs_twice_is_refused(host: Host) -> None:
    body = b'{"checkpoint": "mini.safetensors", "token": "V1", "token": "V2"}'
    answer = _client(host).post(f"{api.PREFIX}/forget", content=body, headers=JSON)
    assert (answer.status_code, "occurs twice" in answer.json()["detail"]) == (422, True)


def test_a_value_may_be_nested_as_deeply_as_json_can_be(host: Host) -> None:
    """Parsing it may work where showing it would not."""
    client = _client(host)
    for depth in range(500, 1000, 25):
        nested = "[" * depth + "]" * depth
        for body in (
            f'{{"checkpoint": {nested}}}',
            f'{{"checkpoint": "mini.safetensors", "settings": {{"energy": {nested}}}}}',
        ):
            answer = client.post(f"{api.PREFIX}/closed_form", content=body, headers=JSON)
            assert answer.status_code == 422
            assert len(answer.json()["detail"]) < 300


@pytest.mark.parametrize("path", ["concepts", "history", "jobs"])
def test_a_get_knows_its_fields_too(host: Host, path: str) -> None:
    answer = _client(host).get(f"{api.PREFIX}/{path}", params={**WHERE, "stak": "x"})
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("There is no field")


def test_a_get_without_a_checkpoint_says_so(host: Host) -> None:
    answer = _client(host).get(f"{api.PREFIX}/concepts")
    assert (answer.status_code, answer.json()["detail"]) == (
        422,
        "There is no checkpoint ''. Known: mini.safetensors.",
    )


@pytest.mark.parametrize(
    ("path", "chosen", "job"),
    [
        ("learn", {"replace": True, "settings": {"steps": 5}}, "learn"),
        ("learn", {}, "learn"),
        ("export", {"only": ["V1"], "remove_superseded": True}, "export"),
        ("undo", {"version": 3}, "undo"),
        ("restore", {"version": 3}, "restore"),
        ("closed_form", {"settings": {"energy": 0.9}}, "closed_form"),
        ("forget", {"settings": {"rank": 4}}, "forget"),
        ("evaluate", {"settings": {"pictures": 1}}, "evaluate"),
        ("scores", {"settings": {"trials": 1}}, "scores"),
        ("consolidate", {"settings": {"dsc_steps": 1}}, "consolidate"),
    ],
)
def test_what_is_asked_for_reaches_the_worker(
    host: Host, path: str, chosen: dict[str, Any], job: str
) -> None:
    thing = {"images": [_encoded()], "token": "V1", "noun": "ball"}
    required = {"learn": tuple(thing), "forget": ("token",), "scores": ("images",)}
    required["consolidate"] = ("images",)
    body = {**WHERE, **{name: thing[name] for name in required.get(path, ())}, **chosen}
    answer = _client(host).post(f"{api.PREFIX}/{path}", json=body)
    assert answer.status_code == 200, answer.text
    assert host.runner.job
    name, request = host.runner.job.jobs[0]
    assert name == job
    assert {key: request[key] for key in chosen} == chosen
    followed = [name for name, _ in host.runner.job.jobs[1:]]
    assert followed == (["export"] if path in ("learn", "consolidate", "closed_form") else [])
    for name, request in host.runner.job.jobs:
        parse(OPERATIONS[name].request, request)


def test_what_was_learned_is_reported_if_the_export_fails(host: Host) -> None:
    client = _client(host)
    job = Job(4, [("learn", {}), ("export", {})])
    job.results = {"learn": {"token": "V1", "noun": "ball", "losses": [], "again": False}}
    job.fail("out can't be written")
    host.runner.job = job
    answer = client.get(f"{api.PREFIX}/jobs").json()
    assert (answer["state"], answer["failed"]) == ("failed", "export")
    assert answer["results"]["learn"]["token"] == "V1"
    for words in ("Learned V1 ball", "is stored", "export failed", "out can't be written"):
        assert words in answer["text"]


def test_the_api_needs_no_gradio() -> None:
    code = (
        "import sys; sys.modules['gradio'] = None; "
        "from comfy_continual_lora.webui import api; "
        "sys.exit(str({'torch', 'diffusers', 'transformers'} & set(sys.modules) or ''))"
    )
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert result.stderr.strip() == ""


def test_copies_are_there_while_the_job_runs_and_not_after_it(host: Host, tmp_path: Path) -> None:
    client, seen = _client(host), tmp_path / "seen"
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\nfind {host.folder} -name 'picture*' > {seen}\nexec sleep 100\n")
    script.chmod(0o755)
    host.runner.python = lambda: str(script)
    body = {
        **WHERE,
        "images": [_encoded("red"), "data:image/png;base64," + _encoded("blue")],
        "token": "V1",
        "noun": "ball",
    }
    assert client.post(f"{api.PREFIX}/learn", json=body).status_code == 200
    busy = client.post(f"{api.PREFIX}/learn", json={**body, "images": [_encoded("green")]})
    assert busy.status_code == 409
    while not seen.exists() or not seen.read_text():
        pass
    assert len(seen.read_text().splitlines()) == 2
    assert len(_files(host.folder)) == 3
    assert host.runner.job
    host.runner.job.fail("killed")
    assert not _files(host.folder)


def test_captions_and_masks_come_with_their_pictures(host: Host, checkpoint: Path) -> None:
    client = _client(host)
    checkpoint.with_name("mini.concepts.V1.0123.snapshot").touch()  # so that the copies stay
    body = {**WHERE, "images": [_encoded(), _encoded("blue")], "token": "V1", "noun": "ball"}
    chosen = {"captions": ["a V1 ball\non grass", None], "masks": [None, _encoded("white")]}
    assert client.post(f"{api.PREFIX}/learn", json={**body, **chosen}).status_code == 200
    assert host.runner.job
    assert host.runner.job.wait(10)
    found = inventory(host.runner.job.jobs[0][1]["images"])
    assert found.summary() == "2 pictures, 1 caption (.txt), 1 mask"
    assert [picture.caption for picture in found.pictures] == ["a V1 ball on grass", None]
    assert [bool(picture.mask) for picture in found.pictures] == [False, True]
    for wrong, message in (
        ({"captions": ["one"]}, "Got 1 caption for 2 pictures"),
        ({"captions": "one"}, "captions has to be a list"),
        ({"captions": [1, 2]}, "captions has to be a list"),
        ({"captions": ["\ud800", None]}, "The caption of picture 1 contains"),
        ({"masks": [None, "?"]}, "The mask of picture 2 is not valid base64"),
        ({"masks": [None, "AAAA"]}, "The mask of picture 2 can't be read"),
        ({"masks": {}}, "masks has to be a list"),
        ({"images": "pictures", "masks": [_encoded()]}, "beside its pictures"),
    ):
        content = json.dumps({**body, **wrong})  # which escapes half a character
        answer = client.post(f"{api.PREFIX}/learn", content=content, headers=JSON)
        assert (answer.status_code, message in answer.json()["detail"]) == (422, True), wrong


def test_copies_stay_while_a_snapshot_needs_them(host: Host, checkpoint: Path) -> None:
    client = _client(host)
    snapshot = checkpoint.with_name("mini.x.concepts.V1.0123.snapshot")
    snapshot.touch()
    body = {**WHERE, "stack": "x", "images": [_encoded()], "token": "V1", "noun": "ball"}
    client.post(f"{api.PREFIX}/learn", json=body)
    assert host.runner.job
    assert host.runner.job.wait(10)
    assert [p.name for p in sorted(_files(host.folder))] == ["picture 1", "of.json"]
    snapshot.unlink()
    client.post(f"{api.PREFIX}/undo", json=WHERE)
    assert host.runner.job.wait(10)
    assert not _files(host.folder)


def test_pictures_come_from_the_hosts_folders_alone(
    host: Host, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = _client(host)
    inside = host.folder / "pictures" / "mine"
    inside.mkdir(parents=True)
    (inside / "out").symlink_to(pictures)
    body = {**WHERE, "token": "V1", "noun": "ball"}
    for folder, message in (
        (pictures, "outside"),
        (inside / ".." / ".." / "..", "outside"),
        (inside / "out", "outside"),
        (inside, "No pictures"),
    ):
        answer = client.post(f"{api.PREFIX}/learn", json={**body, "images": str(folder)})
        assert answer.status_code == 422
        assert message in answer.json()["detail"]
    folders = os.pathsep.join([str(inside / "none"), str(pictures)])
    monkeypatch.setenv("CONTINUAL_LORA_FOLDERS", folders)
    answer = client.post(f"{api.PREFIX}/learn", json={**body, "images": str(pictures)})
    assert answer.status_code == 200
    assert not _files(host.folder)


def test_what_a_strangers_stack_holds_can_be_sent(host: Host, checkpoint: Path) -> None:
    """A header with half a character and with NaN for a number: refused in words, or sent as
    JSON.
    """
    concept = {
        "token": "\ud800",
        "noun": "<b>",
        "with_noun": True,
        "preview": None,
        "learned": "x",
        "method": "lora",
        "steps": float("nan"),
        "images": 1,
    }
    stack = json.dumps({"concepts": [concept]})
    header = json.dumps({"__metadata__": {"format": "x", "stack": stack}}).encode()
    file = checkpoint.with_name("mini.concepts.safetensors")
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    answer = _client(host).get(f"{api.PREFIX}/concepts", params=WHERE)
    assert answer.status_code in (200, 422)
    answer.json()
