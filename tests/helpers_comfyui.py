"""A real ComfyUI for the tests: found, started with a copy of this pack, driven through its HTTP
API.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from helpers_server import Server, free_port
from safetensors.torch import load_file, save_file

REPOSITORY = Path(__file__).parents[1]
PACK = (
    "__init__.py",
    "comfy_continual_lora",
    "workflows",
    "web",
    "locales",
    "subgraphs",
    "pyproject.toml",
    "requirements.txt",
)


def find_comfyui() -> Path | None:
    """COMFYUI_PATH, else comfy-cli's default workspace."""
    path = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI")
    return path if (path / "main.py").exists() else None


def python_of(comfyui: Path) -> str:
    candidates = [comfyui / venv / "bin" / "python" for venv in (".venv", "venv")]
    return str(next((python for python in candidates if python.exists()), sys.executable))


class ComfyUI(Server):
    """A running server.

    `base` holds its models, inputs and outputs, and the pack in custom_nodes.
    """

    def __init__(self, comfyui: Path, base: Path) -> None:
        self.comfyui, self.base, self.log = comfyui, base, base / "log.txt"
        self.pack = base / "custom_nodes" / "comfy-continual-lora"
        if not self.pack.exists():
            for name in PACK:
                source = REPOSITORY / name
                if source.is_dir():
                    shutil.copytree(
                        source, self.pack / name, ignore=shutil.ignore_patterns("__pycache__")
                    )
                elif source.exists():
                    self.pack.mkdir(parents=True, exist_ok=True)
                    shutil.copy(source, self.pack / name)
        self.start()

    def start(self) -> None:
        port = free_port()
        command = [
            python_of(self.comfyui),
            "main.py",
            "--cpu",
            "--port",
            str(port),
            "--listen",
            "127.0.0.1",
            "--base-directory",
            str(self.base),
        ]
        env = {**os.environ, "PYTHONPATH": ""}
        self.launch(
            [*command, "--disable-metadata"],
            port,
            lambda: self.answers("/system_stats"),
            cwd=self.comfyui,
            env=env,
        )

    def queue(self, prompt: dict[str, Any]) -> str:
        return self.post("/prompt", {"prompt": prompt, "client_id": "test"})["prompt_id"]

    def finished(self, prompt_id: str, timeout: float = 900) -> dict[str, Any]:
        """The history of a prompt once it ended, well or badly."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.2)
        raise TimeoutError(f"the prompt is still running:\n{self.log.read_text()[-3000:]}")

    def run(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Queue a prompt and wait; raises the node's own message if it failed."""
        done = self.finished(self.queue(prompt))
        if problem := error_of(done):
            raise RuntimeError(problem)
        return done

    def pictures(self, done: dict[str, Any], node: str) -> list[Path]:
        folders = {"output": self.base / "output", "temp": self.base / "temp"}
        return [
            folders[one["type"]] / one["subfolder"] / one["filename"]
            for one in done["outputs"][node]["images"]
        ]


def error_of(done: dict[str, Any]) -> str:
    """The message of the node that failed, or nothing."""
    return next(
        (
            str(m[1].get("exception_message", m[0]))
            for m in done["status"]["messages"]
            if m[0] in ("execution_error", "execution_interrupted")
        ),
        "",
    )


def text_of(done: dict[str, Any], node: str) -> str:
    """What a Preview as Text shows."""
    return done["outputs"][node]["text"][0]


def executed(done: dict[str, Any]) -> set[str]:
    """The nodes that really ran: those not taken from the cache."""
    cached = {
        node
        for m in done["status"]["messages"]
        if m[0] == "execution_cached"
        for node in m[1]["nodes"]
    }
    return set(done["prompt"][2]) - cached


def to_prompt(workflow: dict[str, Any], node_types: dict[str, Any]) -> dict[str, Any]:
    """A saved workflow -> what the API takes; `known` is /object_info."""
    links = {link[0]: link for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in ("Note", "MarkdownNote"):
            continue
        declared = node_types[node["type"]]["input"]
        linked = {
            one["name"]: one["link"]
            for one in node.get("inputs", [])
            if one.get("link") is not None
        }
        values, inputs = iter(node.get("widgets_values", [])), {}
        for name, spec in {**declared.get("required", {}), **declared.get("optional", {})}.items():
            options = spec[1] if len(spec) > 1 else {}
            is_widget = (
                isinstance(spec[0], list)
                or spec[0].split(",")[0] in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
            ) and not options.get("forceInput")
            if is_widget:
                inputs[name] = next(values)
                if options.get("control_after_generate"):
                    next(values)
            if name in linked:
                inputs[name] = [str(links[linked[name]][1]), links[linked[name]][2]]
        prompt[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": {k: v for k, v in inputs.items() if v is not None},
        }
    return prompt


def write_control_net(checkpoint: Path, path: Path) -> None:
    """A ControlNet in the original layout: the encoder of a checkpoint's U-Net, with random weights
    where a trained one has its own.

    Source of the layout: Zhang et al. 2023 (arXiv 2302.05543), cldm/cldm.py.
    """
    draws = torch.Generator().manual_seed(0)
    prefix = "model.diffusion_model."
    unet = {
        name.removeprefix(prefix): tensor
        for name, tensor in load_file(checkpoint).items()
        if name.startswith(prefix)
    }
    net = {
        name: tensor
        for name, tensor in unet.items()
        if name.startswith(("input_blocks.", "middle_block.", "time_embed."))
    }

    def add(name: str, inward: int, outward: int, side: int) -> None:
        scale = (inward * side * side) ** -0.5
        net[f"{name}.weight"] = scale * torch.randn(outward, inward, side, side, generator=draws)
        net[f"{name}.bias"] = torch.zeros(outward)

    channels = [len(unet["input_blocks.0.0.weight"])]
    number = 1
    while any(name.startswith(f"input_blocks.{number}.") for name in unet):
        down, block = (
            f"input_blocks.{number}.0.op.bias",
            f"input_blocks.{number}.0.out_layers.3.bias",
        )
        channels.append(len(unet[down if down in unet else block]))
        number += 1
    for number, count in enumerate(channels):
        add(f"zero_convs.{number}.0", count, count, 1)
    add("middle_block_out.0", channels[-1], channels[-1], 1)
    hint = (3, 16, 16, 32, 32, 96, 96, 256, channels[0])
    for number, (inward, outward) in enumerate(itertools.pairwise(hint)):
        add(f"input_hint_block.{2 * number}", inward, outward, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(net, path)
