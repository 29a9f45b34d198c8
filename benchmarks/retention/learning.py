"""How a job of the retention benchmark learns its sequence: one concept after the other; or, as the
two bounds do, each concept by itself, or all at once.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jobs import Job
from torch import Tensor, nn

from comfy_continual_lora import concepts, diffusion, pipeline, requests, store, training
from comfy_continual_lora.adapters.adapter import attached, new_adapter
from comfy_continual_lora.checkpoint.backbone import Backbone
from comfy_continual_lora.checkpoint.load import load_backbone
from comfy_continual_lora.mini import trainset, weights, world
from comfy_continual_lora.presets import TEMPLATES
from comfy_continual_lora.settings import ResolvedSettings


@dataclass(frozen=True)
class Learned:
    stacks: dict[tuple[int, int], store.ConceptStack]  # what each cell of R is drawn with
    seconds: float  # of one CPU core, so that other jobs on the machine do not count
    size: int  # bytes


def learn(job: Job) -> Learned:
    if job.method == "joint":
        return _learn_jointly(job)
    if job.method == "separate":
        return _learn_separately(job)
    return _learn_in_sequence(job)


def _learn_in_sequence(job: Job) -> Learned:
    checkpoint, seconds_file = _checkpoint(job), job.folder / "seconds.json"
    seconds = json.loads(seconds_file.read_text()) if seconds_file.exists() else {}
    for token, concept in zip(job.tokens, job.sequence, strict=True):
        pictures = job.folder / "pictures" / token
        request = _request(job, checkpoint, concept, token)
        if pipeline.learned_before(request) is None:
            started = time.process_time()
            pipeline.learn_concept(request)
            seconds[token] = time.process_time() - started
            seconds_file.write_text(json.dumps(seconds))
        shutil.rmtree(pictures)  # no later concept can look at them
    path = store.stack_path(checkpoint)
    stack = store.open_stack(path)
    after = [stack.as_of(number) for number in range(1, job.concepts + 1)]
    stacks = {(i, j): after[i] for i, j in job.cells}
    return Learned(stacks, sum(seconds.values()), path.stat().st_size)


def _learn_separately(job: Job) -> Learned:
    """One stack per concept: nothing can be forgotten, and nothing is shared."""
    checkpoint, seconds = _checkpoint(job), 0.0
    stack_files = [job.folder / f"{j}.concepts.safetensors" for j in range(job.concepts)]
    for token, concept, stack_file in zip(job.tokens, job.sequence, stack_files, strict=True):
        if not stack_file.exists():
            started = time.process_time()
            pipeline.learn_concept(_request(job, checkpoint, concept, token, stack_file))
            seconds += time.process_time() - started
    opened = [store.open_stack(stack_file) for stack_file in stack_files]
    size = sum(stack_file.stat().st_size for stack_file in stack_files)
    return Learned({(i, j): opened[j] for i, j in job.cells}, seconds, size)


def _request(
    job: Job, checkpoint: Path, concept: world.Concept, token: str, stack: Path | None = None
) -> requests.LearnRequest:
    files = world.save_pictures(concept, job.folder / "pictures" / token)
    return requests.LearnRequest(
        checkpoint, files, token, concept.noun, job.settings, stack=stack, device=job.device
    )


def _checkpoint(job: Job) -> Path:
    path = job.folder / "mini.safetensors"
    if not path.exists():
        weights.write_checkpoint(path)
    return path


# --- all at once ----------------------------------------------------------------------------------


def _learn_jointly(job: Job) -> Learned:
    """All concepts at once, each with as many steps as it would have in sequence: what a method
    that keeps every picture reaches.
    """
    backbone = load_backbone(_checkpoint(job), device=job.device)
    settings = job.settings.resolved("mini")
    started = time.process_time()
    generator = torch.Generator().manual_seed(job.seed)
    adapter = new_adapter(backbone, settings.rank, generator)
    starts = [backbone.word_start(c.noun, generator, settings.vectors) for c in job.sequence]
    words = {
        token: nn.Parameter(start.to(backbone.device))
        for token, start in zip(job.tokens, starts, strict=True)
    }
    with attached(backbone, adapter, trainable=True) as factors:
        _train_jointly(job, backbone, settings, words, factors)
        stack = _joint_stack(job, backbone, settings, words, factors)
    size = sum(t.nbytes for t in (*(stack.adapter or {}).values(), *stack.words.values()))
    return Learned(dict.fromkeys(job.cells, stack), time.process_time() - started, size)


def _train_jointly(
    job: Job,
    backbone: Backbone,
    settings: ResolvedSettings,
    words: Mapping[str, nn.Parameter],
    factors: Mapping[str, nn.Parameter],
) -> None:
    """Train words and factors in place on the pictures of all concepts."""
    latents, prompts = [], []
    for token, concept in zip(words, job.sequence, strict=True):
        own = backbone.encode_images(training_pictures(concept))
        latents += own
        prompts += [concepts.prompts_for(token, concept.noun, TEMPLATES, None)] * len(own)

    def terms(step: int, rows: slice) -> dict[str, Tensor]:
        generator = diffusion.generator_for(job.seed, step)
        batch = diffusion.random_batch(latents, settings.batch, generator)
        pick, clean, timestep, noise = (part[rows] for part in batch)
        chosen = [diffusion.one_of(prompts[int(i)], generator) for i in pick]
        noisy, target = diffusion.noised(backbone, clean, noise, timestep)
        predicted = backbone.predict(noisy, timestep, backbone.encode_prompts(chosen, words))
        weight = diffusion.timestep_weight(backbone, timestep, settings.weighting)
        return {"denoising": (weight * diffusion.loss_per_example(predicted, target)).mean()}

    optimizer = torch.optim.AdamW(
        [
            {"params": list(words.values()), "lr": settings.token_rate, "weight_decay": 0.0},
            {"params": list(factors.values()), "lr": settings.rate, "weight_decay": 0.01},
        ]
    )
    parameters = {**{f"word {token}": word for token, word in words.items()}, **factors}
    steps, snapshot = settings.steps * job.concepts, job.folder / "joint.snapshot"
    identity = {"joint": job.seed}
    run = training.Run("joint", parameters, optimizer, settings, steps, 1.0, snapshot, identity)
    run.train(terms, settings.batch, lambda _progress: None)


def _joint_stack(
    job: Job,
    backbone: Backbone,
    settings: ResolvedSettings,
    words: Mapping[str, nn.Parameter],
    factors: Mapping[str, Tensor],
) -> store.ConceptStack:
    stack = store.ConceptStack(backbone.fingerprint, rank=settings.rank, tau=0.01)
    for n, (token, concept) in enumerate(zip(words, job.sequence, strict=True)):
        record = store.ConceptRecord(
            id=str(n),
            token=token,
            noun=concept.noun,
            method="joint",
            images=5,
            steps=settings.steps,
            seed=job.seed,
            prompts=[],
            hashes=[],
            learned="",
            loss=0.0,
            preview="",
            settings={},
        )
        stack.records.append(record)
        stack.words[record.id] = words[token].detach().cpu()
    stack.adapter = {name: factor.detach().cpu().clone() for name, factor in factors.items()}
    return stack


def training_pictures(concept: world.Concept) -> Tensor:
    """The five pictures a concept is learned from, (5, 3, 128, 128)."""
    return trainset.to_tensor(np.stack(list(world.concept_pictures(concept, 5))))
