"""All that knows an arm: a Franka with its hand and a camera, the limits that it keeps, trials, and recording.

    python eval_real.py franka --robot-ip 172.16.0.2    # trials of checkpoints, over `play`
    python data.py record --robot-ip 172.16.0.2         # demonstrations, over `record`

Actions, states and frames are those of the twin (envs.py). Whatever goes wrong, the arm is at rest before an error is
raised: `Stopped` ends a trial, `Disconnected` the program.
"""

import math
import os
import select
import shutil
import signal
import termios
import threading
import time
import tty
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import torch
import tyro
from PIL import Image
from scipy.spatial.transform import Rotation

import data
import envs
from checkpoints import UserError, claim, whole_file


class Stopped(Exception):
    """Why the arm was stopped; it is at rest. The trial does not count."""


class Disconnected(UserError):
    """The arm or its hand does not answer. An arm that hears nothing stops by itself."""


@dataclass
class Rig:
    """A Franka arm with its hand, and one camera. Whatever moves the arm keeps these limits."""

    robot_ip: str = ""
    """Address of the arm's control box, where Desk is opened in a browser."""
    camera: str = "realsense"
    """The camera: "realsense", or what OpenCV opens, which is a number (0 is the first), a device, a file or a URL."""
    camera_fov: float = 0.733
    """Vertical field of view of the camera's pictures, rad, which are cropped to the twin's. The default is that of
    a RealSense D435; another camera's is in its data sheet."""
    image_size: int = envs.IMAGE_SIZE
    """Side of the square pictures that are recorded, pixels. Training takes them as small as a policy sees them, not
    larger; a policy on the arm gets its own size."""
    speed: float = 0.3
    """Limit of the TCP's speed, m/s. Begin with 0.05 on an arm that has not run this yet."""
    acceleration: float = 3.0
    """Limit of the TCP's acceleration, m/s². Lower it if the arm shakes what it holds."""
    rotation_speed: float = 1.0
    """Limit of the TCP's angular speed, rad/s; that of its angular acceleration is ten times as much, rad/s²."""
    max_step: float = 0.05
    """Longest displacement in one action, m. A chunk with a longer one is refused before anything moves."""
    max_turn: float = 0.2
    """Largest rotation in one action, rad. A chunk with a larger one is refused before anything moves."""
    max_tilt: float = 0.5
    """Largest angle between the gripper and pointing down, rad; a target beyond it stops the arm."""
    workspace: tuple[tuple[float, float, float], tuple[float, float, float]] = envs.WORKSPACE
    """Box that commanded TCP positions are kept in: its lowest and its highest x y z in the base frame, m. Its bottom
    keeps the fingers off the table: give your own if your table is not at z = 0."""
    max_image_age: float = 0.5
    """Seconds without a new picture, or with one that does not change, after which the arm is stopped."""
    max_silence: float = 0.5
    """Seconds without news from the arm or its hand after which the connection counts as lost."""


# --------------------------------------------------------------------------------------------------------------- camera
class Camera:
    """The newest picture of a camera, kept by a thread that also knows when the picture last changed."""

    def __init__(self, rig: Rig):
        self.rig = rig
        self.name = rig.camera
        self.frame = None  # uint8 [H,W,3], RGB, the newest
        self.arrived = time.monotonic()  # when the newest came
        self.changed = self.arrived  # when one last differed from the one before
        self.closed = False
        self.grab = self._open_realsense() if rig.camera == "realsense" else self._open_opencv()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 10
        while self.frame is None:
            if time.monotonic() > deadline:
                raise UserError(f"camera {self.name} sends no picture")
            time.sleep(0.02)

    def _open_realsense(self) -> Callable:
        try:
            import pyrealsense2 as rs
        except ImportError:
            raise UserError("a RealSense needs `pip install pyrealsense2`; or choose another --camera") from None
        pipeline = rs.pipeline()
        config = rs.config()
        config.enable_stream(rs.stream.color, 640, 480, rs.format.rgb8, 30)
        try:
            pipeline.start(config)
        except RuntimeError as error:
            raise UserError(f"camera {self.name}: no RealSense ({error})") from None

        def grab():
            return np.array(pipeline.wait_for_frames(1000).get_color_frame().get_data())

        return grab

    def _open_opencv(self) -> Callable:
        import cv2

        video = cv2.VideoCapture(int(self.name) if self.name.isdigit() else self.name)
        if not video.isOpened():
            raise UserError(f"OpenCV cannot open the camera {self.name}")
        # A camera waits for its next picture by itself, a file does not.
        is_file = video.get(cv2.CAP_PROP_FRAME_COUNT) > 0
        pause = 1 / (video.get(cv2.CAP_PROP_FPS) or 30) if is_file else 0

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
            # The sensor's noise changes every picture of a live camera: one that stays the same is frozen.
            if self.frame is None or frame.shape != self.frame.shape or (frame != self.frame).any():
                self.changed = self.arrived
            self.frame = frame

    def check(self) -> None:
        """Raise Stopped if the picture is not one of now."""
        now = time.monotonic()
        if now - self.arrived > self.rig.max_image_age:
            raise Stopped(f"camera {self.name}: no new picture for {now - self.arrived:.1f} s")
        if now - self.changed > self.rig.max_image_age:
            raise Stopped(f"camera {self.name}: the picture has been frozen for {now - self.changed:.1f} s")

    def read(self, size: int) -> np.ndarray:
        """The newest picture as the twin's camera would have taken it, uint8 [size,size,3]: its square middle, no wider
        than the twin's field of view."""
        share = math.tan(envs.TWIN.camera_fov / 2) / math.tan(self.rig.camera_fov / 2)
        return data.square_picture(self.frame, size, share)

    def close(self) -> None:
        self.closed = True
        self.thread.join(2)


# ------------------------------------------------------------------------------------------------------------------ arm
class Hand:
    """Franka's hand. One thread keeps its width up to date and another gives it commands, which return when the fingers
    have arrived, if ever. The newest command wins: one that is under way is stopped for it. Nobody waits in here for
    longer than PATIENCE."""

    PATIENCE = 5.0  # s; its whole way takes the hand one
    FAREWELL = 2.0  # s, for what is under way at the end

    def __init__(self, gripper, franka, max_silence: float):
        self.gripper = gripper  # franka-rs's
        self.franka = franka  # the module
        self.max_silence = max_silence  # s
        self.width = gripper.read_once().width  # m, between the fingers
        self.heard = time.monotonic()  # when that came
        self.target: float | None = None  # m, the newest command; 0 is a grasp
        self.waiting = False  # whether `target` is still to be sent
        self.moving = False  # whether a command is under way
        self.error = ""  # why the newest command failed
        self.closed = False
        self.changed = threading.Condition()  # guards the five above and the one below
        self.stopper = threading.Thread()  # the last that has told the hand to stop
        # Daemons: the program can end whatever the hand does.
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.commander = threading.Thread(target=self._command, daemon=True)
        self.listener.start()
        self.commander.start()

    def _listen(self):
        try:
            while not self.closed:
                self.width = self.gripper.read_once().width
                self.heard = time.monotonic()
                with self.changed:
                    # Again and again: a stop that arrives just before its command stops nothing.
                    if self.moving and (self.waiting or self.target is None) and not self.stopper.is_alive():
                        self.stopper = threading.Thread(target=self._stop, daemon=True)
                        self.stopper.start()
        except self.franka.FrankaError:
            pass  # `check` notices the silence

    def _stop(self):
        with suppress(self.franka.FrankaError):
            self.gripper.stop()

    def _command(self):
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.closed)
                if self.closed:
                    return
                width = self.target
                self.waiting = False
                self.moving = True
            if self.stopper.ident:  # its stop was for the command before
                self.stopper.join()
            why = ""
            try:
                if width:
                    self.gripper.move(width, 0.1)  # m, m/s
                else:  # grasp with 20 N what is there, of any width
                    self.gripper.grasp(0.0, 0.1, 20.0, 0.1, 0.1)
            except self.franka.FrankaError as error:
                why = str(error)
            with self.changed:
                self.moving = False
                self.changed.notify_all()
                # A command that was stopped, for a newer one or for good, has not failed.
                if why and not self.waiting and self.target is not None:
                    self.error = why
                    self.target = None

    @property
    def busy(self) -> bool:
        return self.waiting or self.moving

    def check(self) -> None:
        """Raise Disconnected if there is no news of the hand, Stopped if the newest command failed."""
        silence = time.monotonic() - self.heard
        if silence > self.max_silence:
            raise Disconnected(f"the hand has been silent for {silence:.1f} s")
        if self.error:
            why = self.error
            self.error = ""
            raise Stopped(f"the hand: {why}")

    def move(self, opening: float) -> None:
        """Send the fingers to where the twin's would go with an action's gripper part, -1 closed .. +1 open, at once,
        whatever they are doing."""
        width = min(max(2 * envs.finger_target(opening), 0), 2 * envs.GRIPPER_OPEN)
        if width < 0.01:
            width = 0
        with self.changed:
            if self.target is None or abs(width - self.target) >= 0.01:
                self.target = width
                self.waiting = True
                self.changed.notify_all()

    def stop(self) -> None:
        """Leave the fingers where they are. What they have grasped they hold: only what is under way is stopped."""
        with self.changed:
            if self.busy:
                self.target = None
                self.waiting = False

    def close(self) -> None:
        self.stop()
        with self.changed:
            self.changed.wait_for(lambda: not self.moving, self.FAREWELL)
            self.closed = True
            self.changed.notify_all()
        for thread in (self.commander, self.listener):
            thread.join(self.FAREWELL)


class Franka:
    """A Franka FR3 or Panda with its hand that understands the twin's actions and limits. A context manager: however
    the block ends, the arm is at rest after it.

    franka-rs runs the 1 kHz loop in a thread of its own and turns targets into motions within the limits of speed and
    acceleration. Here are the targets: the twin's chain of commanded poses, at the twin's control rate.
    """

    def __init__(self, rig: Rig, camera: Camera, dry_run: bool = False):
        try:
            import franka
        except ImportError:
            raise UserError("a Franka needs `pip install -r requirements-robot.txt`") from None
        if not rig.robot_ip:
            raise UserError("--robot-ip is missing: the address of the arm's control box")
        self.rig = rig
        self.camera = camera
        self.dry_run = dry_run  # targets are printed, nothing moves
        self.franka = franka  # the module
        self.box = torch.tensor(rig.workspace)  # m, [2,3]
        # The commanded TCP pose, [1,3] (m) and [1,3,3]. As in the twin, actions add up on it, not on the measured one.
        self.position: torch.Tensor | None = None
        self.rotation: torch.Tensor | None = None
        self.kept_inside = 0  # targets that the box has changed
        self.control = None  # franka-rs's control while it runs, None while the arm is at rest
        # From the TCP to the frame that franka-rs steers, [4,4]: it depends on the end effector that Desk is told of.
        self.tcp_to_steered: torch.Tensor | None = None
        self.arm_clock = 0.0  # s, the arm's own time in its last state
        self.arm_heard = 0.0  # when that last advanced
        self.handlers = {}  # of the signals that end the program, from before
        try:
            self.robot = franka.Robot(rig.robot_ip)
            self.hand = Hand(self.robot.gripper(), franka, rig.max_silence)
        except franka.FrankaError as error:
            raise Disconnected(f"no connection to a Franka and its hand at {rig.robot_ip}: {error}") from None

    def __enter__(self):
        # The arm comes to rest however the program is ended; a shell's background job begins with Ctrl-C ignored.
        for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self.handlers[sig] = signal.signal(sig, signal.default_int_handler)
        return self

    def __exit__(self, *_):
        for sig in self.handlers:  # who presses Ctrl-C twice wants the same, sooner
            signal.signal(sig, signal.SIG_IGN)
        self.stop()
        self.hand.close()
        for sig, handler in self.handlers.items():
            signal.signal(sig, handler)
        # hang up: the arm talks to one program at a time
        self.robot = None
        self.hand = None

    # what the arm knows -----------------------------------------------------------------------------------------------
    def read(self):
        """franka-rs's RobotState."""
        try:
            return self.control.state() if self.control else self.robot.read_once()
        except self.franka.FrankaError as error:
            raise Disconnected(f"the connection to the arm is lost: {error}") from None

    def tcp(self) -> torch.Tensor:
        """Measured TCP pose [1,4,4], by the twin's kinematics and not by the end effector that Desk is told of."""
        return envs.panda_kinematics(torch.tensor(self.read().q, dtype=torch.float32)[None])[0]

    def state(self) -> torch.Tensor:
        """The policy's state [1,7]."""
        return envs.proprioceptive_state(self.tcp(), torch.tensor([[self.hand.width / 2]]))

    def watch(self, inside: bool = True) -> None:
        """Raise Stopped or Disconnected, with the arm at rest, if it must not move on. With `inside` it must not either
        when it is 3 cm outside of its workspace."""
        try:
            self.camera.check()
            if self.control:
                self._check_arm()
            self.hand.check()
            tcp = self.tcp()[0, :3, 3]
            outside = (tcp < self.box[0] - 0.03) | (tcp > self.box[1] + 0.03)
            if inside and self.control and outside.any():
                raise Stopped(f"the TCP is outside the workspace, at {[round(x, 3) for x in tcp.tolist()]}")
        except BaseException:  # Ctrl-C as well
            self.stop()
            raise

    def _check_arm(self):
        if not self.control.running:
            self._raise_why_it_ended()
        now = time.monotonic()
        clock = self.read().time
        if clock != self.arm_clock:
            self.arm_clock = clock
            self.arm_heard = now
        if now - self.arm_heard > self.rig.max_silence:
            raise Disconnected(f"the arm has been silent for {now - self.arm_heard:.1f} s")

    def _raise_why_it_ended(self) -> NoReturn:
        """The arm has ended its motion by itself: raise the reason."""
        control = self.control
        self.control = None
        try:
            control.stop()
        except self.franka.ControlException as error:
            raise Stopped(f"the arm has stopped itself: {error}") from None
        except self.franka.FrankaError as error:
            raise Disconnected(f"the connection to the arm is lost: {error}") from None
        raise Stopped("the arm has ended its motion")

    # motion -----------------------------------------------------------------------------------------------------------
    def recover(self) -> None:
        """Clear a reflex: the operator's decision."""
        try:
            self.robot.automatic_error_recovery()
        except self.franka.FrankaError as error:
            raise Stopped(f"the arm does not recover: {error}") from None

    def start(self) -> None:
        """Hold the present pose; actions are added to it."""
        self.stop()
        tcp = self.tcp().double()
        self.position = tcp[:, :3, 3].float()
        self.rotation = tcp[:, :3, :3].float()
        if self.dry_run:
            return
        rig = self.rig
        self.tcp_to_steered = None  # until the new control says where it is
        try:
            # Beyond these N and Nm the arm stops with a reflex; lower ones the impedance law itself would reach.
            self.robot.set_collision_behavior_simple([40.0] * 7, [40.0] * 7, [40.0] * 6, [40.0] * 6)
            self.control = self.robot.cartesian_targets(
                max_velocity=rig.speed,
                max_acceleration=rig.acceleration,
                max_jerk=100 * rig.acceleration,
                max_angular_velocity=rig.rotation_speed,
                max_angular_acceleration=10 * rig.rotation_speed,
                max_angular_jerk=1000 * rig.rotation_speed,
                max_deviation=1.5,
                max_angular_deviation=3.0,
            )
            self.arm_clock = self.control.state().time
            self.arm_heard = time.monotonic()
            self.tcp_to_steered = torch.linalg.inv(tcp[0]) @ torch.tensor(self.control.target_pose())
        except self.franka.FrankaError as error:
            self._give_up(f"the arm does not start: {error}")

    def stop(self) -> None:
        """Bring the arm to rest where it is; the fingers hold what they hold. Ends the control, `start` begins anew."""
        if self.control is None:
            return
        # An arm that does not hear this stops by itself, because its commands stay away.
        with suppress(self.franka.FrankaError, Disconnected):
            if self.tcp_to_steered is not None:
                self.control.move_to(self._steered_pose(self.tcp()[0]))
        with suppress(self.franka.FrankaError):
            self.control.stop()
        self.control = None  # last: a Ctrl-C in here is followed by another stop

    def _give_up(self, why: str) -> NoReturn:
        self.stop()
        raise Stopped(why)

    def _steered_pose(self, tcp: torch.Tensor) -> list[float]:
        """franka-rs's target (position, quaternion) for a TCP pose [4,4]."""
        pose = (tcp.double() @ self.tcp_to_steered).numpy()
        return [*pose[:3, 3], *Rotation.from_matrix(pose[:3, :3]).as_quat()]

    def _commanded(self) -> torch.Tensor:
        """The commanded TCP pose [1,4,4]."""
        pose = torch.eye(4)[None]
        pose[:, :3, 3] = self.position
        pose[:, :3, :3] = self.rotation
        return pose

    def _send(self):
        try:
            self.control.move_to(self._steered_pose(self._commanded()[0]))
        except self.franka.FrankaError:
            self._raise_why_it_ended()

    def check(self, actions: torch.Tensor) -> None:
        """Raise Stopped, with the arm at rest, if one of the actions [C,7] is not to be executed. `step` checks its
        own; whoever has a chunk checks all of it before its first step."""
        step = actions[:, :3].norm(dim=-1).max()
        turn = actions[:, 3:6].norm(dim=-1).max()
        if not actions.isfinite().all():
            self._give_up(f"refused an action: not finite: {actions.tolist()}")
        if step > self.rig.max_step:
            self._give_up(f"refused an action: a step of {step:.3f} m, --max-step is {self.rig.max_step}")
        if turn > self.rig.max_turn:
            self._give_up(f"refused an action: a turn of {turn:.2f} rad, --max-turn is {self.rig.max_turn}")

    def step(self, action: torch.Tensor) -> None:
        """Execute one action [7] for one control period, after `start`, within all limits; else Stopped, as `check`."""
        due = time.monotonic() + 1 / envs.CONTROL_HZ
        self.check(action[None])
        asked = self.position + action[None, :3]
        self.position, self.rotation = envs.move_target(self.position, self.rotation, action[None], self.box)
        if (asked - self.position).abs().max() > 1e-6:
            self.kept_inside += 1
        tilt = math.acos(min(1.0, max(-1.0, -float(self.rotation[0, 2, 2]))))
        if tilt > self.rig.max_tilt:
            self._give_up(f"the gripper would be tilted by {tilt:.2f} rad, --max-tilt is {self.rig.max_tilt}")
        if self.dry_run:
            finger = (action[None, 6:] + 1) / 2 * envs.GRIPPER_OPEN
            target = envs.proprioceptive_state(self._commanded(), finger)[0].tolist()
            print("  target", *[f"{x:7.3f}" for x in target])
        else:
            self.watch()
            self._send()
            self.hand.move(float(action[6]))
        self.wait(due)

    def wait(self, until: float, inside: bool = True) -> None:
        """Wait until a time (of time.monotonic), watching."""
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.02))
            self.watch(inside)

    def _wait_for_hand(self):
        latest = time.monotonic() + self.hand.PATIENCE
        while self.hand.busy:
            if time.monotonic() > latest:
                self.hand.stop()
                self._give_up(f"the hand is stuck at {1000 * self.hand.width:.0f} mm: free its fingers")
            self.wait(time.monotonic() + 0.02, inside=False)

    def go_to(self, position: torch.Tensor, opening: float) -> None:
        """Take the TCP to a position [3] (m), pointing down: up, across, down; the control ends there."""
        self.start()
        here = self.position
        goal = torch.as_tensor(position).float()[None]
        height = torch.stack([here[0, 2], goal[0, 2], torch.tensor(0.2)]).max()
        up = torch.stack([here[0, 0], here[0, 1], height])[None]
        across = torch.stack([goal[0, 0], goal[0, 1], height])[None]
        self.watch(inside=False)  # before anything moves
        self.hand.move(opening)
        for start, end in ((here, up), (up, across), (across, goal)):
            self.position = end
            self.rotation = envs.POINTING_DOWN[None]
            self._send()
            latest = time.monotonic() + 5 + 2 * float((end - start).norm()) / self.rig.speed
            while (self.tcp()[0, :3, 3] - end[0]).norm() > 0.02:
                if time.monotonic() > latest:
                    self._give_up("the arm does not get to the start: something is in its way")
                self.wait(time.monotonic() + 0.02, inside=False)
        self._wait_for_hand()
        self.wait(time.monotonic() + 0.5, inside=False)
        self.stop()


# ------------------------------------------------------------------------------------------------------------- operator
class Keyboard:
    """Single keys from the terminal; a context manager. Ctrl-C stays what it is."""

    def __init__(self):
        self.saved = termios.tcgetattr(0) if os.isatty(0) else None  # the terminal's settings, to leave it as it was

    def __enter__(self):
        if self.saved:
            tty.setcbreak(0)
        return self

    def __exit__(self, *_):
        if self.saved:
            termios.tcsetattr(0, termios.TCSADRAIN, self.saved)

    def pressed(self) -> str:
        """The keys pressed since the last call; Enter is a newline."""
        keys = b""
        while select.select([0], [], [], 0)[0]:
            typed = os.read(0, 64)
            if not typed:
                raise UserError("no keyboard: the standard input is closed")
            keys += typed
        return keys.decode(errors="ignore").replace("\r", "\n")

    def first_of(self, keys: str) -> str:
        """The first of `keys` that was pressed since the last call, or ""."""
        return next((key for key in self.pressed() if key in keys), "")

    def ask(self, question: str, keys: str, meanwhile: Callable | None = None) -> str:
        """Wait for one of `keys`, with `meanwhile` called again and again. What was typed before does not count."""
        self.pressed()
        print(question, flush=True)
        while True:
            key = self.first_of(keys)
            if key:
                return key
            if meanwhile:
                meanwhile()
            time.sleep(0.02)


def show_overlay(camera: Camera, wanted: np.ndarray, path: Path) -> None:
    """Live picture, blend, and the twin's render `wanted` [H,W,3] side by side, to a file that a viewer may keep open.
    Where the blend shows nothing double, the camera is aligned and the scene is as wanted."""
    live = camera.read(len(wanted))
    with whole_file(path) as temporary:
        Image.fromarray(np.concatenate([live, live // 2 + wanted // 2, wanted], 1)).save(temporary)
    time.sleep(0.2)  # five a second are enough


def get_ready(robot: Franka, keyboard: Keyboard, env: envs.TabletopEnv, seed: int, trial: str, overlay: Path) -> None:
    """Take the arm to where the episode `seed` starts and let the operator arrange its scene. Nothing moves without a
    key, and a reflex is cleared only if the operator says so."""
    env.reset(seed=[seed])
    wanted = env.render_rgb_array()[0].cpu().numpy()
    while (mode := robot.read().robot_mode) != "idle":
        if mode != "reflex":
            question = (
                f"the arm cannot be moved, its mode is {mode}: release its stop button, unlock its joints; then Enter"
            )
            keyboard.ask(question, "\n")
        elif keyboard.ask("the arm is in a reflex. Is it free to move? y: recover, n: quit", "yn") == "y":
            robot.recover()
        else:
            raise UserError("the arm is left in its reflex")
    keyboard.ask(f"{trial}. Enter: the arm moves to its start; keep clear", "\n")
    robot.go_to(env.tcp.p[0].cpu(), env.start_gripper)

    def refresh():
        show_overlay(robot.camera, wanted, overlay)

    keyboard.ask(f"arrange the scene as in {overlay}. Enter: it starts", "\n", refresh)


def play(policy, robot: Franka, keyboard: Keyboard, instruction: str, max_steps: int) -> dict:
    """One trial: picture, chunk, motion, until one of the keys y, n, a ends it or the steps are over -> key ("" if none
    did), steps, frames (of the camera, one a control step), and how fast the policy decided.

    The arm waits at the end of a chunk for the next one, as the twin does: a policy that is computed while the arm
    moves sees a picture from before the motion, which it was never trained on. What that costs is reported: a decision
    is late if it takes longer than a control period.
    """
    key = ""
    steps = 0
    frames = []
    seconds = []  # that each decision took
    robot.kept_inside = 0
    robot.start()
    while steps < max_steps and not key:
        robot.watch()
        asked = time.monotonic()
        image = torch.tensor(robot.camera.read(policy.image_size))[None]
        obs = dict(image=image, state=robot.state(), prompt=[instruction])
        actions = policy.act(obs, sample=False).actions[0].float().cpu()
        seconds.append(time.monotonic() - asked)
        robot.check(actions)
        for action in actions[: max_steps - steps]:
            frames.append(robot.camera.read(256))
            key = keyboard.first_of("yna")
            if key:
                break
            robot.step(action)
            steps += 1
    robot.stop()
    late = sum(s > 1 / envs.CONTROL_HZ for s in seconds)
    speed = dict(late=late, decision_ms=1000 * float(np.mean(seconds)), slowest_ms=1000 * max(seconds))
    played = dict(key=key, steps=steps, frames=frames, kept_inside=robot.kept_inside)
    return dict(played, decisions=len(seconds), **speed)


# ------------------------------------------------------------------------------------------------------------ recording
@dataclass
class RecordArgs:
    """Record demonstrations with a real Franka into a LeRobot dataset, for `train_sft.py --real`.

    By keyboard: w s forward and back, a d left and right, r f up and down, q e turn; hold a key to keep moving. By
    hand: unlock the joints with the buttons on the arm and guide it. In either case space closes and opens the hand,
    Enter ends a demonstration and keeps it, x drops it. What was kept is on disk at once; the same command goes on.
    """

    rig: tyro.conf.OmitArgPrefixes[Rig] = field(default_factory=Rig)
    """The arm, the camera, and limits that every motion keeps."""
    task: str = "push_cube"
    """A task of envs.py: its instruction, and the initial states to arrange."""
    held_out: bool = False
    """Record demonstrations for `--real-val`: their initial states are others than those for training."""
    out: Path | None = None
    """The dataset; it appears when all demonstrations are there (default: demos/TASK-real, or demos/TASK-real-val)."""
    episodes: int = 50
    """Demonstrations to record, those of an interrupted call included. The results here are from 50."""
    by: Literal["keyboard", "spacemouse", "hand"] = "keyboard"
    """What leads the arm: keys, a SpaceMouse (which needs `pip install pyspacemouse`), or your hand on the arm."""
    pace: float = 0.1
    """Speed of the keyboard, and full speed of the SpaceMouse, m/s; turning is five times as much, in rad/s."""
    debug: bool = False
    """Show the traceback of an error in the input, too."""


# the axis of an action that a key moves, and which way
STEER = {"w": (0, 1), "s": (0, -1), "a": (1, 1), "d": (1, -1), "r": (2, 1), "f": (2, -1), "q": (5, 1), "e": (5, -1)}


def motion_between(tcp: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
    """The first six numbers of the action that takes one TCP pose [1,4,4] to another: the inverse of
    `envs.move_target`."""
    turn = envs.matrix_to_euler_angles(later[:, :3, :3] @ tcp[:, :3, :3].mT, "ZYX").flip(-1)
    return torch.cat([later[:, :3, 3] - tcp[:, :3, 3], turn], -1)[0]


def steered_motion(keys: str, mouse, pace: float) -> torch.Tensor:
    """The first six numbers of the action that keys, or a SpaceMouse if there is one, ask for at `pace` (m/s)."""
    step = pace / envs.CONTROL_HZ  # m a control step; five times as much in rad
    move = torch.zeros(6)
    for axis, sign in {STEER[key] for key in keys if key in STEER}:  # a set: a key that repeats moves once
        move[axis] = sign * step * (5 if axis > 2 else 1)
    if mouse:
        for _ in range(100):  # the reports since the last step, of which the last one counts
            report = mouse.read()
        move[:3] = torch.tensor([report.x, report.y, report.z]) * step
        move[3:] = torch.tensor([report.roll, report.pitch, report.yaw]) * step * 5
    return move


def demonstrate_by_operator(robot: Franka, keyboard: Keyboard, args: RecordArgs, opening: float, mouse) -> dict | None:
    """One demonstration at the control rate, beginning with the first motion -> image, state, action as
    `data.DatasetWriter` takes them; None if the operator drops it. `opening`: the hand's at the start, -1 or 1."""
    image, state, action = [], [], []
    guided = args.by == "hand"
    if not guided:
        robot.start()
    while True:
        keys = keyboard.pressed()
        if "\n" in keys:
            break
        if "x" in keys:
            robot.stop()
            return None
        toggled = keys.count(" ") % 2
        if toggled:
            opening = 1.0 if opening < -0.5 else -1.0
        # what is seen, before what is done
        seen = robot.camera.read(args.rig.image_size)
        tcp = robot.tcp()
        due = time.monotonic() + 1 / envs.CONTROL_HZ
        proprioception = robot.state()[0]
        if guided:
            robot.hand.move(opening)
            robot.wait(due)
            motion = motion_between(tcp, robot.tcp())
            moved = motion[:3].norm() > 0.001 or motion[3:].norm() > 0.01
        else:
            motion = steered_motion(keys, mouse, args.pace)
            moved = motion.any()
        move = torch.cat([motion, torch.tensor([opening])])
        if not guided:
            robot.step(move)
        if image or moved or toggled:
            image.append(seen)
            state.append(proprioception.numpy())
            action.append(move.numpy())
    robot.stop()
    return dict(image=np.stack(image), state=np.stack(state), action=np.stack(action)) if image else None


def record(args: RecordArgs) -> None:
    """Record until there are `args.episodes` demonstrations. Each is kept in OUT.parts until the dataset is whole."""
    envs.require_task(args.task)
    out = args.out or data.demos_path(args.task, "real", args.held_out)
    if out.exists():
        raise UserError(f"{out} exists already: delete it, or choose another folder")
    parts = out.with_name(f"{out.name}.parts")
    claim(parts)

    def kept():
        return sorted(parts.glob("[0-9]*.npz"))

    mouse = open_spacemouse() if args.by == "spacemouse" else None
    if len(kept()) < args.episodes:
        env = envs.make(args.task, envs.TWIN, video_size=512)
        first_seed = envs.SEEDS["real_val" if args.held_out else "real_demos"]
        with closing(Camera(args.rig)) as camera, Keyboard() as keyboard, Franka(args.rig, camera) as robot:
            while len(kept()) < args.episodes:
                n = len(kept())
                title = f"demonstration {n + 1} of {args.episodes}"
                try:
                    get_ready(robot, keyboard, env, first_seed + n, title, parts / "overlay.png")
                    print("Enter: done, keep it; x: drop it", flush=True)
                    episode = demonstrate_by_operator(robot, keyboard, args, env.start_gripper, mouse)
                except Stopped as why:
                    print(f"dropped. {why}", flush=True)
                    continue
                if episode is None:
                    print("dropped", flush=True)
                    continue
                with whole_file(parts / f"{n:04d}.npz") as temporary:
                    np.savez(temporary, prompt=env.instruction, seed=first_seed + n, **episode)
                print(f"kept, {len(episode['action'])} steps", flush=True)
    data.write_dataset(out, (np.load(path) for path in kept()), envs.CONTROL_HZ)
    print(f"{out}: {len(kept())} demonstrations; look at them: python data.py show {out}")
    shutil.rmtree(parts)


def open_spacemouse():
    try:
        import pyspacemouse

        return pyspacemouse.open(axis_convention=pyspacemouse.AxisConvention.ROS)  # x forward, y left, z up
    except (ImportError, RuntimeError) as error:
        raise UserError(f"no SpaceMouse: {error} (pip install pyspacemouse)") from None
