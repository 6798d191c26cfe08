"""Stage II of RL-Co: PPO in the twin, anchored to the real demonstrations (arXiv 2602.12628, section III).

    L(theta) = L_RL(theta; T_sim) + beta * E_{D_real}[l]

    python train_rlco.py                              # from runs/sft/best, the anchor on
    python train_rlco.py --beta 0 --out runs/rl       # plain RL in the twin

Progress is in OUT/tensorboard and OUT/metrics.json, the curve in OUT/learning_curve.png, checkpoints in OUT/best and
OUT/last. The same command again resumes a killed run at the iteration that it was in.
"""

import machines  # isort: skip  # first: it sets how torch's threads wait for each other
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

import checkpoints
import data
import envs
import page
from checkpoints import UserError
from machines import AdamW
from policy import apply_defaults, index_obs, load_policy, pick_obs

# Options that nobody gave: what was found here, and what RLinf (RL-Co, pi0.5) and RL4VLA (LoRA) published at full size;
# but for pi0.5's minibatch, a tenth of theirs (docs/policies.md).
DEFAULTS = {
    "tiny": dict(lr=2e-5, value_lr=3e-3, update_epochs=2, minibatch_size=256, entropy_coef=0.0, max_grad_norm=1.0),
    "pi05": dict(lr=4e-6, value_lr=2e-4, update_epochs=2, minibatch_size=256, entropy_coef=0.005, max_grad_norm=1.0),
    "openvla": dict(lr=1e-4, value_lr=3e-3, update_epochs=1, minibatch_size=640, entropy_coef=0.0, max_grad_norm=10.0),
}


@dataclass
class Args:
    """Stage II: RL in the simulated twin, with a supervised loss on real demonstrations as an anchor."""

    policy: str = "runs/sft/best"
    """The stage I checkpoint: a folder, or a name on the Hub."""
    task: str = "push_cube"
    """A task of envs.py."""
    target: str = "standin"
    """The domain of envs.py that plays the robot: its demonstrations are the real ones, and it is evaluated in."""
    real: Path | None = None
    """Real demonstrations of the anchor, a LeRobot dataset: its folder or Hub name (default: demos/TASK-TARGET)."""
    num_real: int | None = None
    """Use only the first so many real demonstrations (default: all)."""
    real_val: Path | None = None
    """Held-out real demonstrations, on which forgetting is measured (default: demos/TASK-TARGET-val; of --real the last
    tenth)."""
    camera: str | None = None
    """Key of the real datasets' camera, or the end of it, where they have several and it is not clear which."""
    beta: float = 0.2
    """Weight of the supervised loss on real demonstrations. Larger keeps the policy nearer to them; 0 is plain RL."""
    train: Literal["expert", "llm", "lora", "all"] = "all"
    """Which weights train: pi0.5's action expert or OpenVLA's language model alone, for which observations are embedded
    only once; LoRA adapters, for large policies; or all."""
    iterations: int = 15
    """Rollouts, each followed by an update. More are worth it while success in the twin still rises."""
    num_envs: int = 128
    """Worlds, spread over the cores; each plays one episode or more an iteration. More make the gradient less noisy."""
    randomize: bool = False
    """Act in randomised twins, each changed towards a random domain of its own, for when RL learns what holds in the
    twin alone. Validation stays in the twin."""
    update_epochs: int | None = None
    """Passes over a rollout. More learn more from it, until the KL divergence stops them."""
    minibatch_size: int | None = None
    """Decisions (chunks) in a gradient step (default: DEFAULTS)."""
    anchor_batch_size: int = 64
    """Real samples in a gradient step."""
    accumulate: int = 1
    """Backward passes in a gradient step, of all processes of torchrun together (a multiple of their number): more of
    them need less memory and give the same gradient."""
    acting_groups: int | None = None
    """Groups that worlds act in, of all processes together: a multiple of their number that divides --accumulate, which
    it is by default. Fewer act faster, more need less memory."""
    bf16: bool = False
    """Keep weights in bfloat16, to fit a large policy on a GPU: all but heads, LoRA, and pi0.5's embeddings, norms and
    action projections. What trains of them is updated in float32 copies."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: a third more time, much less memory."""
    lr: float | None = None
    """Learning rate of the policy (default: DEFAULTS). Also used: 1.5e-4 with --train expert, 5e-5 for tiny-openvla."""
    value_lr: float | None = None
    """Learning rate of the critic, the value head, which starts from random weights (default: DEFAULTS)."""
    gamma: float = 0.99
    """Discount of a decision (chunk)."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation: lower trusts the critic more."""
    clip: float = 0.2
    """The probability ratio earns nothing beyond 1 - clip and 1 + clip (PPO)."""
    value_clip: float = 0.2
    """How far the clipped value may move from the one at the time of acting."""
    huber_delta: float = 10.0
    """Error of the value from which on its loss is linear."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    entropy_coef: float | None = None
    """Weight of the entropy bonus (default: DEFAULTS). Raise it when exploration dies before success has come."""
    max_grad_norm: float | None = None
    """Norm that gradients are clipped to, policy and critic together (default: DEFAULTS)."""
    target_kl: float = 0.05
    """An iteration's update ends before the gradient step whose approximate KL divergence exceeds it (of the
    log-probability that the ratio is made of: the mean over pi0.5's denoising chain, over OpenVLA's actions)."""
    desired_kl: float | None = None
    """Steer the learning rate, from --lr to a tenth or ten times of it, so that updates end near this KL divergence,
    for where no good learning rate is known; 0.006 is a start. No published result uses it."""
    critic_warmup: int = 3
    """First iterations that train the critic alone: a random one would drive a good policy away."""
    eval_every: int = 5
    """Iterations between evaluations in the twin and the target."""
    eval_episodes: int = 64
    """Episodes of each evaluation, on validation seeds."""
    eval_envs: int = 32
    """Worlds that evaluate in the target, and in the plain twin with --randomize."""
    save_every: int = 1
    """Iterations between saves, from which a killed run goes on. Fewer saves where one takes long."""
    seed: int = 1
    """Seed of the episodes, the policy's noise and the batches."""
    out: Path = Path("runs/rlco")
    """Folder of the run."""
    device: str = "auto"
    """Where the policy computes: cpu, cuda, or a certain GPU such as cuda:1; auto is the GPU if there is one."""
    render: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the simulator renders: auto is the GPU if it can render a picture; cpu leaves its memory to the policy."""
    wandb: bool = False
    """Also log to Weights & Biases (pip install wandb)."""
    debug: bool = False
    """Show the traceback of an error in the input, too."""


def rollout(policy, twin, first_seed: int, decisions: int, groups: int = 1) -> dict:
    """Let the exploring policy make `decisions` decisions in each of the twin's B worlds, which act in `groups`: world
    i in group i mod groups. Of several processes each has some of the groups.

    -> logprob, value, reward, truncated_value float32 [T,B]; terminated, truncated bool [T,B]; length int [T,B], of the
    episode so far, in control steps; last_value [B], of what is seen at the end; all of them of all processes. Of each
    of this process's groups obs, T observations of b worlds, and latent (T*b rows). All on the policy's device.
    """
    own = machines.own(groups)
    rows = [slice(k, None, len(own)) for k in range(len(own))]  # this process's worlds that are in its k-th group
    steps = []
    observations = [[] for _ in own]
    latents = [[] for _ in own]
    obs = twin.reset(first_seed)
    for t in range(decisions):
        decided = []
        for k, group in enumerate(own):
            machines.seed("act", first_seed, t, group)
            seen = policy.encode(index_obs(obs, rows[k]))
            decided.append(policy.act(seen, sample=True))
            observations[k].append(seen)
            latents[k].append(decided[k].latent)
        actions, logprob, value = (interleave([getattr(d, key) for d in decided]) for key in ACTED)
        obs, reward, terminated, truncated, info = twin.step(actions.cpu())
        # A truncated episode would have gone on: what it was still worth is the value of its last observation.
        truncated_value = torch.zeros(len(reward))
        ended = truncated.nonzero()[:, 0]
        for k in range(len(own)):
            of_group = ended % len(own) == k
            if of_group.any():
                final = policy.value(index_obs(info["final_obs"], of_group.nonzero()[:, 0]))
                truncated_value[ended[of_group]] = final.cpu()
        step = dict(logprob=logprob, value=value, reward=reward, length=info["length"])
        step |= dict(terminated=terminated, truncated=truncated, truncated_value=truncated_value)
        steps.append(step)
    columns = {key: torch.stack([step[key] for step in steps]).to(policy.device) for key in steps[0]}
    columns["last_value"] = interleave([policy.value(index_obs(obs, group)) for group in rows])
    columns = {key: machines.gather(column) for key, column in columns.items()}
    return dict(columns, obs=observations, latent=[torch.cat(x) for x in latents])


ACTED = ("actions", "logprob", "value")


def interleave(groups: list[torch.Tensor]) -> torch.Tensor:
    """[b,...] of each of G groups -> [b G,...], row j of group k at j G + k."""
    return torch.stack(groups, 1).flatten(0, 1)


def gae(reward, value, last_value, truncated_value, terminated, truncated, gamma, gae_lambda):
    """Generalised advantage estimation over decisions (Schulman 2016, eq. 16) -> advantage, return [T,B].

    All [T,B], but last_value [B], of the observations after the rollout. An episode that was truncated after decision t
    goes on in truncated_value[t], the value of its last observation before the reset; a terminated one has no value
    left; none does both. Neither kind of end lets later rewards flow back.
    """
    advantage = torch.zeros_like(reward)
    next_advantage = torch.zeros_like(last_value)
    next_value = last_value
    for t in reversed(range(len(reward))):
        next_value = torch.where(truncated[t], truncated_value[t], next_value * ~terminated[t])
        delta = reward[t] + gamma * next_value - value[t]
        goes_on = ~(terminated[t] | truncated[t])
        advantage[t] = delta + gamma * gae_lambda * goes_on * next_advantage
        next_advantage = advantage[t]
        next_value = value[t]
    return advantage, advantage + value


def rlco_loss(policy, minibatch, real_batch, args):
    """The stage II objective on a minibatch of decisions and one of real samples -> loss, its parts (a dict).

    `minibatch` has obs and latent of N decisions, and logprob, value, advantage, returns float32 [N], all as they were
    when the policy acted. Without `real_batch` (beta = 0, warm-up) there is no anchor. PPO's clipped surrogate
    (Schulman 2017, eq. 7) and clipped Huber value loss. Of `args` it reads beta, clip, value_clip, huber_delta,
    value_coef and entropy_coef.
    """
    logprob, entropy, value = policy.evaluate(minibatch["obs"], minibatch["latent"])
    log_ratio = logprob - minibatch["logprob"]
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - args.clip, 1 + args.clip)
    surrogate = torch.min(ratio * minibatch["advantage"], clipped_ratio * minibatch["advantage"]).mean()

    # The worse of the two: a value that runs away from the one at the time of acting earns nothing by it.
    change = (value - minibatch["value"]).clamp(-args.value_clip, args.value_clip)
    huber = partial(F.huber_loss, target=minibatch["returns"], reduction="none", delta=args.huber_delta)
    error = huber(value)
    clipped_error = huber(minibatch["value"] + change)
    value_loss = torch.max(error, clipped_error).mean()

    ppo = -surrogate - args.entropy_coef * entropy.mean() + args.value_coef * value_loss
    anchor = policy.sft_loss(real_batch) if real_batch is not None else torch.zeros_like(ppo)
    parts = dict(
        ppo=ppo,
        anchor=anchor,
        policy=-surrogate,
        value=value_loss,
        entropy=entropy.mean(),
        # Always positive (Schulman 2020, k3). In units of the policies' mean log-probability, so it is no KL in nats.
        approx_kl=(ratio - 1 - log_ratio).mean(),
        clip_fraction=((ratio - 1).abs() > args.clip).float().mean(),
    )
    return ppo + args.beta * anchor, parts


def update(policy, optimizer, experience: dict, real_batches, updates: int, iteration: int, args) -> dict:
    """PPO's epochs over a rollout, with the anchor in each gradient step -> what to log of it.

    `experience` is what `rollout` returns, with its advantage and returns [T,B]. `updates` gradient steps were made
    before this one: the real batches go on from there. The first args.critic_warmup iterations train the critic alone,
    without the anchor. The update ends before the gradient step whose KL divergence exceeds args.target_kl. UserError
    if that is the first one, or if a loss or a gradient is not finite. Micro-batch m is of the worlds m,
    m + args.accumulate, ..., and of the process that has them.
    """
    warming_up = iteration < args.critic_warmup
    anchored = args.beta and not warming_up
    seed = envs.rl_seed(args.seed, iteration)
    advantage = experience["advantage"]
    columns = {key: experience[key] for key in ("logprob", "value", "returns")}
    columns["advantage"] = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    numbers = torch.arange(len(experience["latent"][0])).view(len(advantage), -1)  # [T,b] of a group's decisions
    micro_batches = []  # this process's: of some of the worlds of the group that they acted in
    for m in machines.own(args.accumulate):
        k = machines.own(args.acting_groups).index(m % args.acting_groups)
        of_group = numbers[:, m // args.acting_groups :: args.accumulate // args.acting_groups].flatten()
        decisions = {key: column[:, m :: args.accumulate].flatten() for key, column in columns.items()}
        micro_batches.append((m, decisions, of_group, experience["obs"][k], experience["latent"][k]))
    critic = list(policy.value_head.parameters())
    history = []  # the losses of each gradient step that was taken
    log = {}
    minibatches = []
    machines.seed("minibatches", seed)
    each = advantage.numel() // args.accumulate  # decisions of a micro-batch's worlds; all take them in the same order
    for _ in range(args.update_epochs):
        minibatches += torch.randperm(each).split(args.minibatch_size // args.accumulate)
    for rows in minibatches:
        rows = rows.sort().values  # the order of the observations
        optimizer.zero_grad()
        parts_of = []
        for m, decisions, of_group, obs, latent in micro_batches:
            machines.seed("update", seed, len(history), m)
            minibatch = {key: column[rows] for key, column in decisions.items()}
            minibatch |= dict(obs=pick_obs(obs, of_group[rows]), latent=latent[of_group[rows]])
            real_batch = real_batches[(updates + len(history)) * args.accumulate + m] if anchored else None
            loss, parts = rlco_loss(policy, minibatch, real_batch, args)
            if warming_up:
                (parts["value"] / args.accumulate).backward(inputs=critic)  # AdamW leaves the rest as it is
            else:
                (loss / args.accumulate).backward()
            parts_of.append(torch.stack([part.detach().double() for part in parts.values()]))
        # of all processes, before the KL divergence decides: they go on or stop together
        parts_of = machines.gather(torch.stack(parts_of, -1)).tolist()
        step = {key: float(np.mean(values)) for key, values in zip(parts, parts_of)}
        if step["approx_kl"] > args.target_kl:
            log["loss/refused_kl"] = step["approx_kl"]
            break
        step["grad_norm"] = optimizer.clip(args.max_grad_norm)
        if not math.isfinite(step["grad_norm"] + step["ppo"] + step["anchor"]):
            raise UserError(
                f"iteration {iteration}: the gradient is {step['grad_norm']}, the loss {step['ppo']} + beta * "
                f"{step['anchor']}. {args.out} keeps the last good checkpoint; begin again with a lower --lr and "
                f"another --out"
            )
        optimizer.step()
        history.append(step)
    if not history:
        raise UserError(
            f"iteration {iteration}: the KL divergence exceeds --target-kl {args.target_kl} before the first step: "
            f"acting and evaluating disagree; {args.out} keeps the last good checkpoint"
        )
    for key in history[0]:
        log[f"loss/{key}"] = float(np.mean([step[key] for step in history]))
    log["time/updates"] = len(history)
    if args.desired_kl and not warming_up:
        actor = optimizer.param_groups[0]
        log["loss/learning_rate"] = actor["lr"]
        actor["lr"] = steered_lr(actor["lr"], log.get("loss/refused_kl", history[-1]["approx_kl"]), args)
    return log


def steered_lr(lr: float, kl: float, args) -> float:
    """The learning rate after an update that ended at a KL divergence `kl`: the adaptive schedule of legged-robot PPO
    (rsl_rl), once an update and not every gradient step, as the first steps of each have no KL divergence yet."""
    if kl > 2 * args.desired_kl:
        lr /= 1.5
    elif kl < args.desired_kl / 2:
        lr *= 1.5
    return min(max(lr, args.lr / 10), args.lr * 10)


def rollout_metrics(experience: dict, seconds: float) -> dict:
    """What to log of a rollout that took so long. Only a world's first episode counts as a success or a failure: later
    ones may be cut by the rollout's end."""
    done = experience["terminated"] | experience["truncated"]
    first_end = done.float().argmax(0)
    in_first = torch.arange(len(done), device=done.device)[:, None] <= first_end
    returns = experience["returns"]
    unexplained = (returns - experience["value"]).var() / returns.var().clamp(min=1e-8)
    length = experience["length"]  # control steps executed: of the episodes that ended, and of those that go on
    executed = length[-1].sum() + (length * done)[:-1].sum()
    return {
        "rollout/success": experience["terminated"].gather(0, first_end[None]).float().mean().item(),
        "rollout/return": (experience["reward"] * in_first).sum(0).mean().item(),
        "rollout/explained_variance": 1 - unexplained.item(),
        "time/rollout_steps_per_second": executed.item() / seconds,
    }


def make_worlds(args, image_size: int) -> tuple[envs.VecEnv, envs.VecEnv | None, envs.VecEnv | None]:
    """Those that this process trains in; and for the first one those that it evaluates in, the twin and the target."""
    processes = machines.size()
    pictures = dict(image_size=image_size, render=args.render)
    domains = [envs.random_twin(args.seed + i) if args.randomize else envs.TWIN for i in machines.own(args.num_envs)]
    share = (machines.rank(), processes)
    training = envs.VecEnv(args.task, domains, args.num_envs // processes, share=share, **pictures)
    if machines.rank() > 0:
        return training, None, None
    # One process evaluates in the twin it trains in. Of several the first has as many more, so that its policy sees the
    # same batches; and so it is where those that train are no plain twins.
    worlds = args.eval_envs if args.randomize else args.num_envs
    own = args.randomize or processes > 1
    twin = envs.VecEnv(args.task, envs.TWIN, worlds, **pictures) if own else training
    return training, twin, envs.VecEnv(args.task, envs.target_domain(args.target), args.eval_envs, **pictures)


def main(args: Args):
    if args.policy == Args.policy and not Path(args.policy).exists():
        raise UserError(f"{args.policy}: no stage I checkpoint; `python train_sft.py` makes it")
    counts = "iterations num_envs anchor_batch_size accumulate save_every eval_every eval_episodes eval_envs"
    checkpoints.require_counts(args, counts)
    device = machines.start(args.device, args.accumulate)
    chief = machines.rank() == 0  # it alone evaluates, logs and saves
    torch.manual_seed(args.seed)
    policy = load_policy(args.policy, dtype=torch.bfloat16 if args.bf16 else None, device=device)
    apply_defaults(args, policy, DEFAULTS)
    if any(count % args.accumulate for count in (args.num_envs, args.minibatch_size, args.anchor_batch_size)):
        raise UserError(
            f"--accumulate {args.accumulate} must divide --num-envs, --minibatch-size and --anchor-batch-size"
        )
    args.acting_groups = args.acting_groups or args.accumulate
    if args.acting_groups < 1 or args.accumulate % args.acting_groups or args.acting_groups % machines.size():
        raise UserError(
            f"--acting-groups {args.acting_groups} must divide --accumulate {args.accumulate}, and be a multiple of "
            f"the {machines.size()} processes"
        )
    real, held_out = data.open_real(args, policy.image_size, train=args.beta > 0)
    policy.set_trainable(args.train)
    policy.gradient_checkpointing = args.gradient_checkpointing
    critic = list(policy.value_head.parameters())
    actor = [p for name, p in policy.named_parameters() if p.requires_grad and not name.startswith("value_head")]
    groups = [dict(params=actor, lr=args.lr), dict(params=critic, lr=args.value_lr)]
    optimizer = AdamW(groups, betas=(0.9, 0.95), weight_decay=0)
    real_batches = None
    if args.beta:
        real_batches = data.Mixture(real, args.anchor_batch_size // args.accumulate, policy.horizon, args.seed)
    held_out_batches = [data.Mixture(held_out, 32, policy.horizon, seed=0)[k] for k in range(8)]

    # resume a killed run, leave a finished one alone
    then = f"next: python eval_real.py standin --policies {args.policy} {args.out}/best --task {args.task}"
    settings = checkpoints.run_settings(args) | {"weights of --policy": policy.sha256()}
    if chief:
        checkpoints.claim(args.out)
    free = {"iterations", "eval_envs", "save_every", "device", "render", "out", "wandb", "debug"}
    state = checkpoints.resume_run(args.out, settings, free)
    start, updates, metrics, best = 0, 0, [], -1.0
    if state:
        start, updates, metrics, best = (state[k] for k in ("iteration", "updates", "metrics", "best"))
        if len(metrics) > args.iterations:  # with the last validation
            if chief:
                page.plot_run(metrics, args.target, args.out / "learning_curve.png")
            print(f"{args.out}: done already, best success in the twin {best:.0%}; {then}")
            return
        del metrics[start:]  # a last validation, if more iterations are asked for now
        policy.load_state_dict(state["policy"], strict=False)  # what is frozen is --policy's
        optimizer.load_state_dict(state["optimizer"])
        print(f"{args.out}: resuming at iteration {start}")
    training, twin, target = make_worlds(args, policy.image_size)
    if chief:
        used = [real, held_out] if args.beta else [held_out]
        checkpoints.note_origin(args, start, device, settings["weights of --policy"], used)
        writer = page.start_log(args, settings, start)
        saver = checkpoints.RunSaver(args.out, settings, policy)
    decisions = math.ceil(training.max_episode_steps / policy.chunk)  # a rollout holds the longest episode
    print(
        f"{args.policy}: {sum(p.numel() for p in actor):,} weights of the actor and "
        f"{sum(p.numel() for p in critic):,} of the critic train on {device}; {args.num_envs} x {decisions} decisions "
        f"an iteration; beta {args.beta}"
    )

    bar = tqdm(total=args.iterations, initial=start, desc="stage II", unit="iteration", disable=not chief)
    for iteration in range(start, args.iterations + 1):  # the last time it only validates
        log = dict(iteration=iteration)
        if chief and (iteration % args.eval_every == 0 or iteration == args.iterations):
            worlds = {"twin": twin, args.target: target}
            video = args.out / f"videos/iteration_{iteration}.mp4"
            log |= page.validate(policy, worlds, args.eval_episodes, held_out_batches, video)
            page.log_video(writer, video, iteration)
            # A checkpoint is chosen in the twin, which needs no robot; of equally good ones the later is kept.
            if log["eval/success_twin"] >= best:
                best = log["eval/success_twin"]
                policy.save(args.out / "best")

        if iteration < args.iterations:
            began = time.time()
            first_seed = envs.rl_seed(args.seed, iteration)
            experience = rollout(policy, training, first_seed, decisions, args.acting_groups)
            names = ("reward", "value", "last_value", "truncated_value", "terminated", "truncated")
            columns = [experience[name] for name in names]
            experience["advantage"], experience["returns"] = gae(*columns, args.gamma, args.gae_lambda)
            log |= rollout_metrics(experience, seconds=time.time() - began)
            log |= update(policy, optimizer, experience, real_batches, updates, iteration, args)
            updates += log["time/updates"]
            del experience  # before the next rollout: observations are large where they hold the prefix
            log["time/iteration_seconds"] = time.time() - began
            shown = dict(success=f"{log['rollout/success']:.0%}", kl=f"{log['loss/approx_kl']:.3f}")
            bar.set_postfix(shown, anchor=f"{log['loss/anchor']:.3f}")
            bar.update()
            if chief and iteration == start:
                left = log["time/iteration_seconds"] * (args.iterations - iteration - 1)
                machines.say_if_slow(left, "fewer --iterations or --num-envs, smaller pictures, a GPU")

        metrics.append(log)
        stop_if_diverged(metrics, args)
        if chief:
            for key, value in log.items():
                writer.add_scalar(key, value, iteration)
            writer.flush()
            checkpoints.write_file(args.out / "metrics.json", metrics)
        if (iteration + 1) % args.save_every == 0 or iteration >= args.iterations - 1:
            moments = optimizer.state_dict()  # of all processes
            if chief:
                done = min(iteration + 1, args.iterations)
                saver.save(iteration=done, updates=updates, best=best, metrics=metrics, optimizer=moments)

    if chief:
        saver.close()
    machines.wait()  # the last checkpoint is there for all
    if not chief:
        return training.close()
    page.plot_run(metrics, args.target, args.out / "learning_curve.png")
    for opened in (bar, writer, training, twin, target):
        opened.close()
    print(
        f"{args.out}/best: success in the twin {best:.0%} on {args.eval_episodes} validation episodes; curve in "
        f"{args.out}/learning_curve.png; tensorboard --logdir {args.out}; {then}"
    )


def stop_if_diverged(metrics: list[dict], args):
    """UserError if a policy that once succeeded has not done so in four rollouts, or a critic has been worse than none
    in three: neither will come back."""
    success = [log["rollout/success"] for log in metrics if "rollout/success" in log]
    explained = [log["rollout/explained_variance"] for log in metrics if "rollout/explained_variance" in log]
    why = None
    if len(success) >= 4 and max(success[-4:]) == 0 and max(success) > 0.1:
        why = "the policy collapsed: rollout/success was 0 four times; take a lower --lr or --target-kl"
    if len(explained) >= 3 and max(explained[-3:]) < -10:  # -0.5 at worst in the runs of results/
        why = f"the critic ran away: rollout/explained_variance is {explained[-1]:.0f}; take a lower --value-lr"
    if why:
        raise UserError(f"iteration {len(success) - 1}: {why} and another --out. {args.out} keeps the last checkpoint")


if __name__ == "__main__":
    args = tyro.cli(Args)
    checkpoints.one_line_errors(args.debug)
    main(args)
