"""Stage 6: which tensors a stack file may hold, and whether they fit its header and each other. Light.

The file may come from an untrusted source, so what differs from what `store` writes is an error that
names it. `Sizes` are a tensor's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .adapters import DENSE, PARTS, kind_with
from .errors import StackError
from .presets import PLAIN_NAME_PRESETS
from .settings import MOST_VECTORS

BYTES = {"F32": 4, "F16": 2, "I8": 1}  # of a value, by safetensors' names
Sizes = tuple[int, ...]
Ends = dict[str, tuple[int | None, int | None]]  # by layer, outputs and inputs as far as known
_LAYER = r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*"
_PART = r"[A-Za-z]\w*"
_NAMES = re.compile(
    rf"(?P<word>word)\.(?P<of>[A-Za-z0-9_-]+)"
    rf"|(?P<part>adapter|before)\.(?P<layer>{_LAYER})\.(?P<tensor>{_PART})"
    rf"|(?P<target>wish|scale)\.(?P<target_of>[A-Za-z0-9_-]+)\.(?P<joined>{_PART})"
    rf"|ordinary\.(?P<ordinary>listed|drawn)"
    rf"|(?P<prompts>alone|shared)\.(?P<about>[A-Za-z0-9_-]+)"
    rf"|(?P<held>pool|wish|fisher)\.(?P<concept>[A-Za-z0-9_-]+)"
    rf"\.(?P<held_layer>{_LAYER})\.(?P<held_tensor>{_PART})"
)


@dataclass(frozen=True)
class Shape:
    """A tensor as the header describes it; `start` is its first byte in the file."""

    dtype: str
    sizes: Sizes
    start: int


def unusable(path: Path, what: str) -> StackError:
    """The error for a stack whose header or tensors are not as they have to be."""
    return StackError(
        f"The concept stack {path} can't be used: {what}. It is damaged, was tampered with, or is of "
        "a later version: get the file again, go back to an earlier version (`restore`), or "
        "update comfy-continual-lora."
    )


def check_tensors(path: Path, header: Mapping[str, Any], shapes: Mapping[str, Shape]) -> None:
    """Check that every word and layer is there, and that their shapes fit each other.

    Errors: StackError that names the first problem.
    """
    found = _sorted(path, header, shapes)
    _words_fit(path, header, found.words)
    width = next((sizes[-1] for sizes in found.words.values()), 0)
    _prompts_fit(path, header, found.prompts, width)
    ends = _adapters_fit(path, header, found.adapters)
    _targets_fit(path, header, found, list(ends.get("adapter", {}).values()))


@dataclass
class _Tensors:
    """The sizes of a file's tensors, by what they are."""

    words: dict[str, Sizes] = field(default_factory=dict)  # by concept
    prompts: dict[str, Sizes] = field(default_factory=dict)  # by name
    targets: dict[str, dict[str, Sizes]] = field(default_factory=dict)  # by concept, part
    scales: dict[str, dict[str, Sizes]] = field(default_factory=dict)
    # by adapter, layer, part; targets of format version 1 are among them
    adapters: dict[str, dict[str, dict[str, Sizes]]] = field(default_factory=dict)


def _sorted(path: Path, header: Mapping[str, Any], shapes: Mapping[str, Shape]) -> _Tensors:
    """Errors: StackError for an unknown name, another dtype, and a concept that is none."""
    ids = {record["id"] for record in header["concepts"]}
    found = _Tensors()
    for name, shape in shapes.items():
        match = _NAMES.fullmatch(name)
        if match is None:
            raise unusable(path, f"it holds an unknown tensor {name[:100]!r}")
        expected = "F16" if match["prompts"] else "F32"
        if match["target"] == "wish":
            expected = "I8" if _is_packed(header) else "F16"
        if shape.dtype != expected:
            raise unusable(path, f"its tensor {name} is {shape.dtype}, expected {expected}")
        concept = match["of"] or match["concept"] or match["about"] or match["target_of"]
        if concept and concept not in ids:
            raise unusable(path, f"its tensor {name} belongs to no concept")
        if match["word"]:
            found.words[concept] = shape.sizes
        elif match["prompts"] or match["ordinary"]:
            found.prompts[name] = shape.sizes
        elif match["target"]:
            kept = found.targets if match["target"] == "wish" else found.scales
            kept.setdefault(concept, {})[match["joined"]] = shape.sizes
        else:
            adapter = match["part"] or f"{match['held']}.{concept}"
            layers = found.adapters.setdefault(adapter, {})
            layer, part = match["layer"] or match["held_layer"], match["tensor"]
            layers.setdefault(layer, {})[part or match["held_tensor"]] = shape.sizes
    return found


def _is_packed(header: Mapping[str, Any]) -> bool:
    """Whether its targets are in eight bits, with scales; format version 2 has them in float16."""
    return header["version"] > 2


def _adapters_fit(
    path: Path,
    header: Mapping[str, Any],
    adapters: Mapping[str, Mapping[str, Mapping[str, Sizes]]],
) -> dict[str, Ends]:
    """Check that all of them change the same layers; the outputs and inputs of each one's layers."""
    ends = {name: _layers_fit(path, name, layers) for name, layers in adapters.items()}
    first = next(iter(ends.values()), {})
    for name, layers in ends.items():
        if layers.keys() != first.keys():
            raise unusable(path, f"{name} changes other layers than the rest")
        for layer, sizes in layers.items():
            if any(a != b for a, b in zip(sizes, first[layer], strict=True) if a and b):
                raise unusable(path, f"{name} does not fit the rest in its layer {layer}")
    if any(name != "adapter" for name in ends) and "adapter" not in ends and not header["concepts"]:
        raise unusable(path, "it holds adapters but no concept")
    return ends


def _targets_fit(
    path: Path,
    header: Mapping[str, Any],
    found: _Tensors,
    layers: Sequence[tuple[int | None, int | None]],
) -> None:
    """Check that targets are of the adapter's layers, given by their outputs and inputs, and that
    packed ones have their scales.
    """
    for concept, parts in found.targets.items():
        if not _joined_fit(parts, layers):
            listed = ", ".join(f"{name} {shape}" for name, shape in parts.items())
            raise unusable(path, f"wish.{concept} does not fit the adapter: {listed}")
    packed = found.targets if _is_packed(header) else {}
    scales = {
        concept: {
            part: (len(layers), sizes[1]) if part == "B" else (sizes[0], 1)
            for part, sizes in parts.items()
        }
        for concept, parts in packed.items()
    }
    for concept in scales.keys() | found.scales.keys():
        if found.scales.get(concept) != scales.get(concept):
            raise unusable(path, f"scale.{concept} does not fit wish.{concept}")


def _joined_fit(
    tensors: Mapping[str, Sizes], ends: Sequence[tuple[int | None, int | None]]
) -> bool:
    """Whether these are the tensors of layers with these numbers of outputs and inputs, each joined
    along its first dimension: A (layers r, width), B (outputs, r) or D (outputs, width).
    """
    kind = kind_with(set(tensors))
    width = next((width for _, width in ends), None)
    if kind not in ("lora", "full") or width is None or any(out is None for out, _ in ends):
        return False
    outputs = sum(out for out, _ in ends if out)
    if kind == "full":
        return tensors["D"] == (outputs, width)
    rank = tensors["B"][-1]
    return rank > 0 and tensors == {"A": (len(ends) * rank, width), "B": (outputs, rank)}


def _prompts_fit(
    path: Path, header: Mapping[str, Any], prompts: Mapping[str, Sizes], width: int
) -> None:
    """Check the rows of prompts, (k, d), and the triangles of ordinary ones; `width` is d."""
    if (header["ordinary"] is None) != ("ordinary.listed" not in prompts):
        raise unusable(path, "it holds only one of ordinary prompts and their description")
    if "ordinary.drawn" in prompts and "ordinary.listed" not in prompts:
        raise unusable(path, "ordinary.listed is missing")
    for name, sizes in prompts.items():
        part, _, concept = name.partition(".")
        if part == "ordinary":
            fits = len(sizes) == 1 and (not width or sizes[0] == width * (width + 1) // 2)
        else:
            fits = len(sizes) == 2 and sizes[1] == width and sizes[0] <= width
            other = "shared" if part == "alone" else "alone"
            if f"{other}.{concept}" not in prompts:
                raise unusable(path, f"{other}.{concept} is missing")
        if not fits:
            raise unusable(path, f"its tensor {name} has the shape {sizes}, which does not fit")


def _words_fit(path: Path, header: Mapping[str, Any], words: Mapping[str, Sizes]) -> None:
    widths = set()
    for record in header["concepts"]:
        sizes = words.get(record["id"])
        if sizes is None:
            raise unusable(path, f"the word of {record['token']} is missing")
        is_plain = header["base"]["preset"] in PLAIN_NAME_PRESETS
        least, most = (0, 0) if is_plain else (1, MOST_VECTORS)
        is_matrix = len(sizes) == 2 and least <= sizes[0] <= most
        if not all(sizes[-1:]) or not (is_matrix or (len(sizes) == 1 and not is_plain)):
            raise unusable(
                path,
                f"the word of {record['token']} has the shape {sizes}, expected {least} to {most} "
                "vectors",
            )
        widths.add(sizes[-1])
    declared = sum(header["base"]["word_widths"])
    if len(widths | ({declared} if declared else set())) > 1 and widths:
        raise unusable(
            path,
            f"its words have different widths ({', '.join(map(str, sorted(widths)))}; "
            f"{declared or 'none'} by its header)",
        )


def _layers_fit(path: Path, part: str, layers: Mapping[str, Mapping[str, Sizes]]) -> Ends:
    """Each layer's numbers of outputs and inputs, as far as its tensors determine them."""
    ends: Ends = {}
    ranks, kinds = set(), set()
    for layer, tensors in layers.items():
        sizes = _sizes(tensors, dense=part.startswith("fisher"))
        if sizes is None:
            listed = ", ".join(f"{name} {shape}" for name, shape in tensors.items())
            raise unusable(path, f"{part} is incomplete in its layer {layer}: {listed}")
        if 0 in sizes.values():
            raise unusable(path, f"{part} is empty in its layer {layer}")
        ends[layer] = sizes.get("out"), sizes.get("width")
        ranks.add(sizes.get("rank"))
        kinds.add(frozenset(tensors))
    if len(kinds) > 1 or len(ranks) > 1:
        raise unusable(path, f"the layers of {part} are of different kinds or ranks")
    if len({width for _, width in ends.values()}) > 1:
        raise unusable(path, f"the layers of {part} have different widths of text features")
    return ends


def _sizes(tensors: Mapping[str, Sizes], dense: bool) -> dict[str, int] | None:
    """The rank, out and width that the tensors of a layer agree on; None if they don't."""
    kind = kind_with(set(tensors))
    names = PARTS[kind] if kind else DENSE if dense and tensors.keys() == DENSE.keys() else None
    if names is None:
        return None
    sizes: dict[str, int] = {}
    for name, shape in tensors.items():
        if len(shape) != len(names[name]):
            return None
        for dimension, size in zip(names[name], shape, strict=True):
            if sizes.setdefault(dimension, size) != size:
                return None
    return sizes
