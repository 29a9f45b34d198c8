"""The extension in a real AUTOMATIC1111, found through WEBUI_PATH, else ~/stable-diffusion-webui."""

from __future__ import annotations

import base64
import io
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CHROMIUM, page
from conftest import save_concept
from PIL import Image
from webui import WebUI, find_webui

from comfy_continual_lora import pipeline

FOUND = find_webui()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOUND is None, reason="no AUTOMATIC1111 with a venv at WEBUI_PATH or ~/stable-diffusion-webui"),
]
API = "/continual-lora/v1"
QUICK = {"method": "lora", "steps": 6, "batch": 2, "rank": 4}
PLACE = {"checkpoint": "mini-sd.safetensors"}


@pytest.fixture(scope="module")
def frozen() -> str:
    """What is installed in the web UI before anything of ours."""
    assert FOUND
    return _freeze(FOUND)


def _freeze(webui: Path) -> str:
    return subprocess.run([str(webui / "venv" / "bin" / "python"), "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, frozen: str) -> Iterator[WebUI]:
    assert FOUND
    server = WebUI(FOUND, tmp_path_factory.mktemp("webui"))
    yield server
    server.stop()


def learn(pictures: Path, token: str, stack: str, **settings: Any) -> dict[str, Any]:
    images = [base64.b64encode(p.read_bytes()).decode() for p in sorted(pictures.glob("*.png"))]
    return {**PLACE, "images": images, "token": token, "noun": "ball", "stack": stack, "settings": {**QUICK, **settings}}


def drawn(host: WebUI, prompt: str) -> np.ndarray:
    asked = {"prompt": prompt, "seed": 1, "steps": 6, "width": 128, "height": 128, "cfg_scale": 4, "sampler_name": "DDIM"}
    answer = host.post("/sdapi/v1/txt2img", asked)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))).convert("RGB"), int)


def test_what_is_learned_acts_in_txt2img_at_once(host: WebUI, pictures: Path) -> None:
    """Without a restart, and with the model loaded before: the LoRA changes the picture, the word changes it too, and the web UI's model is back."""
    before = drawn(host, "a photo of a V1 ball")
    host.post(f"{API}/learn", learn(pictures, "V1", "", rate=0.01, token_rate=0.05, steps=20))
    job = host.ended()
    assert job["state"] == "done", job
    lora = Path(job["results"]["export"]["lora"])
    assert lora.parent == host.data / "models" / "Lora"
    assert lora.with_suffix(".json").exists()
    with_word = drawn(host, "a photo of a V1 ball")
    with_both = drawn(host, f"a photo of a V1 ball <lora:{lora.stem}:1>")
    assert np.abs(with_word - before).mean() > 1
    assert np.abs(with_both - with_word).mean() > 1
    assert [one["token"] for one in host.get(f"{API}/concepts?checkpoint=mini-sd.safetensors")] == ["V1"]


def test_the_web_uis_packages_are_what_they_were(host: WebUI, frozen: str) -> None:
    assert _freeze(host.webui) == frozen


def test_the_same_stack_opens_on_the_command_line(host: WebUI, pictures: Path) -> None:
    host.post(f"{API}/learn", learn(pictures, "V1", "shared"))
    assert host.ended()["state"] == "done"
    stack = host.checkpoint.with_name("mini-sd.shared.concepts.safetensors")
    assert [one["token"] for one in pipeline.info(host.checkpoint, stack)["concepts"]] == ["V1"]


def test_interrupt_stops_a_job_and_the_same_request_goes_on(host: WebUI, pictures: Path) -> None:
    request = learn(pictures, "V1", "stopped", steps=3000, snapshot_every=1)
    host.post(f"{API}/learn", request)
    _until_it_learns(host)
    while "learn step" not in str((shown := host.get("/sdapi/v1/progress?skip_current_image=true"))["textinfo"]):
        time.sleep(0.1)
    assert 0 < shown["progress"] < 1
    with pytest.raises(RuntimeError, match="409"):
        host.post(f"{API}/undo", PLACE)
    host.post("/sdapi/v1/interrupt", {})
    assert host.ended()["state"] == "stopped"
    reached = host.get(f"{API}/jobs")["progress"]["step"]
    host.post(f"{API}/learn", request)
    assert _until_it_learns(host)["progress"]["step"] > reached
    host.post(f"{API}/jobs/stop", {})
    assert host.ended()["state"] == "stopped"


def _until_it_learns(host: WebUI) -> dict[str, Any]:
    while not (job := host.get(f"{API}/jobs"))["progress"].get("loss"):
        assert job["state"] in ("starting", "running"), job
        time.sleep(0.2)
    return job


def test_a_generation_queued_meanwhile_waits_and_the_web_ui_survives_the_workers_death(host: WebUI, pictures: Path) -> None:
    host.post(f"{API}/learn", learn(pictures, "V1", "killed", steps=3000))
    _until_it_learns(host)
    with ThreadPoolExecutor() as pool:
        generation = pool.submit(drawn, host, "a red ball")
        time.sleep(3)
        assert not generation.done()
        os.kill(_worker(host), signal.SIGKILL)
        job = host.ended()
        assert job["state"] == "failed"
        assert "goes on from the last snapshot" in job["message"]
        assert generation.result().std() > 1


def _worker(host: WebUI) -> int:
    """The process of the job under way."""
    children = [int(child) for task in Path(f"/proc/{host.process.pid}/task").iterdir() for child in (task / "children").read_text().split()]
    return next(pid for pid in children if b"comfy_continual_lora.worker" in Path(f"/proc/{pid}/cmdline").read_bytes())


def test_mistakes_are_refused_in_words(host: WebUI, pictures: Path, tmp_path: Path) -> None:
    good = learn(pictures, "V1", "mistakes")
    host.post(f"{API}/learn", good)
    assert host.ended()["state"] == "done"
    broken = base64.b64encode(b"no picture").decode()
    for change, message in (({"token": "v1", "noun": "box"}, "taken"), ({"token": "V2", "images": [broken]}, "can't be read as a picture")):
        host.post(f"{API}/learn", {**good, **change})
        assert message in host.ended()["message"]
    for change, message in (
        ({"checkpoint": "../x"}, "no checkpoint"), ({"noun": " "}, "noun is missing"), ({"stack": "../up"}, "only letters"),
        ({"images": str(tmp_path)}, "outside the folders"), ({"images": ["?"]}, "no base64"), ({"settings": 3}, "an object"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=f"422.*{message}"):
            host.post(f"{API}/learn", {**good, **change})


def test_scores_evaluate_consolidate_and_undo(host: WebUI, pictures: Path, tmp_path: Path) -> None:
    second = save_concept(tmp_path / "second", 1)
    for token, folder in (("V1", pictures), ("V2", second)):
        host.post(f"{API}/learn", learn(folder, token, "deeds"))
        assert host.ended()["state"] == "done"
    images = learn(second, "V2", "deeds")["images"]
    place = {**PLACE, "stack": "deeds"}
    for deed, body, found in (
        ("scores", {"images": images[:1], "settings": {"trials": 2}}, "images"),
        ("evaluate", {"settings": {"pictures": 1, "steps": 2, "trials": 2}}, "kept"),
        ("consolidate", {"images": images, "settings": {"dsc_steps": 2, "batch": 3, "fisher_samples": 3}}, "losses"),
        ("export", {}, "lora"), ("undo", {}, "token"),
    ):  # fmt: skip
        host.post(f"{API}/{deed}", {**place, **body})
        job = host.ended()
        assert job["state"] == "done", job
        assert job["results"][deed][found]
    assert [one["token"] for one in host.get(f"{API}/concepts?checkpoint=mini-sd.safetensors&stack=deeds")] == ["V1"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_tab_learns_from_a_browser(host: WebUI, pictures: Path, tmp_path: Path) -> None:
    with page(host.address, height=1400) as opened:
        opened.wait_for_selector("#txt2img_generate", timeout=120_000)
        opened.click("button:has-text('Continual LoRA')")
        opened.set_input_files("#continual_lora_files input[type=file]", [str(p) for p in sorted(pictures.glob("*.png"))])
        opened.fill("#continual_lora_token textarea", "B1")
        opened.fill("#continual_lora_noun textarea", "ball")
        opened.click("text=Captions, and settings for experts")
        for name, value in (("steps", 30), ("batch", 2), ("rank", 4), ("fisher_samples", 4), ("preview_every", 10)):
            opened.fill(f"#continual_lora_{name} input", str(value))
        opened.fill("#continual_lora_stack textarea", "browser")
        opened.click("#continual_lora_learn")
        said = "([where, text]) => document.querySelector(where)?.innerText.includes(text)"
        opened.wait_for_function(said, arg=["#continual_lora_status", "Learned B1 ball"], timeout=400_000)
        opened.wait_for_function(said, arg=["#continual_lora_concepts", "30 steps"], timeout=60_000)
        opened.screenshot(path=str(tmp_path / "a1111.png"))


def test_the_worker_ends_with_the_web_ui(host: WebUI, pictures: Path) -> None:
    host.post(f"{API}/learn", learn(pictures, "V1", "ended", steps=100_000))
    _until_it_learns(host)
    worker = _worker(host)
    host.stop(kill=True)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < deadline, "the worker goes on without the web UI"
        time.sleep(0.2)
    host.start()
    host.post(f"{API}/learn", learn(pictures, "V1", "ended", steps=100_000))
    assert _until_it_learns(host)["progress"]["step"] > 1  # from the snapshot
    host.post(f"{API}/jobs/stop", {})
    assert host.ended()["state"] == "stopped"
