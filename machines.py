"""Where a run computes, the device of --device; and what to do where it is slow."""

import os

import torch
from tqdm import tqdm

from checkpoints import UserError


def find_device(name: str) -> torch.device:
    """What --device means: "auto" is the GPU if torch finds one, else the CPU; or "cpu", "cuda", "cuda:1". UserError if
    it is not there."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if found else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: auto, cpu, cuda, or a certain GPU such as cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: only cpu and cuda were ever tried")
    if device.type == "cuda" and (device.index or 0) >= found:
        raise UserError(f"--device {name}: torch {torch.__version__} finds {found or 'no'} GPUs; see nvidia-smi")
    return device


def say_if_slow(seconds: float, ways: str) -> None:
    """Where a run has so many seconds to go that nobody waits for it (an hour), print that and what helps: what this
    machine leaves unused, and `ways`, the script's own."""
    if seconds < 3600:
        return
    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    load = os.getloadavg()[0]
    help = []
    if load > 2 * cores + 1:  # a run alone keeps about two threads a core waiting
        help.append(f"{load:.0f} programs want this machine's {cores} cores: end the others")
    if threads < cores:
        help.append(f"torch computes on {threads} of {cores} cores: set OMP_NUM_THREADS={cores}")
    help.append(ways)
    tqdm.write(f"about {seconds / 3600:.1f} hours to go. What helps: {'; '.join(help)}")
