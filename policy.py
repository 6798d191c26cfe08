"""The two VLAs of RL-Co behind one contract: flow-matching pi0.5 and autoregressive OpenVLA.

    policy = load_policy("tiny-pi05", stats=stats)      # a preset (random weights), a folder, or a Hub name
    loss = policy.sft_loss(batch)                       # stage I, and the anchor of stage II
    decision = policy.act(obs, sample=True)             # rollout
    logprob, entropy, value = policy.evaluate(obs, decision.latent)   # PPO update; ratio 1 right after act
    obs = policy.encode(obs)                            # what frozen weights compute, once per observation
    policy.save(folder)                                 # or save(folder, layout="lerobot" | "openpi" | "openvla")

An observation batch: "image" uint8 [B,H,W,3] (pi0.5 also [B,N,H,W,3] with an optional bool "image_mask" [B,N]),
"state" float32 [B,S], "prompt" list of B instructions. Actions are physical (m, rad, gripper -1..1) outside this file.
`python policy.py bench` measures the update against the public pi0.5 code's way of computing it.
"""

import hashlib
import json
import math
import os
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma.modeling_gemma import GemmaConfig, GemmaDecoderLayer, GemmaRMSNorm, rotate_half
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaModel, LlamaRotaryEmbedding
from transformers.models.siglip.modeling_siglip import SiglipEncoder, SiglipVisionConfig, SiglipVisionEmbeddings

VOCAB = 811  # small_tokenizer's
PI05 = {"type": "pi05", "max_token_len": 200, "num_steps": 4}
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
        "type": "openvla", "predict_stop_token": False, "temperature": 1.0, "eval_temperature": 0.6,
        "value_hidden": [128, 64],
        "action_dim": 7, "action_horizon": 4, "chunk": 4, "image_size": 64, "patch_size": 8,
        "real_vocab_size": VOCAB + 256, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "empty_token_id": 261,
        "dino": {**TINY_VIT, "reg_tokens": 4}, "siglip": TINY_VIT,
        "llm": {**LLAMA, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
                "intermediate_size": 256, "vocab_size": VOCAB + 320}},
    # Published OpenVLA-7B, which acts greedily; the value head is RL4VLA's, whose temperature of evaluation is 0.6.
    "openvla-7b": {
        "type": "openvla", "predict_stop_token": True, "temperature": 1.0, "eval_temperature": 0.0,
        "value_hidden": [512, 128],
        "action_dim": 7, "action_horizon": 1, "chunk": 1, "image_size": 224, "patch_size": 14,
        "real_vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32000, "empty_token_id": 29871,
        "dino": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "mlp_hidden": 4096, "reg_tokens": 4},
        "siglip": {"embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_hidden": 4304},
        "llm": {**LLAMA, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32064}},
}
LORA = {"r": 32, "lora_alpha": 16, "init_lora_weights": "gaussian"}  # OpenVLA's authors' and RL4VLA's


class Decision(NamedTuple):
    """actions [B,C,7] physical; latent: what evaluate needs; logprob [B] (0 without sampling); value [B]."""
    actions: torch.Tensor
    latent: torch.Tensor
    logprob: torch.Tensor
    value: torch.Tensor


# ---- observations and actions -----------------------------------------------------------------------------------

def index_obs(obs: dict, idx) -> dict:
    """Rows `idx` (slice, index array or tensor) of an observation or SFT batch."""
    rows = np.arange(len(obs["prompt"]))[idx.cpu().numpy() if torch.is_tensor(idx) else idx]
    return {k: [v[i] for i in rows] if isinstance(v, list) else v[idx] for k, v in obs.items()}


def cat_obs(batches: list[dict]) -> dict:
    """Concatenate along B; cached token dimensions are right-padded (mask False) when prompts differ in length."""
    def join(key):
        values = [b[key] for b in batches]
        if isinstance(values[0], list):
            return sum(values, [])
        if dim := {"prefix_kv": -2, "prefix_mask": -1}.get(key):  # whose length depends on the prompt
            longest = max(v.shape[dim] for v in values)
            values = [v if v.shape[dim] == longest else F.pad(v, (0, 0) * (-1 - dim) + (0, longest - v.shape[dim]))
                      for v in values]
        return torch.cat(values)
    return {key: join(key) for key in batches[0]}


def normalize(x: torch.Tensor, stats: dict, eps: float = 1e-6) -> torch.Tensor:
    """[...,D] physical -> [-1,1] between q01 and q99, not clipped (openpi); a dimension with zero range gives 0."""
    low, high = x.new_tensor(stats["q01"]), x.new_tensor(stats["q99"])
    if len(low) != x.shape[-1]:
        raise ValueError(f"the policy's statistics are of {len(low)} dimensions, the data has {x.shape[-1]}: fine-tune it "
                         f"on this robot's demonstrations first (train_sft.py)")
    return torch.where(high > low, (x - low) / (high - low + eps) * 2 - 1, 0)


def unnormalize(y: torch.Tensor, stats: dict, eps: float = 1e-6) -> torch.Tensor:
    """Inverse of `normalize`; a dimension with zero range gives q01."""
    low, high = y.new_tensor(stats["q01"]), y.new_tensor(stats["q99"])
    return torch.where(high > low, (y + 1) / 2 * (high - low + eps) + low, low)


def resize(image: torch.Tensor, size: int, pad: bool, how: Image.Resampling) -> torch.Tensor:
    """uint8 [B,H,W,3] -> [B,size,size,3] with PIL, whose rounding the published policies were trained on; `pad` keeps
    the aspect with black bars (openpi), otherwise the image is stretched (OpenVLA)."""
    h, w = image.shape[1:3]
    if (h, w) == (size, size):
        return image
    scale = max(h, w) / size
    new = (int(w / scale), int(h / scale)) if pad else (size, size)
    left, top = (size - new[0]) // 2, (size - new[1]) // 2
    out = np.zeros((len(image), size, size, 3), np.uint8)
    for row, array in zip(out, image.cpu().numpy()):
        row[top : top + new[1], left : left + new[0]] = Image.fromarray(array).resize(new, how)
    return torch.from_numpy(out).to(image.device)


# ---- prompt -----------------------------------------------------------------------------------------------------

WORDS = """Task State Action In What action should the robot take to Out push pull pick place put open close move lift
stack slide turn press a an of in on onto into from with and up down left right front back over under red green blue
yellow black white cube block ball bowl plate drawer door box cup can goal target table region top middle bottom
handle gripper""".split()


def small_tokenizer() -> Tokenizer:
    """Tokenizer of the tiny presets: one piece for each integer -1..255 and common word (with its space), characters
    and bytes for the rest, so any text encodes and a given instruction always has the same length."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>"] + [f" {i}" for i in range(-1, 256)]
    pieces += [chr(c) for c in range(32, 127)] + ["\n"]
    pieces += [p for w in WORDS for p in (f" {w}", f" {w.capitalize()}", w.capitalize())]
    pieces += ["Task:", ", State:", ";\nAction: ", "In: What action should the robot take to", "?\nOut:"]
    pieces = list(dict.fromkeys(pieces)) + [f"<0x{b:02X}>" for b in range(256)]
    # every piece costs 1, so the shortest segmentation wins; byte pieces only ever enter through the fallback
    scores = [(p, -100.0 if p.startswith("<") and len(p) > 1 else -1.0) for p in pieces]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=3, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in pieces[:3]])
    return tokenizer


def init_numbers(weight: torch.Tensor, ids: list[int]) -> None:
    """Sinusoids of the rank as the rows `ids` of weight [V,width], at its scale: a model from scratch then sees that
    neighbouring bins are alike instead of learning 256 of them one by one."""
    angle = torch.arange(len(ids))[:, None] * 2 * math.pi / torch.logspace(math.log10(8), 3, weight.shape[1] // 2)
    weight[ids] = torch.cat([angle.sin(), angle.cos()], 1).to(weight) * 2**0.5 * weight.std()


def pi05_prompt(prompt: str, state: np.ndarray) -> str:
    """openpi's template; the normalised state [S] as bin numbers 0..255, and -1 below the range."""
    bins = np.digitize(state, np.linspace(-1, 1, 257)[:-1]) - 1
    prompt = prompt.strip().replace("_", " ").replace("\n", " ")
    return f"Task: {prompt}, State: {' '.join(map(str, bins))};\nAction: "


# ---- what both policies share -----------------------------------------------------------------------------------

HEADS = ("value_head.", "noise_head.")  # what RL adds to a published model; float32, kept in a file of their own


def box(**children: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(children)


def mlp(sizes: list[int], act: type[nn.Module], bias_last: bool = True) -> nn.Sequential:
    layers = [m for i, o in zip(sizes, sizes[1:]) for m in (nn.Linear(i, o), act())][:-1]
    layers[-1] = nn.Linear(*sizes[-2:], bias=bias_last)
    return nn.Sequential(*layers)


def masked_mean(loss: torch.Tensor, keep: torch.Tensor, reduce: bool) -> torch.Tensor:
    """loss [B,n] -> its mean where keep [B,n]: of each row [B], or of these with `reduce`."""
    loss = (loss * keep).sum(1) / keep.sum(1).clamp(min=1)
    return loss.mean() if reduce else loss


def write_file(file: Path, content) -> None:
    """Write tensors, the state of a training, bytes or JSON whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tmp = file.with_name(f".{file.name}.tmp")
    if file.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in content.items()}, tmp, {"format": "pt"})
    elif file.suffix == ".pt":
        torch.save(content, tmp)
    else:
        tmp.write_bytes(content if isinstance(content, bytes) else json.dumps(content, indent=1).encode())
    os.replace(tmp, file)


class AdamW(torch.optim.AdamW):
    """torch's, over float32 copies of what is in bfloat16: added to bfloat16 itself, small steps are rounded away. The
    copies are in param_groups, and get the gradients; what is in float32 is its own copy."""

    def __init__(self, groups: list[dict], **settings):
        self.copies = []
        super().__init__([{**g, "params": [self.float32(p) for p in g["params"]]} for g in groups], **settings)

    def float32(self, p: nn.Parameter) -> torch.Tensor:
        if p.dtype == torch.float32:
            return p
        copy = p.detach().float()
        self.copies.append((p, copy))

        def collect(p):
            copy.grad, p.grad = p.grad.float() if copy.grad is None else copy.grad + p.grad, None

        p.register_post_accumulate_grad_hook(collect)
        return copy

    @torch.no_grad()
    def step(self):
        super().step()
        for p, copy in self.copies:
            p.copy_(copy)

    def state_dict(self) -> dict:
        return {**super().state_dict(), "copies": [copy for _, copy in self.copies]}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        for (_, copy), saved in zip(self.copies, state["copies"]):
            copy.copy_(saved)


class Policy(nn.Module):
    """Statistics, prompt encoding, what trains, and checkpoints; the model and its losses are in the two subclasses,
    which also say: what freeze("expert") freezes (FROZEN), what no loss reaches though checkpoints have it (UNTRAINED),
    what stays in float32 (FLOAT32), where a tokenizer is if a checkpoint has none (TOKENIZER), others' LAYOUTS."""

    def __init__(self, config: dict, stats: dict | None, tokenizer: Tokenizer | None):
        super().__init__()
        self.config, self.stats, self.tokenizer = config, stats, tokenizer
        self.chunk, self.horizon = config["chunk"], config["action_horizon"]
        if not 1 <= self.chunk <= self.horizon:
            raise ValueError(f"chunk {self.chunk} must be between 1 and the horizon {self.horizon}")
        self.gradient_checkpointing = False
        self.source: Path | None = None  # the folder it was loaded from

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def stat(self, key: str) -> dict:
        if "q01" not in (self.stats or {}).get(key, {}):
            raise ValueError(f"this policy has no statistics of {key}: give load_policy(stats=...) the training data's"
                             + (f", or unnorm_key= one of {sorted(k)}" if (k := self.config.get("norm_stats")) else ""))
        return self.stats[key]

    def sha256(self) -> str:
        """Of the weights in the folder that it was loaded from."""
        total = hashlib.sha256()
        for path in weight_files(self.source) if self.source else ():
            with open(path, "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()

    def encode_text(self, texts: list[str]) -> list[list[int]]:
        if self.tokenizer is None:
            try:
                tokenizer = Tokenizer.from_pretrained(self.TOKENIZER)
                words = (self.config.get("vlm") or self.config["llm"])["vocab_size"]
                if (n := tokenizer.get_vocab_size()) > words + 64:  # PaliGemma's has a few words without a row
                    raise ValueError(f"it has {n} words, the checkpoint {words}")
                self.tokenizer = tokenizer
            except Exception as error:
                raise FileNotFoundError(f"no tokenizer.json in {self.source}, and {self.TOKENIZER}'s does not do "
                                        f"({error}): copy the model's own tokenizer.json into the folder") from None
        return [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def pad_tokens(self, rows: list[list[int]], side: str, value: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and validity [B,T], padded to the longest of the batch."""
        pad = partial(pad_sequence, batch_first=True, padding_side=side)
        ids = pad([torch.tensor(r) for r in rows], padding_value=value)
        return ids.to(self.device), pad([torch.ones(len(r), dtype=torch.bool) for r in rows]).to(self.device)

    def freeze(self, train: str) -> None:
        """What trains besides the heads: "expert": all but what embeds the observation (pi0.5: SigLIP and the VLM;
        OpenVLA: the vision towers and the projector); "lora": adapters on every linear layer but lm_head; "all"."""
        if train == "lora":
            self.add_lora()
        for name, p in self.named_parameters():
            chosen = {"all": True, "lora": "lora_" in name, "expert": not name.startswith(self.FROZEN)}[train]
            p.requires_grad_((chosen or name.startswith(HEADS)) and not name.startswith(self.UNTRAINED))
        self.frozen_prefix = train == "expert"

    def add_lora(self) -> None:
        """LoRA (arXiv 2106.09685) in float32 on every linear layer that a loss reaches, but the heads and lm_head."""
        if self.lora_layers():
            return
        from peft import LoraConfig, inject_adapter_in_model  # imported here: only full-size fine-tuning needs it
        names = [n for n, m in self.named_modules() if isinstance(m, nn.Linear)
                 and not n.startswith((*HEADS, *self.UNTRAINED)) and not n.endswith("lm_head")]
        inject_adapter_in_model(LoraConfig(**LORA, target_modules=names), self)
        for name, p in self.named_parameters():
            if "lora_" in name:
                p.data = p.data.float()

    def dtype_of(self, name: str, dtype: torch.dtype | None) -> torch.dtype | None:
        """What a tensor is loaded as when `dtype` is asked for."""
        wide = name.startswith(HEADS) or "lora_" in name or dtype and any(f in name for f in self.FLOAT32)
        return torch.float32 if wide else dtype

    def lora_layers(self) -> dict[str, nn.Module]:
        return {n: m for n, m in self.named_modules() if hasattr(m, "lora_A")}

    def run(self, layer, *args, **kwargs):
        """A layer, recomputed in the backward pass when gradient_checkpointing is on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *args, use_reentrant=False, **kwargs)
        return layer(*args, **kwargs)

    @torch.no_grad()
    def save(self, folder: str | Path, layout: str | None = None) -> None:
        """Write a checkpoint folder, each file whole or not at all: all of this policy, or with `layout` "openpi",
        "lerobot" or "openvla" what that project's code loads (LoRA merged in). What RL adds is beside in
        heads.safetensors, and the processor, tokenizer and code files that a checkpoint came with go along."""
        folder, state = Path(folder), self.state_dict()
        if layout not in (None, *self.LAYOUTS):
            raise ValueError(f"a {self.config['type']} policy is saved as {' or '.join(self.LAYOUTS)}, not as {layout}")
        if layout:
            for name, m in self.lora_layers().items():
                w = m.base_layer.weight
                state[f"{name}.base_layer.weight"] = (w.float() + m.get_delta_weight("default").float()).to(w.dtype)
            state = {k: v for k, v in state.items() if "lora_" not in k}
        target = folder.resolve()
        source = self.source.resolve() if self.source else target
        for file in sorted(source.rglob("*")) if source != target else ():
            own = file.is_relative_to(target) and not source.is_relative_to(target)  # saved there before
            if file.suffix in (".json", ".py", ".model", ".txt") and not file.name.endswith(".index.json") and not own:
                write_file(folder / file.relative_to(source), file.read_bytes())
        (folder / "rlco.json").unlink(missing_ok=True)  # lerobot's layout alone has it
        heads = {k: v for k, v in state.items() if k.startswith(HEADS) or "lora_" in k}
        tensors = {k.replace(".base_layer.", "."): v for k, v in state.items() if k not in heads}
        tensors, config = export(self, tensors, folder, layout)
        plan = split_torch_state_dict_into_shards(tensors, max_shard_size="5GB" if layout == "openvla" else "1TB",
                                                  filename_pattern="model{suffix}.safetensors")
        for name, keys in plan.filename_to_tensors.items():
            write_file(folder / name, {k: tensors[k] for k in keys})
        for file in folder.glob("model*.safetensors*"):
            if file.name not in plan.filename_to_tensors:
                file.unlink()  # of another number of shards
        if plan.is_sharded:
            write_file(folder / "model.safetensors.index.json",
                {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
        if self.tokenizer is not None and not (self.source and (self.source / "tokenizer.json").is_file()):
            write_file(folder / "tokenizer.json", self.tokenizer.to_str().encode())  # older libraries cannot read it
        write_file(folder / "heads.safetensors", heads)
        write_file(folder / "stats.json", self.stats or {})
        write_file(folder / "config.json", config)


# ---- pi0.5 ------------------------------------------------------------------------------------------------------

PALIGEMMA = "paligemma_with_expert.paligemma."
LM_HEAD = PALIGEMMA + "lm_head.weight"  # one tensor under two names in openpi, two in lerobot
EMBED = PALIGEMMA + "model.language_model.embed_tokens.weight"


class Prefix(NamedTuple):
    """The VLM's view of an observation: per layer keys and values after RoPE [B,kv heads,P,head_dim]; validity [B,P],
    None when nothing is padded; mean of its last features [B,width] (or None)."""
    kv: list
    mask: torch.Tensor | None
    feature: torch.Tensor | None


class AdaRMSNorm(nn.Module):
    """RMSNorm whose scale, shift and the residual's gate come from the flow time; the gates start open."""

    def __init__(self, width: int):
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.dense.weight)
        self.dense.bias.data = torch.cat([torch.zeros(2 * width), torch.ones(width)])

    def forward(self, x, cond):
        """x [B,K,H,width], cond [B or 1,K,1,width] -> normed x, gate (float32)"""
        scale, shift, gate = self.dense(cond.to(self.dense.weight.dtype)).float().chunk(3, -1)
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-6)
        return torch.addcmul(shift, normed, 1 + scale).type_as(x), gate


def rope_table(positions: torch.Tensor, cfg: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """positions [B or 1,T] -> cos, sin [B or 1,T,1,head_dim]"""
    half = torch.arange(0, cfg["head_dim"], 2, device=positions.device, dtype=torch.float32)
    angle = positions[..., None].float() * 1e4 ** (-half / cfg["head_dim"])
    return tuple(f.repeat(1, 1, 2)[:, :, None] for f in (angle.cos(), angle.sin()))


def rotate(x, rope):
    """RoPE on x [B,T,heads,head_dim]."""
    return x * rope[0].type_as(x) + rotate_half(x) * rope[1].type_as(x)


def gemma(cfg: dict, ada: bool) -> nn.ModuleDict:
    """A Gemma stack's parameters under transformers' names; its forward is `Pi05.layer`."""
    hf = GemmaConfig(hidden_size=cfg["width"], intermediate_size=cfg["mlp_dim"], num_attention_heads=cfg["num_heads"],
                     num_key_value_heads=cfg["num_kv_heads"], head_dim=cfg["head_dim"],
                     hidden_act=cfg.get("hidden_act", "gelu_pytorch_tanh"))
    layers = nn.ModuleList(GemmaDecoderLayer(hf, i) for i in range(cfg["depth"]))
    for layer in layers if ada else ():
        layer.input_layernorm, layer.post_attention_layernorm = (AdaRMSNorm(cfg["width"]) for _ in range(2))
    return box(layers=layers, norm=(AdaRMSNorm if ada else GemmaRMSNorm)(cfg["width"]))


class Pi05(Policy):
    """pi0.5 (openpi's PyTorch model and key names) with Flow-Noise exploration (piRL, arXiv 2510.25889; RLinf) and
    a value head on the mean VLM prefix feature."""

    LAYOUTS, TOKENIZER, FROZEN = ("openpi", "lerobot"), "google/paligemma-3b-pt-224", (PALIGEMMA,)
    FLOAT32 = ("action_", "time_mlp", "embeddings.", "input_layernorm", "post_attention_layernorm", "model.norm")

    def __init__(self, config: dict, stats: dict | None, tokenizer: Tokenizer | None):
        super().__init__(config, stats, tokenizer)
        vision, vlm, expert = config["vision"], config["vlm"], config["action_expert"]
        self.action_dim, self.num_steps, self.noise_std = config["action_dim"], config["num_steps"], config["noise_std"]

        siglip = SiglipVisionConfig(**{"hidden_act": "gelu_pytorch_tanh", **vision})
        siglip._attn_implementation = "sdpa"
        tower = box(embeddings=SiglipVisionEmbeddings(siglip), encoder=SiglipEncoder(siglip),
                    post_layernorm=nn.LayerNorm(vision["hidden_size"], siglip.layer_norm_eps))
        del tower.embeddings.position_ids  # in no checkpoint, so it could not come back from the meta device
        language_model = gemma(vlm, ada=False)
        language_model["embed_tokens"] = nn.Embedding(vlm["vocab_size"], vlm["width"])
        self.paligemma_with_expert = box(
            paligemma=box(
                model=box(vision_tower=box(vision_model=tower),
                          multi_modal_projector=box(linear=nn.Linear(vision["hidden_size"], vlm["width"])),
                          language_model=language_model),
                lm_head=nn.Linear(vlm["width"], vlm["vocab_size"], bias=False)),
            gemma_expert=box(model=gemma(expert, ada=True),
                             lm_head=nn.Linear(expert["width"], vlm["vocab_size"], bias=False)))
        self.tie()
        self.action_in_proj = nn.Linear(self.action_dim, expert["width"])
        self.action_out_proj = nn.Linear(expert["width"], self.action_dim)
        self.time_mlp_in, self.time_mlp_out = (nn.Linear(expert["width"], expert["width"]) for _ in range(2))
        self.value_head = mlp([vlm["width"], *config["value_hidden"], 1], nn.ReLU)
        self.noise_head = mlp([expert["width"], 128, 64, self.action_dim], nn.Tanh)
        last = PALIGEMMA + f"model.language_model.layers.{vlm['depth'] - 1}."
        parts = "self_attn.q_proj", "self_attn.o_proj", "mlp", "post_attention_layernorm"
        self.UNTRAINED = ("paligemma_with_expert.gemma_expert.lm_head", LM_HEAD, PALIGEMMA + "model.language_model.norm",
                          *(last + part for part in parts))
        self.freeze("all")

    @property
    def vlm(self):
        return self.paligemma_with_expert.paligemma.model

    def tie(self) -> None:
        self.paligemma_with_expert.paligemma.lm_head.weight = self.vlm.language_model.embed_tokens.weight

    def init_scratch(self) -> None:
        """Initial weights of a new model. What was measured to matter: torch's default lets position embeddings drown
        the pixels and leaves attention uniform; twice the query and key weights halve the error after 200 steps."""
        e, words = self.vlm.vision_tower.vision_model.embeddings, self.vlm.language_model.embed_tokens.weight
        nn.init.normal_(e.position_embedding.weight, std=e.embed_dim**-0.5)
        nn.init.normal_(e.patch_embedding.weight, std=(3 * e.patch_size**2) ** -0.5)
        nn.init.normal_(words, std=words.shape[1] ** -0.5)
        init_numbers(words, [self.tokenizer.token_to_id(f" {i}") for i in range(-1, 256)])
        for name, p in self.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")) and "vision_tower" not in name:
                p.mul_(2)

    @staticmethod
    def attend(q, k, v, mask):
        """q [B,T,heads,d], k and v [B,kv heads,S,d], mask [B or 1,T,S] bool or None -> [B,T,heads*d].
        Query heads that share a key head are folded into the query dimension, so keys are never repeated."""
        B, T, heads, d = q.shape
        groups = heads // k.shape[1]
        q = q.view(B, T, k.shape[1], groups, d).transpose(1, 2).reshape(B, k.shape[1], T * groups, d)
        mask = None if mask is None else mask.repeat_interleave(groups, 1)[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.view(B, k.shape[1], T, groups, d).transpose(1, 2).reshape(B, T, heads * d)

    def layer(self, layer, x, rope, past=None, mask=None, cond=None, kv_only=False):
        """One Gemma layer of either stream on x [B,...,width], whose inner dimensions are tokens; `past` keys and
        values come first. -> the new x, this layer's own keys and values."""
        attn, B, d = layer.self_attn, len(x), layer.self_attn.head_dim
        plain = cond is None  # the VLM's norms, which have no gate
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

    def embed_prefix(self, images, image_masks, tokens, token_masks):
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

    def prefix(self, x, mask, feature: bool) -> Prefix:
        """The VLM over prefix embeddings [B,P,width] with validity [B,P]; `feature` also runs the last layer's
        attention and MLP, which only the value head reads: without gradient, because the critic's early, large ones
        would tear the prefix (as the last layer is in no loss, it stays as it is)."""
        positions, visible = torch.arange(x.shape[1], device=x.device)[None], None
        if not (full := mask.all()):
            positions, visible = mask.cumsum(1) - 1, mask[:, None].expand(-1, x.shape[1], -1)
        rope, kv, mean, vlm = rope_table(positions, self.config["vlm"]), [], None, self.vlm.language_model
        for layer in vlm.layers:
            inputs = layer, x, rope, None, visible
            x, own = self.run(self.layer, *inputs, kv_only=layer is vlm.layers[-1])
            kv.append(own)
        if feature:
            with torch.no_grad():
                x = vlm.norm(self.layer(*inputs)[0]).float()
                mean = x.mean(1) if full else (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return Prefix(kv, None if full else mask, mean)

    def velocity(self, x: torch.Tensor, t: torch.Tensor, prefix: Prefix):
        """K noisy chunks per observation in one pass: x [B,K,H,D] at flow times t [B or 1,K] (1 = noise) ->
        velocity [B,K,H,D] and the expert's features [B,K,H,width], both float32. The K chunks share the prefix's keys
        and do not see each other."""
        cfg, expert = self.config["action_expert"], self.paligemma_with_expert.gemma_expert.model
        (_, K, H, _), device = x.shape, x.device
        short, long = self.config.get("min_period", 4e-3), self.config.get("max_period", 4.0)
        period = short * (long / short) ** torch.linspace(0, 1, cfg["width"] // 2, dtype=torch.float64, device=device)
        angle = t.double()[..., None] * 2 * math.pi / period  # float32 would move the velocity by 1e-4
        cond = torch.cat([angle.sin(), angle.cos()], -1).to(self.time_mlp_in.weight.dtype)
        cond = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(cond))))[:, :, None]

        seen, mask = prefix.mask, None
        if seen is None:
            seen = torch.ones(1, prefix.kv[0][0].shape[2], dtype=torch.bool, device=device)
        rope = rope_table(seen.sum(1, keepdim=True) + torch.arange(H, device=device).repeat(K), cfg)
        if K > 1 or prefix.mask is not None:
            own = torch.arange(K, device=device).repeat_interleave(H)
            own = (own[:, None] == own).expand(len(seen), -1, -1)
            mask = torch.cat([seen[:, None].expand(-1, K * H, -1), own], 2)
        h = self.action_in_proj(x.to(self.action_in_proj.weight.dtype)).to(expert.layers[0].mlp.up_proj.weight.dtype)
        for layer, past in zip(expert.layers, prefix.kv):
            h, _ = self.run(self.layer, layer, h, rope, past, mask, cond)
        h = expert.norm(h, cond)[0].float()
        return self.action_out_proj(h.to(self.action_out_proj.weight.dtype)).float(), h

    def tokens(self, obs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt token ids and validity [B,T]."""
        state = normalize(obs["state"].float().cpu(), self.stat("observation.state")).numpy()
        texts = [pi05_prompt(p, s) for p, s in zip(obs["prompt"], state)]
        rows = [[2, *ids][: self.config["max_token_len"]] for ids in self.encode_text(texts)]  # PaliGemma's BOS
        return self.pad_tokens(rows, "right", 0)

    def observe(self, obs: dict, feature: bool) -> Prefix:
        if "prefix_kv" in obs:
            kv, mask, mean = (obs[f"prefix_{k}"].to(self.device) for k in ("kv", "mask", "feature"))
            return Prefix([layer.unbind(1) for layer in kv.unbind(1)], None if mask.all() else mask, mean)
        image = obs["image"].to(self.device)
        image = (image[:, None] if image.ndim == 4 else image).transpose(0, 1)
        present = obs["image_mask"].T.to(self.device) if "image_mask" in obs else image.new_ones(image.shape[:2]).bool()
        size = self.config["vision"]["image_size"]
        pixels = resize(image.flatten(0, 1), size, pad=True, how=Image.Resampling.BILINEAR)
        pixels = (pixels.permute(0, 3, 1, 2).float() / 255 * 2 - 1).unflatten(0, image.shape[:2])
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_prefix):
            return self.prefix(*self.embed_prefix(pixels, present, *self.tokens(obs)), feature)

    @torch.no_grad()
    def encode(self, obs: dict) -> dict:
        """obs plus the frozen prefix: prefix_kv [B,layers,2,kv heads,P,head_dim], prefix_mask [B,P], prefix_feature."""
        if not self.frozen_prefix or "prefix_kv" in obs:
            return obs
        p = self.observe(obs, feature=True)
        kv = torch.stack([torch.stack(layer, 1) for layer in p.kv], 1)
        mask = kv.new_ones(len(kv), kv.shape[-2]).bool() if p.mask is None else p.mask
        return {**obs, "prefix_kv": kv, "prefix_mask": mask, "prefix_feature": p.feature}

    def sft_loss(self, batch: dict, reduce: bool = True) -> torch.Tensor:
        """Flow-matching MSE (pi0.5 eq. 1), the mean over the unpadded steps, all action dimensions and `loss_draws`
        (time, noise) draws that share one prefix; a scalar, or [B] with reduce=False."""
        action = normalize(batch["action"].float().to(self.device), self.stat("action"))
        action = F.pad(action, (0, self.action_dim - action.shape[-1]))[:, None]
        B, K = len(action), self.config["loss_draws"]
        noise = torch.randn(B, K, *action.shape[2:], device=self.device)
        t = torch.rand(B, K, device=self.device) ** (1 / 1.5) * 0.999 + 0.001  # Beta(1.5, 1), squeezed off t = 0
        loss = self.flow_loss(action, noise, t, self.observe(batch, feature=False)).mean((1, 3))
        return masked_mean(loss, ~batch["action_is_pad"].to(self.device), reduce)

    def flow_loss(self, action, noise, t, prefix) -> torch.Tensor:
        """Squared error of the velocity [B,K,H,D], unreduced; t = 1 is noise."""
        s = t[..., None, None]
        return (noise - action - self.velocity(s * noise + (1 - s) * action, t, prefix)[0]).square()

    @property
    def live(self) -> list[int]:
        """Action dimensions that the data moves. Exploring the others would change nothing but the gradient's noise."""
        stats = self.stat("action")
        return [i for i, (low, high) in enumerate(zip(stats["q01"], stats["q99"])) if high > low]

    def explored(self, x: torch.Tensor) -> torch.Tensor:
        """The part of [...,H,D] that is executed and moves something; only it is explored and scored."""
        return x[..., : self.chunk, :][..., self.live]

    def flow_std(self, feature: torch.Tensor) -> torch.Tensor:
        """The learned exploration std, log-squashed between the bounds of noise_std, in normalised action units."""
        low, high = (math.log(s) for s in self.noise_std)
        return self.explored((low + (high - low) * (self.noise_head(feature).tanh() + 1) / 2).exp())

    def chain_logprob(self, chain: torch.Tensor, prefix: Prefix):
        """A denoising chain [B,K+1,H,D] -> log-probability [B], joint over its K+1 Gaussians (the initial noise
        included) and the executed chunk's dimensions, divided by K+1; entropy [B], the mean over all of these (piRL;
        RLinf's joint_logprob)."""
        K = chain.shape[1] - 1
        v, feature = self.velocity(chain[:, :-1], 1 - torch.arange(K, device=chain.device)[None] / K, prefix)
        mean, std = self.explored(chain[:, :-1] - v / K), self.flow_std(feature)
        start, nxt = self.explored(chain[:, 0]), self.explored(chain[:, 1:])
        logprob = (-((nxt - mean) / std).square() / 2 - std.log()).sum((1, 2, 3)) - start.square().sum((1, 2)) / 2
        dims = (K + 1) * start[0].numel()
        logprob = logprob - dims * math.log(2 * math.pi) / 2
        entropy = std.log().sum((1, 2, 3)) / dims + math.log(2 * math.pi * math.e) / 2
        return logprob / (K + 1), entropy

    def denoise(self, x: torch.Tensor, prefix: Prefix, steps: int, sample: bool = False) -> torch.Tensor:
        """Euler integration from x [B,H,D] at t = 1 to t = 0 -> the chain [B,steps+1,H,D]; `sample` adds Flow-Noise."""
        chain, t = [x], 1 - torch.arange(steps, device=x.device)[None] / steps
        for k in range(steps):
            v, feature = self.velocity(x[:, None], t[:, k : k + 1], prefix)
            x = x - v[:, 0] / steps
            if sample:
                std = self.flow_std(feature[:, 0])
                x[:, : self.chunk][..., self.live] += std * torch.randn_like(std)
            chain.append(x)
        return torch.stack(chain, 1)

    @torch.no_grad()
    def act(self, obs: dict, sample: bool) -> Decision:
        """Denoise from Gaussian noise; sample=True explores with Flow-Noise and takes the log-probability from the same
        batched pass as `evaluate`, so that their ratio is exactly 1."""
        prefix, stats = self.observe(obs, feature=True), self.stat("action")
        noise = torch.randn(len(prefix.feature), self.horizon, self.action_dim, device=self.device)
        chain = self.denoise(noise, prefix, self.num_steps, sample)
        value = self.value_head(prefix.feature).squeeze(-1)
        logprob = self.chain_logprob(chain, prefix)[0] if sample else torch.zeros_like(value)
        actions = chain[:, -1, : self.chunk, : len(stats["q01"])]
        return Decision(unnormalize(actions, stats), chain, logprob, value)

    @torch.no_grad()
    def value(self, obs: dict) -> torch.Tensor:
        """Value [B] of observations that nothing is done in: to bootstrap from the end of a rollout."""
        return self.value_head(self.observe(obs, feature=True).feature).squeeze(-1)

    def evaluate(self, obs: dict, latent: torch.Tensor):
        """logprob [B], entropy [B], value [B] of the chains [B,K+1,H,D] that `act` returned."""
        prefix = self.observe(obs, feature=True)
        logprob, entropy = self.chain_logprob(latent.to(self.device), prefix)
        return logprob, entropy, self.value_head(prefix.feature).squeeze(-1)


# ---- OpenVLA ----------------------------------------------------------------------------------------------------

class ViTBlock(nn.Module):
    """A pre-norm block under timm's names: OpenVLA's checkpoints and LoRA adapters have one fused qkv, which
    transformers' DINOv2 and SigLIP split."""

    def __init__(self, dim: int, heads: int, hidden: int, scaled: bool):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, 1e-6), nn.LayerNorm(dim, 1e-6)
        self.attn = box(qkv=nn.Linear(dim, 3 * dim), proj=nn.Linear(dim, dim))
        self.mlp = box(fc1=nn.Linear(dim, hidden), fc2=nn.Linear(hidden, dim))
        self.ls1, self.ls2 = (nn.ParameterDict({"scale_factor": torch.ones(dim)} if scaled else {}) for _ in range(2))

    def forward(self, x):
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = self.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + (y * self.ls1.scale_factor if self.ls1 else y)
        y = self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))
        return x + (y * self.ls2.scale_factor if self.ls2 else y)


def vit(cfg: dict, size: int, patch: int) -> nn.ModuleDict:
    """DINOv2 with registers, or (without "reg_tokens") SigLIP; the latter's unused pooling head included."""
    dim, hidden, registers = cfg["embed_dim"], cfg["mlp_hidden"], cfg.get("reg_tokens")
    tower = box(patch_embed=box(proj=nn.Conv2d(3, dim, patch, patch)),
                blocks=nn.ModuleList(ViTBlock(dim, cfg["num_heads"], hidden, bool(registers))
                                     for _ in range(cfg["depth"])),
                norm=nn.LayerNorm(dim, 1e-6))
    tower.pos_embed = nn.Parameter(torch.randn(1, (size // patch) ** 2, dim) * 0.02)
    if registers:
        tower.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        tower.reg_token = nn.Parameter(torch.zeros(1, registers, dim))
    else:
        tower["attn_pool"] = box(q=nn.Linear(dim, dim), kv=nn.Linear(dim, 2 * dim), proj=nn.Linear(dim, dim),
                                 norm=nn.LayerNorm(dim, 1e-6),
                                 mlp=box(fc1=nn.Linear(dim, hidden), fc2=nn.Linear(hidden, dim)))
        tower.attn_pool.latent = nn.Parameter(torch.zeros(1, 1, dim))
    return tower


class OpenVLA(Policy):
    """OpenVLA (arXiv 2406.09246): fused DINOv2 and SigLIP patches after BOS, Llama, 7 action tokens an action. RL as in
    RL4VLA and RLinf: everything is about the softmax over the 256 action tokens only. Predicts `chunk` actions."""

    LAYOUTS, TOKENIZER = ("openvla",), "openvla/openvla-7b"
    FROZEN, FLOAT32 = ("vision_backbone.", "projector."), ()
    # ImageNet's and SigLIP's constants, rounded to bfloat16 as the released processor has them
    MEAN = ((0.484375, 0.455078125, 0.40625), (0.5, 0.5, 0.5))
    STD = ((0.228515625, 0.2236328125, 0.224609375), (0.5, 0.5, 0.5))
    EDGES = torch.linspace(-1, 1, 256, dtype=torch.float64)

    def __init__(self, config: dict, stats: dict | None, tokenizer: Tokenizer | None):
        super().__init__(config, stats, tokenizer)
        dino, siglip, llm = config["dino"], config["siglip"], config["llm"]
        fused, width = dino["embed_dim"] + siglip["embed_dim"], llm["hidden_size"]
        self.vocab, self.tokens_per_action = config["real_vocab_size"], config["action_dim"]
        self.vision_backbone = box(featurizer=vit(dino, config["image_size"], config["patch_size"]),
                                   fused_featurizer=vit(siglip, config["image_size"], config["patch_size"]))
        self.projector = box(fc1=nn.Linear(fused, 4 * fused), fc2=nn.Linear(4 * fused, width),
                             fc3=nn.Linear(width, width))
        rope = {"rope_type": "default", "rope_theta": llm.get("rope_theta", 1e4)}
        self.llama = LlamaConfig(**{k: v for k, v in llm.items() if k != "rope_theta"}, rope_parameters=rope,
                                 attn_implementation="sdpa")
        self.language_model = box(model=LlamaModel(self.llama),
                                  lm_head=nn.Linear(width, llm["vocab_size"], bias=False))
        self.value_head = mlp([width, *config["value_hidden"], 1], nn.GELU, bias_last=False)
        self.UNTRAINED = tuple(
            f"vision_backbone.{name}.{part}." for name, cfg in (("featurizer", dino), ("fused_featurizer", siglip))
            for part in (f"blocks.{cfg['depth'] - 1}", "norm", "attn_pool"))
        self.freeze("all")

    def init_scratch(self) -> None:
        """Initial weights of a new model; ordered bins get smooth embeddings and output rows. What was measured to
        matter: with torch's defaults the projected patches are a seventh of the words, and their positions are lost."""
        for tower in (self.vision_backbone.featurizer, self.vision_backbone.fused_featurizer):
            nn.init.normal_(tower.pos_embed)
        for fc in self.projector.values():
            nn.init.normal_(fc.weight, std=(2 / fc.in_features) ** 0.5)
        words = self.language_model.model.embed_tokens.weight
        nn.init.normal_(words, std=0.5)
        for name, m in self.language_model.named_modules():
            if isinstance(m, nn.Linear):
                m.reset_parameters()
                if name.endswith(("q_proj", "k_proj")):
                    m.weight.mul_(2)
        for weight in (words, self.language_model.lm_head.weight):
            init_numbers(weight, list(range(self.vocab - 256, self.vocab)))

    def embed_patches(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 [B,H,W,3] -> projected patches [B,P,width]"""
        image = resize(image.to(self.device), self.config["image_size"], pad=False, how=Image.Resampling.BICUBIC)
        image = image.permute(0, 3, 1, 2).float() / 255
        mean, std = (image.new_tensor(c)[:, :, None, None] for c in (self.MEAN, self.STD))
        return self.project(*((image - m) / s for m, s in zip(mean, std)))

    def project(self, *images: torch.Tensor) -> torch.Tensor:
        """Normalised images [B,3,S,S] for DINOv2 and for SigLIP -> projected patches [B,P,width]; the features are
        those of the second-to-last block, without a norm."""
        features, p = [], self.projector
        for tower, x in zip((self.vision_backbone.featurizer, self.vision_backbone.fused_featurizer), images):
            x = tower.patch_embed.proj(x.to(tower.pos_embed.dtype)).flatten(2).transpose(1, 2) + tower.pos_embed
            patches = x.shape[1]
            if hasattr(tower, "cls_token"):
                x = torch.cat([*(t.expand(len(x), -1, -1) for t in (tower.cls_token, tower.reg_token)), x], 1)
            for block in tower.blocks[:-1]:
                x = self.run(block, x)
            features.append(x[:, -patches:])
        return p.fc3(F.gelu(p.fc2(F.gelu(p.fc1(torch.cat(features, -1))))))

    def hidden(self, patches, ids, mask, cache: bool = False):
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
        return model(inputs_embeds=x, attention_mask=mask, position_ids=position, use_cache=cache), mask

    def action_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [...,width] -> float32 logits [...,256] of the action tokens."""
        return F.linear(hidden, self.language_model.lm_head.weight[self.vocab - 256 : self.vocab]).float()

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
        ids, mask = self.pad_tokens(rows, "left", self.config["pad_token_id"])
        return F.pad(ids, (1, 0), value=self.config["bos_token_id"]), F.pad(mask, (1, 0), value=True)

    def patches(self, obs: dict) -> torch.Tensor:
        if "patches" in obs:
            return obs["patches"].to(self.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_prefix):
            return self.embed_patches(obs["image"])

    @torch.no_grad()
    def encode(self, obs: dict) -> dict:
        """obs plus the frozen towers' output: patches [B,P,width]."""
        return {**obs, "patches": self.patches(obs)} if self.frozen_prefix else obs

    def teacher_forced(self, obs: dict, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states [B,n+1,width] that predict tokens [B,n] and what follows them."""
        ids, mask = self.prompt(obs)
        ids, mask = torch.cat([ids, tokens], 1), F.pad(mask, (0, tokens.shape[1]), value=True)
        return self.hidden(self.patches(obs), ids, mask)[0].last_hidden_state[:, -tokens.shape[1] - 1 :]

    def masked(self, actions: torch.Tensor) -> torch.Tensor:
        """[7] True where statistics normalise; not the gripper of published ones, 0 closed .. 1 open there."""
        return torch.tensor(self.stat("action").get("mask", [True] * actions.shape[-1]), device=actions.device)

    def sft_loss(self, batch: dict, reduce: bool = True) -> torch.Tensor:
        """Token cross-entropy over the whole vocabulary, the mean over the unpadded actions' tokens (and the end token
        of published models); a scalar, or [B] with reduce=False."""
        action = batch["action"].float().to(self.device)
        action = torch.where(self.masked(action), normalize(action, self.stat("action"), 1e-8), (action + 1) / 2)
        keep = ~batch["action_is_pad"].to(self.device).repeat_interleave(self.tokens_per_action, 1)
        return self.token_loss(batch, self.to_tokens(action).flatten(1), keep, reduce)

    def token_loss(self, obs: dict, target, keep, reduce: bool = True) -> torch.Tensor:
        """Cross-entropy of target tokens [B,n] where keep [B,n]."""
        if self.config["predict_stop_token"]:
            target, keep = F.pad(target, (0, 1), value=self.config["eos_token_id"]), F.pad(keep, (0, 1), value=True)
        logits = self.language_model.lm_head(self.teacher_forced(obs, target[:, :-1])).float()
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
        return masked_mean(loss, keep, reduce)

    @torch.no_grad()
    def act(self, obs: dict, sample: bool) -> Decision:
        """Decode `chunk` actions with the key-value cache from the action tokens' softmax: sample=True explores at
        config's `temperature` and takes the log-probability from `evaluate` itself, so that their ratio is exactly 1 in
        any precision; sample=False is at `eval_temperature`, 0 being greedy."""
        temperature = self.config["temperature" if sample else "eval_temperature"]
        obs = {**obs, "patches": self.patches(obs)}
        out, mask = self.hidden(obs["patches"], *self.prompt(obs), cache=True)
        value, tokens = self.value_head(out.last_hidden_state[:, -1].float()).squeeze(-1), []
        while len(tokens) < self.chunk * self.tokens_per_action:
            if tokens:
                mask = None if mask is None else F.pad(mask, (0, 1), value=1)
                position = None if mask is None else mask.sum(1, keepdim=True) - 1
                out = self.language_model.model(tokens[-1], attention_mask=mask, position_ids=position, use_cache=True,
                                                past_key_values=out.past_key_values)
            logits = self.action_logits(out.last_hidden_state[:, -1])
            pick = (torch.multinomial((logits / temperature).softmax(-1), 1) if temperature else
                    logits.argmax(-1, keepdim=True))
            tokens.append(self.vocab - 256 + pick)
        tokens, logprob = torch.cat(tokens, 1), torch.zeros_like(value)
        if sample:
            logprob, _, value = self.evaluate(obs, tokens)
        raw, stats = self.to_actions(tokens).unflatten(1, (self.chunk, -1)), self.stat("action")
        actions = torch.where(self.masked(raw), unnormalize(raw, stats, 0), (raw > 0.5).to(raw) * 2 - 1)
        return Decision(actions.float(), tokens, logprob, value)

    @torch.no_grad()
    def value(self, obs: dict) -> torch.Tensor:
        """Value [B] of observations that nothing is done in: to bootstrap from the end of a rollout."""
        out, _ = self.hidden(self.patches(obs), *self.prompt(obs))
        return self.value_head(out.last_hidden_state[:, -1].float())[:, 0]

    def evaluate(self, obs: dict, latent: torch.Tensor):
        """Action tokens [B,C*7] -> logprob [B] (an action's is the sum over its tokens, the chunk's the mean over its
        actions, as pi0.5's is over its denoising steps), entropy [B] (the mean over tokens), value [B], in one
        teacher-forced pass."""
        latent = latent.to(self.device)
        hidden = self.teacher_forced(obs, latent[:, :-1])
        logp = (self.action_logits(hidden) / self.config["temperature"]).log_softmax(-1)
        logprob = logp.gather(-1, (latent - (self.vocab - 256))[..., None])[..., 0].sum(1) / self.chunk
        return logprob, -(logp.exp() * logp).sum(-1).mean(1), self.value_head(hidden[:, 0].float())[:, 0]


# ---- checkpoints ------------------------------------------------------------------------------------------------

OPENPI_STATS = {"observation.state": "state", "action": "actions"}
OPENPI_CONFIG = {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}
LEROBOT_CONFIG = {"chunk_size": "action_horizon", "n_action_steps": "chunk", "num_inference_steps": "num_steps",
                  "tokenizer_max_length": "max_token_len", "max_action_dim": "action_dim"}
OPENVLA_CONFIG = {
    "architectures": ["OpenVLAForActionPrediction"], "model_type": "openvla", "n_action_bins": 256,
    "arch_specifier": "no-align+fused-gelu-mlp", "output_projector_states": False, "llm_max_length": 2048,
    "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig",
                 "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction"},
    "vision_backbone_id": "dinosiglip-vit-so-224px", "llm_backbone_id": "llama2-7b-pure",
    "use_fused_vision_backbone": True, "image_resize_strategy": "resize-naive",
}
RENAMES = ((r"^model\.(?=paligemma_with_expert|action_|time_mlp)", ""),  # lerobot
           (r"^value_head\.mlp\.", "value_head."),  # RLinf
           (r"^value_head\.head_l(\d)", lambda m: f"value_head.{2 * int(m[1]) - 2}"),  # RL4VLA
           (r"^noise_head\.mlp_logvar\.moduleList\.(\d)\.linear_1", lambda m: f"noise_head.{2 * int(m[1])}"))


def load_policy(name: str | Path, stats: dict | None = None, dtype: torch.dtype | None = None, device: str = "cpu",
                **overrides) -> Policy:
    """A preset's name gives random weights; a folder or a Hub name a checkpoint: ours, openpi's PyTorch layout (also
    RLinf's), lerobot's pi0.5, or OpenVLA's, told apart by content. `stats` replaces the statistics found there; `dtype`
    converts on load, but for what trains badly in bfloat16 (FLOAT32; None keeps the file's); `overrides` replace
    settings of its config (chunk, action_horizon, noise_std, ...; unnorm_key chooses among OpenVLA's statistics).
    FileNotFoundError or ValueError say in one line what is wrong, naming every key that is missing, unexpected or of
    another shape."""
    if preset := str(name) in PRESETS:
        if Path(name).is_dir():
            raise ValueError(f"{name} is a preset and a folder here: ./{name} is the folder; rename it for the preset")
        config, tokenizer = PRESETS[str(name)], small_tokenizer()
    else:
        folder = Path(name)
        if not folder.is_dir():
            try:
                files = ["*.safetensors*", "*.json", "*.py", "*.model"]
                folder = Path(snapshot_download(str(name), allow_patterns=files))
            except Exception as error:
                raise FileNotFoundError(f"{name} is no preset ({', '.join(PRESETS)}) and no folder, and the Hub gives "
                                        f"no such model ({type(error).__name__})") from None
        tensors = read_tensors(folder)
        config, file = read_config(folder, tensors), folder / "tokenizer.json"
        tokenizer = read_file(file) if file.is_file() else None
    if unknown := set(overrides) - set(config) - {"unnorm_key"}:
        raise ValueError(f"{name} has no setting {', '.join(sorted(unknown))}; it has {', '.join(sorted(config))}")
    config = {**config, **overrides}
    with torch.device(device if preset else "meta"):
        policy = (Pi05 if config["type"] == "pi05" else OpenVLA)(config, stats, tokenizer)
    if not preset:
        policy.stats, policy.source = stats or read_stats(folder, config), folder
        load_weights(policy, tensors, dtype, device)
        return policy
    if policy.device.type != "meta":
        with torch.no_grad():
            policy.init_scratch()
    for n, p in policy.named_parameters():
        p.data = p.data.to(policy.device, policy.dtype_of(n, dtype))
    return policy


def load_weights(policy: Policy, tensors: dict, dtype: torch.dtype | None, device: str) -> None:
    """Put checkpoint tensors into a policy on the meta device, one at a time and without a second copy."""
    if any("lora_" in k for k in tensors):
        policy.add_lora()
    for owner in policy.lora_layers():
        for leaf in ("weight", "bias"):
            if f"{owner}.{leaf}" in tensors:
                tensors[f"{owner}.base_layer.{leaf}"] = tensors.pop(f"{owner}.{leaf}")
    if pi05 := isinstance(policy, Pi05):
        tensors = {LM_HEAD: tensors.get(EMBED), EMBED: tensors.get(LM_HEAD), **tensors}
    want = policy.state_dict()
    fresh = {k for k in want if k.startswith(HEADS) and k not in tensors}  # published checkpoints have none
    problems = {"missing": [k for k in want if k not in tensors and k not in fresh],
                "unexpected": [k for k in tensors if k not in want],
                "of another shape": [f"{k} {list(tensors[k].shape)} instead of {list(v.shape)}"
                                     for k, v in want.items() if k in tensors and tensors[k].shape != v.shape]}
    if any(problems.values()):
        raise ValueError(f"{policy.source} does not fit its configuration: "
                         + "; ".join(f"{len(v)} {k}: {by_layer(v)}" for k, v in problems.items() if v))
    if tied := pi05 and torch.equal(tensors[LM_HEAD], tensors[EMBED]):
        del tensors[LM_HEAD]
    for k, v in tensors.items():  # copied: file mappings are not aligned as CPU kernels want, and files change
        tensors[k] = v.to(device, policy.dtype_of(k, dtype), copy=True)
    policy.load_state_dict(tensors, strict=False, assign=True)
    for name, m in policy.named_modules():
        if f"{name}.weight" in fresh:
            m.to_empty(device=device).reset_parameters()
    if tied:
        policy.tie()
    if not pi05:  # its rotary frequencies are in no checkpoint
        policy.language_model.model.rotary_emb = LlamaRotaryEmbedding(policy.llama).to(device)


def by_layer(keys: list[str]) -> str:
    """All keys, in a readable few: those that differ in the layer's number alone as one (layers.{3..29}.mlp.weight)."""
    layers = {}
    for key in keys:
        head, *rest = re.split(r"(?<=\.)(\d+)(?=\.)", key, maxsplit=1)
        layers.setdefault((head, *rest[1:]), []).extend(rest[:1])
    def short(n: list[str]) -> str:
        run = len(n) > 2 and int(n[-1]) - int(n[0]) == len(n) - 1
        return "{" + (f"{n[0]}..{n[-1]}" if run else ",".join(n)) + "}" if len(n) > 1 else "".join(n)
    return ", ".join(short(n).join(parts) for parts, n in layers.items())


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold weights; none if it is no checkpoint."""
    files = [f for f in sorted(folder.glob("*.safetensors")) if "processor" not in f.name]
    steps = sorted(folder.glob("**/full_weights.pt"))  # of RLinf's trainer
    if not files and len(steps) > 1:
        raise ValueError(f"{folder} has {len(steps)} checkpoints: name the folder of one, such as {steps[-1].parent}")
    return files or steps


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder, mapped from disk, under our names."""
    tensors = {}
    for file in weight_files(folder):
        tensors |= read_file(file)
    if not tensors:
        raise FileNotFoundError(f"{folder} has no *.safetensors file: it is no checkpoint")
    for pattern, to in RENAMES:
        tensors = {re.sub(pattern, to, k): v for k, v in tensors.items()}
    return {k: v for k, v in tensors.items() if not k.startswith("noise_head.logvar_")}  # ours: config's noise_std


def read_file(file: Path):
    """What a file of a checkpoint holds, or one line that names it."""
    try:
        if file.name == "tokenizer.json":
            return Tokenizer.from_file(str(file))
        if file.suffix == ".json":
            if not isinstance(content := json.loads(file.read_text()), dict):
                raise ValueError("no JSON object")
            return content
        if file.suffix == ".pt":
            return torch.load(file, "cpu", mmap=True, weights_only=True)
        return load_file(file)
    except Exception as error:  # the libraries have no narrower one
        raise ValueError(f"{file} is unreadable ({error}): copy or save it again") from None


def read_config(folder: Path, tensors: dict) -> dict:
    """Our settings from any layout's config; the family is told by the key names."""
    files = [f for f in (folder / "rlco.json", folder / "config.json") if f.is_file()]
    raw = read_file(files[0]) if files else {}
    hidden = [len(v) for k, v in sorted(tensors.items()) if re.fullmatch(r"value_head\.\d\.weight", k)]
    lost = ("config.json" if not files and (folder / "heads.safetensors").is_file() else
            "heads.safetensors" if "value_hidden" in raw and not hidden else None)  # only our own say value_hidden
    if lost:
        raise FileNotFoundError(f"{folder} has lost its {lost}: copy it again")
    if (words := tensors.get(EMBED, tensors.get(LM_HEAD))) is not None:
        config, extra = PRESETS["pi05"], ("min_period", "max_period")
        raw |= {ours: raw[theirs] for theirs, ours in LEROBOT_CONFIG.items() if theirs in raw}
        raw["vlm"] = {**raw.get("vlm", config["vlm"]), "vocab_size": len(words)}
    elif "projector.fc1.weight" in tensors:
        config, extra = PRESETS["openvla-7b"], ("norm_stats", "unnorm_key")
        if (file := folder / "dataset_statistics.json").is_file():  # of its fine-tuning: these count there, too
            raw["norm_stats"] = read_file(file)
        if (text := raw.get("text_config")) and "llm" not in raw:
            theta = (text.get("rope_parameters") or text).get("rope_theta", 1e4)
            raw["llm"] = {**config["llm"], **text, "rope_theta": theta}
            raw["real_vocab_size"] = raw["llm"]["vocab_size"] - raw.get("pad_to_multiple_of", 64)
        keys = (*config["llm"], "attention_bias", "mlp_bias", "head_dim", "hidden_act")
        raw["llm"] = {k: v for k, v in raw.get("llm", config["llm"]).items() if k in keys}
    else:
        raise ValueError(f"the *.safetensors in {folder} are neither pi0.5's (no {LM_HEAD}) nor OpenVLA's (no "
                         "projector.fc1.weight): is model.safetensors missing?")
    config = {**config, **{k: v for k, v in raw.items() if k in (*config, *extra)}, "type": config["type"]}
    return {**config, "value_hidden": hidden[:-1] or config["value_hidden"],
            "chunk": min(config["chunk"], config["action_horizon"])}


def read_stats(folder: Path, config: dict) -> dict:
    """Statistics in LeRobot's form from whichever file the layout keeps them in; an unnorm_key goes before these, and
    chooses where there are several sets."""
    stats, key = {}, config.get("unnorm_key")
    sets = {k: {"action": v["action"]} for k, v in (config.get("norm_stats") or {}).items() if "action" in v}
    for file in sorted(folder.glob("policy_preprocessor*.safetensors")):  # lerobot
        for name, value in read_file(file).items():
            feature, _, kind = name.rpartition(".")
            stats.setdefault(feature, {})[kind] = value.flatten().tolist()
    for file in sorted(folder.glob("**/norm_stats.json")):  # openpi, RLinf
        theirs = read_file(file).get("norm_stats", {})
        sets[file.parent.name] = {o: theirs[t] for o, t in OPENPI_STATS.items() if t in theirs}
    if (file := folder / "stats.json").is_file():  # ours
        stats = read_file(file)
    elif len(sets) == 1:
        key = next(iter(sets))
    if key and key not in sets:
        raise ValueError(f"{folder} has no statistics {key}; unnorm_key can be {', '.join(sorted(sets))}")
    return stats | (sets[key] if key else {})


def export(policy: Policy, tensors: dict, folder: Path, layout: str | None) -> tuple[dict, dict]:
    """Weights and config.json as others' code wants them; writes the statistics where it looks for them."""
    stats = policy.stats or {}
    config = {k: v for k, v in policy.config.items() if k != "value_hidden" or not layout}  # it promises heads
    if config["type"] == "openvla":
        sets, key = dict(config.get("norm_stats") or {}), config.get("unnorm_key") or "rlco"
        if "action" in stats:
            sets[key] = {**sets.get(key, {}), "action": stats["action"]}
        if (file := folder / "dataset_statistics.json").is_file():  # goes before config.json's
            write_file(file, sets)
        return tensors, {
            **OPENVLA_CONFIG, **config, "norm_stats": sets,
            "text_config": {**config["llm"], "model_type": "llama", "pad_token_id": config["pad_token_id"]},
            "pad_to_multiple_of": config["llm"]["vocab_size"] - config["real_vocab_size"]}
    tied = tensors[LM_HEAD].data_ptr() == tensors[EMBED].data_ptr()
    if layout == "lerobot":
        write_file(folder / "rlco.json", config)
        tensors = {f"model.{k}": v.clone() if k == LM_HEAD and tied else v for k, v in tensors.items()}
        return tensors, lerobot_config(policy, folder)
    if tied:
        del tensors[EMBED]  # openpi's loader wants a tied tensor once, under this name
    theirs = {t: {k: stats[o][k] for k in ("mean", "std", "q01", "q99") if k in stats[o]}
              for o, t in OPENPI_STATS.items() if o in stats}
    for file in list(folder.glob("**/norm_stats.json")) or [folder / "assets/rlco/norm_stats.json"]:
        write_file(file, {"norm_stats": theirs})
    return tensors, {**OPENPI_CONFIG, **config}


def lerobot_config(policy: Pi05, folder: Path) -> dict:
    """Write lerobot's two processor pipelines, which hold the statistics; returns its config.json."""
    config, stats = policy.config, {k: v for k, v in (policy.stats or {}).items() if k in OPENPI_STATS}
    size, dims = config["vision"]["image_size"], {k: len(v["q01"]) for k, v in stats.items()}
    flat = {f"{f}.{k}": torch.tensor(v, dtype=torch.float32) for f, s in stats.items() for k, v in s.items()}
    inputs = {"observation.images.base_0_rgb": {"type": "VISUAL", "shape": [3, size, size]}}
    if stats:
        inputs["observation.state"] = {"type": "STATE", "shape": [dims["observation.state"]]}
    outputs = {"action": {"type": "ACTION", "shape": [dims.get("action", policy.action_dim)]}}
    modes = {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"}
    text = {"max_length": config["max_token_len"], "task_key": "task", "padding_side": "right",
            "padding": "max_length", "truncation": True, "tokenizer_name": policy.TOKENIZER}
    device = ("device_processor", {"device": "cpu", "float_dtype": None})
    for name, steps in {
        "policy_preprocessor": [("rename_observations_processor", {"rename_map": {}}), ("to_batch_processor", {}),
                                ("normalizer_processor", {"features": {**inputs, **outputs}, "norm_map": modes}),
                                ("pi05_prepare_state_tokenizer_processor_step", {}),
                                ("tokenizer_processor", text), device],
        "policy_postprocessor": [("unnormalizer_processor", {"features": outputs, "norm_map": modes}), device]}.items():
        entries = [{"registry_name": n, "config": c} for n, c in steps]
        for i, entry in enumerate(entries):
            if "normalizer" in entry["registry_name"] and flat:
                entry["state_file"] = f"{name}_step_{i}_{entry['registry_name']}.safetensors"
                write_file(folder / entry["state_file"], flat)
        write_file(folder / f"{name}.json", {"name": name, "steps": entries})
    return {"type": "pi05", **OPENPI_CONFIG, **{t: config[o] for t, o in LEROBOT_CONFIG.items()},
            "image_resolution": [size, size], "normalization_mapping": modes, "input_features": inputs,
            "output_features": outputs}


# ---- python policy.py bench -------------------------------------------------------------------------------------

class AsPublished(Pi05):
    """The same numbers, computed as the public PyTorch code does: three cameras of which two are masked, a prompt
    padded to its limit, a loop over the denoising steps, eager attention on repeated keys."""

    def embed_prefix(self, images, image_masks, tokens, token_masks):
        pad = (0, self.config["max_token_len"] - tokens.shape[1])
        patches = self.embed_images(torch.cat([images[0], *[-torch.ones_like(images[0])] * 2])).chunk(3)
        words = self.vlm.language_model.embed_tokens(F.pad(tokens, pad))
        real = torch.arange(3, device=words.device).repeat_interleave(patches[0].shape[1]) == 0
        return (torch.cat([*patches, words * words.shape[-1] ** 0.5], 1),
                torch.cat([real.expand(len(tokens), -1), F.pad(token_masks, pad)], 1))

    def velocity(self, x, t, prefix):
        steps = [super(AsPublished, self).velocity(x[:, k, None], t[:, k, None], prefix) for k in range(x.shape[1])]
        return tuple(torch.cat(parts, 1) for parts in zip(*steps))

    @staticmethod
    def attend(q, k, v, mask):
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[1], 1) for x in (k, v))
        scores = q.transpose(1, 2) @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~mask[:, None], -2.3819763e38).softmax(-1, torch.float32).type_as(v)
        return (scores @ v).transpose(1, 2).flatten(2)


def bench(depth: int = 4, batch: int = 2, repeats: int = 3, device: str = "cpu", bf16: bool = False) -> None:
    """Throughput of pi0.5's PPO update (evaluate and backward) here and `AsPublished`, on the same weights.

    Args:
        depth: layers kept of each of the three transformers, at full width; 0 keeps all (the fewer, the more the word
            table's gradient, the same both ways, hides the ratio)
        batch: observations in an update
        repeats: timed updates
        device: cpu or cuda
        bf16: weights in bfloat16
    """
    sizes = {k: dict(PRESETS["pi05"][k]) for k in ("vision", "vlm", "action_expert")}
    for cfg, key in zip(sizes.values(), ("num_hidden_layers", "depth", "depth")):
        cfg[key] = depth or cfg[key]
    one = {"q01": [-1.0] * 7, "q99": [1.0] * 7}
    policy = load_policy("pi05", {"observation.state": one, "action": one}, torch.bfloat16 if bf16 else None, device,
                         **sizes)
    obs = {"image": torch.randint(0, 256, (batch, 224, 224, 3), dtype=torch.uint8),
           "state": torch.rand(batch, 7) * 2 - 1, "prompt": ["push the cube to the target"] * batch}
    chain, rates = policy.act(obs, sample=True).latent, {}
    for way, policy.__class__, attention in (("here", Pi05, "sdpa"), ("as published", AsPublished, "eager")):
        policy.vlm.vision_tower.vision_model.encoder.config._attn_implementation = attention
        for train in ("all", "expert"):
            policy.freeze(train)
            for i in range(repeats + 1):  # the first warms up
                start = time.perf_counter() if i < 2 else start
                logprob, _, value = policy.evaluate(obs, chain)
                (logprob + value).mean().backward()
                policy.zero_grad()
                if device != "cpu":
                    torch.cuda.synchronize()
            rates[way, train] = repeats * batch / (time.perf_counter() - start)
            print(f"{way:13} {train:7} {rates[way, train]:8.3f} samples/s   logprob {logprob.mean().item():.4f}")
    for train in ("all", "expert"):
        print(f"update of {train}: {rates['here', train] / rates['as published', train]:.1f} times the published way's")


if __name__ == "__main__":
    import tyro
    if sys.argv[1:2] != ["bench"]:
        raise SystemExit("usage: python policy.py bench [--help]")
    tyro.cli(bench, args=sys.argv[2:])
