"""Success rates of checkpoints: on the robot's stand-in, and in the twin. The comparison table, videos, a JSON file.

    python eval_real.py                                              # stage I beside stage II, the defaults' checkpoints
    python eval_real.py --policies runs/real_only/best runs/sft/best runs/rlco/best --episodes 200
    python eval_real.py --target server --policies runs/rlco/best    # for any robot, through openpi's client

The stand-in is a second simulated domain that is never trained on by RL; it is not a real robot. Evaluation seeds are
disjoint from those of training, of the demonstrations and of the validation during training. The same command gives
the same numbers.
"""
import json
import math
import os
import platform
import subprocess
import threading
import time
from importlib.metadata import version
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

import envs
from policy import load_policy


@dataclass
class Args:
    """Evaluate checkpoints: success rate with a 95 % Wilson interval, mean episode length, videos."""

    policies: tuple[str, ...] = ("runs/sft/best", "runs/rlco/best")
    """checkpoints to compare: folders, or names on the Hub"""
    task: str = "push_cube"
    """a task of envs.py"""
    target: str = "standin"
    """where, beside the twin: a domain of envs.py (the stand-in plays the real robot); or "server": no evaluation, one
    checkpoint is served over openpi's websocket protocol"""
    episodes: int = 100
    """episodes for each checkpoint and domain, the same for all of them"""
    num_envs: int = 32
    """environments in parallel, spread over the cores"""
    videos: int = 2
    """recorded episodes of each kind, successes and failures, of each checkpoint; 0 records nothing"""
    out: Path = Path("runs/eval")
    """folder of results.json and the videos"""
    host: str = "127.0.0.1"
    """address that the server listens on; only this machine can reach the default"""
    port: int = 8000
    """port that the server listens on"""


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % confidence interval of a success rate (Wilson 1927), also right near 0 and 1."""
    p = successes / n
    center, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (center - half) / (1 + z * z / n), (center + half) / (1 + z * z / n)


def table(results: list[dict]) -> str:
    """Markdown: a row for each checkpoint, a column for each domain."""
    domains = list(dict.fromkeys(r["domain"] for r in results))
    lines = ["| checkpoint | " + " | ".join(f"{d}{' (not a real robot)' if d == 'standin' else ''}: success [95 %], "
                                            f"steps" for d in domains) + " |", "| --- |" + " --- |" * len(domains)]
    for policy in dict.fromkeys(r["policy"] for r in results):
        cells = [f"{100 * r['success_rate']:.0f} % [{100 * r['wilson'][0]:.0f}, {100 * r['wilson'][1]:.0f}] of "
                 f"{r['episodes']}, {r['mean_length']:.0f}" for d in domains for r in results
                 if r["policy"] == policy and r["domain"] == d]
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(args: Args):
    if missing := [p for p in args.policies if p in Args.policies and not Path(p).exists()]:
        raise FileNotFoundError(f"{', '.join(missing)}: no such checkpoint; `python train_sft.py` makes runs/sft/best, "
                                f"then `python train_rlco.py` runs/rlco/best")
    envs.check_task(args.task)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.target not in (*envs.DOMAINS, "server") or args.episodes < 1:
        raise ValueError(f"--target is one of {', '.join(envs.DOMAINS)} (envs.DOMAINS) or server, --episodes at least 1")
    if args.target == "server" and len(args.policies) != 1:
        raise ValueError("a server has one checkpoint: name it with --policies")
    policies = {name: load_policy(name, device=device) for name in args.policies}
    if args.target == "server":
        return serve(policies[args.policies[0]], args)
    names, repeat = list(dict.fromkeys(["twin", args.target])), provenance()
    seeds = range(envs.SEEDS["evaluation"], envs.SEEDS["evaluation"] + args.episodes)
    args.out.mkdir(parents=True, exist_ok=True)

    acts = {name: lambda obs, p=p: p.act(obs, sample=False).actions.cpu() for name, p in policies.items()}
    worlds = {name: envs.VecEnv(args.task, envs.DOMAINS[name], args.num_envs) for name in names}
    results = []
    for name, world in worlds.items():
        for policy, act in acts.items():
            played = world.evaluate(act, seeds, f"{policy}, {name}")
            successes = int(played["success"].sum())
            results.append(dict(policy=policy, domain=name, task=args.task, episodes=args.episodes,
                                seeds=[seeds[0], seeds[-1]], successes=successes, success_rate=successes / args.episodes,
                                wilson=wilson(successes, args.episodes), mean_length=float(played["length"].mean()),
                                success=played["success"].tolist(), length=played["length"].tolist()))
    write_json(args.out / "results.json", dict(args=json.loads(json.dumps(asdict(args), default=str)), results=results,
                                               **repeat))

    for r in results if args.videos else ():
        chosen = [seed for kind in (True, False)
                  for seed in [s for s, success in zip(seeds, r["success"]) if success == kind][:args.videos]]
        played = worlds[r["domain"]].evaluate(acts[r["policy"]], chosen, "videos", video=True)
        for seed, success, frames in zip(chosen, played["success"], played["frames"]):
            envs.write_video(args.out / f"videos/{r['policy'].strip('./').replace('/', '-')}_{r['domain']}_{seed}_"
                                        f"{'success' if success else 'failure'}.mp4", [frames])
    if args.videos:  # the last checkpoint in all domains side by side, an episode after the other
        played = [world.evaluate(acts[args.policies[-1]], seeds[:4], video=True)["frames"] for world in worlds.values()]
        longest = [max(map(len, episode)) for episode in zip(*played)]
        envs.write_video(args.out / f"{'_and_'.join(names)}.mp4", [
            [frame for frames, n in zip(column, longest) for frame in frames + frames[-1:] * (n + 5 - len(frames))]
            for column in played])
    for world in worlds.values():
        world.close()
    print(f"\n{table(results)}\n\n{args.task}, evaluation seeds {seeds[0]}..{seeds[-1]}; results.json"
          f"{' and videos' if args.videos else ''} in {args.out}")


# --------------------------------------------------------------------------------------------------------------- server
def pack_array(x):
    """msgpack's `default` for numpy arrays and scalars, as in openpi's client."""
    if isinstance(x, np.ndarray):
        return {b"__ndarray__": True, b"data": x.tobytes(), b"dtype": x.dtype.str, b"shape": x.shape}
    raise TypeError(f"{type(x).__name__} cannot be sent")


def unpack_array(x: dict):
    """msgpack's `object_hook`. frombuffer refuses object arrays, which would read foreign memory."""
    if b"__ndarray__" in x:
        return np.frombuffer(x[b"data"], np.dtype(x[b"dtype"])).reshape(x[b"shape"])
    return np.dtype(x[b"dtype"]).type(x[b"data"]) if b"__npgeneric__" in x else x


def read_obs(message: dict, instruction: str) -> dict:
    """A client's observation as a batch of one; ValueError says what is wrong with it."""
    if not isinstance(message, dict):
        raise ValueError("an observation is a dict of image, state, prompt")
    image, state = (np.asarray(message.get(key, message.get(f"observation/{key}"))) for key in ("image", "state"))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image must be uint8 [H,W,3], not {image.dtype} {list(image.shape)}")
    if state.dtype.kind not in "fiu" or state.shape != (7,) or not np.isfinite(state).all():
        raise ValueError(f"state must be 7 finite numbers, not {state.dtype} {list(state.shape)}")
    if not isinstance(prompt := message.get("prompt", instruction), str):
        raise ValueError("prompt must be a string")
    return dict(image=torch.tensor(image)[None], state=torch.tensor(state, dtype=torch.float32)[None], prompt=[prompt])


def serve(policy, args: Args):
    """Answer openpi's clients: an observation in, {"actions": float32 [C,7], physical units} out, until Ctrl-C.

    A connection has its own noise, that of `VecEnv.evaluate`: its actions depend on nothing but its own observations.
    A message that is no observation is answered with a line of text, an exception in openpi's client.
    """
    try:
        import msgpack
        from websockets.exceptions import ConnectionClosed
        from websockets.sync.server import serve as listen
    except ImportError as error:
        raise SystemExit(f"{error}: pip install -r requirements-robot.txt")
    one_at_a_time, instruction = threading.Lock(), envs.TASKS[args.task].instruction
    metadata = dict(policy=args.policies[0], prompt=instruction, chunk=policy.chunk, control_hz=envs.CONTROL_HZ)

    def infer(obs, noise):
        with one_at_a_time, torch.random.fork_rng():
            if noise is None:
                torch.manual_seed(envs.SEEDS["evaluation"])
            else:
                torch.set_rng_state(noise[0]), torch.cuda.set_rng_state_all(noise[1])
            start = time.perf_counter()
            actions = policy.act(obs, sample=False).actions[0].float().cpu().numpy()
            took = 1000 * (time.perf_counter() - start)
            return actions, took, (torch.get_rng_state(), torch.cuda.get_rng_state_all())

    def handle(client):
        client.send(msgpack.packb(metadata))
        noise = None
        try:
            for message in client:
                try:
                    obs = read_obs(msgpack.unpackb(message, object_hook=unpack_array), instruction)
                    actions, took, noise = infer(obs, noise)
                except Exception as error:  # whatever a client sends, and whatever it makes the policy do
                    client.send(f"{type(error).__name__}: {error}")
                    continue
                client.send(msgpack.packb(dict(actions=actions, server_timing=dict(infer_ms=took)), default=pack_array))
        except ConnectionClosed:
            pass  # in the middle of a message, or of an answer: nothing is lost with it

    def health(client, request):
        return client.respond(200, "OK\n") if request.path == "/healthz" else None

    with listen(handle, args.host, args.port, compression=None, max_size=1 << 26, process_request=health) as server:
        print(f"serving {args.policies[0]} on ws://{args.host}:{server.socket.getsockname()[1]}", flush=True)
        server.serve_forever()


def write_json(path: Path, content):
    path.with_suffix(".tmp").write_text(json.dumps(content, indent=1))
    os.replace(path.with_suffix(".tmp"), path)


def provenance() -> dict:
    """What else it takes to get the same numbers again."""
    try:
        commit = subprocess.run(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
                                capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        commit = ""
    return dict(commit=commit, python=platform.python_version(), device="cuda" if torch.cuda.is_available() else "cpu",
                cores=os.cpu_count(), threads=torch.get_num_threads(),
                **{name: version(name) for name in ("torch", "transformers", "mani_skill", "sapien", "numpy")})


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (ValueError, OSError) as error:
        raise SystemExit(f"eval_real.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
