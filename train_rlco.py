"""Stage II of RL-Co: PPO in the twin, anchored to the real demonstrations (arXiv 2602.12628, section III).

    L(theta) = L_RL(theta; T_sim) + beta * E_{D_real}[l]

    python train_rlco.py                              # from runs/sft/best, the anchor on
    python train_rlco.py --beta 0 --out runs/rl       # plain RL in the twin

Progress is in OUT/tensorboard and OUT/metrics.json, the curve in OUT/learning_curve.png, checkpoints in OUT/best and
OUT/last. The same command again resumes a killed run at the iteration that it was in.
"""
import io
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import data
import envs
from policy import AdamW, cat_obs, index_obs, load_policy, read_file, write_file


@dataclass
class Args:
    """Stage II: RL in the simulated twin, with a supervised loss on real demonstrations as an anchor."""

    policy: str = "runs/sft/best"
    """the stage I checkpoint: a folder, or a name on the Hub"""
    task: str = "push_cube"
    """a task of envs.py"""
    target: str = "standin"
    """the domain of envs.py that plays the robot: its demonstrations are the real ones, and it is evaluated in"""
    real: Path | None = None
    """real demonstrations of the anchor, a LeRobot dataset (default: demos/TASK-TARGET)"""
    num_real: int | None = None
    """use only the first so many real demonstrations (default: all)"""
    real_val: Path | None = None
    """held-out real demonstrations, on which forgetting is measured (default: demos/TASK-TARGET-val)"""
    beta: float = 0.2
    """weight of the supervised loss on real demonstrations; 0 is plain RL"""
    train: Literal["expert", "lora", "all"] = "all"
    """which weights train: all but those that embed the observation (whose work is then done once), LoRA, or all"""
    iterations: int = 15
    """rollouts, each followed by an update"""
    num_envs: int = 128
    """environments, spread over the cores; each plays one episode, or more, an iteration"""
    update_epochs: int = 2
    """passes over a rollout"""
    minibatch_size: int = 256
    """decisions (chunks) in a gradient step"""
    anchor_batch_size: int = 64
    """real samples in a gradient step"""
    accumulate: int = 1
    """backward passes in a gradient step: more of them need less memory"""
    bf16: bool = False
    """weights in bfloat16, to fit a large policy on a GPU: all but heads, LoRA, and pi0.5's embeddings, norms and action
    projections; what trains of them is updated in float32 copies"""
    gradient_checkpointing: bool = False
    """compute activations twice instead of keeping them"""
    lr: float = 2e-5
    """learning rate of the policy; used beside the default: 1.5e-4 with --train expert, 5e-5 for tiny-openvla"""
    value_lr: float = 3e-3
    """learning rate of the critic, the value head"""
    gamma: float = 0.99
    """discount of a decision (chunk)"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    clip: float = 0.2
    """of the probability ratio"""
    value_clip: float = 0.2
    """how far the clipped value may move from the one at the time of acting"""
    huber_delta: float = 10.0
    """error of the value from which on its loss is linear"""
    value_coef: float = 0.5
    """weight of the value loss"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus"""
    max_grad_norm: float = 1.0
    """gradients are clipped to it, actor and critic together"""
    target_kl: float = 0.05
    """an iteration's update stops when the approximate KL divergence exceeds it (of the log-probability that the ratio
    is made of: the mean over the denoising chain of pi0.5, over the chunk's actions of OpenVLA)"""
    critic_warmup: int = 3
    """first iterations that train only the critic"""
    eval_every: int = 5
    """iterations between evaluations in the twin and the target"""
    eval_episodes: int = 64
    """episodes of each evaluation, on validation seeds"""
    eval_envs: int = 32
    """environments that evaluate in the target"""
    seed: int = 1
    """of the episodes, the policy's noise and the batches"""
    out: Path = Path("runs/rlco")
    """folder of the run"""
    wandb: bool = False
    """also log to Weights & Biases (pip install wandb)"""


def gae(reward, value, last_value, truncated_value, terminated, truncated, gamma, gae_lambda):
    """Generalised advantage estimation over decisions (Schulman 2016, eq. 16) -> advantage, return [T,B].

    All [T,B], but last_value [B], of the observations after the rollout. An episode that was truncated after decision t
    goes on in truncated_value[t], the value of its last observation before the reset; a terminated one has no value
    left. Neither kind of end lets later rewards flow back.
    """
    advantage, last, next_value = torch.zeros_like(reward), torch.zeros_like(last_value), last_value
    for t in reversed(range(len(reward))):
        next_value = torch.where(truncated[t], truncated_value[t], next_value * ~terminated[t])
        last = advantage[t] = (reward[t] + gamma * next_value - value[t]
                               + gamma * gae_lambda * ~(terminated[t] | truncated[t]) * last)
        next_value = value[t]
    return advantage, advantage + value


def rlco_loss(policy, rollout, real_batch, args):
    """The stage II objective on a minibatch of decisions and one of real samples -> loss, its parts (a dict).

    `rollout` has obs, latent, logprob, value, advantage, returns, all as they were when the policy acted. Without
    `real_batch` (beta = 0) there is no anchor. PPO's clipped surrogate (Schulman 2017, eq. 7) and clipped Huber value
    loss.
    """
    logprob, entropy, value = policy.evaluate(rollout["obs"], rollout["latent"])
    log_ratio = logprob - rollout["logprob"]
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
    surrogate = torch.min(ratio * rollout["advantage"], clipped * rollout["advantage"])
    value_clipped = rollout["value"] + (value - rollout["value"]).clamp(-args.value_clip, args.value_clip)
    value_loss = torch.max(*(F.huber_loss(v, rollout["returns"], reduction="none", delta=args.huber_delta)
                             for v in (value, value_clipped))).mean()
    ppo = -surrogate.mean() - args.entropy_coef * entropy.mean() + args.value_coef * value_loss
    anchor = policy.sft_loss(real_batch) if real_batch is not None else torch.zeros_like(ppo)
    parts = dict(ppo=ppo, anchor=anchor, policy=-surrogate.mean(), value=value_loss, entropy=entropy.mean(),
                 approx_kl=(ratio - 1 - log_ratio).mean(), clip_fraction=((ratio - 1).abs() > args.clip).float().mean())
    return ppo + args.beta * anchor, parts


def curve(metrics, key, scale=1.0):
    """[(iteration, value)] of what was logged under `key`."""
    return [(m["iteration"], scale * m[key]) for m in metrics if key in m]


def plot(panels, path, ylabel="success (%)", xlabel="RL iteration"):
    """Curves side by side: panels {title: {label: [curve of each training seed]}}; mean, and min to max shaded."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(panels), figsize=(2 + 4 * len(panels), 3.5), sharey=True, squeeze=False,
                                layout="constrained")
    for axis, (title, curves) in zip(axes[0], panels.items()):
        for label, seeds in curves.items():
            x, y = np.array(seeds, float).transpose(2, 0, 1)
            axis.plot(x[0], y.mean(0), marker="o", markersize=3, label=label)
            axis.fill_between(x[0], y.min(0), y.max(0), alpha=0.2)
        axis.set(title=title, xlabel=xlabel)
        axis.grid(alpha=0.3), axis.legend()
    axes[0, 0].set(ylabel=ylabel, ylim=(0, None))
    figure.savefig(picture := io.BytesIO(), dpi=150), plt.close(figure)
    write_file(Path(path), picture.getvalue())


def plot_run(metrics, target, path):
    """Learning curve of a run: success in the rollouts, and on the validation seeds of the twin and the target."""
    plot({"": {name: [curve(metrics, key, 100)] for name, key in (
        ("twin, exploring", "rollout/success"), ("twin", "eval/success_twin"), (target, f"eval/success_{target}"))}},
         path)


def main(args: Args):
    if args.policy == Args.policy and not Path(args.policy).exists():
        raise FileNotFoundError(f"{args.policy}: no stage I checkpoint; `python train_sft.py` makes it")
    at_least_1 = ("iterations", "num_envs", "update_epochs", "minibatch_size", "anchor_batch_size", "accumulate",
                  "eval_every", "eval_episodes", "eval_envs")
    if low := [name for name in at_least_1 if getattr(args, name) < 1]:
        raise ValueError(f"{', '.join(low)}: at least 1")
    if args.minibatch_size % args.accumulate or args.anchor_batch_size % args.accumulate:
        raise ValueError(f"--accumulate {args.accumulate} must divide --minibatch-size and --anchor-batch-size")
    demos = Path(f"demos/{args.task}-{args.target}")
    real = data.load_dataset(args.real or demos, num_episodes=args.num_real, fps=envs.CONTROL_HZ) if args.beta else None
    held_out = data.load_dataset(args.real_val or demos.with_name(f"{demos.name}-val"), fps=envs.CONTROL_HZ)
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = load_policy(args.policy, dtype=torch.bfloat16 if args.bf16 else None, device=device)
    policy.freeze(args.train)
    policy.gradient_checkpointing = args.gradient_checkpointing
    critic = list(policy.value_head.parameters())
    actor = [p for name, p in policy.named_parameters() if p.requires_grad and not name.startswith("value_head")]
    optimizer = AdamW([dict(params=actor, lr=args.lr), dict(params=critic, lr=args.value_lr)], betas=(0.9, 0.95),
                      weight_decay=0)
    actor, critic = (group["params"] for group in optimizer.param_groups)
    if args.beta:
        real_batches = data.Mixture(real, None, 0, args.anchor_batch_size // args.accumulate, policy.horizon, args.seed)
    held_out = data.Mixture(held_out, None, 0, 256, policy.horizon, seed=0)[0]

    # resume a killed run, leave a finished one alone
    args.out.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(asdict(args), default=str))
    settings["weights of --policy"] = policy.sha256()
    state_file, start, updates, metrics, best = args.out / "trainer.pt", 0, 0, [], -1.0
    if state_file.exists():
        state = read_file(state_file)
        free = {"iterations", "eval_envs", "out", "wandb"}
        if changed := {k for k, v in settings.items() if state["args"].get(k) != v} - free:
            raise SystemExit(f"{args.out} holds a run with another {', '.join(sorted(changed))}: give another --out, "
                             f"or delete that folder")
        start, updates, metrics, best = (state[k] for k in ("iteration", "updates", "metrics", "best"))
        if start >= args.iterations:
            plot_run(metrics, args.target, args.out / "learning_curve.png")
            print(f"{args.out}: done already, best success in the twin {best:.0%} (validation seeds)")
            return
        del metrics[start:]  # a last validation, if more iterations are asked for now
        policy.load_state_dict(state["policy"], strict=False)  # what is frozen is --policy's
        optimizer.load_state_dict(state["optimizer"])
        cpu, *cuda = state["rng"]
        torch.set_rng_state(cpu), torch.cuda.set_rng_state_all(cuda)
        print(f"{args.out}: resuming at iteration {start}")

    write_file(args.out / "args.json", settings)
    if args.wandb:
        import wandb
        wandb.init(project="rlco", name=args.out.name, config=settings, sync_tensorboard=True)
    writer = SummaryWriter(args.out / "tensorboard", purge_step=start)
    twin = envs.VecEnv(args.task, envs.TWIN, args.num_envs)
    target = envs.VecEnv(args.task, envs.target_domain(args.target), args.eval_envs)
    decisions = -(-twin.max_episode_steps // policy.chunk)  # a rollout: the longest episode
    print(f"{args.policy}: {sum(p.numel() for p in actor):,} weights of the actor and "
          f"{sum(p.numel() for p in critic):,} of the critic train on {device}; {args.num_envs} x {decisions} "
          f"decisions an iteration; beta {args.beta}")

    def validate(iteration):
        nonlocal best
        log = envs.validate(policy, {"twin": twin, args.target: target}, args.eval_episodes, held_out,
                            args.out / f"videos/iteration_{iteration}.mp4")
        if log["eval/success_twin"] >= best:  # chosen in the twin, which needs no robot; of equals the later
            best = log["eval/success_twin"]
            policy.save(args.out / "best")
        return log

    bar = tqdm(range(start, args.iterations), initial=start, total=args.iterations, desc="stage II", unit="iteration")
    for iteration in bar:
        log = dict(iteration=iteration)
        if iteration % args.eval_every == 0:
            log |= validate(iteration)
        began = time.time()

        # rollout in the twin; every iteration has its own episodes, also in a resumed run
        obs = twin.reset(envs.rl_seed(args.seed, iteration))
        steps, rollout = [], None  # frees the last one's observations, which are large where they hold the prefix
        for _ in range(decisions):
            obs = policy.encode(obs)
            decision = policy.act(obs, sample=True)
            next_obs, reward, terminated, truncated, info = twin.step(decision.actions.cpu())
            truncated_value = torch.zeros(args.num_envs)
            if truncated.any():
                truncated_value[truncated] = policy.value(info["final_obs"]).cpu()
            steps.append(dict(obs=obs, latent=decision.latent, logprob=decision.logprob, value=decision.value,
                              reward=reward, terminated=terminated, truncated=truncated,
                              truncated_value=truncated_value, length=info["length"]))
            obs = next_obs

        # advantages
        column = {k: torch.stack([s[k] for s in steps]).to(device) for k in steps[0] if k not in ("obs", "latent")}
        done = column["terminated"] | column["truncated"]
        advantage, returns = gae(column["reward"], column["value"], policy.value(obs), column["truncated_value"],
                                 column["terminated"], column["truncated"], args.gamma, args.gae_lambda)
        explained = 1 - (returns - column["value"]).var() / returns.var().clamp(min=1e-8)
        first = done.float().argmax(0)  # an environment's first episode: later ones may be cut by the rollout's end
        log["rollout/success"] = column["terminated"].gather(0, first[None]).float().mean().item()
        log["rollout/return"] = (column["reward"] * (torch.arange(decisions, device=device)[:, None] <= first)
                                 ).sum(0).mean().item()
        log["rollout/explained_variance"] = explained.item()
        executed = column["length"][-1].sum() + (column["length"] * done)[:-1].sum()
        log["time/rollout_steps_per_second"] = executed.item() / (time.time() - began)

        # update
        rollout = dict(obs=cat_obs([s["obs"] for s in steps]), latent=torch.cat([s["latent"] for s in steps]),
                       logprob=column["logprob"].flatten(), value=column["value"].flatten(),
                       returns=returns.flatten(), advantage=((advantage - advantage.mean()) / (advantage.std() + 1e-8)
                                                             ).flatten())
        del steps
        warming_up, history = iteration < args.critic_warmup, []
        size = len(rollout["logprob"])
        epochs = (torch.randperm(size).split(args.minibatch_size) for _ in range(args.update_epochs))
        for rows in (rows for epoch in epochs for rows in epoch):
            optimizer.zero_grad()
            micro_parts = []
            for part, micro in enumerate(rows.chunk(args.accumulate)):
                minibatch = {k: index_obs(v, micro) if k == "obs" else v[micro] for k, v in rollout.items()}
                anchored = args.beta and not warming_up
                real_batch = real_batches[updates * args.accumulate + part] if anchored else None
                loss, parts = rlco_loss(policy, minibatch, real_batch, args)
                ((parts["value"] if warming_up else loss) * len(micro) / len(rows)).backward()
                micro_parts.append({k: v.item() for k, v in parts.items()})
            step = {k: float(np.mean([m[k] for m in micro_parts])) for k in micro_parts[0]}
            if step["approx_kl"] > args.target_kl:
                break
            if warming_up:
                for p in actor:
                    p.grad = None
            step["grad_norm"] = torch.nn.utils.clip_grad_norm_(actor + critic, args.max_grad_norm).item()
            if not math.isfinite(step["grad_norm"] + step["ppo"] + step["anchor"]):
                raise SystemExit(f"iteration {iteration}: the gradient is {step['grad_norm']}, the loss {step['ppo']} "
                                 f"+ beta * {step['anchor']}. {args.out} keeps the last good checkpoint; begin again "
                                 f"with a lower --lr and another --out")
            optimizer.step()
            history.append(step)
            updates += 1
        if not history:
            raise SystemExit(f"iteration {iteration}: the KL divergence exceeds --target-kl {args.target_kl} before "
                             f"the first step: acting and evaluating disagree; {args.out} keeps the last good checkpoint")

        # log
        log |= {f"loss/{k}": float(np.mean([h[k] for h in history])) for k in history[0]}
        log["loss/anchor_to_ppo"] = args.beta * log["loss/anchor"] / (abs(log["loss/ppo"]) + 1e-8)
        log["time/updates"] = len(history)
        log["time/iteration_seconds"] = time.time() - began
        metrics.append(log)
        recent = [m["rollout/success"] for m in metrics[-4:]]
        if len(recent) == 4 and max(recent) == 0 and max(m["rollout/success"] for m in metrics) > 0.1:
            raise SystemExit(f"the policy collapsed: no success in iterations {iteration - 3} to {iteration}. "
                             f"{args.out}/best is the best checkpoint; begin again with a lower --lr or --target-kl "
                             f"and another --out")
        bar.set_postfix(success=f"{log['rollout/success']:.0%}", kl=f"{log['loss/approx_kl']:.3f}",
                        anchor=f"{log['loss/anchor']:.3f}")
        if iteration + 1 == args.iterations:
            metrics.append(dict(iteration=args.iterations, **validate(args.iterations)))
        for entry in metrics[iteration:]:
            for key, value in entry.items():
                writer.add_scalar(key, value, entry["iteration"])
        policy.save(args.out / "last")
        writer.flush()
        write_file(args.out / "metrics.json", metrics)
        write_file(state_file, dict(args=settings, iteration=iteration + 1, updates=updates, best=best, metrics=metrics,
                                    policy={n: p.detach() for n, p in policy.named_parameters() if p.requires_grad},
                                    optimizer=optimizer.state_dict(),
                                    rng=[torch.get_rng_state(), *torch.cuda.get_rng_state_all()[:1]]))

    plot_run(metrics, args.target, args.out / "learning_curve.png")
    writer.close(), twin.close(), target.close()
    print(f"{args.out}/best: success in the twin {best:.0%} on {args.eval_episodes} validation episodes; curve in "
          f"{args.out}/learning_curve.png; tensorboard --logdir {args.out}; next: python eval_real.py")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"train_rlco.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command resumes") from None
