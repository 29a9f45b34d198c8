"""The extension in a real AUTOMATIC1111, found through WEBUI_PATH, else ~/stable-diffusion-webui."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers_browser import CHROMIUM
from helpers_learn import save_concept
from helpers_webui import (
    API,
    PLACE,
    WebUI,
    copies_of,
    drawn,
    find_webui,
    freeze,
    is_calm_without_a_model,
    keeps_things_apart,
    learn,
    learns_and_draws,
    learns_in_a_browser,
    until_it_learns,
)

from comfy_continual_lora import pipeline
from comfy_continual_lora.requests import InfoRequest

FOUND = find_webui()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        FOUND is None,
        reason="no AUTOMATIC1111 with a venv at WEBUI_PATH or ~/stable-diffusion-webui",
    ),
]


@pytest.fixture(scope="module")
def webui() -> Path:
    assert FOUND
    return FOUND


def test_what_is_learned_acts_in_txt2img_at_once(host: WebUI, pictures: Path) -> None:
    learns_and_draws(host, pictures)


def test_several_learned_things_in_one_prompt_are_kept_apart(host: WebUI, pictures: Path) -> None:
    keeps_things_apart(host, pictures)


def test_a_model_that_is_not_loaded_is_no_trouble(host: WebUI, pictures: Path) -> None:
    is_calm_without_a_model(host, pictures)


def test_the_web_uis_packages_are_what_they_were(host: WebUI, frozen: str) -> None:
    assert freeze(host.webui) == frozen


def test_the_same_stack_opens_on_the_command_line(host: WebUI, pictures: Path) -> None:
    host.post(f"{API}/learn", learn(pictures, "V1", "shared"))
    assert host.ended()["state"] == "done"
    stack = host.checkpoint.with_name("mini-sd.shared.concepts.safetensors")
    found = pipeline.info(InfoRequest(host.checkpoint, stack=stack))
    assert [one["token"] for one in found.concepts] == ["V1"]


def test_interrupt_stops_a_job_and_the_same_request_goes_on(host: WebUI, pictures: Path) -> None:
    request = learn(pictures, "V1", "stopped", steps=3000, snapshot_every=1)
    host.post(f"{API}/learn", request)
    until_it_learns(host)
    while "learn step" not in str(
        (shown := host.get("/sdapi/v1/progress?skip_current_image=true"))["textinfo"]
    ):
        time.sleep(0.1)
    assert 0 < shown["progress"] < 1
    with pytest.raises(RuntimeError, match="409"):
        host.post(f"{API}/undo", PLACE)
    host.post("/sdapi/v1/interrupt", {})
    assert host.ended()["state"] == "stopped"
    reached = host.get(f"{API}/jobs")["progress"]["step"]
    host.post(f"{API}/learn", request)
    assert until_it_learns(host)["progress"]["step"] > reached
    host.post(f"{API}/jobs/stop", {})
    assert host.ended()["state"] == "stopped"


def test_a_generation_queued_meanwhile_waits_and_the_web_ui_survives_the_workers_death(
    host: WebUI, pictures: Path
) -> None:
    host.post(f"{API}/learn", learn(pictures, "V1", "killed", steps=3000))
    until_it_learns(host)
    with ThreadPoolExecutor() as pool:
        generation = pool.submit(drawn, host, "a red ball")
        time.sleep(3)
        assert not generation.done()
        os.kill(_worker(host), signal.SIGKILL)
        job = host.ended()
        assert job["state"] == "failed"
        assert "resumes from the last snapshot" in job["message"]
        assert generation.result().std() > 1


def _worker(host: WebUI) -> int:
    """The process of the job under way."""
    children = [
        int(child)
        for task in Path(f"/proc/{host.process.pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    return next(
        pid
        for pid in children
        if b"comfy_continual_lora.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )


def test_mistakes_are_refused_in_words(host: WebUI, pictures: Path, tmp_path: Path) -> None:
    good = learn(pictures, "V1", "mistakes")
    host.post(f"{API}/learn", good)
    assert host.ended()["state"] == "done"
    broken = base64.b64encode(b"no picture").decode()
    host.post(f"{API}/learn", {**good, "token": "v1", "noun": "box"})
    assert "taken" in host.ended()["message"]
    for change, message in (
        ({"checkpoint": "../x"}, "no checkpoint"),
        ({"noun": " "}, "noun is missing"),
        ({"stack": "../up"}, "only letters"),
        ({"images": str(tmp_path)}, "outside the folders"),
        ({"images": ["?"]}, "not valid base64"),
        ({"settings": 3}, "an object"),
        ({"token": "V2", "images": [broken]}, "can't be read as an image"),
    ):
        with pytest.raises(RuntimeError, match=f"422.*{message}"):
            host.post(f"{API}/learn", {**good, **change})


def test_scores_evaluate_consolidate_and_forget(
    host: WebUI, pictures: Path, tmp_path: Path
) -> None:
    second = save_concept(tmp_path / "second", 1)
    for token, folder in (("V1", pictures), ("V2", second)):
        host.post(f"{API}/learn", learn(folder, token, "deeds"))
        assert host.ended()["state"] == "done"
    images = learn(second, "V2", "deeds")["images"]
    place = {**PLACE, "stack": "deeds"}
    for operation, body, key in (
        ("scores", {"images": images[:1], "settings": {"trials": 2}}, "images"),
        ("evaluate", {"settings": {"pictures": 1, "steps": 2, "trials": 2}}, "kept"),
        (
            "consolidate",
            {"images": images, "settings": {"dsc_steps": 2, "batch": 3, "fisher_samples": 3}},
            "losses",
        ),
        ("closed_form", {}, "rank"),
        ("export", {"only": ["V1"]}, "lora"),
        ("forget", {"token": "V1"}, "token"),
        ("undo", {}, "token"),
    ):
        host.post(f"{API}/{operation}", {**place, **body})
        job = host.ended()
        assert job["state"] == "done", job
        assert job["results"][operation][key]
    where = "checkpoint=mini-sd.safetensors&stack=deeds"
    learned = host.get(f"{API}/concepts?{where}")
    assert [concept["token"] for concept in learned] == ["V1", "V2"]  # forgetting was undone
    forgot = next(
        one for one in host.get(f"{API}/history?{where}") if one["change"].startswith("forgot")
    )
    host.post(f"{API}/restore", {**place, "version": forgot["number"]})
    assert host.ended()["results"]["restore"]["tokens"] == ["V2"]
    assert copies_of(host, "deeds") == []


def test_no_option_chooses_a_program_or_opens_a_folder(
    host: WebUI, pictures: Path, tmp_path: Path
) -> None:
    """As a hostile page would: the options route asks for no login and no content type."""
    script, mark = tmp_path / "x.sh", tmp_path / "ran"
    script.write_text(f"#!/bin/sh\ntouch {mark}\nexit 1\n")
    script.chmod(0o755)
    for name, value in (("continual_lora_python", str(script)), ("continual_lora_folders", "/")):
        with contextlib.suppress(RuntimeError):
            host.post("/sdapi/v1/options", {name: value})
    host.post(f"{API}/learn", learn(pictures, "V1", "options"))
    assert host.ended()["state"] == "done"
    assert not mark.exists()
    with pytest.raises(RuntimeError, match=r"422.*outside the folders"):
        host.post(f"{API}/learn", {**learn(pictures, "V2", "options"), "images": str(pictures)})


_BUILD = """
import json, sys, tempfile
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import gradio
from comfy_continual_lora.webui import host, tab
folder = Path(tempfile.mkdtemp())
with gradio.Blocks(analytics_enabled=False) as page:
    tab.build(host.Host(folder, folder), page)
with gradio.Blocks(analytics_enabled=False) as demo:
    page.render()
demo.queue()
folder.rmdir()
print(json.dumps([demo.queue_enabled_for_fn(n) for n in range(len(demo.dependencies))]))
"""


def test_no_event_of_the_page_holds_a_websocket(webui: Path) -> None:
    """gradio 3 waits for ever for that of a page that was left early, and Reload UI for gradio."""
    python = webui / "venv" / "bin" / "python"
    command = [str(python), "-c", _BUILD, str(Path(__file__).parents[1])]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    queued = json.loads(run.stdout.splitlines()[-1])
    assert len(queued) > 50
    assert not any(queued)


def _reload_ui(host: WebUI) -> None:
    """Press Reload UI by a plain request: the web UI waits for ever for the websocket of a page
    that was left too early, whatever extensions it has.
    """
    page = host.get("/config")
    (button,) = (
        part["id"]
        for part in page["components"]
        if part["props"].get("elem_id") == "settings_restart_gradio"
    )
    (event,) = (
        number
        for number, asked in enumerate(page["dependencies"])
        if (asked["targets"], asked["trigger"]) == ([button], "click")
    )
    host.post("/run/predict", {"fn_index": event, "data": [], "session_hash": "reload"})


def test_reload_ui_leaves_a_job_alone_and_interrupt_stops_it(host: WebUI, pictures: Path) -> None:
    host.post(f"{API}/learn", learn(pictures, "V1", "reloaded", steps=100_000))
    before = until_it_learns(host)["progress"]["step"]
    starts = host.log.read_text().count("Startup time")
    _reload_ui(host)
    deadline = time.monotonic() + 120
    # a request before it says so makes it fail, as at its start
    while host.log.read_text().count("Startup time") == starts or not host.answers(f"{API}/jobs"):
        assert time.monotonic() < deadline, "the web UI does not come back"
        time.sleep(0.5)
    job = host.get(f"{API}/jobs")
    assert job["state"] == "running", job
    assert job["progress"]["step"] > before
    host.post("/sdapi/v1/interrupt", {})
    assert host.ended()["state"] == "stopped"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_tab_learns_from_a_browser(host: WebUI, pictures: Path, tmp_path: Path) -> None:
    learns_in_a_browser(host, pictures, tmp_path / "a1111.png")


def test_the_worker_ends_with_the_web_ui(host: WebUI, pictures: Path) -> None:
    host.post(f"{API}/learn", learn(pictures, "V1", "ended", steps=100_000))
    until_it_learns(host)
    worker = _worker(host)
    host.stop(kill=True)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < deadline, "the worker goes on without the web UI"
        time.sleep(0.2)
    host.start()
    host.post(f"{API}/learn", learn(pictures, "V1", "ended", steps=100_000))
    assert until_it_learns(host)["progress"]["step"] > 1  # from the snapshot
    host.post(f"{API}/jobs/stop", {})
    assert host.ended()["state"] == "stopped"
