"""The paper's experiment on one machine: every training run, every evaluation, every table and figure of results/.

    python -m results.experiment                        # all of it, one training seed; goes on where it was stopped
    python -m results.experiment --only main-open       # the sections whose name begins so
    python -m results.experiment --seeds 1 2 --jobs 4

A cell is one training run, in runs/experiment/, or the evaluation of its best checkpoint, in results/raw/, on the same
seeds for all runs of a task. Tables and figures are made from results/raw/ alone. A finished cell is never run again
(delete its folders to have it anew), a killed one goes on. All settings are the scripts' defaults, but for those that
stand in this file.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import tyro
from scipy import stats

from checkpoints import UserError, claim, one_line_errors, whole_file, write_file
from envs import TASKS, VARIATIONS
from eval_real import p_value, sign_test, wilson
from page import curve

PARADIGMS = dict(real="real-only SFT", sft="SFT co-training", rlco="RL-Co")
POLICIES = {"tiny-pi05": "π0.5", "tiny-openvla": "OpenVLA"}
PAPER = {"tiny-pi05": (26.7, 45.9, 66.2), "tiny-openvla": (16.5, 40.0, 64.0)}  # real robot, mean of four tasks, %
STAGE1 = {"tiny-pi05": "", "tiny-openvla": "--steps 2000"}  # settings beside the defaults
STAGE2 = {"tiny-pi05": "", "tiny-openvla": "--lr 5e-5"}
SHORT = "--steps 1000"  # of stage I: a third of the default
EXPERT = "--train expert --lr 1.5e-4 --iterations 20"  # fewer weights take larger steps, and more of them
REAL_DEMOS = (5, 10, 20, 50)
ALPHAS = (0.5, 0.8, 0.95)
BETAS = (0, 0.2, 1)
DOMAINS = dict(twin="twin", standin="stand-in", mild="mild gap", strong="strong gap")


@dataclass
class Args:
    """Run what is missing of the experiment, then write results/README.md and its figures from what is there."""

    only: str = ""
    """Run only the sections whose name begins with this; "none" runs nothing and draws tables and figures anew."""
    seeds: tuple[int, ...] = (1,)
    """Training seeds. Each repeats all the training; evaluation has the same episodes."""
    jobs: int = len(os.sched_getaffinity(0))
    """Cells at the same time, each on one thread (and its simulators)."""
    debug: bool = False
    """Show the traceback of an error in the input, too."""


@dataclass(frozen=True)
class Cell:
    """A command, the folder that it makes, and the cell whose best checkpoint it takes."""

    script: str
    out: str
    options: str
    task: str
    target: str
    start: "Cell | None" = None

    @property
    def command(self) -> str:
        script = "eval_real.py standin" if self.script == "eval_real.py" else self.script
        return f"{script} --task {self.task} --target {self.target} --out {self.out} {self.options}".strip()

    @property
    def done(self) -> Path:
        """The file that is there when the cell has been run."""
        return Path(self.out, "results.json" if self.script == "eval_real.py" else "done")


def stage1(task: str, policy: str, seed: int, name: str = "sft", options: str = "", target: str = "standin") -> Cell:
    out = f"runs/experiment/{task}-{policy}-{name}-s{seed}"
    return Cell("train_sft.py", out, f"--policy {policy} --seed {seed} {STAGE1[policy]} {options}", task, target)


def stage2(start: Cell, policy: str, seed: int, name: str = "rlco", options: str = "") -> Cell:
    out = f"runs/experiment/{start.task}-{policy}-{name}-s{seed}"
    options = f"--policy {start.out}/best --seed {seed} {STAGE2[policy]} {options}"
    return Cell("train_rlco.py", out, options, start.task, start.target, start)


def evaluation(run: Cell, variation: str | None = None) -> Cell:
    out = f"results/raw/{Path(run.out).name}"
    options = f"--policies {run.out}/best --videos 0"
    if variation:
        out += f"-{variation}"
        options += f" --variation {variation}"
    return Cell("eval_real.py", out, options, run.task, run.target, run)


def experiment(seed: int) -> Iterator[tuple[str, Cell]]:
    """All evaluations, each with its section's name, those of the main table first."""
    main = {}
    for policy in POLICIES:
        for task in TASKS:
            sft = stage1(task, policy, seed)
            main[task, policy] = (stage1(task, policy, seed, "real", "--alpha 0"), sft, stage2(sft, policy, seed))
            for run in main[task, policy]:
                yield f"main-{task}-{policy}", evaluation(run)

    pi05 = "tiny-pi05"  # all else is about it
    for task in TASKS:
        real = stage1(task, pi05, seed, "real-steps1000", f"--alpha 0 {SHORT}")
        sft = stage1(task, pi05, seed, "sft-steps1000", SHORT)
        for run in (real, sft, stage2(sft, pi05, seed, "rlco-steps1000")):
            yield f"short-{task}", evaluation(run)

    real, sft, rlco = main["push_cube", pi05]
    swept = [stage2(sft, pi05, seed, f"rl-beta{beta}", f"--beta {beta}") for beta in BETAS if beta != 0.2]
    for run in (sft, rlco, *swept):
        yield "forgetting", evaluation(run)
    swept = [stage2(sft, pi05, seed, f"rl_expert-beta{beta}", f"--beta {beta} {EXPERT}") for beta in BETAS]
    for run in (sft, *swept):
        yield "expert_only", evaluation(run)
    for run in (rlco, stage2(real, pi05, seed, "rlco_from_real")):
        yield "stage1", evaluation(run)
    for alpha in ALPHAS:
        start = stage1("push_cube", pi05, seed, f"sft-alpha{alpha}", f"--alpha {alpha}")
        runs = (sft, rlco) if alpha == 0.8 else (start, stage2(start, pi05, seed, f"rlco-alpha{alpha}"))
        for run in runs:
            yield f"alpha-{alpha}", evaluation(run)
    for (task, policy), runs in main.items():
        for variation in VARIATIONS:
            for run in runs:
                yield f"unseen-{task}-{policy}", evaluation(run, variation)

    for target in ("mild", "strong"):
        start = stage1("push_cube", pi05, seed, f"sft-{target}", target=target)
        yield f"gap-{target}", evaluation(start)
        for beta in (0, 0.2):
            yield f"gap-{target}", evaluation(stage2(start, pi05, seed, f"rl-{target}-beta{beta}", f"--beta {beta}"))
    for n in REAL_DEMOS:
        few = f"--num-real {n}"
        real = stage1("open_drawer", pi05, seed, f"real-real{n}", f"{few} --alpha 0")
        sft = stage1("open_drawer", pi05, seed, f"sft-real{n}", few)
        runs = (real, sft, stage2(sft, pi05, seed, f"rlco-real{n}", few))
        for run in main["open_drawer", pi05] if n == 50 else runs:
            yield f"real_demos-{n}", evaluation(run)


def run(cells: list[Cell], jobs: int) -> list[str]:
    """Run the cells that are not done, `jobs` at once, each after the one that it starts from -> those that failed."""
    todo = {}  # cells by folder, in the order in which they are begun
    running = {}  # cell: its process and when it began
    failed = set()

    def want(cell):  # depth first: what is begun is finished before the next begins
        if not cell.done.exists():
            if cell.start:
                want(cell.start)
            todo[cell.out] = cell

    def ready(cell):
        return cell.start is None or cell.start.done.exists()

    for cell in cells:
        want(cell)
    # Before anything trains: two runs of a task would collect its demonstrations at the same time.
    for task, target in dict.fromkeys((cell.task, cell.target) for cell in todo.values()):
        subprocess.run([sys.executable, "data.py", "collect", "--task", task, "--target", target], check=True)
    claim("runs/experiment")
    try:
        while running or any(ready(cell) for cell in todo.values()):  # what else is left needs what has failed
            for cell in [cell for cell in todo.values() if ready(cell)][: jobs - len(running)]:
                del todo[cell.out]
                running[cell] = begin(cell), time.time()
                print(f"{time.strftime('%H:%M')} begins {cell.out} ({len(todo)} to come)", flush=True)
            for cell, (process, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[cell]
                how = "FAILED" if process.returncode else "ended"
                minutes = (time.time() - began) / 60
                print(f"{time.strftime('%H:%M')} {how} {cell.out} after {minutes:.0f} min", flush=True)
                if process.returncode:
                    failed.add(cell.out)
                elif cell.script != "eval_real.py":
                    cell.done.touch()
            time.sleep(1)
    finally:  # left alone they would go on, beside the same cells of the next call
        for process, _ in running.values():
            process.terminate()
    return sorted(failed) + sorted(todo)


def begin(cell: Cell) -> subprocess.Popen:
    """Start a cell on one thread, its output in a log beside its folder."""
    if cell.script == "eval_real.py":  # the run's settings, and stage II's metrics for the figures
        for name in ("args.json", "metrics.json"):
            file = Path(cell.start.out, name)
            if file.exists():
                write_file(Path("results/raw", file.parent.name, name), file.read_bytes())
    command = [sys.executable, *cell.command.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(f"runs/experiment/{Path(cell.out).name}-{Path(cell.script).stem}.log", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


# ---- tables and figures -----------------------------------------------------------------------------------------


class Raw:
    """What results/raw/ holds. A run is called TASK-POLICY-NAME; an entry is {training seed: (successes, episodes)}."""

    def __init__(self):
        self.success = {}  # {(run, variation or None): {domain: entry}}
        self.episodes = {}  # {(run, domain): {training seed: success of each episode}}, without variation
        self.metrics = {}  # {run: {training seed: stage II's metrics}}
        for path in sorted(Path("results/raw").glob("*/results.json")):
            content = json.loads(path.read_text())
            for result in content["results"]:
                run, seed = Path(result["policy"]).parent.name.rsplit("-s", 1)
                domains = self.success.setdefault((run, content["args"]["variation"]), {})
                entry = domains.setdefault(result["domain"], {})
                entry[int(seed)] = result["successes"], result["episodes"]
                if not content["args"]["variation"]:
                    self.episodes.setdefault((run, result["domain"]), {})[int(seed)] = result["success"]
            file = path.with_name("metrics.json")
            if file.exists():
                self.metrics.setdefault(run, {})[int(seed)] = json.loads(file.read_text())

    def entries(self, runs, domain: str, variation: str | None = None) -> list[dict]:
        return shared([self.success.get((run, variation), {}).get(domain, {}) for run in runs])

    def rates(self, runs, domain: str, variation: str | None = None) -> list[str]:
        """The success of each run as text, compared with the others'."""
        return compare([[entry] for entry in self.entries(runs, domain, variation)])


def shared(entries: list[dict]) -> list[dict]:
    """Dicts by training seed, cut to the seeds that all of them have that are not empty: like is compared with like."""
    known = [set(entry) for entry in entries if entry]
    seeds = set.intersection(*known) if known else set()
    return [{seed: entry[seed] for seed in entry if seed in seeds} for entry in entries]


def interval(entries: list[dict]) -> tuple[float, float, float]:
    """Mean success of tasks that weigh alike, all episodes of a task's training seeds together -> share, low, high: the
    95 % Wilson interval of episodes that vary at least as much as it does."""
    successes, episodes = np.array([np.sum([*entry.values()], 0) for entry in entries], float).T
    share = np.mean(successes / episodes)
    n = len(entries) ** 2 / np.sum(1 / episodes)
    return share, *wilson(share * n, n)


def compare(groups: list[list[dict]]) -> list[str]:
    """Means of groups of entries (one task, or several) as text, in %; each training seed's own in brackets."""
    intervals = [interval(group) if all(group) else None for group in groups]
    cells = []
    for i, group in enumerate(groups):
        if intervals[i] is None:
            cells.append("–")
            continue
        share, low, high = intervals[i]
        text = f"{100 * share:.0f} [{100 * low:.0f}, {100 * high:.0f}]"
        others = intervals[:i] + intervals[i + 1 :]
        if all(other is not None and low > other[2] for other in others):  # what is not known yet may be as good
            text = f"**{text}**"
        if len(group[0]) > 1:
            means = [np.mean([np.divide(*entry[seed]) for entry in group]) for seed in group[0]]
            text += f" ({', '.join(f'{100 * mean:.0f}' for mean in means)})"
        cells.append(text)
    return cells


def difference(before: dict, after: dict) -> tuple[float, float, float, float] | None:
    """How much more often `after` succeeds than `before`, both {task: {training seed: success of each episode}}, over
    what both have -> the mean over tasks of the difference, its 95 % interval, p; None if a task is missing.

    Both play the same episodes, and a training run is one draw: the interval is Student's, from how the differences of
    a task's runs vary, and p is exact, from turning the signs of all runs' differences in all ways. Where there is one
    training seed, episodes take the place of runs, and it is about these checkpoints alone.
    """
    by_task = []
    for task in before:
        seeds = before[task].keys() & after[task].keys()
        by_task.append([np.subtract(after[task][s], before[task][s], dtype=float) for s in sorted(seeds)])
    if not all(by_task):
        return None
    one_seed = max(map(len, by_task)) == 1
    draws = [runs[0] if one_seed else np.mean(runs, 1) for runs in by_task]
    mean = float(np.mean([np.mean(x) for x in draws]))
    freedom = sum(len(x) - 1 for x in draws)
    error = math.sqrt(sum(np.var(x, ddof=1) / len(x) for x in draws if len(x) > 1)) / len(draws)
    half = stats.t.ppf(0.975, freedom) * error
    every = np.concatenate(draws)
    if one_seed:
        p = sign_test(int((every > 0).sum()), int((every < 0).sum()))
    else:
        weights = np.concatenate([x / len(x) for x in draws])
        signs = 1 - 2 * (np.arange(2 ** len(every))[:, None] >> np.arange(len(every)) & 1)
        p = float((abs(signs @ weights) >= abs(weights.sum()) - 1e-9).mean())
    return mean, mean - half, mean + half, p


def difference_section(raw: Raw, title: str, policies, names: dict) -> str:
    """What each run of `names` {its name: its title} gains on the one before it: a column for each policy."""
    rows = []
    for before, after in pairwise(names):
        row = [f"{names[after]} − {names[before]}"]
        for policy in policies:
            runs = [
                {task: raw.episodes.get((f"{task}-{policy}-{name}", "standin"), {}) for task in TASKS}
                for name in (before, after)
            ]
            found = difference(*runs)
            text = "–"
            if found:
                points, low, high = (100 * x for x in found[:3])
                seeds = {len(entry) for entry in shared([of for run in runs for of in run.values()])}
                text = f"{points:+.1f} [{low:+.1f}, {high:+.1f}], {p_value(found[3])}; {max(seeds)} training seeds"
                text = text.removesuffix("s") if max(seeds) == 1 else text
            row.append(text)
        if row[1:] != ["–"] * len(policies):
            rows.append(row)
    if not rows:
        return ""
    head = [f"points, {heading('standin')}, mean of the tasks", *(POLICIES[policy] for policy in policies)]
    return f"## {title}\n\n{table(head, rows)}"


def heading(domain: str) -> str:
    return DOMAINS[domain] if domain == "twin" else f"{DOMAINS[domain]}, **not a real robot**"


def table(head: list, rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def main_section(raw: Raw, title: str, policies, steps: str = "") -> str:
    """A table for each domain: a row for each task, three columns for each policy; and stage II's curves."""
    parts = []
    for domain in ("standin", "twin"):
        head = [heading(domain)]
        rows = [[task] for task in TASKS]
        mean = ["mean"]
        paper = ["*the paper, real robot, mean of its four tasks*"]
        for policy in policies:
            runs = [[f"{task}-{policy}-{paradigm}{steps}" for paradigm in PARADIGMS] for task in TASKS]
            for row, paradigms in zip(rows, runs):
                row += raw.rates(paradigms, domain)
            cells = raw.entries(sum(runs, []), domain)
            mean += compare([cells[i :: len(PARADIGMS)] for i in range(len(PARADIGMS))])
            paper += [f"*{rate}*" for rate in PAPER[policy]]
            head += [f"{POLICIES[policy]}: {paradigm}" for paradigm in PARADIGMS.values()]
        rows += [mean, paper] if domain == "standin" else [mean]
        parts.append(f"## {title}: {DOMAINS[domain]}\n\n{table(head, rows)}")
    for policy in policies:
        curves = {}
        for task in TASKS:
            logs = raw.metrics.get(f"{task}-{policy}-rlco{steps}", {}).values()
            if logs:
                domains = ("twin", "standin")
                curves[task] = {d: [curve(log, f"eval/success_{d}", 100) for log in logs] for d in domains}
        if curves:
            figure = f"main-{policy}{steps}.png"
            plot(curves, f"results/{figure}")
            parts.append(f"{POLICIES[policy]}, stage II on validation seeds, from stage I on:\n\n![]({figure})\n")
    return "\n".join(parts)


def loss_change(logs: dict) -> str:
    """The imitation loss on held-out real demonstrations, before RL and of the checkpoint that is evaluated."""
    before = []
    after = []
    for log in logs.values():
        losses = dict(curve(log, "eval/real_loss"))
        _, best = max((success, iteration) for iteration, success in curve(log, "eval/success_twin"))
        before.append(losses[0])
        after.append(losses[best])
    return f"{np.mean(before):.3f} → {np.mean(after):.3f}"


def rl_section(raw: Raw, title: str, name: str, start: str | None, runs: dict, target: str = "standin") -> str:
    """Runs of RL {name: label} on push cube: success and the imitation loss on held-out real demonstrations, of the
    checkpoints that are evaluated, and before RL (the run `start`)."""
    prefix = "push_cube-tiny-pi05-"
    runs = {prefix + run: label for run, label in runs.items() if prefix + run in raw.metrics}
    logs = dict(zip(runs.values(), shared([raw.metrics[run] for run in runs])))
    if len(runs) < 2 or not all(logs.values()):
        return ""  # no training seed is in all of them yet

    def curves(key, scale=1.0):
        return {label: [curve(log, key, scale) for log in by_seed.values()] for label, by_seed in logs.items()}

    panels = {
        f"{target}, success (%)": curves(f"eval/success_{target}", 100),
        "twin, success (%)": curves("eval/success_twin", 100),
    }
    plot(panels, f"results/{name}.png", ylabel="")
    plot({"": curves("eval/real_loss")}, f"results/{name}_loss.png", "imitation loss, held-out real")
    if start:
        runs = {prefix + start: "before RL", **runs}
    columns = zip(runs.values(), raw.rates(runs, "twin"), raw.rates(runs, target))
    rows = [[label, *cells, loss_change(logs[label]) if label in logs else ""] for label, *cells in columns]
    head = ["push cube, π0.5", "twin", heading(target), "imitation loss, held-out real"]
    return f"## {title}\n\n{table(head, rows)}\n![]({name}.png)\n![]({name}_loss.png)\n"


def sweep_section(raw: Raw, title: str, name: str, label: str, paradigms, runs: dict) -> str:
    """Success of `paradigms` in the stand-in over a setting: `runs` {its value: name of the run, "{}" its paradigm}."""
    cells = raw.entries([run.format(paradigm) for paradigm in paradigms for run in runs.values()], "standin")
    if not all(cells):
        return ""  # no training seed is in all of them yet
    columns = [cells[i : i + len(runs)] for i in range(0, len(cells), len(runs))]
    curves = {}
    for paradigm, column in zip(paradigms, columns):
        curves[PARADIGMS[paradigm]] = [
            [(value, 100 * np.divide(*entry[seed])) for value, entry in zip(runs, column)] for seed in column[0]
        ]
    plot({"": curves}, f"results/{name}.png", "stand-in, success (%)", label)
    rows = [[value, *compare([[entry] for entry in row])] for value, *row in zip(runs, *columns)]
    head = [f"{label} ({heading('standin')})", *curves]
    return f"## {title}\n\n{table(head, rows)}\n![]({name}.png)\n"


def unseen_section(raw: Raw, policy: str) -> str:
    rows = []
    for task in TASKS:
        for variation in VARIATIONS:
            if (f"{task}-{policy}-rlco", variation) in raw.success:
                runs = [f"{task}-{policy}-{paradigm}" for paradigm in PARADIGMS]
                rows.append([f"{task}, unseen {variation}", *raw.rates(runs, "standin", variation)])
    if not rows:
        return ""
    return f"## Unseen variations, {POLICIES[policy]}\n\n{table([heading('standin'), *PARADIGMS.values()], rows)}"


def plot(panels: dict, path: str, ylabel: str = "success (%)", xlabel: str = "RL iteration") -> None:
    """Curves side by side: panels {title: {label: [curve of each training seed]}}; mean, and min to max shaded."""
    import matplotlib

    matplotlib.use("Agg")  # draws into a file: no screen needed
    import matplotlib.pyplot as plt

    size = (2 + 4 * len(panels), 3.5)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, (title, curves) in zip(axes[0], panels.items()):
        for label, seeds in curves.items():
            x, y = np.array(seeds, float).transpose(2, 0, 1)
            axis.plot(x[0], y.mean(0), marker="o", markersize=3, label=label)
            axis.fill_between(x[0], y.min(0), y.max(0), alpha=0.2)
        axis.set(title=title, xlabel=xlabel)
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0, 0].set(ylabel=ylabel, ylim=(0, None))
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


def report() -> None:
    """Write results/README.md and its figures from results/raw/ (both in the current folder)."""
    raw = Raw()
    entries = [entry for domains in raw.success.values() for entry in domains.values()]
    episodes = sorted({n for entry in entries for _, n in entry.values()})
    intro = (
        "# Results\n\nMade by `python -m results.experiment`. "
        f"Success in % of {' or '.join(map(str, episodes))} unseen episodes for each training seed, the same in every "
        "cell of a table, with 95 % Wilson intervals over the episodes of all training seeds together: they say what "
        "these checkpoints do, not what another training seed would. Where there are several training seeds, each "
        "one's own rate is in brackets; else there is one. What is compared has the same training seeds: those that "
        "all cells have. Bold: the interval lies above all that it is compared with, the paradigms of a policy or the "
        "rows of an ablation. Differences are paired, as all checkpoints play the same episodes; with several training "
        "seeds their interval and the exact p are over the training runs, with one over episodes. **The stand-in is "
        "a second simulated domain, not a real robot.** Checkpoints are the best on validation seeds in the twin.\n"
    )
    short = {f"{paradigm}-steps1000": name for paradigm, name in PARADIGMS.items()}
    betas = {"rlco" if beta == 0.2 else f"rl-beta{beta}": f"β = {beta}" for beta in BETAS}
    expert = {f"rl_expert-beta{beta}": f"β = {beta}" for beta in BETAS}
    starts = {"rlco": "after SFT co-training", "rlco_from_real": "after real-only SFT"}
    alphas = {a: "push_cube-tiny-pi05-{}" + (f"-alpha{a}" if a != 0.8 else "") for a in ALPHAS}
    demos = {n: "open_drawer-tiny-pi05-{}" + (f"-real{n}" if n != 50 else "") for n in REAL_DEMOS}
    sections = [
        intro,
        main_section(raw, "Main table", POLICIES),
        difference_section(raw, "Differences", POLICIES, PARADIGMS),
        main_section(raw, "After a stage I of 1000 steps", ["tiny-pi05"], "-steps1000"),
        difference_section(raw, "Differences after a stage I of 1000 steps", ["tiny-pi05"], short),
        rl_section(raw, "Forgetting, and the sweep of β", "forgetting", "sft", betas),
        rl_section(raw, "Forgetting: RL of the action expert only", "expert_only", "sft", expert),
    ]
    for target in ("mild", "strong"):
        runs = {f"rl-{target}-beta{beta}": f"β = {beta}" for beta in (0, 0.2)}
        sections.append(rl_section(raw, f"A {target} gap", f"gap-{target}", f"sft-{target}", runs, target))
    title = "Stage I with and without simulated demonstrations"
    sections.append(rl_section(raw, title, "stage1", None, starts))
    title = "Share of simulated samples: push cube, π0.5"
    sections.append(sweep_section(raw, title, "alpha", "α", ("sft", "rlco"), alphas))
    title = "Real demonstrations: open drawer, π0.5"
    sections.append(sweep_section(raw, title, "real_demos", "real demonstrations", PARADIGMS, demos))
    sections += [unseen_section(raw, policy) for policy in POLICIES]
    write_file("results/README.md", "\n".join(section for section in sections if section).encode())


def main(args: Args) -> None:
    cells = [cell for seed in args.seeds for section, cell in experiment(seed) if section.startswith(args.only)]
    if not cells and args.only != "none":
        raise UserError(f"no section's name begins with {args.only!r}")
    failed = run(cells, max(1, args.jobs))
    report()
    if failed:
        raise UserError(f"not done: {', '.join(failed)}; see the logs in runs/experiment")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that `run` ends what it has started
    args = tyro.cli(Args)
    one_line_errors(args.debug)
    main(args)
