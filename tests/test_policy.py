"""policy.py against the reference implementations' numbers (tests/data), closed forms and torch.distributions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import policy as P
from checkpoints import HEADS, UserError, restate
from machines import AdamW

DATA = Path(__file__).parent / "data"
PROMPT = "push the cube to the target"


def golden(name):
    with np.load(DATA / name) as arrays:
        return {k: torch.from_numpy(v) if v.dtype.kind != "U" else v for k, v in arrays.items()}


def close(actual, expected, tolerance=1e-4):
    """Largest error relative to the largest expected value."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


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
    return {
        "image": torch.randint(0, 256, (B, size, size, 3), dtype=torch.uint8),
        "state": torch.rand(B, 7) * 0.2 - 0.1,
        "prompt": list(prompts),
    }


def make_batch(policy, prompts):
    obs = make_obs(policy, prompts)
    B = len(prompts)
    return {
        **obs,
        "action": torch.rand(B, policy.horizon, 7) * 0.1 - 0.05,
        "is_sim": torch.zeros(B, dtype=torch.bool),
        "action_is_pad": torch.arange(policy.horizon) >= torch.tensor([policy.horizon, 2, 1])[:B, None],
    }


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
    # the last dimension has no range; openpi divides by 1e-6 there, in policies from here it is 0
    torch.testing.assert_close(P.normalize(pre["norm_x"], stats)[:, :3], pre["norm_y"][:, :3])
    torch.testing.assert_close(P.normalize(pre["norm_x"], stats, convention="openpi"), pre["norm_y"])
    torch.testing.assert_close(
        P.unnormalize(pre["unnorm_in"][:, :4], stats), pre["unnorm_out"][:, :4], rtol=0, atol=2e-6
    )
    flat = {"q01": [0.3, -1.0], "q99": [0.3, 1.0]}
    assert P.normalize(torch.tensor([[9.0, 1.0]]), flat)[0, 0] == 0
    assert P.unnormalize(torch.zeros(1, 2), flat)[0, 0] == pytest.approx(0.3)
    for i in range(3):
        resized = P.resize(pre[f"resize{i}_in_u8_hwc"][None], 56, True, P.Image.Resampling.BILINEAR)
        assert torch.equal(resized[0], pre[f"resize{i}_pil_u8_hwc"])


# Made by lerobot 0.4.4's NormalizerProcessorStep of X and its UnnormalizerProcessorStep of Y, with KINDS.
# fmt: off
KINDS = {"q01": [-0.5, 0.25, 0.3], "q99": [1.5, 0.25, 0.3], "q10": [-0.25, 0.25, 0.3], "q90": [0.75, 0.25, 0.3],
         "min": [-1.0, 0.25, 0.3], "max": [2.0, 0.25, 0.3], "mean": [0.4, 0.25, 0.3], "std": [0.5, 0.0, 0.0]}
X = [[0.1, 0.25, 0.3], [-2.0, 0.25, 0.3]]
Y = [[0.1, 0.5, -0.5], [-2.0, 0.0, 1.0]]
LEROBOT = {
    "QUANTILES": ([[-0.4, -1, -1], [-2.5, -1, -1]], [[0.6, 0.25, 0.3], [-1.5, 0.25, 0.3]]),
    "QUANTILE10": ([[-0.3, -1, -1], [-4.5, -1, -1]], [[0.3, 0.25, 0.3], [-0.75, 0.25, 0.3]]),
    "MIN_MAX": ([[-0.26666665, -1, -1], [-1.6666667, -1, -1]], [[0.65, 0.25, 0.3], [-2.5, 0.25, 0.3]]),
    "MEAN_STD": ([[-0.6, 0, 0], [-4.8, 0, 0]], [[0.45, 0.25, 0.3], [-0.6, 0.25, 0.3]]),
    "IDENTITY": (X, Y)}
# fmt: on


@pytest.mark.parametrize("mode", LEROBOT)
def test_normalisation_as_lerobot_has_it(mode):
    normalised, physical = map(torch.tensor, LEROBOT[mode])
    torch.testing.assert_close(P.normalize(torch.tensor(X), KINDS, mode, "lerobot"), normalised.float())
    torch.testing.assert_close(P.unnormalize(torch.tensor(Y), KINDS, mode, "lerobot"), physical.float())
    for target, eps in (("openpi", 1e-6), ("lerobot", 0)):  # as the other project's quantiles
        said = restate(KINDS, mode, "lerobot", target, "action")
        if mode == "IDENTITY":
            said = {kind: said[kind][:1] * 3 for kind in ("q01", "q99")}
        low, high = (np.array(said[kind]) for kind in ("q01", "q99"))
        width = high - low + eps
        width[width == 0] = 1e-8
        np.testing.assert_allclose((np.array(Y) + 1) / 2 * width + low, physical, atol=1e-7)
        if mode != "MEAN_STD":  # which divides by 1e-8 where nothing moves
            np.testing.assert_allclose((np.array(X) - low) / width * 2 - 1, normalised, atol=1e-5)


def test_where_nothing_moves():
    """Zero range is 0 in a policy of ours and -1 in one of lerobot's or openpi's; OpenVLA looks at the minimum and the
    maximum. What is saved for lerobot or openpi says the same numbers to a prompt."""
    x = torch.tensor([[0.3, 0.3]])
    kinds = {"q01": [0.3, 0.3], "q99": [0.3, 0.3], "min": [0.1, 0.3], "max": [0.3, 0.3]}
    for convention, y in (("rlco", [0, 0]), ("openpi", [-1, -1]), ("lerobot", [-1, -1]), ("openvla", [-1, 0])):
        assert P.normalize(x, kinds, "QUANTILES", convention).tolist() == [y], convention
        torch.testing.assert_close(P.unnormalize(torch.tensor([[0.7, -0.2]]), kinds, "QUANTILES", convention), x)
    for state in (0.3, 0.1, 0.9):  # ours is 0 whatever the state
        for target in ("lerobot", "openpi"):
            said = restate(kinds, "QUANTILES", "rlco", target, "observation.state")
            y = P.normalize(torch.full((1, 2), state), said, "QUANTILES", target).numpy()
            assert P.pi05_prompt("", y[0]) == P.pi05_prompt("", np.zeros(2))


@torch.no_grad()
def test_flow_times_are_drawn_from_beta():
    policy, times = make("tiny-pi05"), []
    policy.encode_prefix = lambda *_, **__: None
    policy.flow_loss = lambda action, noise, t, _: times.append(t) or torch.zeros_like(noise)
    policy.sft_loss(
        make_batch(policy, [PROMPT] * 3)
        | {"action": torch.zeros(1000, 4, 7), "action_is_pad": torch.zeros(1000, 4, dtype=torch.bool)}
    )
    t = times[0].flatten().sort().values
    assert t.shape == (4000,) and 0.001 <= t.min() and t.max() <= 1
    distance = (((t - 0.001) / 0.999) ** 1.5 - torch.linspace(0, 1, 4000)).abs().max()  # Beta(1.5, 1)'s distribution
    assert distance < 1.95 / 4000**0.5  # Kolmogorov and Smirnov, p = 0.001


@torch.no_grad()
def test_chain_logprob_is_the_joint_of_its_gaussians():
    """Step by step, one sample and one denoising step at a time, with torch.distributions."""
    policy = make("tiny-pi05", chunk=3, action_dim=9)  # shorter than the horizon, padded dimensions
    stats, moving = policy.stats["action"], [0, 1, 2, 3, 4, 6]
    policy.stats["action"] = {"q01": stats["q01"], "q99": stats["q99"][:5] + stats["q01"][5:6] + stats["q99"][6:]}
    obs = make_obs(policy, MIXED)
    decision = policy.act(obs, sample=True)
    logprob, entropy, _ = policy.evaluate(obs, decision.latent)
    low, high = policy.noise_std
    for b in range(3):
        prefix = policy.encode_prefix(P.index_obs(obs, [b]), feature=False)
        chain = decision.latent[b : b + 1]
        normal = torch.distributions.Normal(torch.zeros(3, 6), 1)
        total, spread = normal.log_prob(chain[0, 0, :3, moving]).sum(), [normal.entropy().mean()]
        for k in range(4):
            v, feature = policy.velocity(chain[:, k : k + 1], torch.tensor([[1 - k / 4]]), prefix)
            nxt = chain[:, k : k + 1] - v / 4
            std = (np.log(low) + (np.log(high) - np.log(low)) * (policy.noise_head(feature).tanh() + 1) / 2).exp()
            assert low <= std.min() and std.max() <= high
            normal = torch.distributions.Normal(nxt[0, 0, :3, moving], std[0, 0, :3, moving])
            total, spread = (
                total + normal.log_prob(chain[0, k + 1, :3, moving]).sum(),
                spread + [normal.entropy().mean()],
            )
            noise_free = torch.ones(4, 9, dtype=torch.bool)
            noise_free[:3, moving] = False  # what is not executed, or never moves in the data, is not explored
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
    x, prefix = torch.randn(3, policy.horizon, 7), policy.encode_prefix(obs, feature=False)
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
    close(
        policy.token_loss({"patches": io["projected_patch_embeddings"]}, io["action_tokens"], keep),
        io["sft_loss_no_eos"],
    )
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
@pytest.mark.parametrize("train", ["all", "part", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ratio_is_one_after_acting(name, train, dtype):
    """Of pi0.5 exactly, in any precision: act repeats evaluate's computation. OpenVLA decodes token by token, which
    rounds differently; evaluating once more would cost as much as acting."""
    policy = make(name, dtype=dtype)
    policy.set_trainable(policy.PART if train == "part" else train)
    for prompts in (MIXED, [PROMPT] * 3):
        obs = policy.encode(make_obs(policy, prompts))
        decision = policy.act(obs, sample=True)
        logprob, entropy, value = policy.evaluate(obs, decision.latent)
        for acted, evaluated in ((decision.logprob, logprob), (decision.value, value)):
            off = (acted - evaluated).abs().max()
            assert off <= {torch.float32: 2e-5, torch.bfloat16: 0.01}[dtype] if name == "tiny-openvla" else off == 0
        assert torch.isfinite(entropy).all() and logprob.dtype == torch.float32
        assert decision.actions.shape == (3, policy.chunk, 7) and logprob.shape == value.shape == (3,)
        torch.testing.assert_close(policy.value(obs), value, rtol=0.02, atol=0.02)


@BOTH
def test_padding_and_batching_change_nothing(name):
    """Prompts of different length in a batch, each alone, in a minibatch from the cache: the same numbers."""
    policy = make(name)
    policy.set_trainable(policy.PART)
    obs = make_obs(policy, MIXED)
    latent = policy.act(obs, sample=True).latent
    together = torch.stack(policy.evaluate(obs, latent))
    cached = P.concat_obs([policy.encode(P.index_obs(obs, [i])) for i in range(3)])
    torch.testing.assert_close(torch.stack(policy.evaluate(cached, latent)), together, rtol=1e-4, atol=1e-4)
    some = torch.tensor([2, 0])
    torch.testing.assert_close(
        torch.stack(policy.evaluate(P.index_obs(cached, some), latent[some])), together[:, some], rtol=1e-4, atol=1e-4
    )
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
    policy.set_trainable(policy.PART)
    torch.manual_seed(1)
    torch.testing.assert_close(policy.sft_loss(policy.encode(batch), reduce=False), losses, rtol=1e-4, atol=1e-5)


@BOTH
@pytest.mark.parametrize("train", ["all", "part", "lora"])
def test_set_trainable_trains_what_it_says(name, train):
    policy = make(name)
    policy.set_trainable(policy.PART if train == "part" else train)
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], 0.1)
    for _ in range(2):  # LoRA's A only moves once its B is not zero
        obs, batch = make_obs(policy, MIXED), make_batch(policy, MIXED)
        logprob, entropy, value = policy.evaluate(obs, policy.act(obs, sample=True).latent)
        (policy.sft_loss(batch) + logprob.mean() + entropy.mean() + value.mean()).backward()
        optimizer.step()
    changed = {k for k, v in policy.named_parameters() if not torch.equal(v, before[k])}
    expected = {k for k, _ in policy.named_parameters() if not k.startswith(policy.UNTRAINED)}
    if train == "part":
        expected = {k for k in expected if not k.startswith(policy.FROZEN)}
    if train == "lora":
        expected = {k for k in expected if "lora_" in k or k.startswith(HEADS)}
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


def test_a_long_instruction_loses_its_end_and_not_its_state(capsys):
    policy = make("tiny-pi05", max_token_len=40)
    obs = make_obs(policy, [PROMPT, "pick up " + "the red block and " * 20 + "place it"])
    ids, mask = policy.tokens(obs)
    text = [policy.tokenizer.decode(row[m].tolist()[1:], skip_special_tokens=False) for row, m in zip(ids, mask)]
    assert ids.shape[1] == 40 and text[0].startswith(f"Task: {PROMPT}, State: ")
    assert text[1].startswith("Task: pick up the red block and the red")
    for line in text:
        assert len(line.split("State: ")[1].split(";")[0].split()) == 7 and line.endswith(";\nAction: ")
    policy.tokens(obs)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "is too long for the 40 tokens of a prompt: its end is cut off" in said
    policy = make("tiny-pi05", max_token_len=8)
    with pytest.raises(UserError, match="max_token_len 8 is too short for the state alone"):
        policy.tokens(obs)
    policy = make("tiny-pi05", max_token_len=8, discrete_state_input=False)
    assert policy.tokens(obs)[0][1, -1] == policy.tokenizer.token_to_id("\n")


def test_small_tokenizer():
    tokenizer = P.small_tokenizer()
    assert tokenizer.get_vocab_size() == P.VOCAB

    def ids(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    numbers = [ids(f" {i}") for i in range(-1, 256)]
    assert all(len(i) == 1 for i in numbers) and len({i[0] for i in numbers}) == 257
    for text in ("Task: schließe die Schublade ☃\n", "weird_<bos>  123456 7", ""):
        assert tokenizer.decode(ids(text), skip_special_tokens=False) == text
    lengths = {len(ids(P.pi05_prompt(PROMPT, row))) for row in np.random.uniform(-1.1, 1, (50, 7))}
    assert len(lengths) == 1


def test_small_steps_on_bfloat16_add_up():
    """An optimizer of torch's own would leave a bfloat16 weight of 1 at 1: half of its last place is 0.002."""
    weights = [torch.nn.Parameter(torch.ones(5, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]

    def start(w):
        return AdamW([dict(params=[w], lr=1e-4)], weight_decay=0)

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
    assert optimizers[1].copies == {} and optimizers[1].param_groups[0]["params"][0] is weights[1]


def test_a_policy_trains_only_parts_that_it_has():
    for name, part in (("tiny-pi05", "llm"), ("tiny-openvla", "expert"), ("tiny-pi05", "nothing")):
        with pytest.raises(UserError, match=f"can train, not {part}"):
            make(name).set_trainable(part)


def test_the_contract_is_declared_once():
    """Five methods, which a policy of one's own must have."""
    methods = {"sft_loss", "act", "evaluate", "value", "encode"}
    assert P.Policy.__abstractmethods__ == methods
    assert all(getattr(P.Policy, name).__doc__ for name in methods)


def test_exploration_that_has_died_leaves_finite_numbers():
    """OpenVLA's tokens can become certain; pi0.5's noise has a lower bound."""
    dim = {"q01": [-1.0] * 7, "q99": [1.0] * 7}
    policy = P.load_policy("tiny-openvla", stats={"observation.state": dim, "action": dim})
    obs = dict(image=torch.zeros(2, 64, 64, 3, dtype=torch.uint8), state=torch.zeros(2, 7), prompt=["push"] * 2)
    with torch.no_grad():
        policy.language_model.lm_head.weight.mul_(1e4)
    decision = policy.act(obs, sample=True)
    logprob, entropy, _ = policy.evaluate(obs, decision.latent)
    (logprob.sum() + entropy.sum()).backward()
    assert entropy.abs().max() < 0.01 and logprob.isfinite().all()
    assert all(p.grad.isfinite().all() for p in policy.parameters() if p.grad is not None)


def test_a_pretrained_policy_stays_normalised_as_it_was_unless_more_moves():
    moves = {"q01": [-1.0] * 7, "q99": [1.0] * 7}
    still = {"q01": [-9.0] * 7, "q99": [9.0] * 6 + [-9.0]}  # wider, but the gripper stays as it is
    wide, narrow = ({"observation.state": moves, "action": action} for action in (moves, still))
    assert P.keeps_its_stats(P.load_policy("tiny-pi05", stats=wide), narrow)
    assert P.keeps_its_stats(P.load_policy("tiny-pi05", stats=narrow), narrow)
    assert not P.keeps_its_stats(P.load_policy("tiny-pi05", stats=narrow), wide)
    assert not P.keeps_its_stats(P.load_policy("tiny-pi05"), wide)  # random weights know no units


def test_the_pretrained_policy_is_found_by_its_name_and_trains_in_float32(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # from any folder
    policy = P.load_policy("tiny-pi05-base")
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}
    assert policy.act(make_obs(policy, [PROMPT]), sample=False).actions.shape == (1, 4, 7)
    assert sum(file.stat().st_size for file in policy.source.rglob("*") if file.is_file()) < 4e6
    (tmp_path / "tiny-pi05-base").mkdir()  # a folder of the user's goes before it
    with pytest.raises(UserError, match="tiny-pi05-base"):
        P.load_policy("tiny-pi05-base")
