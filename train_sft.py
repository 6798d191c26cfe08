"""Stage I of RL-Co: supervised co-training on simulated and real demonstrations (arXiv 2602.12628, section III).

    L_SFT(theta; alpha) = alpha * E_{D_sim}[l] + (1 - alpha) * E_{D_real}[l]

    python train_sft.py                                  # SFT co-training of the tiny pi0.5 on push cube
    python train_sft.py --alpha 0 --out runs/real_only   # the real-only baseline

Without a robot the real demonstrations come from the stand-in; the default data is collected when it is missing.
Progress is in OUT/tensorboard, checkpoints in OUT/best and OUT/last. The same command again resumes a killed run.
"""
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import data
import envs
from policy import AdamW, index_obs, load_policy, read_file, write_file


@dataclass
class Args:
    """Stage I: supervised fine-tuning on real and simulated demonstrations mixed at ratio alpha."""

    policy: str = "tiny-pi05"
    """a preset (random weights), a checkpoint's folder or its name on the Hub"""
    task: str = "push_cube"
    """a task of envs.py; names the default data and the environment that is evaluated in"""
    target: str = "standin"
    """the domain of envs.py that plays the robot: its demonstrations are the real ones, and it is evaluated in"""
    sim: Path | None = None
    """simulated demonstrations, a LeRobot dataset (default: demos/TASK-twin)"""
    real: Path | None = None
    """real demonstrations, a LeRobot dataset (default: demos/TASK-TARGET)"""
    num_real: int | None = None
    """use only the first so many real demonstrations (default: all)"""
    real_val: Path | None = None
    """held-out real demonstrations, on which only the imitation loss is measured (default: demos/TASK-TARGET-val)"""
    alpha: float = 0.8
    """share of simulated samples, exact over the batches together: 0 is real-only, 1 is sim-only"""
    train: Literal["expert", "lora", "all"] = "all"
    """which weights train: all but those that embed the observation, LoRA, or all"""
    steps: int = 3000
    """gradient steps; 1000 show what there is to see sooner, tiny-openvla wants 2000"""
    batch_size: int = 128
    """samples in a gradient step"""
    accumulate: int = 1
    """backward passes in a gradient step: more of them need less memory"""
    bf16: bool = False
    """weights in bfloat16, to fit a large policy on a GPU: all but heads, LoRA, and pi0.5's embeddings, norms and action
    projections; what trains of them is updated in float32 copies"""
    gradient_checkpointing: bool = False
    """compute activations twice instead of keeping them"""
    lr: float = 1e-3
    """peak learning rate; 2 % linear warm-up, then a cosine to a tenth"""
    weight_decay: float = 1e-4
    """of AdamW"""
    max_grad_norm: float = 1.0
    """gradients are clipped to it, all weights together"""
    evaluations: int = 2
    """evaluations in the twin and the target, the last one at the end"""
    eval_episodes: int = 64
    """episodes of each evaluation, on validation seeds"""
    num_envs: int = 32
    """environments that evaluate in parallel, spread over the cores"""
    workers: int | None = None
    """processes that load batches (default: none while all frames fit in memory, else one a core)"""
    seed: int = 1
    """of the weights, the batches and the policy's noise"""
    out: Path = Path("runs/sft")
    """folder of the run"""
    wandb: bool = False
    """also log to Weights & Biases (pip install wandb)"""


def main(args: Args):
    at_least_1 = "steps", "batch_size", "accumulate", "evaluations", "eval_episodes", "num_envs"
    if low := [name for name in at_least_1 if getattr(args, name) < 1]:
        raise ValueError(f"{', '.join(low)}: at least 1")
    demos = dict(sim=args.sim or Path(f"demos/{args.task}-twin"),
                 real=args.real or Path(f"demos/{args.task}-{args.target}"),
                 val=args.real_val or Path(f"demos/{args.task}-{args.target}-val"))
    if not (args.sim or args.real or args.real_val) and not all(path.exists() for path in demos.values()):
        data.main(data.Args(task=args.task, target=args.target))
    hz = envs.CONTROL_HZ
    real = data.load_dataset(demos["real"], num_episodes=args.num_real, fps=hz) if args.alpha < 1 else None
    sim = data.load_dataset(demos["sim"], fps=hz) if args.alpha > 0 else None
    val = data.load_dataset(demos["val"], fps=hz)

    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = load_policy(args.policy, stats=data.statistics(*(d for d in (real, sim) if d is not None)),
                         dtype=torch.bfloat16 if args.bf16 else None, device=device)
    policy.freeze(args.train)
    policy.gradient_checkpointing = args.gradient_checkpointing
    optimizer = AdamW([dict(params=[p for p in policy.parameters() if p.requires_grad])], lr=args.lr, betas=(0.9, 0.95),
                      weight_decay=args.weight_decay)
    trained = optimizer.param_groups[0]["params"]

    def schedule(step):
        warmup = min(1, (step + 1) / (0.02 * args.steps))
        return warmup * (0.1 + 0.9 * (1 + math.cos(math.pi * step / args.steps)) / 2)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    in_memory = all(isinstance(d.frames, np.ndarray) for d in (real, sim) if d is not None)
    workers = args.workers if args.workers is not None else 0 if in_memory else len(os.sched_getaffinity(0))
    batches = data.Mixture(real, sim, args.alpha, args.batch_size, policy.horizon, args.seed)
    held_out = data.Mixture(val, None, 0, 256, policy.horizon, seed=0)[0]

    # resume a killed run, leave a finished one alone
    args.out.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(asdict(args), default=str))
    state_file, step, best = args.out / "trainer.pt", 0, -1.0
    if state_file.exists():
        state = read_file(state_file)
        free = {"workers", "num_envs", "out", "wandb"}
        if changed := {k for k, v in settings.items() if state["args"].get(k) != v} - free:
            raise SystemExit(f"{args.out} holds a run with another {', '.join(sorted(changed))}: give another --out, "
                             f"or delete that folder")
        step, best = state["step"], state["best"]
        if step == args.steps:
            print(f"{args.out}: done already, best success in the twin {best:.0%} (validation seeds)")
            return
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        cpu, *cuda = state["rng"]
        torch.set_rng_state(cpu), torch.cuda.set_rng_state_all(cuda)
        print(f"{args.out}: resuming at step {step}")

    write_file(args.out / "args.json", settings)
    if args.wandb:
        import wandb
        wandb.init(project="rlco", name=args.out.name, config=settings, sync_tensorboard=True)
    # what was logged at `step` stays: the step was finished
    writer = SummaryWriter(args.out / "tensorboard", purge_step=step + 1)
    twin, target = (envs.VecEnv(args.task, domain, args.num_envs)
                    for domain in (envs.TWIN, envs.target_domain(args.target)))
    print(f"{args.policy}: {sum(p.numel() for p in trained):,} weights train on {device}; alpha {args.alpha}")

    loader = iter(DataLoader(batches, batch_size=None, sampler=range(step, args.steps), num_workers=workers,
                             generator=torch.Generator()))  # its own: the global one stays where resuming put it
    bar = tqdm(total=args.steps, initial=step, desc="stage I", unit="step")
    for batch in loader:
        optimizer.zero_grad()
        losses = []
        for rows in torch.arange(args.batch_size).chunk(args.accumulate):
            losses.append(policy.sft_loss(index_obs(batch, rows), reduce=False))
            (losses[-1].sum() / args.batch_size).backward()  # alpha is in the batch: its share of simulated samples
        loss = torch.cat(losses).detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
        if not torch.isfinite(grad_norm):
            raise SystemExit(f"step {step}: the loss is {loss.mean().item()}, its gradient {grad_norm.item()}. "
                             f"{args.out} keeps the last good checkpoint; begin again with a lower --lr and "
                             f"another --out")
        optimizer.step()
        scheduler.step()
        step += 1
        bar.update()

        if step % 20 == 0:
            is_sim = batch["is_sim"].to(loss.device)
            for name, rows in (("sim", is_sim), ("real", ~is_sim)):
                if rows.any():
                    writer.add_scalar(f"loss/{name}", loss[rows].mean().item(), step)
            writer.add_scalar("loss/total", loss.mean().item(), step)
            writer.add_scalar("charts/grad_norm", grad_norm.item(), step)
            writer.add_scalar("charts/learning_rate", scheduler.get_last_lr()[0], step)
            bar.set_postfix(loss=f"{loss.mean().item():.3f}")

        if step * args.evaluations % args.steps < args.evaluations:  # evenly, the last at the end
            log = envs.validate(policy, {"twin": twin, args.target: target}, args.eval_episodes, held_out,
                                args.out / f"videos/step_{step}.mp4")
            for key, value in log.items():
                writer.add_scalar(key, value, step)
            if log["eval/success_twin"] >= best:  # chosen in the twin, which needs no robot; of equals the later
                best = log["eval/success_twin"]
                policy.save(args.out / "best")
        if step % 100 == 0 or step == args.steps:
            policy.save(args.out / "last")
            writer.flush()
            write_file(state_file, dict(args=settings, step=step, best=best, policy=policy.state_dict(),
                                        optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict(),
                                        rng=[torch.get_rng_state(), *torch.cuda.get_rng_state_all()[:1]]))
    bar.close(), writer.close(), twin.close(), target.close()
    print(f"{args.out}/best: success in the twin {best:.0%} on {args.eval_episodes} validation episodes; "
          f"tensorboard --logdir {args.out}; next: python train_rlco.py")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"train_sft.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command resumes") from None
