"""What only a GPU can show: `python -m pytest -s tests/test_gpu.py`. Skipped without CUDA.

The first half simulates: it needs sapien and mani_skill, and SAPIEN's PhysX for GPUs, which SAPIEN downloads at first
use. The second half needs torch and transformers alone.
"""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_rlco
from checkpoints import UserError
from machines import AdamW
from policy import index_obs, load_policy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICE = "cuda"
TASKS = ("pick_place", "push_cube", "open_drawer", "close_drawer")
N = 64


@pytest.fixture
def envs():
    pytest.importorskip("mani_skill")
    import envs

    return envs


def simulated(envs, task="push_cube", num_envs=N):
    """One environment of `num_envs` scenes on the GPU."""
    try:
        return envs.make(task, envs.TWIN, num_envs=num_envs, sim_backend="physx_cuda", render="gpu")
    except UserError as error:
        pytest.skip(str(error))


# ---- with the simulator -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_demonstrations_succeed_there_too(envs, task):
    """Their actions, replayed open loop: PhysX on a GPU is another solver, but the same physics."""
    seeds = range(500, 500 + N)
    episodes = [e for start in seeds[::8] for e in envs.demonstrations(task, envs.TWIN, range(start, start + 8))]
    steps = max(len(episode["action"]) for episode in episodes)
    actions = torch.zeros(N, steps, 7)
    for row, episode in enumerate(episodes):
        actions[row, : len(episode["action"])] = torch.from_numpy(episode["action"])
        actions[row, len(episode["action"]) :, 6] = float(episode["action"][-1, 6])  # then hold
    world = simulated(envs, task)
    world.reset(seed=list(seeds))
    _, terminated, _, _ = world.step_chunk(actions)
    done = np.array([episode["success"] for episode in episodes])
    assert terminated.cpu().numpy()[done].mean() >= 0.95


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_is_the_same_scene_in_any_row_and_on_a_cpu(envs, task):
    world = simulated(envs, task, 4)
    world.reset(seed=[7, 8, 9, 10])
    first = world.snapshot().cpu()
    world.reset(seed=[10, 9, 8, 7])
    torch.testing.assert_close(world.snapshot().cpu().flip(0), first, atol=1e-5, rtol=0)
    alone = envs.make(task, envs.TWIN, render="cpu")
    alone.reset(seed=[8])
    torch.testing.assert_close(alone.snapshot()[0], first[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("task", TASKS)
def test_a_reset_of_some_rows_leaves_the_others_alone(envs, task):
    world = simulated(envs, task, 4)
    batch = envs.Batch([world])
    batch.reset(dict(enumerate((7, 8, 9, 10))))
    actions = torch.zeros(4, 8, 7, device=world.device)
    actions[..., 0] = torch.tensor([0.0, 0.01, 0.02, -0.01], device=world.device)[:, None]
    batch.step(actions, range(4))

    def state():
        controller = world.agent.controller
        commanded = [world.commanded, controller.q_target, controller.rotation.flatten(1), controller.targets]
        return torch.cat([world.snapshot(), *commanded, world.elapsed_steps[:, None].float()], 1).cpu()

    before = state()
    batch.reset({})
    torch.testing.assert_close(state(), before, atol=0, rtol=0)
    batch.reset({1: 99})
    torch.testing.assert_close(state()[[0, 2, 3]], before[[0, 2, 3]], atol=1e-5, rtol=0)
    assert (state()[1] - before[1]).abs().max() > 1e-2 and world.elapsed_steps.tolist() == [8, 0, 8, 8]


def test_pictures_are_kept_and_the_vectorised_environment_runs(envs):
    world = simulated(envs, num_envs=4)
    batch = envs.Batch([world])
    first = batch.reset(dict(enumerate((7, 8, 9, 10))))
    kept = {row: image.copy() for row, (image, _) in first.items()}
    actions = torch.zeros(4, 8, 7, device=world.device)
    actions[..., 2] = 0.02
    batch.step(actions, range(4))
    for row, (image, _) in batch.observe(range(4)).items():
        np.testing.assert_array_equal(first[row][0], kept[row])
        assert (image.astype(int) - kept[row]).any()
    vectorised = envs.VecEnv("push_cube", envs.TWIN, N, sim_backend="physx_cuda")
    vectorised.reset(7)
    start = time.time()
    for _ in range(20):
        obs, reward, *_ = vectorised.step(torch.zeros(N, 8, 7))
    print(f"\n{N} scenes: {20 * 8 * N / (time.time() - start):.0f} control steps/s, chunk 8")
    vectorised.close()
    assert obs["image"].shape == (N, 64, 64, 3) and reward.isfinite().all()


# ---- without ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-pi05", "tiny-openvla"])
def test_a_probability_is_the_same_in_other_company_in_bfloat16(name):
    """Rollouts score all worlds at once, updates a minibatch: PPO's ratio of the two begins near 1, against a clip of
    0.2. Prints memory and speed."""
    one = {"q01": [-1.0] * 7, "q99": [1.0] * 7}
    policy = load_policy(name, {"observation.state": one, "action": one}, torch.bfloat16, DEVICE)
    size = policy.image_size
    obs = dict(
        image=torch.randint(0, 256, (N, size, size, 3), dtype=torch.uint8),
        state=torch.rand(N, 7) * 2 - 1,
        prompt=["push the cube to the target"] * N,
    )
    cuda = torch.cuda if DEVICE == "cuda" else SimpleNamespace(synchronize=int, max_memory_allocated=int)
    with torch.no_grad():
        policy.act(obs, sample=True)  # the first one compiles kernels
        cuda.synchronize()
        start = time.time()
        decision = policy.act(obs, sample=True)
        cuda.synchronize()
        seconds = time.time() - start
        rows = torch.arange(N).split(8)
        again = [policy.evaluate(index_obs(obs, mine), decision.latent[mine])[0] for mine in rows]
    ratio = torch.cat(again).float() - decision.logprob.float()
    print(f"\n{name}: {N / seconds:.0f} decisions/s, {cuda.max_memory_allocated() / 2**20:.0f} MB")
    assert ratio.square().mean().sqrt() < 0.02


def observed(policy, n):
    """n random observations with actions, as an SFT batch."""
    size = policy.image_size
    return dict(
        image=torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8),
        state=torch.rand(n, 7) * 2 - 1,
        prompt=["push the cube to the target"] * n,
        action=torch.rand(n, policy.horizon, 7) * 2 - 1,
        action_is_pad=torch.zeros(n, policy.horizon, dtype=torch.bool),
    )


@pytest.mark.parametrize("name, part", [("tiny-pi05", "expert"), ("tiny-openvla", "llm")])
def test_a_gradient_step_is_the_one_of_a_cpu(name, part):
    """Stage II's loss, its gradient and the fused AdamW, in float32, from the same weights."""
    args = SimpleNamespace(clip=0.2, value_clip=0.2, huber_delta=10.0, value_coef=0.5, entropy_coef=0.01, beta=0.0)
    torch.manual_seed(0)
    one = {"q01": [-1.0] * 7, "q99": [1.0] * 7}
    stats = {"observation.state": one, "action": one}
    policies = [load_policy(name, stats), load_policy(name, stats, device=DEVICE)]
    policies[1].load_state_dict(policies[0].state_dict())
    obs = observed(policies[0], 8)
    decision = policies[0].act(obs, sample=True)
    minibatch = dict(obs=obs, latent=decision.latent, logprob=decision.logprob, value=decision.value)
    minibatch |= dict(advantage=torch.randn(8), returns=torch.randn(8))
    losses = []
    norms = []
    for policy in policies:
        policy.set_trainable(part)
        optimizer = AdamW([dict(params=[p for p in policy.parameters() if p.requires_grad], lr=1e-4)])
        there = {key: x.to(policy.device) if torch.is_tensor(x) else x for key, x in minibatch.items()}
        loss, _ = train_rlco.rlco_loss(policy, there, None, args)
        loss.backward()
        losses.append(loss.item())
        norms.append(optimizer.clip(1.0))
        optimizer.step()
    assert losses[1] == pytest.approx(losses[0], abs=1e-4) and norms[1] == pytest.approx(norms[0], rel=1e-2)
    for (key, here), there in zip(policies[0].named_parameters(), policies[1].parameters()):
        # Adam's first step is the gradient's sign, which rounding may turn where there is hardly any
        assert (here - there.cpu()).abs().mean() < 2e-5, key


@pytest.mark.parametrize("name, part", [("tiny-pi05", "expert"), ("tiny-openvla", "lora")])
def test_a_bfloat16_optimizer_goes_on_after_a_save(name, part, tmp_path):
    """Copies, moments and the number of steps go to the CPU and back to where the fused kernel reads them."""
    one = {"q01": [-1.0] * 7, "q99": [1.0] * 7}
    policies = []
    optimizers = []
    for _ in range(2):
        torch.manual_seed(0)
        policy = load_policy(name, {"observation.state": one, "action": one}, torch.bfloat16, DEVICE)
        policy.set_trainable(part)
        policies.append(policy)
        optimizers.append(AdamW([dict(params=[p for p in policy.parameters() if p.requires_grad])], lr=1e-3))
    batch = observed(policies[0], 8)

    def train(which, first, last):
        for step in range(first, last):
            torch.manual_seed(step)
            optimizers[which].zero_grad()
            policies[which].sft_loss(batch).backward()
            assert np.isfinite(optimizers[which].clip(1.0))
            optimizers[which].step()

    train(0, 0, 3)
    torch.save(optimizers[0].state_dict(), tmp_path / "moments.pt")
    saved = {key: weight.clone() for key, weight in policies[0].state_dict().items()}
    train(0, 3, 6)
    policies[1].load_state_dict(saved)
    optimizers[1].load_state_dict(torch.load(tmp_path / "moments.pt", weights_only=True))
    train(1, 3, 6)
    straight, resumed = (policy.state_dict() for policy in policies)
    # A GPU adds up in any order; but without copies or moments this would be further by far.
    apart = torch.stack([(straight[key] - resumed[key]).float().abs().mean() for key in saved]).max()
    moved = torch.stack([(straight[key] - saved[key]).float().abs().mean() for key in saved]).max()
    assert apart < moved / 20


@pytest.mark.parametrize("name, part", [("pi05", "expert"), ("pi05", "all"), ("openvla-7b", "lora")])
def test_full_size_trains(name, part):
    """A gradient step of stage I with random weights, with --bf16 --gradient-checkpointing: prints what it takes."""
    if DEVICE == "cuda" and torch.cuda.get_device_properties(0).total_memory < 70e9:
        pytest.skip("needs 80 GB")
    one = {"q01": [-1.0] * 7, "q99": [1.0] * 7}
    torch.cuda.reset_peak_memory_stats()
    policy = load_policy(name, {"observation.state": one, "action": one}, torch.bfloat16, DEVICE)
    policy.set_trainable(part)
    policy.gradient_checkpointing = True
    optimizer = AdamW([dict(params=[p for p in policy.parameters() if p.requires_grad])], lr=1e-5)
    batch = observed(policy, 8)
    for _ in range(2):  # the first one compiles kernels
        start = time.time()
        optimizer.zero_grad()
        policy.sft_loss(batch).backward()
        assert np.isfinite(optimizer.clip(1.0))
        optimizer.step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 1e9
    print(f"\n{name} {part}: {8 / (time.time() - start):.1f} samples/s, {peak:.1f} GB")
    assert peak < 80
