"""Where a run computes: the device of --device."""

import torch

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
