"""The tab's host in AUTOMATIC1111, reForge, Forge or Forge Neo.

Only these import this module, once: its state survives "Reload UI".
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr
from modules import (  # pyright: ignore[reportMissingImports]
    call_queue,
    paths,
    processing,
    sd_models,
    shared,
)

from ..files import HOST, STACKS
from ..listing import is_checkpoint
from .apart import OPTION, encode_again
from .environment import environment_of, home_of, prepare, python_of
from .host import Host
from .job import Job
from .labels import METHOD_LABELS
from .shown import picture_of, status

_SECTION = ("continual_lora", "Continual LoRA")
_CACHES = ("cached_c", "cached_uc", "cached_hr_c", "cached_hr_uc")  # of encoded prompts


@cache
def host(extension: Path) -> WebuiHost:
    """The host of this process."""
    return WebuiHost(extension)


class WebuiHost(Host):
    offers_files = False  # they are where the web UI loads them
    sends_prompts = True

    def __init__(self, extension: Path) -> None:
        super().__init__(Path(), home_of(extension))
        self.runner.around = self.around
        self.runner.follow = self.follow
        self.runner.ended = self.ended
        self.runner.environment[HOST] = os.pathsep.join(_model_folders())
        self._last_preview: str | None = None
        self._interrupted = self._has_queue = False
        self.outlive_reload()
        self.hide_stacks()

    def own_python(self) -> str:
        return python_of(environment_of(self.folder))

    def prepare(self, say: Callable[[str], object]) -> None:
        prepare(environment_of(self.folder), say)

    def checkpoints(self) -> dict[str, Path]:
        listed = list(sd_models.checkpoints_list.values())  # a refresh may fill it meanwhile
        paths = {info.name: Path(info.filename) for info in listed}
        return {name: path for name, path in paths.items() if is_checkpoint(path.name)}

    def refresh(self) -> None:
        sd_models.list_models()

    def loaded(self) -> str:
        """Of the model that is chosen in the web UI, which the Forge family loads when it draws; else of
        the one in use. Nothing is loaded to look.
        """
        info = sd_models.checkpoint_aliases.get(shared.opts.data.get("sd_model_checkpoint"))
        if info is None:
            info = getattr(_model(), "sd_checkpoint_info", None)
        return getattr(info, "name", "")

    def exports(self) -> tuple[Path, Path]:
        return Path(shared.cmd_opts.lora_dir), Path(shared.cmd_opts.embeddings_dir)

    def default_method(self) -> str:
        method = shared.opts.data.get("continual_lora_plan")
        if isinstance(method, str) and method in METHOD_LABELS:
            return method
        return super().default_method()

    def add_settings(self) -> None:
        """Options that a page or the web UI's API may set: none that names a program or a path."""
        choices = {"choices": list(METHOD_LABELS)}
        option = shared.OptionInfo(
            next(iter(METHOD_LABELS)),
            "Method the tab begins with",
            gr.Dropdown,
            choices,
            section=_SECTION,
        )
        shared.opts.add_option("continual_lora_plan", option)
        apart = shared.OptionInfo(
            True,
            "Draw several learned things of one prompt each where its noun is",
            section=_SECTION,
        ).info("off: their looks mix, as without this extension")
        shared.opts.add_option(OPTION, apart)

    # --- the API ----------------------------------------------------------------------------------

    @property
    def serves_api(self) -> bool:
        return bool(shared.cmd_opts.api or getattr(shared.cmd_opts, "nowebui", False))

    def logins(self) -> dict[str, str] | None:
        """Read the web UI's --api-auth as it does: "user:password", separated by commas. Entries that
        can't be parsed admit nobody.
        """
        if shared.cmd_opts.api_auth is None:
            return None
        return dict(
            one.split(":") for one in shared.cmd_opts.api_auth.split(",") if one.count(":") == 1
        )

    # --- while a job runs -------------------------------------------------------------------------

    @contextmanager
    def around(self, job: Job) -> Iterator[None]:
        """Generations wait, the GPU is freed, and the host's progress bar and Interrupt belong to
        this job.
        """
        with call_queue.queue_lock:
            shared.state.begin(job=f"continual-lora {job.name}")
            shared.state.job_count = 1
            was_loaded = _model() is not None
            self._interrupted, self._has_queue = False, True
            try:
                if was_loaded:
                    _free_the_gpu()
                yield
            finally:
                try:
                    # the Forge family reloads its model by itself
                    if was_loaded and not _is_forge():
                        sd_models.send_model_to_device(shared.sd_model)
                finally:
                    self._has_queue = False
                    shared.state.end()

    def follow(self, job: Job) -> None:
        state = shared.state
        if state.interrupted and not self._interrupted:
            self._interrupted = True
            self.stop()
        state.textinfo = status(job, str).replace("*", "")
        if job.progress:
            state.sampling_step, state.sampling_steps = job.progress["step"], job.progress["steps"]
        if job.preview and job.preview != self._last_preview:
            self._last_preview = job.preview
            if picture := picture_of(job.preview):
                state.assign_current_image(picture)

    def outlive_reload(self) -> None:
        """Keep "Reload UI" from interrupting a job of ours, which runs in its own process.

        A running job holds the host's queue, so there is nothing else to interrupt.
        """
        state = shared.state
        reload = state.request_restart

        def request_restart() -> None:
            if self._has_queue:
                state.server_command = "restart"
            else:
                reload()

        state.request_restart = request_restart

    def hide_stacks(self) -> None:
        """Keep stacks, which lie beside their checkpoints, out of the web UI's list: it loads the first
        of that list if no other is chosen.
        """
        list_all = sd_models.list_models

        def list_models() -> None:
            list_all()
            for listed in (sd_models.checkpoints_list, sd_models.checkpoint_aliases):
                for name in [n for n, info in listed.items() if info.filename.endswith(STACKS)]:
                    del listed[name]

        sd_models.list_models = list_models
        list_models()

    def ended(self, job: Job) -> None:
        """Make new words and their LoRA available immediately."""
        if "export" not in job.results:
            return
        with call_queue.queue_lock:
            model = _model()
            try:
                if model is not None:  # one that is loaded later finds the embeddings itself
                    _reload_embeddings(model)
            except Exception:
                logging.exception(
                    "continual-lora: the new words could not be loaded into the web UI; Reload UI "
                    "loads them"
                )
            encode_again(processing.StableDiffusionProcessingTxt2Img, *_CACHES)


def _model_folders() -> list[str]:
    """Where Anima's files may be: this web UI, its models, what flags of Forge Neo name besides, and
    what its user names.
    """
    flags = (getattr(shared.cmd_opts, f"{kind}_dirs", None) for kind in ("text_encoder", "vae"))
    more = [str(folder) for folders in flags for folder in folders or ()]
    own = [os.environ[HOST]] if os.environ.get(HOST) else []
    return [paths.script_path, paths.models_path, *more, *own]


def _is_forge() -> bool:
    """Whether this is Forge, reForge or Forge Neo."""
    return "modules_forge" in sys.modules


def _model() -> Any:
    """The web UI's model; None if there is none, for which Forge and Neo have a placeholder."""
    model = sd_models.model_data.sd_model
    return None if isinstance(model, getattr(sd_models, "FakeInitialModel", ())) else model


def _free_the_gpu() -> None:
    """reForge's own way to unload a model hides it from its memory management, which then takes it
    for loaded at the next generation.
    """
    if reforge := sys.modules.get("ldm_patched.modules.model_management"):
        reforge.unload_all_models()
    else:
        sd_models.unload_model_weights()


def _reload_embeddings(model: Any) -> None:
    engines = [getattr(model, f"text_processing_engine{part}", None) for part in ("", "_l", "_g")]
    for engine in filter(None, engines):
        engine.embeddings.load_textual_inversion_embeddings()
    # Neo has no such module, and no other engine takes embeddings
    hijack = sys.modules.get("modules.sd_hijack")
    if hijack and not any(engines):
        hijack.model_hijack.embedding_db.load_textual_inversion_embeddings(force_reload=True)
