"""Pages for people: one HTML file with tables, curves and a wall of videos, opened without a server or a network.

`write_page` fills page.html, in this folder, for evaluations (eval_real.py) and for datasets; `film` draws an episode
that was played from its recorded states, with the robot as it looks.
"""

import html
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import torch

from checkpoints import write_file

# envs.py is imported in the functions that draw: whoever looks at a dataset needs no simulator.


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


@cache  # a process that draws keeps its scenes: making one takes seconds
def _scenes(task, domain, variation, render):
    import envs

    kwargs = dict(variation=variation, render=render, video_size=360)
    return [envs.make(task, domain, film=film, **kwargs) for film in (False, True)]


def film(path: Path, task: str, domain, variation: str | None, seed: int, snapshots: list, chunk: int, render="auto"):
    """Draw a video of an episode that was played: `snapshots` of its control steps, from `envs.VecEnv.play`. Inset is
    what the policy saw when it last decided, which it did every `chunk` control steps."""
    import envs

    seen, shown = _scenes(task, domain, variation, render)
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
