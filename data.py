"""Demonstrations: LeRobot datasets in and out, their statistics, the alpha-mixture of stage I, and their collection.

    python data.py collect                                  # scripted demonstrations: twin, stand-in, validation
    python data.py collect --num-twin 1000 --workers 8      # more of them, on more cores
    python data.py collect --domains 600                    # all tasks in random domains, to pretrain on
    python data.py record --robot-ip 172.16.0.2             # demonstrations on a real Franka, by keyboard or by hand
    python data.py show demos/push_cube-standin             # a page to look at any dataset, before training on it

A dataset is a folder in LeRobot's format: v3.0 is written, v2.0 to v3.0 are read, so it may as well come from a real
robot or from the Hub. State and action have 7 dimensions; units and frames are those of envs.py.
"""

import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache, partial
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Literal

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import tyro
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from checkpoints import HANGS, UserError, claim, one_line_errors

# envs.py is imported in the functions that collect: whoever only reads datasets needs no simulator.

IMAGE = "observation.images.base_0_rgb"
STATE = "observation.state"
ACTION = "action"
DIMS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")  # of state and action
FILE_BYTES = 100 << 20  # a file (data and video) that is larger gets no further episode
FILES_PER_CHUNK = 1000  # a "chunk" is a folder of files
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


def demos_path(task: str, domain_name: str, held_out: bool = False, folder: Path = Path("demos")) -> Path:
    """Where the demonstrations of a task in a domain are; `held_out` ones are for validation."""
    return folder / f"{task}-{domain_name}{'-val' if held_out else ''}"


# ---- demonstrations and their mixture ---------------------------------------------------------------------------


@dataclass
class Demonstrations:
    """N frames of E episodes, in order. len() is N."""

    path: Path
    fps: float  # Hz, the rate of the actions
    state: np.ndarray  # float32 [N,7]
    action: np.ndarray  # float32 [N * steps,7]
    prompt: np.ndarray  # str objects [N]
    bounds: np.ndarray  # int [E+1]: episode e is the frames bounds[e] .. bounds[e+1]-1
    frames: "np.ndarray | FramesOnDisk"  # frames[int array [n]] -> uint8 [n,H,W,3]
    image_shape: tuple[int, int, int]  # (H, W, 3)
    steps: int = 1  # actions from a frame to the next, more than 1 where frames were recorded at a lower rate

    def __len__(self):
        return len(self.state)

    def sha256(self) -> str:
        """Of states, actions, prompts and the episodes' bounds; pictures would take minutes."""
        total = hashlib.sha256()
        for array in (self.state, self.action, self.bounds):
            total.update(np.ascontiguousarray(array).tobytes())
        total.update("\0".join(self.prompt).encode())
        return total.hexdigest()

    def part(self, first: int, last: int) -> "Demonstrations":
        """Episodes first .. last-1."""
        start, end = self.bounds[[first, last]]
        return replace(
            self,
            state=self.state[start:end],
            action=self.action[start * self.steps : end * self.steps],
            prompt=self.prompt[start:end],
            bounds=self.bounds[first : last + 1] - start,
            frames=self.frames[start:end] if isinstance(self.frames, np.ndarray) else self.frames.part(first, last),
        )


@dataclass
class Mixture(torch.utils.data.Dataset):
    """The data of stage I, alpha * E_sim + (1 - alpha) * E_real, as batches: item k is the whole batch k.

    Frames are drawn uniformly, with replacement. Batch k depends on nothing but (seed, k), so training resumes by
    starting there: DataLoader(mixture, batch_size=None, sampler=range(k, steps), num_workers=...). alpha = 0 needs no
    `sim` (real-only SFT, the anchor of stage II), alpha = 1 no `real` (None).

    A batch: "image" uint8 [B,H,W,3], "state" float32 [B,7] and "prompt", B str, at a time t; "action" float32
    [B,horizon,7] of t .. t+horizon-1; "action_is_pad" bool [B,horizon], True past the end of the episode (where the
    last action is repeated, as in LeRobot); "is_sim" bool [B].
    """

    real: Demonstrations | None
    batch_size: int
    horizon: int
    seed: int
    sim: Demonstrations | None = None
    alpha: float = 0.0  # the share of simulated samples, exact over the batches together

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise UserError(f"alpha is a share, 0 (only real samples) to 1 (only simulated ones), not {self.alpha}")
        missing = "simulated" if self.sim is None else "real"
        if (self.sim is None and self.alpha > 0) or (self.real is None and self.alpha < 1):
            raise UserError(f"alpha = {self.alpha} needs {missing} demonstrations as well")
        if self.real is not None and self.sim is not None and self.real.image_shape != self.sim.image_shape:
            real, sim = self.real, self.sim
            raise UserError(f"{real.path} has images {real.image_shape}, but {sim.path} {sim.image_shape}")
        self.sim_per_batch = Fraction(str(self.alpha)) * self.batch_size  # exact: in floats, 0.29 * 100 < 29

    def __getitem__(self, k):
        # Where alpha * batch_size is no integer, batches differ by one sample, and the first k have alpha of theirs.
        n_sim = math.floor((k + 1) * self.sim_per_batch) - math.floor(k * self.sim_per_batch)
        rng = np.random.default_rng((self.seed, k))
        parts = []
        for dataset, n in ((self.real, self.batch_size - n_sim), (self.sim, n_sim)):
            if n > 0:
                parts.append(self._sample(dataset, rng.integers(len(dataset), size=n)))
        arrays = ("image", "state", "action", "action_is_pad")
        batch = {key: torch.from_numpy(np.concatenate([part[key] for part in parts])) for key in arrays}
        batch["prompt"] = [prompt for part in parts for prompt in part["prompt"]]
        batch["is_sim"] = torch.arange(self.batch_size) >= self.batch_size - n_sim
        return batch

    def _sample(self, dataset, t):
        end = dataset.bounds[np.searchsorted(dataset.bounds, t, side="right")] * dataset.steps  # of each one's episode
        chunk = t[:, None] * dataset.steps + np.arange(self.horizon)
        return {
            "image": dataset.frames[t],
            "state": dataset.state[t],
            "prompt": dataset.prompt[t],
            "action": dataset.action[np.minimum(chunk, end[:, None] - 1)],
            "action_is_pad": chunk >= end[:, None],
        }


# ---- statistics -------------------------------------------------------------------------------------------------


def _stats(x):
    """LeRobot's statistics of x [N] or [N,D], over N."""
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    stats = dict(mean=x.mean(0), std=x.std(0), min=x.min(0), max=x.max(0), count=np.array([len(x)]))
    return stats | dict(zip(QUANTILES, np.quantile(x, list(QUANTILES.values()), axis=0)))


def _image_stats(histogram, count):
    """The same for images: [3,1,1], pixels in 0..1; from how many pixels have each of the 256 values, [3,256]."""
    value = np.arange(256) / 255
    pixels = histogram[0].sum()
    mean = histogram @ value / pixels
    stats = dict(mean=mean, std=np.sqrt(np.maximum(histogram @ value**2 / pixels - mean**2, 0)))
    for name, q in {"min": 0, "max": 1, **QUANTILES}.items():
        reached = histogram.cumsum(1) >= max(q * pixels, 1)
        stats[name] = value[reached.argmax(1)]  # argmax: the first that is True
    return {name: x.reshape(3, 1, 1) for name, x in stats.items()} | {"count": np.array([count])}


STILL = 1e-6  # m, rad: what moves by less is rounding


def statistics(
    real: "Demonstrations | None", sim: "Demonstrations | None" = None, alpha: float | None = None
) -> dict[str, dict[str, list[float]]]:
    """Statistics of one or two datasets, for the policy's normalisation; prints which dimensions never move in one.

    Returns {"observation.state": {"mean", "std", "min", "max", "q01", "q99"}, "action": the same}: LeRobot's key names,
    each a list of 7 floats. Mean and deviation are those of stage I's batches, of which `alpha` is the share of `sim`
    (None: by their numbers of frames). A dataset that is in no batch, at alpha = 0 or 1, counts for nothing.

    The quantiles are exact, and span the range of both datasets whatever their shares: q01 is the lower q01, q99 the
    higher q99. Of all frames together they would be the larger dataset's, and a rotation that only the robot makes, in
    1 % of them, would be normalised to 0; alpha's own mixture loses it, too, where alpha is near 1. A dimension that
    moves more rarely than quantiles see is spanned from its minimum to its maximum. What changes by less than STILL
    does not move: q01 = q99.
    """
    by_frames = alpha is None
    shares = [(real, by_frames or 1 - alpha), (sim, by_frames or alpha)]
    shares = [(dataset, share) for dataset, share in shares if dataset is not None and share > 0]
    datasets = [dataset for dataset, _ in shares]
    weights = np.array([share * (len(dataset) if by_frames else 1) for dataset, share in shares])[:, None]
    weights = weights / weights.sum()
    still = still_dims(*datasets)
    if still:
        print(still)

    result = {}
    for key, columns in ((STATE, [d.state for d in datasets]), (ACTION, [d.action for d in datasets])):
        each = [_stats(column) for column in columns]
        stats = {name: np.stack([x[name] for x in each]) for name in ("mean", "std", "min", "max", "q01", "q99")}
        mean = (weights * stats["mean"]).sum(0)
        variance = (weights * (stats["std"] ** 2 + (stats["mean"] - mean) ** 2)).sum(0)
        least = stats["min"].min(0)
        most = stats["max"].max(0)
        low = stats["q01"].min(0)
        high = stats["q99"].max(0)
        rare = high - low < STILL
        low = np.where(rare, least, low)
        high = np.where(rare, most, high)
        high = np.where(high - low < STILL, low, high)
        total = dict(mean=mean, std=variance**0.5, min=least, max=most, q01=low, q99=high)
        result[key] = {name: x.tolist() for name, x in total.items()}
    return result


def still_dims(*datasets: "Demonstrations") -> str:
    """A line that says which dimensions of the action never move, and in which dataset; empty if all do."""
    still = []
    for dataset in datasets:
        names = [name for name, moves in zip(DIMS, np.ptp(dataset.action, axis=0) > STILL) if not moves]
        if names:
            still.append(f"{' '.join(names)} in {dataset.path}")
    return f"never moved: {'; '.join(still)}" if still else ""


# ---- what the stages read ---------------------------------------------------------------------------------------


def collect_missing(args, image_size: int) -> None:
    """Collect the default demonstrations of a task if some are missing that `args`, a script's, put no others in place
    of (sim, real, real_val); with pictures of `image_size` pixels."""
    needed = []
    if args.alpha > 0 and not args.sim:
        needed.append(demos_path(args.task, "twin"))
    if args.alpha < 1 and not args.real:
        needed.append(demos_path(args.task, args.target))
    if not args.real and not args.real_val:
        needed.append(demos_path(args.task, args.target, held_out=True))
    if not all(path.exists() for path in needed):
        collect(CollectArgs(task=args.task, target=args.target, render=args.render, image_size=image_size))


def open_sim(args, image_size: int) -> Demonstrations:
    """The simulated demonstrations that a script's args (task, sim) name, with pictures of `image_size` pixels."""
    import envs

    return load_dataset(args.sim or demos_path(args.task, "twin"), fps=envs.CONTROL_HZ, image_size=image_size)


def open_real(args, image_size: int, train: bool) -> tuple[Demonstrations | None, Demonstrations]:
    """The real demonstrations that a stage trains on (None without `train`), and others, on which it only measures.

    `args` are a script's: task, target, real, num_real, real_val, camera; pictures get `image_size` pixels. Of a
    dataset of one's own without a real_val the last tenth of the episodes is held out.
    """
    import envs

    given = dict(fps=envs.CONTROL_HZ, image_size=image_size, camera=args.camera)
    path = args.real or demos_path(args.task, args.target)
    if args.real_val or not args.real:
        held_out = load_dataset(args.real_val or demos_path(args.task, args.target, held_out=True), **given)
        return load_dataset(path, num_episodes=args.num_real, **given) if train else None, held_out
    whole = load_dataset(path, **given)
    episodes = len(whole.bounds) - 1
    kept = episodes - max(1, episodes // 10)
    if not 1 <= (args.num_real or kept) <= kept:
        raise UserError(
            f"{path} has {episodes} episodes, of which the last {episodes - kept} are held out: use at most {kept}, or "
            "name others with --real-val"
        )
    print(f"{path}: without --real-val, its last {episodes - kept} of {episodes} episodes are held out")
    return whole.part(0, args.num_real or kept) if train else None, whole.part(kept, episodes)


# ---- reading ----------------------------------------------------------------------------------------------------


def load_dataset(
    path: str | Path,
    max_bytes: int = 4 << 30,
    num_episodes: int | None = None,
    fps: float | None = None,
    camera: str | None = None,
    image_size: int | None = None,
) -> Demonstrations:
    """Read a LeRobot dataset, v2.x or v3.0, images as video or as image columns.

    path: a folder with a dataset in it, or the name of one on the Hub (see `find_dataset`).
    max_bytes: frames are decoded into memory if they take no more, otherwise on access.
    num_episodes: only the first so many are kept.
    fps: Hz, the rate of the actions that are wanted. Of a dataset at a multiple of it every n-th frame is kept, with
        the motion of n actions; at an n-th of it, an action is done in n equal parts. None: as it was recorded.
    camera: its key, or the end of it. None: "observation.images.base_0_rgb", openpi's "image", or the only one.
    image_size: pixels; pictures of another size are cropped to their square middle and scaled. None: as they are.

    What is changed or left out is printed, in a line. UserError with one line that names the file and the episode: no
    dataset, unknown version, a rate that does not fit, joint angles or absolute poses (see `_to_own_units`), corrupt or
    missing files, wrong shapes or lengths, NaN.
    """
    meta = _read_meta(find_dataset(path), camera)
    if num_episodes is not None and not 1 <= num_episodes <= len(meta.episodes):
        raise UserError(f"{path} has {len(meta.episodes)} episodes, of which {num_episodes} cannot be used")
    meta.episodes = meta.episodes[:num_episodes]
    every, steps = _rates(meta, fps or meta.fps)
    rows = _read_rows(meta)
    bounds = np.cumsum([0] + [episode.length for episode in meta.episodes])
    _to_own_units(meta, rows, bounds)
    rows, bounds = _resample(rows, bounds, every, steps)
    prompt = np.array([meta.tasks[i] for i in rows["task_index"].tolist()], object)
    for episode in meta.episodes:
        if not episode.image_file.exists():
            raise UserError(f"{episode.image_file}: missing; the images of episode {episode.index} are in it")

    image_shape = (image_size, image_size, 3) if image_size else meta.image_shape
    height, width, _ = meta.image_shape
    if image_size and image_size > min(height, width):
        raise UserError(
            f"{path} has pictures of {height} x {width} pixels, the policy sees {image_size}: "
            f"collect or record it with --image-size {image_size} (and another --out), or choose a smaller policy"
        )
    if image_shape != meta.image_shape:
        meta.notes.append(
            f"the square middle of its {height} x {width} pixels is scaled to {image_size} x {image_size}"
        )
    frames = FramesOnDisk(meta.episodes, bounds, rows["place"], meta.image_shape, image_shape, meta.image_column)
    if bounds[-1] * math.prod(image_shape) <= max_bytes:
        frames = frames.decode(np.arange(bounds[-1]))
    else:
        frames.decode_ends()
    if meta.notes:
        print(f"{path}: {'; '.join(meta.notes)}")
    return Demonstrations(
        Path(path), fps or meta.fps, rows[STATE], rows[ACTION], prompt, bounds, frames, image_shape, steps
    )


def find_dataset(name: str | Path) -> Path:
    """The folder of a dataset: `name` itself, or the only one in it. If `name` is no folder, that of the Hub's dataset
    `owner/name`: in lerobot's folder (HF_LEROBOT_HOME), in the caches of lerobot and of the Hub, or downloaded."""
    folder = Path(name)
    if not folder.is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and folder.parent != Path("demos"):
        folder = _find_on_hub(str(name))
    if (folder / "meta/info.json").exists():
        return folder
    inside = sorted(file.parent.parent for depth in ("*", "*/*") for file in folder.glob(f"{depth}/meta/info.json"))
    if len(inside) > 1:
        raise UserError(f"{folder} has {len(inside)} datasets in it: name one, such as {inside[0]}")
    if not inside:
        raise UserError(
            f"{folder} is no LeRobot dataset: no meta/info.json (`python data.py collect` collects datasets)"
        )
    return inside[0]


def _find_on_hub(name: str) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download

    home = Path(os.environ.get("HF_LEROBOT_HOME") or Path(constants.HF_HOME) / "lerobot").expanduser()
    if (home / name).is_dir():
        return home / name
    for cache in (home / "hub", Path(constants.HF_HUB_CACHE)):
        snapshots = cache.glob(f"datasets--{name.replace('/', '--')}/snapshots/*")
        for snapshot in sorted(snapshots, key=os.path.getmtime, reverse=True):
            if any(snapshot.glob("**/data/*/*.parquet")):  # lerobot first fetches `meta` alone
                return snapshot
    try:
        HfApi().dataset_info(name, timeout=5)  # without a network this fails at once, a download after many retries
        print(f"{name} is no folder here, nor in the cache: it is downloaded from the Hub")
        return Path(snapshot_download(name, repo_type="dataset"))
    except Exception as error:  # no network, no such dataset, no right to it: no common class
        raise UserError(
            f"{name} is no folder here, not in {home} or the Hub's cache, and the Hub does not give it "
            f"({type(error).__name__})"
        ) from error


@dataclass
class EpisodeOnDisk:
    """Where an episode of a dataset on disk is."""

    index: int  # its number in the dataset
    length: int  # frames
    data_file: Path  # the parquet file that should have its rows
    image_file: Path  # the file with its images: a video, or the parquet file with its rows
    start: float  # s, where it begins in its video; 0 for image columns


@dataclass
class Metadata:
    """What the meta folder of a dataset on disk says."""

    root: Path
    fps: float  # Hz
    keys: dict[str, str]  # the columns of STATE and ACTION
    names: dict[str, list[str]]  # of their dimensions, as far as they are known
    image_column: str | None  # None: video
    image_shape: tuple[int, int, int]  # (H, W, 3)
    episodes: list[EpisodeOnDisk]
    tasks: dict[int, str]  # by task_index
    notes: list[str]  # what is changed or left out


KEYS = {STATE: (STATE, "state"), ACTION: (ACTION, "actions")}  # lerobot's, and what openpi and RLinf call them


def _read_meta(root, camera) -> Metadata:
    info = _read_json(root / "meta/info.json")
    try:
        features = info["features"]
        if info["codebase_version"] not in ("v2.0", "v2.1", "v3.0"):
            raise UserError(f"{root}: codebase_version {info['codebase_version']} is not v2.0, v2.1 or v3.0")
        if not 0 < info["fps"] < math.inf:
            raise UserError(f"{root}: info.json says {info['fps']} frames a second")
        keys = {}
        names = {}
        for key, choices in KEYS.items():
            keys[key] = next((name for name in choices if name in features), key)
            shape = tuple(features[keys[key]]["shape"]) if keys[key] in features else None
            if shape != (len(DIMS),):
                raise UserError(f"{root}: {keys[key]} has shape {shape}, ({len(DIMS)},) needed: {' '.join(DIMS)}")
            names[key] = list(_flatten(features[keys[key]].get("names")))

        notes = []
        camera = _choose_camera(root, features, camera, notes)
        is_video = features[camera]["dtype"] == "video"
        height, width, channels = features[camera]["shape"]
        if channels not in (3, 4):  # some datasets say channels first
            channels, height, width = height, width, channels
        if channels == 4:
            notes.append("alpha is left out")
        episodes = _read_episodes(root, info, camera if is_video else None)
        image_column = None if is_video else camera
        shape = (height, width, 3)
        if not all(isinstance(size, int) for size in shape):
            raise UserError(f"{root}: info.json says pictures of {height} x {width} pixels")
        tasks = _read_tasks(root, info)
        return Metadata(root, info["fps"], keys, names, image_column, shape, episodes, tasks, notes)
    except (LookupError, TypeError, AttributeError, ValueError, StopIteration) as error:  # JSON of another content
        raise UserError(f"{root}/meta: corrupt or incomplete ({error!r})") from None


def _flatten(names) -> Iterator[str]:
    """The names of a feature's dimensions, which info.json has as a list, or as lists by name."""
    if isinstance(names, dict):
        names = [*names, *names.values()]
    if isinstance(names, list):
        for name in names:
            yield from _flatten(name)
    elif names is not None:
        yield str(names)


def _choose_camera(root, features, wanted, notes) -> str:
    """The key of the camera that is `wanted`, or that is certain."""
    cameras = [key for key, feature in features.items() if feature["dtype"] in ("image", "video")]
    colour = [key for key in cameras if not _is_depth(key, features[key])]
    certain = [key for key in (wanted, IMAGE, "image") if key in colour and wanted in (None, key)]
    chosen = certain[:1] or [key for key in colour if not wanted or key.endswith(f".{wanted}")]
    if len(chosen) != 1:
        asked = f"no camera {wanted}" if wanted else f"a camera {IMAGE} is needed, or only one, or --camera KEY"
        raise UserError(f"{root}: {asked}; it has {colour}")
    others = [key for key in cameras if key != chosen[0]]
    if others:
        notes.append(f"camera {chosen[0]}; {', '.join(others)} left out")
    return chosen[0]


def _is_depth(key, feature):
    """Whether a camera gives distances and not colours, as lerobot marks it, or by its name or its single channel."""
    marks = [feature, feature.get("info") or {}, feature.get("video_info") or {}]
    marked = any(mark.get("is_depth_map") or mark.get("video.is_depth_map") for mark in marks)
    return marked or "depth" in key.lower() or 1 in (feature["shape"][0], feature["shape"][-1])


def _rates(meta, fps) -> tuple[int, int]:
    """How many recorded frames make a step at `fps` (Hz), and how many steps a frame lasts; one of them is 1."""
    every = max(1, round(meta.fps / fps))
    steps = max(1, round(fps / meta.fps))
    if not math.isclose(meta.fps * steps, fps * every, rel_tol=1e-6):
        raise UserError(
            f"{meta.root} is recorded at {meta.fps} Hz: neither {fps} Hz, at which the twin acts, nor a multiple or a "
            "fraction of it; resample the dataset"
        )
    if every > 1:
        meta.notes.append(f"{meta.fps} Hz: one frame in {every} is used, and {every} actions become one of {fps} Hz")
    if steps > 1:
        meta.notes.append(f"{meta.fps} Hz: each action becomes {steps} equal parts at {fps} Hz")
    return every, steps


def _resample(rows, bounds, every, steps):
    """Rows and bounds at another rate (see _rates). Displacements add up, rotations follow each other, in the base
    frame; the gripper does what it was told last."""
    action = rows[ACTION]
    if every > 1:
        first = np.concatenate([np.arange(start, end, every) for start, end in zip(bounds, bounds[1:])])
        owner = np.searchsorted(bounds, first, side="right")
        last = np.minimum(first + every, bounds[owner]) - 1
        turn = Rotation.identity(len(first))
        for k in range(every):
            angles = action[np.minimum(first + k, last), 3:6] * (first + k <= last)[:, None]
            turn = Rotation.from_euler("xyz", angles) * turn
        moved = np.add.reduceat(action[:, :3], first)
        rows = {key: x[first] for key, x in rows.items()}
        rows[ACTION] = np.concatenate([moved, turn.as_euler("xyz"), action[last, 6:]], 1).astype(np.float32)
        bounds = np.searchsorted(first, bounds)
    if steps > 1:
        part = Rotation.from_rotvec(Rotation.from_euler("xyz", action[:, 3:6]).as_rotvec() / steps)
        parts = np.concatenate([action[:, :3] / steps, part.as_euler("xyz"), action[:, 6:]], 1)
        rows = rows | {ACTION: np.repeat(parts, steps, axis=0).astype(np.float32)}
    return rows, bounds


def _read_json(path, lines=False):
    try:
        text = path.read_text()
        if lines:
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; copy the dataset again, whole") from None
    except ValueError as error:
        raise UserError(f"{path}: corrupt, no JSON ({error})") from None


def _read_table(path, columns, what):
    """Columns of a parquet file. The error says `what` should be in it."""
    try:
        table = pq.ParquetFile(path).read(columns=columns)
        return table.select(columns or table.column_names)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; {what} should be in it") from None
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: truncated or corrupt; {what} should be in it ({error})") from None


def _read_episodes(root, info, video_key) -> list[EpisodeOnDisk]:
    """The episodes in order; `video_key` is None for image columns."""
    if info["codebase_version"] != "v3.0":
        rows = _read_json(root / "meta/episodes.jsonl", lines=True)
    else:
        columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        if video_key:
            columns += [f"videos/{video_key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
        files = sorted((root / "meta/episodes").glob("*/*.parquet"))
        rows = [row for file in files for row in _read_table(file, columns, "the list of episodes").to_pylist()]
    if not rows:
        raise UserError(f"{root}: an empty dataset, meta lists no episode")
    if len(rows) < info["total_episodes"]:  # more of them are of a recording that was stopped before it counted them
        raise UserError(f"{root}: {len(rows)} episodes are listed in meta, info.json says {info['total_episodes']}")
    if len({row["episode_index"] for row in rows}) < len(rows):
        raise UserError(f"{root}: meta lists an episode twice; take its second row out of meta/episodes")

    def place(row, kind):
        """What the templates of paths in info.json ask for."""
        if info["codebase_version"] != "v3.0":  # a file an episode
            index = row["episode_index"]
            return {"episode_chunk": index // info["chunks_size"], "episode_index": index}
        return {name: row[f"{kind}/{name}"] for name in ("chunk_index", "file_index")}

    episodes = []
    for row in sorted(rows, key=lambda row: row["episode_index"]):
        data_file = root / info["data_path"].format(**place(row, "data"))
        image_file = data_file
        start = 0.0
        if video_key:
            kind = f"videos/{video_key}"
            image_file = root / info["video_path"].format(video_key=video_key, **place(row, kind))
            start = float(row.get(f"{kind}/from_timestamp", 0))
        episodes.append(EpisodeOnDisk(row["episode_index"], int(row["length"]), data_file, image_file, start))
    return episodes


def _read_tasks(root, info):
    """{task_index: task}"""
    if info["codebase_version"] != "v3.0":
        return {row["task_index"]: row["task"] for row in _read_json(root / "meta/tasks.jsonl", lines=True)}
    table = _read_table(root / "meta/tasks.parquet", None, "the list of tasks")
    text = next(name for name in table.column_names if name != "task_index")  # its name is up to pandas
    return dict(zip(table["task_index"].to_pylist(), table[text].to_pylist()))


def _read_rows(meta) -> dict[str, np.ndarray]:
    """State [N,7], action [N,7], task_index [N] and place [N] (see FramesOnDisk) of all N frames.

    An episode's rows are found by `episode_index`, as lerobot finds them: recordings that were interrupted leave rows
    that no episode lists, and conversions leave episodes in another file than the metadata say.
    """
    parts = {}  # by episode: its columns
    counts = {}  # by episode: its rows in the file that the metadata name
    named = dict.fromkeys(episode.data_file for episode in meta.episodes)
    for path in named:
        if path.exists():
            episodes = [episode for episode in meta.episodes if episode.data_file == path]
            counts |= _read_episode_rows(meta, path, episodes, parts)
    for path in sorted((meta.root / "data").glob("*/*.parquet")):
        elsewhere = [episode for episode in meta.episodes if episode.index not in parts]
        if not elsewhere:
            break
        try:
            _read_episode_rows(meta, path, elsewhere, parts)
        except UserError:  # what an interrupted recording leaves: no episode names it
            continue
    for episode in meta.episodes:
        if episode.index not in counts and episode.index not in parts:
            raise UserError(f"{episode.data_file}: missing; episode {episode.index} should be in it")
        if episode.index not in parts:
            raise UserError(
                f"{episode.data_file}: rows do not match the metadata: episode {episode.index} has "
                f"{counts[episode.index]} rows, its length is {episode.length}"
            )
    rows = {key: np.concatenate([parts[episode.index][key] for episode in meta.episodes]) for key in parts[min(parts)]}
    spacing = np.median(np.concatenate([np.diff(parts[episode.index]["time"]) for episode in meta.episodes] + [[]]))
    if abs(spacing * meta.fps - 1) > 0.1:
        raise UserError(f"{meta.root}: info.json says {meta.fps} Hz, but its timestamps are {spacing:.3f} s apart")
    unknown = np.flatnonzero(~np.isin(rows["task_index"], list(meta.tasks)))
    if unknown.size:
        task = rows["task_index"][unknown[0]]
        raise UserError(f"{meta.root}/meta: no task {task}, which frame {unknown[0]} of the dataset names")
    return rows


def _read_episode_rows(meta, path, episodes, parts) -> dict[int, int]:
    """Put the columns of those of `episodes` that are whole in a parquet file into `parts` -> the rows of each."""
    columns = [meta.keys[STATE], meta.keys[ACTION], "episode_index", "frame_index", "timestamp", "task_index"]
    table = _read_table(path, columns, f"episode {episodes[0].index}")
    index, order, time, task = (table[key].to_numpy() for key in columns[2:])
    counts = {}
    for episode in episodes:
        rows = np.flatnonzero(index == episode.index)
        counts[episode.index] = len(rows)
        if len(rows) != episode.length:
            continue
        rows = rows[np.argsort(order[rows], kind="stable")]
        if meta.image_column:
            episode.image_file = path
        parts[episode.index] = {
            STATE: _read_vectors(path, table, meta.keys[STATE], rows),
            ACTION: _read_vectors(path, table, meta.keys[ACTION], rows),
            "task_index": task[rows],
            "time": time[rows].astype(float),
            "place": rows if meta.image_column else episode.start + time[rows].astype(float),
        }
    return counts


def _read_vectors(path, table, key, rows):
    """Rows of a column of lists as float32 [n,7]."""
    try:
        column = table[key].take(rows).combine_chunks().cast(pa.list_(pa.float32()))
    except pa.ArrowException as error:
        raise UserError(f"{path}: {key} is no column of lists of numbers ({error})") from None

    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero(lengths != len(DIMS))
    if wrong.size:
        place = f"episode {table['episode_index'][rows[wrong[0]]]}, row {rows[wrong[0]]}"
        raise UserError(f"{path}: {key} has {lengths[wrong[0]]} values in {place}; {len(DIMS)} are needed")
    x = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, len(DIMS))
    wrong = np.flatnonzero(~np.isfinite(x).all(1))
    if wrong.size:
        place = f"episode {table['episode_index'][rows[wrong[0]]]}, row {rows[wrong[0]]}"
        raise UserError(f"{path}: {key} has a NaN or an infinity in {place}")
    return x


# ---- pictures ---------------------------------------------------------------------------------------------------

# what the libraries raise for broken files, and for columns or streams that are not there
UNREADABLE = (pa.ArrowException, av.error.FFmpegError, OSError, ValueError, LookupError, AttributeError, SyntaxError)


@dataclass
class FramesOnDisk:
    """frames[indices] -> uint8 [n,H,W,3], decoded on access: in the DataLoader's workers, if it has any."""

    episodes: list[EpisodeOnDisk]
    bounds: np.ndarray  # int [E+1], as in Demonstrations
    place: np.ndarray  # [N], where in its file each frame is: s from a video's beginning, or the row of a parquet file
    file_shape: tuple[int, int, int]  # (H, W, 3) of the pictures in the files
    image_shape: tuple[int, int, int]  # (H, W, 3) of what is returned
    image_column: str | None  # None: video

    def __getitem__(self, indices):
        indices, inverse = np.unique(indices, return_inverse=True)
        return self.decode(indices)[inverse]

    def part(self, first, last):
        """The frames of the episodes first .. last-1."""
        start, end = self.bounds[[first, last]]
        bounds = self.bounds[first : last + 1] - start
        return replace(self, episodes=self.episodes[first:last], bounds=bounds, place=self.place[start:end])

    def decode_ends(self):
        """Find a file that is too short, or has pictures of another size or rate, now and not hours into the training
        (UserError): the first two frames of each file, and the last."""
        first = {}
        last = {}
        for episode, start, end in zip(self.episodes, self.bounds, self.bounds[1:]):
            first.setdefault(episode.image_file, start)
            last[episode.image_file] = end - 1
        second = [min(first[file] + 1, last[file]) for file in first]
        self.decode(np.unique([*first.values(), *second, *last.values()]))

    def decode(self, indices):
        """The same as frames[indices] for ascending indices without repeats."""
        owner = np.searchsorted(self.bounds, indices, side="right") - 1  # each frame's episode
        place = self.place[indices]
        files = np.array([str(self.episodes[e].image_file) for e in owner], object)
        out = np.empty((len(indices), *self.image_shape), np.uint8)
        for path in dict.fromkeys(files):  # a set that keeps the order
            wanted = np.flatnonzero(files == path)
            wanted = wanted[np.argsort(place[wanted])]  # a file is decoded forwards
            if self.image_column:
                pictures = _decode_images(path, place[wanted], self.image_column)
            else:
                pictures = _decode_video(path, place[wanted])
            for i in wanted:
                try:
                    picture = next(pictures)
                    if picture.shape != self.file_shape:
                        raise ValueError(f"it is {picture.shape}, info.json says {self.file_shape}")
                except UNREADABLE as e:
                    where = f"frame {indices[i] - self.bounds[owner[i]]} of episode {self.episodes[owner[i]].index}"
                    raise UserError(f"{path}: {where} cannot be read ({e})") from None
                out[i] = picture if self.file_shape == self.image_shape else square_picture(picture, len(out[i]))
        return out


def square_picture(picture: np.ndarray, size: int, share: float = 1.0) -> np.ndarray:
    """The square middle of a picture uint8 [H,W,3], no higher than `share` of it, scaled to [size,size,3]."""
    height, width, _ = picture.shape
    side = min(height, width, round(height * share))
    top = (height - side) // 2
    left = (width - side) // 2
    square = Image.fromarray(picture[top : top + side, left : left + side])
    return np.asarray(square.resize((size, size), Image.BOX if side >= size else Image.BILINEAR))


@lru_cache(maxsize=16)
def _opened(opener, path, version, process):
    return opener(path)


def _open(opener, path):
    """opener(path), kept open for the next call; but not if the file has changed, and not in a forked worker, which
    must not share a file position with its parent."""
    return _opened(opener, path, os.stat(path).st_mtime_ns, os.getpid())


def _parquet_file(path):
    """A parquet file and the ends of its row groups."""
    file = pq.ParquetFile(path)
    return file, np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])


def _video_file(path):
    video = av.open(path)
    # No decoder threads: a forked worker that drops a video of its parent's would wait for ever for the parent's.
    video.streams.video[0].codec_context.thread_count = 1
    return video


def _decode_images(path, rows, column):
    """Yield the given rows (ascending) of an image column, uint8 [H,W,3]."""
    file, ends = _open(_parquet_file, path)
    groups = np.searchsorted(ends, rows, side="right")
    for group in np.unique(groups):
        encoded = file.read_row_group(group, [column], use_threads=False)[column].combine_chunks().field("bytes")
        group_start = ends[group] - len(encoded)
        for row in rows[groups == group]:
            yield _decode_picture(encoded[row - group_start].as_py() or b"")


def _decode_picture(encoded: bytes) -> np.ndarray:
    """A PNG or JPEG file's content as uint8 [H,W,3], by PIL, as lerobot does: another JPEG decoder differs by dozens of
    levels where colours have half the resolution. An alpha channel is dropped."""
    picture = Image.open(io.BytesIO(encoded))
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"it is a depth map (PIL's mode {picture.mode}): choose another camera")
    return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))


TOLERANCE = 1e-4  # s, lerobot's


def _decode_video(path, times):
    """Yield the frames at the given times (s from the beginning of the video, ascending), uint8 [H,W,3]. Frames are
    found by time, as lerobot does, and not by number: a video may have another rate than the dataset."""
    video = _open(_video_file, path)
    stream = video.streams.video[0]
    near = 8 / (stream.average_rate or 10)  # s, further ones are reached faster by seeking
    to_rgb = VideoReformatter()
    now = -math.inf  # when the frame that was decoded last is shown
    for time in times:
        if time > now + near:  # seek to the key frame before; nearer ones just decode on
            video.seek(math.floor((time + TOLERANCE) / stream.time_base), stream=stream)
            decoded = video.decode(stream)
            now = -math.inf
        while now < time - TOLERANCE:
            frame = next(decoded, None)
            if frame is None:
                raise ValueError(f"the video ends before {time:.3f} s, where it should be")
            now = float(frame.pts * stream.time_base)
        if now > time + TOLERANCE:
            raise ValueError(f"the video has no frame at {time:.3f} s, the next one is at {now:.3f} s")
        # One converter for all frames, one thread: to_ndarray alone starts threads for every frame, 100 times slower.
        yield to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()


# ---- other people's units ---------------------------------------------------------------------------------------

NAMES = {  # what the names of dimensions can say that makes them others than DIMS
    "joint angles": r"joint|(^|[^a-z])j_?\d|shoulder|elbow|wrist_\d|waist",
    "quaternions": r"quat|(^|[^a-z])q[wxyz]$",
    "axes of rotation": r"axis_?angle|rot_?vec",
    "velocities": r"vel|(^|[^a-z])v[xyz]$",
}
DOWN = Rotation.from_euler("x", np.pi)  # where a tool points whose roll, pitch and yaw are 0 here, in the base frame
FEW = 12  # frames, with fewer of which ranges say nothing


def _to_own_units(meta, rows, bounds) -> None:
    """Bring state and action to README's units in place where it is certain how, and say so; UserError where it is
    certain that they are something else. Names and ranges tell; what neither tells is left as it is."""
    state = rows[STATE]
    action = rows[ACTION]
    for key, names in meta.names.items():
        for what, pattern in NAMES.items():
            found = [name for name in names if re.search(pattern, name, re.IGNORECASE)]
            if found:
                _refuse(meta, key, f"is named {' '.join(found)}: {what}")
    if len(action) < FEW:
        _own_gripper(meta, state, action)
        return

    for key, x in ((STATE, state), (ACTION, action)):
        length = np.linalg.norm(x[:, 3:], axis=1)
        if np.allclose(length, 1, atol=1e-3) and np.linalg.norm(x[:, 3:6], axis=1).max() > 0.3:
            _refuse(meta, key, "has a length of 1 in its last four numbers: quaternions")
        for name, size, limit in zip(DIMS, np.quantile(np.abs(x), 0.99, axis=0), [5] * 3 + [2 * np.pi] * 3 + [5]):
            if size > limit:  # far beyond what an arm does, as units are other ones by factors
                _refuse(meta, key, f"has a {name} of {size:.4g}: not in m, rad, or -1 .. 1")
    for name, low, high in zip(DIMS, *np.quantile(state[:, :3], [0.01, 0.99], axis=0)):
        if max(low, -high) > 1.5:
            _refuse(meta, STATE, f"has a {name} between {low:.3g} and {high:.3g}: out of an arm's reach from its base")
    for i, (low, high) in enumerate(np.quantile(action[:, :6], [0.01, 0.99], axis=0).T):
        if max(low, -high) > (0.1 if i < 3 else 0.3):
            _refuse(meta, ACTION, f"has a {DIMS[i]} between {low:.3g} and {high:.3g}: absolute poses or joint angles")
    following = action[:-1, :3] - state[1:, :3]
    if np.sqrt(np.square(following).mean()) < 0.3 * state[:, :3].std(0).max():
        _refuse(meta, ACTION, "is where the state comes to be: absolute poses or joint angles")
    _own_gripper(meta, state, action)

    if (np.abs(state[:, 3]) > 2).all():
        meta.notes.append("roll pitch yaw of the state are counted from pointing down instead of from the base's axes")
        state[:, 3:6] = (Rotation.from_euler("xyz", state[:, 3:6]) * DOWN.inv()).as_euler("xyz")
    span = 4  # steps, so that an arm that follows late has moved
    start = np.flatnonzero(np.repeat(bounds[1:], np.diff(bounds)) - np.arange(len(state)) > span)
    commanded = np.cumsum(np.concatenate([np.zeros((1, 3)), action[:, :3]]), axis=0)
    commanded = commanded[start + span] - commanded[start]
    moved = state[start + span, :3].astype(float) - state[start, :3]
    product = (commanded * moved).sum()
    alike = product / max(1e-9, np.sqrt(np.square(commanded).sum() * np.square(moved).sum()))
    times = product / max(1e-9, np.square(moved).sum())
    if len(start) > 4 * FEW and abs(alike) > 0.8 and not 1 / 3 < times < 3:
        why = f"adds up to {times:.3g} times the way of the state: not in m a step, or in another frame"
        _refuse(meta, ACTION, why)

    tool = Rotation.from_euler("xyz", state[:, 3:6]) * DOWN
    before = tool[start]
    after = tool[start + span]
    in_base = in_tool = Rotation.identity(len(start))
    for k in range(span):
        turn = Rotation.from_euler("xyz", action[start + k, 3:6])
        in_base = turn * in_base
        in_tool = in_tool * turn
    turning = in_base.magnitude() > 0.02  # rad
    error_base = (in_base * before * after.inv()).magnitude()[turning]
    error_tool = (before * in_tool * after.inv()).magnitude()[turning]
    if turning.sum() > FEW and error_tool.mean() < 0.5 * error_base.mean():
        meta.notes.append("rotations of the action are brought from the tool's frame to the base's")
        turn = tool.apply(Rotation.from_euler("xyz", action[:, 3:6]).as_rotvec())
        action[:, 3:6] = Rotation.from_rotvec(turn).as_euler("xyz")


def _refuse(meta, key, why):
    needed = "x y z (m) roll pitch yaw (rad)" if key == STATE else "changes of x y z (m) roll pitch yaw (rad) a step"
    raise UserError(f"{meta.root}: {meta.keys[key]} {why}; {needed} and a gripper of -1 (closed) .. 1 are needed")


def _own_gripper(meta, state, action) -> None:
    """Bring the gripper of both from metres or 0 .. 1 to -1 (closed) .. 1, in place, or refuse it."""
    columns = {ACTION: action[:, 6], STATE: state[:, 6]}
    in_metres = {}
    from_zero = {}
    for key, x in columns.items():
        in_metres[key] = np.ptp(x) > 0.01 and x.min() > -0.002 and 0.03 < x.max() < 0.11
        from_zero[key] = -0.05 < x.min() < 0.2 and 0.8 < x.max() < 1.05
        if len(x) < FEW:  # only what is certain
            from_zero[key] = set(x.tolist()) == {0, 1}
    told = columns[ACTION]
    shown = columns[STATE]
    widest = np.abs(told).max()
    if len(told) >= FEW and not in_metres[ACTION] and np.ptp(told) > 0.005 and widest < 0.2:
        _refuse(meta, ACTION, f"has a gripper of at most {widest:.3g}: joint angles or velocities")
    for key, x in columns.items():
        if in_metres[key]:
            full = 0.04 if x.max() < 0.0405 else max(0.08, x.max())  # of one finger, or between both
            meta.notes.append(f"{meta.keys[key]}: gripper from 0 .. {full:.2g} m to -1 .. 1")
            x[:] = np.clip(x / full * 2 - 1, -1, 1)
        # The state alone may run from 0 to 1 in our units, too: of a hand that only closes around things.
        elif from_zero[key] and (from_zero[ACTION] or in_metres[ACTION]):
            meta.notes.append(f"{meta.keys[key]}: gripper from 0 (taken for closed) .. 1 (open) to -1 .. 1")
            x[:] = x * 2 - 1

    if len(told) < 4 * FEW or np.ptp(told) < 0.5 or np.ptp(shown) < 0.3:
        return
    with np.errstate(invalid="ignore", divide="ignore"):  # the hand moves some steps after it was told to
        alike = [np.corrcoef(told[: len(told) - lag], shown[lag:])[0, 1] for lag in range(6)]
    if max(np.nan_to_num(alike), key=abs) < -0.7:
        if not in_metres[STATE]:  # which of the two is right is not certain
            _refuse(meta, ACTION, "has a gripper that closes where the state's opens")
        told *= -1
        meta.notes.append(f"{meta.keys[ACTION]}: gripper turned round, which closed at its higher end")


# ---- writing ----------------------------------------------------------------------------------------------------


class DatasetWriter:
    """Writes a LeRobot v3.0 dataset at `fps` Hz, one episode at a time; a context manager.

    `path` appears, complete, when the `with` block ends; if that fails or is interrupted, nothing is left behind. What
    exists is never written into (UserError). Frames become PNG columns, which are exact, or with `video=True` H.264
    video, which is lossy and several times smaller.
    """

    def __init__(self, path: str | Path, fps: float, video: bool = False):
        self.path = Path(path)
        self.fps = fps
        self.video = video
        self._refuse_what_exists()
        self.temporary = self.path.with_name(f".{self.path.name}.partial")
        claim(self.temporary)
        self.root = self.temporary / "dataset"
        shutil.rmtree(self.root, ignore_errors=True)  # of a writer that was killed
        (self.root / "meta/episodes/chunk-000").mkdir(parents=True)
        self.image_shape = None  # (H, W, 3) of the first episode, and so of all
        self.episodes = []  # a row of meta/episodes each
        self.tasks = {}  # prompt -> its task_index
        self.columns = []  # of each episode, without the images, for the statistics of all
        self.num_frames = 0
        self.histogram = np.zeros((3, 256), np.int64)  # of the pixels of all images, by colour
        self.files = []  # paths of the data file and, with `video`, the video file that episodes are appended to
        self.file_index = -1  # of `files`; -1: none was begun
        self.data_file = None
        self.video_file = None
        self.video_stream = None
        self.video_frames = 0  # frames in video_file

    def _refuse_what_exists(self):
        if self.path.exists():
            raise UserError(f"{self.path} exists already: delete it, or choose another folder")

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        try:
            self._close_files()
            if error is None:
                self._write_meta()
                self._refuse_what_exists()  # once more: another process may have been faster
                os.rename(self.root, self.path)
        finally:
            shutil.rmtree(self.temporary, ignore_errors=True)

    def add_episode(self, episode: dict) -> None:
        """Append {"image" uint8 [T,H,W,3], "state" [T,7], "action" [T,7], "prompt" str} and, if it has them,
        "seed" int. UserError for wrong shapes, different lengths, NaN."""
        image = np.asarray(episode["image"])
        state = np.asarray(episode["state"], np.float32)
        action = np.asarray(episode["action"], np.float32)
        prompt = str(episode["prompt"])
        number = len(self.episodes)
        length = len(image)
        self._check_episode(image, state, action)
        self.image_shape = image.shape[1:]

        frame = np.arange(length)
        columns = {
            STATE: state,
            ACTION: action,
            "timestamp": (frame / self.fps).astype(np.float32),
            "frame_index": frame,
            "episode_index": np.full(length, number),
            "index": self.num_frames + frame,
            "task_index": np.full(length, self.tasks.setdefault(prompt, len(self.tasks))),
        }
        table = self._table(columns, image)
        if not self.files or sum(path.stat().st_size for path in self.files if path.exists()) > FILE_BYTES:
            self._close_files()
            self._open_files(table.schema)
        self.data_file.write_table(table)  # a row group an episode: its frames can be read without the others

        chunk_index, file_index = divmod(self.file_index, FILES_PER_CHUNK)
        row = {"episode_index": number, "tasks": [prompt], "length": length}
        row |= {"dataset_from_index": self.num_frames, "dataset_to_index": self.num_frames + length}
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        row |= {"data/chunk_index": chunk_index, "data/file_index": file_index}
        if self.video:
            row[f"videos/{IMAGE}/chunk_index"] = chunk_index
            row[f"videos/{IMAGE}/file_index"] = file_index
            row[f"videos/{IMAGE}/from_timestamp"] = self.video_frames / self.fps
            self._write_video(image)
            row[f"videos/{IMAGE}/to_timestamp"] = self.video_frames / self.fps
        if "seed" in episode:
            row["seed"] = int(episode["seed"])
        histogram = np.stack([np.bincount(image[..., colour].ravel(), minlength=256) for colour in range(3)])
        stats = {key: _stats(x) for key, x in columns.items()} | {IMAGE: _image_stats(histogram, length)}
        row |= {f"stats/{key}/{name}": x.tolist() for key, stat in stats.items() for name, x in stat.items()}

        self.episodes.append(row)
        self.columns.append(columns)
        self.histogram += histogram
        self.num_frames += length

    def _check_episode(self, image, state, action):
        where = f"{self.path}: episode {len(self.episodes)}"
        height_width = (self.image_shape or image.shape[1:])[:2]
        if image.dtype != np.uint8 or image.ndim != 4 or len(image) == 0 or image.shape[1:] != (*height_width, 3):
            raise UserError(f"{where}: image must be uint8 [T,H,W,3], of one size, not {image.dtype} {image.shape}")
        for name, x in (("state", state), ("action", action)):
            if x.shape != (len(image), len(DIMS)):
                raise UserError(f"{where}: {name} has shape {x.shape}, {(len(image), len(DIMS))} is needed")
            if not np.isfinite(x).all():
                raise UserError(f"{where}: {name} has a NaN or an infinity")
        if self.video and any(size % 2 for size in height_width):
            raise UserError(f"{where}: H.264 needs an even height and width, not {height_width}; use video=False")

    def _table(self, columns, image):
        table = {}
        for key, x in columns.items():
            table[key] = pa.array(x) if x.ndim == 1 else pa.FixedSizeListArray.from_arrays(x.ravel(), x.shape[1])
        if not self.video:
            pngs = pa.array(map(_encode_png, image), pa.binary())
            table[IMAGE] = pa.StructArray.from_arrays([pngs, pa.nulls(len(image), pa.string())], ["bytes", "path"])
        return pa.table(table)

    def _open_files(self, schema):
        self.file_index += 1
        chunk_index, file_index = divmod(self.file_index, FILES_PER_CHUNK)
        templates = (DATA_PATH, VIDEO_PATH) if self.video else (DATA_PATH,)
        for template in templates:
            path = self.root / template.format(video_key=IMAGE, chunk_index=chunk_index, file_index=file_index)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.files.append(path)
        self.data_file = pq.ParquetWriter(self.files[0], schema)
        if self.video:
            self.video_file = av.open(str(self.files[1]), "w")
            self.video_frames = 0
            # Every second frame is a key frame, as in LeRobot: any frame decodes from at most one other.
            options = {"crf": "18", "g": "2"}
            self.video_stream = self.video_file.add_stream("libx264", rate=Fraction(self.fps), options=options)
            self.video_stream.height = self.image_shape[0]
            self.video_stream.width = self.image_shape[1]
            self.video_stream.pix_fmt = "yuv420p"

    def _write_video(self, image):
        for picture in image:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = self.video_frames
            frame.time_base = 1 / Fraction(self.fps)
            self.video_file.mux(self.video_stream.encode(frame))
            self.video_frames += 1

    def _close_files(self):
        if self.data_file:
            self.data_file.close()
        if self.video_file:
            self.video_file.mux(self.video_stream.encode())  # the frames that the encoder still holds
            self.video_file.close()
        self.data_file = None
        self.video_file = None
        self.files = []

    def _write_meta(self):
        if not self.episodes:
            raise UserError(f"{self.path}: there is no episode to write")
        meta = self.root / "meta"
        stats = {key: _stats(np.concatenate([c[key] for c in self.columns])) for key in self.columns[0]}
        stats[IMAGE] = _image_stats(self.histogram, self.num_frames)
        stats = {key: {name: x.tolist() for name, x in stat.items()} for key, stat in stats.items()}
        (meta / "info.json").write_text(json.dumps(self._info(), indent=4))
        (meta / "stats.json").write_text(json.dumps(stats, indent=4))
        pq.write_table(pa.Table.from_pylist(self.episodes), meta / "episodes/chunk-000/file-000.parquet")
        # LeRobot looks tasks up in a pandas index: this metadata makes the column one, without needing pandas here.
        columns = [
            {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": dtype, "metadata": None}
            for name, kind, dtype in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
        ]
        pandas = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
        tasks = pa.table({"task_index": list(self.tasks.values()), "task": list(self.tasks)})
        pq.write_table(tasks.replace_schema_metadata({"pandas": json.dumps(pandas)}), meta / "tasks.parquet")

    def _info(self):
        """The content of meta/info.json."""
        height, width, _ = self.image_shape
        image = {"dtype": "image", "shape": list(self.image_shape), "names": ["height", "width", "channels"]}
        if self.video:
            info = {"video.height": height, "video.width": width, "video.channels": 3, "video.codec": "h264"}
            info |= {"video.pix_fmt": "yuv420p", "video.fps": self.fps, "video.is_depth_map": False, "has_audio": False}
            image |= {"dtype": "video", "info": info}
        vector = {"dtype": "float32", "shape": [len(DIMS)], "names": list(DIMS)}
        features = {IMAGE: image, STATE: vector, ACTION: vector}
        for key, x in self.columns[0].items():
            if x.ndim == 1:
                features[key] = {"dtype": str(x.dtype), "shape": [1], "names": None}
        return {
            "codebase_version": "v3.0",
            "robot_type": "panda",
            "total_episodes": len(self.episodes),
            "total_frames": self.num_frames,
            "total_tasks": len(self.tasks),
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": FILE_BYTES >> 20,
            "video_files_size_in_mb": FILE_BYTES >> 20,
            "fps": self.fps,
            "splits": {"train": f"0:{len(self.episodes)}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self.video else None,
            "features": features,
        }


def _encode_png(picture):
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = picture.shape[:2]
    encoder.pix_fmt = "rgb24"
    encoder.time_base = Fraction(1)
    return bytes(encoder.encode(av.VideoFrame.from_ndarray(picture, format="rgb24"))[0])


def write_dataset(path: str | Path, episodes: Iterable[dict], fps: float, video: bool = False) -> None:
    """Write episodes (see DatasetWriter.add_episode) as a LeRobot v3.0 dataset, whole or not at all."""
    with DatasetWriter(path, fps, video) as writer:
        for episode in episodes:
            writer.add_episode(episode)


# ---- collection -------------------------------------------------------------------------------------------------

SEEDS_PER_BLOCK = 5


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that simulate. They start when needed: the first picture of each takes seconds. UserError if one is
    killed, or hangs in what `in_order` waits for."""
    with ProcessPoolExecutor(workers, get_context("spawn"), _init_worker) as pool:
        try:
            yield pool
        except BrokenProcessPool:
            raise UserError(
                "a simulator process died, for want of memory, or killed: take fewer --workers, which the same command "
                "goes on with"
            ) from None
        except TimeoutError:
            for worker in active_children():  # the pool would wait for it
                worker.kill()
            raise UserError(
                f"a simulator process has not answered for {HANGS / 60:.0f} minutes and was killed; the same command "
                "goes on"
            ) from None


def in_order(pool: ProcessPoolExecutor, function: Callable, arguments: Iterable[tuple]) -> Iterator:
    """`function` of all these arguments, as a `worker_pool` computes them."""
    pending = deque(pool.submit(function, *each) for each in arguments)
    while pending:
        yield pending.popleft().result(HANGS)  # and forgotten: together they may be larger than the memory


def _init_worker():
    torch.set_num_threads(1)  # a core a process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """A worker would wait for ever for the next task of a parent that was killed."""
    parent_process().join()
    os._exit(1)


def _demonstrate(task, domain, num, first_seed, pool, settings) -> Iterator[dict]:
    """Yield `num` successful demonstrations in the order of their seeds, whichever worker is first."""
    import envs

    kept = 0
    failures = 0
    pending = deque()  # blocks that workers play, in the order of their seeds
    starts = itertools.count(first_seed, SEEDS_PER_BLOCK)
    with tqdm(total=num, desc=f"{task}, {domain.name}", unit="episode") as bar:
        try:
            while kept < num:
                # Enough to keep every core busy, and no more than are needed if none fails.
                needed = math.ceil((num - kept) / SEEDS_PER_BLOCK)
                while len(pending) < min(2 * len(os.sched_getaffinity(0)), needed):
                    start = next(starts)
                    seeds = range(start, start + SEEDS_PER_BLOCK)
                    pending.append(pool.submit(envs.demonstrations, task, domain, seeds, **settings))
                for episode in pending.popleft().result(HANGS):
                    if not episode["success"]:
                        failures += 1
                        bar.set_postfix(failed=failures)
                    elif kept < num:
                        kept += 1
                        bar.update()
                        yield episode
                if failures > num + 20:
                    raise UserError(
                        f"the demonstrator of {task} failed in {failures} of {failures + kept} episodes in the domain "
                        f"{domain.name}; `python envs.py demonstrators` measures it"
                    )
        finally:
            for block in pending:
                block.cancel()


def collect_dataset(
    task, domain, num: int, out: Path, first_seed: int, pool, video: bool = False, **settings
) -> np.ndarray:
    """Collect `num` successful scripted demonstrations of `task` in `domain` (an envs.Domain) into the dataset `out`
    -> their lengths in control steps [num].

    Seeds count up from `first_seed`; failed episodes are dropped, and counted in the progress bar. A dataset that is
    there already is kept: UserError if it has another number of episodes. `pool` is a `worker_pool(workers)`;
    `settings` are those of `envs.make`.
    """
    import envs

    if not Path(out).exists():
        write_dataset(out, _demonstrate(task, domain, num, first_seed, pool, settings), envs.CONTROL_HZ, video)
    lengths = np.diff(load_dataset(out, max_bytes=0).bounds)
    found = len(lengths)
    if found != num:
        raise UserError(f"{out} has {found} episodes, not {num}: ask for {found}, or delete it to collect anew")
    return lengths


EPISODES_PER_DOMAIN = 2  # of each task


def collect_domains(num: int, out: Path, first_seed: int, pool, video: bool = False, **settings) -> int:
    """Collect scripted demonstrations of all tasks in `num` random domains (envs.random_domain) into the one dataset
    `out` -> how many. Failed episodes are dropped. A dataset that is there already is kept as it is."""
    import envs

    if not out.exists():
        blocks = []
        for number in range(num):
            domain = envs.random_domain(first_seed + number)
            start = first_seed + EPISODES_PER_DOMAIN * number
            blocks += [(task, domain, range(start, start + EPISODES_PER_DOMAIN)) for task in envs.TASKS]
        played = in_order(pool, partial(envs.demonstrations, **settings), blocks)
        played = tqdm(played, out.name, len(blocks), unit="block")
        successes = (episode for block in played for episode in block if episode["success"])
        write_dataset(out, successes, envs.CONTROL_HZ, video)
    return len(load_dataset(out, max_bytes=0).bounds) - 1


@dataclass
class CollectArgs:
    """Collect scripted demonstrations into OUT/TASK-twin, OUT/TASK-TARGET and OUT/TASK-TARGET-val.

    The twin's are D_sim. The target's are D_real where there is no robot; those for validation are held out from
    training, to measure the imitation loss on real demonstrations. A dataset that exists is kept as it is.
    """

    task: str = "push_cube"
    """A task of envs.py, which has the demonstrator."""
    target: str = "standin"
    """The domain of envs.py that plays the robot."""
    num_twin: int = 500
    """Demonstrations in the twin. More of them make stage I better, and leave less for RL to do."""
    num_real: int = 50
    """Demonstrations in the target, the "real" ones. On an arm they would cost an operator's time."""
    num_val: int = 20
    """Held-out demonstrations in the target, for validation. More of them make the curve of its loss steadier."""
    domains: int | None = None
    """Instead of all that: two demonstrations of every task in each of so many random domains, into OUT/domains, and in
    a twentieth as many others, into OUT/domains-val. To pretrain a policy on, which then knows no domain by heart."""
    out: Path = Path("demos")
    """Folder of the datasets. The training scripts look into `demos` unless they are told otherwise."""
    workers: int = len(os.sched_getaffinity(0))
    """Simulator processes, one a core; each takes about half a GB of memory, so fewer where that is short."""
    video: bool = False
    """Store the frames as H.264 video, several times smaller and slightly lossy, instead of as PNG columns, which are
    exact."""
    image_size: int = 64
    """Side of the square pictures, pixels. A policy needs its own at least: 64 for the tiny ones, 224 for full size."""
    render: Literal["auto", "cpu", "gpu"] = "auto"
    """Where pictures are rendered. auto is the GPU if it can render one."""
    debug: bool = False
    """Show the traceback of an error in the input, too."""


def collect(args: CollectArgs) -> None:
    """The datasets that CollectArgs describes; UserError for a task or target that is not there."""
    import envs

    settings = dict(image_size=args.image_size, render=envs.find_renderer(args.render))
    if args.domains is not None:
        if args.domains < 1:
            raise UserError("--domains: at least 1")
        first_seed = envs.SEEDS["domains"]
        with worker_pool(args.workers) as pool:
            trained = collect_domains(args.domains, args.out / "domains", first_seed, pool, args.video, **settings)
            held_out = args.out / "domains-val"
            num_val = math.ceil(args.domains / 20)
            validated = collect_domains(num_val, held_out, first_seed + 500_000, pool, args.video, **settings)
        print(f"{args.out / 'domains'}: {trained} episodes; {held_out}: {validated}")
        return
    envs.require_task(args.task)
    target = envs.target_domain(args.target)
    datasets = (  # domain, held out, first seed, number of demonstrations
        (envs.TWIN, False, envs.SEEDS["twin_demos"], args.num_twin),
        (target, False, envs.SEEDS["real_demos"], args.num_real),
        (target, True, envs.SEEDS["real_val"], args.num_val),
    )
    with worker_pool(args.workers) as pool:
        for domain, held_out, first_seed, num in datasets:
            out = demos_path(args.task, domain.name, held_out, args.out)
            lengths = collect_dataset(args.task, domain, num, out, first_seed, pool, args.video, **settings)
            print(f"{out}: {num} episodes, {np.median(lengths):.0f} steps in the median, {lengths.max()} at most")
    newest = demos_path(args.task, args.target, folder=args.out)
    print(f"look at them: python data.py show {newest}; next: train_sft.py")


if __name__ == "__main__":
    import page  # here and not above: these stand on this file
    import robot

    commands = {"collect": CollectArgs, "record": robot.RecordArgs, "show": page.ShowArgs}
    args = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    one_line_errors(args.debug)
    if isinstance(args, CollectArgs):
        collect(args)
    elif isinstance(args, page.ShowArgs):
        page.show(args)
    else:
        robot.record(args)
