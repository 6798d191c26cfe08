"""Stage I of RL-Co: supervised co-training on simulated and real demonstrations (arXiv 2602.12628, section III).

    L_SFT(theta; alpha) = alpha * E_{D_sim}[l] + (1 - alpha) * E_{D_real}[l]

    python train_sft.py                                  # SFT co-training of the tiny pi0.5 on push cube
    python train_sft.py --alpha 0 --out runs/real_only   # the real-only baseline

Without a robot the real demonstrations come from the stand-in; the default data is collected when it is missing.
Progress is in OUT/tensorboard, checkpoints in OUT/best and OUT/last. The same command again resumes a killed run.
"""

import machines  # isort: skip  # first: it sets how torch's threads wait for each other
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch.utils.data import DataLoader
from tqdm import tqdm

import checkpoints
import data
import envs
import page
from checkpoints import UserError
from machines import AdamW
from policy import apply_defaults, index_obs, keeps_its_stats, load_policy

# Options that nobody gave: from random weights, and for fine-tuning what openpi and OpenVLA's authors (LoRA) published
# (docs/policies.md has all that they did).
DEFAULTS = {
    "tiny": dict(lr=1e-3, weight_decay=1e-4),
    "pi05": dict(lr=2.5e-5, weight_decay=1e-10),
    "openvla": dict(lr=5e-4, weight_decay=0.01),
}


@dataclass
class Args:
    """Stage I: supervised fine-tuning on real and simulated demonstrations mixed at ratio alpha."""

    policy: str = "tiny-pi05"
    """A preset (random weights), a checkpoint's folder or its name on the Hub."""
    task: str = "push_cube"
    """A task of envs.py; it names the default data and the environment that is evaluated in."""
    target: str = "standin"
    """The domain of envs.py that plays the robot: its demonstrations are the real ones, and it is evaluated in."""
    sim: Path | None = None
    """Simulated demonstrations, a LeRobot dataset: its folder or Hub name (default: demos/TASK-twin)."""
    real: Path | None = None
    """Real demonstrations, a LeRobot dataset: its folder or Hub name (default: demos/TASK-TARGET)."""
    num_real: int | None = None
    """Use only the first so many real demonstrations (default: all)."""
    real_val: Path | None = None
    """Held-out real demonstrations, on which the imitation loss is measured (default: demos/TASK-TARGET-val; of --real
    the last tenth)."""
    camera: str | None = None
    """Key of the real datasets' camera, or the end of it, where they have several and it is not clear which."""
    alpha: float = 0.8
    """Share of simulated samples, exact over the batches together: 0 is real-only, 1 is sim-only."""
    train: Literal["expert", "llm", "lora", "all"] = "all"
    """Which weights train: pi0.5's action expert or OpenVLA's language model alone; LoRA adapters, for large policies;
    or all."""
    steps: int = 3000
    """Gradient steps. 1000 show what there is to see sooner, tiny-openvla wants 2000."""
    batch_size: int = 128
    """Samples in a gradient step."""
    accumulate: int = 1
    """Backward passes in a gradient step, of all processes of torchrun together (a multiple of their number): more of
    them need less memory and give the same gradient."""
    bf16: bool = False
    """Keep weights in bfloat16, to fit a large policy on a GPU: all but heads, LoRA, and pi0.5's embeddings, norms and
    action projections. What trains of them is updated in float32 copies."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: a third more time, much less memory."""
    lr: float | None = None
    """Peak learning rate; 2 % linear warm-up, then a cosine to a tenth (default: DEFAULTS, by the policy's size)."""
    weight_decay: float | None = None
    """Weight decay of AdamW (default: DEFAULTS)."""
    max_grad_norm: float = 1.0
    """Norm that gradients are clipped to, all weights together."""
    evaluations: int = 2
    """Evaluations in the twin and the target, evenly spread, the last one at the end."""
    eval_episodes: int = 64
    """Episodes of each evaluation, on validation seeds."""
    num_envs: int = 32
    """Worlds that evaluate in parallel, spread over the cores."""
    save_every: int = 100
    """Steps between saves, from which a killed run goes on. Fewer saves where one takes long."""
    workers: int | None = None
    """Processes that load batches (default: none while all frames fit in memory, else one a core)."""
    seed: int = 1
    """Seed of the weights, the batches and the policy's noise."""
    out: Path = Path("runs/sft")
    """Folder of the run."""
    device: str = "auto"
    """Where the policy computes: cpu, cuda, or a certain GPU such as cuda:1; auto is the GPU if there is one."""
    render: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the simulator renders: auto is the GPU if it can render a picture; cpu leaves its memory to the policy."""
    wandb: bool = False
    """Also log to Weights & Biases (pip install wandb)."""
    debug: bool = False
    """Show the traceback of an error in the input, too."""


def main(args: Args):
    checkpoints.require_counts(args, "steps batch_size accumulate save_every evaluations eval_episodes num_envs")
    if args.batch_size % args.accumulate:
        raise UserError(f"--accumulate {args.accumulate} must divide --batch-size {args.batch_size}")
    device = machines.start(args.device, args.accumulate)
    chief = machines.rank() == 0  # it alone collects, evaluates, logs and saves
    torch.manual_seed(args.seed)
    policy = load_policy(args.policy, dtype=torch.bfloat16 if args.bf16 else None, device=device)
    apply_defaults(args, policy, DEFAULTS)
    if chief:
        data.collect_missing(args, policy.image_size)
    machines.wait()
    real, held_out = data.open_real(args, policy.image_size, train=args.alpha < 1)
    sim = data.open_sim(args, policy.image_size) if args.alpha > 0 else None
    trained_on = [dataset for dataset in (real, sim) if dataset is not None]
    stats = data.statistics(real, sim, args.alpha)
    if keeps_its_stats(policy, stats):
        print(f"{args.policy}: states and actions stay normalised as they were for it, not by this data")
    else:
        policy.stats = stats
    policy.set_trainable(args.train)
    policy.gradient_checkpointing = args.gradient_checkpointing
    trainable = [p for p in policy.parameters() if p.requires_grad]
    optimizer = AdamW([dict(params=trainable)], lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay)

    def schedule(step):
        warmup = min(1, (step + 1) / (0.02 * args.steps))
        return warmup * (0.1 + 0.9 * (1 + math.cos(math.pi * step / args.steps)) / 2)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    batches = data.Mixture(real, args.batch_size, policy.horizon, args.seed, sim=sim, alpha=args.alpha)
    held_out_batches = [data.Mixture(held_out, 32, policy.horizon, seed=0)[k] for k in range(8)]
    workers = args.workers
    if workers is None:  # decoding pictures is what takes time
        in_memory = all(isinstance(dataset.frames, np.ndarray) for dataset in trained_on)
        workers = 0 if in_memory else len(os.sched_getaffinity(0))

    # resume a killed run, leave a finished one alone
    then = f"next: python train_rlco.py --policy {args.out}/best --task {args.task}"
    settings = checkpoints.run_settings(args)
    step = 0
    best = -1.0
    if chief:
        checkpoints.claim(args.out)
    free = {"workers", "num_envs", "save_every", "device", "render", "out", "wandb", "debug"}
    state = checkpoints.resume_run(args.out, settings, free)
    if state:
        step = state["step"]
        best = state["best"]
        if step == args.steps:
            print(f"{args.out}: done already, best success in the twin {best:.0%}; {then}")
            return
        policy.load_state_dict(state["policy"], strict=False)  # what is frozen is --policy's
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        print(f"{args.out}: resuming at step {step}")

    if chief:
        # What was logged at `step` stays: the step was finished.
        writer = page.start_log(args, settings, step + 1)
        saver = checkpoints.RunSaver(args.out, settings, policy)
        checkpoints.note_origin(args, step, device, policy.sha256(), [*trained_on, held_out])
        pictures = dict(image_size=policy.image_size, render=args.render)
        twin = envs.VecEnv(args.task, envs.TWIN, args.num_envs, **pictures)
        target = envs.VecEnv(args.task, envs.target_domain(args.target), args.num_envs, **pictures)
    print(f"{args.policy}: {sum(p.numel() for p in trainable):,} weights train on {device}; alpha {args.alpha}")

    todo = range(step, args.steps)
    patience = checkpoints.HANGS if workers else 0
    loader = DataLoader(batches, batch_size=None, sampler=todo, num_workers=workers, timeout=patience)
    began = time.time()
    bar = tqdm(total=args.steps, initial=step, desc="stage I", unit="step", disable=not chief)
    for batch in loader:
        optimizer.zero_grad()
        losses = []
        for m in machines.own(args.accumulate):
            machines.seed("loss", args.seed, step, m)
            loss = policy.sft_loss(index_obs(batch, slice(m, None, args.accumulate)), reduce=False)
            # alpha is in the batch: it is the share of simulated samples in it
            (loss.sum() / args.batch_size).backward()
            losses.append(loss.detach())
        loss = machines.gather(torch.stack(losses, -1)).flatten()  # of all micro-batches, in the order of the samples
        grad_norm = optimizer.clip(args.max_grad_norm)
        if not math.isfinite(grad_norm):
            raise UserError(
                f"step {step}: the loss is {loss.mean().item()}, its gradient {grad_norm}. {args.out} keeps the last "
                f"good checkpoint; begin again with a lower --lr and another --out"
            )
        optimizer.step()
        scheduler.step()
        step += 1
        bar.update()

        if chief and step % 20 == 0:
            is_sim = batch["is_sim"].to(loss.device)
            for name, rows in (("sim", is_sim), ("real", ~is_sim)):
                if rows.any():
                    writer.add_scalar(f"loss/{name}", loss[rows].mean().item(), step)
            writer.add_scalar("loss/total", loss.mean().item(), step)
            writer.add_scalar("charts/grad_norm", grad_norm, step)
            writer.add_scalar("charts/learning_rate", scheduler.get_last_lr()[0], step)
            bar.set_postfix(loss=f"{loss.mean().item():.3f}")
        if chief and step - todo.start == 20:
            left = (time.time() - began) / 20 * (args.steps - step)
            machines.say_if_slow(left, "fewer --steps, a smaller --batch-size, smaller pictures in the dataset, a GPU")

        if chief and step * args.evaluations % args.steps < args.evaluations:  # evenly, the last at the end
            worlds = {"twin": twin, args.target: target}
            video = args.out / f"videos/step_{step}.mp4"
            log = page.validate(policy, worlds, args.eval_episodes, held_out_batches, video)
            page.log_video(writer, video, step)
            for key, value in log.items():
                writer.add_scalar(key, value, step)
            # A checkpoint is chosen in the twin, which needs no robot; of equally good ones the later is kept.
            if log["eval/success_twin"] >= best:
                best = log["eval/success_twin"]
                policy.save(args.out / "best")
        if step % args.save_every == 0 or step == args.steps:
            moments = optimizer.state_dict()  # of all processes
            if chief:
                writer.flush()
                saver.save(step=step, best=best, optimizer=moments, scheduler=scheduler.state_dict())
    for opened in (saver, bar, writer, twin, target) if chief else ():
        opened.close()
    machines.wait()  # the last checkpoint is there for all
    print(
        f"{args.out}/best: success in the twin {best:.0%} on {args.eval_episodes} validation episodes; "
        f"tensorboard --logdir {args.out}; {then}"
    )


if __name__ == "__main__":
    args = tyro.cli(Args)
    checkpoints.one_line_errors(args.debug)
    main(args)
