"""Files: written whole or not at all, errors that are the user's to mend, the state of a run, and checkpoint folders.

This is the lowest room: it knows files and the names in them, no model. A checkpoint folder is settings (`read_config`,
in the form of policy.PRESETS), statistics (`read_stats`), tensors under our names (`read_tensors`) and a tokenizer, in
our own layout or in openpi's, lerobot's, OpenVLA's or RLinf's; `write_checkpoint` is the way back.
"""

import dataclasses
import errno
import fcntl
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

# ---- errors -----------------------------------------------------------------------------------------------------


class UserError(Exception):
    """What is the user's to mend: one line that says what is wrong and what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))  # libraries, whose errors are quoted, write several lines


def one_line_errors(debug: bool = False) -> None:
    """Let this process end with one line at a UserError, a full disk, Ctrl-C, SIGTERM, or when its terminal closes. For
    scripts: any other error, and with `debug` also these, shows its traceback. Python exits with 1 after an uncaught
    error."""

    def report(kind, error, traceback):
        if issubclass(kind, KeyboardInterrupt):
            print("interrupted; the same command goes on", file=sys.stderr)
            return
        lost = lost_loader(error)
        users = issubclass(kind, UserError) or disk_is_full(error) or lost
        if debug or not users:
            sys.__excepthook__(kind, error, traceback)
        if users:
            # of a DataLoader's worker it comes after its traceback
            line = lost or str(error).rpartition("checkpoints.UserError: ")[2]
            print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        if lost:
            for worker in multiprocessing.active_children():  # Python would wait for one that hangs
                worker.kill()
                worker.join()

    def stop(number, frame):
        raise KeyboardInterrupt  # so that what is being written is cleaned up, and workers end

    sys.excepthook = report
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP, and that stays so
            signal.signal(number, stop)


HANGS = 1800  # s without an answer after which a worker counts as hung: the slowest machine needs minutes


def lost_loader(error: BaseException | None) -> str:
    """What to say of a DataLoader whose worker was killed or hangs, "" if that is not what happened. torch raises it
    wherever the program is, so nobody can catch it."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not text.startswith("DataLoader "):
        return ""
    if "timed out" in text:
        return f"a process that loads batches hangs ({text}): does the disk answer? If so, the same command goes on"
    return f"{text.split('. ')[0]}, as happens where memory runs out: take fewer --workers; the same command goes on"


def disk_is_full(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@cache  # so that each line is said once
def note(text: str) -> None:
    """Say in one line what is no error, but is better known."""
    print(text, file=sys.stderr)


# ---- files ------------------------------------------------------------------------------------------------------


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A file that is written whole or not at all: gives a temporary path beside `path` with its suffix, which takes
    `path`'s place when the block succeeds and is deleted when it fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hidden, so that nothing here reads what a killed process left; the process's number, as two may write one file.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except Exception as error:
        # Libraries say it in their own ways: the room that is left tells.
        if disk_is_full(error) or shutil.disk_usage(path.parent).free < 2**16:
            raise UserError(
                f"{path} cannot be written: the disk is full. Make room; the same command goes on"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


CLAIMS = []  # open lock files: a lock ends with the process, however that ends


def claim(folder: str | Path) -> None:
    """Make `folder` and keep it for this process until it ends: UserError, which names the other process, if one that
    runs has it. Files that a killed process was writing in it are deleted."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "a+")
    CLAIMS.append(lock)
    try:
        # Unlike flock, this kind is not passed on to forked workers, which may outlive the process by seconds.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        raise UserError(
            f"{folder} is in use by {lock.read() or 'another process'}: wait for it, stop it, or choose another folder"
        ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()} ({' '.join(sys.argv)})")
    lock.flush()
    for file in folder.rglob(".*.partial*"):
        process = re.fullmatch(r"\..+\.(\d+)\.partial(\.\w+)?", file.name)  # of `whole_file`
        if process and not Path("/proc", process[1]).exists():
            file.unlink(missing_ok=True)


def write_file(path: str | Path, content) -> None:
    """Write tensors by name (.safetensors), what torch saves (.pt), bytes, or else JSON."""
    path = Path(path)
    with whole_file(path) as temporary:
        if path.suffix == ".safetensors":
            save_file({k: v.contiguous() for k, v in content.items()}, temporary, {"format": "pt"})
        elif path.suffix == ".pt":
            torch.save(content, temporary)
        elif isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            temporary.write_text(json.dumps(content, indent=1))


def read_file(path: str | Path) -> Any:
    """Tensors by name (.safetensors), what torch saved (.pt, onto the CPU), a tokenizer (tokenizer.json) or a JSON
    object (.json). UserError, which names the file, if it is missing or damaged."""
    path = Path(path)
    try:
        if path.name == "tokenizer.json":
            return Tokenizer.from_file(str(path))
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            if not isinstance(content, dict):
                raise ValueError("no JSON object")
            return content
        if path.suffix == ".pt":
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip():  # torch believes what it finds
                        raise ValueError("its checksums are wrong")
            return torch.load(path, "cpu", mmap=True, weights_only=True)
        return load_file(path)
    except Exception as error:  # the libraries raise nothing narrower
        raise UserError(f"{path} is unreadable ({error}): copy or save it again") from error


# ---- the state of a run -----------------------------------------------------------------------------------------


def run_settings(args) -> dict:
    """The dataclass of a script's arguments as JSON holds it: a path becomes text."""
    return json.loads(json.dumps(dataclasses.asdict(args), default=str))


def require_counts(args, names: str) -> None:
    """UserError unless the options, whose names are separated by spaces, are at least 1."""
    too_small = [name for name in names.split() if getattr(args, name) < 1]
    if too_small:
        raise UserError(f"{', '.join(too_small)}: at least 1")


def provenance(args, device: str) -> dict:
    """What it takes to repeat what a script makes with these arguments: settings, commit, machine, versions."""

    def git(*command):
        return subprocess.run(["git", "-C", Path(__file__).parent, *command], capture_output=True, text=True)

    try:
        commit = git("rev-parse", "--short", "HEAD").stdout.strip()
        if git("diff", "--quiet", "HEAD", "--", "*.py").returncode == 1:
            commit += "-dirty"
    except OSError:  # no git
        commit = ""
    machine = dict(device=device, cores=len(os.sched_getaffinity(0)), threads=torch.get_num_threads())
    packages = {}
    for name in ("torch", "transformers", "mani_skill", "sapien", "numpy"):
        with suppress(PackageNotFoundError):  # a policy runs where no simulator is installed
            packages[name] = version(name)
    return dict(args=run_settings(args), commit=commit, python=platform.python_version(), **machine, **packages)


def note_origin(args, start: int, device, weights: str, datasets: list) -> None:
    """Write OUT/made_by_from_START.json, one for each time that a run is started or resumed: `provenance`, the hash of
    the weights that it began with, and those of its datasets (data.Demonstrations)."""
    made_by = provenance(args, str(device)) | dict(weights=weights)
    made_by |= {str(dataset.path): dataset.sha256() for dataset in datasets}
    write_file(args.out / f"made_by_from_{start}.json", made_by)


class RunSaver:
    """Saves a run into its folder in a thread: training waits for a copy in the host's memory, and for the save before
    this one if that is still being written; an error of a save is raised at the next `save` or `close`."""

    def __init__(self, folder: Path, settings: dict, policy):
        self.folder = folder
        self.settings = settings
        self.policy = policy
        self.thread = ThreadPoolExecutor(1)
        self.pending = None

    def save(self, **state) -> None:
        """folder/last, the policy as it is now, and folder/trainer.pt, from which `resume_run` goes on: `state` (what
        torch saves) and under "policy" the weights that train."""
        weights = on_host(self.policy.state_dict(), {})
        state = on_host(state, {})
        trained = [name for name, weight in self.policy.named_parameters() if weight.requires_grad]
        state["policy"] = {name: weights[name] for name in trained}
        self.wait()
        self.pending = self.thread.submit(self._write, weights, dict(args=self.settings, **state))

    def _write(self, weights, state):
        self.policy.save(self.folder / "last", weights=weights)
        write_file(self.folder / "trainer.pt", state)

    def wait(self) -> None:
        if self.pending:
            self.pending.result()

    def close(self) -> None:
        self.wait()
        self.thread.shutdown()


def on_host(state, copies: dict):
    """A copy whose tensors are in the host's memory, of what dicts and lists hold. `copies` remembers those that were
    made: what is one tensor under two names, as pi0.5's word table, stays one."""
    if isinstance(state, dict):
        return {key: on_host(value, copies) for key, value in state.items()}
    if isinstance(state, list):
        return [on_host(value, copies) for value in state]
    if not torch.is_tensor(state):
        return state
    place = (state.data_ptr(), state.shape)
    if place not in copies:
        copies[place] = state.detach().to("cpu", copy=True)
    return copies[place]


def resume_run(folder: Path, settings: dict, free: set[str]) -> dict | None:
    """What a RunSaver wrote, or None where no run was begun. UserError if that run had other settings than these; those
    named in `free` may differ."""
    if not (folder / "trainer.pt").exists():
        return None
    state = read_file(folder / "trainer.pt")
    changed = {k for k, v in settings.items() if state["args"].get(k) != v} - free
    if changed:
        raise UserError(
            f"{folder} holds a run with another {', '.join(sorted(changed))}: give another --out, or delete that folder"
        )
    return state


# ---- what statistics mean ---------------------------------------------------------------------------------------

# fmt: off
MODES = {  # lerobot's names of ways to normalise, and the kinds of statistics that each needs
    "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90"), "MIN_MAX": ("min", "max"), "MEAN_STD": ("mean", "std"),
    "IDENTITY": ()}
# fmt: on
EPS = {"rlco": 1e-6, "openpi": 1e-6, "lerobot": 1e-8, "openvla": 1e-8}  # what a convention adds to a range
WIDE = 1000.0  # half of the range that stands for none, where no state is more than the middle of its bins


class Affine(NamedTuple):
    """y = (x - offset) / scale + shift, in [D]; but y = 0 and x = offset where `still`."""

    offset: torch.Tensor
    scale: torch.Tensor
    shift: float
    still: torch.Tensor
    moves: torch.Tensor  # whether the data has any range there


def affine(
    kinds: dict, mode: str, convention: str, eps: float | None = None, dtype: torch.dtype = torch.float32
) -> Affine:
    """How a project normalises a feature with its statistics {"q01": [...], ...}. They differ where there is no range:
    q01 = q99 is -1 in openpi and lerobot, which the weights they trained expect, and 0 here. OpenVLA has 0 where the
    minimum is the maximum. lerobot adds its eps to no range but 0."""
    eps = EPS[convention] if eps is None else eps
    if mode == "IDENTITY":
        ones = torch.ones(robot_dims(kinds), dtype=dtype)
        return Affine(ones * 0, ones, 0.0, ones < 0, ones > 0)
    first, second = (torch.tensor(kinds[kind], dtype=dtype) for kind in MODES[mode])
    never = torch.zeros_like(first, dtype=torch.bool)
    if mode == "MEAN_STD":
        return Affine(first, second + eps, 0.0, never, second > 0)
    width = second - first
    moves = width > 0
    if convention == "lerobot":
        return Affine(first, torch.where(width == 0, eps, width) / 2, -1.0, never, moves)
    still = never
    if convention == "openvla" and "min" in kinds:
        still = torch.tensor(kinds["min"]) == torch.tensor(kinds["max"])
    elif convention != "openpi":
        still = ~moves
    return Affine(first, (width + eps) / 2, -1.0, still, moves)


def restate(kinds: dict, mode: str, convention: str, target: str, feature: str) -> dict:
    """Statistics with which the quantiles of another project, `target`, compute what these do in their convention."""
    if convention == target and mode == "QUANTILES" or not kinds.keys() >= set(MODES[mode]):
        return kinds
    offset, scale, shift, still, _ = affine(kinds, mode, convention, dtype=torch.float64)
    low = offset - (1 + shift) * scale
    if mode == "QUANTILES" and EPS[convention] == EPS[target]:
        high = torch.tensor(kinds["q99"], dtype=torch.float64)
    else:
        high = low + 2 * scale - (0 if target == "lerobot" else EPS[target])
    if feature == "action":
        high = torch.where(still, low, high)  # gives q01, whatever the model says
    else:  # gives the middle of bin 128, in which 0 is
        high = torch.where(still, offset + WIDE * (1 - 1 / 256), high)
        low = torch.where(still, offset - WIDE * (1 + 1 / 256), low)
    return {**kinds, "q01": low.tolist(), "q99": high.tolist()}


def robot_dims(kinds: dict) -> int:
    """The number of a feature's dimensions, less zeros that pad it to the model's (32 in openpi and RLinf)."""
    columns = [kinds[kind] for pair in MODES.values() for kind in pair if kind in kinds]
    dims = len(columns[0]) if columns else ACTION_DIM
    while dims > ACTION_DIM and all(abs(column[dims - 1]) < 1e-6 for column in columns):
        dims -= 1
    return dims


# ---- reading a checkpoint folder --------------------------------------------------------------------------------

ACTION_DIM = 7  # of the robots here, as states have
HEADS = ("value_head.", "noise_head.")  # what RL adds to a published model; float32, in a file of their own
PALIGEMMA = "paligemma_with_expert.paligemma."
LM_HEAD = PALIGEMMA + "lm_head.weight"  # one tensor under two names in openpi, two in lerobot
EMBED = PALIGEMMA + "model.language_model.embed_tokens.weight"
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "gelu_new", "quick_gelu", "silu", "relu")
LAYOUTS = {"pi05": ("openpi", "lerobot"), "openvla": ("openvla",)}  # of other projects, by family
TOKENIZERS = {"pi05": "google/paligemma-3b-pt-224", "openvla": "openvla/openvla-7b"}  # on the Hub

# Patterns of others' tensor names, and what of ours to put in their place, in this order.
ROOTS = (
    r"(?:paligemma_with_expert|action_(?:in|out)_proj|time_mlp_(?:in|out)|vision_backbone|projector|language_model|"
    r"value_head|noise_head)\."
)
OLD_PALIGEMMA = r"^(paligemma_with_expert\.paligemma)\."
RENAMES: tuple[tuple[str, str | Callable], ...] = (
    (r"\b_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module|forward_module)\.", ""),  # torch's wrappers
    (rf"^(?!{ROOTS})(?:\w+\.)+?(?={ROOTS})", ""),  # model., module., policy., base_model.model., ...
    (r"\.modules_to_save\.\w+\.", "."),  # peft
    (OLD_PALIGEMMA + r"(vision_tower|multi_modal_projector)\.", r"\1.model.\2."),  # once
    (OLD_PALIGEMMA + r"language_model\.model\.", r"\1.model.language_model."),
    (OLD_PALIGEMMA + r"language_model\.lm_head\.", r"\1.lm_head."),
    (r"(?<=\.vision_tower\.)(?=embeddings\.|encoder\.|post_layernorm\.)", "vision_model."),  # since
    (r"^value_head\.mlp\.", "value_head."),  # RLinf
    (r"^value_head\.head_l(\d)", lambda match: f"value_head.{2 * int(match[1]) - 2}"),  # RL4VLA
    (r"^noise_head\.mlp_logvar\.moduleList\.(\d)\.linear_1", lambda match: f"noise_head.{2 * int(match[1])}"),  # RLinf
)
# No weights: RLinf's bounds of the noise, which are the setting noise_std here, and what is computed anew.
NO_WEIGHTS = r"^noise_head\.logvar_|\.original_module\.|\.position_ids$|\.rotary_emb\.inv_freq$"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ADAPTER = "adapter_model.safetensors"  # peft's
HUB_FILES = ["*.safetensors*", "*.json", "*.py", "*.model", "metadata.pt"]
OPENPI_STATS = {"observation.state": "state", "action": "actions"}  # our name of a statistic, and theirs
OPENPI_CONFIG = {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}
# Settings in the metadata of its trainer.
OPENPI_SAID = ("action_horizon", "action_dim", "max_token_len", "discrete_state_input")
RELATIVE = "relative|delta|memory|adapt_to_pi"  # in the names of switches that change what state and action are
LEROBOT_STATE_STEP = "pi05_prepare_state_tokenizer_processor_step"
LEROBOT_STATE_DIM = 32  # of that step up to lerobot 0.4.4, which pads the normalised state with zeros
# fmt: off
LEROBOT_STEPS = {  # those of its pipelines that are known here; of the last two, that they are not enabled
    "rename_observations_processor", "to_batch_processor", "normalizer_processor", "unnormalizer_processor",
    LEROBOT_STATE_STEP, "tokenizer_processor", "device_processor", "relative_actions_processor",
    "absolute_actions_processor"}
LEROBOT_CONFIG = {  # their name of a setting, and ours
    "chunk_size": "action_horizon", "n_action_steps": "chunk", "num_inference_steps": "num_steps",
    "tokenizer_max_length": "max_token_len", "max_action_dim": "action_dim"}
OPENVLA_CONFIG = {  # what their code needs beside the settings
    "architectures": ["OpenVLAForActionPrediction"], "model_type": "openvla", "n_action_bins": 256,
    "arch_specifier": "no-align+fused-gelu-mlp", "output_projector_states": False, "llm_max_length": 2048,
    "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig",
                 "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction"},
    "vision_backbone_id": "dinosiglip-vit-so-224px", "llm_backbone_id": "llama2-7b-pure",
    "use_fused_vision_backbone": True, "image_resize_strategy": "resize-naive"}
# fmt: on


def hub_folder(name: str, files: list[str], problem: str) -> Path:
    """The folder with these files of the Hub's model `name`, downloaded unless they are there. UserError, which begins
    with the `problem` that needs it, if the Hub does not give them."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # no network, no such model, no right to it, no valid name: no common class
        raise UserError(f"{problem}, and the Hub gives no such model ({type(error).__name__})") from error


BASES = Path(__file__).with_name("bases")  # pretrained tiny policies, by name


def find_folder(name: str | Path, presets: dict) -> Path:
    """The folder `name`, or else that of bases/, or of the Hub's model of this name, downloaded. UserError if none is
    there."""
    if Path(name).is_dir():
        return Path(name)
    base = BASES / name
    if base.parent == BASES and base.is_dir():
        return base
    return hub_folder(str(name), HUB_FILES, f"{name} is no preset ({', '.join(presets)}) and no folder")


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold its weights, none if it is no checkpoint: what an index names, else
    model.safetensors, else all; and the heads. Other weights are mentioned, and left alone."""
    files = sorted(folder.glob("[!.]*.safetensors"))
    names = [file.name for file in files if "processor" not in file.name and file.name != ADAPTER]
    indexes = [folder / "model.safetensors.index.json", *sorted(folder.glob("[!.]*.safetensors.index.json"))]
    indexes = [index for index in indexes if index.is_file()]
    shards = [name for name in names if re.search(r"-\d+-of-\d+\.", name)]
    chosen = names
    if indexes:
        chosen = sorted(set(read_file(indexes[0]).get("weight_map", {}).values()))
    elif "model.safetensors" in names:
        chosen = ["model.safetensors"]
    elif shards:
        chosen = shards
        number = int(re.search(r"-of-(\d+)\.", shards[0])[1])
        if len(shards) != number:
            raise UserError(f"{folder} has {len(shards)} of the {number} parts of its weights: copy the others, too")
    if "heads.safetensors" in names:
        chosen = sorted({*chosen, "heads.safetensors"})
    left = [name for name in names if name not in chosen]
    if left:
        note(f"{folder}: the weights are {', '.join(chosen)}; {', '.join(left)} beside them is left alone")
    steps = sorted(folder.glob("**/full_weights.pt"))  # of RLinf's trainer
    if not chosen and len(steps) > 1:
        raise UserError(f"{folder} has {len(steps)} checkpoints: name the folder of one, such as {steps[-1].parent}")
    return [folder / name for name in chosen] or steps


def sha256(folder: Path | None) -> str:
    """Of the weights in a folder (of nothing without one)."""
    total = hashlib.sha256()
    files = [*weight_files(folder), *folder.glob(ADAPTER)] if folder else []
    for path in files:
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder, mapped from disk, under our names; an adapter is put on its base, which is beside it, or
    else where its configuration says."""
    tensors = named_tensors(folder, weight_files(folder))
    adapter = folder / ADAPTER
    if adapter.is_file():
        if not tensors:
            tensors = read_tensors(base_folder(folder))
        else:
            note(f"{folder}: {ADAPTER} is put on the weights beside it")
        return put_on(folder, tensors, named_tensors(folder, [adapter]))
    if any(".base_layer." in name for name in tensors):  # the state_dict of a whole peft model
        base = {name.replace(".base_layer.", "."): x for name, x in tensors.items() if "lora_" not in name}
        return put_on(folder, base, {name: x for name, x in tensors.items() if "lora_" in name})
    if not tensors:
        others = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.ckpt")])
        hint = f"; {others[0].name} is not read: save its state_dict as model.safetensors" if others else ""
        if (folder / "params").is_dir():
            hint = "; params is JAX's, which openpi's examples/convert_jax_model_to_pytorch.py converts"
        raise UserError(f"{folder} has no *.safetensors file: it is no checkpoint{hint}")
    return tensors


def named_tensors(folder: Path, files: list[Path]) -> dict[str, torch.Tensor]:
    """The weights in some files of a folder under our names. UserError if two get one name, or they are no floats."""
    tensors = {}
    for file in files:
        for theirs, tensor in read_file(file).items():
            name = theirs
            for pattern, ours in RENAMES:
                name = re.sub(pattern, ours, name)
            if re.search(NO_WEIGHTS, name):
                continue
            if name in tensors:
                raise UserError(f"{folder} has two tensors {name}, one of them {theirs} in {file.name}: keep one set")
            tensors[name] = tensor
    strange = {str(tensor.dtype): name for name, tensor in tensors.items() if tensor.dtype not in FLOATS}
    if strange:
        kinds = ", ".join(f"{dtype.removeprefix('torch.')} ({name})" for dtype, name in sorted(strange.items()))
        raise UserError(f"{folder} has quantised weights, {kinds}: save the model in bfloat16 or float32 and load that")
    return tensors


def base_folder(folder: Path) -> Path:
    """The folder of the model that an adapter without its base's weights is put on."""
    name = read_file(folder / "adapter_config.json").get("base_model_name_or_path") or "a model that it does not name"
    for place in (Path(name), folder / name, folder.parent / name):
        if place.is_dir():
            return place
    problem = f"{folder} is an adapter of {name}, which is no folder here (copy the base's files beside the adapter)"
    return hub_folder(name, HUB_FILES, problem)


def put_on(folder: Path, base: dict, adapter: dict) -> dict[str, torch.Tensor]:
    """A base's weights W with what a LoRA adapter adds, B A lora_alpha / r (arXiv 2106.09685, peft's names); what else
    it has takes the place of the base's."""
    file = folder / "adapter_config.json"
    config = read_file(file) if file.is_file() else {}
    if not config.get("lora_alpha"):
        raise UserError(
            f"{folder} holds a LoRA adapter, and no adapter_config.json with its lora_alpha, by which it is scaled: "
            "copy that file, too, or merge the adapter before saving (merge_and_unload)"
        )
    if config.get("peft_type", "LORA") != "LORA" or config.get("fan_in_fan_out"):
        raise UserError(f"{folder} holds a {config.get('peft_type')} adapter: only LoRA of linear layers is known here")
    rest = dict(adapter)
    merged = dict(base)
    for name in adapter:
        match = re.fullmatch(r"(.+)\.lora_A\.(?:\w+\.)?weight", name)
        if not match:
            continue
        weight = f"{match[1]}.weight"
        down = rest.pop(name)
        up = rest.pop(name.replace(".lora_A.", ".lora_B."), None)
        fits = up is not None and weight in base and down.ndim == up.ndim == 2
        if not fits or base[weight].shape != (len(up), down.shape[1]) or merged[weight] is not base[weight]:
            raise UserError(f"{folder}: its adapter of {match[1]} does not fit the base, or is one of several")
        patterns = config.get("alpha_pattern") or {}
        alphas = [alpha for key, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", match[1])]
        alpha = alphas[0] if alphas else config["lora_alpha"]
        scale = alpha / len(down) ** (0.5 if config.get("use_rslora") else 1)
        merged[weight] = (base[weight].float() + up.float() @ down.float() * scale).to(base[weight].dtype)
    strange = [name for name in rest if "lora_" in name or name not in base and not name.startswith(HEADS)]
    if strange:
        raise UserError(f"{folder}: its adapter has more than LoRA of linear layers: {by_layer(strange)}")
    return {**merged, **rest}


def settings_folder(folder: Path) -> Path:
    """Where the settings of a checkpoint are: in its own folder, or an adapter's base's."""
    alone = (folder / ADAPTER).is_file() and not (folder / "config.json").is_file() and not weight_files(folder)
    return base_folder(folder) if alone else folder


class Inert(dict):
    """Takes the place of every class and function in a pickle, so that to read it runs none of them."""

    __hash__ = object.__hash__

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __call__(self, *args, **kwargs):
        return self

    def __setstate__(self, state):
        pass

    append = extend = add = __setstate__


class InertUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        return Inert

    def persistent_load(self, pid):
        return None


def read_metadata(folder: Path) -> dict:
    """The configuration in the metadata.pt of openpi's trainer: dicts, strings and numbers. {} if there is none."""
    file = folder / "metadata.pt"
    if not file.is_file():
        return {}
    try:  # torch.load would run what the file says, or refuse it: openpi pickles objects of its own
        with zipfile.ZipFile(file) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            config = InertUnpickler(io.BytesIO(archive.read(name))).load()["config"]
        return {part: config[part] for part in ("model", "data") if isinstance(config.get(part), dict)}
    except Exception as error:  # unpickling raises anything
        note(f"{file} is not understood ({type(error).__name__}), and left alone")
        return {}


def refuse_others(folder: Path, raw: dict, tensors: dict) -> None:
    """UserError, which names it, for what would load and then act wrongly."""
    kind = raw.get("type", "pi05")
    switches = {**raw, **read_metadata(folder).get("data", {})}
    switches = sorted(key for key, value in switches.items() if value is True and re.search(RELATIVE, key))
    steps = lerobot_steps(folder, "policy_preprocessor") | lerobot_steps(folder, "policy_postprocessor")
    for name, step in steps.items():
        config = table(folder, step["config"])
        if name not in LEROBOT_STEPS or config.get("enabled") or config.get("include_state_in_prompt") is False:
            switches.append(f"the step {name} of its processors")
    heads = sorted(file.name for file in folder.glob("*--*.pt"))
    code = folder / "modeling_prismatic.py"
    if code.is_file() and "NUM_ACTIONS_CHUNK" in code.read_text():
        heads.append(code.name)
    problem = None
    if kind not in ("pi05", "openvla"):
        problem = f"is a {kind} policy"
    elif any(name.endswith("state_proj.weight") for name in tensors):
        problem = "is a pi0, which has state_proj and no state in its prompt"
    elif heads:
        problem = f"is an OpenVLA-OFT, which acts through a head of its own and not by tokens ({heads[0]})"
    elif switches:
        problem = f"was trained with {', '.join(switches)}: its states or actions are not those that are known here"
    if problem:
        raise UserError(f"{folder} {problem}; pi0.5 and OpenVLA with plain states and actions can be loaded")


def read_config(folder: Path, tensors: dict, presets: dict, given: dict | None = None) -> dict:
    """Settings in the form of `presets` from any layout's config. The names of the tensors tell the family; what the
    files do not say is as in the published model's preset, which is mentioned unless it is `given`."""
    files = [file for file in (folder / "rlco.json", folder / "config.json") if file.is_file()]
    raw = read_file(files[0]) if files else {}
    value_head = sorted(name for name in tensors if re.fullmatch(r"value_head\.\d\.weight", name))
    if not files and (folder / "heads.safetensors").is_file():
        raise UserError(f"{folder} has lost its config.json: copy it again")
    if "value_hidden" in raw and not value_head:  # only our own say value_hidden
        raise UserError(f"{folder} has lost its heads.safetensors: copy it again")

    foreign = "chunk" not in raw  # only our own say chunk
    if foreign:
        refuse_others(folder, raw, tensors)
    if EMBED in tensors or LM_HEAD in tensors:
        published = presets["pi05"]
        extra = ("min_period", "max_period")
        raw = pi05_settings(folder, raw, foreign, tensors, published, given or {})
    elif "projector.fc1.weight" in tensors:
        published = presets["openvla-7b"]
        extra = ("norm_stats", "unnorm_key")
        raw = openvla_settings(folder, raw, foreign, published)
    else:
        strange = [name for name in tensors if not name.startswith(HEADS) and "lora_" not in name]
        problem = f"they are {', '.join(strange[:3])}, ..." if strange else "is model.safetensors missing?"
        raise UserError(
            f"the tensors in {folder} are neither pi0.5's (no {LM_HEAD}) nor OpenVLA's (no projector.fc1.weight): "
            f"{problem}"
        )
    config = {**published, **{key: value for key, value in raw.items() if key in (*published, *extra)}}
    config["type"] = published["type"]
    if value_head:
        config["value_hidden"] = [len(tensors[name]) for name in value_head[:-1]]
    require_like(folder, config, published)
    if set(config["normalization"].values()) - set(MODES) or config["convention"] not in EPS:
        raise UserError(f"{folder}: no normalisation is {config['normalization']} as in {config['convention']}")
    if config.get("real_vocab_size", 256) < 256:
        raise UserError(f"{folder}: real_vocab_size is {config['real_vocab_size']}, an action has 256 tokens")
    config["chunk"] = min(config["chunk"], config["action_horizon"])
    return config


def pi05_settings(folder: Path, raw: dict, foreign: bool, tensors: dict, published: dict, given: dict) -> dict:
    """`raw`, with what else files and tensors say of a pi0.5 of ours, lerobot's or openpi's."""
    if foreign and (raw.get("type") == "pi05" or (folder / "policy_preprocessor.json").is_file()):
        raw = raw | read_lerobot(folder, raw)
    elif foreign:
        said = read_metadata(folder).get("model", {})
        said = {key: said[key] for key in OPENPI_SAID if isinstance(said.get(key), int)}
        raw = {"convention": "openpi", "discrete_state_input": None, **said, **raw}
    if "action_dim" not in raw and "action_in_proj.weight" in tensors:
        raw["action_dim"] = tensors["action_in_proj.weight"].shape[1]
    if "action_horizon" not in {**raw, **given}:
        assumed = [f"{key} {published[key]}" for key in ("action_horizon", "chunk", "num_steps", "max_token_len")]
        note(f"{folder} has no config.json: assumed are {', '.join(assumed)}; give load_policy what differs")
    words = tensors.get(EMBED, tensors.get(LM_HEAD))
    return {**raw, "vlm": {**table(folder, raw.get("vlm", published["vlm"])), "vocab_size": len(words)}}


def openvla_settings(folder: Path, raw: dict, foreign: bool, published: dict) -> dict:
    """`raw`, with what else the files say of an OpenVLA of ours or theirs; the language model's settings as ours."""
    statistics = folder / "dataset_statistics.json"
    if statistics.is_file():  # of its fine-tuning: OpenVLA's code, too, prefers them to config.json's
        raw = {**raw, "norm_stats": read_file(statistics)}
    if foreign:
        crop = None if statistics.is_file() else False  # the published model was trained without augmentation
        if "image_aug" in str(folder.absolute()):  # which OpenVLA's fine-tuning writes into the folder's name
            crop = True
        raw = {"convention": "openvla", "center_crop": crop, **raw}
    text = raw.get("text_config")
    if text and "llm" not in raw:
        theta = (text.get("rope_parameters") or text).get("rope_theta", 1e4)
        raw["llm"] = {**published["llm"], **text, "rope_theta": theta}
        raw["real_vocab_size"] = raw["llm"]["vocab_size"] - raw.get("pad_to_multiple_of", 64)
    known = (*published["llm"], "attention_bias", "mlp_bias", "head_dim", "hidden_act")
    llm = table(folder, raw.get("llm", published["llm"]))
    return {**raw, "llm": {key: value for key, value in llm.items() if key in known}}


def lerobot_steps(folder: Path, pipeline: str) -> dict[str, dict]:
    """The steps of one of lerobot's processor pipelines by name, in order; none if there is no such file."""
    file = folder / f"{pipeline}.json"
    steps = read_file(file).get("steps") if file.is_file() else []
    try:
        return {step.get("registry_name") or step["class"]: {"config": {}, **step} for step in steps}
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{file} is damaged, its steps are not lerobot's: copy it again") from None


def read_lerobot(folder: Path, raw: dict) -> dict:
    """Settings, under our names, from lerobot's config.json and from its two pipelines, which go before it."""
    settings = {ours: raw[theirs] for theirs, ours in LEROBOT_CONFIG.items() if theirs in raw}
    before = lerobot_steps(folder, "policy_preprocessor")
    after = lerobot_steps(folder, "policy_postprocessor")
    modes = {}
    for feature, kind, step in (
        ("observation.state", "STATE", before.get("normalizer_processor", {})),
        ("action", "ACTION", after.get("unnormalizer_processor", {})),
    ):
        config = table(folder, step.get("config", {}))
        said = config.get("norm_map") or raw.get("normalization_mapping")
        modes[feature] = table(folder, said or {kind: "QUANTILES"}).get(kind, "IDENTITY")
        # A state that these do not list is not normalised; an action always is.
        lists = [config.get(key) for key in ("features", "normalize_observation_keys")]
        if kind == "STATE" and any(isinstance(names, (dict, list)) and feature not in names for names in lists):
            modes[feature] = "IDENTITY"
        if modes[feature] not in list(MODES):
            raise UserError(
                f"{folder} normalises its {feature} by {modes[feature]}, of which nothing is known here but "
                f"{', '.join(MODES)}"
            )
    settings |= {"normalization": modes, "convention": "lerobot"}
    if LEROBOT_STATE_STEP in before and "state_file" in before.get("normalizer_processor", {}):
        settings["prompt_state_dim"] = lerobot_state_dim(folder, raw, before)
    return settings


def lerobot_state_dim(folder: Path, raw: dict, steps: dict) -> int:
    """How many numbers of state the lerobot that trained this wrote into a prompt at least: up to 0.4.4 it pads the
    normalised state with zeros, from 0.5 on it does not. Neither says so; their configurations differ in fields."""
    run = folder / "train_config.json"
    version = read_file(run) if run.is_file() else {}
    if "use_relative_actions" in raw or "relative_actions_processor" in steps or "cudnn_deterministic" in version:
        return 0
    dims = table(folder, steps[LEROBOT_STATE_STEP]["config"]).get("max_state_dim")
    if dims is None and not version:
        note(
            f"{folder} does not say which lerobot trained it: its prompt is taken to have {LEROBOT_STATE_DIM} numbers "
            "of state, as up to 0.4.4; for 0.5.0 give load_policy(prompt_state_dim=0)"
        )
    return LEROBOT_STATE_DIM if dims is None else dims


def require_like(folder: Path, config: dict, published: dict) -> None:
    """UserError unless every setting of `published` is there and of its kind: a whole number that is above 0 where the
    published one is, any number, a list of numbers, text."""
    if str(config.get("hidden_act", "gelu")) not in ACTIVATIONS:
        raise UserError(f"{folder}: its configuration says hidden_act = {config['hidden_act']!r:.80}")
    for name, example in published.items():
        value = config.get(name)
        if isinstance(example, dict) and isinstance(value, dict):
            require_like(folder, value, example)
            continue
        fits = type(value) is type(example) or isinstance(example, bool) and value is None  # None: no file says
        if isinstance(example, float):
            fits = type(value) in (int, float) and abs(value) < math.inf
        elif type(example) is int:
            lowest = 0 if name.endswith("_id") else min(example, 1)
            fits = fits and lowest <= value < 2**31
        elif isinstance(example, list):
            fits = fits and len(value) > 0 and all(type(x) in (int, float) and abs(x) < math.inf for x in value)
        if not fits:
            raise UserError(f"{folder}: its configuration says {name} = {value!r:.80}; {example!r:.80} is published")


def read_stats(folder: Path, config: dict) -> dict:
    """Statistics in LeRobot's form ({"action": {"q01": [...], ...}, ...}) from whichever file the layout keeps them in.
    Where there are several sets, the setting unnorm_key chooses; it goes before our own file, too."""
    key = config.get("unnorm_key")
    stats = {}
    for file in sorted(folder.glob("policy_preprocessor*.safetensors")):  # lerobot
        for name, value in read_file(file).items():
            feature, _, kind = name.rpartition(".")
            stats.setdefault(feature, {})[kind] = value.flatten().tolist()
    statistics = folder / "dataset_statistics.json"  # OpenVLA, whose state is in no prompt
    norm_stats = read_file(statistics) if statistics.is_file() else table(folder, config.get("norm_stats") or {})
    sets = {
        name: {"action": theirs["action"]} for name, theirs in norm_stats.items() if "action" in table(name, theirs)
    }
    for file in sorted(folder.glob("**/norm_stats.json")):  # openpi, RLinf
        content = table(file, read_file(file).get("norm_stats", {}))
        sets[file.parent.name] = {ours: content[theirs] for ours, theirs in OPENPI_STATS.items() if theirs in content}
    own = folder / "stats.json"
    if own.is_file():
        stats = read_file(own)
    elif len(sets) == 1:
        key = next(iter(sets))
    if key and key not in sets:
        raise UserError(f"{folder} has no statistics {key}; unnorm_key can be {', '.join(sorted(sets))}")
    if key:
        stats = stats | sets[key]
    for feature in OPENPI_STATS:
        require_numbers(folder, feature, table(folder, stats.get(feature, {})))
    return stats


def settle_prompt(folder: Path, config: dict) -> None:
    """Decide whether the state is in pi0.5's prompt, where openpi's files do not say (discrete_state_input): it is,
    unless the statistics are of a state padded to the model's size, as RLinf's for RL-Co."""
    if config.get("discrete_state_input", True) is not None:
        return
    kinds = read_stats(folder, config).get("observation.state", {})
    padded = max(map(len, kinds.values()), default=0) > robot_dims(kinds)
    config["discrete_state_input"] = not padded
    if kinds:
        note(
            f"{folder} does not say whether the state is in the prompt: assumed is discrete_state_input={not padded}; "
            f"for the other, give load_policy(discrete_state_input={padded})"
        )


def table(where: str | Path, value) -> dict:
    """`value`, or UserError if it is no table."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: {value!r:.80} stands where a table should")
    return value


def require_numbers(folder: Path, feature: str, kinds: dict) -> None:
    """UserError unless all statistics of a feature are lists of numbers, one for each dimension."""
    lengths = {}
    for kind in ("q01", "q99", "q10", "q90", "min", "max", "mean", "std", "mask"):
        values = kinds.get(kind, [])
        if type(values) is not list or not all(type(x) in (bool, int, float) and abs(x) < math.inf for x in values):
            raise UserError(f"{folder}: the statistic {kind} of {feature} is no list of numbers but {values!r:.80}")
        if kind in kinds:
            lengths[kind] = len(values)
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise UserError(f"{folder}: the statistics of {feature} have different numbers of dimensions: {lengths}")


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The folder's own tokenizer, if it has one."""
    file = folder / "tokenizer.json"
    return read_file(file) if file.is_file() else None


def published_tokenizer(folder: Path | None, config: dict) -> Tokenizer:
    """The tokenizer of the published model of this family, for a checkpoint without one. UserError if there is no
    network, or it has more words than the checkpoint."""
    name = TOKENIZERS[config["type"]]
    words = (config.get("vlm") or config["llm"])["vocab_size"]
    problem = f"{folder} has no tokenizer.json: copy the model's own into it. Instead of it {name}'s is taken"
    tokenizer = read_file(hub_folder(name, ["tokenizer.json"], problem) / "tokenizer.json")
    size = tokenizer.get_vocab_size()
    if size > words + 64:  # PaliGemma's has a few words without a row in the table
        raise UserError(f"{problem}, but it has {size} words, the checkpoint {words}")
    return tokenizer


def match_tensors(folder: Path, tensors: dict, wanted: dict) -> dict[str, torch.Tensor]:
    """A folder's tensors with exactly the names and shapes of a model's state_dict `wanted`. Only heads may be missing:
    published checkpoints have none. UserError names every key that does not fit."""
    for name in wanted:  # a layer with LoRA is saved under the name that it has without
        plain = name.replace(".base_layer.", ".")
        if plain != name and plain in tensors:
            tensors[name] = tensors.pop(plain)
    if LM_HEAD in wanted:  # a file may have the tied tensor once, under either name
        tensors = {LM_HEAD: tensors.get(EMBED), EMBED: tensors.get(LM_HEAD), **tensors}
    problems = {
        "missing": [name for name in wanted if name not in tensors and not name.startswith(HEADS)],
        "unexpected": [name for name in tensors if name not in wanted],
        "of another shape": [
            f"{name} {list(tensors[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in tensors and tensors[name].shape != tensor.shape
        ],
    }
    found = [f"{len(names)} {problem}: {by_layer(names)}" for problem, names in problems.items() if names]
    if found:
        raise UserError(f"{folder} does not fit its configuration: {'; '.join(found)}")
    return tensors


def by_layer(names: list[str]) -> str:
    """All names, in a readable few: those that differ in a layer's number alone are one, layers.{3..29}.mlp.weight."""
    layers: dict[tuple[str, str], list[str]] = {}  # what is before and after the number: the numbers
    for name in names:
        match = re.match(r"(.*?\.)(\d+)(\..*)", name)
        before, number, after = match.groups() if match else (name, "", "")
        layers.setdefault((before, after), []).append(number)

    def short(numbers):
        if len(numbers) == 1:
            return numbers[0]
        if len(numbers) > 2 and int(numbers[-1]) - int(numbers[0]) == len(numbers) - 1:
            return f"{{{numbers[0]}..{numbers[-1]}}}"
        return f"{{{','.join(numbers)}}}"

    return ", ".join(before + short(numbers) + after for (before, after), numbers in layers.items())


# ---- writing one ------------------------------------------------------------------------------------------------

SHARD_SIZE = {"openvla": "5GB"}  # by layout; whoever reads the others' reads one file
# What says how a checkpoint was, and is written anew or no longer true.
NO_COMPANIONS = ("adapter_config.json", "policy_preprocessor.json", "policy_postprocessor.json", "train_config.json")


def write_checkpoint(
    folder: Path,
    layout: str | None,
    config: dict,
    stats: dict,
    state: dict,
    tokenizer: Tokenizer | None,
    source: Path | None,
) -> None:
    """Write settings, statistics, a state_dict and the tokenizer, each file whole or not at all; see `Policy.save`. The
    processor, tokenizer and code files of `source`, the folder that the policy came from, go along."""
    if source:
        copy_companions(source, folder)
    (folder / "rlco.json").unlink(missing_ok=True)  # lerobot's layout alone has it
    heads = {name: tensor for name, tensor in state.items() if name.startswith(HEADS) or "lora_" in name}
    tensors = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if name not in heads}
    tensors, config = export(folder, layout, config, stats, tensors)

    from huggingface_hub import split_torch_state_dict_into_shards

    size = SHARD_SIZE.get(layout, "1TB")
    pattern = "model{suffix}.safetensors"
    plan = split_torch_state_dict_into_shards(tensors, max_shard_size=size, filename_pattern=pattern)
    for file, names in plan.filename_to_tensors.items():
        write_file(folder / file, {name: tensors[name] for name in names})
    for file in folder.glob("model*.safetensors*"):
        if file.name not in plan.filename_to_tensors:
            file.unlink()  # of another number of shards
    (folder / ADAPTER).unlink(missing_ok=True)  # in these weights now
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_file(folder / "model.safetensors.index.json", index)
    copied = source and (source / "tokenizer.json").is_file()  # older libraries cannot read one written anew
    if tokenizer is not None and not copied:
        write_file(folder / "tokenizer.json", tokenizer.to_str().encode())
    write_file(folder / "heads.safetensors", heads)
    write_file(folder / "stats.json", stats)
    write_file(folder / "config.json", config)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the small files of a checkpoint beside its weights, except what was saved into a folder of it before."""
    source = source.resolve()
    target = folder.resolve()
    if source == target:
        return
    for file in sorted(source.rglob("[!.]*")):
        own = file.is_relative_to(target) and not source.is_relative_to(target)
        small = file.suffix in (".json", ".py", ".model", ".txt") and not file.name.endswith(".index.json")
        if small and not own and file.name not in NO_COMPANIONS:
            write_file(folder / file.relative_to(source), file.read_bytes())


def export(folder: Path, layout: str | None, config: dict, stats: dict, tensors: dict) -> tuple[dict, dict]:
    """Tensors and config.json as others' code wants them; writes the statistics where it looks for them."""
    if layout:  # value_hidden promises our heads, which others' code drops
        config = {key: value for key, value in config.items() if key != "value_hidden"}
    if config["type"] == "openvla":
        return tensors, export_openvla(folder, config, stats)
    tied = tensors[LM_HEAD].data_ptr() == tensors[EMBED].data_ptr()
    if layout == "lerobot":
        write_file(folder / "rlco.json", config)
        if tied:
            tensors = {**tensors, LM_HEAD: tensors[LM_HEAD].clone()}
        return {f"model.{name}": tensor for name, tensor in tensors.items()}, export_lerobot(folder, config, stats)
    # openpi's model has one tensor for both, under this name; pi0.5 acts through the embedding alone.
    if tied or layout:
        tensors = {name: tensor for name, tensor in tensors.items() if name != EMBED} | {LM_HEAD: tensors[EMBED]}
    kinds = ("mean", "std", "q01", "q99")
    if layout and config["prompt_state_dim"]:
        raise UserError(
            f"openpi cannot write the {config['prompt_state_dim']} numbers of state into a prompt that this policy was "
            'trained with by lerobot: save it with layout="lerobot"'
        )
    theirs = {}
    for ours, name in OPENPI_STATS.items():
        if ours in stats:
            said = restate(stats[ours], config["normalization"][ours], config["convention"], "openpi", ours)
            theirs[name] = {kind: said[kind] for kind in kinds if kind in said}
    for file in list(folder.glob("**/norm_stats.json")) or [folder / "assets/rlco/norm_stats.json"]:
        write_file(file, {"norm_stats": theirs})
    return tensors, {**OPENPI_CONFIG, **config}


def export_openvla(folder: Path, config: dict, stats: dict) -> dict:
    """OpenVLA's config.json, which holds the statistics of every dataset; ours replace the set that was chosen."""
    sets = dict(config.get("norm_stats") or {})
    key = config.get("unnorm_key") or "rlco"
    if "action" in stats:
        sets[key] = {**sets.get(key, {}), "action": stats["action"]}
    statistics = folder / "dataset_statistics.json"
    if statistics.is_file():  # goes before config.json's
        write_file(statistics, sets)
    return {
        **OPENVLA_CONFIG,
        **config,
        "norm_stats": sets,
        "text_config": {**config["llm"], "model_type": "llama", "pad_token_id": config["pad_token_id"]},
        "pad_to_multiple_of": config["llm"]["vocab_size"] - config["real_vocab_size"],
    }


def export_lerobot(folder: Path, config: dict, stats: dict) -> dict:
    """Write lerobot's two processor pipelines, which hold the statistics -> its config.json."""
    stats = {feature: kinds for feature, kinds in stats.items() if feature in OPENPI_STATS}
    if not config["discrete_state_input"]:
        raise UserError("lerobot's pi0.5 has the state in its prompt, this policy does not: save it for openpi")
    dims = {feature: robot_dims(kinds) for feature, kinds in stats.items()}
    state = "observation.state"
    if state in stats and len(next(iter(stats[state].values()))) > dims[state]:
        raise UserError(
            "this policy's prompt has a state that is padded before it is normalised, as no lerobot does: save it for "
            "openpi"
        )
    modes = dict(config["normalization"])
    for feature, kinds in list(stats.items()):
        if config["convention"] != "lerobot":
            kinds = restate(kinds, modes[feature], config["convention"], "lerobot", feature)
        stats[feature] = {kind: values[: dims[feature]] for kind, values in kinds.items()}
    if config["convention"] != "lerobot":
        modes = dict.fromkeys(modes, "QUANTILES")
    # Up to 0.4.4 lerobot pads the state to this in the prompt, to 32 where it is not said; from 0.5 on it does not.
    state_dim = config["prompt_state_dim"] or dims.get(state, ACTION_DIM)
    if state_dim > dims.get(state, state_dim):
        note(f"{folder}: lerobot up to 0.4.4 reads this policy's prompt, with {state_dim} states; newer do not")
    size = config["vision"]["image_size"]
    inputs = {"observation.images.base_0_rgb": {"type": "VISUAL", "shape": [3, size, size]}}
    outputs = {"action": {"type": "ACTION", "shape": [config["action_dim"]]}}
    if "observation.state" in stats:
        inputs["observation.state"] = {"type": "STATE", "shape": [dims["observation.state"]]}
    if "action" in stats:
        outputs["action"]["shape"] = [dims["action"]]
    norm_map = {"VISUAL": "IDENTITY", "STATE": modes["observation.state"], "ACTION": modes["action"]}
    device = ("device_processor", {"device": "cpu", "float_dtype": None})
    # fmt: off
    text = {"max_length": config["max_token_len"], "task_key": "task", "padding_side": "right",
            "padding": "max_length", "truncation": True, "tokenizer_name": TOKENIZERS["pi05"]}
    pipelines = {
        "policy_preprocessor": [
            ("rename_observations_processor", {"rename_map": {}}), ("to_batch_processor", {}),
            ("normalizer_processor", {"features": {**inputs, **outputs}, "norm_map": norm_map}),
            (LEROBOT_STATE_STEP, {"max_state_dim": state_dim}), ("tokenizer_processor", text), device],
        "policy_postprocessor": [("unnormalizer_processor", {"features": outputs, "norm_map": norm_map}), device]}
    # fmt: on
    flat = {
        f"{feature}.{kind}": torch.tensor(value, dtype=torch.float32)
        for feature, kinds in stats.items()
        for kind, value in kinds.items()
    }
    for name, steps in pipelines.items():
        entries = [{"registry_name": step, "config": settings} for step, settings in steps]
        for i, entry in enumerate(entries):
            if "normalizer" in entry["registry_name"] and flat:
                entry["state_file"] = f"{name}_step_{i}_{entry['registry_name']}.safetensors"
                write_file(folder / entry["state_file"], flat)
        write_file(folder / f"{name}.json", {"name": name, "steps": entries})
    return {
        "type": "pi05",
        **OPENPI_CONFIG,
        **{theirs: config[ours] for theirs, ours in LEROBOT_CONFIG.items()},
        "image_resolution": [size, size],
        "normalization_mapping": norm_map,
        "input_features": inputs,
        "output_features": outputs,
    }
