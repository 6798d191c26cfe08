"""Success rates of checkpoints, in the twin and the stand-in or on a real arm; and a server for any other robot.

    python eval_real.py                                     # `standin` with its defaults: stage I beside stage II
    python eval_real.py standin --policies runs/real_only/best runs/sft/best runs/rlco/best --episodes 200
    python eval_real.py franka --robot-ip 172.16.0.2 --trials 20    # a real arm; --dry-run moves nothing
    python eval_real.py align                               # the camera's picture over the twin's
    python eval_real.py serve --policy runs/rlco/best       # for any robot, through openpi's client

The stand-in is a second simulated domain that is never trained on by RL; it is not a real robot. Evaluation seeds are
disjoint from those of training, of the demonstrations and of the validation during training. The same command gives
the same numbers.
"""

import machines  # isort: skip  # first: it sets how torch's threads wait for each other
import ctypes
import hmac
import html
import itertools
import logging
import math
import os
import re
import socket
import struct
import threading
import time
import traceback
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

import envs
from checkpoints import UserError, claim, one_line_errors, provenance, read_file, robot_dims, write_file
from data import in_order, worker_pool
from page import film, greedy, html_table, learning_curves, write_page, write_video
from policy import Policy, load_policy
from robot import Camera, Franka, Keyboard, Rig, Stopped, get_ready, play, show_overlay


@dataclass
class CommonArgs:
    task: str = "push_cube"
    """A task of envs.py: its scene, its instruction and its limit of control steps."""
    debug: bool = False
    """Show the traceback of an error in the input, too."""


@dataclass
class EvaluationArgs(CommonArgs):
    policies: tuple[str, ...] = ("runs/sft/best", "runs/rlco/best")
    """Checkpoints to compare: folders, or names on the Hub."""
    variation: Literal[envs.VARIATIONS] | None = None
    """What is changed to something unseen in training: the object, the positions, or the robot's starting poses."""
    device: str = "auto"
    """Where the policy computes: cpu, cuda, or a certain GPU such as cuda:1; auto is the GPU if there is one."""
    out: Path = Path("runs/eval")
    """Folder of the results and the videos. Trials on an arm go on in the folder that they began in."""


# -------------------------------------------------------------------------------------------------------- success rates
def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % confidence interval of a success rate (Wilson 1927), also right near 0 and 1."""
    p = successes / n
    center = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, center - half) / scale, min(1.0, (center + half) / scale)  # rounding may leave 0..1


def summary(policy: str, domain: str, task: str, success: list[bool], length: list[int]) -> dict:
    """A cell of the table: how a checkpoint did in its episodes or trials, `length` in control steps."""
    n = len(success)
    successes = int(sum(success))
    rate = dict(successes=successes, success_rate=successes / n, wilson=list(wilson(successes, n)))
    return dict(policy=policy, domain=domain, task=task, episodes=n, **rate, mean_length=float(np.mean(length)))


def sign_test(gained: int, lost: int) -> float:
    """p-value of the exact two-sided sign test, McNemar's: episodes that differ fall either way as a coin does."""
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**n)


def is_settled(gained: int, lost: int) -> bool:
    """Whether a difference is clear at 5 %, however often one has looked at it before.

    A p-value that is looked at after each trial is below 0.05 sooner or later. The Bayes factor of all coins against
    the fair one is not: where there is no difference, it reaches 20 once in 20 evaluations at most (Ville 1939).
    """
    n = gained + lost
    return 2**n / ((n + 1) * math.comb(n, gained)) >= 20


def paired(before: dict[int, bool], after: dict[int, bool], z: float = 1.959964) -> dict:
    """How much more often `after` succeeds than `before`, which hold success by seed: over the seeds that both have
    played, so that how difficult these are takes no part. `interval` is Bonett and Price's (2012), which adds an
    episode of either kind that differs, and so is right for few episodes, too."""
    seeds = before.keys() & after.keys()
    n = len(seeds)
    gained = sum(after[seed] and not before[seed] for seed in seeds)
    lost = sum(before[seed] and not after[seed] for seed in seeds)
    more = (gained + 1) / (n + 2)
    less = (lost + 1) / (n + 2)
    half = z * math.sqrt((more + less - (more - less) ** 2) / (n + 2))
    interval = (max(-1.0, more - less - half), min(1.0, more - less + half))
    test = dict(p=sign_test(gained, lost), settled=is_settled(gained, lost))
    return dict(episodes=n, difference=(gained - lost) / n, interval=interval, gained=gained, lost=lost, **test)


def differences(outcomes: dict[str, dict[str, dict[int, bool]]]) -> list[dict]:
    """Every two checkpoints compared in every domain, from success by domain, checkpoint and seed."""
    found = []
    for domain, by_policy in outcomes.items():
        for before, after in itertools.combinations(by_policy, 2):
            if by_policy[before].keys() & by_policy[after].keys():
                pair = dict(domain=domain, before=before, after=after)
                found.append(pair | paired(by_policy[before], by_policy[after]))
    return found


def smallest_visible(n: int) -> int | None:
    """The smallest difference in points between true success rates, which lie around 50 %, that `sign_test` finds
    (p < 0.05) in four of five evaluations of n episodes; None if so few find none. Where one start is harder than
    another, for both, it is smaller."""
    clear = [(k, m) for k in range(n + 1) for m in range(n + 1 - k) if sign_test(k, m) < 0.05]
    for points in range(5, 101, 5):
        gain = (0.5 + points / 200) ** 2  # one succeeds and the other fails, or the other way round
        loss = (0.5 - points / 200) ** 2
        power = 0.0
        for k, m in clear:
            ways = math.comb(n, k) * math.comb(n - k, m)
            power += ways * gain**k * loss**m * (1 - gain - loss) ** (n - k - m)
        if power >= 0.8:
            return points
    return None


def heading(domain: str) -> str:
    simulated = domain in envs.DOMAINS and domain != "twin"
    return f"{domain}{' (not a real robot)' if simulated else ''}"


def markdown(corner: str, heads: dict[str, str], cells: dict[tuple[str, str], str]) -> str:
    """A table: columns by their keys in `heads`, rows and columns of `cells` by (row, column)."""
    lines = [f"| {corner} | " + " | ".join(heads.values()) + " |", "| --- |" + " --- |" * len(heads)]
    for row in dict.fromkeys(row for row, _ in cells):
        lines.append(f"| {row} | " + " | ".join(cells.get((row, column), "") for column in heads) + " |")
    return "\n".join(lines)


def table(results: list[dict]) -> str:
    """Markdown: a row for each checkpoint, a column for each domain."""
    heads = {r["domain"]: f"{heading(r['domain'])}: success [95 %], mean length" for r in results}
    cells = {}
    for r in results:
        low, high = r["wilson"]
        percent = f"{100 * r['success_rate']:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
        cells[r["policy"], r["domain"]] = f"{percent} of {r['episodes']}, {r['mean_length']:.0f} steps"
    return markdown("checkpoint", heads, cells)


def difference_table(pairs: list[dict]) -> str:
    """Markdown of what `differences` found: a row for each two checkpoints, a column for each domain."""
    heads = {d["domain"]: f"{heading(d['domain'])}: points [95 %], p" for d in pairs}
    cells = {}
    for d in pairs:
        low, high = d["interval"]
        points = f"{100 * d['difference']:+.0f} [{100 * low:+.0f}, {100 * high:+.0f}]"
        counts = f"{d['gained']} better, {d['lost']} worse of {d['episodes']}"
        cells[f"{d['after']} − {d['before']}", d["domain"]] = f"{points}, {p_value(d['p'])}; {counts}"
    return markdown("difference, on the same starts", heads, cells)


def report(results: list[dict], pairs: list[dict]) -> str:
    """The tables of an evaluation."""
    return table(results) + ("\n\n" + difference_table(pairs) if pairs else "")


def load_policies(names: tuple[str, ...], device: str) -> dict[str, Policy]:
    missing = [name for name in names if name in EvaluationArgs.policies and not Path(name).exists()]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: no such checkpoint; `python train_sft.py` makes runs/sft/best, then "
            f"`python train_rlco.py` runs/rlco/best"
        )
    return {name: load_policy(name, device=machines.find_device(device)) for name in names}


def video_path(out: Path, policy: str, domain: str, seed: int, success: bool) -> Path:
    name = policy.strip("./").replace("/", "-")
    return out / f"videos/{name}_{domain}_{seed}_{'success' if success else 'failure'}.mp4"


def verdict(d: dict) -> str:
    """A sentence on a pair from `differences`."""
    better, worse, sign = (d["after"], d["before"], 1) if d["difference"] >= 0 else (d["before"], d["after"], -1)
    low, high = sorted(sign * 100 * bound for bound in d["interval"])
    points = f"{100 * abs(d['difference']):.0f} points [{low:.0f} to {high:.0f}]"
    more, less = max(d["gained"], d["lost"]), min(d["gained"], d["lost"])
    counts = f"of {d['episodes']} starts it alone succeeds from {more}, the other alone from {less}"
    clear = "clearly better than" if d["p"] < 0.05 else "not clearly better than"
    return f"{heading(d['domain'])}: {better} is {clear} {worse}, by {points}: {counts} ({p_value(d['p'])})"


def p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def write_evaluation(args: EvaluationArgs, what: str, results: list[dict], pairs: list[dict], ends: dict) -> None:
    """OUT/index.html. `ends` is (success, length in control steps) by domain, checkpoint and seed, of all episodes;
    those that have a video show it."""
    domains = list(dict.fromkeys(r["domain"] for r in results))
    names = list(dict.fromkeys(r["policy"] for r in results))
    starts = []
    for seed in dict.fromkeys(seed for _, _, seed in ends):
        rows = []
        for domain in domains:
            cells = []
            for name in names:
                if (domain, name, seed) in ends:
                    success, length = ends[domain, name, seed]
                    video = video_path(args.out, name, domain, seed, success)
                    text = f"{'success' if success else 'failure'} after {length} steps"
                    if not success and length == envs.TASKS[args.task].max_episode_steps:
                        text = f"failure, out of time ({length} steps)"
                    video = str(video.relative_to(args.out)) if video.exists() else None
                    cells.append(dict(name=name, text=text, success=bool(success), video=video))
            if cells:
                differ = len({cell["success"] for cell in cells}) > 1
                rows.append(dict(group=heading(domain), differ=differ, cells=cells))
        starts.append(dict(title=f"start {seed}", rows=rows))
    head = [f"<p>{html.escape(verdict(d))}.</p>" for d in pairs]
    head += [html_table(markdown) for markdown in report(results, pairs).split("\n\n")]
    head.append(
        '<p class="soft">The twin is the simulation that RL acts in; the stand-in is another one that plays the robot: '
        "its demonstrations are imitated, RL never acts in it. Success rates have 95 % Wilson intervals. Differences "
        "are paired, as all checkpoints play the same starts: their intervals are Bonett and Price's, p is the exact "
        "sign test's, and better is clearly better below 0.05. All of that is about these checkpoints: another "
        "training seed gives others. The inset of a video is what the policy saw when it last decided.</p>"
    )
    charts = [one for name in names for one in learning_curves(Path(name).parent)]
    write_page(args.out / "index.html", what, "".join(head), charts, starts, envs.CONTROL_HZ)


# ------------------------------------------------------------------------------------------- in the twin and a stand-in
@dataclass
class StandinArgs(EvaluationArgs):
    """Evaluate checkpoints in the twin and in the stand-in: success rate with a 95 % Wilson interval, mean episode
    length, differences, and a page to look at, OUT/index.html."""

    target: str = "standin"
    """The domain of envs.py that is evaluated in beside the twin: the one that plays the real robot."""
    episodes: int = 100
    """Episodes for each checkpoint and domain, the same for all of them. 100 leave an interval of some 20 points."""
    num_envs: int = 32
    """Environments in parallel, spread over the cores. Another number may change single episodes of the same seeds."""
    seeds: Literal["evaluation", "final"] = "evaluation"
    """Where the episodes come from, a block of envs.SEEDS. Keep final for what was planned before it is looked at."""
    videos: int = 4
    """Starts whose episodes are drawn for OUT/index.html, with every checkpoint in both domains: half of them where
    checkpoints differ. A video takes some 10 seconds of a core. 0 draws nothing."""
    render: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the simulator renders: auto is the GPU if it can render a picture. cpu leaves a GPU's memory to the policy,
    and below some 500 worlds it is fast enough."""


def make_world(args: StandinArgs, domain: str, image_size: int) -> envs.VecEnv:
    looks = dict(variation=args.variation, image_size=image_size, render=args.render)
    return envs.VecEnv(args.task, envs.DOMAINS[domain], args.num_envs, **looks)


def standin(args: StandinArgs) -> None:
    """Play the same episodes with every checkpoint, in the twin and in the target."""
    envs.require_task(args.task)
    if args.target not in envs.DOMAINS:
        raise UserError(f"no domain '{args.target}': --target is one of {', '.join(envs.DOMAINS)} (envs.DOMAINS)")
    if min(args.episodes, args.num_envs) < 1:
        raise UserError("--episodes and --num-envs are at least 1")
    device = machines.start(args.device)
    chief = machines.rank() == 0  # it alone writes
    policies = load_policies(args.policies, "cpu")
    weights = {name: policy.sha256() for name, policy in policies.items()}
    repeat = dict(weights=weights, **provenance(args, str(device)))
    first = envs.SEEDS[args.seeds]
    seeds = range(first, first + args.episodes)
    domains = list(dict.fromkeys(["twin", args.target]))
    if chief:
        claim(args.out)
    saved = machines.gather_objects(finished(args.out / "results.json", repeat))[0]

    cells = [] if saved else list(itertools.product(domains, policies))
    # Processes share blocks of episodes that are played at a time: the same blocks for any number of processes.
    blocks = [seeds[k : k + args.num_envs] for k in range(0, len(seeds), args.num_envs)]
    parts = [(cell, block) for cell in cells for block in blocks]
    played = {cell: {} for cell in cells}  # success, length and states by seed
    worlds = {}  # by domain and size of the pictures
    with ExitStack() as opened:
        for (domain, name), own in itertools.groupby([parts[k] for k in machines.own(len(parts))], itemgetter(0)):
            place = (domain, policies[name].image_size)
            if place not in worlds:
                worlds[place] = opened.enter_context(closing(make_world(args, *place)))
            policy = policies[name].to(device)  # one at a time: several large ones would not fit
            own = [seed for _, block in own for seed in block]
            episodes = worlds[place].play(greedy(policy), own, f"{name}, {domain}" if chief else None)
            columns = (episodes["success"].tolist(), episodes["length"].tolist(), episodes["snapshots"])
            played[domain, name] = dict(zip(own, zip(*columns)))
            policy.to("cpu")
    for shared in machines.gather_objects(played):
        for cell in cells:
            played[cell] |= shared[cell]
    if not chief:
        return
    results = saved["results"] if saved else []
    for domain, name in cells:
        success, length, _ = map(list, zip(*(played[domain, name][seed] for seed in seeds)))
        cell = summary(name, domain, args.task, success, length)
        results.append(dict(cell, seeds=[seeds[0], seeds[-1]], success=success, length=length))
    outcomes = {domain: {} for domain in domains}
    ends = {}
    for r in results:
        outcomes[r["domain"]][r["policy"]] = dict(zip(seeds, r["success"]))
        for seed, success, length in zip(seeds, r["success"], r["length"]):
            ends[r["domain"], r["policy"], seed] = (success, length)
    pairs = differences(outcomes)
    content = dict(results=results, differences=pairs, **repeat)
    what = f"{args.task}, unseen {args.variation}" if args.variation else args.task
    print(f"\n{report(results, pairs)}\n\n{what}, {args.seeds} seeds {seeds[0]}..{seeds[-1]}; {args.out}/results.json")
    if not saved:
        write_file(args.out / "results.json", content)
        films = []
        for domain, name in cells:
            for seed in seeds:  # a video of another evaluation is none of this one
                video_path(args.out, name, domain, seed, outcomes[domain][name][seed]).unlink(missing_ok=True)
        for seed in worth_seeing(outcomes[args.target], args.videos):
            for domain, name in cells:
                path = video_path(args.out, name, domain, seed, outcomes[domain][name][seed])
                *_, states = played[domain, name][seed]
                episode = (seed, states, policies[name].chunk, args.render, policies[name].image_size)
                films.append((path, args.task, envs.DOMAINS[domain], args.variation, *episode))
        write_evaluation(args, what, results, pairs, ends)  # the figures, if drawing is interrupted
        if films:
            draw_videos(films)
            write_evaluation(args, what, results, pairs, ends)
        write_file(args.out / "results.json", dict(content, finished=True))
    learnt = "; ".join(map(verdict, pairs)) or "one checkpoint alone: name more --policies to compare"
    print(f"learnt: {learnt}")
    print(f"look at: {args.out}/index.html, in any browser")
    print("next: the same without the anchor, python train_rlco.py --beta 0 --out runs/rl; or another --task (README)")


def finished(path: Path, repeat: dict) -> dict | None:
    """What an evaluation left at `path` that was just this one: checkpoints, settings, versions, and code as committed.
    None if there is none, or the code is not as it was committed."""
    if not path.exists() or not repeat["commit"] or repeat["commit"].endswith("-dirty"):
        return None
    saved = read_file(path)
    same = all(saved.get(key) == value for key, value in repeat.items())
    return saved if same and saved.get("finished") is True and adds_up(saved.get("results")) else None


def adds_up(results) -> bool:
    """Whether these are cells as `standin` writes them, whose figures are those of their episodes."""
    try:
        for cell in results:
            if not isinstance(cell["policy"], str) or not len(cell["success"]) == len(cell["length"]) > 0:
                return False
            again = summary(*(cell[key] for key in ("policy", "domain", "task", "success", "length")))
            if (
                not set(map(type, cell["success"])) <= {bool}
                or cell["domain"] not in envs.DOMAINS
                or cell | again != cell
            ):
                return False
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError):
        return False
    return True


def worth_seeing(outcomes: dict[str, dict[int, bool]], n: int) -> list[int]:
    """n starts to look at, from success by checkpoint and seed: half of them where the checkpoints differ, and half of
    what is left where the best one fails, as far as there are any; the rest as they come."""
    seeds = list(next(iter(outcomes.values())))
    best = max(outcomes.values(), key=lambda by_seed: sum(by_seed.values()))
    differ = [seed for seed in seeds if len({by_seed[seed] for by_seed in outcomes.values()}) > 1]
    chosen = differ[: (n + 1) // 2]
    failed = [seed for seed in seeds if not best[seed] and seed not in chosen]
    chosen += failed[: (n - len(chosen) + 1) // 2]
    others = [seed for seed in seeds if seed not in chosen]
    return sorted(chosen + others[: n - len(chosen)])


def draw_videos(films: list[tuple]) -> None:
    """Draw `page.film` of all these arguments, on all cores."""
    cores = len(os.sched_getaffinity(0))
    with worker_pool(min(cores, len(films))) as pool:
        for _ in tqdm(in_order(pool, film, films), "videos", len(films), leave=False, unit="video"):
            pass


# -------------------------------------------------------------------------------------------------------- on a real arm
@dataclass
class FrankaArgs(EvaluationArgs):
    """Evaluate checkpoints on a real Franka. For every initial state, each checkpoint in turn: you arrange the scene as
    in OUT/overlay.png, watch, and judge. The same command goes on with the first trial that is missing."""

    trials: int = 10
    """Trials of each checkpoint, all checkpoints from the same initial states."""
    dry_run: bool = False
    """Show what each checkpoint would command first, and move nothing. Do this before the first motion."""
    rig: tyro.conf.OmitArgPrefixes[Rig] = field(default_factory=Rig)
    """The arm, the camera, and limits that every motion keeps."""


def is_trials(saved: dict) -> bool:
    """Whether this is what `Trials` writes, as far as it reads it again."""
    kinds = dict(policy=str, seed=int, success=bool, steps=int, late=int, decisions=int)
    trials = saved.get("trials")
    if not isinstance(trials, list) or not all(isinstance(trial, dict) for trial in trials):
        return False
    if not all(type(trial.get(key)) is kind for trial in trials for key, kind in kinds.items()):
        return False
    return isinstance(saved.get("weights"), dict) and isinstance(saved.get("void"), list) and "task" in saved


class Trials:
    """The trials of an evaluation on the arm, in OUT/franka.json, which is written after each of them."""

    def __init__(self, args: FrankaArgs, policies: dict[str, Policy]):
        claim(args.out)
        self.args = args
        self.path = args.out / "franka.json"
        self.names = list(policies)
        self.seeds = range(envs.SEEDS["evaluation"], envs.SEEDS["evaluation"] + args.trials)
        what = dict(task=args.task, variation=args.variation)
        # weights: hash by checkpoint; trials: those that count; void: those that were stopped or aborted
        self.saved = dict(what, weights={}, trials=[], void=[])
        if self.path.exists():
            self.saved = read_file(self.path)
            if not is_trials(self.saved):
                raise UserError(f"{self.path} is damaged: put back a copy of it, or choose another --out")
        if {key: self.saved.get(key) for key in what} != what:
            found = f"{self.saved['task']}, variation {self.saved.get('variation')}"
            raise UserError(f"{self.path} is an evaluation of {found}: choose another --out")
        weights = {name: policy.sha256() for name, policy in policies.items()}
        changed = [name for name in weights if self.saved["weights"].get(name, weights[name]) != weights[name]]
        if changed:
            names = ", ".join(changed)
            raise UserError(f"{names}: not the checkpoint of the trials in {self.path}: choose another --out")
        self.saved["weights"] |= weights

    def missing(self) -> list[tuple[int, str]]:
        """(seed, checkpoint) of the trials that are still to be made, in their order."""
        done = {(trial["seed"], trial["policy"]) for trial in self.saved["trials"]}
        return [(seed, name) for seed in self.seeds for name in self.names if (seed, name) not in done]

    def add(self, kind: str, **trial) -> None:
        self.saved[kind].append(trial)
        found = dict(results=self.results(), differences=self.differences())
        origin = provenance(self.args, str(machines.find_device(self.args.device)))
        write_file(self.path, dict(self.saved, **found, **origin))

    def differences(self) -> list[dict]:
        """Every two checkpoints compared on the initial states that both have had."""
        outcomes = {name: {} for name in self.names}
        for trial in self.saved["trials"]:
            if trial["policy"] in outcomes:
                outcomes[trial["policy"]][trial["seed"]] = trial["success"]
        return differences(dict(franka=outcomes))

    def write_page(self) -> None:
        """OUT/index.html."""
        ends = {}
        for trial in self.saved["trials"]:
            ends["franka", trial["policy"], trial["seed"]] = (trial["success"], trial["steps"])
        write_evaluation(self.args, f"{self.args.task}, on the arm", self.results(), self.differences(), ends)

    def standing(self) -> str:
        """What is known so far of each two checkpoints, and whether more trials are needed to tell which is better."""
        lines = []
        for d in self.differences():
            verdict = "settled: more trials only narrow the interval" if d["settled"] else "not settled yet"
            points = f"{100 * d['difference']:+.0f} points"
            counts = f"{d['gained']} better, {d['lost']} worse of {d['episodes']}"
            lines.append(f"{d['after']} − {d['before']}: {points}, {counts}; {verdict}")
        return "\n".join(lines)

    def results(self) -> list[dict]:
        """A cell of the table for each checkpoint that has trials."""
        cells = []
        for name in self.names:
            trials = [trial for trial in self.saved["trials"] if trial["policy"] == name]
            success = [trial["success"] for trial in trials]
            if trials:
                cells.append(summary(name, "franka", self.args.task, success, [trial["steps"] for trial in trials]))
        return cells


def franka(args: FrankaArgs) -> None:
    """N trials of every checkpoint, from the same initial states, one state after the other; the operator arranges
    them and judges. Saved after every trial; started again, it goes on with the first trial that is missing."""
    envs.require_task(args.task)
    if args.trials < 1:
        raise UserError("--trials is at least 1")
    policies = load_policies(args.policies, args.device)
    if args.dry_run:
        return dry_run(args, policies)
    trials = Trials(args, policies)
    todo = len(trials.missing())
    if todo:
        if trials.saved["trials"]:
            print(f"{trials.path}: {len(trials.saved['trials'])} trials are done, {todo} to go")
        if len(policies) > 1:
            print(what_trials_show(args.trials))
        env = envs.make(args.task, envs.TWIN, video_size=512, variation=args.variation)
        with closing(Camera(args.rig)) as camera, Keyboard() as keyboard, Franka(args.rig, camera) as robot:
            while trials.missing():
                seed, name = trials.missing()[0]
                title = f"trial {seed - trials.seeds[0] + 1} of {args.trials}, {name}"
                try:
                    get_ready(robot, keyboard, env, seed, title, args.out / "overlay.png")
                    print("y: success, n: failure, a: abort", flush=True)
                    played = play(policies[name], robot, keyboard, env.instruction, env.max_episode_steps)
                    frames = played.pop("frames")
                    key = played.pop("key") or keyboard.ask("success? y, n; a: abort, it does not count", "yna")
                    if key == "a":
                        raise Stopped("aborted by the operator")
                except Stopped as why:
                    trials.add("void", policy=name, seed=seed, why=str(why))
                    print(f"{title}: it does not count. {why}", flush=True)
                    continue
                success = key == "y"
                trials.add("trials", policy=name, seed=seed, success=success, **played)
                write_video(video_path(args.out, name, "franka", seed, success), [frames])
                label = "success" if success else "failure"
                took = f"{played['decision_ms']:.0f} ms on average, {played['slowest_ms']:.0f} at most"
                took += f", {played['late']} of {played['decisions']} late"
                kept = f"{played['kept_inside']} targets were kept inside the workspace"
                print(f"{title}: {label} after {played['steps']} steps; decisions took {took}; {kept}", flush=True)
                if name == trials.names[-1] and len(policies) > 1:
                    print(trials.standing(), flush=True)
    late = sum(trial["late"] for trial in trials.saved["trials"])
    decisions = sum(trial["decisions"] for trial in trials.saved["trials"])
    attempts = f"{len(trials.saved['void'])} attempts were stopped or aborted and do not count"
    speed = f"{late} of {decisions} decisions were late"
    tables = report(trials.results(), trials.differences())
    trials.write_page()
    print(f"\n{tables}\n\n{args.task}; {attempts}; {speed}; {trials.path}")
    print(f"look at: {args.out}/index.html, in any browser; the same command with more --trials goes on")


def what_trials_show(n: int) -> str:
    """What can be learnt from n trials of each checkpoint, said before the first of them."""
    points = smallest_visible(n)
    if points is None:
        return f"{n} trials of each checkpoint settle no difference, however large: 6 are the least, 20 are usual"
    return (
        f"{n} trials of each checkpoint find a difference of {points} points between success rates around 50 % four "
        "times in five; one that is smaller needs more --trials"
    )


def dry_run(args: FrankaArgs, policies: dict[str, Policy]) -> None:
    """Print the targets of every checkpoint's first chunk, from where the arm is."""
    instruction = envs.TASKS[args.task].instruction
    with closing(Camera(args.rig)) as camera, Keyboard() as keyboard, Franka(args.rig, camera, dry_run=True) as robot:
        for name, policy in policies.items():
            print(f"{name}, a dry run: targets x y z (m), roll pitch yaw (rad), gripper; nothing moves")
            try:
                play(policy, robot, keyboard, instruction, policy.chunk)
            except Stopped as why:
                print(f"{name}: {why}", flush=True)


@dataclass
class AlignArgs(CommonArgs):
    """Show the camera's picture over the twin's until Enter, to mount the camera or to correct `envs.TWIN`."""

    out: Path = Path("runs/eval")
    """Folder of overlay.png: the camera's picture, both, and the twin's."""
    rig: tyro.conf.OmitArgPrefixes[Rig] = field(default_factory=Rig)
    """The camera; no arm takes part."""


def align(args: AlignArgs) -> None:
    """Keep OUT/overlay.png up to date until Enter."""
    env = envs.make(args.task, envs.TWIN, video_size=512)
    env.reset(seed=[envs.SEEDS["evaluation"]])
    wanted = env.render_rgb_array()[0].cpu().numpy()
    overlay = args.out / "overlay.png"
    with closing(Camera(args.rig)) as camera, Keyboard() as keyboard:

        def refresh():
            show_overlay(camera, wanted, overlay)

        keyboard.ask(f"{overlay}: camera, both, twin; kept up to date until Enter", "\n", refresh)


# --------------------------------------------------------------------------------------------------------------- server
@dataclass
class ServeArgs(CommonArgs):
    """Serve a checkpoint to any robot, over openpi's websocket protocol."""

    policy: str = "runs/rlco/best"
    """The one checkpoint that is served: a folder, or a name on the Hub."""
    host: str = "127.0.0.1"
    """Address to listen on. Only this machine reaches the default; 0.0.0.0 is every network that it is on."""
    port: int = 8000
    """TCP port to listen on; 0 takes a free one, which is printed."""
    api_key: str = ""
    """Key that clients have to show (openpi's client: `api_key=`), demanded on any but the default address. Better in
    the environment variable RLCO_API_KEY, as a machine's users see each other's command lines."""
    insecure: bool = False
    """Listen on other addresses without a key: whoever reaches the port may use the policy, and keep others waiting."""
    device: str = "auto"
    """Where the policy computes: cpu, cuda, or a certain GPU such as cuda:1; auto is the GPU if there is one."""


def pack_array(x):
    """msgpack's `default` for numpy arrays, as in openpi's client."""
    if isinstance(x, np.ndarray):
        return {b"__ndarray__": True, b"data": x.tobytes(), b"dtype": x.dtype.str, b"shape": x.shape}
    raise TypeError(f"{type(x).__name__} cannot be sent")


def unpack_array(x: dict):
    """The number or array of numbers that a dict stands for. Others are refused: objects would read foreign memory."""
    if b"__ndarray__" not in x and b"__npgeneric__" not in x:
        return x
    if not re.fullmatch("[<>|=]?[biuf][1248]", x[b"dtype"]):
        raise ValueError(f"an array of type {x[b'dtype']!r:.20}, not of numbers")
    dtype = np.dtype(x[b"dtype"])
    return np.frombuffer(x[b"data"], dtype).reshape(x[b"shape"]) if b"__ndarray__" in x else dtype.type(x[b"data"])


def one_line(error: Exception) -> str:
    """An error of which nobody knows what its text is, or whether it has one."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(":")


def unpack(message: bytes | str):
    """What openpi's client packed; ValueError if it did not. No message takes much more memory than its own size."""
    import msgpack

    parts = 0

    def count(part):
        nonlocal parts
        parts += 1
        if parts > 100:  # a map of a single byte takes 64 here
            raise ValueError("more than 100 maps and lists")
        return unpack_array(part) if isinstance(part, dict) else part

    try:
        return msgpack.unpackb(message, object_hook=count, list_hook=count, max_array_len=1000, max_map_len=100)
    except Exception as error:  # msgpack's have no class in common, and some no text
        raise ValueError(f"the message is not what openpi's client sends ({one_line(error)})") from None


def read_obs(message: dict, policy: Policy, instruction: str) -> dict:
    """A client's observation as a batch of one. ValueError says what `policy` was trained on instead."""
    if not isinstance(message, dict):
        raise ValueError("an observation is a dict of image, state, prompt")
    image = np.asarray(message.get("image", message.get("observation/image")))
    state = np.asarray(message.get("state", message.get("observation/state")))
    prompt = message.get("prompt", instruction)

    shape = [policy.image_size, policy.image_size, 3]
    if image.dtype != np.uint8 or list(image.shape) != shape:
        raise ValueError(f"image must be uint8 {shape}, RGB, as in training, not {image.dtype} {list(image.shape)}")

    stats = (policy.stats or {}).get("observation.state", {})
    dims = robot_dims(stats) if stats else 0  # some are padded to the model's
    low = np.array(stats.get("q01", [-np.inf] * dims))[:dims]
    high = np.array(stats.get("q99", [np.inf] * dims))[:dims]
    if state.dtype.kind not in "fiu" or state.ndim != 1 or dims not in (0, len(state)):
        expected = f"{dims} numbers, as in training" if dims else "a row of numbers"
        raise ValueError(f"state must be {expected}, not {state.dtype} {list(state.shape)}")
    if not (np.abs(state) < 1e30).all():
        raise ValueError(f"state must be finite numbers, not {state.tolist()}")
    if dims:
        far = 10 * np.maximum(high - low, 1)
        strange = np.flatnonzero((state < low - far) | (state > high + far))
        if len(strange):
            i = strange[0]
            raise ValueError(
                f"state[{i}] is {state[i]:.4g}, in training it was {low[i]:.4g} .. {high[i]:.4g}: look at its unit"
            )

    if not isinstance(prompt, str) or len(prompt) > 1000:
        raise ValueError("prompt must be a string of at most 1000 characters")
    return dict(image=torch.tensor(image)[None], state=torch.tensor(state, dtype=torch.float32)[None], prompt=[prompt])


class Server:
    """Answers openpi's clients: an observation in, {"actions": float32 [C,7], physical units} out.

    A connection has its own noise, that of `VecEnv.play`: its actions depend on nothing but its own observations. A
    message that is no observation is answered with a line of text, an exception in openpi's client.
    """

    MAX_MESSAGE = 1 << 24  # bytes, a picture of 4K is twice as many
    MAX_CLIENTS = 32
    MAX_STRANGERS = 128  # connections that are no clients yet
    MESSAGE_TIME = 20  # s, for a message to come or to be taken
    SILENCE = 1800  # s between two observations

    def __init__(self, policy: Policy, name: str, instruction: str, api_key: str = ""):
        self.policy = policy
        self.instruction = instruction  # for clients that give none
        self.api_key = api_key  # that clients have to show, if it is not empty
        self.metadata = dict(policy=name, prompt=instruction, chunk=policy.chunk, control_hz=envs.CONTROL_HZ)
        self.metadata["image_size"] = policy.image_size
        self.one_at_a_time = threading.Lock()  # torch's random state is the process's, and so are its threads
        self.clients = []  # connections that are answered
        self.strangers = {}  # sockets of those who have not shown a key, in the order in which they came
        self.changing = threading.Lock()  # guards both

    def listen(self, sock: socket.socket):
        """The websockets server on a bound socket, to `serve_forever`."""
        from websockets.sync.server import serve

        # What strangers send is not worth a traceback each.
        quiet = logging.getLogger("rlco.server")
        quiet.setLevel(logging.CRITICAL)
        # A ping is answered between two messages: who begins one and does not end it is noticed by that.
        times = dict(open_timeout=5, ping_interval=self.MESSAGE_TIME / 2, ping_timeout=self.MESSAGE_TIME / 2)
        limits = dict(max_size=self.MAX_MESSAGE, max_queue=1, compression=None)
        listener = serve(self.handle, sock=sock, process_request=self.admit, logger=quiet, **times, **limits)
        accepted = listener.handler

        def bounded(sock, address):
            with self.changing:
                self.strangers[sock] = True
                if len(self.strangers) > self.MAX_STRANGERS:
                    # The oldest goes: a client has shown its key long before so many others come.
                    oldest = next(iter(self.strangers))
                    del self.strangers[oldest]
                    with suppress(OSError):
                        oldest.shutdown(socket.SHUT_RDWR)
            try:
                accepted(sock, address)
            finally:
                with self.changing:
                    self.strangers.pop(sock, None)

        listener.handler = bounded
        return listener

    def admit(self, client, request):
        """None for a client with the key, else the HTTP response that it gets. /healthz is as in openpi's server."""
        if request.path == "/healthz":
            return client.respond(200, "OK\n")
        wanted = f"Api-Key {self.api_key}".encode()
        shown = [value.encode(errors="replace") for value in request.headers.get_all("Authorization")]
        if self.api_key and not any(hmac.compare_digest(value, wanted) for value in shown):
            return client.respond(401, "the server's key is needed: WebsocketClientPolicy(host, port, api_key=...)\n")
        return None

    def infer(self, obs: dict, noise: tuple | None) -> tuple[dict, tuple]:
        """Answer an observation; `noise` is torch's random state after the last answer of this connection, if there was
        one -> reply, the state after this one."""
        with torch.random.fork_rng():
            if noise is None:
                torch.manual_seed(envs.SEEDS["evaluation"])
            else:
                cpu, cuda = noise
                torch.set_rng_state(cpu)
                torch.cuda.set_rng_state_all(cuda)
            start = time.perf_counter()
            actions = self.policy.act(obs, sample=False).actions[0].float().cpu().numpy()
            milliseconds = 1000 * (time.perf_counter() - start)
            noise = torch.get_rng_state(), torch.cuda.get_rng_state_all()
        return dict(actions=actions, server_timing=dict(infer_ms=milliseconds)), noise

    def handle(self, client) -> None:
        """Talk to a client (a connection of websockets) until it goes."""
        from websockets.exceptions import ConnectionClosed
        from websockets.protocol import State

        with self.changing:
            # Who is gone does not count, even where his thread has not noticed yet.
            self.clients = [one for one in self.clients if one.protocol.state is State.OPEN]
            full = len(self.clients) >= self.MAX_CLIENTS
            if not full:
                self.clients.append(client)
                self.strangers.pop(client.socket, None)
        if full:
            client.close(1013, f"{self.MAX_CLIENTS} clients are served already: try again later")
            return
        try:
            self.converse(client)
        except ConnectionClosed:
            pass  # in the middle of a message, or of an answer: nothing is lost with it
        except TimeoutError:
            client.close(1000, f"no message in {self.SILENCE} s")

    def converse(self, client) -> None:
        import msgpack
        from websockets.protocol import State

        # Who does not take his answers does not hold this thread for ever.
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", self.MESSAGE_TIME, 0))
        client.send(msgpack.packb(self.metadata))
        noise = None
        while True:
            message = client.recv(timeout=self.SILENCE)
            try:
                obs = read_obs(unpack(message), self.policy, self.instruction)
            except ValueError as error:
                client.send(str(error))
                continue
            # Who is gone leaves the queue, and his thread ends.
            while not self.one_at_a_time.acquire(timeout=0.1):
                if client.protocol.state is not State.OPEN:
                    return
            try:
                if client.protocol.state is not State.OPEN:
                    return
                reply, noise = self.infer(obs, noise)
                answer = msgpack.packb(reply, default=pack_array)
            except Exception as error:  # one client's fault, or ours, is no reason to leave the others
                traceback.print_exc()
                answer = one_line(error)
            finally:
                self.one_at_a_time.release()
            client.send(answer)


def give_memory_back() -> None:
    """Let glibc return what large messages took. By itself it keeps that, for each of many threads, and grows for an
    hour; and after the first large block that is freed it takes none of that size from the system directly again."""
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-8, 2)  # M_ARENA_MAX
        libc.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD, bytes


def serve(args: ServeArgs) -> None:
    """Answer clients until Ctrl-C."""
    try:
        import msgpack  # noqa: F401  (for Server, like websockets)
        import websockets  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error}: pip install -r requirements-robot.txt") from None
    envs.require_task(args.task)
    give_memory_back()
    api_key = args.api_key or os.environ.get("RLCO_API_KEY", "")
    try:
        sock = socket.create_server((args.host, args.port))
    except (OSError, OverflowError) as error:
        problem = f"cannot listen on {args.host}:{args.port} ({error})"
        raise UserError(f"{problem}: choose another --host or --port") from None
    with sock:
        address, port = sock.getsockname()
        if not (ip_address(address).is_loopback or api_key or args.insecure):
            problem = f"others reach {args.host}, too"
            raise UserError(f"{problem}: give an --api-key (or set RLCO_API_KEY), or say --insecure to serve anybody")
        policy = load_policies((args.policy,), args.device)[args.policy]
        server = Server(policy, args.policy, envs.TASKS[args.task].instruction, api_key)
        with server.listen(sock) as listener:
            asked = "clients need the key" if api_key else "no key is asked for"
            print(f"serving {args.policy}, {asked}, on ws://{args.host}:{port}", flush=True)
            listener.serve_forever()


COMMANDS = {StandinArgs: standin, FrankaArgs: franka, AlignArgs: align, ServeArgs: serve}


def parse(arguments: list[str] | None = None):
    """The arguments of the subcommand that a command line names, one of COMMANDS; those of `standin` if it is empty."""
    subcommand = tyro.conf.subcommand
    kind = Annotated[StandinArgs, subcommand("standin")] | Annotated[FrankaArgs, subcommand("franka")]
    kind |= Annotated[AlignArgs, subcommand("align")] | Annotated[ServeArgs, subcommand("serve")]
    return tyro.cli(kind, args=arguments, default=StandinArgs(), description=__doc__)


if __name__ == "__main__":
    args = parse()
    one_line_errors(args.debug)
    COMMANDS[type(args)](args)
