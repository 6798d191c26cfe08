"""How fast it is, beside what else there is to use.

python -m results.bench env       # control steps per second beside stock ManiSkill
python -m results.bench iteration # of stage II: its rollout and its update
python -m results.bench busy      # stage I beside a program that keeps a core busy
python -m results.bench update    # pi0.5's PPO update beside the public code's way of computing it
python -m results.bench memory    # what stage II takes of a GPU's memory, counted on any machine
"""

import machines  # isort: skip  # first: it sets how torch's threads wait for each other
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import tyro

import train_rlco
from data import SEEDS_PER_BLOCK, worker_pool
from envs import IMAGE_SIZE, SEEDS, TASKS, TWIN, Batch, VecEnv, demonstrations, joint_targets, make, rl_seed
from policy import PRESETS, Pi05, apply_defaults, index_obs, load_policy

# About what demonstrations of the twins move.
DEMONSTRATED = {
    "observation.state": {"q01": [-1.0] * 7, "q99": [1.0] * 7},
    "action": {"q01": [-0.02] * 6 + [-1.0], "q99": [0.02] * 6 + [1.0]},
}


@dataclass
class Env:
    """Control steps per second: stock ManiSkill (PushCube-v1, a picture every step), the twins, and the twins with the
    default policy exploring."""

    tasks: tuple[str, ...] = tuple(TASKS)
    """Tasks of envs.py."""
    chunk: int = 8
    """Control steps between two pictures. The policy is also measured with its own chunk, which is shorter."""
    num_envs: int = 32
    """Worlds, spread over the processes."""
    workers: int = len(os.sched_getaffinity(0))
    """Processes, of the twin and of stock ManiSkill; one a core."""
    seconds: float = 15.0
    """Length of each measurement."""


def stock_steps_per_second(seconds: float) -> float:
    """One process of stock ManiSkill at the twin's resolution, for `seconds`."""
    import gymnasium
    import mani_skill.envs  # noqa: F401  (registers PushCube-v1)

    env = gymnasium.make(
        "PushCube-v1",
        obs_mode="rgb",
        control_mode="pd_ee_delta_pose",
        sim_backend="physx_cpu",
        render_backend="cpu",
        sensor_configs=dict(width=IMAGE_SIZE, height=IMAGE_SIZE),
    )
    env.reset(seed=0)
    env.step(env.action_space.sample() * 0)  # the first picture takes seconds
    steps = 0
    end = time.time() + seconds
    while time.time() < end:
        env.step(env.action_space.sample() * 0.1)
        steps += 1
    return steps / seconds


def steps_per_second(world: VecEnv, act, seconds: float) -> float:
    """Control steps that are executed while `act(obs) -> actions [B,C,7]` plays for `seconds`."""
    obs = world.reset(SEEDS["rl"])
    steps = 0
    last = torch.zeros(world.num_envs, dtype=int)
    start = time.time()
    while time.time() < start + seconds:
        obs, _, terminated, truncated, info = world.step(act(obs))
        steps += (info["length"] - last).sum().item()  # an episode may end inside a chunk
        last = torch.where(terminated | truncated, 0, info["length"])
    return steps / (time.time() - start)


def milliseconds(task: str, chunk: int) -> dict[str, float]:
    """What the parts of a world cost on one core, in ms; the arm moves. What is computed for 16 worlds at once counts
    as a sixteenth."""
    worlds = [make(task, TWIN) for _ in range(16)]
    batch = Batch(worlds)
    batch.reset({i: SEEDS["rl"] for i in range(16)})
    env = worlds[0]
    controller = env.agent.controller
    actions = torch.zeros(16, chunk, 7)
    actions[..., 0] = 0.003
    moving = joint_targets([controller], actions[:1])[0]

    def physics():
        for target in moving:
            controller.set_targets(target[None])
            for _ in range(env.sim_freq // env.control_freq):
                env.scene.step()

    parts = {
        f"physics of {chunk} control steps": physics,
        "a picture and its state": env.observe,
        "a reset": lambda: env.reset(seed=[SEEDS["rl"]]),
        "joint targets": lambda: joint_targets([world.agent.controller for world in worlds], actions),
        f"{chunk} times success": lambda: [batch.view.success() for _ in range(chunk)],
        "the potential": batch.view.potential,
    }
    alone = ["physics", "a pic", "a reset"]
    cost = {}
    for name, part in parts.items():
        part()
        start = time.perf_counter()
        for _ in range(20):
            part()
        cost[name] = 1000 * (time.perf_counter() - start) / 20 / (1 if name.startswith(tuple(alone)) else 16)
    return cost


def demonstrations_per_second(task: str, seconds: float) -> float:
    """One process of scripted demonstrations, each control step with its picture, for `seconds`."""
    first = SEEDS["rl"]
    demonstrations(task, TWIN, range(first, first + SEEDS_PER_BLOCK))  # makes the environments
    start = time.time()
    episodes = 0
    while time.time() < start + seconds:
        episodes += SEEDS_PER_BLOCK
        demonstrations(task, TWIN, range(first + episodes, first + episodes + SEEDS_PER_BLOCK))
    return episodes / (time.time() - start)


def bench_env(args: Env) -> None:
    with worker_pool(args.workers) as pool:
        stock = sum(pool.map(stock_steps_per_second, [args.seconds] * args.workers))
    size = f"{IMAGE_SIZE} x {IMAGE_SIZE}"
    print(f"stock ManiSkill, PushCube-v1, {size}, {args.workers} processes: {stock:.0f} control steps/s")

    still = np.zeros((args.num_envs, args.chunk, 7), np.float32)
    ways = {f"alone, chunk {args.chunk}": lambda obs: still}
    for chunk in (args.chunk, PRESETS["tiny-pi05"]["chunk"]):
        policy = load_policy("tiny-pi05", stats=DEMONSTRATED, chunk=chunk, action_horizon=chunk)
        ways[f"with the default policy, chunk {chunk}"] = lambda obs, policy=policy: (
            policy.act(obs, sample=True).actions
        )
    for task in args.tasks:
        with worker_pool(args.workers) as pool:
            measured = list(pool.map(milliseconds, [task] * args.workers, [args.chunk] * args.workers))
            rates = pool.map(demonstrations_per_second, [task] * args.workers, [args.seconds] * args.workers)
            print(f"{task}: {sum(rates):.1f} demonstrations/s in {args.workers} processes")
        cost = {name: float(np.mean([m[name] for m in measured])) for name in measured[0]}
        print("ms on a core: " + ", ".join(f"{name} {ms:.2f}" for name, ms in cost.items()))
        physics, picture, *_ = cost.values()
        floor = args.workers * 1000 * args.chunk / (physics + picture)
        print(
            f"floor, physics and a picture a chunk of {args.chunk} on {args.workers} cores: {floor:.0f} control steps/s"
        )
        start = time.time()
        world = VecEnv(task, TWIN, args.num_envs, args.workers)
        world.reset(SEEDS["rl"])
        print(f"{args.num_envs} environments are ready after {time.time() - start:.1f} s")
        for way, act in ways.items():
            rate = steps_per_second(world, act, args.seconds)
            print(
                f"{task}, {args.num_envs} environments in {args.workers} processes, {way}: {rate:.0f} control steps/s, "
                f"{rate / stock:.1f} x stock, {rate / floor:.2f} of the floor"
            )
        world.close()


@dataclass
class Iteration:
    """Seconds of an iteration of stage II with its defaults, of the default policy: its rollout and its update."""

    task: str = "push_cube"
    """A task of envs.py."""
    repeats: int = 3
    """Timed iterations, after one that warms up."""


def bench_iteration(args: Iteration) -> None:
    settings = train_rlco.Args(target_kl=float("inf"), critic_warmup=0, acting_groups=1)  # no update ends early
    policy = load_policy("tiny-pi05", stats=DEMONSTRATED)
    apply_defaults(settings, policy, train_rlco.DEFAULTS)
    critic = list(policy.value_head.parameters())
    actor = [p for name, p in policy.named_parameters() if p.requires_grad and not name.startswith("value_head")]
    groups = [dict(params=actor, lr=settings.lr), dict(params=critic, lr=settings.value_lr)]
    optimizer = machines.AdamW(groups, betas=(0.9, 0.95), weight_decay=0)
    twin = VecEnv(args.task, TWIN, settings.num_envs)
    decisions = math.ceil(twin.max_episode_steps / policy.chunk)
    for iteration in range(args.repeats + 1):
        start = time.time()
        experience = train_rlco.rollout(policy, twin, rl_seed(1, iteration), decisions)
        acted = time.time()
        names = ("reward", "value", "last_value", "truncated_value", "terminated", "truncated")
        columns = [experience[name] for name in names]
        experience["advantage"], experience["returns"] = train_rlco.gae(*columns, settings.gamma, settings.gae_lambda)
        real = index_obs(experience["obs"][0][0], slice(settings.anchor_batch_size))  # in the place of demonstrations
        size = (settings.anchor_batch_size, policy.horizon)
        real |= dict(action=torch.zeros(*size, 7), action_is_pad=torch.zeros(size, dtype=torch.bool))
        log = train_rlco.update(policy, optimizer, experience, [real] * 999, 0, iteration, settings)
        if iteration:
            print(
                f"{args.task}, {settings.num_envs} worlds, {decisions} decisions: rollout {acted - start:.1f} s, "
                f"update {time.time() - acted:.1f} s ({log['time/updates']} gradient steps)"
            )
    twin.close()


@dataclass
class Busy:
    """Steps per second of stage I, the default policy with batches of 128, alone and beside a program that keeps a core
    busy: with threads that spin for as long as they do by default, and as machines.py sets it."""

    seconds: float = 10.0
    """Length of each measurement."""


SFT_STEPS = """
import time, torch
from policy import load_policy

torch.manual_seed(0)
one = {{"q01": [-1.0] * 7, "q99": [1.0] * 7}}
policy = load_policy("tiny-pi05", {{"observation.state": one, "action": one}})
batch = dict(
    image=torch.randint(0, 256, (128, 64, 64, 3), dtype=torch.uint8),
    state=torch.rand(128, 7),
    prompt=["push the cube to the target"] * 128,
    action=torch.rand(128, policy.horizon, 7),
    action_is_pad=torch.zeros(128, policy.horizon, dtype=torch.bool),
)
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
steps = -1  # the first one warms up
while steps < 0 or time.time() < start + {seconds}:
    policy.sft_loss(batch).backward()
    optimizer.step()
    optimizer.zero_grad()
    if steps < 0:
        start = time.time()
    steps += 1
print(steps / (time.time() - start))
"""


def bench_busy(args: Busy) -> None:
    program = [sys.executable, "-c", SFT_STEPS.format(seconds=args.seconds)]
    for name, spins in (("as by default", "300000"), ("as set here", os.environ.get("GOMP_SPINCOUNT", "0"))):
        settings = {**os.environ, "GOMP_SPINCOUNT": spins}
        alone = float(subprocess.run(program, env=settings, stdout=subprocess.PIPE, check=True).stdout)
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        beside = float(subprocess.run(program, env=settings, stdout=subprocess.PIPE, check=True).stdout)
        busy.kill()
        print(f"threads wait {name}: {alone:.2f} steps/s of stage I alone, {beside:.2f} beside a busy core")


@dataclass
class Update:
    """Samples per second of pi0.5's PPO update (evaluate and backward), here and as published, on the same weights."""

    depth: int = 4
    """Layers kept of each of the three transformers, at full width; 0 keeps all. The fewer, the more the word table's
    gradient, which is the same in both ways, hides the ratio."""
    batch: int = 2
    """Observations in an update."""
    repeats: int = 3
    """Timed updates."""
    device: str = "cpu"
    """"cpu" or "cuda"."""
    bf16: bool = False
    """Keep weights in bfloat16."""


class AsPublished(Pi05):
    """The same numbers, computed as the public PyTorch code does: three cameras of which two are masked, a prompt
    padded to its limit, a loop over the denoising steps, eager attention on repeated keys."""

    def embed_prefix(self, images, image_masks, tokens, token_masks):
        pad = (0, self.config["max_token_len"] - tokens.shape[1])
        absent = -torch.ones_like(images[0])
        patches = self.embed_images(torch.cat([images[0], absent, absent])).chunk(3)
        words = self.vlm.language_model.embed_tokens(F.pad(tokens, pad))
        camera = torch.arange(3, device=words.device).repeat_interleave(patches[0].shape[1])
        embeddings = torch.cat([*patches, words * words.shape[-1] ** 0.5], 1)
        return embeddings, torch.cat([(camera == 0).expand(len(tokens), -1), F.pad(token_masks, pad)], 1)

    def velocity(self, x, t, prefix):
        steps = [super(AsPublished, self).velocity(x[:, k, None], t[:, k, None], prefix) for k in range(x.shape[1])]
        velocity, features = zip(*steps)
        return torch.cat(velocity, 1), torch.cat(features, 1)

    @staticmethod
    def attend(q, k, v, mask):
        groups = q.shape[2] // k.shape[1]
        k = k.repeat_interleave(groups, 1)
        v = v.repeat_interleave(groups, 1)
        scores = q.transpose(1, 2) @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~mask[:, None], -2.3819763e38).softmax(-1, torch.float32).type_as(v)
        return (weights @ v).transpose(1, 2).flatten(2)


UNIT = {"q01": [-1.0] * 7, "q99": [1.0] * 7}
STATS = {"observation.state": UNIT, "action": UNIT}
# Where a preset says how many layers its vision towers have, and its language model (with pi0.5's expert).
LAYERS = {
    "pi05": (dict(vision="num_hidden_layers"), dict(vlm="depth", action_expert="depth")),
    "openvla": (dict(dino="depth", siglip="depth"), dict(llm="num_hidden_layers")),
}


def with_layers(preset: str, vision: int, language: int) -> dict:
    """The overrides that leave a preset so many layers."""
    config = PRESETS[preset]
    overrides = {}
    for parts, layers in zip(LAYERS[config["type"]], (vision, language)):
        overrides |= {part: {**config[part], key: layers} for part, key in parts.items()}
    return overrides


def bench_update(args: Update) -> None:
    layers = with_layers("pi05", args.depth, args.depth) if args.depth else {}
    policy = load_policy("pi05", STATS, torch.bfloat16 if args.bf16 else None, args.device, **layers)
    size = policy.image_size
    obs = {
        "image": torch.randint(0, 256, (args.batch, size, size, 3), dtype=torch.uint8),
        "state": torch.rand(args.batch, 7) * 2 - 1,
        "prompt": ["push the cube to the target"] * args.batch,
    }
    chain = policy.act(obs, sample=True).latent
    rates = {}
    for name, way, attention in (("here", Pi05, "sdpa"), ("as published", AsPublished, "eager")):
        policy.__class__ = way  # the same weights with the other way's methods: two models need not fit
        policy.vlm.vision_tower.vision_model.encoder.config._attn_implementation = attention
        for train in ("all", "expert"):
            policy.set_trainable(train)
            for i in range(args.repeats + 1):
                if i == 1:  # the first update warms up
                    start = time.perf_counter()
                logprob, _, value = policy.evaluate(obs, chain)
                (logprob + value).mean().backward()
                policy.zero_grad()
                if args.device != "cpu":
                    torch.cuda.synchronize()
            rate = args.repeats * args.batch / (time.perf_counter() - start)
            rates[name, train] = rate
            print(f"{name:13} {train:7} {rate:8.3f} samples/s   logprob {logprob.mean().item():.4f}")
    for train in ("all", "expert"):
        ratio = rates["here", train] / rates["as published", train]
        print(f"update of {train}: {ratio:.1f} times the published way's")


@dataclass
class Memory:
    """What stage II keeps in each GPU's memory. Nothing of full size is made: weights are counted on the meta device;
    what autograd keeps of one observation, and its cached prefix, are measured at full width with few layers, and grow
    with the number of layers and observations."""

    policy: str = "pi05"
    """A preset."""
    train: str = "expert"
    """As in train_rlco.py, and so are the others."""
    bf16: bool = True
    gradient_checkpointing: bool = True
    processes: int = 1
    """GPUs."""
    num_envs: int = 128
    minibatch_size: int = 256
    anchor_batch_size: int = 64
    accumulate: int = 8
    """Micro-batches of a gradient step over all processes."""


def kept_bytes(args: Memory, vision: int, language: int) -> np.ndarray:
    """Of a policy with so many layers and one observation: what autograd keeps of `evaluate` and of `sft_loss`, and
    what `encode` keeps, in bytes."""
    layers = with_layers(args.policy, vision, language)
    policy = load_policy(args.policy, STATS, torch.bfloat16 if args.bf16 else None, "meta", **layers)
    policy.to_empty(device="cpu")
    for tensor in (*policy.parameters(), *policy.buffers()):
        tensor.data.zero_()  # what is kept does not depend on the values, and random ones take a minute
    policy.set_trainable(args.train)
    policy.gradient_checkpointing = args.gradient_checkpointing
    size = policy.image_size
    obs = dict(image=torch.zeros(1, size, size, 3, dtype=torch.uint8), state=torch.zeros(1, 7))
    obs["prompt"] = ["push the cube to the target"]
    action = dict(action=torch.zeros(1, policy.horizon, 7), action_is_pad=torch.zeros(1, policy.horizon).bool())
    latent = policy.act(obs, sample=True).latent
    weights = {weight.untyped_storage().data_ptr() for weight in policy.parameters()}

    def kept(loss) -> int:
        storages = {}

        def count(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage  # alive until the end, so that no address comes twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss()
        return sum(storage.nbytes() for storage in storages.values())

    encoded = policy.encode(obs)
    cached = [value for key, value in encoded.items() if torch.is_tensor(value)]
    evaluated = kept(lambda: policy.evaluate(encoded, latent))
    imitated = kept(lambda: policy.sft_loss({**obs, **action}))
    return np.array([evaluated, imitated, sum(value.nbytes for value in cached)], float)


def bench_memory(args: Memory) -> None:
    config = PRESETS[args.policy]
    vision, language = (max(config[part][key] for part, key in parts.items()) for parts in LAYERS[config["type"]])
    few = kept_bytes(args, 2, 2)
    a_vision_layer = kept_bytes(args, 3, 2) - few
    a_language_layer = kept_bytes(args, 2, 3) - few
    kept = few + (vision - 2) * a_vision_layer
    evaluated, imitated, cached = kept + (language - 2) * a_language_layer
    if args.gradient_checkpointing:  # while one layer goes back, it is as if it had none
        whole = Memory(**{**vars(args), "gradient_checkpointing": False})
        layer = max(kept_bytes(whole, 3, 2)[0], kept_bytes(whole, 2, 3)[0]) - kept_bytes(whole, 2, 2)[0]
        evaluated += layer

    policy = load_policy(args.policy, dtype=torch.bfloat16 if args.bf16 else None, device="meta")
    policy.set_trainable(args.train)
    weights = list(policy.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    half = sum(weight.numel() for weight in trained if weight.dtype != torch.float32)
    decisions = -(-max(task.max_episode_steps for task in TASKS.values()) // policy.chunk)
    parts = {
        "weights": sum(weight.nbytes for weight in weights),
        "copies in float32": 4 * half / args.processes,
        "Adam's moments": 8 * sum(weight.numel() for weight in trained) / args.processes,
        "gradients, in float32": 4 * sum(weight.numel() for weight in trained),
        "activations": (args.minibatch_size * evaluated + args.anchor_batch_size * imitated) / args.accumulate,
        "observations of a rollout": args.num_envs / args.processes * decisions * cached,
    }
    for name, size in parts.items():
        print(f"{name:26} {size / 1e9:7.2f} GB")
    print(f"{'together':26} {sum(parts.values()) / 1e9:7.2f} GB on each of {args.processes} GPUs")


if __name__ == "__main__":
    benches = {Env: bench_env, Iteration: bench_iteration, Busy: bench_busy, Update: bench_update, Memory: bench_memory}
    args = tyro.extras.subcommand_cli_from_dict({bench.__name__.lower(): bench for bench in benches})
    benches[type(args)](args)
