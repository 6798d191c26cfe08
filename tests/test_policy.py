"""policy.py against the reference implementations' numbers (tests/data), closed forms and torch.distributions."""

import gzip
import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, load_model, save_file

import policy as P

DATA = Path(__file__).parent / "data"
PROMPT = "push the cube to the target"


def golden(name):
    with np.load(DATA / name) as arrays:
        return {k: torch.from_numpy(v) if v.dtype.kind != "U" else v for k, v in arrays.items()}


def close(actual, expected, tolerance=1e-4):
    """Largest error relative to the largest expected value."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def full_size_keys(name):
    lines = gzip.decompress((DATA / name / "keys_full_size.txt.gz").read_bytes()).decode().splitlines()
    pairs = (line.split("\t") for line in lines if not line.startswith("#"))
    return {key: json.loads(shape) for key, shape in pairs}


def make(name, **kwargs):
    torch.manual_seed(0)
    dim = {"q01": [-0.05, -0.06, -0.02, -0.1, -0.1, -0.2, -1.0], "q99": [0.05, 0.04, 0.03, 0.1, 0.2, 0.2, 1.0]}
    policy = P.load_policy(name, stats={"observation.state": dim, "action": dim}, **kwargs)
    with torch.no_grad():  # so that no zero gate or bias hides a mistake
        for p in policy.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return policy


def make_obs(policy, prompts):
    B, size = len(prompts), policy.config.get("image_size") or policy.config["vision"]["image_size"]
    return {"image": torch.randint(0, 256, (B, size, size, 3), dtype=torch.uint8),
            "state": torch.rand(B, 7) * 0.2 - 0.1, "prompt": list(prompts)}


def make_batch(policy, prompts):
    obs = make_obs(policy, prompts)
    B = len(prompts)
    return {**obs, "action": torch.rand(B, policy.horizon, 7) * 0.1 - 0.05, "is_sim": torch.zeros(B, dtype=torch.bool),
            "action_is_pad": torch.arange(policy.horizon) >= torch.tensor([policy.horizon, 2, 1])[:B, None]}


BOTH = pytest.mark.parametrize("name", ["tiny-pi05", "tiny-openvla"])
MIXED = [PROMPT, "open the drawer", "pick up the red block and place it"]  # prompts of different length


# ---- pi0.5 against openpi ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pi05():
    return P.load_policy(DATA / "pi05"), golden("pi05/golden_io.npz")


@pytest.fixture(scope="module")
def pi05_prefix(pi05):
    policy, io = pi05
    with torch.no_grad():
        embedded, mask = policy.embed_prefix(io["images"], io["image_masks"], io["tokens"], io["token_masks"])
        return embedded, mask, policy.prefix(embedded, mask, feature=True)


def test_pi05_prefix(pi05, pi05_prefix):
    policy, io = pi05
    embedded, mask, prefix = pi05_prefix
    valid = io["prefix_pad_mask"]
    assert (mask == valid).all()
    close(embedded[valid], io["prefix_embs"][valid])
    close(policy.embed_images(io["images"][0]), io["image_features"][0])
    close(prefix.feature, io["prefix_last_hidden_mean"])


def test_pi05_loss_and_gradients(pi05):
    policy, io = pi05
    inputs = (io[k] for k in ("images", "image_masks", "tokens", "token_masks"))
    prefix = policy.prefix(*policy.embed_prefix(*inputs), feature=False)
    loss = policy.flow_loss(io["actions"][:, None], io["noise"][:, None], io["time"][:, None], prefix)[:, 0]
    close(loss, io["loss"])
    policy.zero_grad()
    loss.mean().backward()
    parameters = dict(policy.named_parameters())
    for key in (k for k in io if k.startswith("grad/")):
        close(parameters[key[5:]].grad, io[key])


@torch.no_grad()
def test_pi05_velocity_and_sampler(pi05, pi05_prefix):
    policy, io = pi05
    prefix = pi05_prefix[2]
    x, t, velocity = (io[k].transpose(0, 1) for k in ("vel_x_t", "vel_t", "velocity"))
    close(policy.velocity(x, t, prefix)[0], velocity)  # three chunks in one pass
    for k in range(3):
        close(policy.velocity(x[:, k : k + 1], t[:, k : k + 1], prefix)[0][:, 0], velocity[:, k])
    close(policy.denoise(io["sample_noise"], prefix, 4)[:, -1], io["sampled_actions_4"])
    close(policy.denoise(io["sample_noise"], prefix, 10)[:, -1], io["sampled_actions_10_exact_times"], 1e-5)


def test_pi05_absent_cameras_cost_nothing(pi05):
    """A camera that is absent everywhere takes no tokens; the other tokens do not change."""
    policy, io = pi05
    tokens = io["tokens"][:, :9], io["token_masks"][:, :9]
    with torch.no_grad():
        one, mask = policy.embed_prefix(io["images"][:1], io["image_masks"][:1], *tokens)
        two, _ = policy.embed_prefix(io["images"], torch.stack([io["image_masks"][0], torch.zeros(3).bool()]), *tokens)
        assert policy.prefix(one, mask, False).mask is None  # nothing padded: no attention mask
    assert torch.equal(one, two)


def test_pi05_prompt():
    for case in json.loads((DATA / "pi05/golden_prompts.json").read_text())["cases"]:
        if case["state"]:
            state = np.array(case["state"], np.float32)
            assert P.pi05_prompt(case["prompt"], state) == case["encoded_calls"][0]["text"]


def test_pi05_normalisation_and_resize():
    pre = golden("pi05/golden_preproc.npz")
    stats = {"q01": pre["norm_q01"].tolist(), "q99": pre["norm_q99"].tolist()}
    # the last dimension has no range; openpi divides by 1e-6 there, here it is 0
    torch.testing.assert_close(P.normalize(pre["norm_x"], stats)[:, :3], pre["norm_y"][:, :3])
    torch.testing.assert_close(P.unnormalize(pre["unnorm_in"][:, :4], stats), pre["unnorm_out"][:, :4],
                               rtol=0, atol=2e-6)
    flat = {"q01": [0.3, -1.0], "q99": [0.3, 1.0]}
    assert P.normalize(torch.tensor([[9.0, 1.0]]), flat)[0, 0] == 0
    assert P.unnormalize(torch.zeros(1, 2), flat)[0, 0] == pytest.approx(0.3)
    for i in range(3):
        resized = P.resize(pre[f"resize{i}_in_u8_hwc"][None], 56, True, P.Image.Resampling.BILINEAR)
        assert torch.equal(resized[0], pre[f"resize{i}_pil_u8_hwc"])


@torch.no_grad()
def test_flow_times_are_drawn_from_beta():
    policy, times = make("tiny-pi05"), []
    policy.observe = lambda *_, **__: None
    policy.flow_loss = lambda action, noise, t, _: times.append(t) or torch.zeros_like(noise)
    policy.sft_loss(make_batch(policy, [PROMPT] * 3) | {"action": torch.zeros(1000, 4, 7),
                                                        "action_is_pad": torch.zeros(1000, 4, dtype=torch.bool)})
    t = times[0].flatten().sort().values
    assert t.shape == (4000,) and 0.001 <= t.min() and t.max() <= 1
    distance = (((t - 0.001) / 0.999) ** 1.5 - torch.linspace(0, 1, 4000)).abs().max()  # Beta(1.5, 1)'s distribution
    assert distance < 1.95 / 4000**0.5  # Kolmogorov and Smirnov, p = 0.001


@torch.no_grad()
def test_chain_logprob_is_the_joint_of_its_gaussians():
    """Step by step, one sample and one denoising step at a time, with torch.distributions."""
    policy = make("tiny-pi05", chunk=3, action_dim=9)  # shorter than the horizon, padded dimensions
    stats, live = policy.stats["action"], [0, 1, 2, 3, 4, 6]
    policy.stats["action"] = {"q01": stats["q01"], "q99": stats["q99"][:5] + stats["q01"][5:6] + stats["q99"][6:]}
    obs = make_obs(policy, MIXED)
    decision = policy.act(obs, sample=True)
    logprob, entropy, _ = policy.evaluate(obs, decision.latent)
    low, high = policy.noise_std
    for b in range(3):
        prefix = policy.observe(P.index_obs(obs, [b]), feature=False)
        chain = decision.latent[b : b + 1]
        normal = torch.distributions.Normal(torch.zeros(3, 6), 1)
        total, spread = normal.log_prob(chain[0, 0, :3, live]).sum(), [normal.entropy().mean()]
        for k in range(4):
            v, feature = policy.velocity(chain[:, k : k + 1], torch.tensor([[1 - k / 4]]), prefix)
            nxt = chain[:, k : k + 1] - v / 4
            std = (np.log(low) + (np.log(high) - np.log(low)) * (policy.noise_head(feature).tanh() + 1) / 2).exp()
            assert low <= std.min() and std.max() <= high
            normal = torch.distributions.Normal(nxt[0, 0, :3, live], std[0, 0, :3, live])
            total, spread = total + normal.log_prob(chain[0, k + 1, :3, live]).sum(), spread + [normal.entropy().mean()]
            noise_free = torch.ones(4, 9, dtype=torch.bool)
            noise_free[:3, live] = False  # what is not executed, or never moves in the data, is not explored
            torch.testing.assert_close(chain[0, k + 1][noise_free], nxt[0, 0][noise_free], rtol=1e-4, atol=1e-5)
        assert logprob[b].item() == pytest.approx(total.item() / 5, rel=1e-4)
        assert entropy[b].item() == pytest.approx(np.mean(spread), rel=1e-4)


@torch.no_grad()
def test_pi05_deterministic_act_is_euler():
    policy = make("tiny-pi05")
    obs = make_obs(policy, MIXED)
    torch.manual_seed(3)
    decision = policy.act(obs, sample=False)
    torch.manual_seed(3)
    x, prefix = torch.randn(3, policy.horizon, 7), policy.observe(obs, feature=False)
    for k in range(4):
        x = x - policy.velocity(x[:, None], torch.full((3, 1), 1 - k / 4), prefix)[0][:, 0] / 4
    torch.testing.assert_close(decision.actions, P.unnormalize(x, policy.stats["action"]), rtol=1e-4, atol=1e-6)


# ---- OpenVLA against its own code and RL4VLA --------------------------------------------------------------------

@pytest.fixture(scope="module")
def openvla():
    policy, io = P.load_policy(DATA / "openvla"), golden("openvla/golden_io.npz")
    policy.prompt = lambda obs: (io["rl_prompt_input_ids"], io["rl_prompt_attention_mask"].bool())
    return policy, io


def test_openvla_towers(openvla):
    policy, io = openvla
    close(policy.project(io["pixel_values"][:, :3], io["pixel_values"][:, 3:]), io["projected_patch_embeddings"])
    close(policy.embed_patches(io["image_uint8"][:3]), io["projected_patch_embeddings"])  # resized with PIL


def test_openvla_loss_and_gradients(openvla):
    policy, io = openvla
    keep = torch.ones(3, 7, dtype=torch.bool)
    policy.zero_grad()
    loss = policy.token_loss({"image": io["image_uint8"][:3]}, io["action_tokens"], keep)
    close(loss, io["sft_loss"])
    loss.backward()
    parameters = dict(policy.named_parameters())
    for key, norm in zip(io["sft_grad_norm_keys"], io["sft_grad_norm"]):
        grad = parameters[str(key)].grad
        assert (0 if grad is None else grad.norm().item()) == pytest.approx(norm.item(), rel=1e-4, abs=1e-6)
    policy.config["predict_stop_token"] = False
    close(policy.token_loss({"patches": io["projected_patch_embeddings"]}, io["action_tokens"], keep),
          io["sft_loss_no_eos"])
    policy.config["predict_stop_token"] = True


@torch.no_grad()
def test_openvla_logprob_entropy_value(openvla):
    policy, io = openvla
    obs = {"patches": io["projected_patch_embeddings"]}
    logprob, entropy, value = policy.evaluate(obs, io["action_tokens"])
    close(logprob, io["rl_logprob_sum"][:, 0])
    close(entropy, io["rl_entropy_mean"][:, 0])
    close(value, io["rl_values"][:, 0])
    close(policy.value(obs), io["rl_values"][:, 0])
    policy.config["temperature"] = 0.6
    logprob, entropy, _ = policy.evaluate(obs, io["action_tokens"])
    policy.config["temperature"] = 1.0
    close(logprob, io["action_logprobs_per_token_temp0p6"].sum(1))
    close(entropy, io["action_entropy_per_token_temp0p6"].mean(1))


@torch.no_grad()
def test_openvla_greedy_decoding(openvla):
    policy, io = openvla
    decision = policy.act({"patches": io["projected_patch_embeddings"]}, sample=False)
    assert torch.equal(decision.latent, io["rl_greedy_tokens"])
    close(decision.actions[:, 0, :6].double(), io["rl_greedy_actions"][:, :6])
    # their gripper is 0 closed .. 1 open, and RL4VLA opens above 0.5
    assert torch.equal(decision.actions[:, 0, 6], (io["rl_greedy_actions"][:, 6] > 0.5).float() * 2 - 1)


def test_openvla_action_tokens(openvla):
    policy, io = openvla
    assert torch.equal(policy.to_tokens(io["tokenizer_in"]), io["tokenizer_out_ids"])
    torch.testing.assert_close(policy.to_actions(io["detok_ids"]), io["detok_normalized_actions"])


def test_openvla_prompt():
    policy = make("tiny-openvla")
    ids, mask = policy.prompt({"prompt": ["Open the Drawer", "push the cube to the target"]})
    text = [policy.tokenizer.decode(row[m].tolist()[1:-1], skip_special_tokens=False) for row, m in zip(ids, mask)]
    assert text == [f"In: What action should the robot take to {p}?\nOut:" for p in ("open the drawer", PROMPT)]
    assert ids[:, 0].tolist() == [2, 2] and ids[:, -1].tolist() == [261, 261] and mask[:, -1].all()
    assert policy.tokenizer.id_to_token(261) == " "


@torch.no_grad()
@pytest.mark.parametrize("sample", [True, False])
def test_openvla_sampling_follows_its_distribution(sample):
    policy = make("tiny-openvla", chunk=1, action_horizon=1, temperature=0.7, eval_temperature=0.3)
    obs = make_obs(policy, [PROMPT])
    many = {"patches": policy.patches(obs).expand(500, -1, -1), "prompt": [PROMPT] * 500}
    tokens = policy.act(many, sample).latent[:, 0] - (policy.vocab - 256)
    logits = policy.action_logits(policy.teacher_forced(obs, tokens.new_zeros(1, 0))[:, -1])
    likely = (logits / (0.7 if sample else 0.3)).softmax(-1)[0]
    seen = torch.bincount(tokens, minlength=256) / 500
    assert (seen.cumsum(0) - likely.cumsum(0)).abs().max() < 1.63 / 500**0.5  # Kolmogorov-Smirnov, 1 %
    assert likely.max() > 2 / 256  # it is not uniform, so the temperature shows


@torch.no_grad()
def test_openvla_chunk_logprob_is_the_mean_of_its_actions():
    """Against a loop over the tokens, each with its own softmax."""
    policy = make("tiny-openvla", temperature=0.7)
    obs = make_obs(policy, [PROMPT])
    tokens = policy.act(obs, sample=True).latent
    logprob, entropy, _ = policy.evaluate(obs, tokens)
    actions, entropies = [0.0] * policy.chunk, []
    for i, token in enumerate(tokens[0]):
        logits = policy.language_model.lm_head(policy.teacher_forced(obs, tokens[:, :i])[0, -1])
        likely = torch.distributions.Categorical(logits=logits[policy.vocab - 256 : policy.vocab] / 0.7)
        actions[i // 7] += likely.log_prob(token - (policy.vocab - 256)).item()
        entropies.append(likely.entropy().item())
    assert logprob.item() == pytest.approx(np.mean(actions), rel=1e-4)
    assert entropy.item() == pytest.approx(np.mean(entropies), rel=1e-4)


# ---- the contract, both policies --------------------------------------------------------------------------------

@BOTH
@pytest.mark.parametrize("train", ["all", "expert", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ratio_is_one_after_acting(name, train, dtype):
    """Exactly: act takes its log-probability from the computation that evaluate repeats. In bfloat16 a decoder's own
    log-probabilities would be off by about 1e-2."""
    policy = make(name, dtype=dtype)
    policy.freeze(train)
    for prompts in (MIXED, [PROMPT] * 3):
        obs = policy.encode(make_obs(policy, prompts))
        decision = policy.act(obs, sample=True)
        logprob, entropy, value = policy.evaluate(obs, decision.latent)
        assert torch.equal(logprob, decision.logprob) and torch.equal(value, decision.value)
        assert torch.isfinite(entropy).all() and logprob.dtype == torch.float32
        assert decision.actions.shape == (3, policy.chunk, 7) and logprob.shape == value.shape == (3,)
        torch.testing.assert_close(policy.value(obs), value, rtol=0.02, atol=0.02)


@BOTH
def test_padding_and_batching_change_nothing(name):
    """Prompts of different length in a batch, each alone, in a minibatch from the cache: the same numbers."""
    policy = make(name)
    policy.freeze("expert")
    obs = make_obs(policy, MIXED)
    latent = policy.act(obs, sample=True).latent
    together = torch.stack(policy.evaluate(obs, latent))
    cached = P.cat_obs([policy.encode(P.index_obs(obs, [i])) for i in range(3)])
    torch.testing.assert_close(torch.stack(policy.evaluate(cached, latent)), together, rtol=1e-4, atol=1e-4)
    some = torch.tensor([2, 0])
    torch.testing.assert_close(torch.stack(policy.evaluate(P.index_obs(cached, some), latent[some])), together[:, some],
                               rtol=1e-4, atol=1e-4)
    for i in range(3):
        alone = torch.stack(policy.evaluate(P.index_obs(obs, [i]), latent[i : i + 1]))
        torch.testing.assert_close(alone, together[:, i : i + 1], rtol=1e-4, atol=1e-4)


@BOTH
def test_sft_loss_ignores_steps_past_the_end(name):
    policy = make(name)
    batch = make_batch(policy, MIXED)
    torch.manual_seed(1)
    losses = policy.sft_loss(batch, reduce=False)
    torch.manual_seed(1)
    assert policy.sft_loss(batch).item() == pytest.approx(losses.mean().item(), rel=1e-5)
    full = {**batch, "action_is_pad": torch.zeros_like(batch["action_is_pad"])}
    torch.manual_seed(1)
    counts = policy.sft_loss(full, reduce=False) != losses
    assert counts.tolist() == batch["action_is_pad"].any(1).tolist() and counts.any()
    other = {**batch, "action": torch.where(batch["action_is_pad"][..., None], 0.03, batch["action"])}
    if name == "tiny-openvla":  # causal: what comes after the end cannot reach what is scored
        torch.testing.assert_close(policy.sft_loss(other, reduce=False), losses)
    policy.freeze("expert")
    torch.manual_seed(1)
    torch.testing.assert_close(policy.sft_loss(policy.encode(batch), reduce=False), losses, rtol=1e-4, atol=1e-5)


@BOTH
@pytest.mark.parametrize("train", ["all", "expert", "lora"])
def test_freeze_trains_what_it_says(name, train):
    policy = make(name)
    policy.freeze(train)
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], 0.1)
    for _ in range(2):  # LoRA's A only moves once its B is not zero
        obs, batch = make_obs(policy, MIXED), make_batch(policy, MIXED)
        logprob, entropy, value = policy.evaluate(obs, policy.act(obs, sample=True).latent)
        (policy.sft_loss(batch) + logprob.mean() + entropy.mean() + value.mean()).backward()
        optimizer.step()
    changed = {k for k, v in policy.named_parameters() if not torch.equal(v, before[k])}
    expected = {k for k, _ in policy.named_parameters() if not k.startswith(policy.UNTRAINED)}
    if train == "expert":
        expected = {k for k in expected if not k.startswith(policy.FROZEN)}
    if train == "lora":
        expected = {k for k in expected if "lora_" in k or k.startswith(P.HEADS)}
    assert changed == expected


@BOTH
def test_gradient_checkpointing_changes_nothing(name):
    policy = make(name).train()
    obs = make_obs(policy, MIXED)
    latent, grads, calls = policy.act(obs, sample=True).latent, [], []
    layers = policy.vlm.language_model.layers if name == "tiny-pi05" else policy.language_model.model.layers
    layers[0].mlp.gate_proj.register_forward_hook(lambda *_: calls.append(policy.gradient_checkpointing))
    for policy.gradient_checkpointing in (False, True):
        policy.zero_grad()
        sum(x.mean() for x in policy.evaluate(obs, latent)).backward()
        grads.append([p.grad for p in policy.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) and calls == [False, True, True]  # computed once more
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_small_tokenizer():
    tokenizer = P.small_tokenizer()
    assert tokenizer.get_vocab_size() == P.VOCAB
    ids = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    numbers = [ids(f" {i}") for i in range(-1, 256)]
    assert all(len(i) == 1 for i in numbers) and len({i[0] for i in numbers}) == 257
    for text in ("Task: schließe die Schublade ☃\n", "weird_<bos>  123456 7", ""):
        assert tokenizer.decode(ids(text), skip_special_tokens=False) == text
    lengths = {len(ids(P.pi05_prompt(PROMPT, row))) for row in np.random.uniform(-1.1, 1, (50, 7))}
    assert len(lengths) == 1


# ---- checkpoints ------------------------------------------------------------------------------------------------

def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@BOTH
@pytest.mark.parametrize("train", ["expert", "lora"])
def test_save_and_load(name, train, tmp_path):
    policy = make(name)
    policy.freeze(train)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.01)
    obs = make_obs(policy, MIXED)
    decision = policy.act(obs, sample=True)
    policy.save(tmp_path)
    again = P.load_policy(tmp_path)
    assert same(policy.state_dict(), again.state_dict()) and again.stats == policy.stats
    for a, b in zip(policy.evaluate(obs, decision.latent), again.evaluate(obs, decision.latent)):
        assert torch.equal(a, b)
    again.save(tmp_path)  # onto the files it came from
    assert same(policy.state_dict(), P.load_policy(tmp_path).state_dict())
    assert not list(tmp_path.glob(".*"))
    if train == "lora":  # merged for others' code: the same function without adapters
        layout = {"tiny-pi05": "openpi", "tiny-openvla": "openvla"}[name]
        policy.save(tmp_path / "merged", layout=layout)
        merged = P.load_policy(tmp_path / "merged")
        assert not merged.lora_layers()
        for a, b in zip(policy.evaluate(obs, decision.latent), merged.evaluate(obs, decision.latent)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, preset", [("pi05", "pi05"), ("openvla", "openvla-7b")])
def test_full_size_keys(name, preset):
    policy = P.load_policy(preset, device="meta")
    ours = {k: list(v.shape) for k, v in policy.state_dict().items() if not k.startswith(P.HEADS)}
    assert ours == full_size_keys(name)
    assert policy.value_head[0].weight.shape == (512, {"pi05": 2048, "openvla": 4096}[name])


def test_full_size_configs(tmp_path):
    """What shapes do not show. The published code builds itself from these files, and refuses unknown fields (lerobot)
    or silently takes a default (OpenVLA), so each is compared whole with what it needs."""
    gemma = {"depth": 18, "num_heads": 8, "num_kv_heads": 1, "head_dim": 256}
    sizes = {
        "vision": {"image_size": 224, "patch_size": 14, "hidden_size": 1152, "num_hidden_layers": 27,
                   "num_attention_heads": 16, "intermediate_size": 4304},
        "vlm": {"width": 2048, "mlp_dim": 16384, "vocab_size": 257152, **gemma},
        "action_expert": {"width": 1024, "mlp_dim": 4096, **gemma},
        "dino": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "mlp_hidden": 4096, "reg_tokens": 4},
        "siglip": {"embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_hidden": 4304},
        "llm": {"vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
                "max_position_embeddings": 2048}}
    for key, value in sizes.items():
        assert P.PRESETS["pi05" if key in P.PRESETS["pi05"] else "openvla-7b"][key] == value, key

    dim = {"mean": [0.0] * 7, "std": [1.0] * 7, "q01": [-1.0] * 7, "q99": [1.0] * 7}
    stats = {"observation.state": dim, "action": dim}
    openvla = P.load_policy("openvla-7b", stats=stats, device="meta")
    config = P.export(openvla, {}, tmp_path, "openvla")[1]
    prismatic = {
        "architectures": ["OpenVLAForActionPrediction"], "model_type": "openvla", "n_action_bins": 256,
        "arch_specifier": "no-align+fused-gelu-mlp", "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure", "use_fused_vision_backbone": True, "image_resize_strategy": "resize-naive",
        "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig",
                     "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction"},
        "pad_token_id": 32000, "bos_token_id": 1, "eos_token_id": 2, "pad_to_multiple_of": 64, "llm_max_length": 2048,
        "output_projector_states": False, "norm_stats": {"rlco": {"action": dim}},
        "text_config": {"model_type": "llama", "pad_token_id": 32000, **sizes["llm"]}}
    assert {k: config.get(k) for k in prismatic} == prismatic

    pi05 = P.load_policy("pi05", stats=stats, device="meta")
    tied = {P.LM_HEAD: torch.zeros(1), P.EMBED: torch.zeros(1)}
    config = P.export(pi05, tied, tmp_path, "lerobot")[1]
    assert config == {
        "type": "pi05", "paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m", "chunk_size": 8,
        "n_action_steps": 4, "num_inference_steps": 4, "tokenizer_max_length": 200, "max_action_dim": 32,
        "image_resolution": [224, 224],
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"},
        "input_features": {"observation.images.base_0_rgb": {"type": "VISUAL", "shape": [3, 224, 224]},
                           "observation.state": {"type": "STATE", "shape": [7]}},
        "output_features": {"action": {"type": "ACTION", "shape": [7]}}}
    steps = [json.loads((tmp_path / f"policy_{name}processor.json").read_text())["steps"] for name in ("pre", "post")]
    assert [[s["registry_name"] for s in pipeline] for pipeline in steps] == [
        ["rename_observations_processor", "to_batch_processor", "normalizer_processor",
         "pi05_prepare_state_tokenizer_processor_step", "tokenizer_processor", "device_processor"],
        ["unnormalizer_processor", "device_processor"]]
    assert steps[0][4]["config"]["tokenizer_name"] == "google/paligemma-3b-pt-224"
    config = P.export(pi05, tied, tmp_path, "openpi")[1]
    assert [config[k] for k in ("paligemma_variant", "action_expert_variant", "action_dim", "action_horizon")] == [
        "gemma_2b", "gemma_300m", 32, 8]  # what openpi's converter writes, and its horizon as trained
    assert json.loads((tmp_path / "assets/rlco/norm_stats.json").read_text())["norm_stats"] == {
        "state": dim, "actions": dim}


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("untied", [False, True])
def test_pi05_layouts_round_trip(tmp_path, prefix, untied):
    """openpi's file has the tied tensor once, lerobot's has both and a prefix, and may have trained one of them."""
    tensors = load_file(DATA / "pi05/golden_weights.safetensors")
    tensors = {k: v.bfloat16() if "mlp" in k else v for k, v in tensors.items()}
    if untied:
        tensors[P.EMBED] = tensors[P.EMBED] + 1
    elif not prefix:
        del tensors[P.EMBED]
    tensors = {prefix + k: v for k, v in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(DATA / "pi05/config.json", tmp_path)
    policy = P.load_policy(tmp_path)
    policy.save(tmp_path / "out", layout="lerobot" if prefix else "openpi")
    assert same(load_file(tmp_path / "out/model.safetensors"), tensors)
    assert same(policy.state_dict(), P.load_policy(tmp_path / "out").state_dict())
    if not prefix and not untied:  # as openpi's trainer and policy server load it
        del policy.value_head, policy.noise_head
        load_model(policy, tmp_path / "out/model.safetensors", strict=True)


def test_lerobot_folder(tmp_path):
    """config.json with lerobot's fields, statistics in the processors' files, and found again from them alone."""
    policy = make("tiny-pi05")
    policy.stats["action"] |= {"mean": [0.5] * 7, "std": [1.0] * 7}
    policy.save(tmp_path, layout="lerobot")
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["type"], config["chunk_size"], config["max_action_dim"]) == ("pi05", 4, 7)
    for name in ("policy_preprocessor", "policy_postprocessor"):
        for step in json.loads((tmp_path / f"{name}.json").read_text())["steps"]:
            if "state_file" in step:
                assert load_file(tmp_path / step["state_file"])["action.mean"].tolist() == [0.5] * 7
    (tmp_path / "stats.json").unlink()
    stats = P.load_policy(tmp_path).stats
    for feature in ("action", "observation.state"):
        np.testing.assert_allclose(stats[feature]["q99"], policy.stats[feature]["q99"], rtol=1e-6)


def test_published_configs(tmp_path):
    """The three published config.json forms of pi0.5, and RLinf's names of its heads and statistics."""
    meta = {k: torch.empty(v, device="meta") for k, v in full_size_keys("pi05").items()}
    lerobot = {"type": "pi05", "chunk_size": 50, "n_action_steps": 50, "num_inference_steps": 10}
    openpi = {"action_dim": 32, "action_horizon": 15, "paligemma_variant": "gemma_2b"}
    for raw, expected in ((lerobot, (50, 50, 10)), (openpi, (15, 4, 4))):
        (tmp_path / "config.json").write_text(json.dumps(raw))
        config = P.read_config(tmp_path, meta)
        assert (config["action_horizon"], config["chunk"], config["num_steps"]) == expected
        assert config["vlm"] == P.PRESETS["pi05"]["vlm"] and config["vision"] == P.PRESETS["pi05"]["vision"]
    (tmp_path / "config.json").unlink()
    assert P.read_config(tmp_path, meta)["action_horizon"] == 8

    policy = make("tiny-pi05")
    policy.save(tmp_path)
    heads = load_file(tmp_path / "heads.safetensors")
    rlinf = {k.replace("value_head.", "value_head.mlp."): v for k, v in heads.items() if "value" in k}
    rlinf |= {f"noise_head.mlp_logvar.moduleList.{int(k.split('.')[1]) // 2}.linear_1.{k.split('.')[2]}": v
              for k, v in heads.items() if "noise" in k} | {"noise_head.logvar_min": torch.zeros(1)}
    save_file(load_file(tmp_path / "model.safetensors") | rlinf, tmp_path / "model.safetensors")
    (tmp_path / "heads.safetensors").unlink(), (tmp_path / "stats.json").unlink()
    assert same(P.load_policy(tmp_path).state_dict(), policy.state_dict())
    assert P.load_policy(tmp_path).stats["action"]["q01"] == policy.stats["action"]["q01"]  # from assets/
    (tmp_path / "assets/another").mkdir()
    another = {"actions": {"q01": [0] * 7, "q99": [2] * 7}}
    (tmp_path / "assets/another/norm_stats.json").write_text(json.dumps({"norm_stats": another}))
    assert not P.load_policy(tmp_path).stats  # which of them?
    assert P.load_policy(tmp_path, unnorm_key="rlco").stats["action"]["q01"] == policy.stats["action"]["q01"]
    with pytest.raises(ValueError, match="unnorm_key can be another, rlco"):
        P.load_policy(tmp_path, unnorm_key="nonsense")
    safetensors = P.load_policy(tmp_path).sha256()
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "full_weights.pt")  # its trainer's own file
    (tmp_path / "model.safetensors").unlink()
    loaded = P.load_policy(tmp_path)
    assert same(loaded.state_dict(), policy.state_dict())
    assert loaded.sha256() not in (safetensors, P.load_policy("tiny-pi05").sha256())
    (tmp_path / "global_step_9").mkdir()
    shutil.copy(tmp_path / "full_weights.pt", tmp_path / "global_step_9")
    with pytest.raises(ValueError, match="has 2 checkpoints: name the folder of one"):
        P.load_policy(tmp_path)
    policy.save(tmp_path / "out", layout="openpi")
    (tmp_path / "out/heads.safetensors").unlink()
    torch.manual_seed(5)
    fresh = P.load_policy(tmp_path / "out")
    assert all(torch.isfinite(p).all() and p.abs().max() > 0 for p in fresh.value_head.parameters())


def test_openvla_folder(tmp_path, openvla):
    """Their config.json, shards with an index, statistics by dataset."""
    policy, io = openvla
    shutil.copytree(DATA / "openvla", tmp_path / "in")
    config = json.loads((tmp_path / "in/config.json").read_text())
    sets = config["norm_stats"]
    config["norm_stats"] = {**sets, "another": {"action": {"q01": [0] * 7, "q99": [2] * 7}, "num_trajectories": 3}}
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    theirs = {"processing_prismatic.py": "# theirs\n", **{f"{name}_config.json": "{}" for name in (
        "generation", "preprocessor", "processor", "tokenizer")}, "tokenizer.json": P.small_tokenizer().to_str() + "\n"}
    for name, text in theirs.items():
        (tmp_path / "in" / name).write_text(text)
    with pytest.raises(ValueError, match="unnorm_key= one of .*another.*made_up"):
        P.load_policy(tmp_path / "in").stat("action")
    with pytest.raises(ValueError, match="no statistics nonsense; unnorm_key can be another, made_up"):
        P.load_policy(tmp_path / "in", unnorm_key="nonsense")
    loaded = P.load_policy(tmp_path / "in", unnorm_key="made_up")
    loaded.save(tmp_path / "own")
    P.load_policy(tmp_path / "own").save(tmp_path / "out", layout="openvla")  # as after fine-tuning
    # transformers 4.40.1, which OpenVLA pins, needs each of these, and reads no tokenizer.json that was written anew
    assert {name: (tmp_path / "out" / name).read_text() for name in theirs} == theirs
    P.load_policy(tmp_path / "own").save(tmp_path, layout="openvla")  # into a folder round the one it came from
    assert {name: (tmp_path / name).read_text() for name in theirs} == theirs
    P.load_policy(tmp_path / "own").save(tmp_path / "own/out", layout="openvla")
    P.load_policy(tmp_path / "own").save(tmp_path / "own/out", layout="openvla")  # and into it, where it is not a part
    assert not (tmp_path / "own/out/out").exists()
    assert P.load_policy(tmp_path / "out", unnorm_key="another").stats["action"]["q99"] == [2] * 7  # not stats.json's
    assert same(load_file(tmp_path / "out/model.safetensors"), load_file(DATA / "openvla/golden_weights.safetensors"))
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["model_type"] == "openvla" and written["text_config"]["vocab_size"] == 576
    assert written["norm_stats"] == config["norm_stats"]
    again = P.load_policy(tmp_path / "out")
    assert same(again.state_dict(), loaded.state_dict()) and again.stats == loaded.stats
    # of a model that was fine-tuned with OpenVLA's own code, the file beside the base's config.json
    (tmp_path / "in/dataset_statistics.json").write_text(json.dumps({"mine": {"action": {"q01": [0] * 7, "q99": [3] * 7}}}))
    tuned = P.load_policy(tmp_path / "in")
    assert tuned.stats["action"]["q99"] == [3] * 7
    tuned.stats["action"] = {"q01": [0] * 7, "q99": [4] * 7}
    tuned.save(tmp_path / "tuned", layout="openvla")
    written = json.loads((tmp_path / "tuned/dataset_statistics.json").read_text())
    assert written["rlco"]["action"]["q99"] == [4] * 7 and written["mine"]["action"]["q99"] == [3] * 7
    # sizes from text_config alone, as published
    (tmp_path / "pub").mkdir()
    published = {"model_type": "openvla", "pad_to_multiple_of": 64, "image_sizes": [224, 224],
                 "text_config": {"vocab_size": 32064, "hidden_size": 4096, "model_type": "llama"}}
    (tmp_path / "pub/config.json").write_text(json.dumps(published))
    assert P.read_config(tmp_path / "pub", {"projector.fc1.weight": torch.zeros(1)}) == P.PRESETS["openvla-7b"]
    published["text_config"] |= {"attention_bias": True, "num_key_value_heads": 8, "rope_theta": 5e5}
    (tmp_path / "pub/config.json").write_text(json.dumps(published))
    llm = P.read_config(tmp_path / "pub", {"projector.fc1.weight": torch.zeros(1)})["llm"]
    assert llm == {**P.PRESETS["openvla-7b"]["llm"], **{k: published["text_config"][k] for k in (
        "attention_bias", "num_key_value_heads", "rope_theta")}}


def test_shards(tmp_path, monkeypatch):
    policy = make("tiny-openvla")
    split = P.split_torch_state_dict_into_shards
    monkeypatch.setattr(P, "split_torch_state_dict_into_shards",
                        lambda t, **kw: split(t, filename_pattern=kw["filename_pattern"], max_shard_size="1MB"))
    policy.save(tmp_path, layout="openvla")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2 and not (tmp_path / "model.safetensors").exists()
    assert same(P.load_policy(tmp_path).state_dict(), policy.state_dict())
    monkeypatch.undo()
    policy.save(tmp_path, layout="openvla")  # fewer files: none of the old ones stays
    assert sorted(f.name for f in tmp_path.glob("model*")) == ["model.safetensors"]


def test_dtype_on_load(tmp_path):
    shutil.copytree(DATA / "pi05", tmp_path / "in")
    policy = P.load_policy(tmp_path / "in", dtype=torch.bfloat16)
    kinds = {k: v.dtype for k, v in policy.state_dict().items()}
    expert = "paligemma_with_expert.gemma_expert.model."
    for key in ("action_in_proj.weight", "time_mlp_in.bias", "value_head.0.weight", expert + "norm.dense.bias",
                expert + "layers.0.input_layernorm.dense.weight", "noise_head.0.weight",
                "paligemma_with_expert.paligemma.model.language_model.norm.weight",
                "paligemma_with_expert.paligemma.model.vision_tower.vision_model.embeddings.patch_embedding.bias"):
        assert kinds[key] == torch.float32, key
    for key in (P.LM_HEAD, P.EMBED, expert + "layers.0.mlp.up_proj.weight",
                "paligemma_with_expert.paligemma.model.multi_modal_projector.linear.weight"):
        assert kinds[key] == torch.bfloat16, key
    assert policy.vlm.language_model.embed_tokens.weight is policy.paligemma_with_expert.paligemma.lm_head.weight


def test_small_steps_on_bfloat16_add_up():
    """An optimizer of torch's own would leave a bfloat16 weight of 1 at 1: half of its last place is 0.002."""
    weights = [torch.nn.Parameter(torch.ones(5, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]
    start = lambda w: P.AdamW([dict(params=[w], lr=1e-4)], weight_decay=0)
    optimizers = [start(w) for w in weights]
    for k in range(60):
        for w, optimizer in zip(weights, optimizers):
            optimizer.zero_grad()
            for scale in (1, 2):  # gradients accumulate
                (w.float() * torch.arange(5) * scale).sum().backward()
            optimizer.step()
        if k == 30:  # saved and loaded
            weights[0] = torch.nn.Parameter(weights[0].detach().clone())
            state, optimizers[0] = optimizers[0].state_dict(), start(weights[0])
            optimizers[0].load_state_dict(state)
    assert weights[1][1] < 0.995 and weights[0].dtype == torch.bfloat16
    assert torch.equal(weights[0], weights[1].bfloat16())
    assert optimizers[1].copies == [] and optimizers[1].param_groups[0]["params"][0] is weights[1]


@BOTH
def test_another_models_tokenizer_is_refused(name, tmp_path, monkeypatch):
    policy = make(name)
    policy.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    for size, error in ((5000, "it has 5000 words, the checkpoint"), (P.VOCAB, None)):
        tokenizer = P.Tokenizer(P.models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
        monkeypatch.setattr(P, "Tokenizer", SimpleNamespace(from_pretrained=lambda _: tokenizer, from_file=None))
        with pytest.raises(FileNotFoundError, match=error) if error else nullcontext():
            P.load_policy(tmp_path).encode_text([PROMPT])
        monkeypatch.undo()


def test_clear_errors(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no preset .*tiny-pi05.* and no folder"):
        P.load_policy(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no \\*.safetensors"):
        P.load_policy(tmp_path)
    with pytest.raises(ValueError, match="no setting chunks"):
        P.load_policy("tiny-pi05", chunks=3)
    with pytest.raises(ValueError, match="chunk 9 must be between 1 and the horizon 4"):
        P.load_policy("tiny-pi05", chunk=9)
    with pytest.raises(ValueError, match="no statistics of action"):
        P.load_policy("tiny-pi05").sft_loss(make_batch(make("tiny-pi05"), MIXED))
    with pytest.raises(ValueError, match="openpi or lerobot, not as openvla"):
        make("tiny-pi05").save(tmp_path / "x", layout="openvla")
    monkeypatch.chdir(tmp_path)
    Path("tiny-pi05").mkdir()
    with pytest.raises(ValueError, match="a preset and a folder"):
        P.load_policy("tiny-pi05")
    Path("tiny-pi05").rmdir()
    policy = make("tiny-pi05")
    with pytest.raises(ValueError, match="of 7 dimensions, the data has 8"):
        policy.sft_loss({**make_batch(policy, MIXED), "state": torch.zeros(3, 8)})
    policy.save(tmp_path / "ok")
    tensors = load_file(tmp_path / "ok/model.safetensors")
    tensors["action_in_proj.bias"] = torch.zeros(3)
    tensors["surprise"] = torch.zeros(1)
    del tensors["time_mlp_in.bias"]
    save_file(tensors, tmp_path / "ok/model.safetensors")
    with pytest.raises(ValueError) as error:
        P.load_policy(tmp_path / "ok")
    for part in ("1 missing: time_mlp_in.bias", "1 unexpected: surprise",
                 "1 of another shape: action_in_proj.bias [3] instead of [128]"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    (tmp_path / "ok/model.safetensors").write_bytes(b"truncated")
    with pytest.raises(ValueError, match="model.safetensors is unreadable"):
        P.load_policy(tmp_path / "ok")
    (tmp_path / "ok/config.json").write_text("{")
    save_file(tensors, tmp_path / "ok/model.safetensors")
    with pytest.raises(ValueError, match="config.json is unreadable"):
        P.load_policy(tmp_path / "ok")


@pytest.mark.parametrize("name", ["model.safetensors", "heads.safetensors", "config.json", "stats.json",
                                  "tokenizer.json", "assets/rlco/norm_stats.json"])
def test_a_corrupt_file_is_named_in_one_line(name, tmp_path):
    P.load_policy("tiny-pi05", stats={}).save(tmp_path)
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[:-9] if "stats" not in name else b"{")
    with pytest.raises(ValueError, match=re.escape(str(file))) as error:
        P.load_policy(tmp_path)
    assert "\n" not in str(error.value)


@BOTH
def test_a_lost_part_is_named_in_one_line(name, tmp_path):
    """Nothing is silently replaced by fresh weights, another adapter, or the published settings."""
    policy = make(name)
    policy.freeze("lora")
    for lost, message in (("heads.safetensors", "has lost its heads.safetensors"),
                          ("config.json", "has lost its config.json"),
                          ("model.safetensors", "is model.safetensors missing")):
        policy.save(tmp_path)
        (tmp_path / "generation_config.json").write_text("{}")  # goes along with published ones, and is no config
        (tmp_path / lost).unlink()
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            P.load_policy(tmp_path)
    make(name).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tower = config.get("vlm") or config["llm"]
    tower["depth" if "depth" in tower else "num_hidden_layers"] = 30
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"243 missing: .*layers.\{3..29\}.mlp.up_proj.weight") as error:
        P.load_policy(tmp_path)
    assert len(str(error.value)) < 1500 and "\n" not in str(error.value)  # each of them named, yet readable
    policy.stats = {"action": {"mean": [0.0] * 7, "std": [1.0] * 7}}  # a data set without quantiles
    with pytest.raises(ValueError, match="no statistics of action"):
        policy.sft_loss({**make_batch(policy, MIXED), "state": torch.zeros(3, 7)} if name == "tiny-openvla" else
                        make_batch(policy, MIXED))
