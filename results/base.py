"""The pretrained tiny policies in bases/, made anew: stage I with alpha 1 on demonstrations in random domains.

    python -m results.base                           # both, hours on two cores; goes on where it was stopped
    python train_sft.py --policy tiny-pi05-base      # what they are for

Each folder of bases/ has the checkpoint in bfloat16 (it trains in float32), the run's settings and its losses.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from checkpoints import BASES, UserError, one_line_errors, write_file
from policy import PRESETS, load_policy


@dataclass
class Args:
    """Collect demonstrations in random domains, pretrain on them, and put the policies into bases/."""

    policies: tuple[str, ...] = ("tiny-pi05", "tiny-openvla")
    """Presets to pretrain, one after the other."""
    steps: int = 8000
    """Gradient steps. More make the base better, and leave less to learn."""
    domains: int = 1000
    """Random domains; each gives two demonstrations of every task."""
    demos: Path = Path("demos")
    """Folder of the demonstrations, collected where they are missing."""
    out: Path = Path("runs/base")
    """Folder of the runs, which go on when they were killed."""
    debug: bool = False
    """Show the traceback of an error in the input, too."""


def losses(run: Path) -> dict[str, list]:
    """(step, value) pairs of a run's imitation losses and of its validation, from TensorBoard's files."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance=dict(scalars=0)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag == "loss/total" or tag.startswith("eval/")]
    return {tag: [(event.step, round(event.value, 4)) for event in events.Scalars(tag)] for tag in tags}


def main(args: Args) -> None:
    unknown = set(args.policies) - set(PRESETS)
    if unknown:
        raise UserError(f"--policies {' '.join(sorted(unknown))}: presets are {', '.join(PRESETS)}")
    root = Path(__file__).parent.parent

    def run(script, *options):
        subprocess.run([sys.executable, str(root / script), *map(str, options)], check=True)

    run("data.py", "collect", "--domains", args.domains, "--out", args.demos)
    for preset in args.policies:
        out = args.out / preset
        data = ("--sim", args.demos / "domains", "--real-val", args.demos / "domains-val", "--alpha", 1)
        check = ("--evaluations", 1, "--eval-episodes", 256, "--save-every", 250)
        run("train_sft.py", "--policy", preset, *data, "--steps", args.steps, *check, "--out", out)
        base = BASES / f"{preset}-base"
        made = base.with_name(f".{base.name}")
        shutil.rmtree(made, ignore_errors=True)
        policy = load_policy(out / "last")
        policy.save(made, weights={name: weight.bfloat16() for name, weight in policy.state_dict().items()})
        settings = json.loads((out / "args.json").read_text())
        write_file(made / "args.json", settings)
        write_file(made / "losses.json", losses(out))
        shutil.rmtree(base, ignore_errors=True)
        os.replace(made, base)
        print(f"{base}: from {out}")


if __name__ == "__main__":
    args = tyro.cli(Args)
    one_line_errors(args.debug)
    main(args)
