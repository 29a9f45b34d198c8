"""What the tab needs of AUTOMATIC1111, reForge, Forge or Forge Neo. Only they import this module, once: its state outlives "Reload UI"."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr
from modules import call_queue, processing, sd_models, shared  # pyright: ignore[reportMissingImports]

from ..files import STACKS
from .environment import NotReady, environment_of, home_of, prepare, python_of
from .job import Job
from .tab import PLANS, Host, picture_of, status

_SECTION = ("continual_lora", "Continual LoRA")


@cache
def host(extension: Path) -> WebuiHost:
    """The one of this process."""
    return WebuiHost(extension)


class WebuiHost(Host):
    def __init__(self, extension: Path) -> None:
        super().__init__(Path(), home_of(extension))
        self.desk.around, self.desk.follow, self.desk.ended = self.around, self.follow, self.ended
        self._shown: str | None = None

    def python(self) -> str:
        return shared.opts.data.get("continual_lora_python") or python_of(environment_of(self.folder))

    def prepare(self) -> Iterator[str]:
        lines: queue.Queue[str | Exception | None] = queue.Queue()

        def work() -> None:
            try:
                prepare(environment_of(self.folder), lines.put)
                lines.put(None)
            except Exception as error:
                lines.put(error)

        threading.Thread(target=work, daemon=True).start()
        while (line := lines.get()) is not None:
            if isinstance(line, Exception):
                raise line if isinstance(line, NotReady) else NotReady(str(line))
            yield line

    def checkpoints(self) -> dict[str, Path]:
        known = {info.name: Path(info.filename) for info in sd_models.checkpoints_list.values()}
        return {name: path for name, path in known.items() if path.suffix == ".safetensors" and not path.name.endswith(STACKS)}

    def exports(self) -> tuple[Path, Path]:
        return Path(shared.cmd_opts.lora_dir), Path(shared.cmd_opts.embeddings_dir)

    def default_plan(self) -> str:
        chosen = shared.opts.data.get("continual_lora_plan")
        return chosen if chosen in PLANS else super().default_plan()

    def add_settings(self) -> None:
        choices = {"choices": list(PLANS)}
        for name, info in (
            ("continual_lora_plan", shared.OptionInfo(next(iter(PLANS)), "Method the tab begins with", gr.Dropdown, choices, section=_SECTION)),
            ("continual_lora_python", shared.OptionInfo("", "Python that learns (empty: the environment prepared for it)", section=_SECTION)),
            ("continual_lora_folders", shared.OptionInfo("", "Folders the API may read pictures from, separated by ;", section=_SECTION)),
        ):
            shared.opts.add_option(name, info)

    # --- the API -----------------------------------------------------------------------------------------------------------------

    @property
    def serves_api(self) -> bool:
        return bool(shared.cmd_opts.api or getattr(shared.cmd_opts, "nowebui", False))

    def logins(self) -> dict[str, str]:
        pairs = (one.strip().partition(":") for one in (shared.cmd_opts.api_auth or "").split(","))
        return {user: password for user, _, password in pairs if user}

    def picture_folders(self) -> list[Path]:
        named = shared.opts.data.get("continual_lora_folders") or ""
        return [*super().picture_folders(), *(Path(one.strip()) for one in named.split(";") if one.strip())]

    # --- while a job runs --------------------------------------------------------------------------------------------------------

    @contextmanager
    def around(self, job: Job) -> Iterator[None]:
        """Generations wait; the GPU is empty; the host's progress bar and Interrupt are this job's."""
        with call_queue.queue_lock:
            shared.state.begin(job=f"continual-lora {job.name}")
            shared.state.job_count, loaded = 1, sd_models.model_data.sd_model is not None
            try:
                if loaded:
                    sd_models.unload_model_weights()
                yield
            finally:
                if loaded and not hasattr(sd_models, "FakeInitialModel"):  # the Forge family brings its model back by itself
                    sd_models.send_model_to_device(shared.sd_model)
                shared.state.end()

    def follow(self, job: Job) -> None:
        state = shared.state
        if state.interrupted:
            job.stop()
        state.textinfo = status(job).replace("*", "")
        if job.progress:
            state.sampling_step, state.sampling_steps = job.progress["step"], job.progress["steps"]
        if job.preview and job.preview != self._shown:
            self._shown = job.preview
            state.assign_current_image(picture_of(job.preview))

    def ended(self, job: Job) -> None:
        """New words and their LoRA are known at once."""
        if "export" not in job.results or sd_models.model_data.sd_model is None:
            return  # a model that is loaded later looks for embeddings itself
        with call_queue.queue_lock:
            try:
                _reload_embeddings(sd_models.model_data.sd_model)
            except Exception:
                logging.exception("continual-lora: the new words could not be shown to the web UI; Reload UI does it")
        for name in ("cached_c", "cached_uc"):
            getattr(processing.StableDiffusionProcessing, name)[:] = [None, None]


def _reload_embeddings(model: Any) -> None:
    engines = [getattr(model, f"text_processing_engine{part}", None) for part in ("", "_l", "_g")]
    if any(engines):
        for engine in engines:
            if engine is not None:
                engine.embeddings.load_textual_inversion_embeddings()
        return
    from modules.sd_hijack import model_hijack  # pyright: ignore[reportMissingImports]

    model_hijack.embedding_db.load_textual_inversion_embeddings(force_reload=True)
