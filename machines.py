"""Where a run computes: --device and --render, the processes that torchrun started, and the optimizer that they share.

    torchrun --nproc-per-node 8 train_rlco.py --accumulate 8    # 8 GPUs; the same numbers as on one

Of N processes, process r has the worlds r, r + N, ... and the micro-batches r, r + N, ... of each gradient step.
Without torchrun there is one process, and nothing here communicates.
"""

import ctypes
import os

# Torch's threads wait for each other after every operation. By default they spin for a millisecond: beside a program
# that keeps a core busy that costs two thirds of the speed, and of environments that start. libgomp reads this as torch
# is imported, so programs import this module first; what the user has set stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
import signal
import subprocess
import sys
import zlib
from datetime import timedelta
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoints import UserError

RENDEZVOUS = 120  # s, for process 0 of torchrun to answer the others


def find_device(name: str) -> torch.device:
    """What --device means: "auto" is the GPU if torch finds one, else the CPU; or "cpu", "cuda", "cuda:1". A process of
    torchrun gets its own GPU. UserError if it is not there."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if found else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: auto, cpu, cuda, or a certain GPU such as cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: only cpu and cuda were ever tried")
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and (device.index or 0) >= found:
        raise UserError(f"--device {device}: torch {torch.__version__} finds {found or 'no'} GPUs; see nvidia-smi")
    return device


# A real picture: a device that is listed may still fail to render, or end the process that tries. (The Makefile has the
# same, to try it before this file can be imported.)
TRY_A_PICTURE = """
import sapien
sapien.render.set_camera_shader_dir("trivial")
scene = sapien.Scene([sapien.physx.PhysxCpuSystem(), sapien.render.RenderSystem(sapien.Device("{device}"))])
camera = scene.add_camera("", 8, 8, 1, 0.01, 1)
scene.update_render()
camera.take_picture()
camera.get_picture("Color")
"""


@lru_cache
def find_renderer(render: str) -> str:
    """What --render means, as ManiSkill calls it: "cpu", "gpu", or with "auto" the GPU if it renders a picture. Of
    several GPUs it is the process's own (torchrun's LOCAL_RANK). UserError if "gpu" does not render."""
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if render not in ("auto", "gpu"):
        return render
    if render == "auto" and not torch.cuda.is_available():
        return "cpu"
    tried = subprocess.run([sys.executable, "-c", TRY_A_PICTURE.format(device=gpu)], capture_output=True, text=True)
    if tried.returncode == 0:
        return gpu
    why = (tried.stderr.strip().splitlines() or [f"the process ended with {tried.returncode}"])[-1]
    advice = "containers lack NVIDIA's Vulkan files unless NVIDIA_DRIVER_CAPABILITIES has graphics"
    if render == "gpu":
        raise UserError(f"--render gpu: {gpu} renders no picture ({why}); {advice}")
    tqdm.write(f"pictures are rendered on the CPU: {gpu} renders none ({why}); {advice}", file=sys.stderr)
    return "cpu"


def say_if_slow(seconds: float, ways: str) -> None:
    """Where a run has so many seconds to go that nobody waits for it (an hour), print that and what helps: what this
    machine leaves unused, and `ways`, the script's own."""
    if seconds < 3600:
        return
    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    load = os.getloadavg()[0]
    advice = []
    if load > 2 * cores + 1:  # a run alone keeps about two threads a core waiting
        advice.append(f"{load:.0f} programs want this machine's {cores} cores: end the others")
    if threads < cores:
        advice.append(f"torch computes on {threads} of {cores} cores: set OMP_NUM_THREADS={cores}")
    advice.append(ways)
    tqdm.write(f"about {seconds / 3600:.1f} hours to go. What helps: {'; '.join(advice)}")


def start(name: str, accumulate: int | None = None) -> torch.device:
    """Join the processes that torchrun started, if it did -> the device. Only process 0 prints from now on. UserError
    if the micro-batches of a gradient step cannot be shared out evenly."""
    device = find_device(name)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # torchrun that is killed would leave this process behind: the kernel kills it, too (prctl PR_SET_PDEATHSIG).
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Who was left behind before that does not look for the others for ever.
        try:
            store, number, count = next(dist.rendezvous("env://", timeout=timedelta(seconds=RENDEZVOUS)))
        except dist.DistError as error:
            raise UserError(f"torchrun is gone, or its process 0 is not reached: {error}") from None
        # Process 0 evaluates and saves alone, which takes long: the others wait.
        patience = timedelta(hours=12)
        store.set_timeout(patience)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=patience)
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")
    if accumulate is not None and accumulate % size():
        raise UserError(
            f"--accumulate {accumulate} counts the micro-batches over all {size()} processes: give a multiple of that"
        )
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def wait() -> None:
    """Until all processes are here."""
    if size() > 1:
        dist.barrier()


def own(things: int) -> range:
    """Which of `things` worlds or micro-batches are this process's."""
    return range(rank(), things, size())


def gather(x: torch.Tensor) -> torch.Tensor:
    """[...,b] of every process -> [...,b N]: column j of process r becomes column j N + r, as `own` counts."""
    if size() == 1:
        return x
    raw = x.contiguous().view(torch.uint8)  # neither gloo nor NCCL knows all of torch's types
    parts = [torch.empty_like(raw) for _ in range(size())]
    dist.all_gather(parts, raw)
    return torch.stack([part.view(x.dtype) for part in parts], -1).flatten(-2)


def gather_objects(thing) -> list:
    """What each process has, at all of them."""
    things = [thing] * size()
    if size() > 1:
        dist.all_gather_object(things, thing)
    return things


def seed(purpose: str, *key: int) -> None:
    """Seed torch's random numbers by what they are for: they do not depend on what was drawn before, nor by whom."""
    # With the purpose in it, as numpy pads a key with zeros: (5,) and (5, 0) would draw the same.
    key = (zlib.crc32(purpose.encode()), *key)
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def share_out(sizes: list[int]) -> list[int]:
    """The process of each tensor: the largest goes first to whoever has least."""
    load = [0] * size()
    owners = [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = load.index(min(load))
        load[owners[i]] += sizes[i]
    return owners


class AdamW(torch.optim.AdamW):
    """torch's, over float32 copies of what is in bfloat16 (added to bfloat16 itself, small steps are rounded away), and
    shared by the processes: each updates some of the weights, whose copies and moments it alone has, and sends them to
    the others (ZeRO, arXiv 1910.02054, stage 1). A process needs 2 + 4 + 12 / N bytes a weight in bfloat16.

    (torch's ZeroRedundancyOptimizer shares out the moments alone: 2 + 8 + 8 / N, with which OpenVLA in full, 83 GB on
    each of 8 GPUs, does not fit.) All processes call `clip`, `step` and `state_dict`, in the same order.
    """

    def __init__(self, groups: list[dict], **settings):
        self.weights = [weight for group in groups for weight in group["params"]]
        self.owner = dict(zip(self.weights, share_out([weight.numel() for weight in self.weights])))
        self.copies: dict[torch.Tensor, torch.Tensor] = {}  # float32, of own weights in bfloat16
        self.sums: dict[torch.Tensor, torch.Tensor] = {}  # float32 gradients of weights in bfloat16
        own_groups = []
        for group in groups:
            params = [self.float32(weight) for weight in group["params"] if self.owner[weight] == rank()]
            own_groups.append({**group, "params": params})
        for weight in self.weights:
            if weight.dtype != torch.float32:
                weight.register_post_accumulate_grad_hook(self.collect)
        super().__init__(own_groups, fused=self.weights[0].is_cuda, **settings)

    def float32(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight itself, or its copy."""
        if weight.dtype != torch.float32 and weight not in self.copies:
            self.copies[weight] = weight.detach().float()
        return self.copies.get(weight, weight)

    def collect(self, weight: torch.Tensor) -> None:
        """Add up the gradients of several backward passes in float32."""
        grad = weight.grad.float()
        self.sums[weight] = self.sums[weight] + grad if weight in self.sums else grad
        weight.grad = None

    def zero_grad(self) -> None:
        self.sums.clear()
        for weight in self.weights:
            weight.grad = None

    @torch.no_grad()
    def clip(self, max_norm: float) -> float:
        """Add up the processes' gradients, and scale those that are longer than `max_norm`, all weights together -> how
        long they were."""
        gradients = {weight: self.sums.get(weight, weight.grad) for weight in self.weights}
        norms = torch.zeros(len(self.weights), device=self.weights[0].device)
        for i, (weight, gradient) in enumerate(gradients.items()):
            if gradient is None:
                continue
            if size() > 1:
                dist.reduce(gradient, self.owner[weight])
            if self.owner[weight] == rank():
                norms[i] = gradient.norm()
        if size() > 1:
            dist.all_reduce(norms)
        norm = norms.norm()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1)
        for weight, gradient in gradients.items():
            if gradient is not None and self.owner[weight] == rank():
                gradient.mul_(scale)
        return norm.item()

    @torch.no_grad()
    def step(self) -> None:
        for weight, copy in self.copies.items():
            copy.grad = self.sums.get(weight)
        super().step()
        for weight, copy in self.copies.items():
            weight.copy_(copy)
            copy.grad = None
        self.sums.clear()
        if size() > 1:
            for weight, owner in self.owner.items():
                dist.broadcast(weight.data.view(-1).view(torch.uint8), owner)

    def state_dict(self) -> dict:
        """The same for any number of processes, which all call this: process 0 gets it."""
        states = []
        for weight, owner in self.owner.items():
            state = {}
            if owner == rank():
                state = {key: value.cpu() for key, value in self.state[self.float32(weight)].items()}
                state |= {"copy": self.copies[weight].cpu()} if weight in self.copies else {}
            states.append(to_first(state, owner))
        return dict(states=states, lr=[group["lr"] for group in self.param_groups])

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Take one's own share of a `state_dict`."""
        for group, lr in zip(self.param_groups, state["lr"]):
            group["lr"] = lr
        for (weight, owner), saved in zip(self.owner.items(), state["states"]):
            if owner != rank():
                continue
            if "copy" in saved:
                self.copies[weight].copy_(saved["copy"])
            # As in torch, the number of steps is on the GPU only if the fused kernel reads it there.
            self.state[self.float32(weight)] = {
                key: value.to(weight.device if key != "step" or self.defaults["fused"] else "cpu", copy=True)
                for key, value in saved.items()
                if key != "copy"
            }


def to_first(thing: dict, owner: int) -> dict:
    """What process `owner` has, at process 0 (the others get nothing of use)."""
    if owner == 0 or rank() not in (0, owner):
        return thing
    box = [thing]
    if rank() == owner:
        dist.send_object_list(box, dst=0)
    else:
        dist.recv_object_list(box, src=owner)
    return box[0]
