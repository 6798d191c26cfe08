"""Round trips with the projects whose checkpoints, datasets and protocol are read and written here, end to end: each
runs its own code in an environment of its own, and is asked by results/interop_peers.py.

    python -m results.interop             # all of them -> results/INTEROP.md; exits with 1 if anything differs
    python -m results.interop --only lerobot-0.4.4

The first run installs them into .venv-interop, some 20 GB with pip's default torch, and needs git, the network and
FFmpeg (for lerobot's videos); a peer that cannot be had is a line of the table. pi0.5 is small here, with random
weights and the words of policy.small_tokenizer: the projects' code takes its sizes from a table, which is replaced.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import tyro
from tokenizers import Tokenizer, processors

from checkpoints import UserError, write_file
from data import ACTION, IMAGE, STATE, load_dataset, write_dataset
from policy import Policy, load_policy, small_tokenizer

ROOT = Path(__file__).parent.parent
ENVIRONMENTS = ROOT / ".venv-interop"
OPENPI = ENVIRONMENTS / "openpi"  # a checkout: it is on no index
# fmt: off
OPENPI_NEEDS = ["jax==0.5.3", "flax==0.10.2", "jaxtyping==0.2.36", "beartype==0.19.0", "augmax", "ml_collections",
                "orbax-checkpoint==0.11.13", "chex==0.1.90", "numpydantic", "sentencepiece", "tqdm-loggable", "dm-tree",
                "treescope", "fsspec[gcs]", "tyro", "polars"]
PIP = {  # peer: its Python, and what pip installs
    "lerobot-0.4.4": (sys.executable, [["lerobot==0.4.4", "transformers==4.53.2", "scipy"], OPENPI_NEEDS,
                                       ["websockets", "msgpack"], ["--no-deps", "openpi-client==0.1.2"]]),
    "lerobot-new": ("python3.12", [["lerobot[pi,dataset]"]]),
    "lerobot-0.3.3": (sys.executable, [["lerobot==0.3.3"]])}
GEMMA = {"depth": 2, "num_heads": 8, "num_kv_heads": 1, "head_dim": 16}
SIZES = {
    "vision": {"image_size": 224, "patch_size": 56, "hidden_size": 48, "num_hidden_layers": 2,
               "num_attention_heads": 2, "intermediate_size": 96},
    "vlm": {**GEMMA, "width": 64, "mlp_dim": 96, "vocab_size": small_tokenizer().get_vocab_size()},
    "action_expert": {**GEMMA, "width": 48, "mlp_dim": 96}}
# fmt: on
LEROBOT_MODES = [
    ("QUANTILES", "QUANTILES"),
    ("MEAN_STD", "MEAN_STD"),
    ("MIN_MAX", "MIN_MAX"),
    ("IDENTITY", "IDENTITY"),
    ("QUANTILES", "MEAN_STD"),
    ("QUANTILE10", "QUANTILE10"),
]  # fmt: skip
STATISTICS = ("mean", "std", "min", "max", "count", "q01", "q10", "q50", "q90", "q99")
HORIZON = 6
WIDTH = 32  # of the noise: actions are padded to it


class NotHad(Exception):
    """A peer that cannot be had here, or an error of its own; the last line says why."""


@dataclass
class Row:
    """A line of the table."""

    peer: str
    trip: str
    found: str
    same: bool


# ---- peers ------------------------------------------------------------------------------------------------------


def run(*command: str | Path, **options) -> str:
    """The output of a command, or NotHad with the last line of its errors."""
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    except OSError as error:
        raise NotHad(str(error)) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise NotHad(lines[-1])
    return done.stdout


def checkout() -> Path:
    """openpi's source."""
    if not OPENPI.is_dir():
        run("git", "clone", "--depth", "1", "https://github.com/Physical-Intelligence/openpi", OPENPI)
    return OPENPI


def environment(peer: str) -> Path:
    """A peer's Python; installs it first."""
    folder = ENVIRONMENTS / peer
    python = folder / "bin/python"
    if (folder / "installed").exists():
        return python
    base, steps = PIP[peer]
    run(base, "-m", "venv", "--clear", folder)
    run(python, "-m", "pip", "install", "-U", "pip")
    for packages in steps:
        run(python, "-m", "pip", "install", *packages)
    if peer == "lerobot-0.4.4":  # its pi0.5, and openpi's, are built on openpi's changes to transformers
        changes = checkout() / "src/openpi/models_pytorch/transformers_replace"
        [packages] = folder.glob("lib/python3*/site-packages")
        shutil.copytree(changes, packages / "transformers", dirs_exist_ok=True)
    (folder / "installed").touch()
    return python


@cache
def version(peer: str, package: str) -> str:
    return run(environment(peer), "-c", f"import importlib.metadata as m; print(m.version({package!r}))").strip()


@cache
def process(peer: str) -> subprocess.Popen:
    """interop_peers.py in a peer's environment: one for all questions, as the projects take half a minute to import."""
    offline = {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    settings = os.environ | offline | {"PYTHONPATH": str(OPENPI / "src")}
    command = [environment(peer), ROOT / "results/interop_peers.py"]
    log = open(ENVIRONMENTS / f"{peer}.log", "w")
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=settings)


def ask(peer: str, function: str, folder: Path, **question) -> dict:
    """What a function of interop_peers.py answers in a peer's environment."""
    np.savez(folder / "question.npz", **question)
    there = process(peer)
    print(function, folder, file=there.stdin, flush=True)
    reply = there.stdout.readline().strip()
    if reply != "done":
        raise NotHad(reply or f"it ended; see {ENVIRONMENTS / peer}.log")
    with np.load(folder / "answer.npz") as answer:
        return dict(answer)


# ---- pi0.5 ------------------------------------------------------------------------------------------------------


def statistics(still: bool) -> dict:
    """Of states and actions, in LeRobot's form; with `still`, roll and pitch never move."""
    rng = np.random.default_rng(1)
    low = -rng.uniform(0.02, 0.1, (2, 7))
    high = rng.uniform(0.02, 0.1, (2, 7))
    low[:, 3:5] *= not still
    high[:, 3:5] *= not still
    kinds = dict(min=low * 1.2, max=high * 1.2, q01=low, q10=low / 2, q50=(low + high) / 2, q90=high / 2, q99=high)
    kinds |= dict(mean=(low + high) / 2, std=(high - low) / 4)
    return {feature: {kind: x[i].tolist() for kind, x in kinds.items()} for i, feature in enumerate((STATE, ACTION))}


def question(folder: Path, still: bool = False, size: tuple[int, int] = (224, 224)) -> dict:
    """What both sides are asked: a picture, three states, a prompt, and noise; beside it the tokenizer's files, where
    the peers look for PaliGemma's."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)  # smooth: noise would be another picture at another size
    states = rng.uniform(-0.12, 0.12, (3, 7)).astype(np.float32)  # some beyond the quantiles
    states[:, 3:5] *= not still
    words = small_tokenizer()
    words.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    settings = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    for place in (folder, folder / "google/paligemma-3b-pt-224"):
        write_file(place / "tokenizer.json", words.to_str().encode())
        write_file(place / "tokenizer_config.json", settings)
    return dict(
        sizes=json.dumps(SIZES),
        image=np.kron(coarse, np.ones((size[0] // 8, size[1] // 8, 1), np.uint8)),
        state=states,
        prompt="pick up the red_block\nand place it ",
        noise=rng.standard_normal((3, HORIZON, WIDTH)).astype(np.float32),
    )


def new_policy(still: bool, **settings) -> Policy:
    """A pi0.5 of ours with random weights."""
    torch.manual_seed(0)
    settings |= dict(**SIZES, action_dim=WIDTH, action_horizon=HORIZON, chunk=HORIZON, value_hidden=[16])
    policy = load_policy("tiny-pi05", stats=statistics(still), **settings)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    return policy


def read_policy(folder: Path) -> Policy:
    """A checkpoint that a peer wrote; none of them writes the tokenizer or the sizes."""
    policy = load_policy(folder, **SIZES, chunk=HORIZON)
    policy.tokenizer = Tokenizer.from_str(small_tokenizer().to_str())
    return policy


def answer(policy: Policy, asked: dict) -> dict:
    """What our policy says to a question."""
    actions, prompts = [], []
    randn = torch.randn
    for state, noise in zip(asked["state"], asked["noise"]):
        image = torch.tensor(asked["image"])[None]
        obs = dict(image=image, state=torch.tensor(state)[None], prompt=[asked["prompt"]])
        torch.randn = lambda *shape, noise=noise, **kwargs: torch.tensor(noise)[None]
        try:
            actions.append(policy.act(obs, sample=False).actions[0].numpy())
        finally:
            torch.randn = randn
        ids, mask = policy.tokens(obs)
        prompts.append(policy.tokenizer.decode(ids[0][mask[0]].tolist()))
    return dict(prompt=np.array(prompts), actions=np.stack(actions), tokens=ids[0][mask[0]].numpy())


def compare(peer: str, trip: str, ours: dict, theirs: dict, tolerance: float = 1e-4) -> Row:
    """Prompts must be equal, and actions up to a share of the largest, for rounding."""
    equal = sum(str(a) == str(b) for a, b in zip(ours["prompt"], theirs["prompt"]))
    tokens = np.array_equal(ours["tokens"], theirs["tokens"])
    off = np.abs(ours["actions"] - theirs["actions"]).max()
    share = off / np.abs(theirs["actions"]).max()
    prompts = "equal" if equal == len(ours["prompt"]) and tokens else f"differ, {equal} of {len(ours['prompt'])} equal"
    found = f"prompts {prompts}; actions {off:.0e}, {share:.0e} of the largest"
    return Row(peer, trip, found, prompts == "equal" and bool(share < tolerance))


def checkpoints_out(peer: str, layout: str, folder: Path) -> Iterator[Row]:
    """Ours, saved in a peer's layout, in the peer's own code; and read again here."""
    for what, still, size, settings in (
        ("", False, (224, 224), {}),
        (", roll and pitch never move", True, (224, 224), {}),
        (", picture of 480 x 640", False, (480, 640), {}),
        (", no state in the prompt", False, (224, 224), {"discrete_state_input": False}),
    ):
        if settings and layout == "lerobot":
            continue  # which has no such prompt
        trip = f"ours saved as {layout} → {{}}{what}"
        try:
            asked = question(folder, still, size)
            policy = new_policy(still, **settings)
            saved = folder / f"ours{what}".replace(" ", "-")
            policy.save(saved, layout=layout)
            ours = answer(policy, asked)
            theirs = ask(peer, f"{layout}_act", folder, checkpoint=str(saved), **asked, **settings)
            row = compare(peer, trip.format(layout), ours, theirs)
            if layout == "lerobot" and size != (224, 224):  # openpi resizes as PIL does, and so do we
                row = compare(peer, trip.format(layout), ours, theirs, tolerance=0.05)
                row.found += ": lerobot resizes without antialiasing, and 0.4 pads with less than black"
            yield row
            yield compare(peer, trip.format("ours"), ours, answer(load_policy(saved), asked))
        except Exception as error:
            yield Row(peer, trip.format(layout), f"{type(error).__name__}: {error}", False)


def checkpoints_in(peer: str, layout: str, onward: dict[str, str], folder: Path) -> Iterator[Row]:
    """Checkpoints that a peer wrote, read here; and saved again in the layouts `onward` for the peers that it names."""
    cases = []  # words, still, what the peer is told
    for still, words in ((False, ""), (True, ", roll and pitch never move")):
        for state, action in LEROBOT_MODES if layout == "lerobot" else ():
            cases.append((f"state {state}, action {action}{words}", still, dict(state_mode=state, action_mode=action)))
        if layout == "openpi":
            cases.append((f"quantiles{words}", still, {}))
            cases.append((f"statistics padded to {WIDTH}{words}", still, dict(padded=WIDTH)))
            cases.append((f"no state in the prompt{words}", still, dict(discrete_state_input=False)))
    for i, (words, still, settings) in enumerate(cases):
        saved = folder / f"theirs-{i}"
        trip = f"{layout} saved → ours, {words}"
        try:
            asked = question(folder, still)
            stats = json.dumps(statistics(still))
            theirs = ask(peer, f"{layout}_save", folder, checkpoint=str(saved), stats=stats, **asked, **settings)
            policy = read_policy(saved)
            yield compare(peer, trip, answer(policy, asked), theirs)
            for target, other in onward.items():
                trip = f"{layout} saved → ours → {other}, {words}"
                again = folder / f"again-{i}-{other}"
                try:
                    policy.save(again, layout=other)
                except UserError as error:
                    yield Row(peer, trip, f"refused: {error}".replace(str(folder), ""), True)
                    continue
                more = settings | {"checkpoint": str(again), "num_steps": policy.num_steps}
                yield compare(peer, trip, ask(target, f"{other}_act", folder, **asked, **more), theirs)
        except Exception as error:
            yield Row(peer, trip, f"{type(error).__name__}: {error}".replace(str(folder), ""), False)


def served(peer: str, folder: Path) -> Iterator[Row]:
    """openpi's client against our server."""
    asked = question(folder)
    saved = folder / "served"
    policy = new_policy(False)
    policy.save(saved)
    command = [sys.executable, "eval_real.py", "serve", "--policy", str(saved), "--port", "0"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        line = server.stdout.readline()
        if "serving" not in line:
            raise NotHad("eval_real.py serve: pip install -r requirements-robot.txt")
        theirs = ask(peer, "openpi_client", folder, port=int(line.rsplit(":", 1)[1]), **asked)
    finally:
        server.terminate()
        server.wait()
    from envs import SEEDS

    torch.manual_seed(SEEDS["evaluation"])  # of a connection's noise
    ours = []
    for state in asked["state"]:
        obs = dict(image=torch.tensor(asked["image"])[None], state=torch.tensor(state)[None], prompt=[asked["prompt"]])
        ours.append(policy.act(obs, sample=False).actions[0].numpy())
    off = np.abs(np.stack(ours) - theirs["actions"]).max()
    yield Row(peer, "our server → openpi-client", f"actions: {off:.1e}", off < 1e-6)


# ---- datasets ---------------------------------------------------------------------------------------------------


def episodes() -> list[dict]:
    """Three smooth clips that move, as a camera's are."""
    rng = np.random.default_rng(0)
    clips = []
    for i, length in enumerate((9, 5, 12)):
        coarse = torch.tensor(rng.uniform(0, 255, (1, 3, 6, 6)), dtype=torch.float32)
        wide = torch.nn.functional.interpolate(coarse, (96, 64 + 2 * length), mode="bicubic").clamp(0, 255).byte()
        image = [wide[0, :, :64, 2 * t : 2 * t + 64].permute(1, 2, 0).numpy() for t in range(length)]
        state, action = rng.uniform(-0.03, 0.03, (2, length, 7)).astype(np.float32)
        state[:, 0] += 0.5  # a pose that the arm reaches
        action[:, 6] = np.where(np.arange(length) < 4, 1, -1)
        clips.append(dict(image=np.stack(image), state=state, action=action, prompt=f"push the {i % 2} cube"))
    return clips


def compare_frames(peer: str, trip: str, path: Path, theirs: dict, levels: int) -> Row:
    """A dataset as it is read here beside what the peer read; pictures may differ by `levels` of 255 in the mean."""
    ours = load_dataset(path)
    pairs = ((ours.state, theirs[STATE]), (ours.action, theirs[ACTION]))
    exact = all(np.array_equal(a, b) for a, b in pairs) and list(ours.prompt) == list(theirs["prompt"])
    off = np.abs(ours.frames.astype(int) - theirs["image"])
    found = f"state, action, prompt {'equal' if exact else 'differ'}; "
    found += f"pictures: {off.max()} of 255, {off.mean():.2f} in the mean"
    return Row(peer, trip, found, exact and off.mean() <= levels)


def compare_stats(peer: str, trip: str, theirs: dict) -> Iterator[Row]:
    """The statistics that we wrote beside those that the peer computes from the same frames, over the range. Quantiles
    are only shown: ours are exact, lerobot's are averages over the episodes. So is pictures' standard deviation, which
    lerobot 0.4.4 gets wrong (0.06 for 0.23) and newer ones do not."""
    for features, judged in (((STATE, ACTION), "mean std min max count"), ((IMAGE,), "mean min max count")):
        worst = {}
        for feature in features:
            span = np.max(theirs[f"stats/{feature}/max"] - theirs[f"stats/{feature}/min"])
            for kind in STATISTICS:
                if f"copy/stats/{feature}/{kind}" in theirs:
                    pair = theirs[f"stats/{feature}/{kind}"], theirs[f"copy/stats/{feature}/{kind}"]
                    off = np.abs(pair[0].ravel() - pair[1].ravel()).max() / (1 if kind == "count" else span)
                    worst[kind] = max(worst.get(kind, 0), off)
        found = "share of the range: " + ", ".join(f"{kind} {off:.0e}" for kind, off in worst.items())
        what = " of state and action" if ACTION in features else " of pictures"
        yield Row(peer, trip + what, found, all(worst[kind] < 0.01 for kind in judged.split()))


def datasets(peer: str, folder: Path) -> Iterator[Row]:
    """Ours in lerobot, and what lerobot records from them here; with images and with video."""
    for video in (False, True):
        kind = "video" if video else "images"
        ours = folder / f"ours-{kind}"
        copy = folder / f"theirs-{kind}"
        write_dataset(ours, episodes(), 10, video)
        more = dict(names=["x", "y", "z", "roll", "pitch", "yaw", "gripper"], shape=[64, 64, 3], video=video)
        if peer == "lerobot-0.3.3":  # which cannot read v3.0
            read = load_dataset(ours)
            number = np.repeat(np.arange(len(read.bounds) - 1), np.diff(read.bounds))
            given = dict(image=read.frames, action=read.action, prompt=read.prompt.astype(str), episode_index=number)
            np.savez(folder / "frames.npz", **given, **{STATE: read.state})
            theirs = ask(peer, "lerobot_dataset", folder, copy=str(copy), **more)
        else:
            theirs = ask(peer, "lerobot_dataset", folder, dataset=str(ours), copy=str(copy), **more)
            yield compare_frames(peer, f"our {kind} → lerobot", ours, theirs, 1)
            yield from compare_stats(peer, f"our statistics beside lerobot's, {kind},", theirs)
        theirs = {key[5:]: x for key, x in theirs.items() if key.startswith("copy/")}
        yield compare_frames(peer, f"lerobot's {kind} → ours", copy, theirs, 1)


# ---- all --------------------------------------------------------------------------------------------------------

OLD, NEW, V21 = PIP  # environments; openpi and its client are in the first
TRIPS: list[tuple[str, str, Callable[[str, Path], Iterator[Row]]]] = [  # environment, name, round trips
    (OLD, "lerobot out", lambda peer, folder: checkpoints_out(peer, "lerobot", folder)),
    (OLD, "lerobot in", lambda peer, folder: checkpoints_in(peer, "lerobot", {OLD: "lerobot"}, folder)),
    (OLD, "lerobot datasets", datasets),
    (NEW, "lerobot out", lambda peer, folder: checkpoints_out(peer, "lerobot", folder)),
    (NEW, "lerobot in", lambda peer, folder: checkpoints_in(peer, "lerobot", {NEW: "lerobot", OLD: "openpi"}, folder)),
    (NEW, "lerobot datasets", datasets),
    (V21, "lerobot datasets", datasets),
    (OLD, "openpi out", lambda peer, folder: checkpoints_out(peer, "openpi", folder)),
    (OLD, "openpi in", lambda peer, folder: checkpoints_in(peer, "openpi", {OLD: "openpi", NEW: "lerobot"}, folder)),
    (OLD, "openpi-client", served),
]


def label(peer: str, name: str) -> str:
    """A project with its version."""
    project = name.split()[0]
    if project == "openpi":
        return f"openpi {run('git', '-C', checkout(), 'log', '-1', '--format=%h').strip()}"
    return f"{project} {version(peer, project)}"


@dataclass
class Args:
    """Round trips with lerobot, openpi and openpi's client."""

    only: str = ""
    """Only what has this in its name: an environment (lerobot-0.4.4, lerobot-new, lerobot-0.3.3) and a kind of round
    trip, such as "lerobot-new lerobot in". The table is then printed, and not written."""
    out: Path = ROOT / "results/INTEROP.md"
    """Where the table goes."""


PAGE = """# Round trips with lerobot, openpi and its client

Last output of `python -m results.interop`: {alike} of {rows} round trips come out alike. The same picture, states,
prompt and noise went through our preprocessing, model and postprocessing, and through the project's own. Differences
are the largest ones, of actions in m, rad and gripper. Python {python} here; lerobot 0.5 and newer: 3.12.
"""


def table(rows: list[Row]) -> str:
    """The page of all round trips."""
    alike = sum(row.same for row in rows)
    lines = [
        PAGE.format(alike=alike, rows=len(rows), python=sys.version.split()[0]),
        "| project | round trip | alike | found |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| {row.peer} | {row.trip} | {'yes' if row.same else '**no**'} | {row.found} |" for row in rows]
    return "\n".join([*lines, ""])


def main(args: Args) -> int:
    """The number of round trips that do not come out alike."""
    rows = []
    for peer, name, trip in TRIPS:
        if args.only not in f"{peer} {name}":
            continue
        project = peer
        with tempfile.TemporaryDirectory() as folder:
            try:
                project = label(peer, name)
                for row in trip(peer, Path(folder)):
                    rows.append(replace(row, peer=project))
                    print("alike " if row.same else "OTHER ", project, row.trip, row.found, sep=" | ", flush=True)
            except Exception as error:  # the others go on
                rows.append(Row(project, name, f"{type(error).__name__}: {error}", False))
                print("FAILED", project, name, error, sep=" | ", flush=True)
    if not args.only:
        write_file(args.out, table(rows).encode())
    return sum(not row.same for row in rows)


if __name__ == "__main__":
    sys.exit(min(main(tyro.cli(Args)), 1))
