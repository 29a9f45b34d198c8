"""Anima's files, three or a diffusers folder: their `AnimaLayout`.

The nets' shapes say what they are, and the names of the originals become diffusers' by its own
converters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from ..errors import CheckpointError
from .anima import END_OF_TEXT
from .companions import (
    QWEN_TOKENIZER,
    T5_TOKENIZER,
    TEXT_ENCODER,
    VAE,
    companion,
    tokenizer_folder,
)
from .folder import Nets, tokenizer_part
from .keys import name_in_net
from .layout import (
    Part,
    Shape,
    Weights,
    check_not_quantised,
    part_of,
    resolution_of,
)

SIZE = 1024
BLOCKS = 28  # of the net that is published; its 2.9 B variant has 40
_CONDITIONER = "llm_adapter."
_NEEDED = {
    diffusers: ("CosmosTransformer3DModel", "AnimaTextConditioner", "AutoencoderKLQwenImage"),
    transformers: ("Qwen3Model",),
}
# what no shape says: diffusers' scripts/convert_cosmos_to_diffusers.py and ComfyUI's Anima
_NET = {
    "max_size": (128, 240, 240),
    "patch_size": (1, 2, 2),
    "rope_scale": (1.0, 4.0, 4.0),
    # the net has the mask as a channel more: to add it, diffusers needs torchvision
    "concat_padding_mask": False,
    "extra_pos_embed_type": None,
}
_QWEN: dict[str, Any] = {"rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0}


@dataclass(frozen=True)
class AnimaLayout:
    """What an Anima is."""

    unet: Part
    conditioner: Part
    text: Part
    vae: Part
    qwen_tokenizer: Path  # folders
    t5_tokenizer: Path
    size: int = SIZE  # pixels a side

    name = "Anima"
    preset = "anima"
    net_name = "transformer"

    @property
    def texts(self) -> list[Part]:
        return [self.text, self.conditioner]

    @property
    def width(self) -> int:
        """Of text features."""
        return self.unet.module.config["text_embed_dim"]

    def question(self, rows: int, side: int, dtype: torch.dtype) -> dict[str, Any]:
        """As `Layout.question`."""
        even = side + side % 2
        channels = self.unet.module.config["in_channels"]
        positions = self.conditioner.module.config["min_sequence_length"]
        return {
            "hidden_states": torch.empty(rows, channels, 1, even, even, dtype=dtype),
            "timestep": torch.empty(rows),
            "encoder_hidden_states": torch.empty(rows, positions, self.width, dtype=dtype),
        }

    def check(self, path: Path) -> None:
        """Errors: CheckpointError for parts that do not fit each other."""
        net, conditioner = self.unet.module.config, self.conditioner.module.config
        channels = self.vae.module.config["z_dim"]
        if not net["in_channels"] - 1 == net["out_channels"] == channels:
            raise CheckpointError(
                f"{path}: the net's latents have {net['out_channels']} channels, the VAE's {channels}. "
                f"Expected Qwen-Image's VAE, {VAE.published}."
            )
        widths = {
            "the text encoder gives": self.text.module.config.hidden_size,
            "the conditioner reads": conditioner["source_dim"],
            "the conditioner gives": conditioner["target_dim"],
            "the net reads": net["text_embed_dim"],
        }
        if len(set(widths.values())) > 1:
            found = ", ".join(f"{name} {width}" for name, width in widths.items())
            raise CheckpointError(
                f"{path}: {found} features. Expected the same number, 1024 in Anima, whose text "
                f"encoder is {TEXT_ENCODER.published}."
            )


def check_libraries(path: Path) -> None:
    """Errors: CheckpointError for libraries that are too old to have Anima's parts."""
    for library, names in _NEEDED.items():
        for name in names:
            if not hasattr(library, name):
                raise CheckpointError(
                    f"{path} is Anima, for which {library.__name__} {library.__version__} is too old: "
                    f"it has no {name}. Install {library.__name__} of 2026 (tried with diffusers 0.42 "
                    "and transformers 5.24)."
                )


def anima_file_layout(path: Path, file: Any, open_file: Callable[[Path], Any]) -> AnimaLayout:
    """Of the file of a net, and those that belong to it.

    Errors: CheckpointError for files that are missing, damaged or quantised, a net of another depth,
    and old libraries.
    """
    check_libraries(path)
    weights = Weights(path, [file], name_in_net)
    check_not_quantised(weights)
    net = _net(weights)
    _check_depth(path, net)
    text_path, vae_path = companion(path, TEXT_ENCODER), companion(path, VAE)
    text, vae = (Weights(one, [open_file(one)]) for one in (text_path, vae_path))
    for other in (text, vae):
        check_not_quantised(other)
    return AnimaLayout(
        net,
        _conditioner(weights),
        _text(text),
        _vae(vae),
        tokenizer_folder(path, QWEN_TOKENIZER),
        tokenizer_folder(path, T5_TOKENIZER),
        resolution_of((file.metadata() or {}).get("modelspec.resolution", "")) or SIZE,
    )


def anima_folder_layout(path: Path, open_file: Callable[[Path], Any]) -> AnimaLayout:
    """Of a diffusers folder, with the names of AnimaModularPipeline's components.

    Errors: CheckpointError as in `folder_layout`, for a net of another depth, and for old libraries.
    """
    check_libraries(path)
    nets = Nets(path, open_file)

    def part(folder: str, kind: Any) -> Part:
        return nets.part(folder, nets.config(folder, kind), kind.from_config)

    def text(config: dict[str, Any]) -> Any:
        return transformers.Qwen3Model(transformers.Qwen3Config(**config))

    kind = diffusers.CosmosTransformer3DModel
    config = nets.config("transformer", kind)
    channels = config.get("in_channels", 16) + bool(config.get("concat_padding_mask", True))
    config = {**config, "in_channels": channels, "concat_padding_mask": False}
    net = nets.part("transformer", config, kind.from_config)
    _check_depth(path, net)
    config = nets.config("text_encoder", transformers.Qwen3Config)
    return AnimaLayout(
        net,
        part("text_conditioner", diffusers.AnimaTextConditioner),
        nets.part("text_encoder", config, text, lambda name: f"model.{name}"),
        part("vae", diffusers.AutoencoderKLQwenImage),
        tokenizer_part(path, "tokenizer"),
        tokenizer_part(path, "t5_tokenizer"),
    )


def _check_depth(path: Path, net: Part) -> None:
    if (blocks := net.module.config["num_layers"]) > BLOCKS:
        raise CheckpointError(
            f"{path} can't be taught: it is Anima with {blocks} blocks (such as Anima 2.9B). Take Anima "
            f"with {BLOCKS}, or a fine-tune of it."
        )


def anima_tokenizers(layout: AnimaLayout) -> tuple[Any, Any]:
    """Qwen's and T5's. Errors: CheckpointError for one that can't be read, or is another model's."""
    library: Any = transformers
    qwen = _tokenizer(library.Qwen2TokenizerFast, layout.qwen_tokenizer)
    t5 = _tokenizer(library.T5TokenizerFast, layout.t5_tokenizer)
    sizes = (
        (qwen, layout.qwen_tokenizer, END_OF_TEXT, layout.text.module.config.vocab_size),
        (t5, layout.t5_tokenizer, "</s>", layout.conditioner.module.config["target_vocab_size"]),
    )
    for tokenizer, folder, end, count in sizes:
        vocabulary = tokenizer.get_vocab()
        if end not in vocabulary or max(vocabulary.values()) >= count:
            raise CheckpointError(
                f"The tokenizer {folder} does not fit: its largest token is "
                f"{max(vocabulary.values(), default=-1)} and it has {end}: {end in vocabulary}; the "
                f"model knows {count} tokens. Expected the one that ComfyUI and Forge Neo have for Anima."
            )
    return qwen, t5


def _tokenizer(kind: Any, folder: Path) -> Any:
    try:
        return kind.from_pretrained(str(folder), local_files_only=True)  # nosec B615
    except Exception as error:  # the library raises anything for files of another kind
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"The tokenizer {folder} can't be read ({type(error).__name__}: {reason:.200}). Get it "
            "again: it is a part of ComfyUI and of Forge Neo."
        ) from None


def _net(weights: Weights) -> Part:
    stored = _Shapes(weights)

    def make() -> Any:
        width, patch = stored["x_embedder.proj.1.weight"]
        (head,) = stored["blocks.0.self_attn.q_norm.weight"]
        return diffusers.CosmosTransformer3DModel(
            **_NET,
            in_channels=patch // 4,  # patches of 2 x 2
            out_channels=stored["final_layer.linear.weight"][0] // 4,
            num_attention_heads=width // head,
            attention_head_dim=head,
            num_layers=_count(stored, r"blocks\.(\d+)\."),
            mlp_ratio=stored["blocks.0.mlp.layer1.weight"][0] / width,
            text_embed_dim=stored["blocks.0.cross_attn.k_proj.weight"][1],
            adaln_lora_dim=stored["blocks.0.adaln_modulation_self_attn.1.weight"][0],
        )

    convert = _converters().convert_cosmos_transformer_checkpoint_to_diffusers
    own = {name: name for name in stored if not name.startswith(_CONDITIONER)}
    return _part(weights, make, convert(own))


def _conditioner(weights: Weights) -> Part:
    stored = _Shapes(weights, _CONDITIONER)

    def make() -> Any:
        target, width = stored["out_proj.weight"]
        (head,) = stored["blocks.0.cross_attn.q_norm.weight"]
        return diffusers.AnimaTextConditioner(
            source_dim=stored["blocks.0.cross_attn.k_proj.weight"][1],
            target_dim=target,
            model_dim=width,
            num_layers=_count(stored, r"blocks\.(\d+)\."),
            num_attention_heads=width // head,
            mlp_ratio=stored["blocks.0.mlp.0.weight"][0] / width,
            target_vocab_size=stored["embed.weight"][0],
        )

    return _part(weights, make, {name: _CONDITIONER + name for name in stored})


def _text(weights: Weights) -> Part:
    stored = _Shapes(weights, "model.")

    def make() -> Any:
        words, width = stored["embed_tokens.weight"]
        first = "layers.0.self_attn."
        (head,) = stored[f"{first}q_norm.weight"]
        config = transformers.Qwen3Config(
            **_QWEN,
            vocab_size=words,
            hidden_size=width,
            intermediate_size=stored["layers.0.mlp.gate_proj.weight"][0],
            num_hidden_layers=_count(stored, r"layers\.(\d+)\."),
            num_attention_heads=stored[f"{first}q_proj.weight"][0] // head,
            num_key_value_heads=stored[f"{first}k_proj.weight"][0] // head,
            head_dim=head,
        )
        return transformers.Qwen3Model(config)

    return _part(weights, make, {name: f"model.{name}" for name in stored})


def _vae(weights: Weights) -> Part:
    stored = _Shapes(weights)

    def make() -> Any:
        return diffusers.AutoencoderKLQwenImage(
            base_dim=stored["encoder.conv1.weight"][0], z_dim=stored["conv2.weight"][0]
        )

    # Wan 2.1's VAE, of which Qwen-Image's is a fine-tune, has the same layers and names
    convert = _converters().convert_wan_vae_to_diffusers
    return _part(weights, make, convert({name: name for name in stored}))


def _converters() -> Any:
    from diffusers.loaders import single_file_utils

    return single_file_utils


def _part(weights: Weights, make: Callable[[], Any], names: Mapping[str, str]) -> Part:
    """`names`: {diffusers name: stored name}."""
    return part_of(weights, make, "", lambda wanted: {one: names.get(one, one) for one in wanted})


class _Shapes(dict[str, Shape]):
    """The shapes of the weights under a prefix, by their names without it.

    Errors: CheckpointError for one that is missing.
    """

    def __init__(self, weights: Weights, prefix: str = "") -> None:
        super().__init__(
            (name.removeprefix(prefix), weights.shape(name))
            for name in weights
            if name.startswith(prefix)
        )
        self._path, self._prefix = weights.path, prefix

    def __missing__(self, name: str) -> Shape:
        raise CheckpointError(
            f"{self._path} lacks {self._prefix}{name}, which is a part of Anima. Get a complete copy of it."
        )


def _count(names: Iterable[str], pattern: str) -> int:
    """How many layers names that match `pattern` are numbered for."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})
