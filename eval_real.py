"""Success rates of checkpoints: in the twin, in the robot's stand-in, on a real arm; and a server for any other robot.

    python eval_real.py                                              # stage I beside stage II, the defaults' checkpoints
    python eval_real.py --policies runs/real_only/best runs/sft/best runs/rlco/best --episodes 200
    python eval_real.py --target franka --robot-ip 172.16.0.2 --trials 20    # a real arm; --dry-run moves nothing
    python eval_real.py --target align                               # the camera's picture over the twin's
    python eval_real.py --target server --policies runs/rlco/best    # for any robot, through openpi's client

The stand-in is a second simulated domain that is never trained on by RL; it is not a real robot. Evaluation seeds are
disjoint from those of training, of the demonstrations and of the validation during training. The same command gives
the same numbers.
"""
import json
import math
import os
import platform
import select
import signal
import subprocess
import termios
import threading
import time
import tty
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image
from scipy.spatial.transform import Rotation

import envs
from policy import load_policy, write_file


@dataclass
class Rig:
    """A Franka arm with its hand, and one camera. Whatever moves the arm keeps these limits."""

    robot_ip: str = ""
    """address of the arm's control box"""
    camera: str = "realsense"
    """"realsense", or what OpenCV opens: a number, a device, a file, a URL"""
    camera_fov: float = 0.733
    """vertical field of view of the camera's pictures, rad (RealSense D435: 0.733); they are cropped to the twin's"""
    image_size: int = 64
    """pixels of the square picture that the policy sees: those of its demonstrations"""
    speed: float = 0.3
    """limit of the TCP's speed, m/s"""
    acceleration: float = 3.0
    """limit of its acceleration, m/s²"""
    rotation_speed: float = 1.0
    """limit of its angular speed, rad/s; the angular acceleration's is ten times as much per second"""
    max_step: float = 0.05
    """longest displacement in one action, m: a longer one stops the arm before its chunk moves anything"""
    max_turn: float = 0.2
    """largest rotation in one action, rad: the same"""
    max_tilt: float = 0.5
    """largest angle between the gripper and pointing down, rad"""
    workspace: tuple[tuple[float, float, float], tuple[float, float, float]] = envs.WORKSPACE
    """box that commanded TCP positions are kept in, m, the base frame; its bottom keeps the fingers off the table"""
    max_image_age: float = 0.5
    """seconds without a new picture, or with one that does not change, after which the arm is stopped"""
    max_silence: float = 0.5
    """seconds without news from the arm or the hand after which the connection counts as lost"""


@dataclass
class Args:
    """Evaluate checkpoints: success rate with a 95 % Wilson interval, mean episode length, videos."""

    policies: tuple[str, ...] = ("runs/sft/best", "runs/rlco/best")
    """checkpoints to compare: folders, or names on the Hub"""
    task: str = "push_cube"
    """a task of envs.py"""
    target: str = "standin"
    """where, beside the twin: a domain of envs.py (the stand-in plays the real robot); or "franka": a real arm; or
    "align": no evaluation, the camera's picture over the twin's; or "server": no evaluation, one checkpoint is served
    over openpi's websocket protocol"""
    variation: Literal[envs.VARIATIONS] | None = None
    """what is changed to something unseen in training: other objects, positions, or starting poses of the robot"""
    episodes: int = 100
    """episodes for each checkpoint and domain, the same for all of them"""
    num_envs: int = 32
    """environments in parallel, spread over the cores"""
    videos: int = 2
    """episodes of each kind, successes and failures, of each checkpoint, played once more and recorded (with other
    noise, so that some end otherwise; their names say how); 0 records nothing"""
    out: Path = Path("runs/eval")
    """folder of results.json and the videos"""
    trials: int = 10
    """franka: trials of each checkpoint"""
    dry_run: bool = False
    """franka: show what each checkpoint would command first, and move nothing"""
    rig: tyro.conf.OmitArgPrefixes[Rig] = field(default_factory=Rig)
    """franka, align"""
    host: str = "127.0.0.1"
    """address that the server listens on; only this machine can reach the default"""
    port: int = 8000
    """port that the server listens on"""


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % confidence interval of a success rate (Wilson 1927), also right near 0 and 1."""
    p = successes / n
    center, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, center - half) / (1 + z * z / n), min(1.0, (center + half) / (1 + z * z / n))  # rounding


def table(results: list[dict]) -> str:
    """Markdown: a row for each checkpoint, a column for each domain."""
    domains = list(dict.fromkeys(r["domain"] for r in results))
    simulated = set(envs.DOMAINS) - {"twin"}
    head = [d + " (not a real robot)" * (d in simulated) + ": success [95 %], steps" for d in domains]
    lines = ["| checkpoint | " + " | ".join(head) + " |", "| --- |" + " --- |" * len(domains)]
    for policy in dict.fromkeys(r["policy"] for r in results):
        cells = [f"{100 * r['success_rate']:.0f} % [{100 * r['wilson'][0]:.0f}, {100 * r['wilson'][1]:.0f}] of "
                 f"{r['episodes']}, {r['mean_length']:.0f}" for d in domains for r in results
                 if r["policy"] == policy and r["domain"] == d]
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(args: Args):
    envs.check_task(args.task)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    targets = (*envs.DOMAINS, "franka", "align", "server")
    if args.target not in targets or min(args.episodes, args.num_envs, args.trials) < 1:
        raise ValueError(f"--target is one of {', '.join(targets)}; --episodes, --num-envs and --trials are at least 1")
    if args.target == "align":
        return align(args)
    if missing := [p for p in args.policies if p in Args.policies and not Path(p).exists()]:
        raise FileNotFoundError(f"{', '.join(missing)}: no such checkpoint; `python train_sft.py` makes runs/sft/best, "
                                f"then `python train_rlco.py` runs/rlco/best")
    if args.target == "server" and len(args.policies) != 1:
        raise ValueError("a server has one checkpoint: name it with --policies")
    policies = {name: load_policy(name, device=device) for name in args.policies}
    if args.target == "server":
        return serve(policies[args.policies[0]], args)
    if args.target == "franka":
        return evaluate_franka(policies, args)
    names = list(dict.fromkeys(["twin", args.target]))
    repeat = dict(weights={name: policy.sha256() for name, policy in policies.items()}, **provenance(args))
    seeds = range(envs.SEEDS["evaluation"], envs.SEEDS["evaluation"] + args.episodes)
    args.out.mkdir(parents=True, exist_ok=True)

    acts = {name: lambda obs, p=p: p.act(obs, sample=False).actions.cpu() for name, p in policies.items()}
    fresh = lambda name: envs.VecEnv(args.task, envs.DOMAINS[name], args.num_envs, variation=args.variation)
    results = []
    for name in names:
        for policy, act in acts.items():
            # Anew for each: PhysX remembers earlier episodes in the last digits, and no result depends on its company.
            with closing(fresh(name)) as world:
                played = world.evaluate(act, seeds, f"{policy}, {name}")
            successes = int(played["success"].sum())
            results.append(dict(policy=policy, domain=name, task=args.task, episodes=args.episodes,
                                seeds=[seeds[0], seeds[-1]], successes=successes, success_rate=successes / args.episodes,
                                wilson=wilson(successes, args.episodes), mean_length=float(played["length"].mean()),
                                success=played["success"].tolist(), length=played["length"].tolist()))
    write_file(args.out / "results.json", dict(results=results, **repeat))

    if args.videos:
        worlds = {name: fresh(name) for name in names}
        for r in results:
            chosen = [seed for kind in (True, False)
                      for seed in [s for s, success in zip(seeds, r["success"]) if success == kind][:args.videos]]
            played = worlds[r["domain"]].evaluate(acts[r["policy"]], chosen, "videos", video=True)
            for seed, success, frames in zip(chosen, played["success"], played["frames"]):
                envs.write_video(args.out / f"videos/{r['policy'].strip('./').replace('/', '-')}_{r['domain']}_{seed}_"
                                            f"{'success' if success else 'failure'}.mp4", [frames])
        # the last checkpoint in all domains side by side, an episode after the other
        played = [world.evaluate(acts[args.policies[-1]], seeds[:4], video=True)["frames"] for world in worlds.values()]
        longest = [max(map(len, episode)) for episode in zip(*played)]
        envs.write_video(args.out / f"{'_and_'.join(names)}.mp4", [
            [frame for frames, n in zip(column, longest) for frame in frames + frames[-1:] * (n + 5 - len(frames))]
            for column in played])
        for world in worlds.values():
            world.close()
    what = f"{args.task}, unseen {args.variation}" if args.variation else args.task
    print(f"\n{table(results)}\n\n{what}, evaluation seeds {seeds[0]}..{seeds[-1]}; results.json"
          f"{' and videos' if args.videos else ''} in {args.out}")


# ---------------------------------------------------------------------------------------------------------- real robot
class Stopped(Exception):
    """Why the arm was stopped; it is at rest. The trial does not count."""


class Camera:
    """The newest picture of a camera, kept by a thread that also knows when the picture last changed."""

    def __init__(self, rig: Rig):
        self.rig, self.name, self.frame, self.closed = rig, rig.camera, None, False
        self.arrived = self.changed = time.monotonic()
        self.grab = self._realsense() if rig.camera == "realsense" else self._opencv()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        while self.frame is None and time.monotonic() < self.arrived + 10:
            time.sleep(0.02)
        if self.frame is None:
            raise ValueError(f"camera {self.name} sends no picture")

    def _realsense(self):
        try:
            import pyrealsense2 as rs
        except ImportError:
            raise SystemExit("a RealSense needs `pip install pyrealsense2`; or choose another --camera") from None
        pipeline, config = rs.pipeline(), rs.config()
        config.enable_stream(rs.stream.color, 640, 480, rs.format.rgb8, 30)
        try:
            pipeline.start(config)
        except RuntimeError as error:
            raise ValueError(f"no RealSense: {error}") from None
        return lambda: np.array(pipeline.wait_for_frames(1000).get_color_frame().get_data())

    def _opencv(self):
        import cv2
        video = cv2.VideoCapture(int(self.name) if self.name.isdigit() else self.name)
        if not video.isOpened():
            raise ValueError(f"OpenCV cannot open the camera {self.name}")
        # a camera waits for its next picture by itself, a file does not
        pause = 1 / (video.get(cv2.CAP_PROP_FPS) or 30) if video.get(cv2.CAP_PROP_FRAME_COUNT) > 0 else 0

        def grab():
            time.sleep(pause)
            there, frame = video.read()
            return frame[..., ::-1].copy() if there else None
        return grab

    def _watch(self):
        while not self.closed:
            try:
                frame = self.grab()
            except RuntimeError:  # a RealSense that is silent, or unplugged
                frame = None
            if frame is None:
                time.sleep(0.01)
                continue
            self.arrived = time.monotonic()
            if self.frame is None or frame.shape != self.frame.shape or (frame != self.frame).any():
                self.changed = self.arrived  # a sensor's noise changes every picture of a live camera
            self.frame = frame

    def check(self):
        now, limit = time.monotonic(), self.rig.max_image_age
        if now - self.arrived > limit:
            raise Stopped(f"camera {self.name}: no new picture for {now - self.arrived:.1f} s")
        if now - self.changed > limit:
            raise Stopped(f"camera {self.name}: the picture has been frozen for {now - self.changed:.1f} s")

    def read(self, size: int):
        """The newest picture as the twin's camera would have taken it, uint8 [size,size,3]: its square middle, no wider
        than the twin's field of view."""
        h, w = self.frame.shape[:2]
        side = min(h, w, round(h * math.tan(envs.TWIN.camera_fov / 2) / math.tan(self.rig.camera_fov / 2)))
        top, left = (h - side) // 2, (w - side) // 2
        square = Image.fromarray(self.frame[top:top + side, left:left + side])
        return np.asarray(square.resize((size, size), Image.BOX if side >= size else Image.BILINEAR))

    def close(self):
        self.closed = True
        self.thread.join(2)


class Franka:
    """A Franka FR3 or Panda with its hand that understands the twin's actions and limits. A context manager: however
    the block ends, the arm is at rest after it.

    franka-rs runs the 1 kHz loop in a thread of its own and turns targets into motions within the limits of speed and
    acceleration. Here are the targets: the twin's chain of commanded poses, at the twin's control rate.
    """

    def __init__(self, rig: Rig, camera: Camera, dry_run=False):
        try:
            import franka
        except ImportError:
            raise SystemExit("a Franka needs `pip install -r requirements-robot.txt`") from None
        if not rig.robot_ip:
            raise ValueError("--robot-ip is missing: the address of the arm's control box")
        self.rig, self.camera, self.dry_run, self.franka, self.arm = rig, camera, dry_run, franka, None
        self.box, self.closed = torch.tensor(rig.workspace), False
        self.fingers, self.pool, self.moving_fingers, self.kept_inside = None, ThreadPoolExecutor(1), None, 0
        try:
            self.robot = franka.Robot(rig.robot_ip)
            self.hand = self.robot.gripper()
            self.width = self.hand.read_once().width
        except franka.FrankaError as error:
            raise ConnectionError(f"no connection to a Franka and its hand at {rig.robot_ip}: {error}") from None
        self.hand_heard = time.monotonic()
        self.listener = threading.Thread(target=self._listen_to_hand, daemon=True)
        self.listener.start()

    def __enter__(self):
        # the arm comes to rest however the program is ended; a shell's background job begins with Ctrl-C ignored
        for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(sig, signal.default_int_handler)
        return self

    def __exit__(self, *_):
        self.stop()
        self.closed = True
        self.pool.shutdown(), self.listener.join(2)
        self.robot = self.hand = None  # hangs up: the arm talks to one program at a time

    def _listen_to_hand(self):
        try:
            while not self.closed:
                self.width, self.hand_heard = self.hand.read_once().width, time.monotonic()
        except self.franka.FrankaError:
            pass  # `watch` notices the silence

    # what the arm knows -----------------------------------------------------------------------------------------------
    def read(self):
        """franka-rs's RobotState."""
        try:
            return self.arm.state() if self.arm else self.robot.read_once()
        except self.franka.FrankaError as error:
            raise ConnectionError(f"the connection to the arm is lost: {error}") from None

    def tcp(self):
        """Measured TCP pose [1,4,4], by the twin's kinematics and not by the end effector that Desk is told of."""
        return envs.panda_kinematics(torch.tensor(self.read().q, dtype=torch.float32)[None])[0]

    def state(self):
        """The policy's state [1,7]."""
        return envs.proprioceptive_state(self.tcp(), torch.tensor([[self.width / 2 / envs.GRIPPER_OPEN * 2 - 1]]))

    def watch(self, inside=True):
        """Raise Stopped or ConnectionError, with the arm at rest, if it must not move on."""
        now = time.monotonic()
        try:
            self.camera.check()
            if self.arm:
                if not self.arm.running:
                    self._why_ended()
                if (at := self.read().time) != self.heard[0]:
                    self.heard = at, now
                if now - self.heard[1] > self.rig.max_silence:
                    raise ConnectionError(f"the arm has been silent for {now - self.heard[1]:.1f} s")
            if now - self.hand_heard > self.rig.max_silence:
                raise ConnectionError(f"the hand has been silent for {now - self.hand_heard:.1f} s")
            tcp = self.tcp()[0, :3, 3]
            if inside and self.arm and ((tcp < self.box[0] - 0.03) | (tcp > self.box[1] + 0.03)).any():
                raise Stopped(f"the TCP is outside the workspace, at {[round(x, 3) for x in tcp.tolist()]}")
        except BaseException:
            self.stop()
            raise

    def _why_ended(self):
        """Raise the reason for which the arm has ended its motion by itself."""
        arm, self.arm = self.arm, None
        try:
            arm.stop()
        except self.franka.ControlException as error:
            raise Stopped(f"the arm has stopped itself: {error}") from None
        except self.franka.FrankaError as error:
            raise ConnectionError(f"the connection to the arm is lost: {error}") from None
        raise Stopped("the arm has ended its motion")

    # motion -----------------------------------------------------------------------------------------------------------
    def recover(self):
        """Clear a reflex: the operator's decision."""
        try:
            self.robot.automatic_error_recovery()
        except self.franka.FrankaError as error:
            raise Stopped(f"the arm does not recover: {error}") from None

    def start(self):
        """Hold the present pose; actions are added to it."""
        self.stop()
        tcp = self.tcp()[0].double()
        self.position, self.rotation = tcp[None, :3, 3].float(), tcp[None, :3, :3].float()
        if self.dry_run:
            return
        rig, self.steered = self.rig, None
        try:
            # beyond these N and Nm the arm stops with a reflex; lower ones the impedance law itself would reach
            self.robot.set_collision_behavior_simple([40.0] * 7, [40.0] * 7, [40.0] * 6, [40.0] * 6)
            self.arm = self.robot.cartesian_targets(
                max_velocity=rig.speed, max_acceleration=rig.acceleration, max_jerk=100 * rig.acceleration,
                max_angular_velocity=rig.rotation_speed, max_angular_acceleration=10 * rig.rotation_speed,
                max_angular_jerk=1000 * rig.rotation_speed, max_deviation=1.5, max_angular_deviation=3.0)
            self.heard = self.arm.state().time, time.monotonic()
            # from the TCP to the frame that franka-rs steers, which depends on the end effector that Desk is told of
            self.steered = torch.linalg.inv(tcp) @ torch.tensor(self.arm.target_pose())
        except self.franka.FrankaError as error:
            self.stop()
            raise Stopped(f"the arm does not start: {error}") from None

    def stop(self):
        """Bring the arm to rest where it is; the fingers hold what they hold. Ends the control, `start` begins anew."""
        if self.arm is None:
            return
        with suppress(self.franka.FrankaError, ConnectionError):  # by itself it stops when commands stay away
            if self.steered is not None:
                self.arm.move_to(self._steer(self.tcp()[0]))
        with suppress(self.franka.FrankaError):
            self.arm.stop()
        self.arm = None  # not before: a Ctrl-C in here is followed by another stop

    def _steer(self, tcp):
        """franka-rs's target (position, quaternion) for a TCP pose [4,4]."""
        pose = (tcp.double() @ self.steered).numpy()
        return [*pose[:3, 3], *Rotation.from_matrix(pose[:3, :3]).as_quat()]

    def _send(self):
        target = torch.eye(4)
        target[:3, 3], target[:3, :3] = self.position[0], self.rotation[0]
        try:
            self.arm.move_to(self._steer(target))
        except self.franka.FrankaError:
            self._why_ended()

    def check(self, actions):
        """Raise Stopped, with the arm at rest, if one of the actions [C,7] is not to be executed."""
        actions, rig = torch.as_tensor(actions), self.rig
        steps, turns = actions[:, :3].norm(dim=-1), actions[:, 3:6].norm(dim=-1)
        why = (f"not finite: {actions.tolist()}" if not actions.isfinite().all() else
               f"a step of {steps.max():.3f} m, --max-step is {rig.max_step}" if steps.max() > rig.max_step else
               f"a turn of {turns.max():.2f} rad, --max-turn is {rig.max_turn}" if turns.max() > rig.max_turn else None)
        if why:
            self.stop()
            raise Stopped(f"refused an action: {why}")

    def step(self, action):
        """Execute one checked action [7], for one control period."""
        due = time.monotonic() + 1 / envs.CONTROL_HZ
        asked = self.position + action[None, :3]
        self.position, self.rotation = envs.move_target(self.position, self.rotation, action[None], self.box)
        self.kept_inside += bool((asked - self.position).abs().max() > 1e-6)
        if (tilt := math.acos(min(1.0, max(-1.0, -float(self.rotation[0, 2, 2]))))) > self.rig.max_tilt:
            self.stop()
            raise Stopped(f"the gripper would be tilted by {tilt:.2f} rad, --max-tilt is {self.rig.max_tilt}")
        if self.dry_run:
            target = torch.eye(4)[None]
            target[:, :3, 3], target[:, :3, :3] = self.position, self.rotation
            print("  target", *[f"{x:7.3f}" for x in envs.proprioceptive_state(target, action[None, 6:])[0].tolist()])
        else:
            self.watch()
            self._send()
            self.move_fingers(float(action[6]))
        self.rest(due)

    def rest(self, due: float, inside=True):
        """Wait until a time, watching."""
        while (left := due - time.monotonic()) > 0:
            time.sleep(min(left, 0.02))
            self.watch(inside)

    def move_fingers(self, gripper: float):
        """Send the fingers to where the twin's would go. The hand takes a command at a time, so a new one waits."""
        if self.moving_fingers and self.moving_fingers.done() and (error := self.moving_fingers.exception()):
            self.fingers = self.moving_fingers = None
            self.stop()
            raise Stopped(f"the hand: {error}")
        width = min(max(2 * envs.finger_target(gripper), 0), 2 * envs.GRIPPER_OPEN)
        width = 0 if width < 0.01 else width
        if (self.fingers is not None and abs(width - self.fingers) < 0.01) or (
                self.moving_fingers and not self.moving_fingers.done()):
            return
        self.fingers = width
        self.moving_fingers = (self.pool.submit(self.hand.move, width, 0.1) if width else  # m, m/s; grasp at any width,
                               self.pool.submit(self.hand.grasp, 0.0, 0.1, 20.0, 0.1, 0.1))  # with 20 N

    def go_to(self, position, gripper: float):
        """Take the TCP to a position [3], pointing down: up, across, down; the control ends there."""
        while self.moving_fingers and not self.moving_fingers.done():  # a busy hand would not hear of the new opening
            self.rest(time.monotonic() + 0.02, inside=False)
        self.start()
        goal, here = torch.as_tensor(position).float()[None], self.position
        height = max(float(here[0, 2]), float(goal[0, 2]), 0.2)
        up, across = here.clone(), goal.clone()
        up[0, 2] = across[0, 2] = height
        self.move_fingers(gripper)
        for start, end in ((here, up), (up, across), (across, goal)):
            self.position, self.rotation = end, envs.POINTING_DOWN[None]
            self._send()
            latest = time.monotonic() + 5 + 2 * float((end - start).norm()) / self.rig.speed
            while (self.tcp()[0, :3, 3] - end[0]).norm() > 0.02:
                if time.monotonic() > latest:
                    self.stop()
                    raise Stopped("the arm does not get to the start: something is in its way")
                self.rest(time.monotonic() + 0.02, inside=False)
        while not self.moving_fingers.done():
            self.rest(time.monotonic() + 0.02, inside=False)
        self.rest(time.monotonic() + 0.5, inside=False)
        self.stop()


class Keyboard:
    """Single keys from the terminal; a context manager. Ctrl-C stays what it is."""

    def __enter__(self):
        self.saved = termios.tcgetattr(0) if os.isatty(0) else None
        if self.saved:
            tty.setcbreak(0)
        return self

    def __exit__(self, *_):
        if self.saved:
            termios.tcsetattr(0, termios.TCSADRAIN, self.saved)

    def pressed(self) -> str:
        """The keys pressed since the last call."""
        keys = ""
        while select.select([0], [], [], 0)[0]:
            if not (key := os.read(0, 64).decode(errors="ignore")):
                raise SystemExit("no keyboard: the standard input is closed")
            keys += key
        return keys

    def ask(self, question: str, keys: str, meanwhile=lambda: time.sleep(0.02)) -> str:
        """Wait for one of `keys`, with `meanwhile` called again and again. What was typed before does not count."""
        self.pressed()
        print(question, flush=True)
        while True:
            if key := [k for k in self.pressed().replace("\r", "\n") if k in keys]:
                return key[0]
            meanwhile()


def show_overlay(camera: Camera, wanted, path: Path):
    """Live picture, blend, and the twin's render `wanted` [H,W,3] side by side, to a file that a viewer may keep open.
    Where the blend shows nothing double, the camera is aligned and the scene is as wanted."""
    live = camera.read(len(wanted))
    picture = np.concatenate([live, (live // 2 + wanted // 2), wanted], 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    Image.fromarray(picture).save(temporary)
    os.replace(temporary, path)
    time.sleep(0.2)


def get_ready(robot: Franka, keyboard: Keyboard, env, seed: int, trial: str, overlay: Path):
    """Take the arm to where the episode `seed` starts and let the operator arrange its scene. Nothing moves without a
    key, and a reflex is cleared only if the operator says so."""
    env.reset(seed=[seed])
    wanted = env.render_rgb_array()[0].cpu().numpy()
    while (mode := robot.read().robot_mode) != "idle":
        if mode != "reflex":
            keyboard.ask(f"the arm cannot be moved, its mode is {mode}: release its stop button, unlock its joints; "
                         f"then Enter", "\n")
        elif keyboard.ask("the arm is in a reflex. Is it free to move? y: recover, n: quit", "yn") == "n":
            raise SystemExit("the arm is left in its reflex")
        else:
            robot.recover()
    keyboard.ask(f"{trial}. Enter: the arm moves to its start; keep clear", "\n")
    robot.go_to(env.tcp.p[0].cpu(), env.start_gripper)
    keyboard.ask(f"arrange the scene as in {overlay}. Enter: it starts", "\n",
                 lambda: show_overlay(robot.camera, wanted, overlay))


def play(policy, robot: Franka, keyboard: Keyboard, instruction: str, max_steps: int) -> dict:
    """One trial: picture, chunk, motion, until a key ends it or the steps are over.

    The arm waits at the end of a chunk for the next one, as the twin does: a policy that is computed while the arm
    moves sees a picture from before the motion, which it was never trained on. What that costs is reported: a decision
    is late if it takes longer than a control period.
    """
    steps, thought, frames, key = 0, [], [], ""
    robot.kept_inside = 0
    robot.start()
    while steps < max_steps and not key:
        robot.watch()
        asked = time.monotonic()
        obs = dict(image=torch.tensor(robot.camera.read(robot.rig.image_size))[None], state=robot.state(),
                   prompt=[instruction])
        actions = policy.act(obs, sample=False).actions[0].float().cpu()
        thought.append(time.monotonic() - asked)
        robot.check(actions)
        for action in actions[:max_steps - steps]:
            frames.append(robot.camera.read(256))
            if key := next((k for k in keyboard.pressed() if k in "yna"), ""):
                break
            robot.step(action)
            steps += 1
    robot.stop()
    return dict(key=key, steps=steps, frames=frames, decisions=len(thought), kept_inside=robot.kept_inside,
                late=sum(t > 1 / envs.CONTROL_HZ for t in thought), decision_ms=1000 * float(np.mean(thought)),
                slowest_ms=1000 * max(thought))


def evaluate_franka(policies: dict, args: Args):
    """N trials of every checkpoint, from the same initial states, one state after the other; the operator arranges
    them and judges. Saved after every trial; started again, it goes on with the first trial that is missing."""
    path, rig, what = args.out / "franka.json", args.rig, dict(task=args.task, variation=args.variation)
    saved = json.loads(path.read_text()) if path.exists() else dict(what, weights={}, trials=[], void=[])
    seeds = range(envs.SEEDS["evaluation"], envs.SEEDS["evaluation"] + args.trials)
    if {key: saved.get(key) for key in what} != what:
        raise ValueError(f"{path} is an evaluation of {saved['task']}, variation {saved.get('variation')}: choose another "
                         f"folder with --out")
    weights = {name: policy.sha256() for name, policy in policies.items()}
    if changed := [name for name in policies if saved["weights"].get(name, weights[name]) != weights[name]]:
        raise ValueError(f"{', '.join(changed)}: not the checkpoint of the trials in {path}: choose another --out")
    saved["weights"] |= weights
    todo = [(seed, name) for seed in seeds for name in policies
            if not any((t["seed"], t["policy"]) == (seed, name) for t in saved["trials"])]
    if args.dry_run:
        todo = [(seeds[0], name) for name in policies]
    elif todo and saved["trials"]:
        print(f"{path}: {len(saved['trials'])} trials are done, {len(todo)} to go")

    def results():
        rows = []
        for name in policies:
            trials = [t for t in saved["trials"] if t["policy"] == name]
            if trials:
                wins = sum(t["success"] for t in trials)
                rows.append(dict(policy=name, domain="franka", task=args.task, episodes=len(trials), successes=wins,
                                 success_rate=wins / len(trials), wilson=wilson(wins, len(trials)),
                                 mean_length=float(np.mean([t["steps"] for t in trials]))))
        return rows

    def save():
        write_file(path, dict(saved, results=results(), **provenance(args)))

    def attempt(seed, name, number):
        """One trial; Stopped if it does not count."""
        get_ready(robot, keyboard, env, seed, number, args.out / "overlay.png")
        print("y: success, n: failure, a: abort", flush=True)
        played = play(policies[name], robot, keyboard, env.instruction, env.max_episode_steps)
        key, frames = played.pop("key"), played.pop("frames")
        if (key := key or keyboard.ask("success? y, n; a: abort, it does not count", "yna")) == "a":
            raise Stopped("aborted by the operator")
        saved["trials"].append(trial := dict(policy=name, seed=seed, success=key == "y", **played))
        save()
        envs.write_video(args.out / f"videos/{name.strip('./').replace('/', '-')}_franka_{seed}_"
                                    f"{'success' if key == 'y' else 'failure'}.mp4", [frames])
        return trial

    if todo:
        env = envs.make(args.task, envs.TWIN, video_size=512, variation=args.variation)
        with closing(Camera(rig)) as camera, Keyboard() as keyboard, Franka(rig, camera, args.dry_run) as robot:
            while todo:
                seed, name = todo[0]
                number = f"trial {seed - seeds[0] + 1} of {args.trials}, {name}"
                try:
                    if args.dry_run:
                        todo.pop(0)
                        print(f"{number}, a dry run: targets x y z, roll pitch yaw, gripper; nothing moves")
                        play(policies[name], robot, keyboard, env.instruction, policies[name].chunk)
                        continue
                    t = attempt(seed, name, number)
                    todo.pop(0)
                    said = (f"{'success' if t['success'] else 'failure'} after {t['steps']} steps; decisions took "
                            f"{t['decision_ms']:.0f} ms on average, {t['slowest_ms']:.0f} at most, {t['late']} of "
                            f"{t['decisions']} late; {t['kept_inside']} targets were kept inside the workspace")
                except Stopped as why:
                    saved["void"].append(dict(policy=name, seed=seed, why=str(why)))
                    if not args.dry_run:
                        save()
                    said = f"it does not count. {why}"
                print(f"{number}: {said}", flush=True)
    if not args.dry_run:
        late, decisions = (sum(t[key] for t in saved["trials"]) for key in ("late", "decisions"))
        print(f"\n{table(results())}\n\n{args.task}; {len(saved['void'])} attempts were stopped or aborted and do not "
              f"count; {late} of {decisions} decisions were late; {path}, videos beside it")


def align(args: Args):
    """Show the camera's picture over the twin's until Enter, to mount the camera or to correct `envs.TWIN`."""
    env, overlay = envs.make(args.task, envs.TWIN, video_size=512), args.out / "overlay.png"
    env.reset(seed=[envs.SEEDS["evaluation"]])
    wanted = env.render_rgb_array()[0].cpu().numpy()
    with closing(Camera(args.rig)) as camera, Keyboard() as keyboard:
        keyboard.ask(f"{overlay}: camera, both, twin; kept up to date until Enter", "\n",
                     lambda: show_overlay(camera, wanted, overlay))


# --------------------------------------------------------------------------------------------------------------- server
def pack_array(x):
    """msgpack's `default` for numpy arrays, as in openpi's client."""
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
        noise = None
        try:
            client.send(msgpack.packb(metadata))
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


def provenance(args: Args) -> dict:
    """What else it takes to repeat the evaluation."""
    git = lambda *command: subprocess.run(["git", "-C", Path(__file__).parent, *command], capture_output=True, text=True)
    try:
        changed = git("diff", "--quiet", "HEAD", "--", "*.py").returncode == 1
        commit = git("rev-parse", "--short", "HEAD").stdout.strip() + "-dirty" * changed
    except OSError:  # no git
        commit = ""
    args = json.loads(json.dumps(asdict(args), default=str))
    return dict(args=args, commit=commit, python=platform.python_version(), cores=len(os.sched_getaffinity(0)),
                device="cuda" if torch.cuda.is_available() else "cpu", threads=torch.get_num_threads(),
                **{name: version(name) for name in ("torch", "transformers", "mani_skill", "sapien", "numpy")})


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (ValueError, OSError) as error:
        raise SystemExit(f"eval_real.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
