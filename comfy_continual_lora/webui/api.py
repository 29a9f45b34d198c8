"""/continual-lora/v1/...: the tab's deeds as plain JSON, on the web UI's own server. Paths outside the host's picture folders are refused.

    GET  concepts?checkpoint=NAME&stack=NAME     the stack's concepts
    GET  jobs                                    the job under way, or the last one
    POST jobs/stop                               stop it between two steps
    POST learn        {checkpoint, images, token, noun, settings, stack}         -> {"job": number}; it is exported too
    POST consolidate  {checkpoint, images, settings, stack}
    POST scores       {checkpoint, images, settings, stack}
    POST evaluate     {checkpoint, settings, stack}
    POST export       {checkpoint, stack, only}      only: words, for a LoRA solved for these alone
    POST undo         {checkpoint, stack}

images: PNG or JPEG files in base64 (with or without "data:...;base64,"), or the path of a folder. Answers 409 while another job runs, 422 for a
request that can't be meant; how a job ended is in GET jobs.
"""

from __future__ import annotations

import base64
import binascii
import secrets
import tempfile
import time
from pathlib import Path
from typing import Any

from fastapi import Body, Depends, FastAPI, HTTPException
from fastapi.security import HTTPBasic, HTTPBasicCredentials

from ..files import PICTURES
from .environment import NotReady
from .job import Busy, Job
from .tab import Host, concepts_of, export_job, keep_pictures, stack_file, status

PREFIX = "/continual-lora/v1"


def add_routes(app: FastAPI, host: Host) -> None:
    """Put the routes on the web UI's server, behind its API's logins if it has any."""
    logins = host.logins()

    def login(given: HTTPBasicCredentials = Depends(HTTPBasic())) -> None:  # noqa: B008 - FastAPI's way
        if not secrets.compare_digest(given.password.encode(), logins.get(given.username, secrets.token_hex()).encode()):
            raise HTTPException(401, "Incorrect username or password", {"WWW-Authenticate": "Basic"})

    guard = [Depends(login)] if logins else []

    def where(body: dict[str, Any]) -> dict[str, str]:
        known = host.checkpoints()
        name = str(body.get("checkpoint", ""))
        if name not in known:
            raise HTTPException(422, f"There is no checkpoint {name!r}. Known: {', '.join(known) or 'none'}.")
        try:
            return {"checkpoint": str(known[name]), "stack": str(stack_file(known[name], str(body.get("stack") or "")))}
        except ValueError as error:
            raise HTTPException(422, str(error)) from None

    def start(*jobs: tuple[str, dict[str, Any]]) -> dict[str, Any]:
        try:
            host.python()
            return {"job": host.desk.start(*jobs).number}
        except Busy as error:
            raise HTTPException(409, str(error)) from None
        except NotReady as error:
            raise HTTPException(503, str(error)) from None

    def concepts(checkpoint: str, stack: str = "") -> list[dict[str, Any]]:
        try:
            return concepts_of(Path(where({"checkpoint": checkpoint, "stack": stack})["stack"]))
        except ValueError as error:
            raise HTTPException(422, str(error)) from None

    def jobs() -> dict[str, Any]:
        return _told(host.desk.job)

    def stop() -> dict[str, Any]:
        if host.desk.job and not host.desk.job.wait(0):
            host.desk.job.stop()
        return _told(host.desk.job)

    def learn(body: dict = Body(...)) -> dict[str, Any]:  # noqa: B008
        place, settings = where(body), _settings(body)
        for name in ("token", "noun"):
            if not str(body.get(name) or "").strip():
                raise HTTPException(422, f"{name} is missing or empty.")
        request = {**place, "images": _images(body, host), "token": body["token"].strip(), "noun": body["noun"].strip(), "settings": settings}
        return start(("learn", request), export_job(host, place))

    def consolidate(body: dict = Body(...)) -> dict[str, Any]:  # noqa: B008
        place = where(body)
        return start(("consolidate", {**place, "images": _images(body, host), "settings": _settings(body)}), export_job(host, place))

    def closed_form(body: dict = Body(...)) -> dict[str, Any]:  # noqa: B008
        place = where(body)
        return start(("closed_form", {**place, "settings": _settings(body)}), export_job(host, place))

    def forget(body: dict = Body(...)) -> dict[str, Any]:  # noqa: B008
        if not str(body.get("token") or "").strip():
            raise HTTPException(422, "token is missing or empty.")
        return start(("forget", {**where(body), "token": body["token"].strip(), "settings": _settings(body)}))

    def scores(body: dict = Body(...)) -> dict[str, Any]:  # noqa: B008
        return start(("scores", {**where(body), "images": _images(body, host), "settings": _settings(body), "out": _charts(host)}))

    def evaluate(body: dict = Body(...)) -> dict[str, Any]:  # noqa: B008
        return start(("evaluate", {**where(body), "settings": _settings(body), "out": _charts(host)}))

    def export(body: dict = Body(...)) -> dict[str, Any]:  # noqa: B008
        only = body.get("only") or []
        if not isinstance(only, list):
            raise HTTPException(422, "only is no list of words.")
        return start(export_job(host, where(body), [str(word) for word in only]))

    def undo(body: dict = Body(...)) -> dict[str, Any]:  # noqa: B008
        return start(("undo", where(body)))

    for route in (concepts, jobs):
        app.add_api_route(f"{PREFIX}/{route.__name__}", route, methods=["GET"], dependencies=guard)
    app.add_api_route(f"{PREFIX}/jobs/stop", stop, methods=["POST"], dependencies=guard)
    for deed in (learn, consolidate, closed_form, forget, scores, evaluate, export, undo):
        app.add_api_route(f"{PREFIX}/{deed.__name__}", deed, methods=["POST"], dependencies=guard)


def _told(job: Job | None) -> dict[str, Any]:
    if job is None:
        return {"job": None, "state": "idle"}
    told = {"job": job.number, "name": job.name, "state": job.state, "message": job.message, "text": status(job)}
    return {**told, "progress": job.progress, "results": job.results}


def _settings(body: dict[str, Any]) -> dict[str, Any]:
    settings = body.get("settings") or {}
    if not isinstance(settings, dict):
        raise HTTPException(422, 'settings has to be an object, such as {"steps": 500}.')
    return settings


def _charts(host: Host) -> str:
    return str(host.folder / "charts" / f"{time.time_ns():x}")


def _images(body: dict[str, Any], host: Host) -> list[str]:
    """Paths of the pictures that are meant."""
    given = body.get("images")
    if isinstance(given, str):
        folder, allowed = Path(given).resolve(), [one.resolve() for one in host.picture_folders()]
        if not any(folder.is_relative_to(one) for one in allowed):
            raise HTTPException(422, f"{given} is outside the folders the API may read: {', '.join(map(str, allowed))}.")
        found = sorted(str(p) for p in folder.glob("*") if p.suffix.lower() in PICTURES and not p.stem.endswith(".mask"))
        if not found:
            raise HTTPException(422, f"There are no pictures in {given}.")
        return found
    if not isinstance(given, list) or not given:
        raise HTTPException(422, "images has to be a list of pictures in base64, or the path of a folder.")
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, one in enumerate(given):
            try:
                data = base64.b64decode(str(one).split(",", 1)[-1], validate=True)
            except binascii.Error:
                raise HTTPException(422, f"Picture {number} is no base64.") from None
            files.append(Path(folder) / f"{number:03d}.png")
            files[-1].write_bytes(data)
        return [str(p) for p in keep_pictures(files, [], host.folder / "pictures")]
