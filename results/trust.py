"""What is tried against this code, and what survives; the last output stands in results/TRUST.md.

python -m results.trust kills     # kill -9 at random moments of every program; each must end as if nothing had been
python -m results.trust fuzz      # damaged datasets and checkpoints: read, or refused in one line
python -m results.trust server    # good clients among bad ones
python -m results.trust arm       # faults at random moments of trials on franka-sim
"""

import fcntl
import http.server
import io
import json
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import cv2
import msgpack
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


def report(title: str, command: str, text: str) -> None:
    """Print a campaign's result, and put it into TRUST.md in the place of its last one."""
    section = f"## {title}\n\n`python -m results.trust {command}`\n\n{text.strip()}\n"
    print(section, flush=True)
    folder = os.open(REPORT.parent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)  # other campaigns may run beside this one
    sections = re.split(r"^(?=## )", REPORT.read_text(), flags=re.M) if REPORT.exists() else ["# Trust\n\n"]
    others = [other.strip() + "\n" for other in sections if not other.startswith(f"## {title}\n")]
    checkpoints.write_file(REPORT, "\n".join([*others, section]).encode())
    os.close(folder)


# ---- kills --------------------------------------------------------------------------------------------------------

TINY_STAGE_1 = "train_sft.py --steps 24 --batch-size 2 --save-every 8 --evaluations 1 --eval-episodes 1 --num-envs 1"
TINY_STAGE_2 = (
    "train_rlco.py --iterations 3 --critic-warmup 1 --num-envs 2 --minibatch-size 16 --anchor-batch-size 4 "
    "--eval-every 3 --eval-episodes 1 --eval-envs 1"
)
TINY_EVALUATION = "eval_real.py standin --policies runs/rlco/best --episodes 2 --num-envs 1 --videos 1"
# Its workers begin as forks of it, with all that is imported.
TORCHRUN = "torchrun --standalone --nproc-per-node 2 --run-path --start-method fork"
PROGRAMS = {  # in the order in which a user runs them: each works on what the ones before have left
    "collection": "data.py collect --num-twin 12 --num-real 6 --num-val 3",
    "stage I": TINY_STAGE_1,
    "stage II": TINY_STAGE_2,
    "evaluation": TINY_EVALUATION,
    "stage I, two processes": f"{TORCHRUN} {ROOT}/{TINY_STAGE_1} --accumulate 2 --out two/sft",
    "stage II, two processes": f"{TORCHRUN} {ROOT}/{TINY_STAGE_2} --accumulate 2 --out two/rlco",
    "evaluation, two processes": f"{TORCHRUN} {ROOT}/{TINY_EVALUATION} --out two/eval",
}


@dataclass
class Kills:
    """Kill every program again and again at random moments, every second time without its workers, and compare what it
    leaves in the end with what it leaves undisturbed: weights and numbers bit for bit, the names of all files, no
    process. Recording, where an arm moves, must keep what was recorded to the last byte."""

    kills: int = 50
    """Kills of each program."""
    programs: tuple[str, ...] = (*PROGRAMS, "recording")
    """Which ones."""
    seed: int = 0
    """Of the moments."""
    debug: bool = False
    """Show the traceback of an error in the input, too."""


def write_output_to(file: str | Path, mode: str) -> None:
    """Let this process, and those that it starts, print into a file from now on."""
    with open(file, mode) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)


def end_with_the_campaign() -> None:
    """Kill this process and its group when the campaign has been cut off, or the program would go on to its end."""
    multiprocessing.parent_process().join()
    os.killpg(0, signal.SIGKILL)


def run_program(command: str, folder: Path) -> None:
    """What `python COMMAND` does in `folder`, as the head of a process group of its own."""
    os.setsid()
    os.chdir(folder)
    write_output_to("output.txt", "w")
    script, *options = command.split()
    sys.argv = [script, *options]
    threading.Thread(target=end_with_the_campaign, daemon=True).start()
    if script == "torchrun":
        runpy.run_module("torch.distributed.run", run_name="__main__")
    else:
        runpy.run_path(str(ROOT / script), run_name="__main__")


def processes() -> multiprocessing.context.BaseContext:
    """Where processes begin with torch and ManiSkill imported: that takes longer than all else that a tiny run does."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_sft", "train_rlco", "eval_real"])
    return context


def start(command: str, folder: Path) -> multiprocessing.Process:
    process = processes().Process(target=run_program, args=(command, folder))
    process.start()
    return process


def finish(process: multiprocessing.Process, folder: Path) -> str:
    """Wait for a program to end -> "" or what is wrong."""
    process.join(900)
    if process.exitcode == 0:
        return ""
    kill(process, folder, alone=False)
    what = "fails" if process.exitcode > 0 else "hangs"
    return f"{what}: {(folder / 'output.txt').read_text()[-2000:]}"


def kill(process: multiprocessing.Process, folder: Path, alone: bool) -> bool:
    """kill -9 of a process, or of its group -> whether any that was started in `folder` is left four minutes later."""
    if not alone:
        with suppress(ProcessLookupError):  # it has no group yet
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
    deadline = time.time() + 240  # a worker that is importing, or looks for torchrun, notices when it is done
    while is_running(folder) and time.time() < deadline:
        time.sleep(0.1)
    return is_running(folder)


def is_running(folder: Path) -> bool:
    """Whether a process that was started in `folder`, or one of its own, is left, other than as a zombie."""
    for place in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):
            if os.readlink(place) == str(folder):
                return True
    return False


def left_by_a_run(folder: Path) -> dict:
    """What must not depend on whether the run was killed: names of all files, weights, metrics, results, data."""
    left = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.is_dir() or file.name == "output.txt" or "tfevents" in name:
            continue
        if file.name.startswith("made_by_from_"):  # each start that goes on leaves one
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


def survive(program: str, command: str, before: Path, kills: int, rng: np.random.Generator) -> Iterator[list]:
    """Run a program in a copy of the folder `before` undisturbed, and in another killed `kills` times -> after each
    kill, and each end, a row of the table."""
    undisturbed = before.with_name(f"{program}, undisturbed")
    shutil.copytree(before, undisturbed)
    warm = processes().Process(target=time.sleep, args=(0,))  # the imports are not what is killed
    warm.start()
    warm.join()
    began = time.time()
    wrong = finish(start(command, undisturbed), undisturbed)
    if wrong:
        raise UserError(f"{program}, undisturbed, {wrong}")
    seconds = time.time() - began
    print(f"{program} takes {seconds:.1f} s", flush=True)
    expected = left_by_a_run(undisturbed)
    folder = before.with_name(f"{program}, killed")
    shutil.copytree(before, folder)
    ended = orphans = done = 0
    differing = Counter()
    bar = tqdm(total=kills, desc=program, unit="kill")
    while done < kills:
        process = start(command, folder)
        process.join(rng.uniform(0, seconds))
        if process.is_alive():
            orphans += kill(process, folder, alone=done % 2 == 1)
            done += 1
            bar.update()
            if done < kills:
                yield [done, ended, orphans, verdict(differing)]
                continue
            process = start(command, folder)
        # It has come to its end, or must do so now.
        wrong = finish(process, folder)
        found = left_by_a_run(folder)
        names = [name for name in sorted({*expected, *found}) if expected.get(name, 0) != found.get(name, 0)]
        differing.update([wrong] if wrong else names)
        ended += 1
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        yield [done, ended, orphans, verdict(differing)]
    shutil.rmtree(folder)


def verdict(wrong: Counter) -> str:
    return ", ".join(f"{name} ({n} times)" for name, n in wrong.most_common()) or "nothing"


def kills(args: Kills) -> None:
    known = (*PROGRAMS, "recording")
    if not set(args.programs) <= set(known):
        raise UserError(f"--programs: of {', '.join(known)}")
    rng = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "empty")
        folder.mkdir()
        for program in PROGRAMS:
            if program in args.programs:
                heads = ["kills", "of these runs ended", "processes left", "differs from an undisturbed run"]
                write_kills(args, program, heads, survive(program, PROGRAMS[program], folder, args.kills, rng))
                folder = folder.with_name(f"{program}, undisturbed")
            elif set(args.programs) - {"recording"}:  # one that comes later works on this one's files
                wrong = finish(start(PROGRAMS[program], folder), folder)
                if wrong:
                    raise UserError(f"{program} {wrong}")
        if "recording" in args.programs:
            heads = ["kills", "of these recordings ended", "processes left", "slowest at rest, s", "wrong"]
            write_kills(args, "recording", heads, survive_recording(args.kills, rng, Path(root)))


def write_kills(args: Kills, program: str, heads: list[str], rows: Iterator[list]) -> None:
    """Report after each kill, so that what was done stands there if the campaign is cut off."""
    for row in rows:
        table = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
        table.append(f"| {' | '.join(map(str, row))} |")
        report(f"kills: {program}", f'kills --kills {args.kills} --programs "{program}"', "\n".join(table))


# ---- damaged files -------------------------------------------------------------------------------------------------


@dataclass
class Fuzz:
    """Damage what is read in small ways, each time one file: it must be read, or refused by a UserError of one line,
    within a time and a memory limit."""

    mutations: int = 2000
    """Damaged copies of each kind of folder."""
    seed: int = 0
    """Of the damage."""
    kinds: tuple[str, ...] = ("images", "video", "ours", "openpi", "lerobot", "openvla") + (
        "run",
        "evaluation",
        "trials",
        "message",
    )
    """What: datasets with images or video, checkpoints in each layout, the state of a killed run, the results of
    evaluations in the simulator and on the arm, a message to the server."""
    debug: bool = False
    """Show the traceback of an error in the input, too."""


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
    if file.suffix == ".msgpack" and rng.random() < 0.7:
        return msgpack.packb(damage_json(msgpack.unpackb(content, strict_map_key=False), rng), default=str)
    return damage_bytes(content, rng)


def make_dataset(folder: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    with data.DatasetWriter(folder, 10, kind == "video") as writer:
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


STATISTICS = {
    feature: {kind: [float(n)] * 7 for n, kind in enumerate(("min", "q01", "mean", "q99", "max", "std"))}
    for feature in ("observation.state", "action")
}


def make_checkpoint(folder: Path, layout: str) -> None:
    name = "tiny-openvla" if layout == "openvla" else "tiny-pi05"
    load_policy(name, stats=STATISTICS).save(folder, layout=None if layout == "ours" else layout)


def read_checkpoint(folder: Path) -> None:
    policy = load_policy(folder)
    obs = dict(image=torch.zeros(1, 64, 64, 3, dtype=torch.uint8), state=torch.zeros(1, 7), prompt=["push the cube"])
    policy.act(obs, sample=False)


def make_run(folder: Path, _) -> None:
    policy = load_policy("tiny-pi05")
    state = dict(args=dict(task="push_cube"), step=3, best=0.5, policy=policy.state_dict())
    checkpoints.write_file(folder / "trainer.pt", state)


def read_run(folder: Path) -> None:
    state = checkpoints.resume_run(folder, dict(task="push_cube"), free=set())
    if state:
        load_policy("tiny-pi05").load_state_dict(state["policy"])
        assert (state["step"], state["best"]) == (3, 0.5)


class Anew(Exception):
    """What was found is not taken for this evaluation, which begins."""


def begin_anew(*_, **__):
    raise Anew


@contextmanager
def patched_evaluation() -> Iterator[ModuleType]:
    """eval_real.py with two policies that nobody has to load, and no simulator. It is as it was afterwards."""
    import eval_real

    def policies(names, _):
        return {name: SimpleNamespace(sha256=lambda: "weights", image_size=64) for name in names}

    replaced = dict(load_policies=policies, provenance=lambda *_: dict(commit="abc"), make_world=begin_anew)
    with patch.multiple(eval_real, **replaced), patch("envs.make", begin_anew):
        yield eval_real


def make_evaluation(folder: Path, _) -> None:
    from eval_real import summary

    seeds = range(4)
    rows = []
    for domain in ("twin", "standin"):
        for name, success in (("before", [False, True, False, True]), ("after", [True, True, True, False])):
            cell = summary(name, domain, "push_cube", success, [56, 40, 56, 31])
            rows.append(dict(cell, seeds=[seeds[0], seeds[-1]], success=success, length=[56, 40, 56, 31]))
    weights = dict(before="weights", after="weights")
    checkpoints.write_file(
        folder / "results.json", dict(results=rows, differences=[], weights=weights, commit="abc", finished=True)
    )


def read_evaluation(folder: Path) -> None:
    with patched_evaluation() as evaluation, suppress(Anew), redirect_stdout(io.StringIO()) as printed:
        evaluation.standin(evaluation.StandinArgs(policies=("before", "after"), episodes=4, videos=0, out=folder))
        assert "| 75 % [30, 95] of 4, 46 steps |" in printed.getvalue(), "read wrong"
    checkpoints.CLAIMS.pop().close()


def make_trials(folder: Path, _) -> None:
    with patched_evaluation() as evaluation:
        args = evaluation.FrankaArgs(policies=("before", "after"), trials=3, out=folder)
        trials = evaluation.Trials(args, evaluation.load_policies(args.policies, ""))
        for seed, name in trials.missing()[:4]:
            trials.add("trials", policy=name, seed=seed, success=name == "after", steps=40, late=1, decisions=10)
        trials.add("void", policy="before", seed=seed, why="aborted")
    checkpoints.CLAIMS.pop().close()


def read_trials(folder: Path) -> None:
    with patched_evaluation() as evaluation, suppress(Anew), redirect_stdout(io.StringIO()):
        evaluation.franka(evaluation.FrankaArgs(policies=("before", "after"), trials=2, out=folder))
    checkpoints.CLAIMS.pop().close()


def make_message(folder: Path, _) -> None:
    from eval_real import pack_array

    folder.mkdir()
    (folder / "observation.msgpack").write_bytes(msgpack.packb(observation(0, 0), default=pack_array))


def read_message(folder: Path) -> None:
    from eval_real import read_obs, unpack

    file = folder / "observation.msgpack"
    try:
        obs = read_obs(unpack(file.read_bytes() if file.exists() else b""), served_policy(), "push")
    except ValueError as error:
        if "\n" in str(error) or not str(error):
            raise RuntimeError(f"no single line: {error!r}") from None
        raise UserError(str(error)) from None
    assert served_policy().act(obs, sample=False).actions.isfinite().all()


@cache
def served_policy():
    return load_policy("tiny-pi05", stats=STATISTICS)


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


KINDS = dict.fromkeys(("images", "video"), (make_dataset, read_dataset))
KINDS |= dict.fromkeys(("ours", "openpi", "lerobot", "openvla"), (make_checkpoint, read_checkpoint))
KINDS |= dict(run=(make_run, read_run), evaluation=(make_evaluation, read_evaluation))
KINDS |= dict(trials=(make_trials, read_trials), message=(make_message, read_message))


def try_damage(kind: str, mutations: int, seed: int) -> Counter:
    """Damage a folder of this kind `mutations` times -> how often each outcome, with the files of bad ones."""
    rng = np.random.default_rng((seed, sum(kind.encode())))
    outcomes = Counter()
    with tempfile.TemporaryDirectory() as root:
        original = Path(root, "original")
        make, read = KINDS[kind]
        make(original, kind)
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
    report("fuzz", f"fuzz --mutations {args.mutations}", "\n".join(rows))


# ---- the server ----------------------------------------------------------------------------------------------------

ENVIRON = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"}
os.environ.setdefault("FRANKA_REALTIME", "ignore")  # no real-time kernel here


@dataclass
class Server:
    """Eight clients at one server: three good ones, whose actions must be those that they get alone, and one each that
    is slow, silent, broken, hostile, and a stranger without the key."""

    minutes: float = 10.0
    """How long."""
    seed: int = 0
    """Of what is sent."""
    debug: bool = False
    """Show the traceback of an error in the input, too."""


def observation(client: int, step: int) -> dict:
    rng = np.random.default_rng((client, step))
    return dict(image=rng.integers(0, 256, (64, 64, 3), np.uint8), state=rng.random(7, np.float32), prompt="push")


def attack(port: int, key: str, seconds: float, seed: int) -> tuple[dict, list, Counter]:
    """Eight clients for some seconds -> what each good one gets alone, (client, actions) of every round of theirs, how
    often the others came."""
    import msgpack
    from websockets.exceptions import ConnectionClosed, InvalidHandshake
    from websockets.sync.client import connect

    from eval_real import pack_array, unpack_array

    url = f"ws://127.0.0.1:{port}"
    headers = {"Authorization": f"Api-Key {key}"}
    end = [float("inf")]
    kept = []
    others = Counter()

    def opened(**more):
        return connect(url, compression=None, max_size=None, additional_headers=headers, **more)

    def episode(client):
        """Five decisions of a good client."""
        actions = []
        with opened() as ws:
            ws.recv()
            for step in range(5):
                ws.send(msgpack.packb(observation(client, step), default=pack_array))
                actions.append(msgpack.unpackb(ws.recv(), object_hook=unpack_array)["actions"])
        return np.stack(actions)

    def good(client):
        kept.append((client, episode(client)))

    def slow(rng):
        with opened() as ws:
            message = msgpack.packb(observation(9, 0), default=pack_array)
            ws.send(message[i : i + 500] for i in range(0, len(message), 500) if not time.sleep(0.05))
            ws.recv()
            ws.recv()

    def silent(rng):
        with opened() as ws, socket.create_connection(("127.0.0.1", port)):
            ws.recv()
            time.sleep(min(60, max(0, end[0] - time.time())))

    def broken(rng):
        with opened() as ws:
            ws.recv()
            message = msgpack.packb(observation(9, 1), default=pack_array)
            ws.send(message)
            if rng.random() < 0.5:
                ws.socket.sendall(b"\x82\x7e\x40\x00" + message[:100])  # a message that says it is longer
            ws.socket.close()

    def hostile(rng):
        garbage = (
            rng.bytes(1000),
            b"\x91" * 10000,
            b"\x80" * 1000,
            b"\xdd\x00\x0f\xff\xff" + b"\x80" * (1 << 20),
            bytes(1 << 24),
            bytes((1 << 24) + 1),
            msgpack.packb({**observation(9, 2), "state": np.full(7, 1e300)}, default=pack_array),
            msgpack.packb(dict(observation(9, 3), image=np.zeros((2000, 2000, 3), np.uint8)), default=pack_array),
        )
        with opened() as ws:
            ws.recv()
            for _ in range(20):
                ws.send(garbage[rng.integers(len(garbage))])
                if rng.random() < 0.7:
                    answer = ws.recv()
                    if not isinstance(answer, str) or not answer.strip() or "\n" in answer:
                        raise RuntimeError(f"not a line: {answer!r:.200}")

    def stranger(rng):
        with suppress(InvalidHandshake, ConnectionClosed):
            connect(url, additional_headers={"Authorization": "Api-Key guessed"} if rng.random() < 0.5 else {})
            raise RuntimeError("a stranger got in")
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(rng.bytes(300))
        time.sleep(0.1)

    problems = []

    def go_on(work, argument):
        while time.time() < end[0] and not problems:
            try:
                others[work.__name__] += 1
                work(argument)
            except (ConnectionClosed, InvalidHandshake, OSError) as error:
                if work is good:
                    problems.append(error)
            except Exception as error:
                problems.append(error)

    alone = {client: episode(client) for client in range(3)}
    end[0] = time.time() + seconds
    rngs = np.random.default_rng(seed).spawn(5)
    works = [(good, client) for client in alone] + list(zip((slow, silent, broken, hostile, stranger), rngs))
    threads = [threading.Thread(target=go_on, args=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    del others["good"]
    return alone, kept, others


def memory(pid: int, kind: str = "VmRSS") -> int:
    """MB that a process holds, or VmHWM: has held at most."""
    return int(re.search(rf"{kind}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) // 1000


def server(args: Server) -> None:
    with tempfile.TemporaryDirectory() as root:
        make_checkpoint(Path(root, "policy"), "ours")
        command = [sys.executable, ROOT / "eval_real.py", "serve", "--policy", Path(root, "policy"), "--port", "0"]
        environ = {**ENVIRON, "RLCO_API_KEY": "key"}
        process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            port = int(process.stdout.readline().rsplit(":", 1)[1])
            rounds = wrong = 0
            others = Counter()
            held = [memory(process.pid)]
            for part in range(10):
                alone, kept, came = attack(port, "key", 6 * args.minutes, args.seed + part)
                rounds += len(kept)
                wrong += sum(not np.array_equal(actions, alone[client]) for client, actions in kept)
                others += came
                time.sleep(12)  # until the last connections are closed, with the messages that they hold
                held.append(memory(process.pid))
                most = memory(process.pid, "VmHWM")
                print(
                    f"{rounds} rounds of good clients, {wrong} with other actions; {dict(others)}; {held} MB",
                    flush=True,
                )
            process.send_signal(signal.SIGTERM)  # a job in the background ignores Ctrl-C
            output = process.communicate(timeout=60)[0]
        finally:
            process.kill()
    text = f"""| | |
| --- | --- |
| episodes of 5 decisions of the three good clients | {rounds} |
| of these with other actions than alone | {wrong} |
| visits of the others | {", ".join(f"{name} {count}" for name, count in others.items())} |
| memory of the server before, and after each tenth when all have gone, MB | {", ".join(map(str, held))} |
| its most at any moment, MB | {most} |
| tracebacks that the server has printed | {output.count("Traceback")} |"""
    report("server", f"server --minutes {args.minutes:g}", text)


# ---- the arm -------------------------------------------------------------------------------------------------------


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)


class Stream(http.server.ThreadingHTTPServer):
    """A network camera (MJPEG over HTTP). `mode`: "live" has a sensor's noise, "frozen" repeats a picture, "dropped" is
    silent."""

    daemon_threads = True

    def __init__(self):
        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                rng, last = np.random.default_rng(0), None
                try:
                    while True:
                        if self.server.mode == "live" or last is None:
                            noisy = self.server.scene + rng.integers(-8, 9, self.server.scene.shape)
                            last = cv2.imencode(".jpg", noisy.clip(0, 255).astype(np.uint8))[1].tobytes()
                        if self.server.mode != "dropped":
                            self.wfile.write(
                                b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s\r\n"
                                % (len(last), last)
                            )
                        time.sleep(1 / 30)
                except OSError:
                    pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.mode, self.scene = "live", np.full((120, 160, 3), 128, int)
        self.scene[40:80, 60:100] = (200, 60, 20)  # BGR: blue, in the middle
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/camera.mjpg"


class Simulator:
    """results/simulator.py. The communication constraints (20 ms without an answer are a reflex) trip by themselves
    on a loaded machine: on where a test is about them.
    """

    def __init__(self, python, folder):
        self.python, self.folder, self.process = python, folder, None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.ip = f"127.0.0.1:{free.getsockname()[1]}"

    def start(self, *flags, lost=20):
        self.stop()
        for fault in ("stuck", "unplugged"):
            (self.folder / fault).unlink(missing_ok=True)
        port = self.ip.split(":")[1]
        with open(self.folder / "log", "w") as log:
            self.process = subprocess.Popen(
                [self.python, ROOT / "results/simulator.py", self.folder, port, str(lost), *flags],
                env=ENVIRON,
                stdout=log,
                stderr=log,
            )
        wait_for(self.answers)
        return self

    def answers(self):
        assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
        import franka

        try:
            return franka.Robot(self.ip).read_once().robot_mode == "idle"
        except franka.FrankaError:
            return False

    def stop(self):
        if self.process:
            self.process.kill()
            self.process.wait()
        self.process = None


@dataclass
class Arm:
    """Evaluate a scripted policy on franka-sim, trial after trial, and let something go wrong at a random moment of
    each: the arm must come to rest in time, never leave its box, and the trials before must be kept."""

    faults: int = 200
    """How many, of each kind as many."""
    seed: int = 0
    """Of the moments."""
    debug: bool = False
    """Show the traceback of an error in the input, too."""


REST = 3.0  # s after a fault within which the arm is at rest: it is noticed after AGE at the latest, and to stop takes
# the simulated arm 0.3 to 0.8 s on a busy machine
AGE = 1.0  # s, --max-image-age, and half of --max-silence: the defaults are 0.5, all is late now and then on busy cores
SLOW = 0.6  # of the clock: where the simulation is slower, so is its arm, and a fault that seems late is tried again
ENDS = {"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM, "closed terminal": signal.SIGHUP, "kill -9": signal.SIGKILL}
LAST = (*ENDS, "lost connection")  # these end the program
SAID = {"slow policy": "the policy is slow", "stuck hand": "the hand is stuck"}  # where a trial may still count
FAULTS = (*LAST, "stale picture", "frozen picture", "NaN", "huge step", "slow policy", "stuck hand", "reflex")


class Scripted:
    """A policy that wanders, or does what FOLDER/fault says."""

    image_size = 64
    chunk = 4

    def __init__(self, folder: Path):
        self.folder = folder
        self.rng = np.random.default_rng()

    def sha256(self):
        return "scripted"

    def act(self, obs, sample):
        actions = torch.tensor(self.rng.uniform(-0.02, 0.02, (1, 4, 7)), dtype=torch.float32)
        actions[..., 3:6] = 0
        actions[..., 6] = self.rng.choice([-1.0, 1.0])
        fault = (self.folder / "fault").read_text() if (self.folder / "fault").exists() else ""
        if fault == "NaN":
            actions[0, 2, 1] = torch.nan
        elif fault == "huge step":
            actions[0, 3, 0] = 1.0
        elif fault == "slow policy":
            print("the policy is slow", flush=True)
            time.sleep(REST)
        return SimpleNamespace(actions=actions)


class Pressing:
    """An operator who agrees to everything after half a second, and ends a trial after some."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, question, keys, meanwhile=None):
        time.sleep(0.5)
        self.until = time.monotonic() + 4
        return "y" if "y" in keys else keys[0]

    def first_of(self, keys):
        return "y" if time.monotonic() > self.until else ""


def evaluate(ip: str, camera: str, folder: Path) -> None:
    """The program that is tried: eval_real.py's trials, in a process of its own."""
    import eval_real
    import robot

    eval_real.load_policies = lambda *_: {"scripted": Scripted(folder)}
    eval_real.Keyboard = Pressing
    eval_real.provenance = lambda *_: {}
    eval_real.write_video = lambda *_: None
    rig = robot.Rig(robot_ip=ip, camera=camera, max_image_age=AGE, max_silence=2 * AGE)
    write_output_to(folder / "output", "a")
    sys.stdout.reconfigure(line_buffering=True)
    with suppress(KeyboardInterrupt, UserError):
        eval_real.franka(eval_real.FrankaArgs(policies=("scripted",), trials=10000, out=folder / "runs", rig=rig))


def read_motion(folder: Path) -> np.ndarray:
    """(time, seven joint angles, width of the hand, time of the simulation) of the arm so far, [N,10]."""
    content = (folder / "motion").read_bytes()
    return np.frombuffer(content[: len(content) // 80 * 80]).reshape(-1, 10)


def seconds_to_rest(motion: np.ndarray, since: float) -> float:
    """Seconds from a time to the first 0.2 s in which no joint moves by more than 2 mrad; inf if there are none."""
    after = motion[motion[:, 0] >= since]
    for i in range(0, len(after), 5):
        window = after[(after[:, 0] >= after[i, 0]) & (after[:, 0] < after[i, 0] + 0.2)]
        if after[-1, 0] - after[i, 0] >= 0.2 and len(window) > 3 and np.ptp(window[:, 1:8], axis=0).max() < 2e-3:
            return after[i, 0] - since
    return float("inf")


def speed_of_simulation(motion: np.ndarray, since: float) -> float:
    """Seconds that the simulation has advanced in a second of the clock."""
    first, last = motion[motion[:, 0] >= since][[0, -1]]
    return (last[9] - first[9]) / max(last[0] - first[0], 1e-3)


class Leading(Pressing):
    """An operator who agrees to everything, leads the arm forward, and keeps a demonstration after a second."""

    def ask(self, question, keys, meanwhile=None):
        self.until = time.monotonic() + 1
        return "y" if "y" in keys else keys[0]

    def pressed(self):
        return "\n" if time.monotonic() > self.until else "w"


def record(ip: str, camera: str, folder: Path, episodes: int) -> None:
    """What `python data.py record` does."""
    import robot

    os.setsid()
    os.chdir(folder)
    robot.Keyboard = Leading
    rig = robot.Rig(robot_ip=ip, camera=camera, max_image_age=AGE, max_silence=2 * AGE, image_size=64)
    write_output_to(folder / "output.txt", "a")
    robot.record(robot.RecordArgs(rig=rig, out=folder / "dataset", episodes=episodes))


def survive_recording(kills: int, rng: np.random.Generator, root: Path) -> Iterator[list]:
    """Record six demonstrations on franka-sim, again and again, and kill that -> after each kill, a row."""
    ended = orphans = done = 0
    slowest = 0.0
    wrong = Counter()
    bar = tqdm(total=kills, desc="recording", unit="kill")
    with one_simulator(root) as simulator:
        camera = Stream()
        while done < kills:
            folder = root / "recording"
            folder.mkdir()
            kept = {}  # contents of demonstrations, by name
            process = None
            while not (folder / "dataset").exists():
                if process is None:
                    process = processes().Process(target=record, args=(simulator.ip, camera.url, folder, 6))
                    process.start()
                process.join(rng.uniform(0, 30) if done < kills else 300)
                if process.exitcode == 0:
                    break
                if process.exitcode is not None or done == kills:
                    wrong[(folder / "output.txt").read_text()[-300:]] += 1
                    break
                since = time.monotonic()
                orphans += kill(process, folder, alone=done % 2 == 1)
                process = None
                done += 1
                bar.update()
                time.sleep(1)
                slowest = max(slowest, seconds_to_rest(read_motion(simulator.folder), since))
                parts = {part.name: part.read_bytes() for part in (folder / "dataset.parts").glob("[0-9]*.npz")}
                wrong["a demonstration was lost or changed"] += any(
                    parts.get(name) != content for name, content in kept.items()
                )
                kept = parts
                yield [done, ended, orphans, f"{slowest:.2f}", verdict(+wrong)]
            ended += 1
            wrong.update(wrong_with_dataset(folder, kept))
            shutil.rmtree(folder)
            yield [done, ended, orphans, f"{slowest:.2f}", verdict(+wrong)]


def wrong_with_dataset(folder: Path, kept: dict[str, bytes]) -> list[str]:
    """What is wrong with a recorded dataset whose first demonstrations were once seen to be `kept`."""
    names = {file.name for file in folder.iterdir()}
    wrong = [] if names == {"dataset", "output.txt"} else [f"left behind: {sorted(names)}"]
    wrong += [f"left behind: {file.name}" for file in folder.rglob("*.partial*")]
    dataset = data.load_dataset(folder / "dataset")
    if len(dataset.bounds) != 7:
        wrong.append(f"{len(dataset.bounds) - 1} demonstrations, not 6")
    for name, content in kept.items():
        first, last = dataset.bounds[int(name[:4]) : int(name[:4]) + 2]
        episode = np.load(io.BytesIO(content))
        same = np.array_equal(dataset.frames[np.arange(first, last)], episode["image"])
        if not (same and np.allclose(dataset.action[first:last], episode["action"])):
            wrong.append(f"{name} is another one in the dataset")
    return wrong


@contextmanager
def one_simulator(folder: Path) -> Iterator[Simulator]:
    """franka-sim, once a machine: the hand's port is fixed, as the tests know."""
    with open(Path(tempfile.gettempdir()) / "franka-sim.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        simulator = Simulator(ROOT / ".venv-franka-sim/bin/python", folder)  # tests/test_robot.py installs it
        try:
            yield simulator.start("enforce", lost=300)
        finally:
            simulator.stop()


def arm(args: Arm) -> list[str]:
    """-> what has gone badly, a line each."""
    rng = np.random.default_rng(args.seed)
    rest = {fault: [] for fault in FAULTS}
    again = []  # seconds, of faults that are tried again
    bad = []
    trials = []
    tracebacks = 0
    child = None
    with tempfile.TemporaryDirectory() as root, one_simulator(Path(root)) as simulator:
        folder = Path(root)
        camera = Stream()

        def said():
            return (folder / "output").read_text() if (folder / "output").exists() else ""

        def saved():
            path = folder / "runs/franka.json"
            return json.loads(path.read_text())["trials"] if path.exists() else []

        def in_a_trial(child):
            """The program in a trial that has just begun. Where it has ended it is started anew: on a busy machine the
            simulated hand is silent for seconds now and then, and the program ends by itself."""
            while True:
                if child is None or not child.is_alive():
                    child = processes().Process(target=evaluate, args=(simulator.ip, camera.url, folder))
                    child.start()
                begun = said().count("y: success")
                wait_for(lambda begun=begun, c=child: said().count("y: success") > begun or not c.is_alive(), 120)
                if child.is_alive():
                    return child

        bar = tqdm(total=args.faults, unit="fault")
        while bar.n < args.faults:
            fault = FAULTS[bar.n % len(FAULTS)]
            child = in_a_trial(child)
            time.sleep(rng.uniform(0.1, 2.5))
            words = SAID.get(fault, "does not count.")
            heard = said().count(words)
            since = time.monotonic()
            if fault in ENDS:
                os.kill(child.pid, ENDS[fault])
            elif fault == "lost connection":
                (folder / "unplugged").touch()
            elif fault in ("stale picture", "frozen picture"):
                camera.mode = "dropped" if fault == "stale picture" else "frozen"
            elif fault == "stuck hand":
                # At its start's width, closed, it has arrived there: nothing would be wrong.
                wait_for(lambda: read_motion(folder)[-1, 8] > 0.02)
                (folder / "stuck").touch()
            elif fault == "reflex":  # the 1 kHz loop stands still
                os.kill(child.pid, signal.SIGSTOP)
                time.sleep(1)
                os.kill(child.pid, signal.SIGCONT)
            else:
                (folder / "fault").write_text(fault)

            if fault in LAST:
                child.join(30)
                if child.is_alive():
                    bad.append(f"{fault}: the program does not end")
                    child.kill()
                    child.join()
            else:  # a program that ends by itself, as above, has brought its arm to rest, too
                try:
                    wait_for(lambda w=words, h=heard, c=child: said().count(w) > h or not c.is_alive(), 60)
                except AssertionError:
                    bad.append(f"{fault}: nobody says so")
                if fault in SAID:  # the trial goes on until then
                    since = time.monotonic()
            time.sleep(REST if fault == "slow policy" else 0.5)
            motion = read_motion(folder)
            took = seconds_to_rest(motion, since)
            if REST < took < float("inf") and speed_of_simulation(motion, since) < SLOW:
                again.append(took)
            else:
                rest[fault].append(took)
                bar.update()
                if took > REST:
                    bad.append(f"{fault}: at rest after {took:.1f} s")
            for name in ("unplugged", "stuck", "fault"):
                (folder / name).unlink(missing_ok=True)
            camera.mode = "live"
            if saved()[: len(trials)] != trials:
                bad.append(f"{fault}: trials are lost")
            trials = saved()
            # after each fault, so that what was tried stands there if the campaign is cut off
            if said().count("Traceback") > tracebacks:
                tracebacks = said().count("Traceback")
                bad.append(f"{fault}: a traceback: {said()[said().rindex('Traceback') :][-500:]}")
            report("arm", f"arm --faults {args.faults}", arm_table(rest, again, bad, len(trials), motion))
        child.kill()
    return bad


def arm_table(rest: dict, again: list[float], bad: list[str], trials: int, motion: np.ndarray) -> str:
    """Markdown; `rest` in seconds by fault, `again` of those that were tried again, `motion` of the arm so far."""
    import envs

    tcp = envs.panda_kinematics(torch.tensor(motion[::5, 1:8], dtype=torch.float32))[0][:, :3, 3]
    low, high = torch.tensor(envs.WORKSPACE)
    outside = float(torch.maximum(low - tcp, tcp - high).max())
    bad = bad + [f"the arm was {100 * outside:.1f} cm outside its box"] * (outside > 0.03)
    rows = ["| fault | tried | at rest after, s: median, longest |", "| --- | --- | --- |"]
    rows += [f"| {k} | {len(v)} | {np.median(v):.2f}, {max(v):.2f} |" for k, v in rest.items() if v]
    rows += ["", f"Survived badly: {len(bad)} of {sum(map(len, rest.values()))}. {'; '.join(bad)}"]
    if again:
        rows += [
            f"Later than {REST} s ({max(again):.1f} s at most) while the simulated arm itself ran at less than {SLOW}"
        ]
        rows += [f"of the clock, on a busy machine, and tried again: {len(again)}."]
    rows += [f"Trials kept: {trials}. Farthest outside the box: {max(0, 100 * outside):.1f} cm (3 are allowed)."]
    return "\n".join(rows)


CAMPAIGNS = {"kills": (Kills, kills), "fuzz": (Fuzz, fuzz), "server": (Server, server), "arm": (Arm, arm)}

if __name__ == "__main__":
    kinds = {name: kind for name, (kind, _) in CAMPAIGNS.items()}
    args = tyro.extras.subcommand_cli_from_dict(kinds, description=__doc__)
    one_line_errors(args.debug)
    next(run for kind, run in CAMPAIGNS.values() if isinstance(args, kind))(args)
