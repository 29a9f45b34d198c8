"""Stage 4: which parameters of the adapter a concept needs - the diagonal of the Fisher
information, from per-sample gradients.

    L_F = L_denoise(x, c_n) + CE( p(. | x) over c_k, one-hot c_n )
    F_n = mean over samples of (dL_F / dtheta)^2, rescaled to mean 1

A sample is one (image, timestep, noise); template and c_k are shared by its batch. Gradients are
squared per sample, then averaged; squaring the mean gradient of a batch is the classic error. No
loop over samples is needed: a K or V projection maps text features c (rows, tokens, d_text) to
(W0 + delta) c, so a sample's gradient in delta is the sum over its rows and tokens of
(dL / d output) c^T, and the chain rule gives those of A and B.

With scores the Fisher is the cross-entropy's almost alone: its gradients squared are about a
million times those of L_denoise, because it divides errors by tau. Weighing it by tau, as DSC does,
was tried and not kept (benchmarks/LOG.md, 2026-11-22).

Source: Kirkpatrick et al. 2017 (EWC, arXiv 1612.00796); Jha et al. 2025 for L_F.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .adapters.adapter import Adapter, adapted_layers, delta, layers_of
from .checkpoint.backbone import Backbone, FrozenText
from .classifier import errors, log_posterior, predictions, subset
from .diffusion import generator_for, noised, one_of, random_batch
from .lossscale import LossScale
from .presets import TEMPLATES
from .progress import OnProgress, Progress
from .settings import ResolvedSettings


@dataclass(frozen=True)
class FisherInputs:
    """Latents (c, h, w) of the newest concept, its name ("V2 mug") and class noun, the names of
    earlier concepts.

    `tau` is the temperature of the cross-entropy term; None leaves that term out.
    """

    latents: Sequence[Tensor]
    name: str
    noun: str
    previous: Sequence[str]
    tau: float | None


def fisher(
    backbone: Backbone,
    factors: Mapping[str, Tensor],
    inputs: FisherInputs,
    text: FrozenText,
    settings: ResolvedSettings,
    on_progress: OnProgress,
) -> Adapter:
    """F_n of the attached, trainable `factors`, rescaled to mean 1: under the same names, or
    "<layer>.W" in the space of delta.
    """
    total: Adapter = {}
    for layer, gradients in _sampled(backbone, factors, inputs, text, settings, on_progress):
        for letter, gradient in gradients.items():
            square = gradient.square().sum(0)
            total[f"{layer}.{letter}"] = total.get(f"{layer}.{letter}", 0) + square
    mean = torch.cat([t.flatten() for t in total.values()]).mean().clamp(min=1e-30)
    return {name: (t / mean).cpu() for name, t in total.items()}


def spectrum(
    backbone: Backbone,
    factors: Mapping[str, Tensor],
    inputs: FisherInputs,
    text: FrozenText,
    settings: ResolvedSettings,
    layers: Sequence[str],
    top: int,
) -> dict[str, Tensor]:
    """The largest eigenvalues of the full (not only diagonal) Fisher matrix of single layers, in
    descending order, (top,) each.
    """
    rows: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    for layer, gradients in _sampled(backbone, factors, inputs, text, settings, lambda _: None):
        if layer in rows:
            rows[layer].append(torch.cat([g.flatten(1) for g in gradients.values()], 1))
    return {layer: top_eigenvalues(torch.cat(parts), top) for layer, parts in rows.items()}


def top_eigenvalues(gradients: Tensor, top: int) -> Tensor:
    """Largest eigenvalues of mean(g g^T) over samples, descending: gradients (n, p) -> (top,).

    The small Gram matrix (n, n) has the same ones.
    """
    gram = gradients @ gradients.T / len(gradients)
    return torch.linalg.eigvalsh(gram).flip(0)[:top]


def _sampled(
    backbone: Backbone,
    factors: Mapping[str, Tensor],
    inputs: FisherInputs,
    text: FrozenText,
    settings: ResolvedSettings,
    on_progress: OnProgress,
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The gradients of `settings.fisher_samples` samples, batch by batch and layer by layer.

    A batch goes through the net in `settings.accumulate` parts or more, of at least one sample each.
    """
    prompts = 1 if inputs.tau is None else 2 + min(len(inputs.previous), settings.subset - 2)
    n, done, number = max(1, settings.batch // prompts), 0, 0
    at_once = max(1, settings.batch // settings.accumulate // prompts)
    scale = LossScale(backbone.unet.dtype)
    while done < settings.fisher_samples:
        n = min(n, settings.fisher_samples - done)
        generator = generator_for(settings.seed, "fisher", number)
        loss = _loss_of_batch(backbone, inputs, text, settings.subset, n, generator)
        for start in range(0, n, at_once):
            rows = slice(start, min(n, start + at_once))
            yield from per_sample_gradients(
                backbone,
                factors,
                partial(loss, rows),
                rows.stop - start,
                scale,
                in_delta=settings.fisher_space == "delta",
            )
        done, number = done + n, number + 1
        on_progress(Progress("fisher", done, settings.fisher_samples))


def _loss_of_batch(
    backbone: Backbone,
    inputs: FisherInputs,
    text: FrozenText,
    k: int,
    n: int,
    generator: torch.Generator,
) -> Callable[..., Tensor]:
    """L_F of n samples drawn with `generator`, (n,), or of some of these rows: the first prompt
    names c_n, the others c_0 and a random few of the previous concepts.
    """
    clean, timestep, noise = random_batch(inputs.latents, n, generator)[1:]
    template = one_of(TEMPLATES, generator)
    names = [inputs.name]
    if inputs.tau is not None:
        names += [inputs.noun, *subset(inputs.previous, k, generator)]
    features = text([template.format(name) for name in names])
    noisy, target = noised(backbone, clean, noise, timestep)

    def loss(rows: slice = slice(None)) -> Tensor:
        predicted = predictions(backbone, noisy[rows], timestep[rows], features)
        error = errors(predicted, target[rows])
        if inputs.tau is None:
            return error[:, 0]
        return error[:, 0] - log_posterior(error, inputs.tau)[:, 0]

    return loss


# --- per-sample gradients ------------------------------------------------------------------------


def per_sample_gradients(
    backbone: Backbone,
    factors: Mapping[str, Tensor],
    loss: Callable[[], Tensor],
    n: int,
    scale: LossScale | None = None,
    *,
    in_delta: bool = False,
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield each layer with the gradients of its factors by letter, (n, ...) each, or with
    `in_delta` that of delta, as "W".

    `loss` returns one number per sample, (n,), from one U-Net call whose rows belong to the samples
    in order, the same number to each. It is called again if gradients overflow at this scale.
    Errors: TrainingError if they do at any.
    """
    scale = scale or LossScale()
    while True:
        seen: dict[str, tuple[Tensor, list[Tensor]]] = {}
        factor = scale.value
        with _watched(backbone, seen):
            (loss().sum() * factor).backward()
        if scale.fits(
            torch.stack([outputs[0].float().norm() for _, outputs in seen.values()]).sum()
        ):
            break
    for layer, parts in layers_of(factors).items():
        inputs, outputs = seen[layer]
        c, g = (
            t.detach().float().unflatten(0, (n, -1)).flatten(1, 2) for t in (inputs, outputs[0])
        )
        gradient = torch.einsum("nto,nti->noi", g / factor, c)
        if in_delta:
            yield layer, {"W": gradient}
        else:
            yield layer, _pulled_back({k: p.detach() for k, p in parts.items()}, gradient)
    for parameter in factors.values():
        parameter.grad = None


def _pulled_back(parts: dict[str, Tensor], gradient: Tensor) -> dict[str, Tensor]:
    """From gradients in delta, (n, d_out, d_text), to gradients in the factors: the chain rule
    through `adapter.delta`, for all samples at once.
    """
    back = torch.func.vjp(lambda p: delta(p, gradient.shape[1:]), parts)[1]
    return torch.func.vmap(lambda g: back(g)[0])(gradient)


@contextmanager
def _watched(backbone: Backbone, seen: dict[str, tuple[Tensor, list[Tensor]]]) -> Iterator[None]:
    """Inside the block every adapted projection records its input and the gradient of its output
    (of the first call: checkpointing calls twice).
    """
    handles = []
    for layer, module in adapted_layers(backbone).items():

        def note(
            _module: object, inputs: tuple[Tensor, ...], output: Tensor, layer: str = layer
        ) -> None:
            if layer not in seen:
                seen[layer] = (inputs[0], [])
                output.register_hook(seen[layer][1].append)

        handles.append(module.register_forward_hook(note))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
