"""Demonstrations: LeRobot datasets in and out, their statistics, the alpha-mixture of stage I, and their collection.

    python data.py                                  # scripted demonstrations of push cube: twin, stand-in, validation
    python data.py --num-twin 1000 --workers 8      # more of them, on more cores
    python data.py record --robot-ip 172.16.0.2     # demonstrations on a real Franka, by keyboard or by hand

A dataset is a folder in LeRobot's format: v3.0 is written, v2.1 and v3.0 are read, so it may as well come from a real
robot or from the Hub. State and action have 7 dimensions; units and frames are those of envs.py.
"""
import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from multiprocessing import get_context, parent_process
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
from tqdm import tqdm

IMAGE, STATE, ACTION = "observation.images.base_0_rgb", "observation.state", "action"
DIMS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")  # of state and action
FILE_BYTES, FILES_PER_CHUNK = 100 << 20, 1000  # beyond these (data and video) a new file, a new folder is begun
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


# ----------------------------------------------------------------------------------------------------------- statistics
def _stats(x):
    """LeRobot's statistics of x [N] or [N,D], over N."""
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    stats = dict(mean=x.mean(0), std=x.std(0), min=x.min(0), max=x.max(0), count=np.array([len(x)]))
    return stats | dict(zip(QUANTILES, np.quantile(x, list(QUANTILES.values()), axis=0)))


def _image_stats(histogram, count):
    """The same for images: [3,1,1], pixels in 0..1; from how many pixels have each of the 256 values, [3,256]."""
    value, pixels = np.arange(256) / 255, histogram[0].sum()
    mean = histogram @ value / pixels
    stats = dict(mean=mean, std=np.sqrt(np.maximum(histogram @ value**2 / pixels - mean**2, 0)))
    for name, q in {"min": 0, "max": 1, **QUANTILES}.items():
        stats[name] = value[(histogram.cumsum(1) >= max(q * pixels, 1)).argmax(1)]
    return {name: x.reshape(3, 1, 1) for name, x in stats.items()} | {"count": np.array([count])}


def statistics(*datasets):
    """Statistics of the union of `datasets` (Demonstrations), for the policy's normalisation.

    Returns {"observation.state": {"mean", "std", "min", "max", "q01", "q99"}, "action": the same}: LeRobot's key names,
    each a list of 7 floats. The quantiles are exact, not averages over episodes.
    """
    union = {STATE: np.concatenate([d.state for d in datasets]), ACTION: np.concatenate([d.action for d in datasets])}
    return {key: {name: stat.tolist() for name, stat in _stats(x).items()
                  if name in ("mean", "std", "min", "max", "q01", "q99")} for key, x in union.items()}


# -------------------------------------------------------------------------------------------------------------- writing
class DatasetWriter:
    """Writes a LeRobot v3.0 dataset, one episode at a time; a context manager.

    `path` appears, complete, when the `with` block ends; if that fails or is interrupted, nothing is left behind. What
    exists is never written into (FileExistsError). Frames become PNG columns, which are exact, or with `video=True`
    H.264 video, which is lossy and several times smaller.
    """

    def __init__(self, path, fps, video=False):
        self.path, self.fps, self.video = Path(path), fps, video
        if self.path.exists():
            raise FileExistsError(f"{self.path} exists already: delete it, or choose another folder")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
        self.root = self.temporary / "dataset"  # mkdtemp's own folder is closed to other users
        (self.root / "meta/episodes/chunk-000").mkdir(parents=True)
        self.episodes, self.tasks, self.columns, self.frames = [], {}, [], 0
        self.histogram = np.zeros((3, 256), np.int64)
        self.files, self.file_index, self.data_file, self.video_file = [], -1, None, None

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        try:
            self._close_files()
            if error is None:
                self._write_meta()
                os.rename(self.root, self.path)
        finally:
            shutil.rmtree(self.temporary, ignore_errors=True)

    def add_episode(self, episode):
        """Append {"image" uint8 [T,H,W,3], "state" [T,7], "action" [T,7], "prompt" str} and, if it has them,
        "seed" int. ValueError for wrong shapes, different lengths, NaN."""
        image, prompt = np.asarray(episode["image"]), str(episode["prompt"])
        state, action = (np.asarray(episode[key], np.float32) for key in ("state", "action"))
        number, length, where = len(self.episodes), len(image), f"{self.path}: episode {len(self.episodes)}"
        self.shape = self.shape if self.episodes else image.shape[1:]
        if image.dtype != np.uint8 or image.ndim != 4 or not length or image.shape[1:] != (*self.shape[:2], 3):
            raise ValueError(f"{where}: image must be uint8 [T,H,W,3], of one size, not {image.dtype} {image.shape}")
        for name, x in (("state", state), ("action", action)):
            if x.shape != (length, len(DIMS)):
                raise ValueError(f"{where}: {name} has shape {x.shape}, {(length, len(DIMS))} is needed")
            if not np.isfinite(x).all():
                raise ValueError(f"{where}: {name} has a NaN or an infinity")
        if self.video and (self.shape[0] % 2 or self.shape[1] % 2):
            raise ValueError(f"{where}: H.264 needs an even height and width, not {self.shape[:2]}; use video=False")

        frame = np.arange(length)
        columns = {STATE: state, ACTION: action, "timestamp": (frame / self.fps).astype(np.float32),
                   "frame_index": frame, "episode_index": np.full(length, number), "index": self.frames + frame,
                   "task_index": np.full(length, self.tasks.setdefault(prompt, len(self.tasks)))}
        table = {key: pa.FixedSizeListArray.from_arrays(x.ravel(), x.shape[1]) if x.ndim == 2 else pa.array(x)
                 for key, x in columns.items()}
        if not self.video:
            pngs = pa.array(map(_encode_png, image), pa.binary())
            table[IMAGE] = pa.StructArray.from_arrays([pngs, pa.nulls(length, pa.string())], ["bytes", "path"])
        table = pa.table(table)
        if not self.files or sum(path.stat().st_size for path in self.files if path.exists()) > FILE_BYTES:
            self._close_files()
            self._open_files(table.schema)
        self.data_file.write_table(table)  # a row group an episode: its frames can be read without the others

        histogram = np.stack([np.bincount(image[..., c].ravel(), minlength=256) for c in range(3)])
        stats = {key: _stats(x) for key, x in columns.items()} | {IMAGE: _image_stats(histogram, length)}
        row = {"episode_index": number, "tasks": [prompt], "length": length,
               "dataset_from_index": self.frames, "dataset_to_index": self.frames + length,
               "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        for kind in ("data", f"videos/{IMAGE}")[:1 + self.video]:
            row[f"{kind}/chunk_index"], row[f"{kind}/file_index"] = divmod(self.file_index, FILES_PER_CHUNK)
        if self.video:
            row[f"videos/{IMAGE}/from_timestamp"] = self.video_frames / self.fps
            row[f"videos/{IMAGE}/to_timestamp"] = (self.video_frames + length) / self.fps
            for picture in image:
                picture = av.VideoFrame.from_ndarray(picture, format="rgb24")
                picture.pts, picture.time_base = self.video_frames, 1 / Fraction(self.fps)
                self.video_file.mux(self.stream.encode(picture))
                self.video_frames += 1
        row |= {"seed": int(episode["seed"])} if "seed" in episode else {}
        row |= {f"stats/{key}/{name}": x.tolist() for key, stat in stats.items() for name, x in stat.items()}
        self.episodes.append(row)
        self.columns.append(columns)
        self.histogram += histogram
        self.frames += length

    def _open_files(self, schema):
        self.file_index += 1
        chunk, number = divmod(self.file_index, FILES_PER_CHUNK)
        self.files = [self.root / template.format(video_key=IMAGE, chunk_index=chunk, file_index=number)
                      for template in (DATA_PATH, VIDEO_PATH)[:1 + self.video]]
        for path in self.files:
            path.parent.mkdir(parents=True, exist_ok=True)
        self.data_file = pq.ParquetWriter(self.files[0], schema)
        if self.video:
            self.video_file, self.video_frames = av.open(str(self.files[1]), "w"), 0
            # Every second frame is a key frame, as in LeRobot: any frame decodes from at most one other.
            self.stream = self.video_file.add_stream("libx264", rate=Fraction(self.fps),
                                                     options={"crf": "18", "g": "2"})
            self.stream.height, self.stream.width, self.stream.pix_fmt = *self.shape[:2], "yuv420p"

    def _close_files(self):
        if self.data_file:
            self.data_file.close()
        if self.video_file:
            self.video_file.mux(self.stream.encode())  # the frames that the encoder still holds
            self.video_file.close()
        self.data_file, self.video_file, self.files = None, None, []

    def _write_meta(self):
        if not self.episodes:
            raise ValueError(f"{self.path}: there is no episode to write")
        meta = self.root / "meta"
        vector = {"dtype": "float32", "shape": [len(DIMS)], "names": list(DIMS)}
        image = {"dtype": "image", "shape": list(self.shape), "names": ["height", "width", "channels"]}
        if self.video:
            image |= {"dtype": "video", "info": {
                "video.height": self.shape[0], "video.width": self.shape[1], "video.channels": 3, "video.codec": "h264",
                "video.pix_fmt": "yuv420p", "video.fps": self.fps, "video.is_depth_map": False, "has_audio": False}}
        scalars = {key: {"dtype": str(x.dtype), "shape": [1], "names": None}
                   for key, x in self.columns[0].items() if x.ndim == 1}
        info = {"codebase_version": "v3.0", "robot_type": "panda", "total_episodes": len(self.episodes),
                "total_frames": self.frames, "total_tasks": len(self.tasks), "chunks_size": FILES_PER_CHUNK,
                "data_files_size_in_mb": FILE_BYTES >> 20, "video_files_size_in_mb": FILE_BYTES >> 20, "fps": self.fps,
                "splits": {"train": f"0:{len(self.episodes)}"}, "data_path": DATA_PATH,
                "video_path": VIDEO_PATH if self.video else None,
                "features": {IMAGE: image, STATE: vector, ACTION: vector, **scalars}}
        stats = {key: _stats(np.concatenate([c[key] for c in self.columns])) for key in self.columns[0]}
        stats[IMAGE] = _image_stats(self.histogram, self.frames)
        stats = {key: {name: x.tolist() for name, x in stat.items()} for key, stat in stats.items()}
        (meta / "info.json").write_text(json.dumps(info, indent=4))
        (meta / "stats.json").write_text(json.dumps(stats, indent=4))
        pq.write_table(pa.Table.from_pylist(self.episodes), meta / "episodes/chunk-000/file-000.parquet")
        # LeRobot looks tasks up in a pandas index: this metadata makes the column one, without needing pandas here.
        tasks = pa.table({"task_index": list(self.tasks.values()), "task": list(self.tasks)})
        columns = [{"name": name, "field_name": name, "pandas_type": kind, "numpy_type": dtype, "metadata": None}
                   for name, kind, dtype in (("task_index", "int64", "int64"), ("task", "unicode", "object"))]
        pandas = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
        pq.write_table(tasks.replace_schema_metadata({"pandas": json.dumps(pandas)}), meta / "tasks.parquet")


def _encode_png(image):
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width, encoder.pix_fmt, encoder.time_base = *image.shape[:2], "rgb24", Fraction(1)
    return bytes(encoder.encode(av.VideoFrame.from_ndarray(image, format="rgb24"))[0])


def write_dataset(path, episodes, fps, video=False):
    """Write an iterable of episodes (see DatasetWriter.add_episode) as a LeRobot v3.0 dataset, whole or not at all."""
    with DatasetWriter(path, fps, video) as writer:
        for episode in episodes:
            writer.add_episode(episode)


# -------------------------------------------------------------------------------------------------------------- reading
@dataclass
class Demonstrations:
    """N frames of E episodes, in order. len() is N."""

    path: Path
    fps: float  # Hz, the control rate
    state: np.ndarray  # float32 [N,7]
    action: np.ndarray  # float32 [N,7]
    prompt: np.ndarray  # str objects [N]
    bounds: np.ndarray  # int [E+1]: episode e is the frames bounds[e] .. bounds[e+1]-1
    frames: object  # frames[int array [n]] -> uint8 [n,H,W,3]: an array in memory, or FramesOnDisk
    image_shape: tuple  # (H, W, 3)

    def __len__(self):
        return len(self.state)


def load_dataset(path, max_bytes=4 << 30, num_episodes=None, fps=None):
    """Read a LeRobot dataset, v2.1 or v3.0, images as video or as image columns -> Demonstrations.

    The camera is "observation.images.base_0_rgb", or the only one there is. Frames are decoded into memory if they
    take at most `max_bytes`, otherwise on access. With `num_episodes` only the first so many are kept.
    FileNotFoundError or ValueError with one line that names the file and the episode: no dataset, unknown version,
    recorded at another rate than `fps`, corrupt or missing files, wrong shapes or lengths, NaN.
    """
    root = Path(path)
    if not (root / "meta/info.json").exists():
        raise FileNotFoundError(f"{root} is no LeRobot dataset: no meta/info.json (`python data.py` collects datasets)")
    info = _read_json(root / "meta/info.json")
    try:
        recorded, shapes = info["fps"], {key: tuple(feature["shape"]) for key, feature in info["features"].items()}
        cameras = {key: f["dtype"] for key, f in info["features"].items() if f["dtype"] in ("image", "video")}
        if info["codebase_version"] not in ("v2.1", "v3.0"):
            raise ValueError(f"{root}: codebase_version {info['codebase_version']} is not v2.1 or v3.0")
        if recorded != (fps or recorded):
            raise ValueError(f"{root} is recorded at {recorded} Hz, not at {fps} Hz: its actions mean other motions")
        for key in (STATE, ACTION):
            if shapes.get(key) != (len(DIMS),):
                raise ValueError(f"{root}: {key} has shape {shapes.get(key)}, ({len(DIMS)},) needed: {' '.join(DIMS)}")
        if IMAGE not in cameras and len(cameras) != 1:
            raise ValueError(f"{root}: a camera {IMAGE} is needed, or only one camera; it has {list(cameras)}")
        camera = IMAGE if IMAGE in cameras else list(cameras)[0]
        is_video, shape = cameras[camera] == "video", shapes[camera]
        shape = shape[1:] + shape[:1] if shape[0] == 3 != shape[-1] else shape  # some datasets say channels first
        episodes, tasks = _read_episodes(root, info, camera if is_video else None), _read_tasks(root, info)
    except (LookupError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(f"{root}/meta: corrupt or incomplete ({error!r})") from None

    state, action, task = [], [], []
    for data_path, group in itertools.groupby(episodes, key=lambda episode: episode["data"]):
        group = list(group)
        table = _read_table(data_path, [STATE, ACTION, "episode_index", "task_index"], f"episode {group[0]['index']}")
        index, lengths = table["episode_index"].to_numpy(), [episode["length"] for episode in group]
        if not np.array_equal(index, np.repeat([episode["index"] for episode in group], lengths)):
            wrong = next((e for e in group if np.count_nonzero(index == e["index"]) != e["length"]), group[0])
            raise ValueError(f"{data_path}: rows do not match the metadata: episode {wrong['index']} has "
                             f"{np.count_nonzero(index == wrong['index'])} rows, its length is {wrong['length']}")
        for episode, row in zip(group, np.cumsum([0] + lengths)):
            episode.setdefault("first", row)
        state.append(_read_vectors(table, STATE, data_path))
        action.append(_read_vectors(table, ACTION, data_path))
        task.append(table["task_index"].to_numpy())
    bounds, task = np.cumsum([0] + [episode["length"] for episode in episodes]), np.concatenate(task)
    if (bad := np.flatnonzero(~np.isin(task, list(tasks)))).size:
        raise ValueError(f"{root}/meta: no task {task[bad[0]]}, which frame {bad[0]} of the dataset names")

    if num_episodes is not None and not 1 <= num_episodes <= len(episodes):
        raise ValueError(f"{root} has {len(episodes)} episodes, of which {num_episodes} cannot be used")
    episodes, bounds = episodes[:num_episodes], bounds[:num_episodes and num_episodes + 1]
    state, action, task = (np.concatenate(x)[:bounds[-1]] for x in (state, action, [task]))
    for episode in episodes:
        if not episode["file"].exists():
            raise FileNotFoundError(f"{episode['file']}: missing; the images of episode {episode['index']} are in it")
    prompt = np.array([tasks[i] for i in task.tolist()], object)
    frames = FramesOnDisk(episodes, bounds, shape, recorded, None if is_video else camera)
    if bounds[-1] * math.prod(shape) <= max_bytes:
        frames = frames.decode(np.arange(bounds[-1]))
    else:  # a file that ends too early is found now, and not hours into the training
        last_of_file = {episode["file"]: end - 1 for episode, end in zip(episodes, bounds[1:])}
        frames.decode(np.sort(list(last_of_file.values())))
    return Demonstrations(root, recorded, state, action, prompt, bounds, frames, shape)


def _read_json(path, lines=False):
    try:
        text = path.read_text()
        return [json.loads(line) for line in text.splitlines() if line.strip()] if lines else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: corrupt, no JSON ({error})") from None


def _read_table(path, columns, what):
    """Columns of a parquet file. The error says `what` should be in it."""
    try:
        table = pq.ParquetFile(path).read(columns=columns)
        return table.select(columns or table.column_names)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing; {what} should be in it") from None
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"{path}: truncated or corrupt; {what} should be in it ({error})") from None


def _read_vectors(table, key, path):
    """A list column as float32 [n,7]."""
    try:
        column = table[key].combine_chunks().cast(pa.list_(pa.float32()))
    except pa.ArrowException as error:
        raise ValueError(f"{path}: {key} is no column of lists of numbers ({error})") from None
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    if (bad := np.flatnonzero(lengths != len(DIMS))).size:
        raise ValueError(f"{path}: {key} has {lengths[bad[0]]} values in episode {table['episode_index'][bad[0]]}, "
                         f"row {bad[0]}; {len(DIMS)} are needed")
    x = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, len(DIMS))
    if (bad := np.flatnonzero(~np.isfinite(x).all(1))).size:
        raise ValueError(f"{path}: {key} has a NaN or an infinity in episode {table['episode_index'][bad[0]]}, "
                         f"row {bad[0]}")
    return x


def _read_episodes(root, info, video_key):
    """Episodes in order, each {"index", "length", "data": its parquet file, "file": the one with its images} and, for
    video, "first": its first frame in there."""
    if info["codebase_version"] == "v2.1":
        rows = _read_json(root / "meta/episodes.jsonl", lines=True)
    else:
        columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        if video_key:
            columns += [f"videos/{video_key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
        files = sorted((root / "meta/episodes").glob("*/*.parquet"))
        rows = [row for file in files for row in _read_table(file, columns, "the list of episodes").to_pylist()]
    if len(rows) != info["total_episodes"] or not rows:
        raise ValueError(f"{root}: {len(rows)} episodes are listed in meta, info.json says {info['total_episodes']}"
                         if rows else f"{root}: an empty dataset, meta lists no episode")
    episodes = []
    for row in sorted(rows, key=lambda row: row["episode_index"]):
        index, place = row["episode_index"], lambda kind: {k: row[f"{kind}/{k}"] for k in ("chunk_index", "file_index")}
        if info["codebase_version"] == "v2.1":
            place = lambda kind: {"episode_chunk": index // info["chunks_size"], "episode_index": index}
        data = root / info["data_path"].format(**place("data"))
        episode = {"index": index, "length": int(row["length"]), "data": data, "file": data}
        if video_key:
            video = f"videos/{video_key}"
            episode["file"] = root / info["video_path"].format(video_key=video_key, **place(video))
            episode["first"] = round(row.get(f"{video}/from_timestamp", 0) * info["fps"])
        episodes.append(episode)
    return episodes


def _read_tasks(root, info):
    """{task_index: task}"""
    if info["codebase_version"] == "v2.1":
        return {row["task_index"]: row["task"] for row in _read_json(root / "meta/tasks.jsonl", lines=True)}
    table = _read_table(root / "meta/tasks.parquet", None, "the list of tasks")
    text = next(name for name in table.column_names if name != "task_index")  # its name is up to pandas
    return dict(zip(table["task_index"].to_pylist(), table[text].to_pylist()))


@dataclass
class FramesOnDisk:
    """frames[indices] -> uint8 [n,H,W,3], decoded on access: in the DataLoader's workers, if it has any."""

    episodes: list  # of dicts: "index", "file", and "first", the episode's first frame (video) or row in that file
    bounds: np.ndarray
    shape: tuple
    fps: float
    column: str | None  # the image column; None: video

    def __getitem__(self, indices):
        indices, inverse = np.unique(indices, return_inverse=True)
        return self.decode(indices)[inverse]

    def decode(self, indices):
        """The same for ascending indices without repeats."""
        owner = np.searchsorted(self.bounds, indices, side="right") - 1
        number = indices - self.bounds[owner] + np.array([self.episodes[e]["first"] for e in owner])
        files = np.array([str(self.episodes[e]["file"]) for e in owner], object)
        out = np.empty((len(indices), *self.shape), np.uint8)
        for path in dict.fromkeys(files):
            rows = np.flatnonzero(files == path)
            rows, done = rows[np.argsort(number[rows])], 0
            try:
                for frame in (_decode_images(path, number[rows], self.column) if self.column else
                              _decode_video(path, number[rows], self.fps)):
                    if frame.shape != self.shape:
                        raise ValueError(f"it is {frame.shape}, info.json says {self.shape}")
                    out[rows[done]] = frame
                    done += 1
            except (pa.ArrowException, av.error.FFmpegError, OSError, ValueError, LookupError, AttributeError) as error:
                e = owner[rows[done]]
                raise ValueError(f"{path}: frame {indices[rows[done]] - self.bounds[e]} of episode "
                                 f"{self.episodes[e]['index']} cannot be read ({error})") from None
        return out


@lru_cache(maxsize=16)
def _opened(path, version, process):
    if not path.endswith(".parquet"):
        return av.open(path)
    file = pq.ParquetFile(path)
    return file, np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])


def _open(path):
    """A video, or a parquet file and the ends of its row groups. Kept open, but not if the file has changed, and not
    in a forked worker, which must not share a file position with its parent."""
    return _opened(path, os.stat(path).st_mtime_ns, os.getpid())


def _decode_images(path, rows, column):
    """Yield the given rows (ascending) of an image column, uint8 [H,W,3]."""
    file, ends = _open(path)
    groups = np.searchsorted(ends, rows, side="right")
    for group in np.unique(groups):
        encoded = file.read_row_group(group, [column], use_threads=False)[column].combine_chunks().field("bytes")
        for row in rows[groups == group] - ends[group] + len(encoded):
            picture = encoded[row].as_py() or b""
            # A new decoder each time: FFmpeg's PNG decoder, used twice, returns garbage the second time.
            decoder = av.CodecContext.create("png" if picture.startswith(b"\x89PNG") else "mjpeg", "r")
            yield decoder.decode(av.Packet(picture))[0].to_ndarray(format="rgb24")


def _decode_video(path, numbers, fps):
    """Yield the given frames (ascending, counted from the beginning of the video), uint8 [H,W,3]."""
    video, to_rgb, position = _open(path), VideoReformatter(), None
    stream = video.streams.video[0]
    start = stream.start_time or 0
    for number in numbers:
        if position is None or number > position + 8:  # seek to the key frame before; nearer ones just decode on
            video.seek(start + round(number / fps / stream.time_base), stream=stream)
            decoded = video.decode(stream)
        for frame in decoded:
            position = round((frame.pts - start) * stream.time_base * fps)
            if position >= number:
                break
        if position != number:
            raise ValueError("it is not in the video")
        # One converter for all frames, one thread: to_ndarray alone starts threads for every frame, 100 times slower.
        yield to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()


# -------------------------------------------------------------------------------------------------------------- mixture
class Mixture(torch.utils.data.Dataset):
    """The data of stage I, alpha * E_sim + (1 - alpha) * E_real, as batches: item k is the whole batch k.

    Frames are drawn uniformly, with replacement. Batch k depends on nothing but (seed, k), so training resumes by
    starting there: DataLoader(mixture, batch_size=None, sampler=range(k, steps), num_workers=...). The share alpha is
    exact: where alpha * batch_size is no integer, over the batches together. alpha = 0 needs no `sim` (real-only SFT,
    the anchor of stage II), alpha = 1 no `real`.

    A batch: "image" uint8 [B,H,W,3], "state" float32 [B,7] and "prompt", B str, at a time t; "action" float32
    [B,horizon,7] of t .. t+horizon-1; "action_is_pad" bool [B,horizon], True past the end of the episode (where the
    last action is repeated, as in LeRobot); "is_sim" bool [B].
    """

    def __init__(self, real, sim, alpha, batch_size, horizon, seed):
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is a share, 0 (only real samples) to 1 (only simulated ones), not {alpha}")
        if (sim is None and alpha > 0) or (real is None and alpha < 1):
            raise ValueError(f"alpha = {alpha} needs {'simulated' if sim is None else 'real'} demonstrations as well")
        if real is not None and sim is not None and real.image_shape != sim.image_shape:
            raise ValueError(f"{real.path} has images {real.image_shape}, but {sim.path} {sim.image_shape}")
        self.real, self.sim, self.batch_size, self.horizon, self.seed = real, sim, batch_size, horizon, seed
        self.sim_per_batch = Fraction(str(alpha)) * batch_size  # exact: in floats, 0.29 * 100 < 29

    def __getitem__(self, k):
        n_sim = math.floor((k + 1) * self.sim_per_batch) - math.floor(k * self.sim_per_batch)
        rng = np.random.default_rng((self.seed, k))
        parts = [self._sample(data, rng.integers(len(data), size=n))
                 for data, n in ((self.real, self.batch_size - n_sim), (self.sim, n_sim)) if n]
        batch = {key: torch.from_numpy(np.concatenate([part[key] for part in parts]))
                 for key in ("image", "state", "action", "action_is_pad")}
        batch["prompt"] = [prompt for part in parts for prompt in part["prompt"]]
        batch["is_sim"] = torch.arange(self.batch_size) >= self.batch_size - n_sim
        return batch

    def _sample(self, data, t):
        end = data.bounds[np.searchsorted(data.bounds, t, side="right")]
        chunk = t[:, None] + np.arange(self.horizon)
        return {"image": data.frames[t], "state": data.state[t], "prompt": data.prompt[t],
                "action": data.action[np.minimum(chunk, end[:, None] - 1)], "action_is_pad": chunk >= end[:, None]}


# ----------------------------------------------------------------------------------------------------------- collection
SEEDS_PER_BLOCK = 5


def _init_worker():
    torch.set_num_threads(1)  # a core a process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()  # not to outlive it


def _demonstrate_block(task, domain, seeds):
    import envs  # in functions and not above: whoever only reads datasets needs no simulator

    # PhysX keeps traces of earlier episodes over a reset (1e-5 m after a contact). A new scene for every block makes
    # episodes depend on their seeds, and not on which worker was faster; for every episode it would be slow.
    return [envs.demonstrate(task, domain, seed, fresh=seed == seeds[0]) for seed in seeds]


def _demonstrate(task, domain, num, first_seed, pool):
    """Yield `num` successful demonstrations in the order of their seeds, whichever worker is first."""
    kept, failures, pending, starts = 0, 0, deque(), itertools.count(first_seed, SEEDS_PER_BLOCK)
    with tqdm(total=num, desc=f"{task}, {domain.name}", unit="episode") as bar:
        try:
            while kept < num:
                while len(pending) < min(2 * len(os.sched_getaffinity(0)), math.ceil((num - kept) / SEEDS_PER_BLOCK)):
                    seeds = range(start := next(starts), start + SEEDS_PER_BLOCK)
                    pending.append(pool.submit(_demonstrate_block, task, domain, seeds))
                for episode in pending.popleft().result():
                    if not episode["success"]:
                        failures += 1
                        bar.set_postfix(failed=failures)
                    elif kept < num:
                        kept += 1
                        bar.update()
                        yield episode
                if failures > num + 20:
                    raise ValueError(f"the expert of {task} failed in {failures} of {failures + kept} episodes in the "
                                     f"domain {domain.name}; `python envs.py expert` measures it")
        finally:
            for block in pending:
                block.cancel()


def collect(task, domain, num, out, first_seed, pool, video=False):
    """Collect `num` successful scripted demonstrations of `task` in `domain` (an envs.Domain) into the dataset `out`
    -> their lengths in control steps [num].

    Seeds count up from `first_seed`; failed episodes are dropped, and counted in the progress bar. A dataset that is
    there already is kept: ValueError if it has another number of episodes. `pool` is a `simulators(workers)`.
    """
    import envs

    if not Path(out).exists():
        write_dataset(out, _demonstrate(task, domain, num, first_seed, pool), envs.CONTROL_HZ, video)
    lengths = np.diff(load_dataset(out, max_bytes=0).bounds)
    if (found := len(lengths)) != num:
        raise ValueError(f"{out} has {found} episodes, not {num}: ask for {found}, or delete it to collect anew")
    return lengths


def simulators(workers):
    """Processes for `collect`; a context manager. They start when needed: the first picture of each takes seconds."""
    return ProcessPoolExecutor(workers, get_context("spawn"), _init_worker)


@dataclass
class Args:
    """Collect scripted demonstrations into OUT/TASK-twin, OUT/TASK-TARGET and OUT/TASK-TARGET-val.

    The twin's are D_sim. The target's are D_real where there is no robot; those for validation are held out from
    training, to measure the imitation loss on real demonstrations. A dataset that exists is kept as it is.
    `python data.py record --help` is about demonstrations on a real arm.
    """

    task: str = "push_cube"
    """a task of envs.py"""
    target: str = "standin"
    """the domain of envs.py that plays the robot"""
    num_twin: int = 500
    """demonstrations in the twin; more of them make stage I better, and leave less for RL to do"""
    num_real: int = 50
    """demonstrations in the target: the "real" ones"""
    num_val: int = 20
    """held-out demonstrations in the target, for validation"""
    out: Path = Path("demos")
    """folder of the datasets"""
    workers: int = len(os.sched_getaffinity(0))
    """simulator processes, about half a GB of memory each"""
    video: bool = False
    """store the frames as H.264 video, several times smaller and slightly lossy, instead of as PNG columns"""


def main(args: Args):
    import envs

    target = envs.target_domain(args.target)
    with simulators(args.workers) as pool:
        for name, domain, seeds, num in (("twin", envs.TWIN, "twin_demos", args.num_twin),
                                         (target.name, target, "real_demos", args.num_real),
                                         (f"{target.name}-val", target, "real_val", args.num_val)):
            out = args.out / f"{args.task}-{name}"
            lengths = collect(args.task, domain, num, out, envs.SEEDS[seeds], pool, args.video)
            print(f"{out}: {num} episodes, {np.median(lengths):.0f} steps in the median, {lengths.max()} at most")


# ------------------------------------------------------------------------------------------------- recording on a robot
@dataclass
class RecordArgs:
    """Record demonstrations with a real Franka into a LeRobot dataset, for `train_sft.py --real`.

    By keyboard: w s forward and back, a d left and right, r f up and down, q e turn; hold a key to keep moving. By
    hand: unlock the joints with the buttons on the arm and guide it. In either case space closes and opens the hand,
    Enter ends a demonstration and keeps it, x drops it. What was kept is on disk at once; the same command goes on.
    """

    rig: tyro.conf.OmitArgPrefixes["eval_real.Rig"] = field(default_factory=lambda: eval_real.Rig())
    """the arm, the camera, and limits that every motion keeps"""
    task: str = "push_cube"
    """a task of envs.py: its instruction, and the initial states to arrange"""
    held_out: bool = False
    """demonstrations for `--real-val`: their initial states are others than those for training"""
    out: Path | None = None
    """the dataset; it appears when all demonstrations are there (default: demos/TASK-real, or demos/TASK-real-val)"""
    episodes: int = 50
    """how many"""
    by: Literal["keyboard", "spacemouse", "hand"] = "keyboard"
    """what leads the arm; a SpaceMouse needs `pip install pyspacemouse`"""
    pace: float = 0.1
    """speed of the keyboard, and full speed of the SpaceMouse, m/s; turning is five times as much, in rad/s"""


STEER = {"w": (0, 1), "s": (0, -1), "a": (1, 1), "d": (1, -1), "r": (2, 1), "f": (2, -1), "q": (5, 1), "e": (5, -1)}


def motion_between(tcp, later):
    """The action's first six numbers that take one TCP pose [1,4,4] to another: what `envs.move_target` undoes."""
    import envs

    turn = envs.matrix_to_euler_angles(later[:, :3, :3] @ tcp[:, :3, :3].mT, "ZYX").flip(-1)
    return torch.cat([later[:, :3, 3] - tcp[:, :3, 3], turn], -1)[0]


def demonstrate_by_operator(robot, keyboard, args, gripper, mouse):
    """One demonstration at the control rate, or None if the operator drops it. It begins with the first motion."""
    import envs

    image, state, action, guided = [], [], [], args.by == "hand"
    if not guided:
        robot.start()
    while "\n" not in (keys := keyboard.pressed().replace("\r", "\n")):
        if "x" in keys:
            robot.stop()
            return None
        toggled = keys.count(" ") % 2
        gripper = (1.0 if gripper < -0.5 else -1.0) if toggled else gripper
        seen, here, due = robot.camera.read(args.rig.image_size), robot.tcp(), time.monotonic() + 1 / envs.CONTROL_HZ
        proprioception, move = robot.state()[0], torch.zeros(7)
        move[6] = gripper
        if guided:
            robot.move_fingers(gripper)
            robot.rest(due)
            move[:6] = motion_between(here, robot.tcp())
            moved = move[:3].norm() > 0.001 or move[3:6].norm() > 0.01
        else:
            for axis, sign in {STEER[key] for key in keys if key in STEER}:
                move[axis] = sign * args.pace / envs.CONTROL_HZ * (5 if axis > 2 else 1)
            if mouse:
                for _ in range(100):  # the reports since the last step; the last one counts
                    report = mouse.read()
                move[:3] = torch.tensor([report.x, report.y, report.z]) * args.pace / envs.CONTROL_HZ
                move[3:6] = torch.tensor([report.roll, report.pitch, report.yaw]) * args.pace / envs.CONTROL_HZ * 5
            robot.check(move[None])
            robot.step(move)
            moved = move[:6].any()
        if image or moved or toggled:
            image.append(seen), state.append(proprioception.numpy()), action.append(move.numpy())
    robot.stop()
    return dict(image=np.stack(image), state=np.stack(state), action=np.stack(action)) if image else None


def record(args: RecordArgs):
    import envs
    import eval_real

    envs.check_task(args.task)
    out = args.out or Path(f"demos/{args.task}-real{'-val' if args.held_out else ''}")
    parts, mouse = out.with_name(f"{out.name}.parts"), None
    if out.exists():
        raise FileExistsError(f"{out} exists already: delete it, or choose another folder")
    parts.mkdir(parents=True, exist_ok=True)
    kept = lambda: sorted(parts.glob("[0-9]*.npz"))
    if args.by == "spacemouse":
        try:
            import pyspacemouse
            mouse = pyspacemouse.open(axis_convention=pyspacemouse.AxisConvention.ROS)  # x forward, y left, z up
        except (ImportError, RuntimeError) as error:
            raise SystemExit(f"no SpaceMouse: {error} (pip install pyspacemouse)") from None
    if len(kept()) < args.episodes:
        env = envs.make(args.task, envs.TWIN, video_size=512)
        first_seed = envs.SEEDS["real_val" if args.held_out else "real_demos"]
        with contextlib.closing(eval_real.Camera(args.rig)) as camera, eval_real.Keyboard() as keyboard, \
                eval_real.Franka(args.rig, camera) as robot:
            while (n := len(kept())) < args.episodes:
                try:
                    eval_real.get_ready(robot, keyboard, env, seed := first_seed + n,
                                        f"demonstration {n + 1} of {args.episodes}", parts / "overlay.png")
                    print("Enter: done, keep it; x: drop it", flush=True)
                    episode = demonstrate_by_operator(robot, keyboard, args, env.start_gripper, mouse)
                except eval_real.Stopped as why:
                    print(f"dropped. {why}", flush=True)
                    continue
                if episode:
                    with open(temporary := parts / "unfinished", "wb") as file:
                        np.savez(file, prompt=env.instruction, seed=seed, **episode)
                    os.replace(temporary, parts / f"{n:04d}.npz")
                print(f"kept, {len(episode['action'])} steps" if episode else "dropped", flush=True)
    write_dataset(out, (np.load(path) for path in kept()), envs.CONTROL_HZ)
    print(f"{out}: {len(kept())} demonstrations")
    shutil.rmtree(parts)


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["record"]:
            import eval_real  # where RecordArgs looks for its Rig
            record(tyro.cli(RecordArgs, prog="data.py record", args=sys.argv[2:]))
        else:
            main(tyro.cli(Args))
    except (ValueError, OSError) as error:
        raise SystemExit(f"data.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("data.py: interrupted; the dataset under way was not written; what was recorded on a robot is "
                         "kept for the next call") from None
