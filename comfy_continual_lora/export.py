"""Stage 7: the stack -> files everyone can load: one LoRA, and one textual-inversion embedding for
each word.

in: a stack - out: in a folder <name>.safetensors (the LoRA, with its trigger words in the
metadata), <name>.json and <name>.preview.jpg (A1111's
card), and <token>.safetensors for each word. A LoRA file is never overwritten: web UIs keep old
weights and hashes of a name they know. Files say in
their metadata whose they are, and nothing is overwritten that is not the same stack's own.

    kohya       the default: ComfyUI, the A1111 family and diffusers read these names (layers called
    as in diffusers for SD1.x and SD2.x, as in LDM
                for SDXL, which is what kohya's own programs expect)
    diffusers   PEFT's names behind "unet.", for `load_lora_weights`; ComfyUI ignores this one and
    the next with no more than a line in its log
    peft        a folder for `PeftModel.from_pretrained(unet, folder)`
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from .adapters.adapter import Adapter, factored, layers_of
from .checkpoint import keys
from .concepts import name_of
from .errors import StackError
from .files import TOKEN, clean_temporary, write_whole
from .stack import CheckpointInfo, ConceptRecord, ConceptStack

_PREFIXES = {"diffusers": "unet.", "peft": "base_model.model."}
# Whose a file is: the stack's identity, the word of an embedding, the concepts a LoRA was solved
# for (all: nothing)
_STACK, _TOKEN, _ONLY = (f"continual_lora.{name}" for name in ("stack", "token", "only"))
_EMBEDDINGS = (
    ".safetensors",
    ".pt",
    ".bin",
    ".png",
    ".webp",
    ".jxl",
    ".avif",
)  # what some program loads as an embedding, by its stem
# modelspec.architecture, ss_base_model_version, and A1111's name of the family
_SD1 = ("stable-diffusion-v1", "sd_v1", "SD1")
_SPOKEN_OF = {
    "sd2": ("stable-diffusion-v2-512", "sd_v2", "SD2"),
    "sdxl": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "SDXL"),
}


@dataclass(frozen=True)
class Exported:
    """What was written.

    `renamed`: by word, the name its embedding has because another file has the word's.
    """

    lora: Path | None  # a file, PEFT's a folder; None where the words alone are all there is
    embeddings: list[Path]
    triggers: list[str]  # how prompts name each concept
    renamed: dict[str, str]
    superseded: list[Path]  # earlier exports of the same stack, still there
    removed: list[Path]  # earlier exports of the same stack, removed as was asked for

    def summary(self) -> str:
        """The files, how prompts name the concepts, and the notes."""
        lines = [str(path) for path in (self.lora, *self.embeddings) if path]
        if self.triggers:
            words = ", ".join(f"embedding:{path.stem}" for path in self.embeddings)
            lines.append(f"In prompts: {', '.join(self.triggers)} (ComfyUI: {words})")
        return "\n".join([*lines, *self.notes]) or "There is no concept to export."

    def as_json(self) -> dict[str, Any]:
        """Paths as text."""
        return {
            "lora": str(self.lora) if self.lora else None,
            "embeddings": [str(path) for path in self.embeddings],
            "triggers": self.triggers,
            "renamed": self.renamed,
            "superseded": [str(path) for path in self.superseded],
            "removed": [str(path) for path in self.removed],
            "notes": self.notes,
        }

    @property
    def notes(self) -> list[str]:
        """What a user has to know of it, a sentence each."""
        notes = [
            (
                f"{word} is another file's name there, so the word is exported as {name}: prompts "
                "say "
                f"{name}."
            )
            for word, name in self.renamed.items()
        ]
        if self.removed:
            notes.append(
                "Removed earlier exports of this stack: "
                f"{', '.join(path.name for path in self.removed)}."
            )
        if self.superseded:
            names = ", ".join(path.name for path in self.superseded)
            notes.append(
                f"Earlier exports of this stack are still there and can be removed: {names}."
            )
        return notes


def kohya_lora(adapter: Adapter, width: int, base: CheckpointInfo) -> dict[str, Tensor]:
    """The adapter under kohya's names, float16; `width` is that of the text features.

    A full-size change becomes ".diff".
    """
    found, layers = {}, layers_of(adapter)
    ldm = keys.unet_names(layers) if base.preset == "sdxl" else {}
    for layer, parts in layers.items():
        name = f"lora_unet_{ldm.get(layer, layer).replace('.', '_')}"
        if "D" in parts:
            found[f"{name}.diff"] = parts["D"]
            continue
        up, down = factored(parts, width)
        found |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(float(len(down))),
        }
    return {key: tensor.half().contiguous() for key, tensor in found.items()}


def plain_lora(adapter: Adapter, width: int, prefix: str) -> dict[str, Tensor]:
    """The adapter under PEFT's names with `prefix` before each, float16.

    Errors: StackError for a full-size change, which has no name there.
    """
    found = {}
    for layer, parts in layers_of(adapter).items():
        if "D" in parts:
            raise StackError(
                "All of K and V was learned (custom_diffusion), which is no LoRA: only kohya's "
                "format can hold it. Leave `format` out."
            )
        up, down = factored(parts, width)
        found |= {f"{prefix}{layer}.lora_A.weight": down, f"{prefix}{layer}.lora_B.weight": up}
    return {key: tensor.half().contiguous() for key, tensor in found.items()}


def stock_lora(stack: ConceptStack, format: str = "kohya") -> dict[str, Tensor]:
    """The stack's adapter as other programs name it; empty where the words alone are all there is.

    Text features are as wide as a word's vector.
    """
    if not stack.adapter:
        return {}
    width = next(iter(stack.words.values())).shape[1]
    return (
        kohya_lora(stack.adapter, width, stack.checkpoint)
        if format == "kohya"
        else plain_lora(stack.adapter, width, _PREFIXES[format])
    )


def embedding(word: Tensor, base: CheckpointInfo) -> dict[str, Tensor]:
    """A word's vectors as a textual inversion, float16: one (k, d), or one for each of SDXL's text
    encoders.
    """
    if len(base.word_widths) == 2:
        return {
            name: part.half().clone()
            for name, part in zip(
                ("clip_l", "clip_g"), word.split(list(base.word_widths), 1), strict=True
            )
        }
    return {"emb_params": word.half()}


def export_files(
    stack: ConceptStack,
    out: Path,
    embeddings: Path,
    stem: str,
    format: str = "kohya",
    only: Sequence[str] = (),
    remove: bool = False,
) -> Exported:
    """Write the files; the LoRA's name says whose it is and what is on it, and ends in a hash of
    its weights.

    `stem` names the stack, `only` the concepts it was solved for, if not all; `remove` earlier
    exports of the
    same concepts. Nothing is overwritten that is not this stack's own: a word whose name another
    file has
    gets a name of its own. Errors: StackError for an empty stack or a folder that can't be written.
    """
    if not stack.records:
        raise StackError(
            "The stack holds no concept, so there is nothing to export. Learn one first."
        )
    if bad := next(
        (record.token for record in stack.records if not TOKEN.fullmatch(record.token)), None
    ):
        raise StackError(
            f"The word {bad!r} can't name a file. It may hold only letters, digits, - and _."
        )
    tensors = stock_lora(stack, format)
    try:
        with _exporting(out, embeddings):
            taken = _taken(embeddings)
            words = {
                record.token: _write_word(stack, record, embeddings, taken)
                for record in stack.records
            }
            renamed = {token: path.stem for token, path in words.items() if path.stem != token}
            triggers = [
                name_of(words[r.token].stem, r.noun if r.with_noun else "") for r in stack.records
            ]
            lora = (
                _write_lora(stack, tensors, out, stem, triggers, format, only) if tensors else None
            )
            earlier = [
                path
                for path in _earlier(stack, out, embeddings, only)
                if path not in (lora, *words.values())
            ]
            removed = [path for path in earlier if remove and _remove(path)]
    except OSError as error:
        raise StackError(
            f"The export to {out} failed ({error.strerror or error}): no room or no permission "
            "there. The stack is unchanged."
        ) from None
    return Exported(
        lora,
        list(words.values()),
        triggers,
        renamed,
        [path for path in earlier if path not in removed],
        removed,
    )


@contextmanager
def _exporting(*folders: Path) -> Iterator[None]:
    """The folders are there, and no other export changes them meanwhile; what killed ones left is
    cleaned up.
    """
    with ExitStack() as locks:
        for folder in sorted({folder.resolve() for folder in folders}):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                locks.enter_context(FileLock(folder / ".continual-lora.lock", timeout=60))
            except Timeout:
                raise StackError(
                    f"Another program has been exporting to {folder} for a minute. Wait until it "
                    "is done, or stop it."
                ) from None
            clean_temporary(folder)
        yield


def _taken(folder: Path) -> dict[str, list[Path]]:
    """The files that some program loads as an embedding, by the word they answer to."""
    taken: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        if path.suffix.lower() in _EMBEDDINGS:
            taken.setdefault(path.stem.lower(), []).append(path)
    return taken


def _write_word(
    stack: ConceptStack, record: ConceptRecord, folder: Path, taken: dict[str, list[Path]]
) -> Path:
    """The embedding, under its word's name; where that is another file's, under one with a number.

    `taken` knows it then.
    """
    tensors = {
        name: tensor.contiguous()
        for name, tensor in embedding(stack.words[record.id], stack.checkpoint).items()
    }
    data = save(tensors, {_STACK: stack.owner, _TOKEN: record.token})
    for number in range(1, 10_000):
        path = folder / f"{record.token if number == 1 else f'{record.token}-{number}'}.safetensors"
        others = taken.get(path.stem.lower(), [])
        if all(other == path and _is_own(other, stack, record, tensors) for other in others):
            write_whole(path, data, new=not others)
            taken[path.stem.lower()] = [path]
            return path
    raise StackError(f"{folder} has no name left for {record.token}. Export to another folder.")


def _is_own(
    path: Path, stack: ConceptStack, record: ConceptRecord, tensors: Mapping[str, Tensor]
) -> bool:
    """Whether an embedding's file is this stack's for this word, or holds the same (an earlier
    program wrote no owner).
    """
    owner = _owner(path)
    if owner.get(_STACK):
        return owner[_STACK] == stack.owner and owner.get(_TOKEN) == record.token
    try:
        held = load_file(path)
    except (SafetensorError, OSError):
        return False
    return held.keys() == tensors.keys() and all(
        torch.equal(held[name], tensor) for name, tensor in tensors.items()
    )


def _owner(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, of a PEFT folder that of the file in it; nothing for any
    other.
    """
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _earlier(stack: ConceptStack, out: Path, embeddings: Path, only: Sequence[str]) -> list[Path]:
    """LoRAs of the same stack and concepts, and embeddings of words that the stack no longer has."""
    tokens, found = set(stack.tokens), []
    for path in sorted(out.iterdir()):
        owner = _owner(path) if path.suffix == ".safetensors" or path.is_dir() else {}
        if owner.get(_STACK) == stack.owner and _ONLY in owner and owner[_ONLY] == _named(only):
            found.append(path)
    for path in sorted(embeddings.glob("*.safetensors")):
        owner = _owner(path)
        if (
            not only
            and owner.get(_STACK) == stack.owner
            and owner.get(_TOKEN, "") not in {"", *tokens}
        ):
            found.append(path)
    return found


def _named(only: Sequence[str]) -> str:
    return ",".join(sorted(token.lower() for token in only))


def _remove(path: Path) -> bool:
    """Remove an export with its card and preview; whether it is gone."""
    try:
        if path.is_dir():
            for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
                (path / name).unlink(missing_ok=True)
            path.rmdir()
        else:
            path.unlink()
            for ending in (".json", ".preview.jpg"):
                path.with_suffix(ending).unlink(missing_ok=True)
    except OSError:
        return False
    return True


def lora_name(stem: str, tokens: Sequence[str], digest: str) -> str:
    """`sd15-V1-V2-1a2b3c4d`; of many concepts the first and the last.

    Without what a prompt's <lora:...> or a file system minds.
    """
    words = (
        "-".join(tokens)
        if len(tokens) <= 4
        else f"{tokens[0]}-to-{tokens[-1]}-{len(tokens)}-concepts"
    )
    return f"{re.sub(r'[<>:,|?*/&]', '-', stem)[:100]}-{words[:100]}-{digest[:8]}"


def _write_lora(
    stack: ConceptStack,
    tensors: dict[str, Tensor],
    out: Path,
    stem: str,
    triggers: list[str],
    format: str,
    only: Sequence[str],
) -> Path:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    digest.update(json.dumps([triggers, stack.owner]).encode())
    name = lora_name(stem, [record.token for record in stack.records], digest.hexdigest())
    metadata = {**_metadata(stack, name, triggers), _STACK: stack.owner, _ONLY: _named(only)}
    if format == "peft":
        layers, folder = list(layers_of(stack.adapter or {})), out / name
        if _owner(folder).get(_STACK) != stack.owner:
            LoraConfig(
                r=stack.rank or 0, lora_alpha=stack.rank or 0, target_modules=layers
            ).save_pretrained(str(folder))
            write_whole(folder / "adapter_model.safetensors", save(tensors, metadata))
        return folder
    path = (
        out / f"{name}.safetensors"
    )  # the hash is of whose it is too, so nobody else's has this name
    if _owner(path).get(_STACK) != stack.owner:  # else these very weights were exported before
        write_whole(path, save(tensors, metadata), new=True)
    if format == "kohya":
        for ending, data in _card(stack, triggers).items():
            if not (beside := out / f"{name}{ending}").exists():
                write_whole(beside, data, new=True)
    return path


def _card(stack: ConceptStack, triggers: list[str]) -> dict[str, bytes]:
    """What A1111 shows of a LoRA, by the files' endings."""
    version = _SPOKEN_OF.get(stack.checkpoint.preset, _SD1)[2]
    card = {
        "description": "",
        "sd version": version,
        "activation text": ", ".join(triggers),
        "preferred weight": 1.0,
        "notes": "",
    }
    files = {".json": json.dumps(card, indent=1).encode()}
    picture = base64.b64decode(stack.records[-1].preview)
    return {**files, ".preview.jpg": picture} if picture.startswith(b"\xff\xd8") else files


def _metadata(stack: ConceptStack, name: str, triggers: list[str]) -> dict[str, str]:
    """What web UIs, kohya's programs and model sites read in a LoRA's file."""
    rank, preset, v = (
        str(stack.rank),
        stack.checkpoint.preset,
        stack.checkpoint.prediction == "v_prediction",
    )
    architecture, version, _ = _SPOKEN_OF.get(preset, _SD1)
    if preset == "sd2" and v:
        architecture, version = "stable-diffusion-v2-768-v", "sd_v2_v"
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "comfy-continual-lora",
        "modelspec.title": name,
        "modelspec.trigger_phrase": ", ".join(triggers),
        "ss_output_name": name,
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_tag_frequency": json.dumps({"concepts": dict.fromkeys(triggers, 1)}),
        **({"ss_v2": "True"} if preset == "sd2" else {}),
        **({"modelspec.prediction_type": "v"} if v else {}),
    }
