"""The two VLAs of RL-Co behind one contract: flow-matching pi0.5 and autoregressive OpenVLA.

    policy = load_policy("tiny-pi05", stats=stats)      # a preset (random weights), a folder, or a Hub name
    loss = policy.sft_loss(batch)                       # stage I, and the anchor of stage II
    decision = policy.act(obs, sample=True)             # rollout
    logprob, entropy, value = policy.evaluate(obs, decision.latent)   # PPO update; ratio 1 right after act
    obs = policy.encode(obs)                            # what frozen weights compute, once per observation

An observation batch: "image" uint8 [B,H,W,3] (or [B,N,H,W,3] for N cameras, with an optional bool "image_mask" [B,N]),
"state" float32 [B,S], "prompt" list of B instructions. Actions are physical (m, rad, gripper -1..1) outside this file.
"""

import json
import math
import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma.modeling_gemma import GemmaConfig, GemmaDecoderLayer, GemmaRMSNorm
from transformers.models.siglip.modeling_siglip import SiglipEncoder, SiglipVisionConfig, SiglipVisionEmbeddings

PRESETS = {
    # From scratch in minutes on 2 CPU cores. No tanh GELU: it costs four times erf GELU or SiLU there.
    "tiny-pi05": {
        "type": "pi05",
        "vision": {"image_size": 64, "patch_size": 8, "hidden_size": 96, "num_hidden_layers": 2,
                   "num_attention_heads": 3, "intermediate_size": 192, "hidden_act": "gelu"},
        "vlm": {"width": 96, "depth": 3, "mlp_dim": 192, "num_heads": 3, "num_kv_heads": 1, "head_dim": 32,
                "hidden_act": "silu"},
        "action_expert": {"width": 128, "depth": 3, "mlp_dim": 512, "num_heads": 3, "num_kv_heads": 1,
                          "head_dim": 32, "hidden_act": "silu"},
        "action_dim": 7, "action_horizon": 4, "chunk": 4, "max_token_len": 200, "num_steps": 4,
        "noise_std": [0.2, 0.3], "loss_draws": 4, "value_hidden": [128, 128],
        "number_embedding": True,
    },
    # Published pi0.5 sizes (openpi gemma_2b + gemma_300m, SigLIP so400m/14) and RLinf's RL-Co settings.
    "pi05": {
        "type": "pi05",
        "vision": {"image_size": 224, "patch_size": 14, "hidden_size": 1152, "num_hidden_layers": 27,
                   "num_attention_heads": 16, "intermediate_size": 4304},
        "vlm": {"width": 2048, "depth": 18, "mlp_dim": 16384, "num_heads": 8, "num_kv_heads": 1, "head_dim": 256,
                "vocab_size": 257152},
        "action_expert": {"width": 1024, "depth": 18, "mlp_dim": 4096, "num_heads": 8, "num_kv_heads": 1,
                          "head_dim": 256},
        "action_dim": 32, "action_horizon": 8, "chunk": 4, "max_token_len": 200, "num_steps": 4,
        "noise_std": [0.12, 0.16], "loss_draws": 1, "value_hidden": [512, 256, 128],
    },
}


@dataclass
class Decision:
    """actions [B,C,7] physical; latent: what evaluate needs; logprob [B] (0 without sampling); value [B]."""
    actions: torch.Tensor
    latent: torch.Tensor
    logprob: torch.Tensor
    value: torch.Tensor


# ---- observations -----------------------------------------------------------------------------------------------

TOKEN_DIM = {"prefix_kv": -2, "prefix_mask": -1}  # cached tensors whose length depends on the prompt


def index_obs(obs: dict, idx) -> dict:
    """Rows `idx` (slice, index array or tensor) of an observation or SFT batch."""
    rows = np.arange(len(obs["prompt"]))[idx.cpu().numpy() if torch.is_tensor(idx) else idx]
    return {k: [v[i] for i in rows] if isinstance(v, list) else v[idx] for k, v in obs.items()}


def cat_obs(batches: list[dict]) -> dict:
    """Concatenate along B; cached token dimensions are right-padded (mask False) when prompts differ in length."""
    out = {}
    for key in batches[0]:
        values = [b[key] for b in batches]
        if isinstance(values[0], list):
            out[key] = sum(values, [])
            continue
        if (dim := TOKEN_DIM.get(key)) is not None:
            longest = max(v.shape[dim] for v in values)
            values = [F.pad(v, (0, 0) * (-1 - dim) + (0, longest - v.shape[dim])) for v in values]
        out[key] = torch.cat(values)
    return out


# ---- normalisation ----------------------------------------------------------------------------------------------

def normalize(x: torch.Tensor, stats: dict, eps: float = 1e-6) -> torch.Tensor:
    """[...,D] physical -> [-1,1] between q01 and q99, not clipped (openpi); a dimension with zero range gives 0."""
    low, high = x.new_tensor(stats["q01"]), x.new_tensor(stats["q99"])
    return torch.where(high > low, (x - low) / (high - low + eps) * 2 - 1, 0)


def unnormalize(y: torch.Tensor, stats: dict, eps: float = 1e-6) -> torch.Tensor:
    """Inverse of `normalize`; a dimension with zero range gives q01."""
    low, high = y.new_tensor(stats["q01"]), y.new_tensor(stats["q99"])
    return torch.where(high > low, (y + 1) / 2 * (high - low + eps) + low, low)


def resize_with_pad(image: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [B,H,W,3] -> [B,size,size,3], aspect kept, black bars; PIL's antialiased bilinear, as openpi's data."""
    h, w = image.shape[1:3]
    if (h, w) == (size, size):
        return image
    ratio = max(h, w) / size
    new_h, new_w = int(h / ratio), int(w / ratio)
    x = F.interpolate(image.permute(0, 3, 1, 2).float(), (new_h, new_w), mode="bilinear", antialias=True)
    top, left = (size - new_h) // 2, (size - new_w) // 2
    x = F.pad(x.round().clamp(0, 255), (left, size - new_w - left, top, size - new_h - top))
    return x.to(torch.uint8).permute(0, 2, 3, 1)


# ---- prompt -----------------------------------------------------------------------------------------------------

PAD, EOS, BOS = 0, 1, 2  # PaliGemma's ids
WORDS = """Task State Action In What action should the robot take to Out push pull pick place put open close move lift
stack slide turn press a an of in on onto into from with and up down left right front back over under red green blue
yellow black white cube block ball bowl plate drawer door box cup can goal target table region top middle bottom
handle gripper""".split()


def small_tokenizer(bos: int = BOS) -> Tokenizer:
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


def init_numbers(embedding: torch.Tensor, tokenizer: Tokenizer) -> None:
    """Sinusoids of its value as each integer token's embedding [V,width], at the scale of the others: a model from
    scratch then sees that neighbouring state bins are alike instead of learning 256 of them one by one."""
    values = torch.arange(-1, 256)
    freq = 2 * math.pi / torch.logspace(math.log10(8), 3, embedding.shape[1] // 2)
    angle = values[:, None] * freq
    ids = [tokenizer.token_to_id(f" {v}") for v in values.tolist()]
    with torch.no_grad():
        embedding[ids] = torch.cat([angle.sin(), angle.cos()], 1) * (2 / embedding.shape[1]) ** 0.5


def state_text(state: np.ndarray) -> list[str]:
    """Normalised state [B,S] -> bin numbers 0..255 (-1 below range, as openpi) joined by spaces."""
    bins = np.digitize(state, np.linspace(-1, 1, 257)[:-1]) - 1
    return [" ".join(map(str, row)) for row in bins]


def pi05_prompt(prompt: str, state: str) -> str:
    """openpi's pi0.5 template."""
    return f"Task: {prompt.strip().replace('_', ' ').replace(chr(10), ' ')}, State: {state};\nAction: "


# ---- what both policies share -----------------------------------------------------------------------------------

def mlp(sizes: list[int], act: type[nn.Module]) -> nn.Sequential:
    layers = [m for i, o in zip(sizes, sizes[1:]) for m in (nn.Linear(i, o), act())]
    return nn.Sequential(*layers[:-1])


class Policy(nn.Module):
    """Statistics, device and checkpoint folder; the model and its losses are in the two subclasses."""

    def __init__(self, config: dict, stats: dict | None, tokenizer: Tokenizer):
        super().__init__()
        self.config, self.stats, self.tokenizer = config, stats, tokenizer
        self.chunk, self.horizon = config["chunk"], config["action_horizon"]
        if not 1 <= self.chunk <= self.horizon:
            raise ValueError(f"chunk {self.chunk} must be between 1 and the horizon {self.horizon}")

    @property
    def device(self):
        return next(self.parameters()).device

    def stat(self, key: str) -> dict:
        if self.stats is None:
            raise ValueError("this policy has no statistics: give load_policy(stats=...) those of the training data")
        return self.stats[key]

    def save(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors, tokenizer.json and stats.json, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)

        def put(name, write):
            write(tmp := folder / f".{name}.tmp")
            os.replace(tmp, folder / name)

        seen, tensors = set(), {}
        for name, p in reversed(self.state_dict().items()):  # reversed: of tied names keep lm_head, as openpi does
            if p.data_ptr() not in seen:
                seen.add(p.data_ptr())
                tensors[name] = p.contiguous()
        put("model.safetensors", lambda f: save_file(tensors, f, {"format": "pt"}))
        put("config.json", lambda f: f.write_text(json.dumps(self.config, indent=1)))
        put("tokenizer.json", lambda f: self.tokenizer.save(str(f)))
        put("stats.json", lambda f: f.write_text(json.dumps(self.stats)))


def load_policy(name: str | Path, stats: dict | None = None, **overrides) -> Policy:
    """A preset's name gives random weights; a folder gives its checkpoint. `stats` replaces the folder's statistics,
    `overrides` replace entries of its config (chunk, action_horizon, noise_std, ...)."""
    folder = Path(name)
    if str(name) in PRESETS:
        config, tokenizer = PRESETS[str(name)], small_tokenizer()
    elif (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text())
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        stats = stats or json.loads((folder / "stats.json").read_text())
    else:
        raise FileNotFoundError(f"{name}: neither a preset ({', '.join(PRESETS)}) nor a folder with a config.json")
    if unknown := set(overrides) - set(config):
        raise ValueError(f"{name} has no setting {sorted(unknown)}; it has {sorted(config)}")
    policy = Pi05({**config, **overrides}, stats, tokenizer)
    if str(name) not in PRESETS:
        policy.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    return policy


# ---- pi0.5 ------------------------------------------------------------------------------------------------------

class Prefix(NamedTuple):
    """The VLM's view of an observation: per layer keys and values after RoPE [B,kv heads,P,head_dim]; validity [B,P],
    None when nothing is padded; number of valid tokens [B or 1]; mean of its last features [B,width] (or None)."""
    kv: list
    mask: torch.Tensor | None
    length: torch.Tensor
    feature: torch.Tensor | None


class AdaRMSNorm(nn.Module):
    """RMSNorm whose scale, shift and the residual's gate come from the flow time; the gates start open."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps, self.dense = eps, nn.Linear(width, 3 * width)
        nn.init.zeros_(self.dense.weight)
        with torch.no_grad():
            self.dense.bias.copy_(torch.cat([torch.zeros(2 * width), torch.ones(width)]))

    def forward(self, x, cond):
        """x [B,K,H,width], cond [B or 1,K,1,width] -> normed x, gate (float32)"""
        scale, shift, gate = self.dense(cond).chunk(3, -1)
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return torch.addcmul(shift, normed, 1 + scale).type_as(x), gate


def modulate(norm, x, cond):
    return (norm(x), None) if cond is None else norm(x, cond)


def residual(x, y, gate):
    return x + y if gate is None else (x + gate * y).type_as(x)


def rope_table(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """positions [B or 1,T] -> cos, sin [B or 1,T,1,head_dim]"""
    freq = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = (positions[..., None].float() * freq)[:, :, None]
    return angle.cos().repeat(1, 1, 1, 2), angle.sin().repeat(1, 1, 1, 2)


def rotate(x, rope):
    """Rotate-half RoPE on x [B,T,heads,head_dim]."""
    a, b = x.chunk(2, -1)
    return x * rope[0].type_as(x) + torch.cat((-b, a), -1) * rope[1].type_as(x)


def attend(q, k, v, mask):
    """q [B,T,heads,d], k and v [B,kv heads,S,d], mask [B or 1,T,S] bool or None -> [B,T,heads*d].
    Query heads that share a key head are folded into the query dimension, so keys are never repeated."""
    B, T, heads, d = q.shape
    groups = heads // k.shape[1]
    q = q.view(B, T, k.shape[1], groups, d).transpose(1, 2).reshape(B, k.shape[1], T * groups, d)
    if mask is not None:
        mask = mask.repeat_interleave(groups, 1)[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.view(B, k.shape[1], T, groups, d).transpose(1, 2).reshape(B, T, heads * d)


def gemma_layer(layer, x, rope, past=None, mask=None, cond=None, kv_only=False):
    """One layer of either stream on x [B,...,width], whose inner dimensions are tokens; `past` keys and values come
    first. Returns the new x and this layer's own keys and values."""
    attn, B = layer.self_attn, len(x)
    h, gate = modulate(layer.input_layernorm, x, cond)
    k = rotate(attn.k_proj(h).view(B, -1, attn.kv_heads, attn.head_dim), rope).transpose(1, 2)
    v = attn.v_proj(h).view(B, -1, attn.kv_heads, attn.head_dim).transpose(1, 2)
    if kv_only:
        return None, (k, v)
    q = rotate(attn.q_proj(h).view(B, -1, attn.heads, attn.head_dim), rope)
    keys, values = (k, v) if past is None else (torch.cat((past[0], k), 2), torch.cat((past[1], v), 2))
    x = residual(x, attn.o_proj(attend(q, keys, values, mask)).view_as(x), gate)
    h, gate = modulate(layer.post_attention_layernorm, x, cond)
    return residual(x, layer.mlp(h), gate), (k, v)


def gemma(cfg: dict, ada: bool) -> nn.Module:
    """A Gemma stack's parameters under transformers' names; the joint forward is `gemma_layer`."""
    eps = cfg.get("rms_norm_eps", 1e-6)
    hf = GemmaConfig(hidden_size=cfg["width"], intermediate_size=cfg["mlp_dim"], num_attention_heads=cfg["num_heads"],
                     num_key_value_heads=cfg["num_kv_heads"], head_dim=cfg["head_dim"], rms_norm_eps=eps,
                     hidden_act=cfg.get("hidden_act", "gelu_pytorch_tanh"))
    model = nn.Module()
    model.layers = nn.ModuleList(GemmaDecoderLayer(hf, i) for i in range(cfg["depth"]))
    model.norm = AdaRMSNorm(cfg["width"], eps) if ada else GemmaRMSNorm(cfg["width"], eps)
    for layer in model.layers:
        layer.self_attn.heads, layer.self_attn.kv_heads = cfg["num_heads"], cfg["num_kv_heads"]
        if ada:
            layer.input_layernorm, layer.post_attention_layernorm = (AdaRMSNorm(cfg["width"], eps) for _ in range(2))
    return model


class Pi05(Policy):
    """pi0.5 (openpi's PyTorch model and key names) with Flow-Noise exploration (piRL, arXiv 2510.25889; RLinf) and
    a value head on the mean VLM prefix feature."""

    def __init__(self, config: dict, stats: dict | None, tokenizer: Tokenizer):
        super().__init__(config, stats, tokenizer)
        vision, vlm, expert = config["vision"], dict(config["vlm"]), config["action_expert"]
        vocab = vlm.setdefault("vocab_size", tokenizer.get_vocab_size())
        self.action_dim, self.num_steps, self.noise_std = config["action_dim"], config["num_steps"], config["noise_std"]
        self.gradient_checkpointing = False

        siglip = SiglipVisionConfig(**{"hidden_act": "gelu_pytorch_tanh", **vision})
        siglip._attn_implementation = "sdpa"
        tower = nn.Module()
        tower.embeddings = SiglipVisionEmbeddings(siglip)
        # SigLIP's own initialisation: with torch's default the positions would drown the pixels of a new model
        nn.init.normal_(tower.embeddings.position_embedding.weight, std=vision["hidden_size"] ** -0.5)
        nn.init.normal_(tower.embeddings.patch_embedding.weight, std=(3 * vision["patch_size"] ** 2) ** -0.5)
        del tower.embeddings.position_ids  # not in checkpoints, so it could not come back from the meta device
        tower.encoder = SiglipEncoder(siglip)
        tower.post_layernorm = nn.LayerNorm(vision["hidden_size"], siglip.layer_norm_eps)

        model = nn.Module()
        model.vision_tower = nn.Module()
        model.vision_tower.vision_model = tower
        model.multi_modal_projector = nn.Module()
        model.multi_modal_projector.linear = nn.Linear(vision["hidden_size"], vlm["width"])
        model.language_model = gemma(vlm, ada=False)
        model.language_model.embed_tokens = nn.Embedding(vocab, vlm["width"])
        nn.init.normal_(model.language_model.embed_tokens.weight, std=vlm["width"] ** -0.5)
        if config.get("number_embedding"):
            init_numbers(model.language_model.embed_tokens.weight, tokenizer)

        both = self.paligemma_with_expert = nn.Module()
        both.paligemma = nn.Module()
        both.paligemma.model = model
        both.paligemma.lm_head = nn.Linear(vlm["width"], vocab, bias=False)
        both.paligemma.lm_head.weight = model.language_model.embed_tokens.weight
        both.gemma_expert = nn.Module()
        both.gemma_expert.model = gemma(expert, ada=True)
        both.gemma_expert.lm_head = nn.Linear(expert["width"], vocab, bias=False).requires_grad_(False)  # never used
        self.action_in_proj = nn.Linear(self.action_dim, expert["width"])
        self.action_out_proj = nn.Linear(expert["width"], self.action_dim)
        self.time_mlp_in = nn.Linear(expert["width"], expert["width"])
        self.time_mlp_out = nn.Linear(expert["width"], expert["width"])
        self.value_head = mlp([vlm["width"], *config["value_hidden"], 1], nn.ReLU)
        self.noise_head = mlp([expert["width"], 128, 64, self.action_dim], nn.Tanh)

        self.tower, self.projector = [tower], [model.multi_modal_projector.linear]  # lists: not registered twice
        self.vlm, self.expert = [model.language_model], [both.gemma_expert.model]
        self.freeze("all")

    def freeze(self, train: str) -> None:
        """What trains: "expert" (SigLIP and the VLM frozen) or "all"."""
        if train not in ("expert", "all"):
            raise ValueError(f'what trains is "expert" or "all", not "{train}"')
        self.paligemma_with_expert.paligemma.requires_grad_(train == "all")
        self.frozen_prefix = train == "expert"

    # -- the model ---------------------------------------------------------------------------------------------

    def run(self, *args, **kwargs):
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(gemma_layer, *args, use_reentrant=False, **kwargs)
        return gemma_layer(*args, **kwargs)

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """[N,3,S,S] in [-1,1] -> [N,patches,VLM width]"""
        tower, e = self.tower[0], self.tower[0].embeddings
        x = e.patch_embedding(images.to(e.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        x = (x + e.position_embedding.weight).to(tower.post_layernorm.weight.dtype)
        for layer in tower.encoder.layers:
            x = layer(x, None)
        return self.projector[0](tower.post_layernorm(x).to(self.projector[0].weight.dtype))

    def embed_prefix(self, images, image_masks, tokens, token_masks):
        """images [N,B,3,S,S] in [-1,1], image_masks [N,B], tokens and token_masks [B,T] -> embeddings [B,P,width],
        mask [B,P]. The towers see only cameras that are present; a camera that is absent everywhere takes no tokens."""
        keep = image_masks.any(1)
        images, image_masks = images[keep], image_masks[keep]
        words = self.vlm[0].embed_tokens(tokens)
        words = words * words.shape[-1] ** 0.5
        if image_masks.all():
            patches = self.embed_images(images.flatten(0, 1)).unflatten(0, image_masks.shape)
        else:
            seen = self.embed_images(images[image_masks])
            patches = seen.new_zeros(*image_masks.shape, *seen.shape[1:]).masked_scatter(image_masks[..., None, None], seen)
        mask = torch.cat([*image_masks[:, :, None].expand(-1, -1, patches.shape[2]), token_masks], 1)
        return torch.cat([*patches.to(words.dtype), words], 1), mask

    def prefix(self, x, mask, feature: bool) -> Prefix:
        """The VLM over prefix embeddings [B,P,width] with validity [B,P]; `feature` also runs the last layer's
        attention and MLP, which only the value head reads."""
        cfg = self.config["vlm"]
        if mask.all():
            mask, length = None, torch.full((1,), x.shape[1], device=x.device)
            positions, visible = torch.arange(x.shape[1], device=x.device)[None], None
        else:
            length, positions, visible = mask.sum(1), mask.cumsum(1) - 1, mask[:, None].expand(-1, x.shape[1], -1)
        rope = rope_table(positions, cfg["head_dim"], cfg.get("rope_theta", 1e4))
        kv, vlm = [], self.vlm[0]
        for layer in vlm.layers:
            x, own = self.run(layer, x, rope, mask=visible, kv_only=not feature and layer is vlm.layers[-1])
            kv.append(own)
        if feature:
            x = vlm.norm(x).float()
            feature = x.mean(1) if mask is None else (x * mask[..., None]).sum(1) / length[:, None]
        return Prefix(kv, mask, length, feature if torch.is_tensor(feature) else None)

    def velocity(self, x: torch.Tensor, t: torch.Tensor, prefix: Prefix):
        """K noisy chunks per observation in one pass: x [B,K,H,D] at flow times t [B or 1,K] (1 = noise) ->
        velocity [B,K,H,D] and the expert's features [B,K,H,width], both float32. The K chunks share the prefix's keys
        and do not see each other."""
        cfg, expert = self.config["action_expert"], self.expert[0]
        B, K, H, _ = x.shape
        freq = torch.logspace(0, -3, cfg["width"] // 2, dtype=torch.float64, device=x.device) * 2 * math.pi
        angle = t.double()[..., None] * freq / self.config.get("min_period", 4e-3)
        cond = torch.cat([angle.sin(), angle.cos()], -1).float()
        cond = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(cond))))[:, :, None]

        positions = prefix.length[:, None] + torch.arange(H, device=x.device).repeat(K)
        rope = rope_table(positions, cfg["head_dim"], cfg.get("rope_theta", 1e4))
        mask = None
        if K > 1 or prefix.mask is not None:
            own = torch.arange(K, device=x.device).repeat_interleave(H)
            own = own[:, None] == own
            seen = own.new_ones(1, prefix.kv[0][0].shape[2]) if prefix.mask is None else prefix.mask
            mask = torch.cat([seen[:, None].expand(-1, K * H, -1), own.expand(len(seen), -1, -1)], 2)
        h = self.action_in_proj(x).to(expert.layers[0].self_attn.q_proj.weight.dtype)
        for layer, past in zip(expert.layers, prefix.kv):
            h, _ = self.run(layer, h, rope, past=past, mask=mask, cond=cond)
        h = expert.norm(h, cond)[0].float()
        return self.action_out_proj(h), h

    # -- the contract ------------------------------------------------------------------------------------------

    def tokens(self, obs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt token ids and validity [B,T], padded to the longest of the batch."""
        state = normalize(obs["state"].float().cpu(), self.stat("observation.state")).numpy()
        texts = [pi05_prompt(p, s) for p, s in zip(obs["prompt"], state_text(state))]
        rows = [[BOS, *e.ids][: self.config["max_token_len"]]
                for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]
        longest = max(map(len, rows))
        ids = torch.tensor([r + [PAD] * (longest - len(r)) for r in rows], device=self.device)
        length = torch.tensor([len(r) for r in rows], device=self.device)
        return ids, torch.arange(longest, device=self.device) < length[:, None]

    def observe(self, obs: dict, feature: bool) -> Prefix:
        if "prefix_kv" in obs:
            mask = obs["prefix_mask"].to(self.device)
            full = bool(mask.all())
            kv = [layer.unbind(1) for layer in obs["prefix_kv"].to(self.device).unbind(1)]
            length = mask.sum(1)[:1] if full else mask.sum(1)
            return Prefix(kv, None if full else mask, length, obs["prefix_feature"].to(self.device))
        image = obs["image"].to(self.device)
        image = image[:, None] if image.ndim == 4 else image
        B, N = image.shape[:2]
        image = resize_with_pad(image.transpose(0, 1).flatten(0, 1), self.config["vision"]["image_size"])
        image = (image.permute(0, 3, 1, 2).float() / 255 * 2 - 1).unflatten(0, (N, B))
        present = obs["image_mask"].T.to(self.device) if "image_mask" in obs else image.new_ones(N, B).bool()
        with torch.no_grad() if self.frozen_prefix else nullcontext():
            return self.prefix(*self.embed_prefix(image, present, *self.tokens(obs)), feature)

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
        # Beta(1.5, 1) by its inverse CDF, squeezed off t = 0
        t = torch.rand(B, K, device=self.device) ** (1 / 1.5) * 0.999 + 0.001
        loss = self.flow_loss(action, noise, t, self.observe(batch, feature=False)).mean((1, 3))
        keep = ~batch["action_is_pad"].to(self.device)
        loss = (loss * keep).sum(1) / keep.sum(1).clamp(min=1)
        return loss.mean() if reduce else loss

    def flow_loss(self, action, noise, t, prefix) -> torch.Tensor:
        """Squared error of the velocity [B,K,H,D], unreduced; t = 1 is noise."""
        s = t[..., None, None]
        return (noise - action - self.velocity(s * noise + (1 - s) * action, t, prefix)[0]).square()

    def times(self, steps: int) -> torch.Tensor:
        return 1 - torch.arange(steps, device=self.device) / steps

    def flow_std(self, feature: torch.Tensor) -> torch.Tensor:
        """The learned exploration std, log-squashed between the bounds of noise_std, in normalised action units."""
        low, high = (math.log(s) for s in self.noise_std)
        return (low + (high - low) * (self.noise_head(feature).tanh() + 1) / 2).exp()

    def sampled(self, x: torch.Tensor) -> torch.Tensor:
        """The part of [...,H,D] that is executed; only it is explored, so the log-probability below is exact."""
        return x[..., : self.chunk, : len(self.stat("action")["q01"])]

    def chain_logprob(self, chain: torch.Tensor, prefix: Prefix):
        """log-probability and entropy [B] of a denoising chain [B,K+1,H,D]: joint over its K+1 Gaussians (the initial
        noise included) and the executed chunk's dimensions, divided by K+1 (piRL, RLinf's joint_logprob)."""
        K = chain.shape[1] - 1
        v, feature = self.velocity(chain[:, :-1], self.times(K)[None], prefix)
        mean, std = self.sampled(chain[:, :-1] - v / K), self.sampled(self.flow_std(feature))
        start, nxt = self.sampled(chain[:, 0]), self.sampled(chain[:, 1:])
        logprob = (-((nxt - mean) / std).square() / 2 - std.log()).sum((1, 2, 3)) - start.square().sum((1, 2)) / 2
        dims = (K + 1) * start[0].numel()
        logprob = logprob - dims * math.log(2 * math.pi) / 2
        entropy = std.log().sum((1, 2, 3)) + dims * math.log(2 * math.pi * math.e) / 2
        return logprob / (K + 1), entropy / (K + 1)

    def denoise(self, x: torch.Tensor, prefix: Prefix, steps: int, sample: bool = False) -> torch.Tensor:
        """Euler integration from x [B,H,D] at t = 1 to t = 0 -> the chain [B,steps+1,H,D]; `sample` adds Flow-Noise."""
        chain, t = [x], self.times(steps)
        for k in range(steps):
            v, feature = self.velocity(x[:, None], t[None, k : k + 1], prefix)
            x = x - v[:, 0] / steps
            if sample:
                std = self.sampled(self.flow_std(feature[:, 0]))
                self.sampled(x).add_(std * torch.randn_like(std))
            chain.append(x)
        return torch.stack(chain, 1)

    @torch.no_grad()
    def act(self, obs: dict, sample: bool) -> Decision:
        """Denoise from Gaussian noise (torch's global generator); sample=True explores with Flow-Noise and records the
        log-probability through the same batched pass as `evaluate`, so that their ratio is exactly 1."""
        prefix = self.observe(obs, feature=True)
        noise = torch.randn(len(prefix.feature), self.horizon, self.action_dim, device=self.device)
        chain = self.denoise(noise, prefix, self.num_steps, sample)
        value = self.value_head(prefix.feature).squeeze(-1)
        logprob = self.chain_logprob(chain, prefix)[0] if sample else torch.zeros_like(value)
        return Decision(unnormalize(self.sampled(chain[:, -1]), self.stat("action")), chain, logprob, value)

    @torch.no_grad()
    def value(self, obs: dict) -> torch.Tensor:
        """Value [B] of observations that nothing is done in: to bootstrap from the end of a rollout."""
        return self.value_head(self.observe(obs, feature=True).feature).squeeze(-1)

    def evaluate(self, obs: dict, latent: torch.Tensor):
        """logprob [B], entropy [B], value [B] of the chains [B,K+1,H,D] that `act` returned."""
        prefix = self.observe(obs, feature=True)
        logprob, entropy = self.chain_logprob(latent.to(self.device), prefix)
        # detached, as RLinf does: the critic's early, large gradients would tear the prefix
        return logprob, entropy, self.value_head(prefix.feature.detach()).squeeze(-1)
