"""What Forge, reForge and Forge Neo give K and V of a full-size SD1.5 for a prompt of txt2img: what we
give them, for long prompts, weights, BREAK, commas, clip skip and a learned word.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path

import helpers_full_size as full_size
import pytest
import torch
from helpers_habits import HABITS, IN_WEB_UIS, MOVED, Habits, moved_by_web_uis, own
from helpers_webui import FAMILY, WebUI, drawn_with, find_webui, of_the_family
from safetensors.torch import load_file, save_file
from torch import Tensor

from comfy_continual_lora.checkpoint.load import load_backbone

# their clip skip, if nobody set it
DEFAULTS = {"Forge": 1, "reForge": 1, "Neo": 2}
PLAIN = "a photo of a V1 ball on grass"
# what they read as a word of a negative weight, and we as the end of a chunk
INSIDE, AS_A_WORD = "(a V1 ball BREAK on grass:1.2)", "(a V1 ball:1.2) (break:-1.2) (on grass:1.2)"
# what reForge alone reads so: two copies, and the last one's weight is 1.5
COPIES, COPIED = "(a V1 ball, :x2.5) on grass", "a V1 ball, (a V1 ball, :1.5) on grass"
# an extension that keeps what the first of the cross-attention's K and V were given last
KEEPS = """
import torch
from modules import script_callbacks, shared
from safetensors.torch import save_file

given = {}

def keep(module, inputs):
    given[module.kept_as] = inputs[0].detach().float().cpu().clone()

def watch(params):
    net = shared.sd_model.forge_objects.unet.model.diffusion_model
    for kind in ("to_k", "to_v"):
        module = next(one for name, one in net.named_modules() if name.endswith("attn2." + kind))
        if not hasattr(module, "kept_as"):
            module.kept_as = kind
            module.register_forward_pre_hook(keep)

def answer(body: dict):
    save_file(given, body["path"])
    given.clear()

script_callbacks.on_cfg_denoiser(watch)
script_callbacks.on_app_started(lambda demo, app: app.add_api_route("/given", answer, methods=["POST"]))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With random weights. It takes a minute and 2 GB, so only if a host is there."""
    if not any(find_webui(*place) for place in FAMILY.values()):
        pytest.skip(f"none of {', '.join(FAMILY)} is there")
    path = full_size.write("sd1", tmp_path_factory.mktemp("full-size") / "sd1.safetensors")
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def word() -> Tensor:
    """Of three vectors, as an embedding keeps it."""
    return (0.02 * torch.randn(3, 768, generator=torch.Generator().manual_seed(1))).half()


@pytest.fixture(scope="module")
def ours(checkpoint: Path, word: Tensor) -> dict[str, Tensor]:
    """Text features by what is tried."""
    backbone, words = (
        load_backbone(checkpoint, device="cpu", precision="fp32"),
        {"V1": word.float()},
    )
    others: Habits = {
        "clip skip 1": (PLAIN, 1),
        "clip skip 2": (PLAIN, 2),
        "BREAK in brackets": (AS_A_WORD, 1),
        "copies": (COPIED, 1),
        "copies as text": (COPIES, 1),
    }
    with torch.no_grad():
        features = own(backbone, words, {**HABITS, **IN_WEB_UIS, **others})
        features["moved by a comma"] = moved_by_web_uis(backbone, words)
        unmoved = own(backbone, words, {"": (MOVED, 1)})[""]
    assert (features["moved by a comma"] - unmoved).abs().max() > 0.1
    del backbone
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # the host needs as much
    return features


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY)
def test_the_forge_family_gives_k_and_v_what_we_give_them(
    tmp_path: Path, checkpoint: Path, word: Tensor, ours: dict[str, Tensor], name: str
) -> None:
    host = WebUI(of_the_family(name), tmp_path / "webui")
    host.put_extension("keeps", KEEPS)
    host.checkpoint.parent.mkdir(parents=True)
    os.link(checkpoint, host.checkpoint)
    embeddings = host.data / ("models/embeddings" if host.neo else "embeddings")
    for folder in (embeddings, host.data / "tmp"):
        folder.mkdir()
    save_file({"emb_params": word}, embeddings / "V1.safetensors")
    # without VERSION_UID Neo takes the settings for an older version's, and asks; the other previews
    # are made by a net that reForge would download
    options = {"VERSION_UID": "PY313", "show_progress_type": "Approx cheap"}
    (host.data / "config.json").write_text(json.dumps(options))
    asked = {
        **HABITS,
        **IN_WEB_UIS,
        "moved by a comma": (MOVED, 1),
        "BREAK in brackets": (INSIDE, 1),
    }
    expected = {what: ours[what] for what in asked}
    copies = "copies" if name == "reForge" else "copies as text"
    asked[copies], expected[copies] = (COPIES, 1), ours[copies]
    host.start()
    try:
        given = {"as it stands": _given(host, PLAIN, None)}  # before anything is set
        given |= {what: _given(host, prompt, skip) for what, (prompt, skip) in asked.items()}
    finally:
        host.stop()
    expected["as it stands"] = ours[f"clip skip {DEFAULTS[name]}"]
    apart = {
        what: max(float((one - features).abs().max()) for one in given[what].values())
        for what, features in expected.items()
    }
    print(name, apart)  # what was measured, with -s
    assert max(apart.values()) <= 1e-4, apart


def _given(host: WebUI, prompt: str, clip_skip: int | None) -> dict[str, Tensor]:
    """What K and V get of a prompt that is drawn, with this clip skip if one is set."""
    settings = {} if clip_skip is None else {"CLIP_stop_at_last_layers": clip_skip}
    # with a scale of 1 the negative prompt is left out
    drawn_with(
        host,
        prompt,
        steps=1,
        width=64,
        height=64,
        cfg_scale=1,
        sampler_name="Euler",
        override_settings=settings,
    )
    path = host.data / "given.safetensors"
    host.post("/given", {"path": str(path)})
    given = load_file(path)
    path.unlink()  # mapped into memory: written over, it would be another
    assert given.keys() == {"to_k", "to_v"}
    return given
