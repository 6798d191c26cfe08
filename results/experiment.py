"""The paper's experiment on one machine: every training run, every evaluation, every table and figure of results/.

    python results/experiment.py                        # all of it, one training seed; goes on where it was stopped
    python results/experiment.py --only main-open       # the groups whose name begins so
    python results/experiment.py --seeds 1 2 --jobs 4

A cell is one training run, in runs/experiment/, its log beside it. A group of cells is evaluated side by side, on the
same seeds, into results/GROUP-sSEED/; tables and figures are made from those files alone. A finished cell is never run
again, a killed one goes on. All settings are the scripts' defaults, but for those that stand in this file.
"""
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from envs import TASKS, VARIATIONS  # noqa: E402
from eval_real import wilson  # noqa: E402
from train_rlco import curve, plot  # noqa: E402

PARADIGMS = dict(real="real-only SFT", sft="SFT co-training", rlco="RL-Co")
POLICIES = {"tiny-pi05": "π0.5", "tiny-openvla": "OpenVLA"}
PAPER = {"tiny-pi05": (26.7, 45.9, 66.2), "tiny-openvla": (16.5, 40.0, 64.0)}  # real robot, mean of four tasks, %
ALL = "--train all --lr 2e-5"  # at the default learning rate, all weights leave the trust region in an iteration
REAL_DEMOS = (5, 10, 20, 50)
ALPHAS = (0.5, 0.8, 0.95)
BETAS = (0, 0.2, 1)


@dataclass
class Args:
    """Run what is missing of the experiment, then write results/README.md and its figures from what is there."""

    only: str = ""
    """run only the groups whose name begins with this; "none" runs nothing"""
    seeds: tuple[int, ...] = (1,)
    """training seeds"""
    jobs: int = os.cpu_count() or 1
    """runs at the same time, each on one thread (and its simulators)"""


@dataclass(frozen=True)
class Cell:
    """A command, its folder, and the cells that it starts from."""

    out: str
    command: str
    needs: tuple = ()


def stage1(task, policy, seed, name="sft", options=""):
    out = f"runs/experiment/{task}-{policy}-{name}-s{seed}"
    return Cell(out, f"train_sft.py --task {task} --policy {policy} --seed {seed} --out {out} {options}".strip())


def stage2(start, task, policy, seed, name="rlco", options=""):
    out = f"runs/experiment/{task}-{policy}-{name}-s{seed}"
    return Cell(out, f"train_rlco.py --task {task} --policy {start.out}/best --seed {seed} --out {out} {options}".strip(),
                (start,))


def group(name, seed, task, cells, options=""):
    policies = " ".join(f"{cell.out}/best" for cell in cells)
    out = f"results/{name}-s{seed}"
    return Cell(out, f"eval_real.py --task {task} --policies {policies} --videos 0 --out {out} {options}", tuple(cells))


def experiment(seed):
    """All groups, the main table first."""
    main = {(task, policy): [stage1(task, policy, seed, "real", "--alpha 0"), stage1(task, policy, seed),
                             stage2(stage1(task, policy, seed), task, policy, seed)]
            for policy in POLICIES for task in TASKS}
    for (task, policy), cells in main.items():
        yield group(f"main-{task}-{policy}", seed, task, cells)

    of = task, policy, seed = "push_cube", "tiny-pi05", seed
    real, sft, rlco = main[task, policy]
    yield group("forgetting", seed, task, [sft, rlco] + [
        stage2(sft, *of, f"rl-beta{beta}", f"--beta {beta}") for beta in BETAS if beta != 0.2])
    yield group("forgetting_all", seed, task, [sft] + [
        stage2(sft, *of, f"rl_all-beta{beta}", f"--beta {beta} {ALL}") for beta in BETAS])
    for target in ("mild", "strong"):
        start = stage1(*of, f"sft-{target}", f"--target {target}")
        yield group(f"gap-{target}", seed, task, [start] + [
            stage2(start, *of, f"rl-{target}-beta{beta}", f"--target {target} --beta {beta}") for beta in (0, 0.2)],
            f"--target {target}")
    yield group("stage1", seed, task, [rlco, stage2(real, *of, "rlco_from_real")])
    starts = {a: stage1(*of, f"sft-alpha{a}", f"--alpha {a}") for a in ALPHAS if a != 0.8}
    yield group("alpha", seed, task, [sft, rlco] + [cell for a, start in starts.items()
                                                    for cell in (start, stage2(start, *of, f"rlco-alpha{a}"))])

    of = task, policy, seed = "open_drawer", "tiny-pi05", seed
    cells = list(main[task, policy])
    for n in REAL_DEMOS[:-1]:
        few = f"--num-real {n}"
        start = stage1(*of, f"sft-real{n}", few)
        cells += [stage1(*of, f"real-real{n}", f"--alpha 0 {few}"), start, stage2(start, *of, f"rlco-real{n}", few)]
    yield group("real_demos", seed, task, cells)

    for (task, policy), cells in main.items():
        for variation in VARIATIONS:
            yield group(f"unseen_{variation}-{task}-{policy}", seed, task, cells, f"--variation {variation}")


def done(cell):
    return Path(cell.out, "results.json" if cell.out.startswith("results") else "done").exists()


def run(groups, jobs):
    """Run all cells that are not done, `jobs` at a time, a cell after those that it needs -> the ones that failed."""
    todo, running, failed = {}, {}, set()

    def want(cell):  # depth first: what is begun is finished before the next group begins
        if not done(cell):
            for need in cell.needs:
                want(need)
            todo[cell.out] = cell

    for cell in groups:
        want(cell)
    for task, target in {(c.command.split("--task ")[1].split()[0], c.command.split("--target ")[1].split()[0]
                          if "--target" in c.command else "standin") for c in todo.values()}:
        subprocess.run([sys.executable, "data.py", "--task", task, "--target", target], check=True)
    Path("runs/experiment").mkdir(parents=True, exist_ok=True)
    while todo or running:
        for cell in [c for c in todo.values() if all(map(done, c.needs))][:jobs - len(running)]:
            del todo[cell.out]
            if cell.out.startswith("results"):  # before the evaluation, whose results say that all is there
                Path(cell.out).mkdir(exist_ok=True)
                for need in cell.needs:
                    if Path(need.out, "metrics.json").exists():
                        shutil.copy(f"{need.out}/metrics.json", f"{cell.out}/{Path(need.out).name}.json")
            with open(f"runs/experiment/{Path(cell.out).name}.log", "a") as log:
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
                elif cell.out.startswith("runs"):
                    Path(cell.out, "done").touch()
        if not running and not any(all(map(done, c.needs)) for c in todo.values()):
            break  # what is left needs what has failed
        time.sleep(1)
    return sorted(failed) + sorted(todo)


# --------------------------------------------------------------------------------------------------- tables and figures
def collected():
    """{(group, cell): {domain: [(successes, episodes) of each training seed]}}, {(group, cell): [metrics of each]}."""
    success, metrics = {}, {}
    for path in sorted(Path("results").glob("*-s*/results.json")):
        name = path.parent.name.rsplit("-s", 1)[0]
        for r in json.loads(path.read_text())["results"]:
            run = Path(r["policy"]).parent.name  # TASK-POLICY-CELL-sSEED
            key = name, run.split("-", 3)[3].rsplit("-s", 1)[0]
            success.setdefault(key, {}).setdefault(r["domain"], []).append((r["successes"], r["episodes"]))
            if r["domain"] == "twin" and (file := path.parent / f"{run}.json").exists():
                metrics.setdefault(key, []).append(json.loads(file.read_text()))
    return success, metrics


def rate(entry):
    """Success with its 95 % Wilson interval, all episodes of all training seeds together; each seed's in brackets."""
    if not entry:
        return "–"
    successes, episodes = map(sum, zip(*entry))
    low, high = wilson(successes, episodes)
    each = f" ({', '.join(f'{100 * s / n:.0f}' for s, n in entry)})" if len(entry) > 1 else ""
    return f"{100 * successes / episodes:.0f} % [{100 * low:.0f}, {100 * high:.0f}]{each}"


def table(head, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def report():
    success, metrics = collected()
    text = ["# Results\n\nMade by `python results/experiment.py`. Success on unseen episodes, the same in every cell of a "
            "table, with 95 % Wilson intervals over the episodes of all training seeds together (each seed's own rate in "
            "brackets, where there are several). **The stand-in is a second simulated domain, not a real robot.** "
            "Checkpoints are the best on validation seeds in the twin.\n"]

    def rates(name, cells, domain):
        return [rate(success.get((name, cell), {}).get(domain)) for cell in cells]

    def curves(name, cells, key, scale=1.0):
        return {label: [curve(m, key, scale) for m in metrics[name, cell]] for cell, label in cells.items()
                if (name, cell) in metrics}

    def rl_section(title, name, start, cells, target="standin"):
        """Success and the imitation loss on held-out real demonstrations, before RL (the cell `start`) and after."""
        cells = {cell: label for cell, label in cells.items() if (name, cell) in metrics}
        if cells:
            plot({f"{target}, success (%)": curves(name, cells, f"eval/success_{target}", 100),
                  "twin, success (%)": curves(name, cells, "eval/success_twin", 100)}, f"results/{name}.png", ylabel="")
            plot({"": curves(name, cells, "eval/real_loss")}, f"results/{name}_loss.png", "imitation loss, held-out real")
            loss = lambda cell, i: sum(m[i]["eval/real_loss"] for m in metrics[name, cell]) / len(metrics[name, cell])
            both = lambda cell: [*rates(name, [cell], "twin"), *rates(name, [cell], target)]
            rows = [["before RL", *both(start), ""]] if start else []
            rows += [[label, *both(cell), f"{loss(cell, 0):.3f} → {loss(cell, -1):.3f}"] for cell, label in cells.items()]
            text.append(f"## {title}\n\n" + table(["push cube, π0.5", "twin", target, "imitation loss, held-out real"], rows)
                        + f"\n![]({name}.png)\n![]({name}_loss.png)\n")

    for policy, label in POLICIES.items():
        groups = {task: f"main-{task}-{policy}" for task in TASKS if (f"main-{task}-{policy}", "rlco") in success}
        for domain in ("standin", "twin") if groups else ():
            entries = [[success[name, cell][domain] for name in groups.values()] for cell in PARADIGMS]
            rows = [[task, *rates(name, PARADIGMS, domain)] for task, name in groups.items()]
            if len(groups) > 1:
                rows.append([f"all {len(groups)}", *(rate([tuple(map(sum, zip(*sum(e, []))))]) for e in entries)])
            if domain == "standin":
                rows.append(["*the paper, real robot, 4 tasks*", *(f"*{x} %*" for x in PAPER[policy])])
            text.append(f"## {label} (`{policy}`): {domain}\n\n" + table(["", *PARADIGMS.values()], rows))
        if groups:
            plot({task: {domain: [curve(m, f"eval/success_{domain}", 100) for m in metrics[name, "rlco"]]
                         for domain in ("twin", "standin")} for task, name in groups.items()}, f"results/main-{policy}.png")
            text.append(f"Stage II on validation seeds, from stage I on:\n\n![](main-{policy}.png)\n")

    rl_section("Forgetting, and the sweep of β: RL of the action expert", "forgetting", "sft",
               {"rlco" if b == 0.2 else f"rl-beta{b}": f"β = {b}" for b in BETAS})
    rl_section("Forgetting: RL of all weights", "forgetting_all", "sft", {f"rl_all-beta{b}": f"β = {b}" for b in BETAS})
    for target in ("mild", "strong"):
        rl_section(f"A {target} gap", f"gap-{target}", f"sft-{target}",
                   {f"rl-{target}-beta{b}": f"β = {b}" for b in (0, 0.2)}, target)
    rl_section("Stage I with and without simulated demonstrations", "stage1", None,
               {"rlco": "after SFT co-training", "rlco_from_real": "after real-only SFT"})

    for title, name, head, cells in (
            ("Sweep of α", "alpha", ["α", "SFT co-training", "RL-Co"],
             {a: ["sft", "rlco"] if a == 0.8 else [f"sft-alpha{a}", f"rlco-alpha{a}"] for a in ALPHAS}),
            ("Real demonstrations: open drawer, π0.5", "real_demos", ["number", *PARADIGMS.values()],
             {n: [f"{p}-real{n}" if n < REAL_DEMOS[-1] else p for p in PARADIGMS] for n in REAL_DEMOS})):
        if (name, "rlco") in success:
            text.append(f"## {title}: stand-in\n\n" + table(head, [[x, *rates(name, c, "standin")] for x, c in cells.items()]))

    for policy, label in POLICIES.items():
        rows = [[f"{task}, unseen {variation}", *rates(name, PARADIGMS, "standin")] for task in TASKS for variation in VARIATIONS
                if ((name := f"unseen_{variation}-{task}-{policy}"), "rlco") in success]
        if rows:
            text.append(f"## Unseen variations, {label}: stand-in\n\n" + table(["", *PARADIGMS.values()], rows))
    Path("results/README.md").write_text("\n".join(text))


if __name__ == "__main__":
    os.chdir(ROOT)
    args = tyro.cli(Args)
    cells = [cell for seed in args.seeds for cell in experiment(seed)
             if Path(cell.out).name.startswith(args.only)]
    failed = run(cells, args.jobs)
    report()
    if failed:
        raise SystemExit(f"not done: {', '.join(failed)}; see the logs in runs/experiment")
