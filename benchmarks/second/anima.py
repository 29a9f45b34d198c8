"""The second miniature as an Anima: the same pictures and captions, Anima's architecture at 27 million
parameters.

    tokenizers   Qwen's kind (bytes, pairs) and T5's (pieces), made from the captions
    language     a small Qwen3, trained to go on with captions; then frozen, as Anima's is
    vae16        Qwen-Image's autoencoder, 16 channels, one frame; its latents' mean and deviation
    latents16    every picture encoded once
    flow         the net and the conditioner together: eps - z_0 of z_t = (1 - t) z_0 + t eps
    pack3        OUT/anima, a diffusers folder

Shapes: n pictures, latents (n, 16, 16, 16), text features (n, 512, d): behind a caption they are 0, as
Anima's are.

Sources: t is the sigmoid of a normal number, as in Stable Diffusion 3 (Esser et al. 2024, arXiv
2403.03206). Hidden states of the net are drawn towards what a reader of pictures sees in the clean one,
as by REPA (Yu et al. 2024, arXiv 2410.06940), where a recipe has such a reader.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers import AnimaTextConditioner, AutoencoderKLQwenImage, CosmosTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from comfy_continual_lora.mini.training import rank

if TYPE_CHECKING:
    from train import Recipe

STAGES = ("tokenizers", "language", "vae16", "latents16", "flow", "pack3")
STEPS = {"language": 3000, "vae16": 9000, "flow": 20_000}
BATCHES = {"language": 512, "vae16": 64, "flow": 512}
WIDTH, HEAD = 256, 64
CHANNELS, SIDE = 16, 16  # of latents
POSITIONS = 512  # of text features
WORDS = 4000  # at most, of each tokenizer
END = "<|endoftext|>"
ALIGNED = 3  # blocks before the hidden states that are drawn towards what the reader sees
PLACE = 128  # numbers that the reader sees in a place of 16 x 16 pixels


class Sizes(NamedTuple):
    """Numbers of layers."""

    language: int = 6
    conditioner: int = 3
    net: int = 10


# --- the nets -------------------------------------------------------------------------------------


def new_language(words: int, sizes: Sizes) -> Qwen3ForCausalLM:
    config: dict[str, Any] = {
        "vocab_size": words,
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": sizes.language,
        "num_attention_heads": 2 * WIDTH // HEAD,
        "num_key_value_heads": WIDTH // HEAD,
        "head_dim": HEAD,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    }
    return Qwen3ForCausalLM(Qwen3Config(**config))


def new_conditioner(words: int, sizes: Sizes, positions: int = POSITIONS) -> AnimaTextConditioner:
    return AnimaTextConditioner(
        source_dim=WIDTH,
        target_dim=WIDTH,
        model_dim=WIDTH,
        num_layers=sizes.conditioner,
        num_attention_heads=WIDTH // HEAD,
        target_vocab_size=words,
        min_sequence_length=positions,
    )


def new_net(sizes: Sizes) -> CosmosTransformer3DModel:
    """With the mask's channel among those of its input, so that diffusers has nothing to add."""
    return CosmosTransformer3DModel(
        in_channels=CHANNELS + 1,
        out_channels=CHANNELS,
        num_attention_heads=WIDTH // HEAD,
        attention_head_dim=HEAD,
        num_layers=sizes.net,
        text_embed_dim=WIDTH,
        adaln_lora_dim=64,
        rope_scale=(1.0, 4.0, 4.0),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
    )


def new_vae() -> AutoencoderKLQwenImage:
    """Its latents' statistics are 0 and 1 until `vae16` has measured them."""
    return AutoencoderKLQwenImage(
        base_dim=16, latents_mean=[0.0] * CHANNELS, latents_std=[1.0] * CHANNELS
    )


class Flow(nn.Module):
    """What is trained together: the net, and the conditioner, which makes text features."""

    def __init__(self, t5_words: int, sizes: Sizes, seen: int = 0) -> None:
        """`seen`: numbers that a reader sees in each place of a picture; 0 without a reader."""
        super().__init__()
        self.net: Any = new_net(sizes)
        # rows of 0 are added by `forward`
        self.conditioner = new_conditioner(t5_words, sizes, positions=0)
        self.seen: nn.Module | None = None
        if seen:
            self.seen = nn.Sequential(nn.Linear(WIDTH, 512), nn.SiLU(), nn.Linear(512, seen))
            self.net.transformer_blocks[ALIGNED - 1].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, given: Any, hidden: Tensor) -> None:
        self.hidden = hidden

    def forward(
        self, noisy: Tensor, share: Tensor, states: Tensor, mask: Tensor, t5: Ids
    ) -> tuple[Tensor, Tensor | None]:
        """eps - z_0, (n, 16, 16, 16), and what a reader should see in each place, (n, 64, seen).

        share (n,): of noise; states (n, s, d): Qwen's, text where `mask` (n, s) is True; t5: the same
        captions.
        """
        features = self.conditioner(states, *t5, mask)
        n, longest, width = features.shape
        # Rows of 0 have keys and values of 0: one whose weight is raised to theirs stands for all.
        bias = features.new_zeros(n, longest + 1)
        bias[:, -1] = math.log(POSITIONS - longest)
        given = {
            "timestep": share,
            "encoder_hidden_states": torch.cat([features, features.new_zeros(n, 1, width)], 1),
            "attention_mask": bias,
        }
        frame = torch.cat([noisy, torch.zeros_like(noisy[:, :1])], 1)[:, :, None]
        velocity = self.net(hidden_states=frame, **given).sample[:, :, 0]
        return velocity, None if self.seen is None else self.seen(self.hidden)


def as_pictures(vae: AutoencoderKLQwenImage) -> None:
    """Have it compute on one frame alone: there its convolutions see zeros but for their last slice.

    For training: a third of the work, the same results and gradients.
    """
    for module in vae.modules():
        if isinstance(module, QwenImageCausalConv3d):
            module.forward = partial(_last_slice, module)  # type: ignore[method-assign]


def _last_slice(conv: Any, frame: Tensor, *_: object) -> Tensor:
    padding = (conv._padding[2], conv._padding[0])
    weight = conv.weight[:, :, -1]
    return F.conv2d(frame[:, :, 0], weight, conv.bias, conv.stride[1:], padding)[:, :, None]


# --- tokenizers -----------------------------------------------------------------------------------


def tokenizers(recipe: Recipe) -> None:
    """Write OUT/anima/tokenizer and OUT/anima/t5_tokenizer, once."""
    folder = recipe.run.out / "anima"
    if not (folder / "t5_tokenizer" / "tokenizer_config.json").exists():
        write_tokenizers(folder, recipe.data.captions)


def write_tokenizers(folder: Path, captions: Sequence[str]) -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    qwen = Tokenizer(models.BPE())
    qwen.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    pairs = trainers.BpeTrainer(
        vocab_size=WORDS, initial_alphabet=alphabet, special_tokens=[END], show_progress=False
    )
    qwen.train_from_iterator(captions, pairs)
    path = folder / "tokenizer"
    path.mkdir(parents=True, exist_ok=True)
    qwen.model.save(str(path))
    _describe(path, tokenizer_class="Qwen2Tokenizer", eos_token=END, pad_token=END)
    t5 = Tokenizer(models.Unigram())
    t5.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    t5.decoder = decoders.Metaspace()  # type: ignore[assignment]
    special = ["<pad>", "</s>", "<unk>"]
    pieces = trainers.UnigramTrainer(
        vocab_size=WORDS,
        initial_alphabet=[chr(code) for code in range(33, 127)],
        special_tokens=special,
        unk_token="<unk>",
        show_progress=False,
    )
    t5.train_from_iterator(captions, pieces)
    path = folder / "t5_tokenizer"
    path.mkdir(parents=True, exist_ok=True)
    t5.save(str(path / "tokenizer.json"))
    names = dict(zip(("pad_token", "eos_token", "unk_token"), special, strict=True))
    _describe(path, tokenizer_class="T5Tokenizer", **names)


def _describe(folder: Path, **config: str) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


class Ids(NamedTuple):
    """Captions by one tokenizer, (n, longest)."""

    ids: Tensor  # padded with 0
    mask: Tensor  # True where there is text

    def of(self, index: Tensor) -> Ids:
        """Those of some captions."""
        return Ids(self.ids[index], self.mask[index])

    def to(self, device: torch.device) -> Ids:
        return Ids(self.ids.to(device), self.mask.to(device))


class Tokens:
    """Captions by both tokenizers."""

    def __init__(self, folder: Path, captions: Sequence[str]) -> None:
        library: Any = transformers
        texts = list(captions)
        qwen = library.Qwen2TokenizerFast.from_pretrained(str(folder / "tokenizer"))
        self.qwen_words, end = len(qwen), qwen.convert_tokens_to_ids(END)
        read = qwen(texts, add_special_tokens=False)["input_ids"]
        self.qwen = _padded([ids or [end] for ids in read])
        t5 = library.T5TokenizerFast.from_pretrained(str(folder / "t5_tokenizer"))
        self.t5_words = len(t5)
        read = t5(texts, add_special_tokens=False)["input_ids"]
        self.t5 = _padded([[*ids[: POSITIONS - 1], t5.eos_token_id] for ids in read])


def _padded(rows: Sequence[list[int]]) -> Ids:
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return Ids(ids, torch.arange(ids.shape[1]) < lengths[:, None])


# --- stages ---------------------------------------------------------------------------------------


def _tokens(recipe: Recipe) -> Tokens:
    """Of the empty caption, then of all."""
    return Tokens(recipe.run.out / "anima", ["", *recipe.data.captions])


def language(recipe: Recipe) -> None:
    tokens, n, device = _tokens(recipe), recipe.batch("language"), recipe.run.device
    model = new_language(tokens.qwen_words, recipe.sizes)
    ids = tokens.qwen.ids
    targets = ids.masked_fill(~tokens.qwen.mask, -100)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        index = torch.from_numpy(recipe.data.indices(step, n, stream=30)) + 1
        with recipe.run.autocast():
            # causal, so what is behind a caption does not matter
            logits = model(input_ids=ids[index].to(device)).logits[:, :-1]
        wanted = targets[index, 1:].to(device)
        return F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten()), {}

    recipe.fit("language", model, loss, rate=1e-3)
    recipe.run.save("language", model.model)


def vae16(recipe: Recipe) -> None:
    model: Any = new_vae()
    as_pictures(model)
    encoder, decoder = recipe.fast(model.encoder), recipe.fast(model.decoder)

    def encode(images: Tensor) -> Tensor:
        return model.quant_conv(encoder(images[:, :, None]))[:, :, 0]

    def decode(latents: Tensor) -> Tensor:
        return decoder(model.post_quant_conv(latents[:, :, None]))[:, :, 0]

    recipe.train_autoencoder("vae16", model, encode, decode)
    recipe.run.save("vae16", model)


@torch.no_grad()
def latents16(recipe: Recipe) -> None:
    """OUT/latents16.safetensors: `latents` of mean 0 and deviation 1 in every channel, which are
    `mean` and `deviation` of the autoencoder's.
    """
    model: Any = new_vae()
    model.load_state_dict(load_file(recipe.run.out / "vae16.safetensors"))
    nn.Module.to(model.eval(), recipe.run.device)
    as_pictures(model)

    def encode(images: Tensor) -> Tensor:
        with recipe.run.autocast():
            return model.encode(images[:, :, None]).latent_dist.mean[:, :, 0]

    latents = recipe.encoded(encode)
    deviation, mean = torch.std_mean(latents, dim=(0, 2, 3))
    latents = (latents - mean[:, None, None]) / deviation[:, None, None]
    parts = {"latents": latents.half().contiguous(), "mean": mean, "deviation": deviation}
    if rank() == 0:
        save_file(parts, recipe.run.out / "latents16.safetensors")


def flow(recipe: Recipe) -> None:
    n, device = recipe.batch("flow"), recipe.run.device
    latents = load_file(recipe.run.out / "latents16.safetensors")["latents"].to(device)
    tokens = _tokens(recipe)
    text = nn.Module.to(_trained_language(recipe.run.out, tokens.qwen_words, recipe.sizes), device)
    reader = recipe.reader_of_places()
    model = Flow(tokens.t5_words, recipe.sizes, seen=PLACE if reader else 0)
    predict = recipe.fast(model)
    qwen, t5 = tokens.qwen.to(device), tokens.t5.to(device)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        index = torch.from_numpy(recipe.data.indices(step, n, stream=31)).to(device)
        rng = np.random.default_rng((recipe.seed, 32, rank(), step))
        generator = torch.Generator(device).manual_seed(int(rng.integers(2**31)))
        share = torch.randn(n, generator=generator, device=device).sigmoid()
        noise = torch.randn(n, CHANNELS, SIDE, SIDE, generator=generator, device=device)
        clean, part = latents[index].float(), share.view(-1, 1, 1, 1)
        said = (index + 1) * (torch.rand(n, generator=generator, device=device) >= 0.1)
        with recipe.run.autocast():
            with torch.no_grad():
                states = text(qwen.ids[said]).last_hidden_state
            noisy = (1 - part) * clean + part * noise
            predicted, seen = predict(noisy, share, states, qwen.mask[said], t5.of(said))
        error = F.mse_loss(predicted.float(), noise - clean)
        if reader is None or seen is None:
            return error, {}
        with torch.no_grad(), recipe.run.autocast():
            wanted = reader(recipe.data.images(index.cpu().numpy()))
        alike = F.cosine_similarity(seen.float(), wanted.float(), dim=-1).mean()
        return error - 0.5 * alike, {"mse": float(error.detach()), "alike": float(alike.detach())}

    recipe.fit("flow", model, loss, rate=1e-3, ema=0.9995)
    model.seen = None
    recipe.run.save("flow", model)


def pack3(recipe: Recipe) -> None:
    write_folder(recipe.run.out, recipe.sizes)


def write_folder(out: Path, sizes: Sizes) -> None:
    """Write the parts into OUT/anima, beside its tokenizers."""
    folder = out / "anima"
    tokens = Tokens(folder, [""])
    model = Flow(tokens.t5_words, sizes)
    model.load_state_dict(load_file(out / "flow.safetensors"))
    model.conditioner.register_to_config(min_sequence_length=POSITIONS)
    vae = new_vae()
    vae.load_state_dict(load_file(out / "vae16.safetensors"))
    found = load_file(out / "latents16.safetensors")
    vae.register_to_config(
        latents_mean=found["mean"].tolist(), latents_std=found["deviation"].tolist()
    )
    parts = {
        "transformer": model.net,
        "text_conditioner": model.conditioner,
        "text_encoder": _trained_language(out, tokens.qwen_words, sizes),
        "vae": vae,
    }
    for name, part in parts.items():
        part.to(torch.bfloat16).save_pretrained(folder / name)
    index = {"_class_name": "AnimaModularPipeline"}
    (folder / "modular_model_index.json").write_text(json.dumps(index))


def _trained_language(out: Path, words: int, sizes: Sizes) -> Any:
    """A Qwen3Model."""
    model = new_language(words, sizes).model
    model.load_state_dict(load_file(out / "language.safetensors"))
    return model.eval().requires_grad_(False)
