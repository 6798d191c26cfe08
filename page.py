"""What people look at: pages, videos, pictures, and the curves of a run.

`write_page` fills page.html, in this folder, for evaluations (eval_real.py) and for datasets (`python data.py show`):
one file with tables, curves and a wall of videos, opened without a server or a network. `film` draws an episode that
was played from its recorded states, with the robot as it looks. `python envs.py show` draws the tasks.
"""

import html
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch
import tyro
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import data
import envs
from checkpoints import UserError, whole_file, write_file


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


LOSSES = {"eval/real_loss": "held-out real", "loss/total": "training", "loss/anchor": "anchor"}


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
        elif tag in LOSSES:
            loss[LOSSES[tag]] = [(step, value) for step, value in line if value]  # no anchor while the critic warms up
    x = "RL iteration" if "twin, exploring" in success else "gradient step"
    charts = []
    if success:
        charts.append(chart(f"{run}: success", x, success, (0, 1)))
    if loss:
        charts.append(chart(f"{run}: imitation loss", x, {name: loss.get(name, []) for name in LOSSES.values()}))
    return charts


def start_log(args, settings: dict, step: int) -> SummaryWriter:
    """Write the run's settings into OUT/args.json, tell W&B if asked -> TensorBoard, without what a process that was
    killed had logged from `step` on."""
    write_file(args.out / "args.json", settings)
    if args.wandb:
        import wandb

        wandb.init(project="rlco", name=args.out.name, config=settings, sync_tensorboard=True)
    return SummaryWriter(args.out / "tensorboard", purge_step=step)


def greedy(policy) -> Callable:
    """The policy without exploration, as `VecEnv.play` takes it."""

    def act(obs):
        return policy.act(obs, sample=False).actions.cpu()

    return act


def validate(
    policy, worlds: dict[str, envs.VecEnv], episodes: int, held_out: list[dict], video: Path
) -> dict[str, float]:
    """For curves and the choice of a checkpoint: success and length without exploration on the validation seeds in
    each of `worlds` (by name), the imitation loss on `held_out` (batches of real demonstrations), and a video of the
    first episode in all worlds, side by side, whose name says in the log when this was."""

    act = greedy(policy)
    seeds = range(envs.SEEDS["validation"], envs.SEEDS["validation"] + episodes)
    log = {}
    columns = []
    for name, world in worlds.items():
        played = world.play(act, seeds, f"  validation, {name}")
        log[f"eval/success_{name}"] = float(played["success"].mean())
        log[f"eval/length_{name}"] = float(played["length"].mean())
        columns.append(world.play(act, seeds[:1], video=True)["frames"][0])
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)  # the same flow times and noise every time
        log["eval/real_loss"] = float(np.mean([policy.sft_loss(batch).item() for batch in held_out]))
    write_video(video, columns)
    success = ", ".join(f"{name} {log[f'eval/success_{name}']:.0%}" for name in worlds)
    tqdm.write(f"{video.stem.replace('_', ' ')}: success {success}; held-out real loss {log['eval/real_loss']:.3f}")
    return log


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


def write_video(path: Path, columns: list[list[np.ndarray]], fps: int = envs.CONTROL_HZ) -> None:
    """H.264 video of lists of frames [H,W,3], even in height and width, side by side; the shorter ones hold their last
    frame."""
    height, width, _ = np.concatenate([frames[0] for frames in columns], 1).shape
    with whole_file(path) as temporary, av.open(str(temporary), "w", format="mp4") as video:
        stream = video.add_stream("libx264", rate=fps, options={"crf": "20"})
        stream.height = height
        stream.width = width
        stream.pix_fmt = "yuv420p"
        for t in range(max(map(len, columns)) + fps):  # one second on the end
            frame = np.concatenate([frames[min(t, len(frames) - 1)] for frames in columns], 1)
            video.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        video.mux(stream.encode())


def curve(metrics: list[dict], key: str, scale: float = 1.0) -> list[tuple]:
    """[(iteration, value)] of what was logged under `key`."""
    return [(m["iteration"], scale * m[key]) for m in metrics if key in m]


def plot_run(metrics: list[dict], target: str, path: Path):
    """Learning curve of a run: success in the rollouts, and on the validation seeds of the twin and the target."""
    import matplotlib

    matplotlib.use("Agg")  # draws into a file: no screen needed
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    keys = {"twin, exploring": "rollout/success", "twin": "eval/success_twin", target: f"eval/success_{target}"}
    for label, key in keys.items():
        axis.plot(*zip(*curve(metrics, key, 100)), marker="o", markersize=3, label=label)
    axis.set(xlabel="RL iteration", ylabel="success (%)", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


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
    write_video(path, [frames])


# ---- tasks ------------------------------------------------------------------------------------------------------


@dataclass
class DrawArgs:
    """Draw the tasks, a row each: starts and later moments in the twin and the stand-in, each large and as the policy
    sees it. To look at after a change to a task or a domain."""

    out: Path = Path("runs/domains.png")
    """Picture to write."""
    seeds: int = 2
    """Episodes of each task and domain; each one is shown 16 control steps later than the one before."""
    variation: Literal[envs.VARIATIONS] | None = None
    """Draw what generalisation is tested on: unseen objects, positions, or starting poses of the robot."""
    random: int = 0
    """Draw so many random domains instead of the twin and the stand-in."""
    debug: bool = False
    """Show the traceback of an error in the input, too."""


def draw_tasks(args: DrawArgs) -> None:
    """Write the picture that DrawArgs describes."""
    first = envs.SEEDS["domains"]
    domains = [envs.random_domain(first + i) for i in range(args.random)] or [envs.TWIN, envs.STANDIN]
    rows = []
    for task in envs.TASKS:
        row = []
        for domain in domains:
            env = envs.make(task, domain, variation=args.variation)
            for seed in range(args.seeds):
                env.reset(seed=[envs.SEEDS["validation"] + seed])
                actions = env.demonstrator(np.random.default_rng(seed))
                for _ in range(16 * seed):
                    env.step_chunk(next(actions)[None, None])
                small = Image.fromarray(env.observe()["image"][0].cpu().numpy())
                row.append(env.render_rgb_array()[0].cpu().numpy())
                row.append(np.asarray(small.resize((256, 256), Image.NEAREST)))
        rows.append(np.concatenate(row, 1))
    with whole_file(args.out) as temporary:
        Image.fromarray(np.concatenate(rows)).save(temporary)
    names = " and ".join(domain.name for domain in domains)
    print(f"{args.out}: {', '.join(envs.TASKS)} in {names}, each picture beside what the policy sees of it")


@dataclass
class MeasureArgs:
    """Measure the scripted demonstrators in every domain: how often they succeed, and in how many control steps. A
    task's limit must let 95 % of them finish, or imitating them teaches what counts as failure."""

    episodes: int = 200
    """Episodes of each task and domain, on seeds of their own."""
    workers: int = len(os.sched_getaffinity(0))
    """Processes, each with one thread; as many as there are cores by default."""
    debug: bool = False
    """Show the traceback of an error in the input, too."""


def measure_demonstrators(args: MeasureArgs) -> None:
    """Print what MeasureArgs describes, a line for each task and domain."""
    first = envs.SEEDS["validation"] + 500_000
    seeds = range(first, first + args.episodes)
    blocks = [seeds[start : start + 8] for start in range(0, args.episodes, 8)]
    with data.worker_pool(args.workers) as pool:
        for task in envs.TASKS:
            limit = envs.TASKS[task].max_episode_steps
            for domain in envs.DOMAINS.values():
                played = data.in_order(pool, envs.demonstrations, [(task, domain, block) for block in blocks])
                results = [(episode["success"], len(episode["action"])) for block in played for episode in block]
                success, length = np.array(results).T
                length = np.where(success, length, limit)
                print(
                    f"{task}, {domain.name}: {success.sum()} of {args.episodes} succeed; control steps: median "
                    f"{np.median(length):.0f}, 95 % {np.quantile(length, 0.95):.0f}, limit {limit}",
                    flush=True,
                )


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
        write_video(out / f"videos/{e}.mp4", [frames], fps)
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
