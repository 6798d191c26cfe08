"""The paper's experiment on one machine: every training run, every evaluation, every table and figure of results/.

    python results/experiment.py                        # all of it, one training seed; goes on where it was stopped
    python results/experiment.py --only main-open       # the sections whose name begins so
    python results/experiment.py --seeds 1 2 --jobs 4

A cell is one training run, in runs/experiment/, or the evaluation of its best checkpoint, in results/raw/, on the same
seeds for all runs of a task. Tables and figures are made from results/raw/ alone. A finished cell is never run again
(delete its folders to have it anew), a killed one goes on. All settings are the scripts' defaults, but for those that
stand in this file.
"""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from envs import TASKS, VARIATIONS  # noqa: E402
from eval_real import wilson  # noqa: E402
from policy import write_file  # noqa: E402
from train_rlco import curve, plot  # noqa: E402

PARADIGMS = dict(real="real-only SFT", sft="SFT co-training", rlco="RL-Co")
POLICIES = {"tiny-pi05": "π0.5", "tiny-openvla": "OpenVLA"}
PAPER = {"tiny-pi05": (26.7, 45.9, 66.2), "tiny-openvla": (16.5, 40.0, 64.0)}  # real robot, mean of four tasks, %
SETTINGS = {"tiny-pi05": ("", ""),  # beside the defaults, in stage I and in stage II
            "tiny-openvla": ("--steps 2000", "--lr 5e-5")}
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
    """run only the sections whose name begins with this; "none" runs nothing"""
    seeds: tuple[int, ...] = (1,)
    """training seeds"""
    jobs: int = len(os.sched_getaffinity(0))
    """cells at the same time, each on one thread (and its simulators)"""


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
    def command(self):
        return f"{self.script} --task {self.task} --target {self.target} --out {self.out} {self.options}".strip()

    @property
    def done(self):
        return Path(self.out, "results.json" if self.script == "eval_real.py" else "done")


def stage1(task, policy, seed, name="sft", options="", target="standin"):
    return Cell("train_sft.py", f"runs/experiment/{task}-{policy}-{name}-s{seed}",
                f"--policy {policy} --seed {seed} {SETTINGS[policy][0]} {options}", task, target)


def stage2(start, policy, seed, name="rlco", options=""):
    return Cell("train_rlco.py", f"runs/experiment/{start.task}-{policy}-{name}-s{seed}",
                f"--policy {start.out}/best --seed {seed} {SETTINGS[policy][1]} {options}", start.task, start.target, start)


def evaluation(run, variation=None):
    out = f"results/raw/{Path(run.out).name}{f'-{variation}' if variation else ''}"
    options = f"--policies {run.out}/best --videos 0{f' --variation {variation}' if variation else ''}"
    return Cell("eval_real.py", out, options, run.task, run.target, run)


def experiment(seed):
    """All evaluations, each with its section's name, those of the main table first."""
    main = {}
    for policy in POLICIES:
        for task in TASKS:
            sft = stage1(task, policy, seed)
            main[task, policy] = [stage1(task, policy, seed, "real", "--alpha 0"), sft, stage2(sft, policy, seed)]
            yield from ((f"main-{task}-{policy}", evaluation(run)) for run in main[task, policy])

    of = "tiny-pi05", seed
    for task in TASKS:
        sft = stage1(task, *of, "sft-steps1000", SHORT)
        real = stage1(task, *of, "real-steps1000", f"--alpha 0 {SHORT}")
        yield from ((f"short-{task}", evaluation(run)) for run in (real, sft, stage2(sft, *of, "rlco-steps1000")))
    real, sft, rlco = main["push_cube", "tiny-pi05"]
    yield from (("forgetting", evaluation(run)) for run in (
        sft, rlco, *(stage2(sft, *of, f"rl-beta{beta}", f"--beta {beta}") for beta in BETAS if beta != 0.2)))
    yield from (("expert_only", evaluation(run)) for run in (
        sft, *(stage2(sft, *of, f"rl_expert-beta{beta}", f"--beta {beta} {EXPERT}") for beta in BETAS)))
    yield from (("stage1", evaluation(run)) for run in (rlco, stage2(real, *of, "rlco_from_real")))
    for alpha in ALPHAS:
        start = stage1("push_cube", *of, f"sft-alpha{alpha}", f"--alpha {alpha}")
        runs = (sft, rlco) if alpha == 0.8 else (start, stage2(start, *of, f"rlco-alpha{alpha}"))
        yield from ((f"alpha-{alpha}", evaluation(run)) for run in runs)
    for (task, policy), runs in main.items():
        yield from ((f"unseen-{task}-{policy}", evaluation(run, variation)) for variation in VARIATIONS for run in runs)

    for target in ("mild", "strong"):
        start = stage1("push_cube", *of, f"sft-{target}", target=target)
        yield f"gap-{target}", evaluation(start)
        for beta in (0, 0.2):
            yield f"gap-{target}", evaluation(stage2(start, *of, f"rl-{target}-beta{beta}", f"--beta {beta}"))
    for n in REAL_DEMOS:
        few = f"--num-real {n}"
        real, start = (stage1("open_drawer", *of, f"{p}-real{n}", few + o) for p, o in (("real", " --alpha 0"), ("sft", "")))
        runs = main["open_drawer", of[0]] if n == 50 else (real, start, stage2(start, *of, f"rlco-real{n}", few))
        yield from ((f"real_demos-{n}", evaluation(run)) for run in runs)


def run(cells, jobs):
    """Run all cells that are not done, `jobs` at a time, each after the one that it starts from -> those that failed."""
    todo, running, failed = {}, {}, set()

    def want(cell):  # depth first: what is begun is finished before the next begins
        if not cell.done.exists():
            if cell.start:
                want(cell.start)
            todo[cell.out] = cell

    for cell in cells:
        want(cell)
    for task, target in dict.fromkeys((c.task, c.target) for c in todo.values()):
        subprocess.run([sys.executable, "data.py", "--task", task, "--target", target], check=True)
    Path("runs/experiment").mkdir(parents=True, exist_ok=True)
    ready = lambda cell: cell.start is None or cell.start.done.exists()
    try:
        while running or any(map(ready, todo.values())):  # what else is left needs what has failed
            for cell in [c for c in todo.values() if ready(c)][:jobs - len(running)]:
                del todo[cell.out]
                if cell.script == "eval_real.py":  # the run's settings, and stage II's metrics for the figures
                    for file in (Path(cell.start.out, name) for name in ("args.json", "metrics.json")):
                        if file.exists():
                            write_file(Path("results/raw", file.parent.name, file.name), file.read_bytes())
                with open(f"runs/experiment/{Path(cell.out).name}-{Path(cell.script).stem}.log", "a") as log:
                    running[cell] = subprocess.Popen([sys.executable, *cell.command.split()], stdout=log, stderr=log,
                                                     env={**os.environ, "OMP_NUM_THREADS": "1"}), time.time()
                print(f"{time.strftime('%H:%M')} begins {cell.out} ({len(todo)} to come)", flush=True)
            for cell, (process, began) in list(running.items()):
                if process.poll() is not None:
                    del running[cell]
                    print(f"{time.strftime('%H:%M')} {'ended' if process.returncode == 0 else 'FAILED'} {cell.out} after "
                          f"{(time.time() - began) / 60:.0f} min", flush=True)
                    if process.returncode:
                        failed.add(cell.out)
                    elif cell.script != "eval_real.py":
                        cell.done.touch()
            time.sleep(1)
    finally:  # left alone they would go on, beside the same cells of the next call
        for process, _ in running.values():
            process.terminate()
    return sorted(failed) + sorted(todo)


# --------------------------------------------------------------------------------------------------- tables and figures
def collected():
    """{(TASK-POLICY-NAME, variation or None): {domain: {training seed: (successes, episodes)}}}, and
    {TASK-POLICY-NAME: {training seed: stage II's metrics}}."""
    success, metrics = {}, {}
    for path in sorted(Path("results/raw").glob("*/results.json")):
        content = json.loads(path.read_text())
        for r in content["results"]:
            run, seed = Path(r["policy"]).parent.name.rsplit("-s", 1)
            entry = success.setdefault((run, content["args"]["variation"]), {}).setdefault(r["domain"], {})
            entry[int(seed)] = r["successes"], r["episodes"]
        if (file := path.with_name("metrics.json")).exists():
            metrics.setdefault(run, {})[int(seed)] = json.loads(file.read_text())
    return success, metrics


def shared(entries):
    """Dicts by training seed, cut to the seeds that all of them have which are not empty: like is compared with like."""
    seeds = set.intersection(*(set(entry) for entry in entries if entry)) if any(entries) else set()
    return [{seed: entry[seed] for seed in entry if seed in seeds} for entry in entries]


def interval(entries):
    """Mean success of tasks that weigh alike, all episodes of a task's training seeds together -> share, low, high: the
    95 % Wilson interval of episodes that vary at least as much as it does."""
    successes, episodes = np.array([np.sum([*entry.values()], 0) for entry in entries], float).T
    share, n = np.mean(successes / episodes), len(entries) ** 2 / np.sum(1 / episodes)
    return share, *wilson(share * n, n)


def compare(groups):
    """Means of groups of entries (one task, or several) as text, in %; each training seed's own in brackets."""
    known, cells = [interval(group) if all(group) else None for group in groups], []
    for group, own in zip(groups, known):
        if not own:
            cells.append("–")
            continue
        text = "{:.0f} [{:.0f}, {:.0f}]".format(*(100 * x for x in own))
        best = all(other is own or other and own[1] > other[2] for other in known)
        seeds = [f"{100 * np.mean([np.divide(*entry[seed]) for entry in group]):.0f}" for seed in group[0]]
        cells.append((f"**{text}**" if best else text) + (f" ({', '.join(seeds)})" if len(seeds) > 1 else ""))
    return cells


def heading(domain):
    return DOMAINS[domain] + ", **not a real robot**" * (domain != "twin")


def table(head, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def report():
    success, metrics = collected()
    episodes = {n for domains in success.values() for entry in domains.values() for _, n in entry.values()}
    text = [f"# Results\n\nMade by `python results/experiment.py`. Success in % of {' or '.join(map(str, sorted(episodes)))} unseen "
            "episodes for each training seed, the same in every cell of a table, with 95 % Wilson intervals over the "
            "episodes of all training seeds together: they say what these checkpoints do, not what another training seed "
            "would. Where there are several training seeds, each one's own rate is in brackets; else there is one. What "
            "is compared has the same training seeds: those that all cells have. Bold: the interval lies above all that "
            "it is compared with, the paradigms of a policy or the rows of an ablation. **The stand-in is a second "
            "simulated domain, not a real robot.** Checkpoints are the best on validation seeds in the twin.\n"]

    def entries(runs, domain, variation=None):
        return shared([success.get((run, variation), {}).get(domain, {}) for run in runs])

    def rates(*which):
        return compare([[entry] for entry in entries(*which)])

    def rl_section(title, name, start, runs, target="standin"):
        """Success and the imitation loss on held-out real demonstrations, before RL (the run `start`) and of the
        checkpoints that are evaluated."""
        prefix = "push_cube-tiny-pi05-"
        runs = {prefix + run: label for run, label in runs.items() if prefix + run in metrics}
        logs = {label: [*m.values()] for label, m in zip(runs.values(), shared([metrics[run] for run in runs]))}
        if len(runs) > 1 and all(logs.values()):  # else no training seed is in all of them yet
            curves = lambda key, scale=1.0: {label: [curve(m, key, scale) for m in ms] for label, ms in logs.items()}
            plot({f"{target}, success (%)": curves(f"eval/success_{target}", 100),
                  "twin, success (%)": curves("eval/success_twin", 100)}, f"results/{name}.png", ylabel="")
            plot({"": curves("eval/real_loss")}, f"results/{name}_loss.png", "imitation loss, held-out real")
            best = lambda m: max(curve(m, "eval/success_twin"), key=lambda point: point[::-1])[0]  # of equals the later
            loss = lambda ms, at: np.mean([dict(curve(m, "eval/real_loss"))[at(m)] for m in ms])
            changes = {label: f"{loss(ms, lambda m: 0):.3f} → {loss(ms, best):.3f}" for label, ms in logs.items()}
            if start:
                runs, changes = {prefix + start: "before RL", **runs}, {"before RL": "", **changes}
            rows = [[label, twin, in_target, changes[label]] for label, twin, in_target in zip(
                runs.values(), rates(runs, "twin"), rates(runs, target))]
            text.append(f"## {title}\n\n" + table(
                            ["push cube, π0.5", "twin", heading(target), "imitation loss, held-out real"], rows)
                        + f"\n![]({name}.png)\n![]({name}_loss.png)\n")

    def main_section(title, policies, steps=""):
        for domain in ("standin", "twin"):
            columns = []  # a policy's three, from the first task down to the paper's
            for policy in policies:
                runs = {task: [f"{task}-{policy}-{paradigm}{steps}" for paradigm in PARADIGMS] for task in TASKS}
                cells = entries(sum(runs.values(), []), domain)
                columns.append([*(rates(runs[task], domain) for task in TASKS),
                                compare([cells[i::len(PARADIGMS)] for i in range(len(PARADIGMS))]),
                                [f"*{x}*" for x in PAPER[policy]]])
            names = [*TASKS, "mean", *["*the paper, real robot, mean of its four tasks*"] * (domain == "standin")]
            text.append(f"## {title}: {DOMAINS[domain]}\n\n" + table(
                [heading(domain), *(f"{POLICIES[p]}: {paradigm}" for p in policies for paradigm in PARADIGMS.values())],
                [[name, *sum(cells, [])] for name, *cells in zip(names, *columns)]))
        for policy in policies:
            logs = {task: metrics.get(f"{task}-{policy}-rlco{steps}", {}).values() for task in TASKS}
            curves = {task: {domain: [curve(m, f"eval/success_{domain}", 100) for m in ms] for domain in ("twin", "standin")}
                      for task, ms in logs.items() if ms}
            if curves:
                plot(curves, f"results/main-{policy}{steps}.png")
                text.append(f"{POLICIES[policy]}, stage II on validation seeds, from stage I on:\n\n"
                            f"![](main-{policy}{steps}.png)\n")

    main_section("Main table", POLICIES)
    main_section("After a stage I of 1000 steps", ["tiny-pi05"], "-steps1000")

    rl_section("Forgetting, and the sweep of β", "forgetting", "sft",
               {"rlco" if b == 0.2 else f"rl-beta{b}": f"β = {b}" for b in BETAS})
    rl_section("Forgetting: RL of the action expert only", "expert_only", "sft",
               {f"rl_expert-beta{b}": f"β = {b}" for b in BETAS})
    for target in ("mild", "strong"):
        rl_section(f"A {target} gap", f"gap-{target}", f"sft-{target}",
                   {f"rl-{target}-beta{b}": f"β = {b}" for b in (0, 0.2)}, target)
    rl_section("Stage I with and without simulated demonstrations", "stage1", None,
               {"rlco": "after SFT co-training", "rlco_from_real": "after real-only SFT"})

    for title, name, x, paradigms, runs in (
            ("Share of simulated samples: push cube, π0.5", "alpha", "α", ("sft", "rlco"),
             {a: f"push_cube-tiny-pi05-{{}}{f'-alpha{a}' if a != 0.8 else ''}" for a in ALPHAS}),
            ("Real demonstrations: open drawer, π0.5", "real_demos", "real demonstrations", PARADIGMS,
             {n: f"open_drawer-tiny-pi05-{{}}{f'-real{n}' if n != 50 else ''}" for n in REAL_DEMOS})):
        cells = entries([run.format(p) for p in paradigms for run in runs.values()], "standin")
        if all(cells):
            columns = {PARADIGMS[p]: cells[i * len(runs):][:len(runs)] for i, p in enumerate(paradigms)}
            plot({"": {label: [[(at, 100 * np.divide(*entry[seed])) for at, entry in zip(runs, column)]
                               for seed in column[0]]
                       for label, column in columns.items()}}, f"results/{name}.png", "stand-in, success (%)", x)
            text.append(f"## {title}\n\n" + table([f"{x} ({heading('standin')})", *columns], [
                [at, *compare([[entry] for entry in row])] for at, *row in zip(runs, *columns.values())])
                + f"\n![]({name}.png)\n")

    for policy, label in POLICIES.items():
        rows = [[f"{task}, unseen {variation}",
                 *rates([f"{task}-{policy}-{paradigm}" for paradigm in PARADIGMS], "standin", variation)]
                for task in TASKS for variation in VARIATIONS if (f"{task}-{policy}-rlco", variation) in success]
        if rows:
            text.append(f"## Unseen variations, {label}\n\n" + table([heading("standin"), *PARADIGMS.values()], rows))
    write_file(Path("results/README.md"), "\n".join(text).encode())


if __name__ == "__main__":
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args = tyro.cli(Args)
    cells = [cell for seed in args.seeds for section, cell in experiment(seed) if section.startswith(args.only)]
    if not cells and args.only != "none":
        raise SystemExit(f"no section's name begins with {args.only!r}")
    failed = run(cells, max(1, args.jobs))
    report()
    if failed:
        raise SystemExit(f"not done: {', '.join(failed)}; see the logs in runs/experiment")
