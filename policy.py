"""The two VLAs of RL-Co behind one contract: flow-matching pi0.5 and autoregressive OpenVLA.

    policy = load_policy("tiny-pi05", stats=stats)      # a preset (random weights), a folder, or a Hub name
    loss = policy.sft_loss(batch)                       # stage I, and the anchor of stage II
    obs = policy.encode(obs)                            # what frozen weights compute, once per observation
    decision = policy.act(obs, sample=True)             # rollout
    logprob, entropy, value = policy.evaluate(obs, decision.latent)   # PPO update; ratio 1 right after act
    policy.save(folder)                                 # or save(folder, layout="lerobot" | "openpi" | "openvla")

`Policy` declares the contract. Actions and states are physical (m, rad, gripper -1..1) outside this file.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.gemma.modeling_gemma import GemmaConfig, GemmaDecoderLayer, GemmaRMSNorm, rotate_half
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaModel, LlamaRotaryEmbedding
from transformers.models.siglip.modeling_siglip import SiglipEncoder, SiglipVisionConfig, SiglipVisionEmbeddings

import checkpoints
from checkpoints import EMBED, HEADS, LM_HEAD, MODES, PALIGEMMA, UserError, affine, note, robot_dims

# fmt: off
VOCAB = 811  # of small_tokenizer
NORMAL = {"normalization": {"observation.state": "QUANTILES", "action": "QUANTILES"}, "convention": "rlco"}
PI05 = {**NORMAL, "type": "pi05", "max_token_len": 200, "num_steps": 4, "discrete_state_input": True,
        "prompt_state_dim": 0}
TINY_GEMMA = {"depth": 3, "num_heads": 3, "num_kv_heads": 1, "head_dim": 32, "hidden_act": "silu"}
TINY_VIT = {"embed_dim": 96, "depth": 3, "num_heads": 3, "mlp_hidden": 192}
LLAMA = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 2048}
PRESETS = {
    # From scratch in minutes on 2 CPU cores. No tanh GELU: it costs four times erf GELU or SiLU there.
    "tiny-pi05": {
        **PI05, "action_dim": 7, "action_horizon": 4, "chunk": 4, "noise_std": [0.15, 0.25], "loss_draws": 4,
        "vision": {"image_size": 64, "patch_size": 8, "hidden_size": 96, "num_hidden_layers": 2,
                   "num_attention_heads": 3, "intermediate_size": 192, "hidden_act": "gelu"},
        "vlm": {**TINY_GEMMA, "width": 96, "mlp_dim": 192, "vocab_size": VOCAB},
        "action_expert": {**TINY_GEMMA, "width": 128, "mlp_dim": 512}, "value_hidden": [128, 128]},
    # Published sizes (openpi's gemma_2b and gemma_300m, SigLIP so400m/14) and RLinf's RL-Co settings.
    "pi05": {
        **PI05, "action_dim": 32, "action_horizon": 8, "chunk": 4, "noise_std": [0.12, 0.16], "loss_draws": 1,
        "vision": {"image_size": 224, "patch_size": 14, "hidden_size": 1152, "num_hidden_layers": 27,
                   "num_attention_heads": 16, "intermediate_size": 4304},
        "vlm": {"width": 2048, "depth": 18, "mlp_dim": 16384, "num_heads": 8, "num_kv_heads": 1, "head_dim": 256,
                "vocab_size": 257152},
        "action_expert": {"width": 1024, "depth": 18, "mlp_dim": 4096, "num_heads": 8, "num_kv_heads": 1,
                          "head_dim": 256}, "value_hidden": [512, 256, 128]},
    "tiny-openvla": {
        **NORMAL, "type": "openvla", "center_crop": False, "predict_stop_token": False, "temperature": 1.0,
        "eval_temperature": 0.6, "value_hidden": [128, 64],
        "action_dim": 7, "action_horizon": 4, "chunk": 4, "image_size": 64, "patch_size": 8,
        "real_vocab_size": VOCAB + 256, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "empty_token_id": 261,
        "dino": {**TINY_VIT, "reg_tokens": 4}, "siglip": TINY_VIT,
        "llm": {**LLAMA, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
                "intermediate_size": 256, "vocab_size": VOCAB + 320}},
    # Published OpenVLA-7B, which acts greedily; the value head is RL4VLA's, whose temperature of evaluation is 0.6.
    "openvla-7b": {
        **NORMAL, "convention": "openvla", "type": "openvla", "center_crop": False, "predict_stop_token": True,
        "temperature": 1.0, "eval_temperature": 0.0, "value_hidden": [512, 128],
        "action_dim": 7, "action_horizon": 1, "chunk": 1, "image_size": 224, "patch_size": 14,
        "real_vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32000, "empty_token_id": 29871,
        "dino": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "mlp_hidden": 4096, "reg_tokens": 4},
        "siglip": {"embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_hidden": 4304},
        "llm": {**LLAMA, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32064}},
}
# fmt: on
LORA = {"r": 32, "lora_alpha": 16, "init_lora_weights": "gaussian"}  # OpenVLA's authors' and RL4VLA's


class Decision(NamedTuple):
    """What a policy does about B observations, C being its chunk."""

    actions: torch.Tensor  # [B,C,7] physical
    latent: torch.Tensor  # what `evaluate` needs: pi0.5's denoising chain [B,K+1,H,D], OpenVLA's tokens [B,C*7]
    logprob: torch.Tensor  # [B], as `evaluate` says; 0 without sampling
    value: torch.Tensor  # [B]


# ---- observations and actions -----------------------------------------------------------------------------------

# Dimensions of an encoded observation whose length depends on the prompt.
TOKEN_DIM = {"prefix_kv": -2, "prefix_mask": -1}


def index_obs(obs: dict, idx) -> dict:
    """Rows `idx` (slice, index array or tensor) of an observation or SFT batch."""
    numbers = idx.cpu().numpy() if torch.is_tensor(idx) else idx
    rows = np.arange(len(obs["prompt"]))[numbers]
    return {key: [x[i] for i in rows] if isinstance(x, list) else x[idx] for key, x in obs.items()}


def concat_obs(batches: list[dict]) -> dict:
    """Concatenate along B. Where prompts differ in length, cached tokens are padded on the right (mask False)."""

    def join(key):
        values = [batch[key] for batch in batches]
        if isinstance(values[0], list):
            return sum(values, [])
        if key in TOKEN_DIM:
            dim = TOKEN_DIM[key]
            longest = max(x.shape[dim] for x in values)
            after = (0, 0) * (-1 - dim)  # F.pad counts dimensions from the last
            # Padding copies, and a cached prefix is large: only what is too short is padded.
            values = [x if x.shape[dim] == longest else F.pad(x, (*after, 0, longest - x.shape[dim])) for x in values]
        return torch.cat(values)

    return {key: join(key) for key in batches[0]}


def pick_obs(observations: list[dict], rows: torch.Tensor) -> dict:
    """`rows`, in rising order, of T observations of [b] each, counted as if these were concatenated. They are not, as
    cached prefixes are large and would be there twice meanwhile."""
    each = len(observations[0]["prompt"])
    t = (rows // each).cpu()
    return concat_obs([index_obs(observations[k], rows[t == k] % each) for k in t.unique().tolist()])


def normalize(
    x: torch.Tensor, stats: dict, mode: str = "QUANTILES", convention: str = "rlco", eps: float | None = None
) -> torch.Tensor:
    """[...,D] physical -> [-1,1] between q01 and q99, not clipped; other modes and projects as `affine` says. Where the
    statistics are of an x that was padded with zeros to more dimensions, so is x."""
    if mode == "IDENTITY":
        return x
    to = affine(stats, mode, convention, eps, x.dtype)
    more = len(to.offset) - x.shape[-1]
    if more and (more < 0 or robot_dims(stats) > x.shape[-1]):
        raise UserError(
            f"the policy's statistics are of {robot_dims(stats)} dimensions, the data has {x.shape[-1]}: fine-tune it "
            "on this robot's demonstrations first (train_sft.py)"
        )
    y = (F.pad(x, (0, more)) - to.offset.to(x.device)) / to.scale.to(x.device) + to.shift
    return torch.where(to.still.to(x.device), 0, y)


def unnormalize(
    y: torch.Tensor, stats: dict, mode: str = "QUANTILES", convention: str = "rlco", eps: float | None = None
) -> torch.Tensor:
    """Inverse of `normalize`, for y [...,D] of the first D dimensions; one without range gives q01."""
    if mode == "IDENTITY":
        return y
    to = affine(stats, mode, convention, eps, y.dtype)
    offset, scale, still = (part[: y.shape[-1]].to(y.device) for part in (to.offset, to.scale, to.still))
    return torch.where(still, offset, (y - to.shift) * scale + offset)


def resize(image: torch.Tensor, size: int, pad: bool, how: Image.Resampling) -> torch.Tensor:
    """uint8 [B,H,W,3] -> [B,size,size,3] with PIL, whose rounding the published policies were trained on; `pad` keeps
    the aspect with black bars (openpi), otherwise the image is stretched (OpenVLA)."""
    h, w = image.shape[1:3]
    if (h, w) == (size, size):
        return image
    scale = max(h, w) / size
    width, height = (int(w / scale), int(h / scale)) if pad else (size, size)
    left = (size - width) // 2
    top = (size - height) // 2
    out = np.zeros((len(image), size, size, 3), np.uint8)
    for row, array in zip(out, image.cpu().numpy()):
        row[top : top + height, left : left + width] = Image.fromarray(array).resize((width, height), how)
    return torch.from_numpy(out).to(image.device)


def center_crop(image: torch.Tensor) -> torch.Tensor:
    """uint8 [B,S,S,3] -> the middle 0.9 of its area at the same size, as OpenVLA's evaluation of models that were
    trained with random crops: TensorFlow's crop_and_resize, and its rounding."""
    line = torch.linspace(-(0.9**0.5), 0.9**0.5, image.shape[1], device=image.device)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).expand(len(image), -1, -1, -1)
    pixels = F.grid_sample(image.permute(0, 3, 1, 2).float() / 255, grid, align_corners=True)
    return (pixels.clamp(0, 1) * 255.5).to(torch.uint8).permute(0, 2, 3, 1)


def require_pixels(image: torch.Tensor, size: int) -> None:
    """UserError if pictures [...,H,W,3] are smaller than a policy takes: enlarged ones are blurred, and it would suffer
    without a word."""
    if max(image.shape[-3:-1]) < size:
        height, width = image.shape[-3:-1]
        raise UserError(
            f"pictures of {height} x {width} pixels for a policy that sees {size}: collect, record or send larger ones "
            f"(--image-size {size})"
        )


# ---- prompt -----------------------------------------------------------------------------------------------------

WORDS = """Task State Action In What action should the robot take to Out push pull pick place put open close move lift
stack slide turn press a an of in on onto into from with and up down left right front back over under red green blue
yellow black white cube block ball bowl plate drawer door box cup can goal target table region top middle bottom
handle gripper""".split()


def small_tokenizer() -> Tokenizer:
    """Tokenizer of the tiny presets: one piece for each integer -1..255 and common word (with its space), characters
    and bytes for the rest, so any text encodes and a given instruction always has the same length."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>"]
    pieces += [f" {i}" for i in range(-1, 256)]
    pieces += [chr(c) for c in range(32, 127)] + ["\n"]
    for word in WORDS:
        pieces += [f" {word}", f" {word.capitalize()}", word.capitalize()]
    pieces += ["Task:", ", State:", ";\nAction: ", "In: What action should the robot take to", "?\nOut:"]
    pieces = list(dict.fromkeys(pieces))  # each once
    pieces += [f"<0x{b:02X}>" for b in range(256)]
    # Every piece costs 1, so the shortest segmentation wins; byte pieces only ever enter through the fallback.
    scores = [(p, -100.0 if p.startswith("<") and len(p) > 1 else -1.0) for p in pieces]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=3, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in pieces[:3]])
    return tokenizer


def pi05_prompt(prompt: str, state: np.ndarray | None) -> str:
    """openpi's template; the normalised state [S] as bin numbers 0..255, and -1 below the range."""
    prompt = prompt.strip().replace("_", " ").replace("\n", " ")
    if state is None:
        return prompt
    bins = np.digitize(state, np.linspace(-1, 1, 257)[:-1]) - 1
    return f"Task: {prompt}, State: {' '.join(map(str, bins))};\nAction: "


def pi05_tokens(encode: Callable, prompts: list[str], state: np.ndarray | None, limit: int) -> list[list[int]]:
    """Token ids of prompts with their normalised states [B,S], or None without (openpi then has a newline of its own
    last). Where they are more than `limit`, the instruction is cut at its end, never what follows it."""
    end = encode(["\n"])[0] if state is None else []
    states = [None] * len(prompts) if state is None else state
    short = prompts
    while True:
        rows = [[2, *ids, *end] for ids in encode([pi05_prompt(p, s) for p, s in zip(short, states)])]  # 2: BOS
        excess = [max(0, len(row) - limit) for row in rows]
        if not any(excess):
            return rows
        if any(over and not prompt for over, prompt in zip(excess, short)):
            raise UserError(f"max_token_len {limit} is too short for the state alone")
        for over, prompt in zip(excess, prompts):
            if over:
                note(f"the instruction {prompt!r} is too long for the {limit} tokens of a prompt: its end is cut off")
        short = [prompt[: max(0, len(prompt) - over)] for prompt, over in zip(short, excess)]


def pad_tokens(rows: list[list[int]], side: str, value: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and validity [B,T], padded to the longest of the batch."""
    pad = partial(pad_sequence, batch_first=True, padding_side=side)
    ids = pad([torch.tensor(row) for row in rows], padding_value=value)
    return ids.to(device), pad([torch.ones(len(row), dtype=torch.bool) for row in rows]).to(device)


# ---- what both policies share -----------------------------------------------------------------------------------


def mlp(sizes: list[int], activation: type[nn.Module], bias_last: bool = True) -> nn.Sequential:
    """Linear layers of these widths with the activation between them."""
    layers = []
    for width_in, width_out in zip(sizes, sizes[1:]):
        layers += [nn.Linear(width_in, width_out), activation()]
    # Drawn anew rather than changed, so that a seed goes on giving the weights of the published results.
    layers[-2:] = [nn.Linear(*sizes[-2:], bias=bias_last)]
    return nn.Sequential(*layers)


def masked_mean(loss: torch.Tensor, keep: torch.Tensor, reduce: bool) -> torch.Tensor:
    """loss [B,n] -> its mean where keep [B,n]: of each row [B], or of these with `reduce`."""
    loss = (loss * keep).sum(1) / keep.sum(1).clamp(min=1)
    return loss.mean() if reduce else loss


class Policy(nn.Module, ABC):
    """The contract, which is all that the scripts know of a policy: five methods, `set_trainable` and `save`; `chunk` C
    and `horizon` H, the actions that it executes and predicts at a time; `value_head`, the critic's module.

    An observation of B rows is {"image": uint8 [B,h,w,3], "state": float32 [B,S], "prompt": list of B instructions}, on
    any device and in physical units (m, rad, gripper -1 closed..1 open). pi0.5 also takes N cameras: "image"
    [B,N,h,w,3] and, where some are absent, "image_mask" bool [B,N]."""

    PART: str  # what set_trainable calls the part that does not embed the observation
    FROZEN: tuple[str, ...]  # names of what embeds it begin so
    FLOAT32: tuple[str, ...]  # names of what stays in float32 contain one of these
    UNTRAINED: tuple[str, ...]  # names of what checkpoints have but no loss reaches begin so
    value_head: nn.Module

    def __init__(self, config: dict, stats: dict | None, tokenizer: Tokenizer | None):
        super().__init__()
        self.config = config  # as in PRESETS
        self.stats = stats  # as in LeRobot: {"action": {"q01": [...], ...}, "observation.state": {...}}
        self.tokenizer = tokenizer  # without one, that of the published model is fetched
        self.chunk: int = config["chunk"]
        self.horizon: int = config["action_horizon"]
        if not 1 <= self.chunk <= self.horizon:
            raise UserError(f"chunk {self.chunk} must be between 1 and the horizon {self.horizon}")
        self.frozen_prefix = False  # whether what embeds the observation is frozen
        self.gradient_checkpointing = False  # compute activations twice instead of keeping them
        self.source: Path | None = None  # the folder it was loaded from

    @abstractmethod
    def sft_loss(self, batch: dict, reduce: bool = True) -> torch.Tensor:
        """The supervised loss of observations with "action" float32 [B,H,7] and "action_is_pad" bool [B,H], which is
        True past an episode's end and counts for nothing -> a scalar, or [B] with reduce=False."""

    @abstractmethod
    def act(self, obs: dict, sample: bool) -> Decision:
        """Choose what to do, without gradient. sample=True explores; log-probability and value are then what `evaluate`
        says of the decision: pi0.5's to the bit, OpenVLA's, whose tokens come one at a time, but for rounding."""

    @abstractmethod
    def evaluate(self, obs: dict, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probability [B], entropy [B] and value [B], float32, of decisions' latents as the weights are now. The
        log-probability is a mean: over pi0.5's denoising chain, over the actions of OpenVLA's chunk. So ratios and KL
        divergences are those of a step or an action, whatever their number."""

    @abstractmethod
    def value(self, obs: dict) -> torch.Tensor:
        """Value [B] of observations that nothing is done in, without gradient: to bootstrap from a rollout's end."""

    @abstractmethod
    def encode(self, obs: dict) -> dict:
        """obs and what frozen weights compute from it, which the other four then do not compute again."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def image_size(self) -> int:
        """Side of the pictures that it sees, pixels; larger ones are scaled down, smaller ones refused."""
        return self.config.get("vision", self.config)["image_size"]

    def stat(self, key: str) -> tuple[dict, str, str]:
        """Statistics of "action" or "observation.state", and how they normalise, for `normalize`; or UserError."""
        stats = (self.stats or {}).get(key, {})
        mode = self.config["normalization"][key]
        if not set(MODES[mode]) <= stats.keys():
            sets = sorted(self.config.get("norm_stats") or {})
            choice = f", or unnorm_key= one of {sets}" if sets else ""
            problem = f"this policy has no statistics of {key} ({', '.join(MODES[mode])})"
            raise UserError(f"{problem}: give load_policy(stats=...) the training data's{choice}")
        return stats, mode, self.config["convention"]

    def encode_text(self, texts: list[str]) -> list[list[int]]:
        if self.tokenizer is None:
            self.tokenizer = checkpoints.published_tokenizer(self.source, self.config)
        return [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def run(self, layer, *args, **kwargs):
        """A layer, recomputed in the backward pass when gradient_checkpointing is on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *args, use_reentrant=False, **kwargs)
        return layer(*args, **kwargs)

    def set_trainable(self, train: str) -> None:
        """What trains besides the heads: "all"; "lora", adapters on every linear layer but lm_head; or what does not
        embed the observation, which `encode` then does once: "expert" (of pi0.5), "llm" (of OpenVLA)."""
        if train not in ("all", "lora", self.PART):
            raise UserError(f"of a {self.config['type']} policy all, lora or {self.PART} can train, not {train}")
        if train == "lora":
            add_lora(self)
        for name, weight in self.named_parameters():
            if train == "all" or name.startswith(HEADS):
                chosen = True
            elif train == "lora":
                chosen = "lora_" in name
            else:
                chosen = not name.startswith(self.FROZEN)
            weight.requires_grad_(chosen and not name.startswith(self.UNTRAINED))
        self.frozen_prefix = train == self.PART

    def dtype_of(self, name: str, dtype: torch.dtype | None) -> torch.dtype | None:
        """What a tensor is loaded as when `dtype` is asked for: what trains badly in bfloat16 is float32."""
        if name.startswith(HEADS) or "lora_" in name or dtype and any(part in name for part in self.FLOAT32):
            return torch.float32
        return dtype

    def sha256(self) -> str:
        """Of the weights in the folder that it was loaded from."""
        return checkpoints.sha256(self.source)

    @torch.no_grad()
    def save(self, folder: str | Path, layout: str | None = None, weights: dict | None = None) -> None:
        """Write a checkpoint folder, each file whole or not at all: all of this policy, or with `layout` "openpi",
        "lerobot" or "openvla" what that project's code loads (LoRA merged in). What RL adds is beside in
        heads.safetensors, and the processor, tokenizer and code files that a checkpoint came with go along. `weights`
        is a state_dict to save in place of what the policy has now."""
        family = self.config["type"]
        layouts = checkpoints.LAYOUTS[family]
        if layout not in (None, *layouts):
            raise UserError(f"a {family} policy is saved as {' or '.join(layouts)}, not as {layout}")
        state = merged_state(self) if layout else weights or self.state_dict()
        stats = self.stats or {}
        checkpoints.write_checkpoint(Path(folder), layout, self.config, stats, state, self.tokenizer, self.source)


def add_lora(policy: Policy) -> None:
    """LoRA (arXiv 2106.09685) in float32 on every linear layer that a loss reaches, but the heads and lm_head."""
    if lora_layers(policy):
        return
    from peft import LoraConfig, inject_adapter_in_model  # here, as only full-size fine-tuning needs it

    linear = [name for name, layer in policy.named_modules() if isinstance(layer, nn.Linear)]
    without = (*HEADS, *policy.UNTRAINED)
    names = [name for name in linear if not name.startswith(without) and not name.endswith("lm_head")]
    inject_adapter_in_model(LoraConfig(**LORA, target_modules=names), policy)
    for name, weight in policy.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.float()


def lora_layers(policy: Policy) -> dict[str, nn.Module]:
    """The layers that have adapters, by name."""
    return {name: layer for name, layer in policy.named_modules() if hasattr(layer, "lora_A")}


def merged_state(policy: Policy) -> dict[str, torch.Tensor]:
    """The state_dict without adapters: added to the weights that they adapt."""
    state = {name: tensor for name, tensor in policy.state_dict().items() if "lora_" not in name}
    for name, layer in lora_layers(policy).items():
        weight = layer.base_layer.weight
        merged = weight.float() + layer.get_delta_weight("default").float()
        state[f"{name}.base_layer.weight"] = merged.to(weight.dtype)
    return state


# ---- pi0.5 ------------------------------------------------------------------------------------------------------


class Prefix(NamedTuple):
    """The VLM's view of an observation of P tokens."""

    kv: list  # per layer keys and values after RoPE [B,kv heads,P,head_dim]
    mask: torch.Tensor | None  # validity [B,P], None when nothing is padded
    feature: torch.Tensor | None  # the mean of its last features [B,width], where it was asked for


class AdaRMSNorm(nn.Module):
    """RMSNorm whose scale, shift and the residual's gate come from the flow time; the gates start open."""

    def __init__(self, width: int):
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.dense.weight)
        self.dense.bias.data = torch.cat([torch.zeros(2 * width), torch.ones(width)])

    def forward(self, x: torch.Tensor, cond: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [B,K,H,width], cond [B or 1,K,1,width] -> normed x, gate (float32)"""
        scale, shift, gate = self.dense(cond.to(self.dense.weight.dtype)).float().chunk(3, -1)
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-6)
        return torch.addcmul(shift, normed, 1 + scale).type_as(x), gate


def rope_table(positions: torch.Tensor, cfg: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """positions [B or 1,T] -> cos, sin [B or 1,T,1,head_dim]"""
    half = torch.arange(0, cfg["head_dim"], 2, device=positions.device, dtype=torch.float32)
    angle = positions[..., None].float() * 1e4 ** (-half / cfg["head_dim"])
    angle = angle.repeat(1, 1, 2)[:, :, None]
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """RoPE on x [B,T,heads,head_dim]."""
    return x * rope[0].type_as(x) + rotate_half(x) * rope[1].type_as(x)


def gemma(cfg: dict, ada: bool) -> nn.ModuleDict:
    """A Gemma stack's parameters under transformers' names; its forward is `Pi05.layer`."""
    sizes = dict(hidden_size=cfg["width"], intermediate_size=cfg["mlp_dim"], head_dim=cfg["head_dim"])
    heads = dict(num_attention_heads=cfg["num_heads"], num_key_value_heads=cfg["num_kv_heads"])
    hf = GemmaConfig(**sizes, **heads, hidden_act=cfg.get("hidden_act", "gelu_pytorch_tanh"))
    layers = nn.ModuleList(GemmaDecoderLayer(hf, i) for i in range(cfg["depth"]))
    for layer in layers if ada else ():
        layer.input_layernorm = AdaRMSNorm(cfg["width"])
        layer.post_attention_layernorm = AdaRMSNorm(cfg["width"])
    norm = AdaRMSNorm(cfg["width"]) if ada else GemmaRMSNorm(cfg["width"])
    return nn.ModuleDict({"layers": layers, "norm": norm})


class Pi05(Policy):
    """pi0.5 (openpi's PyTorch model and key names) with Flow-Noise exploration (piRL, arXiv 2510.25889; RLinf) and
    a value head on the mean VLM prefix feature. In shapes, K chunks are denoised at once, of H actions in D dimensions,
    of which the robot has the first 7."""

    PART, FROZEN = "expert", (PALIGEMMA,)
    FLOAT32 = ("action_", "time_mlp", "embeddings.", "input_layernorm", "post_attention_layernorm", "model.norm")

    def __init__(self, config: dict, stats: dict | None, tokenizer: Tokenizer | None):
        super().__init__(config, stats, tokenizer)
        vision, vlm, expert = config["vision"], config["vlm"], config["action_expert"]
        self.action_dim: int = config["action_dim"]
        self.num_steps: int = config["num_steps"]  # of denoising
        self.noise_std: list[float] = config["noise_std"]  # bounds of the exploration, in normalised actions

        siglip = SiglipVisionConfig(**{"hidden_act": "gelu_pytorch_tanh", **vision})
        siglip._attn_implementation = "sdpa"
        embeddings, encoder = SiglipVisionEmbeddings(siglip), SiglipEncoder(siglip)
        del embeddings.position_ids  # in no checkpoint, so it could not come back from the meta device
        norm = nn.LayerNorm(vision["hidden_size"], siglip.layer_norm_eps)
        tower = nn.ModuleDict({"embeddings": embeddings, "encoder": encoder, "post_layernorm": norm})
        language_model = gemma(vlm, ada=False)
        language_model["embed_tokens"] = nn.Embedding(vlm["vocab_size"], vlm["width"])
        model = {
            "vision_tower": nn.ModuleDict({"vision_model": tower}),
            "multi_modal_projector": nn.ModuleDict({"linear": nn.Linear(vision["hidden_size"], vlm["width"])}),
            "language_model": language_model,
        }
        paligemma = nn.ModuleDict({"model": nn.ModuleDict(model)})
        paligemma["lm_head"] = nn.Linear(vlm["width"], vlm["vocab_size"], bias=False)
        gemma_expert = nn.ModuleDict({"model": gemma(expert, ada=True)})
        gemma_expert["lm_head"] = nn.Linear(expert["width"], vlm["vocab_size"], bias=False)
        self.paligemma_with_expert = nn.ModuleDict({"paligemma": paligemma, "gemma_expert": gemma_expert})
        self.tie()
        self.action_in_proj = nn.Linear(self.action_dim, expert["width"])
        self.action_out_proj = nn.Linear(expert["width"], self.action_dim)
        self.time_mlp_in = nn.Linear(expert["width"], expert["width"])
        self.time_mlp_out = nn.Linear(expert["width"], expert["width"])
        self.value_head = mlp([vlm["width"], *config["value_hidden"], 1], nn.ReLU)
        self.noise_head = mlp([expert["width"], 128, 64, self.action_dim], nn.Tanh)
        # The expert reads the VLM's last keys and values, so what follows them there reaches no loss.
        last = PALIGEMMA + f"model.language_model.layers.{vlm['depth'] - 1}."
        after = ("self_attn.q_proj", "self_attn.o_proj", "mlp", "post_attention_layernorm")
        unused = ("paligemma_with_expert.gemma_expert.lm_head", LM_HEAD, PALIGEMMA + "model.language_model.norm")
        self.UNTRAINED = (*unused, *(last + part for part in after))
        self.set_trainable("all")

    @property
    def vlm(self) -> nn.ModuleDict:
        return self.paligemma_with_expert.paligemma.model

    def tie(self) -> None:
        """One tensor embeds words and predicts them, as published."""
        self.paligemma_with_expert.paligemma.lm_head.weight = self.vlm.language_model.embed_tokens.weight

    @staticmethod
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """q [B,T,heads,d], k and v [B,kv heads,S,d], mask [B or 1,T,S] bool or None -> [B,T,heads*d]."""
        B, T, heads, d = q.shape
        kv_heads = k.shape[1]
        groups = heads // kv_heads
        # Query heads that share a key head become more queries of it: [B,kv heads,T*groups,d]. The keys of the long
        # prefix are then read as they are; to repeat them for every head would copy them in each layer.
        q = q.view(B, T, kv_heads, groups, d).transpose(1, 2).reshape(B, kv_heads, T * groups, d)
        if mask is not None:
            mask = mask.repeat_interleave(groups, 1)[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.view(B, kv_heads, T, groups, d).transpose(1, 2).reshape(B, T, heads * d)

    def layer(self, layer, x, rope, past=None, mask=None, cond=None, kv_only=False):
        """One Gemma layer of either stream on x [B,...,width], whose inner dimensions are tokens; `past` keys and
        values come first. -> the new x (None with kv_only), this layer's own keys and values."""
        attn, B, d = layer.self_attn, len(x), layer.self_attn.head_dim
        # The expert's norms also give a gate on what the layer adds to x. It is float32, and so is the sum, which
        # type_as then rounds once. The VLM's norms have no gate.
        plain = cond is None
        h, gate = (layer.input_layernorm(x), 1) if plain else layer.input_layernorm(x, cond)
        k = rotate(attn.k_proj(h).view(B, -1, attn.config.num_key_value_heads, d), rope).transpose(1, 2)
        v = attn.v_proj(h).view(B, k.shape[2], -1, d).transpose(1, 2)
        if kv_only:
            return None, (k, v)
        q = rotate(attn.q_proj(h).view(B, -1, attn.config.num_attention_heads, d), rope)
        keys, values = (k, v) if past is None else (torch.cat((past[0], k), 2), torch.cat((past[1], v), 2))
        x = (x + gate * attn.o_proj(self.attend(q, keys, values, mask)).view_as(x)).type_as(x)
        h, gate = (layer.post_attention_layernorm(x), 1) if plain else layer.post_attention_layernorm(x, cond)
        return (x + gate * layer.mlp(h)).type_as(x), (k, v)

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """[N,3,S,S] in [-1,1] -> [N,patches,VLM width]"""
        tower, projector = self.vlm.vision_tower.vision_model, self.vlm.multi_modal_projector.linear
        e = tower.embeddings
        x = e.patch_embedding(images.to(e.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        x = (x + e.position_embedding.weight).to(tower.post_layernorm.weight.dtype)
        for layer in tower.encoder.layers:
            x = self.run(layer, x, None)
        return projector(tower.post_layernorm(x).to(projector.weight.dtype))

    def embed_prefix(self, images, image_masks, tokens, token_masks) -> tuple[torch.Tensor, torch.Tensor]:
        """images [N,B,3,S,S] in [-1,1], image_masks [N,B], tokens and token_masks [B,T] -> embeddings [B,P,width],
        mask [B,P]. The towers see only cameras that are present; a camera that is absent everywhere takes no tokens."""
        keep = image_masks.any(1)
        images, image_masks = images[keep], image_masks[keep]
        seen = self.embed_images(images[image_masks])
        patches = seen.new_zeros(*image_masks.shape, *seen.shape[1:])
        patches[image_masks] = seen
        words = self.vlm.language_model.embed_tokens(tokens)
        mask = torch.cat([*image_masks[:, :, None].expand(-1, -1, patches.shape[2]), token_masks], 1)
        return torch.cat([*patches.to(words.dtype), words * words.shape[-1] ** 0.5], 1), mask

    def prefix(self, x: torch.Tensor, mask: torch.Tensor, feature: bool) -> Prefix:
        """The VLM over prefix embeddings [B,P,width] with validity [B,P]; `feature` also runs the last layer's
        attention and MLP, which only the value head reads: without gradient, because the critic's early, large ones
        would tear the prefix (as the last layer is in no loss, it stays as it is)."""
        padded = not mask.all()
        positions = mask.cumsum(1) - 1 if padded else torch.arange(x.shape[1], device=x.device)[None]
        visible = mask[:, None].expand(-1, x.shape[1], -1) if padded else None  # attention without a mask is faster
        rope = rope_table(positions, self.config["vlm"])
        vlm = self.vlm.language_model
        *layers, last = vlm.layers
        kv = []
        for layer in layers:
            x, own = self.run(self.layer, layer, x, rope, None, visible)
            kv.append(own)
        kv.append(self.run(self.layer, last, x, rope, None, visible, kv_only=True)[1])
        mean = None
        if feature:
            with torch.no_grad():
                x = vlm.norm(self.layer(last, x, rope, None, visible)[0]).float()
                mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True) if padded else x.mean(1)
        return Prefix(kv, mask if padded else None, mean)

    def embed_time(self, t: torch.Tensor) -> torch.Tensor:
        """Flow times [B or 1,K] -> what the expert's norms are conditioned on [B or 1,K,1,width]"""
        short, long = self.config.get("min_period", 4e-3), self.config.get("max_period", 4.0)
        fraction = torch.linspace(0, 1, self.time_mlp_in.in_features // 2, dtype=torch.float64, device=t.device)
        period = short * (long / short) ** fraction
        angle = t.double()[..., None] * 2 * math.pi / period  # float32 would move the velocity by 1e-4
        cond = torch.cat([angle.sin(), angle.cos()], -1).to(self.time_mlp_in.weight.dtype)
        return F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(cond))))[:, :, None]

    def velocity(self, x: torch.Tensor, t: torch.Tensor, prefix: Prefix) -> tuple[torch.Tensor, torch.Tensor]:
        """K noisy chunks per observation in one pass: x [B,K,H,D] at flow times t [B or 1,K] (1 = noise) ->
        velocity [B,K,H,D] and the expert's features [B,K,H,width], both float32. The K chunks share the prefix's keys
        and do not see each other."""
        expert = self.paligemma_with_expert.gemma_expert.model
        _, K, H, _ = x.shape
        cond = self.embed_time(t)
        seen = prefix.mask
        if seen is None:
            seen = torch.ones(1, prefix.kv[0][0].shape[2], dtype=torch.bool, device=x.device)
        # Each of the K chunks has the positions that follow the prefix, as if it were alone.
        positions = seen.sum(1, keepdim=True) + torch.arange(H, device=x.device).repeat(K)
        rope = rope_table(positions, self.config["action_expert"])
        mask = None
        if K > 1 or prefix.mask is not None:
            #            prefix  chunk 1  chunk 2     who sees whom, in blocks of H rows; of H columns, but for
            #   chunk 1   valid     1        0        the prefix, of which each sees what is no padding
            #   chunk 2   valid     0        1
            chunk = torch.arange(K, device=x.device).repeat_interleave(H)
            own = (chunk[:, None] == chunk).expand(len(seen), -1, -1)
            mask = torch.cat([seen[:, None].expand(-1, K * H, -1), own], 2)
        h = self.action_in_proj(x.to(self.action_in_proj.weight.dtype)).to(expert.layers[0].mlp.up_proj.weight.dtype)
        for layer, past in zip(expert.layers, prefix.kv):
            h, _ = self.run(self.layer, layer, h, rope, past, mask, cond)
        h = expert.norm(h, cond)[0].float()
        return self.action_out_proj(h.to(self.action_out_proj.weight.dtype)).float(), h

    def tokens(self, obs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt token ids and validity [B,T]."""
        state = None
        if self.config["discrete_state_input"]:
            state = normalize(obs["state"].float().cpu(), *self.stat("observation.state"))
            state = F.pad(state, (0, max(0, self.config["prompt_state_dim"] - state.shape[1]))).numpy()
        rows = pi05_tokens(self.encode_text, obs["prompt"], state, self.config["max_token_len"])
        return pad_tokens(rows, "right", 0, self.device)

    def encode_prefix(self, obs: dict, feature: bool) -> Prefix:
        """What `encode` kept, or else the VLM's work on an observation."""
        if "prefix_kv" in obs:
            kv, mask, mean = (obs[f"prefix_{part}"].to(self.device) for part in ("kv", "mask", "feature"))
            return Prefix([layer.unbind(1) for layer in kv.unbind(1)], None if mask.all() else mask, mean)
        image = obs["image"].to(self.device)
        image = (image[:, None] if image.ndim == 4 else image).transpose(0, 1)
        present = obs["image_mask"].T.to(self.device) if "image_mask" in obs else image.new_ones(image.shape[:2]).bool()
        require_pixels(image, self.image_size)
        pixels = resize(image.flatten(0, 1), self.image_size, pad=True, how=Image.Resampling.BILINEAR)
        pixels = (pixels.permute(0, 3, 1, 2).float() / 255 * 2 - 1).unflatten(0, image.shape[:2])
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_prefix):
            return self.prefix(*self.embed_prefix(pixels, present, *self.tokens(obs)), feature)

    @torch.no_grad()
    def encode(self, obs: dict) -> dict:
        # prefix_kv [B,layers,2,kv heads,P,head_dim], prefix_mask [B,P], prefix_feature [B,width]
        if not self.frozen_prefix or "prefix_kv" in obs:
            return obs
        prefix = self.encode_prefix(obs, feature=True)
        kv = torch.stack([torch.stack(layer, 1) for layer in prefix.kv], 1)
        mask = kv.new_ones(len(kv), kv.shape[-2]).bool() if prefix.mask is None else prefix.mask
        return {**obs, "prefix_kv": kv, "prefix_mask": mask, "prefix_feature": prefix.feature}

    def sft_loss(self, batch: dict, reduce: bool = True) -> torch.Tensor:
        """Flow-matching MSE (pi0.5 eq. 1), the mean over the unpadded steps, all action dimensions and `loss_draws`
        (time, noise) draws that share one prefix."""
        action = normalize(batch["action"].float().to(self.device), *self.stat("action"))
        action = F.pad(action, (0, self.action_dim - action.shape[-1]))[:, None]
        B, K = len(action), self.config["loss_draws"]
        noise = torch.randn(B, K, *action.shape[2:], device=self.device)
        t = torch.rand(B, K, device=self.device) ** (1 / 1.5) * 0.999 + 0.001  # Beta(1.5, 1), squeezed off t = 0
        loss = self.flow_loss(action, noise, t, self.encode_prefix(batch, feature=False)).mean((1, 3))
        return masked_mean(loss, ~batch["action_is_pad"].to(self.device), reduce)

    def flow_loss(self, action: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, prefix: Prefix) -> torch.Tensor:
        """Squared error of the velocity [B,K,H,D], unreduced; t = 1 is noise."""
        s = t[..., None, None]
        velocity, _ = self.velocity(s * noise + (1 - s) * action, t, prefix)
        return (noise - action - velocity).square()

    @property
    def moving_dims(self) -> list[int]:
        """Action dimensions that the data moves. Exploring the others would change nothing but the gradient's noise."""
        return affine(*self.stat("action")).moves.nonzero()[:, 0].tolist()

    def explored(self, x: torch.Tensor) -> torch.Tensor:
        """The part of [...,H,D] that is executed and moves something; only it is explored and scored."""
        return x[..., : self.chunk, :][..., self.moving_dims]

    def flow_std(self, feature: torch.Tensor) -> torch.Tensor:
        """The learned exploration std, log-squashed between the bounds of noise_std, in normalised action units."""
        low, high = (math.log(s) for s in self.noise_std)
        return self.explored((low + (high - low) * (self.noise_head(feature).tanh() + 1) / 2).exp())

    def denoise(self, x: torch.Tensor, prefix: Prefix, steps: int, sample: bool = False) -> torch.Tensor:
        """Euler integration from x [B,H,D] at t = 1 to t = 0 -> the chain [B,steps+1,H,D]; `sample` adds Flow-Noise."""
        chain = [x]
        t = 1 - torch.arange(steps, device=x.device)[None] / steps
        for k in range(steps):
            v, feature = self.velocity(x[:, None], t[:, k : k + 1], prefix)
            x = x - v[:, 0] / steps
            if sample:
                std = self.flow_std(feature[:, 0])
                executed = x[:, : self.chunk]  # a view of x
                executed[..., self.moving_dims] += std * torch.randn_like(std)
            chain.append(x)
        return torch.stack(chain, 1)

    def chain_logprob(self, chain: torch.Tensor, prefix: Prefix) -> tuple[torch.Tensor, torch.Tensor]:
        """A denoising chain [B,K+1,H,D] -> log-probability [B], joint over its K+1 Gaussians (the initial noise
        included) and the executed chunk's dimensions, divided by K+1; entropy [B], the mean over all of these (piRL;
        RLinf's joint_logprob). Where the horizon is longer than the chunk, this is the log-probability of the executed
        rows at each step given all rows of the step before. The others are denoised without noise and not scored;
        they feed the executed rows' velocity, and that an update moves them too is not in the ratio. (RLinf's code
        draws noise for all rows and all dimensions, and scores the executed ones alone.)"""
        K = chain.shape[1] - 1
        t = 1 - torch.arange(K, device=chain.device)[None] / K
        v, feature = self.velocity(chain[:, :-1], t, prefix)
        start, reached = self.explored(chain[:, 0]), self.explored(chain[:, 1:])
        mean, std = self.explored(chain[:, :-1] - v / K), self.flow_std(feature)
        # log N(x; mean, std) = -((x - mean) / std)^2 / 2 - log(std) - log(2 pi) / 2, summed over K steps and the start,
        # which is N(0, 1); the terms log(2 pi) / 2 of all come last.
        logprob = (-((reached - mean) / std).square() / 2 - std.log()).sum((1, 2, 3)) - start.square().sum((1, 2)) / 2
        dims = (K + 1) * start[0].numel()
        logprob = logprob - dims * math.log(2 * math.pi) / 2
        # entropy of N(mean, std) = log(std) + log(2 pi e) / 2; the start's log(std) is 0
        entropy = std.log().sum((1, 2, 3)) / dims + math.log(2 * math.pi * math.e) / 2
        return logprob / (K + 1), entropy

    @torch.no_grad()
    def act(self, obs: dict, sample: bool) -> Decision:
        prefix = self.encode_prefix(obs, feature=True)
        noise = torch.randn(len(prefix.feature), self.horizon, self.action_dim, device=self.device)
        chain = self.denoise(noise, prefix, self.num_steps, sample)
        value = self.value_head(prefix.feature).squeeze(-1)
        # Not summed up while denoising: one batched pass, as in `evaluate`, rounds differently from single steps.
        logprob = self.chain_logprob(chain, prefix)[0] if sample else torch.zeros_like(value)
        stats = self.stat("action")
        actions = chain[:, -1, : self.chunk, : robot_dims(stats[0])]
        return Decision(unnormalize(actions, *stats), chain, logprob, value)

    @torch.no_grad()
    def value(self, obs: dict) -> torch.Tensor:
        return self.value_head(self.encode_prefix(obs, feature=True).feature).squeeze(-1)

    def evaluate(self, obs: dict, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        prefix = self.encode_prefix(obs, feature=True)
        logprob, entropy = self.chain_logprob(latent.to(self.device), prefix)
        return logprob, entropy, self.value_head(prefix.feature).squeeze(-1)


# ---- OpenVLA ----------------------------------------------------------------------------------------------------


class ViTBlock(nn.Module):
    """A pre-norm block under timm's names: OpenVLA's checkpoints and LoRA adapters have one fused qkv, which
    transformers' DINOv2 and SigLIP split."""

    def __init__(self, dim: int, heads: int, hidden: int, scaled: bool):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, 1e-6)
        self.norm2 = nn.LayerNorm(dim, 1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})
        # DINOv2 scales what a block adds, SigLIP does not.
        self.ls1 = nn.ParameterDict({"scale_factor": torch.ones(dim)} if scaled else {})
        self.ls2 = nn.ParameterDict({"scale_factor": torch.ones(dim)} if scaled else {})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = self.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + (y * self.ls1.scale_factor if self.ls1 else y)
        y = self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))
        return x + (y * self.ls2.scale_factor if self.ls2 else y)


def vit(cfg: dict, size: int, patch: int) -> nn.ModuleDict:
    """DINOv2 with registers, or (without "reg_tokens") SigLIP; the latter's unused pooling head included."""
    dim, hidden, registers = cfg["embed_dim"], cfg["mlp_hidden"], cfg.get("reg_tokens")
    tower = nn.ModuleDict({"patch_embed": nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, patch)})})
    blocks = (ViTBlock(dim, cfg["num_heads"], hidden, scaled=bool(registers)) for _ in range(cfg["depth"]))
    tower["blocks"] = nn.ModuleList(blocks)
    tower["norm"] = nn.LayerNorm(dim, 1e-6)
    tower.pos_embed = nn.Parameter(torch.randn(1, (size // patch) ** 2, dim) * 0.02)
    if registers:
        tower.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        tower.reg_token = nn.Parameter(torch.zeros(1, registers, dim))
    else:
        tower["attn_pool"] = nn.ModuleDict(
            {
                "q": nn.Linear(dim, dim),
                "kv": nn.Linear(dim, 2 * dim),
                "proj": nn.Linear(dim, dim),
                "norm": nn.LayerNorm(dim, 1e-6),
                "mlp": nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)}),
            }
        )
        tower.attn_pool.latent = nn.Parameter(torch.zeros(1, 1, dim))
    return tower


class OpenVLA(Policy):
    """OpenVLA (arXiv 2406.09246): fused DINOv2 and SigLIP patches after BOS, Llama, 7 action tokens an action. RL as in
    RL4VLA and RLinf: everything is about the softmax over the 256 action tokens only. Predicts `chunk` actions."""

    PART, FROZEN, FLOAT32 = "llm", ("vision_backbone.", "projector."), ()
    # ImageNet's and SigLIP's constants, rounded to bfloat16 as the released processor has them
    MEAN = ((0.484375, 0.455078125, 0.40625), (0.5, 0.5, 0.5))
    STD = ((0.228515625, 0.2236328125, 0.224609375), (0.5, 0.5, 0.5))
    EDGES = torch.linspace(-1, 1, 256, dtype=torch.float64)

    def __init__(self, config: dict, stats: dict | None, tokenizer: Tokenizer | None):
        super().__init__(config, stats, tokenizer)
        dino, siglip, llm = config["dino"], config["siglip"], config["llm"]
        fused, width = dino["embed_dim"] + siglip["embed_dim"], llm["hidden_size"]
        self.vocab: int = config["real_vocab_size"]  # without padding rows; the last 256 are the action tokens
        self.tokens_per_action: int = config["action_dim"]
        towers = {"featurizer": dino, "fused_featurizer": siglip}
        size, patch = config["image_size"], config["patch_size"]
        self.vision_backbone = nn.ModuleDict({name: vit(cfg, size, patch) for name, cfg in towers.items()})
        widths = {"fc1": (fused, 4 * fused), "fc2": (4 * fused, width), "fc3": (width, width)}
        self.projector = nn.ModuleDict({name: nn.Linear(*sizes) for name, sizes in widths.items()})
        rope = {"rope_type": "default", "rope_theta": llm.get("rope_theta", 1e4)}
        settings = {key: value for key, value in llm.items() if key != "rope_theta"}
        self.llama = LlamaConfig(**settings, rope_parameters=rope, attn_implementation="sdpa")
        self.language_model = nn.ModuleDict({"model": LlamaModel(self.llama)})
        self.language_model["lm_head"] = nn.Linear(width, llm["vocab_size"], bias=False)
        self.value_head = mlp([width, *config["value_hidden"], 1], nn.GELU, bias_last=False)
        # The features are those of the second-to-last block.
        self.UNTRAINED = tuple(
            f"vision_backbone.{name}.{part}."
            for name, cfg in towers.items()
            for part in (f"blocks.{cfg['depth'] - 1}", "norm", "attn_pool")
        )
        self.set_trainable("all")

    def embed_patches(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 [B,H,W,3] -> projected patches [B,P,width]"""
        crop = self.config["center_crop"]
        if crop is None:
            raise UserError(
                f"{self.source} was fine-tuned by OpenVLA's code, which crops the pictures of a model that was trained "
                "with its augmentation: give load_policy(center_crop=True) or False, or write center_crop into its "
                "config.json"
            )
        require_pixels(image, self.image_size)
        image = resize(image.to(self.device), self.image_size, pad=False, how=Image.Resampling.BICUBIC)
        image = center_crop(image) if crop else image
        image = image.permute(0, 3, 1, 2).float() / 255
        mean, std = (image.new_tensor(c)[:, :, None, None] for c in (self.MEAN, self.STD))
        return self.project(*((image - m) / s for m, s in zip(mean, std)))

    def project(self, *images: torch.Tensor) -> torch.Tensor:
        """Normalised images [B,3,S,S] for DINOv2 and for SigLIP -> projected patches [B,P,width]; the features are
        those of the second-to-last block, without a norm."""
        features = []
        for tower, image in zip(self.vision_backbone.values(), images):
            x = tower.patch_embed.proj(image.to(tower.pos_embed.dtype)).flatten(2).transpose(1, 2) + tower.pos_embed
            patches = x.shape[1]
            if hasattr(tower, "cls_token"):
                extra = [token.expand(len(x), -1, -1) for token in (tower.cls_token, tower.reg_token)]
                x = torch.cat([*extra, x], 1)
            for block in tower.blocks[:-1]:
                x = self.run(block, x)
            features.append(x[:, -patches:])
        p = self.projector
        return p.fc3(F.gelu(p.fc2(F.gelu(p.fc1(torch.cat(features, -1))))))

    def hidden(self, patches: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, cache: Cache | None = None):
        """Llama on [BOS, patches, the rest of ids [B,T]] where mask [B,T] is True; padding lies before the prompt, so
        the ends of all rows are aligned. -> transformers' output (last hidden states after the final norm), mask."""
        model = self.language_model.model
        x = model.embed_tokens(ids)
        x = torch.cat([x[:, :1], patches.to(x.dtype), x[:, 1:]], 1)
        mask = torch.cat([mask[:, :1], mask.new_ones(patches.shape[:2]), mask[:, 1:]], 1)
        mask, position = (None, None) if mask.all() else (mask.long(), mask.cumsum(1) - 1)
        for layer in model.layers:  # not while decoding: it would drop the cache
            layer.gradient_checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        return model(None, mask, position, cache, x, use_cache=cache is not None), mask  # by place: names have changed

    def action_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [...,width] -> float32 logits [...,256] of the action tokens."""
        # In bfloat16 the log-probabilities would be off by 0.05, a quarter of what PPO clips at.
        return F.linear(hidden.float(), self.language_model.lm_head.weight[self.vocab - 256 : self.vocab].float())

    def to_tokens(self, actions: torch.Tensor) -> torch.Tensor:
        """Normalised actions [...,7] -> token ids: 256 edges on [-1,1], the bin number counted from the end of V."""
        return self.vocab - torch.bucketize(actions.double().clamp(-1, 1), self.EDGES.to(actions.device), right=True)

    def to_actions(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids -> normalised actions: the bins' centres; out-of-range ids are clipped."""
        centres = ((self.EDGES[1:] + self.EDGES[:-1]) / 2).to(ids.device)
        return centres[(self.vocab - ids - 1).clamp(0, 254)]

    def prompt(self, obs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and validity [B,T]: BOS, padding to the longest of the batch, prompt, the lone blank before actions."""
        texts = [f"In: What action should the robot take to {p.lower()}?\nOut:" for p in obs["prompt"]]
        rows = [[*ids, self.config["empty_token_id"]] for ids in self.encode_text(texts)]
        ids, mask = pad_tokens(rows, "left", self.config["pad_token_id"], self.device)
        return F.pad(ids, (1, 0), value=self.config["bos_token_id"]), F.pad(mask, (1, 0), value=True)

    def patches(self, obs: dict) -> torch.Tensor:
        """Projected patches [B,P,width], from `encode` or anew."""
        if "patches" in obs:
            return obs["patches"].to(self.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_prefix):
            return self.embed_patches(obs["image"])

    @torch.no_grad()
    def encode(self, obs: dict) -> dict:
        return {**obs, "patches": self.patches(obs)} if self.frozen_prefix else obs

    def teacher_forced(self, obs: dict, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states [B,n+1,width] that predict tokens [B,n] and what follows them."""
        n = tokens.shape[1]
        ids, mask = self.prompt(obs)
        ids, mask = torch.cat([ids, tokens], 1), F.pad(mask, (0, n), value=True)
        out, _ = self.hidden(self.patches(obs), ids, mask)
        return out.last_hidden_state[:, -n - 1 :]

    def normalised_dims(self, actions: torch.Tensor) -> torch.Tensor:
        """[7] True where statistics normalise; not the gripper of published ones, 0 closed .. 1 open there."""
        return torch.tensor(self.stat("action")[0].get("mask", [True] * actions.shape[-1]), device=actions.device)

    def sft_loss(self, batch: dict, reduce: bool = True) -> torch.Tensor:
        """Token cross-entropy over the whole vocabulary, the mean over the unpadded actions' tokens (and the end token
        of published models)."""
        action = batch["action"].float().to(self.device)
        normalised = normalize(action, *self.stat("action"), eps=1e-8)
        action = torch.where(self.normalised_dims(action), normalised, (action + 1) / 2)
        keep = ~batch["action_is_pad"].to(self.device).repeat_interleave(self.tokens_per_action, 1)
        return self.token_loss(batch, self.to_tokens(action).flatten(1), keep, reduce)

    def token_loss(self, obs: dict, target: torch.Tensor, keep: torch.Tensor, reduce: bool = True) -> torch.Tensor:
        """Cross-entropy of target tokens [B,n] where keep [B,n]."""
        if self.config["predict_stop_token"]:
            target = F.pad(target, (0, 1), value=self.config["eos_token_id"])
            keep = F.pad(keep, (0, 1), value=True)
        logits = self.language_model.lm_head(self.teacher_forced(obs, target[:, :-1])).float()
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
        return masked_mean(loss, keep, reduce)

    @torch.no_grad()
    def act(self, obs: dict, sample: bool) -> Decision:
        """Decodes with the key-value cache, from the action tokens' softmax at config's `temperature`, or without
        sampling at its `eval_temperature`, 0 being greedy."""
        temperature = self.config["temperature" if sample else "eval_temperature"]
        cache = DynamicCache()
        out, mask = self.hidden(self.patches(obs), *self.prompt(obs), cache)
        value = self.value_head(out.last_hidden_state[:, -1].float()).squeeze(-1)
        tokens = []
        logprob = torch.zeros_like(value)
        while len(tokens) < self.chunk * self.tokens_per_action:
            if tokens:
                position = None
                if mask is not None:
                    mask = F.pad(mask, (0, 1), value=1)
                    position = mask.sum(1, keepdim=True) - 1
                out = self.language_model.model(tokens[-1], mask, position, cache, use_cache=True)
            logits = self.action_logits(out.last_hidden_state[:, -1])
            if temperature:
                logp = (logits / temperature).log_softmax(-1)
                pick = torch.multinomial(logp.exp(), 1)
                if sample:
                    logprob += logp.gather(-1, pick)[:, 0] / self.chunk
            else:
                pick = logits.argmax(-1, keepdim=True)
            tokens.append(self.vocab - 256 + pick)
        tokens = torch.cat(tokens, 1)
        raw = self.to_actions(tokens).unflatten(1, (self.chunk, -1))
        gripper = (raw > 0.5).to(raw) * 2 - 1
        actions = torch.where(self.normalised_dims(raw), unnormalize(raw, *self.stat("action"), eps=0), gripper)
        return Decision(actions.float(), tokens, logprob, value)

    @torch.no_grad()
    def value(self, obs: dict) -> torch.Tensor:
        out, _ = self.hidden(self.patches(obs), *self.prompt(obs))
        return self.value_head(out.last_hidden_state[:, -1].float())[:, 0]

    def evaluate(self, obs: dict, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """An action's log-probability is the sum over its tokens, the chunk's the mean over its actions, as pi0.5's is
        over its denoising steps; the entropy is the mean over tokens. One teacher-forced pass."""
        latent = latent.to(self.device)
        hidden = self.teacher_forced(obs, latent[:, :-1])
        logp = (self.action_logits(hidden) / self.config["temperature"]).log_softmax(-1)
        logprob = logp.gather(-1, (latent - (self.vocab - 256))[..., None])[..., 0].sum(1) / self.chunk
        entropy = -(logp.exp() * logp).sum(-1).mean(1)
        return logprob, entropy, self.value_head(hidden[:, 0].float())[:, 0]


# ---- new and saved policies -------------------------------------------------------------------------------------


def load_policy(
    name: str | Path,
    stats: dict | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    **overrides,
) -> Policy:
    """A preset's name gives random weights; a folder, or the name of one in bases/ or of a model on the Hub, a
    checkpoint: ours, openpi's PyTorch layout (also RLinf's), lerobot's pi0.5, or OpenVLA's, told apart by content.
    `stats` replaces the statistics found there; `dtype` converts on load, but for what trains badly in bfloat16
    (FLOAT32; None keeps the file's); `overrides` replace settings of its config (chunk, action_horizon, noise_std, ...;
    unnorm_key chooses among OpenVLA's statistics). UserError says in one line what is wrong, naming every key that is
    missing, unexpected or of another shape."""
    if str(name) in PRESETS:
        if Path(name).is_dir():
            raise UserError(f"{name} is a preset and a folder here: ./{name} is the folder; rename it for the preset")
        policy = build(name, PRESETS[str(name)], overrides, small_tokenizer(), device)
        policy.stats = stats
        if policy.device.type != "meta":
            init_scratch(policy)
        for parameter_name, weight in policy.named_parameters():
            weight.data = weight.data.to(policy.device, policy.dtype_of(parameter_name, dtype))
        return policy
    folder = checkpoints.find_folder(name, PRESETS)
    if dtype is None and folder.parent == checkpoints.BASES:
        dtype = torch.float32  # they are kept in bfloat16 to be small
    tensors = checkpoints.read_tensors(folder)
    home = checkpoints.settings_folder(folder)  # another than folder for an adapter without its base
    config = checkpoints.read_config(home, tensors, PRESETS, overrides)
    tokenizer = checkpoints.read_tokenizer(folder) or checkpoints.read_tokenizer(home)
    policy = build(name, config, overrides, tokenizer, "meta")
    checkpoints.settle_prompt(home, policy.config)
    own = home if home == folder or not (folder / "dataset_statistics.json").is_file() else folder
    policy.stats = stats or checkpoints.read_stats(own, policy.config)
    policy.source = folder
    load_weights(policy, tensors, dtype, device)
    return policy


def apply_defaults(args, policy: Policy, defaults: dict[str, dict]) -> None:
    """Set each option of `args` that is None to that of `defaults` for the policy: "tiny" below 100 million weights,
    else its family's."""
    size = sum(weight.numel() for weight in policy.parameters())
    for name, value in defaults["tiny" if size < 1e8 else policy.config["type"]].items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def keeps_its_stats(policy: Policy, stats: dict) -> bool:
    """Whether states and actions can go on meaning to a policy what they did when it was pretrained: it is one of this
    project, and what moves in `stats`, the data's, moves in its own."""
    if policy.config["convention"] != "rlco" or not policy.stats:
        return False
    for key in ("observation.state", "action"):
        own, *way = policy.stat(key)
        if (affine(stats[key], *way).moves & ~affine(own, *way).moves).any():
            return False
    return True


def build(name: str | Path, config: dict, overrides: dict, tokenizer: Tokenizer | None, device) -> Policy:
    """The policy that a config describes, its weights not yet set."""
    unknown = set(overrides) - set(config) - {"unnorm_key"}
    if unknown:
        raise UserError(f"{name} has no setting {', '.join(sorted(unknown))}; it has {', '.join(sorted(config))}")
    family = {"pi05": Pi05, "openvla": OpenVLA}[config["type"]]
    with torch.device(device):
        return family({**config, **overrides}, None, tokenizer)


def load_weights(policy: Policy, tensors: dict, dtype: torch.dtype | None, device: str | torch.device) -> None:
    """Put checkpoint tensors into a policy on the meta device, one at a time and without a second copy."""
    if any("lora_" in name for name in tensors):
        add_lora(policy)
    tensors = checkpoints.match_tensors(policy.source, tensors, policy.state_dict())
    tied = LM_HEAD in tensors and torch.equal(tensors[LM_HEAD], tensors[EMBED])
    if tied:
        del tensors[LM_HEAD]
    for name, tensor in tensors.items():  # copied: file mappings are not aligned as CPU kernels want, and files change
        tensors[name] = tensor.to(device, policy.dtype_of(name, dtype), copy=True)
        if not torch.stack(tensors[name].aminmax()).isfinite().all():
            raise UserError(f"{policy.source} has NaN or infinity in {name}: it is broken, take an earlier checkpoint")
    policy.load_state_dict(tensors, strict=False, assign=True)
    for name, layer in policy.named_modules():
        if name.startswith(HEADS) and f"{name}.weight" not in tensors and isinstance(layer, nn.Linear):
            layer.to_empty(device=device).reset_parameters()  # a published checkpoint has none
    if tied:
        policy.tie()
    if isinstance(policy, OpenVLA):  # its rotary frequencies are in no checkpoint
        policy.language_model.model.rotary_emb = LlamaRotaryEmbedding(policy.llama).to(device)


def init_numbers(weight: torch.Tensor, ids: list[int]) -> None:
    """Sinusoids of the rank as the rows `ids` of weight [V,width], at its scale: a model from scratch then sees that
    neighbouring bins are alike instead of learning 256 of them one by one."""
    angle = torch.arange(len(ids))[:, None] * 2 * math.pi / torch.logspace(math.log10(8), 3, weight.shape[1] // 2)
    weight[ids] = torch.cat([angle.sin(), angle.cos()], 1).to(weight) * 2**0.5 * weight.std()


@torch.no_grad()
def init_scratch(policy: Policy) -> None:
    """Initial weights of a new model, whose ordered bins get smooth embeddings. What was measured to matter: torch's
    defaults let pi0.5's position embeddings drown the pixels and leave attention uniform (twice the query and key
    weights halve the error after 200 steps), and make OpenVLA's projected patches a seventh of the words."""
    if isinstance(policy, Pi05):
        vision = policy.vlm.vision_tower.vision_model.embeddings
        words = policy.vlm.language_model.embed_tokens.weight
        nn.init.normal_(vision.position_embedding.weight, std=vision.embed_dim**-0.5)
        nn.init.normal_(vision.patch_embedding.weight, std=(3 * vision.patch_size**2) ** -0.5)
        nn.init.normal_(words, std=words.shape[1] ** -0.5)
        init_numbers(words, [policy.tokenizer.token_to_id(f" {i}") for i in range(-1, 256)])
        for name, weight in policy.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")) and "vision_tower" not in name:
                weight.mul_(2)
        return
    for tower in policy.vision_backbone.values():
        nn.init.normal_(tower.pos_embed)
    for layer in policy.projector.values():
        nn.init.normal_(layer.weight, std=(2 / layer.in_features) ** 0.5)
    words = policy.language_model.model.embed_tokens.weight
    nn.init.normal_(words, std=0.5)
    for name, layer in policy.language_model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
            if name.endswith(("q_proj", "k_proj")):
                layer.weight.mul_(2)
    for weight in (words, policy.language_model.lm_head.weight):
        init_numbers(weight, list(range(policy.vocab - 256, policy.vocab)))
