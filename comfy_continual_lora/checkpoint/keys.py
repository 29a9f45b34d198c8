"""Names of the same weights in two layouts: diffusers' (what we run) and LDM's (single files).

Each function takes the diffusers names of a model and returns {diffusers name: LDM name}, a bijection
except for OpenCLIP's fused q, k and v. Levels and blocks are counted from the names themselves, so
nets of any depth are mapped. Source: the module order of LDM's `openaimodel.UNetModel` and
`model.Encoder/Decoder`, and of OpenCLIP's text tower.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model.transformer.text_model."
_NET_PREFIX = re.compile(r"^(model\.diffusion_model\.|net\.)")
# one weight of the net, and one of the conditioner that its file also holds
_ANIMA = {"blocks.0.cross_attn.k_proj.weight", "llm_adapter.out_proj.weight"}

_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OLDER_VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPENCLIP_OUTSIDE = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}


def _count(names: Iterable[str], pattern: str) -> int:
    return 1 + max((int(m[1]) for name in names if (m := re.match(pattern, name))), default=-1)


def unet_names(names: Iterable[str]) -> dict[str, str]:
    """{diffusers name: LDM name} of a U-Net's parameters, without a prefix; of its K/V layers too."""
    names = list(names)
    per_level = _count(names, r"down_blocks\.\d+\.(?:resnets|attentions)\.(\d+)\.")
    with_attention = {
        m[0] for name in names if (m := re.match(r"up_blocks\.\d+\.attentions", name))
    }

    def ldm(name: str) -> str:
        module, leaf = name.rsplit(".", 1)
        if module in _UNET_OUTSIDE:
            return f"{_UNET_OUTSIDE[module]}.{leaf}"
        part, rest = name.split(".", 1)
        if part == "mid_block":
            kind, index, inner = rest.split(".", 2)
            block = "middle_block." + (
                "1" if kind == "attentions" else "0" if index == "0" else "2"
            )
        else:
            level, kind, index, inner = rest.split(".", 3)
            i, j = int(level), int(index)
            if part == "down_blocks" and kind == "downsamplers":
                return f"input_blocks.{(i + 1) * (per_level + 1)}.0.{inner.replace('conv', 'op')}"
            if part == "up_blocks" and kind == "upsamplers":
                place = 2 if f"up_blocks.{i}.attentions" in with_attention else 1
                return f"output_blocks.{i * (per_level + 1) + per_level}.{place}.{inner}"
            place = 0 if kind == "resnets" else 1
            if part == "down_blocks":
                block = f"input_blocks.{1 + i * (per_level + 1) + j}.{place}"
            else:
                block = f"output_blocks.{i * (per_level + 1) + j}.{place}"
        if kind == "resnets":
            layer, leaf = inner.rsplit(".", 1)
            return f"{block}.{_UNET_RESNET[layer]}.{leaf}"
        return f"{block}.{inner}"

    return {name: ldm(name) for name in names}


def vae_names(names: Iterable[str]) -> dict[str, str]:
    """{diffusers name: LDM name} of a KL autoencoder's parameters.

    The attention's matrices are 1x1 convolutions in LDM.
    """
    names = list(names)
    levels = _count(names, r"decoder\.up_blocks\.(\d+)\.")

    def ldm(name: str) -> str:
        if name.startswith(("quant_conv.", "post_quant_conv.")):
            return name
        half, rest = name.split(".", 1)
        rest = rest.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if match := re.match(r"mid_block\.attentions\.0\.(.+)\.(\w+)$", rest):
            return f"{half}.mid.attn_1.{_VAE_ATTENTION[match[1]]}.{match[2]}"
        if match := re.match(r"mid_block\.resnets\.(\d)\.(.+)$", rest):
            return f"{half}.mid.block_{int(match[1]) + 1}.{match[2]}"
        if match := re.match(
            r"(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)$", rest
        ):
            way, level, kind, index, inner = match.groups()
            i = int(level) if way == "down" else levels - 1 - int(level)
            place = (
                f"block.{index}"
                if kind == "resnets"
                else kind.removesuffix("rs").removesuffix("e") + "e"
            )
            return f"{half}.{way}.{i}.{place}.{inner}"
        return f"{half}.{rest}"

    return {name: ldm(name) for name in names}


def tiny_vae_names(names: Iterable[str]) -> dict[str, str]:
    """{diffusers name: name in a checkpoint} of a TAESD.

    Its decoder begins with a clamp, which diffusers does not count.
    """

    def ldm(name: str) -> str:
        half, _, index, rest = name.split(".", 3)
        return f"taesd_{half}.{int(index) + (half == 'decoder')}.{rest}"

    return {name: ldm(name) for name in names}


def text_names(names: Iterable[str]) -> dict[str, str]:
    """{transformers name: LDM name} of a CLIP text model.

    transformers 4 writes `text_model.` before every name, 5 does not.
    """
    return {name: name.removeprefix("text_model.") for name in names}


def openclip_names(names: Iterable[str]) -> dict[str, str]:
    """{transformers name: OpenCLIP name} of a text model; q, k and v are stacked in one tensor."""

    def openclip(name: str) -> str:
        name = name.removeprefix("text_model.")
        if not (match := re.match(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$", name)):
            return _OPENCLIP_OUTSIDE[name]
        layer, module, leaf = match.groups()
        inner = (
            f"{_OPENCLIP_LAYER[module]}.{leaf}"
            if module in _OPENCLIP_LAYER
            else f"attn.in_proj_{leaf}"
        )
        return f"transformer.resblocks.{layer}.{inner}"

    return {name: openclip(name) for name in names}


def usual_name(name: str) -> str:
    """The name of a single file's weight in today's layout.

    Files converted from pickles have "state_dict." before every name; in older ones the CLIP text
    model's names lack "text_model.".
    """
    name = re.sub(r"^(state_dict\.)+", "", name)
    return re.sub(
        r"^(cond_stage_model|conditioner\.embedders\.0)\.transformer\."
        r"(?=embeddings\.|encoder\.|final_layer_norm\.)",
        r"\1.transformer.text_model.",
        name,
    )


def other_text_name(name: str) -> str:
    """The name of a text model's weight in a folder written by the other of transformers 4 and 5."""
    bare = name.removeprefix("text_model.")
    return f"text_model.{name}" if bare == name else bare


def older_vae_name(name: str) -> str:
    """The name of a KL autoencoder's weight in a folder in older ones of diffusers."""
    module, leaf = name.rsplit(".", 1)
    before, _, layer = module.partition(".attentions.0.")
    return f"{before}.attentions.0.{_OLDER_VAE_ATTENTION.get(layer, layer)}.{leaf}"


def anima_kv_names(layers: Iterable[str]) -> dict[str, str]:
    """K and V of Anima's cross-attentions: {name in diffusers: name in the original}."""
    names = {}
    for layer in layers:
        _, block, _, kind = layer.split(".")  # transformer_blocks.0.attn2.to_k
        names[layer] = f"blocks.{block}.cross_attn.{kind[-1]}_proj"
    return names


def original_kv_names(preset: str, layers: Iterable[str]) -> dict[str, str]:
    """K and V of cross-attention: {name in diffusers: name in the original}."""
    return (anima_kv_names if preset == "anima" else unet_names)(layers)


def is_anima_net(names: Iterable[str]) -> bool:
    """Whether a file with these weights holds Anima's net."""
    return _ANIMA.issubset(map(name_in_net, names))


def name_in_net(name: str) -> str:
    """The name of a net's weight without what single files have before it."""
    return _NET_PREFIX.sub("", name)
