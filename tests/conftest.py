"""What the tests share: checkpoints, what they learned, and pictures to learn from."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_learn import NOUNS, learn_request, save_concept
from helpers_thin import write_thin
from helpers_webui import WebUI, freeze

from comfy_continual_lora import pipeline
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.checkpoint.stable import StableBackbone
from comfy_continual_lora.mini.weights import write_checkpoint
from comfy_continual_lora.settings import LearnSettings


def pytest_configure() -> None:
    """Each of several workers computes on one core: two threads each on two cores take several
    times as long.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that hold slow tests come first: a worker that took one last would end long after the
    other.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def _prompts_are_encoded_once() -> Iterator[None]:
    """The hundreds of ordinary prompts that a concept is held at are the same in all tests, and
    took most of their time. A batch that was encoded without gradients is not encoded again.
    """
    encode, known = StableBackbone.encode_prompts, dict[Any, torch.Tensor]()

    def remembered(self: StableBackbone, prompts: Sequence[str], words: Any = None) -> torch.Tensor:
        if words or torch.is_grad_enabled() or len(prompts) < 16 or self.device.type != "cpu":
            return encode(self, prompts, words)
        dtypes = [next(part.parameters()).dtype for part in self.parts]
        key = (self.fingerprint, self.clip_skip, *dtypes, torch.get_num_threads(), *prompts)
        if key not in known:
            if len(known) == 512:
                del known[next(iter(known))]  # the oldest: a third of a MB, of the mini-SD 1.3
            known[key] = encode(self, prompts, words)
        return known[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableBackbone, "encode_prompts", remembered)
        yield


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two pictures each of three concepts, by token. Not to be changed."""
    root = tmp_path_factory.mktemp("concepts")
    return {token: save_concept(root / token, index, count=2) for index, token in enumerate(NOUNS)}


@pytest.fixture(scope="module")
def frozen(webui: Path) -> str:
    """What is installed in the module's `webui` before anything of ours."""
    return freeze(webui)


@pytest.fixture(scope="module")
def host(webui: Path, tmp_path_factory: pytest.TempPathFactory, frozen: str) -> Iterator[WebUI]:
    """The module's `webui`, running."""
    server = WebUI(webui, tmp_path_factory.mktemp("webui"))
    server.put_the_mini_and_us()
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def mini_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mini") / "mini.safetensors"
    write_checkpoint(path)
    return path


@pytest.fixture(scope="session")
def thin_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed. It is called a mini-SD and is loaded as one."""
    path = tmp_path_factory.mktemp("thin") / "mini.safetensors"
    write_thin(path)
    return path


@pytest.fixture
def checkpoint(thin_file: Path, tmp_path: Path) -> Path:
    """A thin mini-SD of this test's own, so that its stack is too."""
    return Path(shutil.copy(thin_file, tmp_path / "mini.safetensors"))


class Learned:
    """Stacks that a checkpoint learned, each once."""

    def __init__(self, checkpoint: Path, folders: dict[str, Path], root: Path) -> None:
        self.checkpoint = checkpoint
        self.folders = folders
        self.root = root
        self.known: dict[Any, Path] = {}

    def copy(self, into: Path, settings: LearnSettings, *tokens: str) -> Path:
        """A copy of the checkpoint that learned these concepts, in a folder of its own."""
        folder = Path(tempfile.mkdtemp(prefix="learned", dir=into))
        shutil.copytree(self._folder(settings, *tokens), folder, dirs_exist_ok=True)
        return folder / self.checkpoint.name

    def _folder(self, settings: LearnSettings, *tokens: str) -> Path:
        if (settings, tokens) not in self.known:
            folder = Path(tempfile.mkdtemp(dir=self.root)) / "models"
            if tokens[:-1]:
                shutil.copytree(self._folder(settings, *tokens[:-1]), folder)
            else:
                folder.mkdir()
                shutil.copy(self.checkpoint, folder)
            path = folder / self.checkpoint.name
            pipeline.learn_concept(learn_request(path, self.folders, tokens[-1], settings))
            self.known[settings, tokens] = folder
        return self.known[settings, tokens]


@pytest.fixture(scope="session")
def _by_thin(
    thin_file: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Learned:
    return Learned(thin_file, folders, tmp_path_factory.mktemp("learned"))


@pytest.fixture(scope="session")
def _by_mini(
    mini_file: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Learned:
    return Learned(mini_file, folders, tmp_path_factory.mktemp("learned"))


@pytest.fixture
def learned(_by_thin: Learned, tmp_path: Path) -> Callable[..., Path]:
    """`learned(settings, "V1", "V2")`: a thin mini-SD of this test's own that learned these."""
    return partial(_by_thin.copy, tmp_path)


@pytest.fixture
def learned_by_mini(_by_mini: Learned, tmp_path: Path) -> Callable[..., Path]:
    return partial(_by_mini.copy, tmp_path)


@pytest.fixture(scope="session")
def backbone(thin_file: Path) -> Backbone:
    """Shared: a test that attaches something takes it out again."""
    return load_backbone(thin_file, device="cpu")


@pytest.fixture(scope="session")
def mini(mini_file: Path) -> Backbone:
    """The trained mini-SD, for tests that ask what is in a picture. Shared like `backbone`."""
    return load_backbone(mini_file, device="cpu")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return save_concept(tmp_path / "pictures", 0)
