"""Success rates of checkpoints: on the robot's stand-in, and in the twin. The comparison table, videos, a JSON file.

    python eval_real.py                                              # stage I beside stage II, the defaults' checkpoints
    python eval_real.py --policies runs/real_only/best runs/sft/best runs/rlco/best --episodes 200

The stand-in is a second simulated domain that is never trained on by RL; it is not a real robot. Evaluation seeds are
disjoint from those of training, of the demonstrations and of the validation during training. The same command gives
the same numbers.
"""
import json
import math
import os
import platform
import subprocess
from importlib.metadata import version
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro

import envs
from policy import load_policy


@dataclass
class Args:
    """Evaluate checkpoints: success rate with a 95 % Wilson interval, mean episode length, videos."""

    policies: tuple[str, ...] = ("runs/sft/best", "runs/rlco/best")
    """checkpoints to compare: folders, or names on the Hub"""
    task: str = "push_cube"
    """a task of envs.py"""
    target: str = "standin"
    """where, beside the twin: a domain of envs.py; the stand-in plays the real robot"""
    episodes: int = 100
    """episodes for each checkpoint and domain, the same for all of them"""
    num_envs: int = 32
    """environments in parallel, spread over the cores"""
    videos: int = 2
    """recorded episodes of each kind, successes and failures, of each checkpoint; 0 records nothing"""
    out: Path = Path("runs/eval")
    """folder of results.json and the videos"""


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % confidence interval of a success rate (Wilson 1927), also right near 0 and 1."""
    p = successes / n
    center, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (center - half) / (1 + z * z / n), (center + half) / (1 + z * z / n)


def table(results: list[dict]) -> str:
    """Markdown: a row for each checkpoint, a column for each domain."""
    domains = list(dict.fromkeys(r["domain"] for r in results))
    lines = ["| checkpoint | " + " | ".join(f"{d}{' (not a real robot)' if d == 'standin' else ''}: success [95 %], "
                                            f"steps" for d in domains) + " |", "| --- |" + " --- |" * len(domains)]
    for policy in dict.fromkeys(r["policy"] for r in results):
        cells = [f"{100 * r['success_rate']:.0f} % [{100 * r['wilson'][0]:.0f}, {100 * r['wilson'][1]:.0f}] of "
                 f"{r['episodes']}, {r['mean_length']:.0f}" for d in domains for r in results
                 if r["policy"] == policy and r["domain"] == d]
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(args: Args):
    if missing := [p for p in args.policies if p in Args.policies and not Path(p).exists()]:
        raise FileNotFoundError(f"{', '.join(missing)}: no such checkpoint; `python train_sft.py` makes runs/sft/best, "
                                f"then `python train_rlco.py` runs/rlco/best")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policies = {name: load_policy(name, device=device) for name in args.policies}
    if args.target not in envs.DOMAINS or args.episodes < 1:
        raise ValueError(f"--target is one of {', '.join(envs.DOMAINS)} (envs.DOMAINS), --episodes at least 1")
    names, repeat = list(dict.fromkeys(["twin", args.target])), provenance()
    seeds = range(envs.SEEDS["evaluation"], envs.SEEDS["evaluation"] + args.episodes)
    args.out.mkdir(parents=True, exist_ok=True)

    acts = {name: lambda obs, p=p: p.act(obs, sample=False).actions.cpu() for name, p in policies.items()}
    worlds = {name: envs.VecEnv(args.task, envs.DOMAINS[name], args.num_envs) for name in names}
    results = []
    for name, world in worlds.items():
        for policy, act in acts.items():
            played = world.evaluate(act, seeds, f"{policy}, {name}")
            successes = int(played["success"].sum())
            results.append(dict(policy=policy, domain=name, task=args.task, episodes=args.episodes,
                                seeds=[seeds[0], seeds[-1]], successes=successes, success_rate=successes / args.episodes,
                                wilson=wilson(successes, args.episodes), mean_length=float(played["length"].mean()),
                                success=played["success"].tolist(), length=played["length"].tolist()))
    write_json(args.out / "results.json", dict(args=json.loads(json.dumps(asdict(args), default=str)), results=results,
                                               **repeat))

    for r in results if args.videos else ():
        chosen = [seed for kind in (True, False)
                  for seed in [s for s, success in zip(seeds, r["success"]) if success == kind][:args.videos]]
        played = worlds[r["domain"]].evaluate(acts[r["policy"]], chosen, "videos", video=True)
        for seed, success, frames in zip(chosen, played["success"], played["frames"]):
            envs.write_video(args.out / f"videos/{r['policy'].strip('./').replace('/', '-')}_{r['domain']}_{seed}_"
                                        f"{'success' if success else 'failure'}.mp4", [frames])
    if args.videos:  # the last checkpoint in all domains side by side, an episode after the other
        played = [world.evaluate(acts[args.policies[-1]], seeds[:4], video=True)["frames"] for world in worlds.values()]
        longest = [max(map(len, episode)) for episode in zip(*played)]
        envs.write_video(args.out / f"{'_and_'.join(names)}.mp4", [
            [frame for frames, n in zip(column, longest) for frame in frames + frames[-1:] * (n + 5 - len(frames))]
            for column in played])
    for world in worlds.values():
        world.close()
    print(f"\n{table(results)}\n\n{args.task}, evaluation seeds {seeds[0]}..{seeds[-1]}; results.json"
          f"{' and videos' if args.videos else ''} in {args.out}")


def write_json(path: Path, content):
    path.with_suffix(".tmp").write_text(json.dumps(content, indent=1))
    os.replace(path.with_suffix(".tmp"), path)


def provenance() -> dict:
    """What else it takes to get the same numbers again."""
    try:
        commit = subprocess.run(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
                                capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        commit = ""
    return dict(commit=commit, python=platform.python_version(), device="cuda" if torch.cuda.is_available() else "cpu",
                cores=os.cpu_count(), threads=torch.get_num_threads(),
                **{name: version(name) for name in ("torch", "transformers", "mani_skill", "sapien", "numpy")})


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (ValueError, OSError) as error:
        raise SystemExit(f"eval_real.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
