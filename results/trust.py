"""What is tried against this code, and what survives; the last output stands in results/TRUST.md.

python -m results.trust kills     # kill -9 at random moments of every program; each must end as if nothing had been
python -m results.trust fuzz      # damaged datasets and checkpoints: read, or refused in one line
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

import checkpoints
import data
from checkpoints import UserError, one_line_errors
from policy import load_policy

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "results/TRUST.md"


def report(title: str, text: str) -> None:
    """Print a campaign's result, and put it into TRUST.md in the place of its last one."""
    section = f"## {title}\n\n{text.strip()}\n"
    print(section)
    sections = re.split(r"^(?=## )", REPORT.read_text(), flags=re.M) if REPORT.exists() else ["# Trust\n\n"]
    others = [other.strip() + "\n" for other in sections if not other.startswith(f"## {title}\n")]
    checkpoints.write_file(REPORT, "\n".join([*others, section]).encode())


# ---- kills --------------------------------------------------------------------------------------------------------

PROGRAMS = {  # in the order in which a user runs them: each works on what the ones before have left
    "collection": "data.py collect --num-twin 12 --num-real 6 --num-val 3",
    "stage I": "train_sft.py --steps 250 --batch-size 8 --evaluations 2 --eval-episodes 2 --num-envs 2",
    "stage II": "train_rlco.py --iterations 5 --critic-warmup 1 --num-envs 4 --minibatch-size 16 "
    "--anchor-batch-size 8 --eval-every 2 --eval-episodes 2 --eval-envs 2",
    "evaluation": "eval_real.py standin --episodes 4 --num-envs 2 --videos 1",
}


@dataclass
class Kills:
    """Kill every program again and again at random moments, every second time without its workers, and compare what it
    leaves in the end with what it leaves undisturbed: weights and numbers bit for bit, the names of all files, no
    process."""

    kills: int = 50
    """Kills of each program."""
    programs: tuple[str, ...] = tuple(PROGRAMS)
    """Which ones."""
    seed: int = 0
    """Of the moments."""


def start(program: str, folder: Path) -> subprocess.Popen:
    """Run a program in `folder`, as the head of a process group of its own."""
    script, *options = PROGRAMS[program].split()
    command = [sys.executable, str(ROOT / script), *options]
    with open(folder / "output.txt", "w") as output:
        return subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, start_new_session=True)


def is_running(group: int) -> bool:
    """Whether a process of this group is left, other than as a zombie."""
    states = subprocess.run(["ps", "-o", "stat=", "-g", str(group)], capture_output=True, text=True).stdout.split()
    return any(not state.startswith("Z") for state in states)


def left_by_a_run(folder: Path) -> dict:
    """What must not depend on whether the run was killed: names of all files, weights, metrics, results, data."""
    left = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.is_dir() or file.name == "output.txt" or "tfevents" in name:
            continue
        left[name] = None  # times are in it, or nothing but the names counts
        if file.name in ("metrics.json", "results.json"):
            content = json.loads(file.read_text())
            rows = content["results"] if isinstance(content, dict) else content
            left[name] = [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]
            left[name] = json.dumps(left[name])
        elif file.suffix in (".safetensors", ".parquet") or file.parent.name == "meta":
            left[name] = file.read_bytes()
    return left


def survive(program: str, before: Path, kills: int, rng: np.random.Generator) -> tuple[Path, str]:
    """Run a program in a copy of the folder `before` undisturbed, and in another killed `kills` times -> the first of
    the folders, and a row of the table."""
    undisturbed = before.with_name(f"{program}, undisturbed")
    shutil.copytree(before, undisturbed)
    began = time.time()
    if start(program, undisturbed).wait():
        raise UserError(f"{program} fails undisturbed: {(undisturbed / 'output.txt').read_text()[-2000:]}")
    seconds = time.time() - began
    folder = before.with_name(f"{program}, killed")
    shutil.copytree(before, folder)
    orphans = 0
    differing = Counter()
    kill = 0
    for kill in tqdm(range(kills), desc=program, unit="kill"):
        process = start(program, folder)
        try:
            process.wait(rng.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            alone = kill % 2
            (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
            process.wait()
            deadline = time.time() + 15
            while is_running(process.pid) and time.time() < deadline:
                time.sleep(0.1)
            orphans += is_running(process.pid)
            if kill < kills - 1:
                continue
            process = start(program, folder)
        # It has come to its end, or must do so now.
        failed = process.wait()
        expected = left_by_a_run(undisturbed)
        found = left_by_a_run(folder)
        wrong = [name for name in sorted({*expected, *found}) if expected.get(name, 0) != found.get(name, 0)]
        differing.update(wrong + [(folder / "output.txt").read_text()[-300:]] * (failed != 0))
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
    shutil.rmtree(folder)
    verdict = ", ".join(f"{name} ({n} times)" for name, n in differing.most_common()) or "nothing"
    return undisturbed, f"| {program} | {kills} | {orphans} | {verdict} |"


def kills(args: Kills) -> None:
    rng = np.random.default_rng(args.seed)
    rows = ["| program | kills | processes left | differs from an undisturbed run |", "| --- | --- | --- | --- |"]
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "empty")
        folder.mkdir()
        for program in PROGRAMS:
            if program in args.programs:
                folder, row = survive(program, folder, args.kills, rng)
                rows.append(row)
                print(row, flush=True)
            elif start(program, folder).wait():
                raise UserError(f"{program} fails: {(folder / 'output.txt').read_text()[-2000:]}")
    report(f"`python -m results.trust kills --kills {args.kills}`", "\n".join(rows))


# ---- damaged files -------------------------------------------------------------------------------------------------


@dataclass
class Fuzz:
    """Damage valid datasets and checkpoints in small ways and read them: each must be read, or refused by a UserError
    of one line, within a time and a memory limit."""

    mutations: int = 2000
    """Damaged copies of each kind of folder."""
    seed: int = 0
    """Of the damage."""
    kinds: tuple[str, ...] = ("images", "video", "ours", "openpi", "lerobot", "openvla")
    """Kinds of folder: datasets with images or video, checkpoints in each layout."""


WILD = (None, True, -1, 0, 3, 1e308, float("nan"), 2**70, "", "x", "../../x", [], {}, [[]], {"x": 1}, "é" * 300)


def damage_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """Flip, cut, repeat, or insert bytes, half of the time near the beginning, where the headers are."""
    if not content:
        return bytes(rng.integers(256, size=8, dtype=np.uint8))
    near = len(content) if rng.random() < 0.5 else min(len(content), 2000)
    place = int(rng.integers(near))
    length = int(rng.integers(1, 16))
    kind = rng.integers(4)
    if kind == 0:
        changed = bytes(rng.integers(256, size=length, dtype=np.uint8))
        return content[:place] + changed + content[place + length :]
    if kind == 1:
        return content[:place]
    if kind == 2:
        return content[:place] + content[place : place + length] * 2 + content[place + length :]
    return content[:place] + content[place + length :]


def damage_json(content, rng: np.random.Generator):
    """Remove or replace one value anywhere in it."""
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(content)
    if not places:
        return content
    node, key = places[rng.integers(len(places))]
    if rng.random() < 0.3:
        del node[key]
    else:
        node[key] = WILD[rng.integers(len(WILD))]
    return content


def damage(file: Path, rng: np.random.Generator) -> bytes:
    content = file.read_bytes()
    if file.suffix == ".json" and rng.random() < 0.7:
        return json.dumps(damage_json(json.loads(content), rng)).encode()
    return damage_bytes(content, rng)


def make_dataset(folder: Path, video: bool) -> None:
    rng = np.random.default_rng(0)
    with data.DatasetWriter(folder, 10, video) as writer:
        for length in (5, 7):
            writer.add_episode(
                dict(
                    image=rng.integers(256, size=(length, 32, 32, 3), dtype=np.uint8),
                    state=rng.uniform([0.4, -0.2, 0.1, -0.3, -0.3, -0.3, 0], 0.5, (length, 7)),
                    action=np.append(rng.normal(scale=0.01, size=(length, 6)), np.ones((length, 1)), 1),
                    prompt="push the cube",
                )
            )


def read_dataset(folder: Path) -> None:
    dataset = data.load_dataset(folder)
    data.Mixture(dataset, 4, horizon=2, seed=0)[0]
    data.statistics(dataset)


def make_checkpoint(folder: Path, layout: str) -> None:
    statistics = {"observation.state": {}, "action": {}}
    for number, kind in enumerate(("min", "q01", "mean", "q99", "max", "std")):
        for columns in statistics.values():
            columns[kind] = [float(number)] * 7
    name = "tiny-openvla" if layout == "openvla" else "tiny-pi05"
    load_policy(name, stats=statistics).save(folder, layout=None if layout == "ours" else layout)


def read_checkpoint(folder: Path) -> None:
    policy = load_policy(folder)
    obs = dict(image=torch.zeros(1, 64, 64, 3, dtype=torch.uint8), state=torch.zeros(1, 7), prompt=["push the cube"])
    policy.act(obs, sample=False)


def damaged_copies(original: Path, folder: Path, mutations: int, rng: np.random.Generator) -> Iterator[Path]:
    """Damage one file of `folder`, a copy of `original`, at a time -> its name; the next one is whole again."""
    files = [file for file in sorted(original.rglob("*")) if file.is_file() and file.name != ".lock"]
    for _ in range(mutations):
        name = files[rng.integers(len(files))].relative_to(original)
        if rng.random() < 0.03:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(damage(original / name, rng))
        yield name
        shutil.copy2(original / name, folder / name)


def outcome(read: Callable[[Path], None], folder: Path) -> str:
    """`read`, `refused`, or what is wrong."""

    def too_slow(number, frame):
        raise TimeoutError("longer than 30 s")

    signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(30)
    try:
        read(folder)
        return "read"
    except UserError as error:
        return "refused" if "\n" not in str(error) and str(error) else f"no single line: {str(error)[:200]!r}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in where if str(ROOT) in frame.filename]
        return f"{type(error).__name__} {str(error)[:80]!r} at {ours[-1] if ours else '?'}"
    finally:
        signal.alarm(0)


def try_damage(kind: str, mutations: int, seed: int) -> Counter:
    """Damage a folder of this kind `mutations` times -> how often each outcome, with the files of bad ones."""
    rng = np.random.default_rng((seed, sum(kind.encode())))
    outcomes = Counter()
    with tempfile.TemporaryDirectory() as root:
        original = Path(root, "original")
        if kind in ("images", "video"):
            make_dataset(original, video=kind == "video")
            read = read_dataset
        else:
            make_checkpoint(original, kind)
            read = read_checkpoint
        folder = Path(root, "damaged")
        shutil.copytree(original, folder)
        if outcome(read, folder) != "read":
            raise RuntimeError(f"the undamaged {kind} are not read: {outcome(read, folder)}")
        for name in damaged_copies(original, folder, mutations, rng):
            result = outcome(read, folder)
            outcomes[result if result in ("read", "refused") else f"{name}: {result}"] += 1
    return outcomes


def fuzz(args: Fuzz) -> None:
    # A header that promises a terabyte must not be believed.
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**33, resource.RLIM_INFINITY))
    torch.set_num_threads(1)
    rows = ["| folder | damaged | read | refused in one line | anything else |", "| --- | --- | --- | --- | --- |"]
    for kind in args.kinds:
        outcomes = try_damage(kind, args.mutations, args.seed)
        read, refused = outcomes.pop("read", 0), outcomes.pop("refused", 0)
        rows.append(f"| {kind} | {args.mutations} | {read} | {refused} | {sum(outcomes.values())} |")
        print(rows[-1])
        for text, count in outcomes.most_common():
            print(f"  {count} x {text}", flush=True)
    report(f"`python -m results.trust fuzz --mutations {args.mutations}`", "\n".join(rows))


if __name__ == "__main__":
    one_line_errors()
    args = tyro.extras.subcommand_cli_from_dict({"kills": Kills, "fuzz": Fuzz}, description=__doc__)
    kills(args) if isinstance(args, Kills) else fuzz(args)
