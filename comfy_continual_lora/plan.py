"""Estimates what learning will take, before any weight is read: memory by part, file sizes, time.

in: a request, the header of its checkpoint (or a folder's configurations) and of its stack - out:
`Plan`, all sizes in bytes.

Weights, adapter, optimizer and penalties are counted. Activations are too: the net runs one step on
the meta device, where tensors have shapes and no data, and what autograd would keep for the
backward pass is added up. Temporary memory (workspaces, fragmentation) is not, so the peak is a
lower bound; benchmarks/LOG.md compares it with measured ones. Time is the step's floating-point
operations over the speed of one product of two large matrices on this device, times the share of
that speed which learning reaches; or, for one small picture at a time, the time the CPU takes to
launch the GPU's kernels, if that is longer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .adapters import count
from .checkpoint.backbone import kv_layers
from .checkpoint.layout import Part
from .checkpoint.load import AnyLayout, open_checkpoint, pick_device
from .checkpoint.narrow import DTYPES, FP8, compute_dtype_of, dtype_for, is_large
from .methods import METHODS
from .methods.method import Sizes
from .prepare import check_name, check_suits_checkpoint, summary_for, with_rank_of
from .requests import LearnRequest
from .settings import ResolvedSettings

TEXTS = "text encoders"
_CHECKPOINTED = ("ResnetBlock2D", "BasicTransformerBlock", "CosmosTransformerBlock")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The share of a large product's speed that learning reaches, at least and at most: measured on CPUs
# (benchmarks/LOG.md); on GPUs derived from kohya's step times for SDXL
_CPU_SHARES = (0.3, 0.85)
_GPU_SHARES = (0.08, 0.3)
# Seconds of CPU time per torch call, which a fast GPU waits for: 21 to 28 microseconds beside an H200
_GPU_CALLS = (1.2e-5, 3.6e-5)


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes."""

    family: str
    device: str
    size: int  # pixels a side
    rows: int  # pairs of image and prompt that go through the net at once, at most
    weights: dict[str, tuple[int, str]]  # by part, each with its dtype
    resting: list[str]  # the parts that lie in main memory while a GPU learns
    learned: int  # adapter and word
    optimizer: int  # its state and the gradient
    penalties: int  # of the method
    activations: int
    peak: int  # of the device
    stack_file: int
    exported: int  # the LoRA and the embedding
    # of the training steps, at best and at worst, without the method's further stages
    seconds: tuple[float, float]
    again: bool = False  # the same request was learned before, and would take nothing


def plan(request: LearnRequest) -> Plan:
    """The plan of this run.

    Errors: CheckpointError as in `load_backbone`; SettingError, StackError for a setting out of its
    range, or that does not suit the checkpoint or the stack.
    """
    here = pick_device(request.device)
    stack = summary_for(request)
    with open_checkpoint(request.checkpoint) as layout:
        check_suits_checkpoint(request, layout.preset, stack)
        settings = with_rank_of(stack, request.settings).resolved(layout.preset)
        check_name(request.checkpoint, settings, layout.preset)
        dtype = dtype_for(settings.precision, here)
        size = settings.size or layout.size
        method = METHODS[settings.method]
        step, rows = method.rows(settings, stack.count)
        weights = _weights(layout, dtype, here)
        kind, fresh = method.adapter_kind(settings), method.fresh_adapter(settings)
        rank = settings.rank if fresh else stack.adapter_rank or settings.rank
        trained = _numbers(layout, kind, rank)
        # the stack's, which stays if only a word is learned, and has a fresh one on top
        kind, rank = kind or stack.kind, rank + (stack.adapter_rank or 0) * fresh
        adapter, dense = _numbers(layout, kind, rank), _numbers(layout, "full", rank)
        exported = adapter if kind in ("", "full") else _numbers(layout, "lora", rank)
        word = layout.width * settings.vectors
        wide = compute_dtype_of(dtype, here)
        norms = wide if here.type == "cpu" else torch.float32  # as in autocast
        kept, flops, calls = _activations(layout, settings, wide, norms, step, rows, size // 8)
    learned = 4 * (adapter + word)
    sizes = Sizes(adapter, word, dense, layout.width)
    penalties = method.penalty_bytes(settings, sizes, stack.count)
    resting = [] if here.type == "cpu" else ["VAE", *([] if settings.vectors else [TEXTS])]
    optimizer = (trained + word) * (4 + (2 if settings.optimizer == "adamw8bit" else 8))
    used = sum(size for name, (size, _) in weights.items() if name not in resting)
    encoding = weights[layout.net_name][0] + weights[TEXTS][0]
    # forward, backward, and forward again with checkpointing
    passes = settings.steps * _parts(settings) * (3 if settings.checkpointing else 2)
    speed = _speed(here, wide)
    shares, waits = (_CPU_SHARES, (0.0, 0.0)) if here.type == "cpu" else (_GPU_SHARES, _GPU_CALLS)
    least, most = (
        passes * max(flops / (speed * share), calls * wait)
        for share, wait in zip(reversed(shares), waits, strict=True)
    )
    return Plan(
        layout.name,
        str(here),
        size,
        rows,
        weights,
        resting,
        learned,
        optimizer,
        penalties,
        kept,
        max(encoding, used + learned + optimizer + penalties + kept),
        stack.size + method.kept_bytes(settings, sizes, stack.count),
        2 * (exported + word),
        (least, most),
    )


def _parts(settings: ResolvedSettings) -> int:
    """How many parts a step is learned in: one with no picture is left out (`parallel.shares`)."""
    return min(settings.accumulate, settings.batch)


def _speed(here: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second in a product of two matrices that takes at least 20 ms;
    the best of three.
    """
    side, best = 128, 0.0
    while best < 0.02 and side < 8192:
        side *= 2
        matrix = torch.randn(side, side, device=here).to(dtype)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            (matrix @ matrix)[0, 0].item()  # waits for the result
            times.append(time.perf_counter() - start)
        best = min(times)
    return 2 * side**3 / best


def _weights(
    layout: AnyLayout, dtype: torch.dtype, here: torch.device
) -> dict[str, tuple[int, str]]:
    """Bytes and dtype of each part in memory."""
    wide = compute_dtype_of(dtype, here)
    unet = sum(
        p.numel() * (FP8 if dtype == FP8 and is_large(name, p) else wide).itemsize
        for name, p in layout.unet.module.named_parameters()
    )
    weights = {layout.net_name: (unet, _NAMES[dtype]), "VAE": (_bytes([layout.vae.module]), "fp32")}
    texts = [part.module for part in layout.texts]
    stored = _stored_format(layout.texts[0]) if dtype != torch.float32 else torch.float32
    return {**weights, TEXTS: (_bytes(texts) * stored.itemsize // 4, _NAMES[stored])}


def _bytes(models: Sequence[nn.Module]) -> int:
    """In float32."""
    return sum(4 * p.numel() for model in models for p in model.parameters())


def _stored_format(text: Part) -> torch.dtype:
    """The dtype of a text encoder in its file."""
    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16}
    return dtypes.get(text.weights.dtype(next(iter(text.names.values()))), torch.float32)


def _numbers(layout: AnyLayout, kind: str, rank: int) -> int:
    """How many numbers an adapter of this kind has; none if it is ""."""
    shapes = [layer.weight.shape for layer in kv_layers(layout.unet.module).values()]
    return sum(count(kind, out, width, rank) for out, width in shapes) if kind else 0


# --- activations


def _activations(
    layout: AnyLayout,
    settings: ResolvedSettings,
    dtype: torch.dtype,
    norms: torch.dtype,
    step: int,
    rows: int,
    side: int,
) -> tuple[int, float, int]:
    """The bytes kept for the backward pass, and the forward operations and torch calls of one of a
    step's parts.

    The bytes are the net's for `rows` and the text encoders' for the `step` pictures of the largest
    part, plus the largest checkpointed piece. The operations are those of an average part. The net
    computes in `dtype`, its norms in `norms`.
    """
    unet: Any = nn.Module.to(layout.unet.module, dtype).requires_grad_(False)
    # without vectors to learn, prompts are encoded before
    parts = layout.texts if settings.vectors else []
    texts = [part.module.requires_grad_(False) for part in parts]
    prompts = min(step, 7)  # each distinct one is encoded once; later stages cache the features
    with torch.device("meta"):
        ids = torch.zeros(prompts, 77, dtype=torch.long)
        with _kept(*texts) as of_text, _learning_words(texts):
            for model in texts:
                model(ids)
        question = layout.question(rows, side, dtype)
        question["encoder_hidden_states"].requires_grad_()

        def run_unet(kept: _Kept) -> list[int]:
            sizes: list[int] = []
            with _sized(unet, kept, sizes), _computing_in(unet, dtype, norms):
                unet(**question)
            return sizes

        with _kept(unet) as whole:
            pieces = run_unet(whole)
        average = settings.batch / _parts(settings)
        flops = (of_text.flops + whole.flops * step / rows) * average / step
        calls = of_text.calls + whole.calls
        if not settings.checkpointing:
            return of_text.bytes + whole.bytes, flops, calls
        unet.enable_gradient_checkpointing()
        unet.train()
        with _kept(unet) as of_unet:
            run_unet(of_unet)
    return of_text.bytes + of_unet.bytes + max(pieces, default=0), flops, calls


class _Kept(TorchDispatchMode):
    """Sums the bytes autograd keeps, each storage once and without the weights.

    Also counts all torch calls, and the operations of linear layers, convolutions and attention.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.bytes = self.flops = self.calls = 0
        self.seen = {
            p.untyped_storage()._cdata: p.untyped_storage()
            for model in models
            for p in model.parameters()
        }

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen[storage._cdata] = storage
            self.bytes += storage.nbytes()
        return tensor

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))

    def layer(self, module: Any, _: object, out: Tensor) -> None:
        self.flops += 2 * out.numel() * module.weight[0].numel()

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object
    ) -> Tensor:
        self.flops += 4 * query.numel() * key.shape[-2]
        return _Fused.apply(query, key, value)


@contextmanager
def _kept(*models: nn.Module) -> Iterator[_Kept]:
    """Inside the block, count what autograd keeps for these models.

    Attention counts as fused, which it is on every device but the meta device: it keeps its inputs
    and output, not its weights.
    """
    kept, plain = _Kept(models), F.scaled_dot_product_attention
    layers = [
        module
        for model in models
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    handles = [module.register_forward_hook(kept.layer) for module in layers]
    F.scaled_dot_product_attention = kept.attention
    try:
        with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor), kept:
            yield kept
    finally:
        F.scaled_dot_product_attention = plain
        for handle in handles:
            handle.remove()


class _Fused(torch.autograd.Function):
    """Only the shapes of an attention, without a backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, output)
        return output


@contextmanager
def _computing_in(unet: nn.Module, dtype: torch.dtype, norms: torch.dtype) -> Iterator[None]:
    """Inside the block, mimic autocast: norms compute in `norms`, and other layers read `dtype`."""

    def cast(to: torch.dtype) -> Any:
        return lambda _module, inputs: (inputs[0].to(to), *inputs[1:])

    handles = []
    for module in unet.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            handles.append(nn.Module.to(module, norms).register_forward_pre_hook(cast(norms)))
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            handles.append(module.register_forward_pre_hook(cast(dtype)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _sized(unet: nn.Module, kept: _Kept, sizes: list[int]) -> Iterator[None]:
    """Inside the block, every piece of the net that checkpointing recomputes records the bytes it
    keeps.
    """
    handles, before = [], {}
    for module in unet.modules():
        if type(module).__name__ in _CHECKPOINTED:
            handles.append(
                module.register_forward_pre_hook(lambda m, _: before.update({m: kept.bytes}))
            )
            handles.append(
                module.register_forward_hook(lambda m, *_: sizes.append(kept.bytes - before[m]))
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _learning_words(texts: Sequence[Any]) -> Iterator[None]:
    """Inside the block, gradients flow back to the embeddings."""
    handles = [
        model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_())
        for model in texts
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
