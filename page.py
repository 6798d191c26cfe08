"""Pages for people: one HTML file with tables, curves and a wall of videos, opened without a server or a network.

`write_page` fills page.html, in this folder, for evaluations (eval_real.py) and for datasets (`python data.py show`);
`film` draws an episode that was played from its recorded states, with the robot as it looks.
"""

import html
import io
import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import av
import numpy as np
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import data
import envs
from checkpoints import UserError, write_file


def write_page(path: Path, title: str, head: str, charts: list[dict], starts: list[dict], fps: float = 10) -> None:
    """Write a page.

    `head` is HTML; `charts` are what `chart` gives. A start is {"title", "rows"}, a row of it {"group" to filter by,
    "differ" bool, "cells"}, a cell {"name", "text", "success" bool or None, "video" relative to the page or None,
    "charts" that are shown beside the large video}. `fps` of the videos puts a mark into those.
    """
    content = json.dumps(dict(charts=charts, starts=starts, fps=fps), separators=(",", ":"))
    # "</script>" in a name would end the element that holds the data.
    parts = dict(title=html.escape(title), head=head, data=content.replace("<", "\\u003c"))
    page = Path(__file__).with_name("page.html").read_text()
    # In one pass, so that what looks like a place in a name is left alone.
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], page)
    write_file(path, page.encode())


def chart(title: str, x: str, lines: dict[str, list], extent: tuple[float, float] | None = None) -> dict:
    """A chart of lines by name: values, or (x, y) pairs. `extent` of y, else what the lines have."""
    lines = {name: np.asarray(line, float).round(4).tolist() for name, line in lines.items() if len(line)}
    return dict(title=title, x=x, lines=lines, range=extent)


def html_table(markdown: str) -> str:
    """A table of Markdown as HTML."""
    head, _, *rows = [line.strip("| ").split(" | ") for line in html.escape(markdown).splitlines()]
    lines = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def learning_curves(run: Path) -> list[dict]:
    """Charts of success and of losses from a run's TensorBoard files; none if it has none."""
    if not (run / "tensorboard").is_dir():
        return []
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance=dict(scalars=0)).Reload()
    success = {}
    loss = {}
    for tag in events.Tags()["scalars"]:
        kind, _, name = tag.partition("/")
        line = [(event.step, event.value) for event in events.Scalars(tag)]
        if tag == "rollout/success":
            success["twin, exploring"] = line
        elif kind == "eval" and name.startswith("success_"):
            success[name.removeprefix("success_")] = line
        elif tag in ("loss/total", "loss/anchor", "eval/real_loss"):
            loss[dict(total="training", anchor="anchor", real_loss="held-out real")[name]] = line
    x = "RL iteration" if "twin, exploring" in success else "gradient step"
    charts = []
    if success:
        charts.append(chart(f"{run}: success", x, success, (0, 1)))
    if loss:
        charts.append(chart(f"{run}: imitation loss", x, loss))
    return charts


def start_log(args, settings: dict, step: int) -> SummaryWriter:
    """Write the run's settings into OUT/args.json, tell W&B if asked -> TensorBoard, without what a process that was
    killed had logged from `step` on."""
    write_file(args.out / "args.json", settings)
    if args.wandb:
        import wandb

        wandb.init(project="rlco", name=args.out.name, config=settings, sync_tensorboard=True)
    return SummaryWriter(args.out / "tensorboard", purge_step=step)


def log_video(writer, path: Path, step: int) -> None:
    """Put a video into TensorBoard, as a moving picture (and so into W&B, which reads along). torch's `add_video` would
    need moviepy."""
    if not path.exists():  # whoever evaluates in another way may film nothing
        return
    from tensorboard.compat.proto.summary_pb2 import Summary

    with av.open(str(path)) as video:
        frames = [frame.to_image() for frame in video.decode(video=0)]
        milliseconds = round(1000 / video.streams.video[0].average_rate)
    gif = io.BytesIO()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    width, height = frames[0].size
    picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif.getvalue())
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag="validation", image=picture)]), step)


@cache  # a process that draws keeps its scenes: making one takes seconds
def _scenes(task, domain, variation, render, image_size):
    kwargs = dict(variation=variation, render=render, image_size=image_size, video_size=360)
    return [envs.make(task, domain, film=film, **kwargs) for film in (False, True)]


def film(
    path: Path,
    task: str,
    domain: envs.Domain,
    variation: str | None,
    seed: int,
    snapshots: list,
    chunk: int,
    render: str = "auto",
    image_size: int = envs.IMAGE_SIZE,
):
    """Draw a video of an episode that was played: `snapshots` of its control steps, from `envs.VecEnv.play`. Inset is
    what the policy saw when it last decided, which it did every `chunk` control steps, `image_size` pixels wide."""
    seen, shown = _scenes(task, domain, variation, render, image_size)
    observation = seen.observe(seen.reset(seed=[seed])[0])
    shown.reset(seed=[seed])
    frames = []
    for t in range(len(snapshots) + 1):
        if t > 0:
            now = torch.from_numpy(snapshots[t - 1])[None]
            shown.show(now)
            if t % chunk == 0:
                seen.show(now)
                observation = seen.observe()
        frame = shown.render_rgb_array()[0].cpu().numpy()
        frame[8:140, 8:140] = 255  # a frame around the inset
        inset = torch.nn.functional.interpolate(observation["image"].permute(0, 3, 1, 2), (128, 128))[0]
        frame[10:138, 10:138] = inset.permute(1, 2, 0).cpu().numpy()
        frames.append(frame)
    envs.write_video(path, [frames])


# ---- datasets ---------------------------------------------------------------------------------------------------


@dataclass
class ShowArgs:
    """Write a page to look at a dataset before training on it: its episodes as videos with the curves of state and
    action, prompts, ranges, dimensions that never move. Any dataset that training reads: own, lerobot's, the Hub's."""

    dataset: tyro.conf.Positional[str]
    """The dataset: a folder, or a name on the Hub."""
    episodes: int = 50
    """Episodes that are shown, evenly spread over the dataset. Ranges and prompts are those of all."""
    camera: str | None = None
    """The camera to show where there are several: its key, or the end of it."""
    out: Path | None = None
    """Folder of the page, index.html (default: runs/show/ and the dataset's name)."""
    debug: bool = False
    """Show the traceback of an error in the input, too."""


def show(args: ShowArgs) -> None:
    """Write OUT/index.html and its videos."""
    if args.episodes < 1:
        raise UserError("--episodes is at least 1")
    dataset = data.load_dataset(args.dataset, max_bytes=0, camera=args.camera)
    out = args.out or Path("runs/show", Path(args.dataset).name)
    found = len(dataset.bounds) - 1
    fps = round(dataset.fps)
    height, width, _ = dataset.image_shape
    ranges = {}
    for kind, rows in (("state", dataset.state), ("action", dataset.action)):
        ranges[kind] = (rows.min(0), np.maximum(np.ptp(rows, axis=0), 1e-9))
    starts = []
    for e in tqdm(np.linspace(0, found - 1, min(found, args.episodes)).astype(int), "videos", unit="episode"):
        rows = np.arange(dataset.bounds[e], dataset.bounds[e + 1])
        frames = dataset.frames[rows][:, : height // 2 * 2, : width // 2 * 2]  # H.264 wants even numbers
        envs.write_video(out / f"videos/{e}.mp4", [frames], fps)
        charts = []
        for kind, values in (("state", dataset.state[rows]), ("action", dataset.action[rows])):
            low, extent = ranges[kind]
            lines = dict(zip(data.DIMS, ((values - low) / extent).T))
            charts.append(chart(f"{kind}, each over its range in the dataset", "control step", lines, (0, 1)))
        prompt = dataset.prompt[rows[0]]
        cell = dict(name=f"{len(rows)} steps", text=f"{len(rows) / dataset.fps:.1f} s", success=None)
        cell |= dict(video=f"videos/{e}.mp4", charts=charts)
        starts.append(dict(title=f"episode {e}", rows=[dict(group=prompt, differ=False, cells=[cell])]))
    write_page(out / "index.html", f"{args.dataset}: {found} episodes", describe(dataset), [], starts, fps)
    print(f"{data.still_dims(dataset) or 'every dimension moves'}\nthe page to look at: {out}/index.html")


def describe(dataset: data.Demonstrations) -> str:
    """HTML: size, prompts, what never moves, the range of every dimension."""
    lengths = np.diff(dataset.bounds)
    height, width, _ = dataset.image_shape
    size = (
        f"{len(lengths)} episodes of {lengths.min()} to {lengths.max()} steps, {np.median(lengths):.0f} in the median"
    )
    size += f"; {len(dataset)} frames at {dataset.fps:g} Hz, {len(dataset) / dataset.fps / 60:.1f} minutes"
    lines = [f"{size}; pictures of {height} x {width} pixels", data.still_dims(dataset) or "every dimension moves"]
    counts = Counter(dataset.prompt[dataset.bounds[:-1]])
    lines += [f"{count} episodes: “{prompt}”" for prompt, count in counts.most_common()]
    cells = {}
    for kind, rows in (("state", dataset.state), ("action", dataset.action)):
        for name, column in zip(data.DIMS, rows.T):
            still = " (never moves)" if np.ptp(column) <= data.STILL else ""
            spread = f"{column.min():.4g} … {column.max():.4g}, mean {column.mean():.4g}, std {column.std():.3g}"
            cells[name, kind] = spread + still
    head = "| dimension | state: range | action: range |\n| --- | --- | --- |\n"
    table = head + "\n".join(f"| {name} | {cells[name, 'state']} | {cells[name, 'action']} |" for name in data.DIMS)
    units = (
        '<p class="soft">x y z in m, roll pitch yaw in rad, gripper -1 (closed) to 1 (open); actions are changes.</p>'
    )
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines) + html_table(table) + units
