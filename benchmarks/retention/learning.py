"""How a job of the retention benchmark learns its sequence: one concept after the other; each by
itself, as the bound `separate` and rivals that merge do; all at once, as the bound `joint` does; or
in a rival's own way.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock
from jobs import Job
from rivals import RIVALS, Own, Rival
from rivals.learning import Lesson, learn_next, stack_of
from subjects import Subject
from torch import Tensor, nn
from words import without

from comfy_continual_lora import (
    concepts,
    consolidation,
    diffusion,
    pipeline,
    requests,
    store,
    training,
)
from comfy_continual_lora.adapters.adapter import attached, new_adapter
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.lossscale import LossScale
from comfy_continual_lora.methods import METHODS
from comfy_continual_lora.mini import weights
from comfy_continual_lora.penalty import Step
from comfy_continual_lora.presets import TEMPLATES
from comfy_continual_lora.settings import ResolvedSettings
from comfy_continual_lora.targets import PromptBank, retention_penalty
from comfy_continual_lora.textspace import RetentionPenalty, coordinates


@dataclass(frozen=True)
class Learned:
    stacks: dict[tuple[int, int], store.ConceptStack]  # what each cell of R is drawn with
    seconds: float  # of one CPU core, so that other jobs on the machine do not count
    size: int  # bytes


def learn(job: Job) -> Learned:
    left_out = job.words[1].all if job.choices.get("lists") == "half" else []
    with without(left_out) if left_out else nullcontext():
        if job.method == "joint":
            return _learn_jointly(job)
        if job.method == "separate":
            return _learn_separately(job)
        if job.method in RIVALS:
            return _learn_as_rival(job, RIVALS[job.method])
        return _learn_in_sequence(job)


def _learn_in_sequence(job: Job) -> Learned:
    checkpoint, stack_file = checkpoint_of(job), job.folder / "mini.concepts.safetensors"
    for token, subject in zip(job.tokens, job.subjects, strict=True):
        pictures = job.folder / "pictures" / token
        request = _request(job, checkpoint, subject, token, stack_file)
        if pipeline.learned_before(request) is None:
            _learn_timed(job, request)
        shutil.rmtree(pictures)  # no later concept can look at them
    stack = store.open_stack(stack_file)
    after = [consolidation.as_of(stack, number) for number in range(1, job.concepts + 1)]
    stacks = {(i, j): after[i] for i, j in job.cells}
    return Learned(stacks, sum(_seconds(job).values()), stack_file.stat().st_size)


def _learn_separately(job: Job) -> Learned:
    """One stack per concept: nothing can be forgotten, and nothing is shared. Each has draws of its
    own: with the same, all LoRAs would start from the same A.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    checkpoint = checkpoint_of(job)
    stack_files = [job.folder / f"{j}.concepts.safetensors" for j in range(job.concepts)]
    with FileLock(job.folder / ".lock"):  # rivals that merge these LoRAs may ask for them at once
        for number, (token, subject) in enumerate(zip(job.tokens, job.subjects, strict=True)):
            if stack_files[number].exists():
                continue
            request = _request(job, checkpoint, subject, token, stack_files[number])
            settings = replace(job.settings, seed=1000 * job.seed + number)
            _learn_timed(job, replace(request, settings=settings))
    opened = [store.open_stack(stack_file) for stack_file in stack_files]
    size = sum(stack_file.stat().st_size for stack_file in stack_files)
    return Learned({(i, j): opened[j] for i, j in job.cells}, sum(_seconds(job).values()), size)


def _request(
    job: Job, checkpoint: Path, subject: Subject, token: str, stack: Path
) -> requests.LearnRequest:
    files = subject.save(job.folder / "pictures" / token)
    return requests.LearnRequest(
        checkpoint, files, token, subject.noun, job.settings, stack=stack, device=job.device
    )


def _learn_timed(job: Job, request: requests.LearnRequest) -> None:
    """Learn a concept, and keep how long it took: another process may go on with the next one."""
    started = time.process_time()
    pipeline.learn_concept(request)
    seconds = {**_seconds(job), request.token: time.process_time() - started}
    (job.folder / "seconds.json").write_text(json.dumps(seconds))


def _seconds(job: Job) -> dict[str, float]:
    """By word."""
    path = job.folder / "seconds.json"
    return json.loads(path.read_text()) if path.exists() else {}


def checkpoint_of(job: Job) -> Path:
    """The job's checkpoint; a miniature lies, or is linked to, in its folder."""
    if job.real:
        return job.real.checkpoint
    if job.miniature and job.miniature.is_dir():
        return job.miniature
    path = job.folder / "mini.safetensors"
    if job.miniature and not path.exists():
        path.symlink_to(job.miniature.resolve())
    if not path.exists():
        weights.write_checkpoint(path)
    return path


# --- rivals ---------------------------------------------------------------------------------------


def _learn_as_rival(job: Job, rival: Rival) -> Learned:
    """After each concept all so far are merged, from what each learned; the earlier merges are not
    needed for the later ones.
    """
    backbone = load_backbone(checkpoint_of(job), device=job.device)
    owns, seconds = _alone(job) if job.merges else _own_learning(job, rival, backbone)
    started = time.process_time()
    merged: dict[tuple[int, int], store.ConceptStack] = {}
    stacks: dict[tuple[int, int], store.ConceptStack] = {}
    for i, j in job.cells:
        key = (i, j) if rival.by_concept else (i, 0)
        if key not in merged:
            past, cache = owns[: i + 1], job.folder / "cache"
            adapter = rival.merged(backbone, past, job.options, cache, owns[j])
            merged[key] = stack_of(backbone, past, adapter)
        stacks[i, j] = merged[key]
    seconds += (time.process_time() - started) / len(merged)
    size = sum(t.nbytes for own in owns for t in (own.word, *own.adapter.values()))
    return Learned(stacks, seconds, size)


def _alone(job: Job) -> tuple[list[Own], float]:
    """What `separate` learned."""
    learned = _learn_separately(job.alone)
    owns = []
    for n, (token, subject) in enumerate(zip(job.tokens, job.subjects, strict=True)):
        stack = learned.stacks[n, n]
        assert stack.adapter
        prompts = list(stack.records[0].prompts)
        name = concepts.name_of(token, subject.noun)
        owns.append(Own(token, name, subject.noun, stack.tokens[token], stack.adapter, prompts))
    return owns, learned.seconds


def _own_learning(job: Job, rival: Rival, backbone: Backbone) -> tuple[list[Own], float]:
    settings = job.settings.resolved(backbone.preset)
    started = time.process_time()
    owns: list[Own] = []
    for token, subject in zip(job.tokens, job.subjects, strict=True):
        lesson = Lesson(token, subject.noun, subject.learned_from())
        snapshot = job.folder / f"{token}.snapshot"
        owns.append(learn_next(rival, backbone, lesson, owns, settings, job.options, snapshot))
    return owns, time.process_time() - started


# --- all at once ----------------------------------------------------------------------------------


def _learn_jointly(job: Job) -> Learned:
    """All concepts at once, each with as many steps as it would have in sequence: what a method
    that keeps every picture reaches. `base=retention`: with its penalty on ordinary prompts, and in
    its coordinates.
    """
    backbone = load_backbone(checkpoint_of(job), device=job.device)
    settings = job.settings.resolved(backbone.preset)
    started = time.process_time()
    generator = torch.Generator().manual_seed(job.seed)
    held = _held(job, backbone, settings)
    space = coordinates(held.moment.cpu()) if held else None
    adapter = new_adapter(backbone, settings.rank, generator, preconditioner=space)
    starts = [backbone.word_start(s.noun, generator, settings.vectors) for s in job.subjects]
    words = {
        token: nn.Parameter(start.to(backbone.device))
        for token, start in zip(job.tokens, starts, strict=True)
    }
    with attached(backbone, adapter, trainable=True) as factors:
        _train_jointly(job, backbone, settings, words, factors, held, space)
        trained = {name: factor.detach().cpu().clone() for name, factor in factors.items()}
    owns = [
        Own(token, name, subject.noun, words[token].detach().cpu(), {}, [])
        for token, name, subject in zip(words, job.names, job.subjects, strict=True)
    ]
    stack = stack_of(backbone, owns, trained)
    size = sum(t.nbytes for t in (*trained.values(), *stack.words.values()))
    return Learned(dict.fromkeys(job.cells, stack), time.process_time() - started, size)


def _held(job: Job, backbone: Backbone, settings: ResolvedSettings) -> RetentionPenalty | None:
    """The base method's penalty on ordinary prompts; None if it has none."""
    weight = METHODS[job.base].held_weight(settings)
    if not weight:
        return None
    language = settings.retention_language
    nouns = [subject.noun for subject in job.subjects]
    ordinary = PromptBank(backbone, {}).ordinary(nouns, language=language)
    return retention_penalty(backbone, ordinary.moment(language), [], settings, weight)


def _train_jointly(
    job: Job,
    backbone: Backbone,
    settings: ResolvedSettings,
    words: Mapping[str, nn.Parameter],
    factors: Mapping[str, nn.Parameter],
    held: RetentionPenalty | None,
    space: Tensor | None,
) -> None:
    """Train words and factors in place on the pictures of all concepts."""
    latents, prompts = [], []
    for token, subject in zip(words, job.subjects, strict=True):
        own = backbone.encode_images(subject.learned_from())
        latents += own
        prompts += [concepts.prompts_for(token, subject.noun, TEMPLATES, None)] * len(own)

    def terms(step: int, rows: slice) -> dict[str, Tensor]:
        generator = diffusion.generator_for(job.seed, step)
        batch = diffusion.random_batch(latents, settings.batch, generator)
        pick, clean, timestep, noise = (part[rows] for part in batch)
        chosen = [diffusion.one_of(prompts[int(i)], generator) for i in pick]
        noisy, target = diffusion.noised(backbone, clean, noise, timestep)
        predicted = backbone.predict(noisy, timestep, backbone.encode_prompts(chosen, words))
        weight = diffusion.timestep_weight(backbone, timestep, settings.weighting)
        error = (weight * diffusion.loss_per_example(predicted, target)).mean()
        return {"denoising": error, **({"retention": held(Step(factors))} if held else {})}

    optimizer = torch.optim.AdamW(
        [
            {"params": list(words.values()), "lr": settings.token_rate, "weight_decay": 0.0},
            {"params": list(factors.values()), "lr": settings.rate, "weight_decay": 0.01},
        ]
    )
    if space is not None:
        rows = [factor for name, factor in factors.items() if name.endswith(".A")]
        training.precondition(space.to(backbone.device), optimizer, rows)
    parameters = {**{f"word {token}": word for token, word in words.items()}, **factors}
    steps, snapshot = settings.steps * job.concepts, job.folder / "joint.snapshot"
    identity = {"joint": job.seed}
    run = training.Run(
        "joint", parameters, optimizer, settings, steps, LossScale(), snapshot, identity
    )
    run.train(terms, settings.batch, lambda _progress: None)
