"""What learning does to everything else: to unrelated prompts in text space (leak), and to pictures
of them (drift).

Drift is what peft's image generation benchmark reports beside likeness (its method_comparison of
2026): how far pictures of prompts that have nothing to do with the concept move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jobs import Job
from judging import mean, pictures_by
from torch import Tensor
from words import WRITTEN, captions, leak

from comfy_continual_lora import store, textspace
from comfy_continual_lora.checkpoint.backbone import Backbone

UNRELATED = 12  # pictures of each kind of prompt, at most as many as of a concept
LEAKS = ("leak_own", "leak_listed", "leak_left_out", "leak_written")
DRIFTS = ("drift_listed", "drift_left_out", "drift_written")


def unrelated_prompts(job: Job) -> dict[str, list[str]]:
    """Prompts about none of the concepts: of words that stand in the protected lists, of words that
    `lists=half` leaves out of them, and as people write.
    """
    if job.real:
        listed = textspace.ordinary_prompts([subject.noun for subject in job.subjects])
        return {"listed": listed[:: len(listed) // UNRELATED], "written": list(WRITTEN)}
    listed, left_out = (captions(words, 10 * UNRELATED) for words in job.words)
    return {"listed": listed, "left_out": left_out, "written": list(WRITTEN)}


def leaks(
    job: Job, backbone: Backbone, stacks: Sequence[store.ConceptStack]
) -> dict[str, float | None]:
    """What the adapters do to prompts, as a share of what the checkpoint does: to their concepts'
    own and to unrelated ones. Exact, without a picture; mean over the stacks.
    """
    found: dict[str, float | None] = dict.fromkeys(LEAKS)
    own = []
    for stack in stacks:
        prompts = [one for record in stack.records for one in textspace.single_prompts(record)]
        own.append(leak(backbone, stack.adapter, textspace.moment(backbone, stack.tokens, prompts)))
    found["leak_own"] = mean(own)
    for kind, prompts in unrelated_prompts(job).items():
        moment = textspace.moment(backbone, {}, prompts)
        found[f"leak_{kind}"] = mean(leak(backbone, stack.adapter, moment) for stack in stacks)
    return found


def drifts(
    job: Job,
    backbone: Backbone,
    stacks: Sequence[store.ConceptStack],
    features: Callable[[Tensor], Tensor],
) -> dict[str, float | None]:
    """How far pictures of unrelated prompts move: 1 - cosine of the features of a picture by the
    checkpoint and of that by an adapter with the same seed, mean over pictures. Of several stacks
    each draws its share of them.
    """
    found: dict[str, float | None] = dict.fromkeys(DRIFTS)
    for kind, prompts in unrelated_prompts(job).items():
        if kind == "written" and not job.real:
            continue  # the mini-SD can't draw these
        seeds = range(min(UNRELATED, job.pictures))
        before = pictures_by(job, backbone, None, prompts[: len(seeds)], seeds)
        after = torch.empty_like(before)
        for first, stack in enumerate(stacks):
            share = list(seeds[first :: len(stacks)])
            if share:
                chosen = [prompts[n] for n in share]
                after[share] = pictures_by(job, backbone, stack, chosen, share)
        cosines = F.cosine_similarity(features(before), features(after))
        found[f"drift_{kind}"] = float(1 - cosines.mean())
    return found
