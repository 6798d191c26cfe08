"""The twins: Franka tabletop tasks in ManiSkill, what they look like and how they move, and many of them in parallel.

    python envs.py show             # a picture of every task, in the twin and in the stand-in (or in random domains)
    python envs.py demonstrators    # success and length of the scripted demonstrators

World frame = robot base frame: x forward, y left, z up, the table's surface at z = 0. Units are metres and radians.
In shapes, B is the number of environments, C the control steps in a chunk, and H, W are pixels.
"""

import os

# Each process renders on its own core: two software rasterisers on all cores fight.
os.environ.setdefault("LP_NUM_THREADS", "1")
import colorsys
import copy
import gc
import hashlib
import multiprocessing as mp
import re
import signal
import subprocess
import sys
import traceback
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import sapien
import torch
from gymnasium import spaces
from mani_skill import PACKAGE_ASSET_DIR
from mani_skill.agents.controllers.base_controller import BaseController, ControllerConfig
from mani_skill.agents.robots import Panda
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.render import PREBUILT_SHADER_CONFIGS, ShaderConfig
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils import sapien_utils
from mani_skill.utils.geometry.rotation_conversions import euler_angles_to_matrix, matrix_to_euler_angles
from mani_skill.utils.structs import Actor, Articulation, Link, Pose
from mani_skill.utils.structs.types import SceneConfig, SimConfig
from torch import Tensor
from tqdm import tqdm

from checkpoints import HANGS, UserError, one_line_errors, write_file
from machines import find_renderer

CONTROL_HZ = 10
IMAGE_SIZE = 64  # pixels, height and width of what policies see
# Every use of the environments has its own seeds, a million apart: nothing is ever evaluated on what it was trained on.
# RL is the last: it takes ten thousand an iteration, ten million a training seed.
SEEDS = dict(
    twin_demos=1_000_000,
    real_demos=2_000_000,
    real_val=3_000_000,
    validation=4_000_000,
    evaluation=5_000_000,
    domains=6_000_000,  # random ones, and the demonstrations in them
    final=7_000_000,  # evaluation again, for a plan that was made before (results/PLAN.md)
    rl=10_000_000,
)


def rl_seed(seed: int, iteration: int) -> int:
    """First episode of an iteration of RL; seeds of 420 and more begin anew, as numpy's generators end at 2^32."""
    return SEEDS["rl"] + (seed * 10_000_000 + iteration * 10_000) % 4_200_000_000


# ---- domains ----------------------------------------------------------------------------------------------------

Vector = tuple[float, float, float]


# fmt: off
@dataclass(frozen=True)
class Domain:
    """What a world looks like and how it moves. Tasks know nothing of it: a new domain is one `replace(TWIN, ...)`.

    Colours are linear RGB in 0..1, light directions point from the light into the scene.
    """

    name: str
    # looks
    camera_eye: Vector = (0.88, 0.56, 0.52)
    camera_target: Vector = (0.49, 0.0, 0.03)
    camera_fov: float = 0.52  # rad, vertical
    ambient: Vector = (0.45, 0.45, 0.45)
    light_direction: Vector = (-0.5, 0.6, -1.0)
    light_color: Vector = (1.0, 1.0, 1.0)
    table_colors: tuple[Vector, ...] = ((0.60, 0.46, 0.32),)  # one per plank, repeated over the table
    background: Vector = (0.75, 0.78, 0.80)
    robot_color: Vector = (0.90, 0.90, 0.90)
    object_color: Vector = (0.05, 0.15, 0.70)
    goal_color: Vector = (0.80, 0.05, 0.05)
    image_noise: float = 0.0  # std of the camera's noise, grey levels of 255
    # dynamics
    friction: float = 0.6  # of the objects and the table
    object_mass: float = 0.10  # kg
    stiffness: float = 1000.0  # N m / rad, of the arm's joint drives
    damping: float = 100.0  # N m s / rad
    action_delay: int = 0  # control steps between a command and its execution


TWIN = Domain("twin")
# Stands in for the real robot. Fixed before any policy was trained, and no knob of any experiment. Every value is
# what a careful lab leaves between a twin and its robot: a camera re-mounted by hand (7 cm, a few degrees, another
# lens), a lamp from the other side with a warm tint, a darker planked table and another wall, paint that differs in
# shade, a noisy sensor; objects twice as heavy on a smoother table, a softer arm, one control step of latency.
STANDIN = Domain(
    "standin", camera_eye=(0.83, 0.60, 0.50), camera_target=(0.50, 0.01, 0.03), camera_fov=0.55,
    ambient=(0.35, 0.33, 0.30), light_direction=(-0.3, -0.8, -1.0), light_color=(1.0, 0.9, 0.75),
    table_colors=((0.30, 0.26, 0.24), (0.36, 0.31, 0.28)), background=(0.35, 0.40, 0.36),
    robot_color=(0.75, 0.76, 0.78), object_color=(0.03, 0.32, 0.55), goal_color=(0.75, 0.22, 0.03), image_noise=5.0,
    friction=0.4, object_mass=0.2, stiffness=600.0, damping=80.0, action_delay=1)
# Two more gaps, for the question when the anchor pays: about half of the stand-in's, and about twice.
MILD = replace(
    TWIN, name="mild", camera_eye=(0.855, 0.58, 0.51), camera_fov=0.535, ambient=(0.40, 0.39, 0.38),
    light_direction=(-0.4, 0.2, -1.0), light_color=(1.0, 0.95, 0.9), table_colors=((0.48, 0.38, 0.28),),
    background=(0.60, 0.64, 0.62), object_color=(0.04, 0.22, 0.62), goal_color=(0.78, 0.12, 0.04), image_noise=2.0,
    friction=0.5, object_mass=0.15, stiffness=800.0, damping=90.0)
STRONG = replace(
    STANDIN, name="strong", camera_eye=(0.76, 0.66, 0.47), camera_target=(0.51, 0.02, 0.03), camera_fov=0.58,
    ambient=(0.22, 0.20, 0.17), table_colors=((0.12, 0.14, 0.20), (0.22, 0.22, 0.28)), background=(0.15, 0.18, 0.16),
    robot_color=(0.55, 0.57, 0.62), object_color=(0.02, 0.48, 0.38), goal_color=(0.65, 0.42, 0.02), image_noise=9.0,
    friction=0.3, object_mass=0.3, stiffness=400.0, damping=65.0, action_delay=2)
DOMAINS = {d.name: d for d in (TWIN, STANDIN, MILD, STRONG)}
# fmt: on


def target_domain(name: str) -> Domain:
    """The domain that plays the robot; UserError if there is none of that name, or it is the twin."""
    targets = [domain for domain in DOMAINS if domain != TWIN.name]
    if name not in targets:
        raise UserError(f"no domain '{name}' can play the robot: choose one of {', '.join(targets)} (envs.DOMAINS)")
    return DOMAINS[name]


def random_domain(seed: int) -> Domain:
    """One of the table-top labs there could be, as different as labs are: what a pretrained policy has seen many of.

    The ranges were fixed before any policy was trained on them. They are a lab's, not drawn around the twin or the
    stand-in: a camera that looks from the front or the left at half a metre of table, any lamp, wall and table, objects
    and goals of any two colours that differ, what objects weigh and how they slide, arms from soft to stiff.
    """
    rng = np.random.default_rng(seed)

    def color(hue, saturation, value):
        return colorsys.hsv_to_rgb(hue % 1, rng.uniform(*saturation), rng.uniform(*value))

    target = rng.uniform((0.45, -0.04, 0.0), (0.53, 0.04, 0.06))
    distance = rng.uniform(0.65, 1.15)  # m
    azimuth, elevation = np.radians(rng.uniform((25, 22), (90, 50)))  # the drawer's handle is seen from here alone
    level = np.array([np.cos(azimuth), np.sin(azimuth), 0])
    eye = target + distance * (np.cos(elevation) * level + np.sin(elevation) * np.array([0, 0, 1]))
    in_view = rng.uniform(0.44, 0.60)  # m, height of the picture at the target
    lamp, lamp_elevation = np.radians(rng.uniform((0, 35), (360, 85)))
    table = color(rng.random(), (0.0, 0.5), (0.08, 0.75))
    planks = np.clip(np.array(table) * rng.uniform(0.7, 1.3), 0, 1)
    object_hue = rng.random()
    stiffness = np.exp(rng.uniform(np.log(400), np.log(1500)))
    return Domain(
        f"random{seed}",
        camera_eye=tuple(eye),
        camera_target=tuple(target),
        camera_fov=2 * np.arctan(in_view / 2 / distance),
        ambient=color(rng.random(), (0.0, 0.2), (0.15, 0.55)),
        light_direction=(np.cos(lamp), np.sin(lamp), -np.tan(lamp_elevation)),
        light_color=color(rng.random(), (0.0, 0.3), (0.6, 1.1)),
        table_colors=(table, tuple(planks)) if rng.random() < 0.4 else (table,),
        background=color(rng.random(), (0.0, 0.3), (0.1, 0.85)),
        robot_color=(rng.integers(3, 11) / 10,) * 3,  # in steps: every paint is a file of its own
        object_color=color(object_hue, (0.7, 1.0), (0.3, 0.9)),
        goal_color=color(object_hue + rng.uniform(0.2, 0.8), (0.7, 1.0), (0.3, 0.9)),
        image_noise=rng.uniform(0, 10),
        friction=rng.uniform(0.3, 0.9),
        object_mass=rng.uniform(0.05, 0.3),
        stiffness=stiffness,
        damping=np.sqrt(10 * stiffness) * rng.uniform(0.85, 1.2),
        action_delay=int(rng.integers(0, 3)),
    )


def random_twin(seed: int) -> Domain:
    """The twin, changed towards a random domain, at most half of the way: for RL in randomised twins."""
    other = random_domain(seed)
    share = np.random.default_rng((seed, 1)).uniform(0, 0.5)

    def between(a, b):
        if isinstance(a, tuple):
            return tuple(between(x, y) for x, y in zip(a, b))
        return a + share * (b - a)

    mixed = {f.name: between(getattr(TWIN, f.name), getattr(other, f.name)) for f in fields(Domain) if f.name != "name"}
    mixed["robot_color"] = tuple(round(c, 1) for c in mixed["robot_color"])  # few files, as above
    mixed["action_delay"] = round(mixed["action_delay"])
    return Domain(f"twin{seed}", **mixed)


# What generalisation is tested on (the paper's spirit), never seen in training: another shape, size and colour; places
# around the training area; starting poses of the robot around the training box.
VARIATIONS = ("objects", "positions", "robot")
UNSEEN_COLOR = (0.10, 0.45, 0.08)


# ---- robot ------------------------------------------------------------------------------------------------------

# Franka Emika Panda, modified Denavit-Hartenberg parameters (a, d, alpha) of joints 1..7, from Franka's FCI manual.
PANDA_DH = (
    (0, 0.333, 0),
    (0, 0, -np.pi / 2),
    (0, 0.316, np.pi / 2),
    (0.0825, 0, np.pi / 2),
    (-0.0825, 0.384, -np.pi / 2),
    (0, 0, np.pi / 2),
    (0.088, 0, np.pi / 2),
)
FLANGE_TO_TCP = 0.107 + 0.1034  # m, along the flange's z; the hand is mounted turned by -45 degrees
HOME = (0, np.pi / 8, 0, -np.pi * 5 / 8, 0, np.pi * 3 / 4, np.pi / 4)  # rad, elbow up, away from the joints' limits
WORKSPACE = ((0.20, -0.40, 0.012), (0.80, 0.40, 0.60))  # m, box for commanded TCP positions; finger tips are 1 cm below
GRIPPER_OPEN = 0.04  # m, per finger
POINTING_DOWN = torch.tensor([[1.0, 0, 0], [0, -1, 0], [0, 0, -1]])  # TCP axes in the base frame: rotation "zero"


def _dh_constants() -> tuple[Tensor, Tensor]:
    """The part of each joint's transform that does not move, [7,4,4], and the TCP in frame 7, [4,4]."""
    fixed = torch.zeros(7, 4, 4)
    for i, (a, d, alpha) in enumerate(PANDA_DH):
        # In the modified convention a and alpha come before the joint's own turn. The shift d along its axis, which
        # comes after, commutes with that turn: so all of them are constants in front of it.
        c = np.cos(alpha)
        s = np.sin(alpha)
        fixed[i] = torch.tensor([[1, 0, 0, a], [0, c, -s, -d * s], [0, s, c, d * c], [0, 0, 0, 1]])
    tcp = torch.eye(4)
    tcp[:2, :2] = torch.tensor([[1.0, 1.0], [-1.0, 1.0]]) / 2**0.5
    tcp[2, 3] = FLANGE_TO_TCP
    return fixed, tcp


DH_FIXED, DH_TCP = _dh_constants()


def panda_kinematics(q: Tensor) -> tuple[Tensor, Tensor]:
    """Forward kinematics and geometric Jacobian. q [B,7] (rad) -> TCP pose [B,4,4], Jacobian [B,6,7], base frame."""
    rotation = torch.eye(4, device=q.device).repeat(*q.shape, 1, 1)  # about z, [B,7,4,4]
    rotation[..., 0, 0] = rotation[..., 1, 1] = q.cos()
    rotation[..., 1, 0] = q.sin()
    rotation[..., 0, 1] = -rotation[..., 1, 0]
    local = DH_FIXED.to(q.device) @ rotation
    frames = [local[:, 0]]
    for i in range(1, 7):
        frames.append(frames[-1] @ local[:, i])
    tcp = frames[-1] @ DH_TCP.to(q.device)
    frames = torch.stack(frames, 1)
    # A joint turns about the z axis of its frame, and moves the TCP by axis x lever.
    axis = frames[..., :3, 2]
    lever = tcp[:, None, :3, 3] - frames[..., :3, 3]
    return tcp, torch.cat([torch.linalg.cross(axis, lever), axis], -1).mT


def inverse_kinematics(q: Tensor, position: Tensor, rotation: Tensor, iterations: int = 1) -> Tensor:
    """Damped least-squares steps from q [B,7] towards a TCP position [B,3] and rotation [B,3,3] or [3,3] -> q [B,7].

    One step a control step is enough while the target moves by centimetres; the residual is made up in the next one.
    """
    for _ in range(iterations):
        tcp, jacobian = panda_kinematics(q)
        error = rotation @ tcp[:, :3, :3].mT  # rotation still to do, in the base frame
        # Its antisymmetric part is axis * sin(angle): close to the rotation vector while the angle is small.
        skew = error - error.mT
        turn = torch.stack([skew[:, 2, 1], skew[:, 0, 2], skew[:, 1, 0]], -1) / 2
        task_error = torch.cat([position - tcp[:, :3, 3], turn], -1)
        # The damping keeps steps finite at singularities, where J J^T cannot be inverted.
        damped = jacobian @ jacobian.mT + 1e-4 * torch.eye(6, device=q.device)
        q = q + (jacobian.mT @ torch.linalg.solve(damped, task_error[..., None]))[..., 0]
    return q


def move_target(position: Tensor, rotation: Tensor, action: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
    """Where an action [B,7] takes a commanded TCP pose, position [B,3] and rotation [B,3,3], inside `box` [2,3]."""
    position = torch.minimum(torch.maximum(position + action[:, :3], box[0]), box[1])
    if action[:, 3:6].any():
        rotation = euler_angles_to_matrix(action[:, 3:6].flip(-1), "ZYX") @ rotation
    return position, rotation


def finger_target(gripper: float | Tensor) -> float | Tensor:
    """Where an action's gripper part (-1 .. +1) sends each finger (m): 1 cm past closed is what makes a grasp hold."""
    return (gripper + 1) / 2 * (GRIPPER_OPEN + 0.01) - 0.01


def proprioceptive_state(tcp: Tensor, finger: Tensor) -> Tensor:
    """TCP pose [B,4,4] in the base frame and a finger's position [B,1] (m, 0 is closed) -> state [B,7]: TCP x y z (m),
    roll pitch yaw (rad) from pointing down, gripper from -1 (closed) to +1 (open)."""
    turn = matrix_to_euler_angles(tcp[:, :3, :3] @ POINTING_DOWN.to(tcp.device).mT, "ZYX").flip(-1)
    opening = finger / GRIPPER_OPEN * 2 - 1
    return torch.cat([tcp[:, :3, 3], turn, opening.clip(-1, 1)], -1)


class DeltaPoseController(BaseController):
    """Action [B,7] = Δx Δy Δz (m), Δroll Δpitch Δyaw (rad), gripper (-1 closed .. +1 open), robot base frame.

    Deltas add up on the last commanded pose and not on the measured one (ManiSkill's `pd_ee_target_delta_pose`): what
    a chunk does then depends on the chunk alone, as on a real arm. ManiSkill's own controller takes 2.2 ms a control
    step on a CPU, most of it in quaternion code; this one keeps joint targets and moves them by the Jacobian.
    """

    sets_target_qpos = True  # ManiSkill asks which targets it has to send to a GPU's physics
    sets_target_qvel = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        b = self.scene.num_envs
        self.bound = torch.as_tensor(self.single_action_space.high, device=self.device)
        self.box = torch.tensor(WORKSPACE, device=self.device)
        # what is commanded; the arm follows some steps behind
        self.q_target = torch.zeros(b, 7, device=self.device)  # rad
        self.position = torch.zeros(b, 3, device=self.device)  # m, of the TCP
        self.rotation = torch.zeros(b, 3, 3, device=self.device)
        self.targets = torch.zeros(b, 9, device=self.device)  # what the drives were last sent to
        self.beginning = torch.arange(b, device=self.device)  # rows that `reset` is for

    def _initialize_action_space(self):
        high = np.float32([0.1] * 3 + [0.5] * 3 + [1.0])  # m, rad: beyond it nobody commands on purpose in 0.1 s
        self.single_action_space = spaces.Box(-high, high)

    def set_drive_property(self):
        stiffness = [self.config.stiffness] * 7 + [1000.0] * 2
        damping = [self.config.damping] * 7 + [100.0] * 2
        for joint, k, d in zip(self.joints, stiffness, damping):
            joint.set_drive_properties(k, d, force_limit=100.0, mode="force")

    def reset(self):
        # ManiSkill calls this for all scenes when some of them begin anew: the others keep what they were commanded.
        rows = self.beginning
        self.q_target[rows] = self.qpos[rows, :7]
        tcp, _ = panda_kinematics(self.q_target[rows])
        self.position[rows] = tcp[:, :3, 3]
        self.rotation[rows] = tcp[:, :3, :3]

    def set_action(self, action):
        self.set_targets(joint_targets([self], action[:, None])[:, 0])

    def set_targets(self, targets: Tensor) -> None:
        """Send the drives to `targets` [B,9]: seven joints (rad), two fingers (m)."""
        self.targets = targets
        if self.scene.gpu_sim_enabled:
            self.articulation.set_joint_drive_targets(targets, self.joints, self.active_joint_indices)
            self.scene.px.gpu_apply_articulation_target_position()
        else:  # ManiSkill would make a tensor of each number, and of that an array
            for joint, target in zip(self.joints, targets[0].tolist()):
                joint._objs[0].set_drive_target(target)


def joint_targets(controllers: Sequence[DeltaPoseController], actions: Tensor) -> Tensor:
    """What chunks of actions [B,C,7] command, `DeltaPoseController.set_targets` of each control step: [B,C,9].

    It depends on what was commanded before, and not on how far the arms have followed: so it is known before anything
    moves, and computed for all worlds of a process at once. A controller has as many rows as its scene has worlds.
    """
    q = torch.cat([controller.q_target for controller in controllers])
    position = torch.cat([controller.position for controller in controllers])
    rotation = torch.cat([controller.rotation for controller in controllers])
    bound = controllers[0].bound
    targets = []
    for action in actions.unbind(1):
        action = torch.minimum(torch.maximum(action, -bound), bound)
        position, rotation = move_target(position, rotation, action, controllers[0].box)
        q = inverse_kinematics(q, position, rotation)
        targets.append(torch.cat([q, finger_target(action[:, 6:]).expand(-1, 2)], -1))
    sizes = [len(controller.q_target) for controller in controllers]
    for controller, *rows in zip(controllers, q.split(sizes), position.split(sizes), rotation.split(sizes)):
        controller.q_target, controller.position, controller.rotation = rows
    return torch.stack(targets, 1)


@dataclass
class DeltaPoseControllerConfig(ControllerConfig):
    stiffness: float
    damping: float
    controller_cls = DeltaPoseController


class TwinPanda(Panda):
    """ManiSkill's Panda with the domain's paint and drives, moved by `DeltaPoseController`."""

    uid = "rlco_panda"

    def __init__(self, scene, domain: Domain, film: bool):
        self.domain = domain
        if not film:
            self.urdf_path = lowpoly_urdf(domain.robot_color)
        super().__init__(scene, CONTROL_HZ, initial_pose=sapien.Pose())

    @property
    def _controller_configs(self):
        joints = self.arm_joint_names + self.gripper_joint_names
        return dict(delta_pose=DeltaPoseControllerConfig(joints, self.domain.stiffness, self.domain.damping))


# ---- environment ------------------------------------------------------------------------------------------------


class TabletopEnv(BaseEnv):
    """What all tasks share: robot, table, camera, light, observation, chunk stepping. Batched, for ManiSkill's GPU
    simulation too, where it was not run.

    A task is a subclass with two attributes and five methods: those of "the contract" below.
    """

    # the contract -----------------------------------------------------------------------------------------------------
    instruction: str  # the prompt
    max_episode_steps: int  # control steps; at least 95 % of the demonstrations, twin or stand-in, are shorter

    def _load_objects(self) -> None:
        """Build the task's objects, once a scene: `make_object`, `make_box`, `add_box`, ManiSkill's builders. What a
        task keeps beside them is a tensor [num_envs, ...]."""
        raise NotImplementedError

    def _place_objects(self, env_idx: Tensor) -> None:
        """Set the initial poses of the objects in the b environments `env_idx` [b] (a `set_pose` sets those alone). All
        chance comes from `sample_positions`: then the episode's seed decides it, and positions can be unseen ones."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, Tensor]:
        """-> dict(success=bool [B]): is the task done now? It ends the episode. As `potential`, it is computed for
        worlds of several domains at once, and knows nothing of these."""
        raise NotImplementedError

    def potential(self) -> Tensor:
        """How far the task has come, float32 [B], 0 .. 0.75 in the tasks here. Its change is the reward, beside 1 for
        success."""
        raise NotImplementedError

    def demonstrator(self, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Yields the action, float32 [7], of each control step of an episode; it sees the state of the simulation, and
        goes on till nobody asks. All chance comes from `rng`. For one environment (B = 1); see `Teleoperator`."""
        raise NotImplementedError

    # a task may have its own
    start_gripper = 1.0  # opening at the start of an episode, -1 .. +1
    start_tcp = ((0.34, -0.05, 0.14), (0.42, 0.05, 0.20))  # m, box that the TCP starts in

    def __init__(
        self,
        domain: Domain = TWIN,
        variation: str | None = None,
        image_size: int = IMAGE_SIZE,
        film: bool = False,
        video_size: int = 256,
        render: str = "auto",
        **kwargs,
    ):
        """`variation`: one of VARIATIONS. `film`: for people: the robot as it looks, shadows, a camera
        that sees it and the table; many times slower to render on a CPU. Physics and tasks are the same.
        `render`: where pictures are rendered, as `find_renderer` takes it.
        `kwargs` are ManiSkill's (num_envs, sim_backend, render_backend, ...)."""
        self.domain = domain
        self.variation = variation
        self.image_size = image_size  # pixels, of what policies see
        self.film = film
        self.video_size = video_size  # pixels, of what people see
        self._common = None  # names of what every task has; all others are a task's own
        defaults = dict(obs_mode="rgb", reward_mode="dense", render_mode="rgb_array", robot_uids=None)
        super().__init__(**{**defaults, "render_backend": find_renderer(render), **kwargs})

    # ManiSkill's hooks ------------------------------------------------------------------------------------------------
    @property
    def _default_sim_config(self):
        return SimConfig(sim_freq=100, control_freq=CONTROL_HZ, scene_config=SceneConfig(solver_position_iterations=10))

    def _camera(self, name, size):
        pose = sapien_utils.look_at(self.domain.camera_eye, self.domain.camera_target)
        shader = PREBUILT_SHADER_CONFIGS["minimal"] if self._render_device.is_cuda() else shader_for_cpus()
        return CameraConfig(name, pose, size, size, self.domain.camera_fov, near=0.01, far=10, shader_config=shader)

    @property
    def _default_sensor_configs(self):
        return [self._camera("base_0_rgb", self.image_size)]

    @property
    def _default_human_render_camera_configs(self):
        camera = self._camera("video", self.video_size)
        if self.film:
            pose = sapien_utils.look_at((1.3, 0.78, 0.72), (0.31, 0.0, 0.22))
            camera = replace(camera, pose=pose, width=self.video_size * 4 // 3, fov=0.68)
        return [camera]

    def _load_lighting(self, options):
        self.scene.set_ambient_light(self.domain.ambient)
        # 4096 pixels a shadow: with fewer, ripples of its own depth run over the table.
        shadow = dict(shadow=self.film, shadow_scale=1.0, shadow_near=-3.0, shadow_far=3.0, shadow_map_size=4096)
        self.scene.add_directional_light(self.domain.light_direction, self.domain.light_color, **shadow)

    def _load_agent(self, options):
        self.agent = TwinPanda(self.scene, self.domain, self.film)

    def _load_scene(self, options):
        colors = self.domain.table_colors
        background = self.domain.background
        planks = 12 if len(colors) > 1 else 1
        self.make_box("table", (0.6, 0.7, 0.05), colors[0], (0.4, 0, -0.0505))
        for i in range(planks):
            center = (0.4, -0.7 + 1.4 * (i + 0.5) / planks, -0.0005)
            self.make_box(f"plank{i}", (0.6, 0.7 / planks, 0.0005), colors[i % len(colors)], center, collide=False)
        self.make_box("wall", (0.01, 4, 2), background, (-0.8, 0, 1), collide=False)
        self.make_box("floor", (4, 4, 0.01), background, (0, 0, -0.8), collide=False)
        self._pending = torch.zeros(self.num_envs, self.domain.action_delay, 7, device=self.device)  # delayed actions
        self._potential = torch.zeros(self.num_envs, device=self.device)  # at the last control step
        # Chance, an episode's own: of its layout, on the CPU, so that a seed is the same scene everywhere, and of its
        # camera. The rows that begin draw from the first.
        self._layout = [torch.Generator() for _ in range(self.num_envs)]
        self._noise = [torch.Generator(self.device) for _ in range(self.num_envs)]
        self._beginning = []
        home = torch.tensor([HOME], device=self.device)
        middle = torch.tensor([[0.4, 0, 0.2]], device=self.device)
        self.home = inverse_kinematics(home, middle, POINTING_DOWN.to(self.device), iterations=50)
        self._built = 0
        if self._common is None:
            self._common = set(vars(self))
        self._load_objects()

    def _clear_sim_state(self):
        if not self.gpu_sim_enabled:
            self._forget()
        super()._clear_sim_state()

    def _forget(self):
        """Give the scene a new PhysX (0.3 ms): the old one remembers contacts and the order of bodies, and an episode
        would depend on those before it. What the bodies themselves remember is how soon they fall asleep."""
        scene = self.scene.sub_scenes[0]
        entities = scene.entities
        system = sapien.physx.PhysxCpuSystem()
        system.timestep = self.scene.timestep
        anew = sapien.Scene([system, *([scene.render_system] if self.scene.can_render() else [])])
        for entity in entities:
            scene.remove_entity(entity)
        for entity in entities:
            anew.add_entity(entity)
        self.scene.sub_scenes[0] = anew
        self.scene.px = system
        movable = [actor._bodies[0] for actor in self.scene.actors.values() if actor.px_body_type == "dynamic"]
        movable += [articulation.root._bodies[0] for articulation in self.scene.articulations.values()]
        for body in movable:
            body.put_to_sleep()
            body.wake_up()

    def _set_main_rng(self, seed):
        """Nothing: all chance comes from the episodes' seeds, and numpy's generators cost 2 ms a reset."""

    def _set_episode_rng(self, seed, env_idx):
        if self._episode_seed is None:
            self._episode_seed = np.zeros(self.num_envs, np.int64)
        self._episode_seed[env_idx.cpu().numpy()] = seed

    def _initialize_episode(self, env_idx, options):
        # The draws below decide what a seed looks like: their order is part of every dataset and result.
        b = len(env_idx)
        self._beginning = env_idx.tolist()
        for row in self._beginning:
            self._layout[row].manual_seed(int(self._episode_seed[row]))
            self._noise[row].manual_seed(int(self._episode_seed[row]))
        low, high = torch.tensor(self.start_tcp, device=self.device)
        start = low + (high - low) * self.sample_uniform(3, b, self.variation == "robot", (1.0, 1.5)).T
        q = inverse_kinematics(self.home.expand(b, 7), start, POINTING_DOWN.to(self.device), iterations=6)
        finger = torch.full((b, 2), (self.start_gripper + 1) / 2 * GRIPPER_OPEN, device=self.device)
        self.agent.robot.set_qpos(torch.cat([q, finger], -1))
        self._place_objects(env_idx)
        # Until the first command arrives, a delayed robot holds still with its gripper as it is.
        self._pending[env_idx] = torch.tensor([0.0] * 6 + [self.start_gripper], device=self.device)
        self.agent.controller.beginning = env_idx

    def reset(self, seed=None, options=None):
        """ManiSkill's: `seed` is that of each row that begins, options["env_idx"] or all; any, if it is None."""
        rows = (options or {}).get("env_idx", torch.arange(self.num_envs, device=self.device))
        if seed is None:
            seed = np.random.default_rng().integers(2**31, size=len(rows))
        if len(np.atleast_1d(seed)) != len(rows):
            raise UserError(f"reset got {np.size(seed)} seeds for {len(rows)} environments: each takes its own")
        result = super().reset(np.atleast_1d(seed), options)
        self._potential[rows] = self.potential()[rows]  # not in _initialize_episode: on a GPU poses are known only now
        return result

    def _step_action(self, action):
        action = torch.as_tensor(action, device=self.device, dtype=torch.float32).reshape(self.num_envs, 1, 7)
        return super()._step_action(self.delayed(action)[:, 0])

    def delayed(self, actions: Tensor) -> Tensor:
        """What the robot executes while it is sent `actions` [B,C,7]: the domain's delay holds over chunks."""
        queue = torch.cat([self._pending, actions], 1)
        self._pending = queue[:, actions.shape[1] :]
        return queue[:, : actions.shape[1]]

    def _get_obs_sensor_data(self, apply_texture_transforms=True):
        data = super()._get_obs_sensor_data(apply_texture_transforms)
        # A GPU's pictures come as they lie there. Physics on a CPU goes on with them on the CPU.
        data["base_0_rgb"]["rgb"] = data["base_0_rgb"]["rgb"].to(self.device)
        return data

    def _get_obs_extra(self, info):
        # By our kinematics: in a Sim2RealEnv the joints are the real arm's, which the twin's TCP follows a step later.
        q = self.agent.robot.get_qpos()
        tcp, _ = panda_kinematics(q[:, :7])
        return dict(state=proprioceptive_state(tcp, q[:, 7:8]))

    def compute_dense_reward(self, obs, action, info):
        """Success plus the change of the task's potential, undiscounted (after Ng 1999)."""
        before = self._potential
        self._potential = self.potential()
        return info["success"].float() + self._potential - before

    # what tasks are made of -------------------------------------------------------------------------------------------
    def add_box(self, builder, half_size, color, position=(0, 0, 0), yaw=0.0, density=1000.0, collide=True) -> None:
        """Add a box (m, rad, kg/m^3) to the builder of an actor or of a link. Without collision it is decoration."""
        pose = sapien.Pose(position, [np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)])
        if collide:
            builder.add_box_collision(pose, half_size, self._surface(), density)
        builder.add_box_visual(pose, half_size, self._paint(color))

    def aside(self) -> sapien.Pose:
        """Where the next object waits for its first episode. Each has its own place: on a GPU, physics pushes apart
        what was built in one, drawers with it, before an episode has placed it."""
        self._built += 1
        return sapien.Pose((0, 2.0 * self._built, 1))

    def make_box(self, name: str, half_size, color: Vector, position=(0, 0, 0), collide=True):
        """A box that nothing moves but `set_pose`."""
        builder = self.scene.create_actor_builder()
        self.add_box(builder, half_size, color, collide=collide)
        builder.initial_pose = sapien.Pose(position)
        return builder.build_kinematic(name)

    def make_object(self, name: str, half_size: float):
        """The object of a task: a cube; an upright cylinder of another colour where objects are unseen ones."""
        builder = self.scene.create_actor_builder()
        mass = self.domain.object_mass
        if self.variation == "objects":
            upright = sapien.Pose(q=[0.5**0.5, 0, 0.5**0.5, 0])  # SAPIEN's cylinders lie along x
            radius = 0.9 * half_size
            density = mass / (2 * np.pi * radius**2 * half_size)
            builder.add_cylinder_collision(upright, radius, half_size, self._surface(), density)
            builder.add_cylinder_visual(upright, radius, half_size, self._paint(UNSEEN_COLOR))
        else:
            self.add_box(builder, [half_size] * 3, self.domain.object_color, density=mass / (2 * half_size) ** 3)
        builder.initial_pose = self.aside()
        return builder.build(name)

    def _surface(self):
        return sapien.physx.PhysxMaterial(self.domain.friction, self.domain.friction, 0)

    def _paint(self, color):
        return sapien.render.RenderMaterial(base_color=[*color, 1], roughness=0.8, specular=0.2)

    def sample_uniform(self, n: int, b: int, unseen: bool, ring: tuple[float, float]) -> Tensor:
        """Numbers [n,b], uniform in 0..1, for the initial states of the b environments that begin, each from its own
        seed. `unseen`: the first two lie in a square ring outside of that, from ring[0] to ring[1] away from its centre
        (0.5 is its edge)."""
        if b != len(self._beginning):
            raise UserError(
                f"{type(self).__name__}._place_objects asks for {b} positions: it must place the len(env_idx) = "
                f"{len(self._beginning)} environments that begin"
            )
        u = torch.stack([torch.rand(n, generator=self._layout[row]) for row in self._beginning], 1).to(self.device)
        if unseen:
            from_center = u[:2] - 0.5
            norm = from_center.abs().amax(0)  # a square's "radius", 0 .. 0.5
            u[:2] = 0.5 + from_center / norm * (ring[0] + 2 * (ring[1] - ring[0]) * norm)
        return u

    def sample_positions(self, n: int, b: int) -> Tensor:
        """Numbers [n,b], uniform in -1..1, for the places of a task's objects, the first two of them x and y. Unseen
        positions are up to 60 % further out than any in training."""
        return self.sample_uniform(n, b, self.variation == "positions", (0.6, 0.8)) * 2 - 1

    # what policies see ------------------------------------------------------------------------------------------------
    @property
    def tcp(self) -> Pose:
        """TCP pose in the base frame, ManiSkill Pose of [B]."""
        return self.agent.tcp.pose

    @property
    def commanded(self) -> Tensor:
        """Commanded TCP position [B,3], with the actions that the domain still delays."""
        return self.agent.controller.position + self._pending[..., :3].sum(1)

    def proprioception(self) -> Tensor:
        """`proprioceptive_state` [B,7] of the simulated arm."""
        return proprioceptive_state(self.tcp.to_transformation_matrix(), self.agent.robot.get_qpos()[:, 7:8])

    def picture(self, rows: Sequence[int], obs: dict | None = None) -> Tensor:
        """What the camera of the environments `rows` sees, uint8 [n,H,W,3]; from ManiSkill's own `obs` of a reset,
        which has its picture already, or anew."""
        sensors = obs["sensor_data"] if obs else self._get_obs_sensor_data()
        image = sensors["base_0_rgb"]["rgb"][rows]  # a copy: what is rendered next goes to the same place
        if self.domain.image_noise:
            noise = [torch.randn(image.shape[1:], generator=self._noise[row], device=self.device) for row in rows]
            image = (image + torch.stack(noise) * self.domain.image_noise).round().clip(0, 255).to(torch.uint8)
        return image

    def observe(self, obs: dict | None = None) -> dict:
        """Observation of the policy contract: image uint8 [B,H,W,3] (as `picture`), state float32 [B,7], prompt B
        strings."""
        image = self.picture(range(self.num_envs), obs)
        return dict(image=image, state=self.proprioception(), prompt=[self.instruction] * self.num_envs)

    def snapshot(self) -> Tensor:
        """What moves, float32 [B,D]: joint positions of the arm and of what else has joints, poses of free objects.
        With the episode's seed, that is all it takes to draw a moment of it."""
        joints = [articulation.get_qpos() for articulation in self.scene.articulations.values()]
        return torch.cat(joints + [thing.pose.raw_pose for thing in self._free_objects()], -1)

    def show(self, snapshot: Tensor) -> None:
        """Put everything where `snapshot` [B,D] has it, after a `reset` with the episode's seed. To draw it only."""
        for articulation in self.scene.articulations.values():
            n = articulation.max_dof
            articulation.set_qpos(snapshot[:, :n])
            snapshot = snapshot[:, n:]
        for thing in self._free_objects():
            thing.set_pose(Pose.create(snapshot[:, :7]))
            snapshot = snapshot[:, 7:]

    def _free_objects(self):
        return [actor for actor in self.scene.actors.values() if actor.px_body_type == "dynamic"]

    def step_chunk(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, dict]:
        """Execute a chunk [B,C,7] open loop, as `Batch.step` does; render at its end, when the caller asks with
        `observe()` -> reward [B] (sum over the chunk), terminated [B], truncated [B], info."""
        actions = torch.as_tensor(actions, device=self.device, dtype=torch.float32)
        reward, terminated, truncated = Batch([self]).step(actions, range(self.num_envs))
        return reward, terminated, truncated, dict(success=terminated, elapsed_steps=self.elapsed_steps)

    def advance(self, targets: Tensor) -> None:
        """One control step of physics, on the way to joint targets [B,9]."""
        self.agent.controller.set_targets(targets)
        super()._step_action(None)

    def success(self) -> Tensor:
        """Is the task done, bool [B]? UserError if the task does not say that of each environment."""
        return self._of_each("evaluate()['success']", self.evaluate()["success"])

    def _of_each(self, name, values):
        """`values`, or UserError if a task did not return one for each environment."""
        if not isinstance(values, Tensor) or values.shape != (self.num_envs,):
            shape = list(getattr(values, "shape", []))
            raise UserError(
                f"{type(self).__name__}.{name} has shape {shape}: it must be a tensor [{self.num_envs}], one value for "
                f"each environment"
            )
        return values


# ---- tasks ------------------------------------------------------------------------------------------------------


def yaw_quaternion(yaw: Tensor) -> Tensor:
    """Rotation about z by yaw [B] (rad) as a quaternion [B,4], w first."""
    zero = torch.zeros_like(yaw)
    return torch.stack([(yaw / 2).cos(), zero, zero, (yaw / 2).sin()], -1)


def up(height: float) -> np.ndarray:
    """A vector [3] that points upwards, `height` (m) long."""
    return np.array([0, 0, height])


class Teleoperator:
    """Moves the arm of a scripted demonstrator as a person would: an own pace, soft starts, tremor, pauses.

    Positions are [3] (m), speeds m/s, `gripper` is -1 (closed) to +1 (open).
    """

    def __init__(self, env: TabletopEnv, rng: np.random.Generator):
        self.env = env
        self.rng = rng
        self.pace = rng.uniform(0.7, 1.2)
        self.velocity = np.zeros(3)  # m a control step

    def towards(self, target: np.ndarray, speed: float, gripper: float) -> np.ndarray:
        """The action [7] that moves the TCP to the position `target`, at no more than `speed`."""
        step = target - self.env.commanded[0].numpy()
        step *= min(1, speed * self.pace / CONTROL_HZ / (np.linalg.norm(step) + 1e-9))
        self.velocity = 0.3 * self.velocity + 0.7 * step  # nobody starts or stops at once
        tremor = self.rng.normal(0, 0.0005, 3)
        return np.float32([*(self.velocity + tremor), 0, 0, 0, gripper])

    def reach(self, target, speed: float, gripper: float, tolerance=0.007, patience=3.0) -> Iterator[np.ndarray]:
        """Actions until the TCP is within `tolerance` (m) of `target`, a position or, where that moves, a function that
        returns it; or until `patience` (s) ends: something is in the way."""
        for _ in range(int(patience * CONTROL_HZ)):
            position = target() if callable(target) else target
            if np.linalg.norm(position - self.env.tcp.p[0].numpy()) < tolerance:
                break
            yield self.towards(position, speed, gripper)

    def hold(self, steps: int, gripper: float) -> Iterator[np.ndarray]:
        """Actions that keep the arm where it is for some control steps, while the gripper moves."""
        for _ in range(steps):
            yield self.towards(self.env.commanded[0].numpy(), 0, gripper)

    def hesitate(self, gripper: float) -> Iterator[np.ndarray]:
        """A third of the time, a pause of up to four control steps."""
        if self.rng.random() < 0.35:
            yield from self.hold(self.rng.integers(1, 5), gripper)


class PushCube(TabletopEnv):
    """Push the cube into the coloured square and let it come to rest there (the paper's push cube task)."""

    instruction = "push the cube to the target"
    max_episode_steps = 56
    start_gripper = -1.0
    half_size = 0.025  # m
    tolerance = 0.025  # m, from the cube's centre to the square's
    at_rest = 0.03  # m/s

    def _load_objects(self):
        self.cube = self.make_object("cube", self.half_size)
        side = self.half_size + self.tolerance
        self.goal = self.make_box("goal", (side, side, 0.001), self.domain.goal_color, collide=False)

    def _place_objects(self, env_idx):
        x, y, yaw, distance, angle = self.sample_positions(5, len(env_idx))
        cube = torch.stack([0.46 + 0.04 * x, 0.10 * y, torch.full_like(x, self.half_size)], -1)
        heading = 0.35 * angle
        length = 0.15 + 0.03 * distance
        goal = cube + torch.stack([length * heading.cos(), length * heading.sin(), -cube[:, 2]], -1)
        self.cube.set_pose(Pose.create_from_pq(cube, yaw_quaternion(0.3 * yaw)))
        self.goal.set_pose(Pose.create_from_pq(goal))

    def evaluate(self):
        distance = torch.linalg.norm(self.goal.pose.p[:, :2] - self.cube.pose.p[:, :2], dim=-1)
        speed = torch.linalg.norm(self.cube.linear_velocity, dim=-1)
        on_table = self.cube.pose.p[:, 2] < self.half_size + 0.005
        return dict(success=(distance < self.tolerance) & (speed < self.at_rest) & on_table)

    def potential(self):
        """Nearness of the TCP to the cube's far side (a third), of the cube to the goal (the rest)."""
        cube = self.cube.pose.p
        way = self.goal.pose.p - cube
        distance = torch.linalg.norm(way[:, :2], dim=-1)
        level = way * torch.tensor([1.0, 1, 0], device=self.device)
        behind = cube - torch.nn.functional.normalize(level, dim=-1) * 0.035
        reach = torch.linalg.norm(self.tcp.p - behind, dim=-1)
        return 0.25 * (1 - torch.tanh(6 * reach)) + 0.5 * (1 - torch.tanh(8 * distance))

    def demonstrator(self, rng):
        """Over the far side, down, push along a misjudged line that is corrected late; again if the cube slips away."""
        operator = Teleoperator(self, rng)
        misjudged = rng.normal(0, 0.017)  # m, to the side
        patience = rng.uniform(0.15, 0.5)  # share of the way that is left when the line is corrected
        way = np.zeros(2, np.float32)  # direction to push in

        def look():
            """TCP [3], cube [3], the normal [2] of `way`, cube to goal (m), TCP's lateral offset from the cube (m)."""
            tcp = self.tcp.p[0].numpy()
            cube = self.cube.pose.p[0].numpy()
            to_goal = (self.goal.pose.p[0].numpy() - cube)[:2]
            left = np.linalg.norm(to_goal)
            if left > self.tolerance or not way.any():  # nearer than that its direction means nothing: keep the last
                way[:] = to_goal / left
            side = np.array([-way[1], way[0]])
            return tcp, cube, side, left, (tcp - cube)[:2] @ side

        def behind(gap, height):
            _, cube, side, _, _ = look()
            return np.array([*(cube[:2] - way * (self.half_size + 0.009 + gap) + side * misjudged), height])

        while True:
            yield from operator.reach(lambda: behind(0.04, 0.09), 0.25, -1)
            yield from operator.hesitate(-1)
            yield from operator.reach(lambda: behind(0.025, 0.02), 0.2, -1)
            yield from operator.hesitate(-1)
            _, _, _, start, _ = look()
            while True:
                tcp, cube, side, left, lateral = look()
                if abs(lateral) > 0.024 or (cube - tcp)[:2] @ way < 0:
                    break  # the cube has slipped away, or gone too far: lift and come again
                correction = -lateral * (0.8 if left < start * patience else 0.1)
                ahead = way * (left + 0.005 if left > 0.01 else 0) + side * correction
                target = np.array([*(tcp[:2] + ahead), 0.02])
                underway = (self.commanded[0].numpy() - tcp)[:2] @ way  # what the arm still lags
                yield operator.towards(target, 0.2 * np.clip((left - underway) / 0.08, 0.15, 1), -1)
            for _ in range(4):
                yield operator.towards(tcp + np.array([*(-way * 0.02), 0.08]), 0.25, -1)
            misjudged *= 0.2  # after a miss, a person looks closer


class PickPlace(TabletopEnv):
    """Pick the block from the table and put it into the bowl, where it rests, released (the paper's pick and place)."""

    instruction = "put the block into the bowl"
    max_episode_steps = 64
    half_size = 0.02  # m, of the block
    radius = 0.06  # m, of the bowl
    rim = 0.04  # m, the bowl's height
    at_rest = 0.03  # m/s

    def _load_objects(self):
        self.block = self.make_object("block", self.half_size)
        color = self.domain.goal_color
        bowl = self.scene.create_actor_builder()
        self.add_box(bowl, (0.8 * self.radius, 0.8 * self.radius, 0.002), color, (0, 0, 0.002))
        sides = 10
        wall = (0.003, self.radius * np.tan(np.pi / sides), self.rim / 2)
        for angle in 2 * np.pi * np.arange(sides) / sides:
            center = (self.radius * np.cos(angle), self.radius * np.sin(angle), self.rim / 2)
            self.add_box(bowl, wall, color, center, yaw=angle)
        bowl.initial_pose = self.aside()
        self.bowl = bowl.build_kinematic("bowl")

    def _place_objects(self, env_idx):
        x, y, yaw, bowl_x, bowl_y = self.sample_positions(5, len(env_idx))
        zero = torch.zeros_like(x)
        block = torch.stack([0.46 + 0.05 * x, 0.11 + 0.05 * y, zero + self.half_size], -1)
        bowl = torch.stack([0.48 + 0.04 * bowl_x, -0.13 + 0.03 * bowl_y, zero], -1)
        self.block.set_pose(Pose.create_from_pq(block, yaw_quaternion(0.3 * yaw)))
        self.bowl.set_pose(Pose.create_from_pq(bowl))

    def _inside(self):
        """Is the block's centre within the bowl's walls, and at what height above the table (m)?"""
        offset = self.block.pose.p - self.bowl.pose.p
        return torch.linalg.norm(offset[:, :2], dim=-1) < self.radius - 0.01, offset[:, 2]

    def evaluate(self):
        inside, height = self._inside()
        released = self.agent.robot.get_qpos()[:, 7] > self.half_size + 0.01
        speed = torch.linalg.norm(self.block.linear_velocity, dim=-1)
        return dict(success=inside & (height < self.rim) & released & (speed < self.at_rest))

    def potential(self):
        """Nearness of the TCP to the block (a fifth), the block's way over the rim and down (the rest)."""
        inside, height = self._inside()
        reach = torch.linalg.norm(self.tcp.p - self.block.pose.p, dim=-1)
        outside = torch.linalg.norm((self.block.pose.p - self.bowl.pose.p)[:, :2], dim=-1)
        over = self.rim + 1.5 * self.half_size  # m, the height at which the block passes the rim
        way = torch.where(inside, height, outside + (over - height).clip(min=0) + over)
        return 0.15 * (1 - torch.tanh(6 * reach) * ~inside) + 0.6 * (1 - torch.tanh(4 * way))

    def demonstrator(self, rng):
        """Over the block, down, close, lift, over the bowl, open; again if the block was lost."""
        operator = Teleoperator(self, rng)
        misjudged = np.array([*rng.normal(0, 0.005, 2), 0])

        def block():
            return self.block.pose.p[0].numpy()

        def bowl():
            return self.bowl.pose.p[0].numpy()

        while True:
            yield from operator.reach(lambda: block() + misjudged + up(0.07), 0.3, 1, 0.015)
            yield from operator.hesitate(1)
            grasp = block() + misjudged / 2  # where the block was: closing fingers move it
            yield from operator.reach(grasp, 0.2, 1)
            yield from operator.hold(3, -1)
            yield from operator.reach(grasp + up(0.09), 0.3, -1, 0.02)
            if block()[2] > self.rim:
                yield from operator.reach(lambda: bowl() + misjudged + up(0.11), 0.3, -1, 0.015)
                yield from operator.hesitate(-1)
                yield from operator.reach(lambda: bowl() + misjudged + up(0.07), 0.2, -1, 0.01)
            yield from operator.hold(4, 1)
            yield from operator.reach(lambda: bowl() + up(0.14), 0.3, 1, 0.02)


class Drawer(TabletopEnv):
    """A cabinet to the right of the robot, whose drawer comes out to the left by a bar handle."""

    max_episode_steps = 48
    start_opening: tuple[float, float]  # m, the range in which the drawer starts
    half_width = 0.07  # m, of the drawer
    depth = 0.20  # m
    height = 0.09  # m
    travel = 0.19  # m
    handle_gap = 0.06  # m, from the drawer's front to the handle
    handle_height = 0.07  # m, above the table

    def _load_objects(self):
        unseen = self.variation == "objects"
        color = UNSEEN_COLOR if unseen else self.domain.object_color
        builder = self.scene.create_articulation_builder()
        w = self.half_width
        t = 0.004  # half the thickness of the walls

        body = builder.create_link_builder()
        body.set_name("body")
        pale = np.array(color) * 0.6 + 0.1
        wall = (t, self.depth / 2, self.height / 2)
        self.add_box(body, (w + 2 * t, self.depth / 2, t), pale, (0, -self.depth / 2, self.height - t))  # top
        self.add_box(body, wall, pale, (-w - t, -self.depth / 2, self.height / 2))
        self.add_box(body, wall, pale, (w + t, -self.depth / 2, self.height / 2))
        self.add_box(body, (w, t, self.height / 2), pale, (0, t - self.depth, self.height / 2))  # back

        drawer = builder.create_link_builder(body)
        drawer.set_name("drawer")
        along_y = sapien.Pose(q=[0.5**0.5, 0, 0, 0.5**0.5])  # a prismatic joint moves along the x axis of its frames
        drawer.set_joint_properties("prismatic", [[0, self.travel]], along_y, along_y, friction=0.0, damping=20.0)
        inside = self.depth - 0.02
        top = self.height - 3 * t
        wall = (t, inside / 2, 0.02)
        light = 300  # kg/m^3: the arm has to move it
        self.add_box(drawer, (w, t, top / 2 - 0.002), color, (0, 0, top / 2 + 0.002), density=light)  # front
        self.add_box(drawer, (w - t, inside / 2, t), color, (0, -inside / 2, 0.01), density=light)  # bottom
        self.add_box(drawer, wall, color, (t - w, -inside / 2, 0.03), density=light)
        self.add_box(drawer, wall, color, (w - t, -inside / 2, 0.03), density=light)

        goal_color = self.domain.goal_color
        half_length = 0.02 if unseen else 0.03
        for side in (-1, 1):  # two arms that hold the bar
            position = (side * (half_length - 0.005), self.handle_gap / 2, self.handle_height)
            self.add_box(drawer, (0.005, self.handle_gap / 2, 0.005), goal_color, position)
        self.add_box(drawer, (half_length, 0.005, 0.007), goal_color, (0, self.handle_gap, self.handle_height))
        builder.initial_pose = self.aside()
        self.cabinet = builder.build("cabinet", fix_root_link=True)
        self.drawer = self.cabinet.links_map["drawer"]

    def _place_objects(self, env_idx):
        x, y, yaw, opening = self.sample_positions(4, len(env_idx))
        position = torch.stack([0.47 + 0.05 * x, -0.12 + 0.03 * y, torch.zeros_like(x)], -1)
        self.cabinet.set_pose(Pose.create_from_pq(position, yaw_quaternion(0.15 * yaw)))
        low, high = self.start_opening
        self.cabinet.set_qpos((low + (high - low) * (opening + 1) / 2)[:, None])

    @property
    def opening(self) -> Tensor:
        """How far the drawer is out, [B] (m)."""
        return self.cabinet.get_qpos()[:, 0]

    def handle(self, outward: float = 0.0) -> Tensor:
        """Position [B,3] of the middle of the handle, or of a point so much further out (m)."""
        matrix = self.drawer.pose.to_transformation_matrix()
        offset = torch.tensor([0, self.handle_gap + outward, self.handle_height], device=self.device)
        return matrix[:, :3, 3] + matrix[:, :3, :3] @ offset

    def _rests(self):
        return self.cabinet.get_qvel()[:, 0].abs() < 0.03  # m/s


class OpenDrawer(Drawer):
    """Take the handle and pull the drawer out by at least 15 cm (the paper's open drawer)."""

    instruction = "open the drawer"
    max_episode_steps = 60  # to come again takes time
    start_opening = (0.0, 0.01)
    goal = 0.15  # m
    start_gripper = 0.0  # wide open it would not fit behind the handle

    def evaluate(self):
        return dict(success=(self.opening > self.goal) & self._rests())

    def potential(self):
        """Nearness of the TCP to the handle (a third), the drawer's opening (the rest)."""
        reach = torch.linalg.norm(self.tcp.p - self.handle(), dim=-1)
        return 0.25 * (1 - torch.tanh(6 * reach)) + 0.5 * (self.opening / self.goal).clip(max=1)

    def demonstrator(self, rng):
        """Over the handle, down around it, close, pull; again if the handle slips away."""
        operator = Teleoperator(self, rng)
        misjudged = np.array([*rng.normal(0, 0.01, 2), 0])
        opened = self.start_gripper

        def handle(height, outward=0.0):
            return self.handle(outward)[0].numpy() + misjudged + up(height)

        while True:
            yield from operator.reach(lambda: handle(0.06), 0.3, opened, 0.015)
            yield from operator.hesitate(opened)
            yield from operator.reach(lambda: handle(-0.005), 0.2, opened, 0.01, 1.2)
            misjudged *= 0.2  # once there, or after a miss, a person looks closer
            if self.tcp.p[0, 2] < self.handle_height + 0.005:
                yield from operator.hold(2, -1)
                while np.linalg.norm(handle(-0.005) - self.tcp.p[0].numpy()) < 0.04:
                    left = self.goal + 0.015 - float(self.opening[0])
                    yield operator.towards(handle(-0.005, max(left, 0)), 0.2, -1)
            yield from operator.reach(lambda: handle(0.06, 0.01), 0.3, opened, 0.02)


class CloseDrawer(Drawer):
    """Push the open drawer shut (the paper's close drawer)."""

    instruction = "close the drawer"
    start_gripper = -1.0
    start_opening = (0.10, 0.17)
    goal = 0.01  # m

    def evaluate(self):
        shut = self.opening < 0.001  # where a hand that goes on pressing leaves the solver a velocity
        return dict(success=(self.opening < self.goal) & (self._rests() | shut))

    def potential(self):
        """Nearness of the TCP to the front of the handle (a third), how far the drawer is shut (the rest)."""
        reach = torch.linalg.norm(self.tcp.p - self.handle(0.02), dim=-1)
        return 0.25 * (1 - torch.tanh(6 * reach)) + 0.5 * (1 - self.opening / self.travel)

    def demonstrator(self, rng):
        """In front of the handle, down, push; again if the hand comes down on it or misses it."""
        operator = Teleoperator(self, rng)
        misjudged = np.array([*rng.normal(0, 0.012, 2), 0])

        def front(outward, height):
            return self.handle(outward)[0].numpy() + misjudged + up(height)

        def before_it():
            x, y, z = self.tcp.p[0].numpy() - front(0, 0)
            return y > 0 and max(abs(x), abs(z)) < 0.03

        while True:
            yield from operator.reach(lambda: front(0.03, 0.06), 0.3, -1, 0.015)
            yield from operator.hesitate(-1)
            yield from operator.reach(lambda: front(0.03, 0), 0.25, -1, 0.01, 1.2)
            misjudged *= 0.2  # once there, or after a miss, a person looks closer
            while before_it():
                yield operator.towards(front(0.01 - float(self.opening[0]), 0), 0.25, -1)
            yield from operator.reach(lambda: front(0.04, 0.07), 0.3, -1, 0.02)


TASKS = dict(pick_place=PickPlace, push_cube=PushCube, open_drawer=OpenDrawer, close_drawer=CloseDrawer)


def require_task(task: str) -> None:
    """UserError if there is no task of that name."""
    if task not in TASKS:
        raise UserError(f"no task '{task}': choose one of {', '.join(TASKS)} (envs.TASKS)")


def make(task: str, domain: Domain, **kwargs) -> TabletopEnv:
    """One environment; `kwargs` are TabletopEnv's. UserError if there is no such task, or where nothing can render."""
    require_task(task)
    try:
        return TASKS[task](domain, **kwargs)
    except RuntimeError as error:
        if "rendering device" not in str(error):
            raise
        raise UserError(
            "SAPIEN finds no Vulkan device to render with: run `make setup`, or install a GPU's Vulkan "
            "driver, or Mesa's lavapipe >= 24.3 (package mesa-vulkan-drivers)"
        ) from error


# ---- demonstrations ---------------------------------------------------------------------------------------------

_cached: dict = {}  # a process that demonstrates keeps its worlds of a task: making one takes a moment


def demonstrations(task: str, domain: Domain, seeds: Sequence[int], **kwargs) -> list[dict]:
    """An episode of the scripted demonstrator for each seed, rendered at every control step; they are played at once.
    `kwargs` are those of `make`.

    -> for each, image uint8 [T,H,W,3], state float32 [T,7], action float32 [T,7], prompt, success, seed; row t is what
    was seen and then done at control step t.
    """
    worlds = _cached.setdefault((task, *kwargs.items()), [])
    for world in worlds[: len(seeds)]:
        if world.domain != domain:
            world.domain = domain
            world.reset(seed=[0], options=dict(reconfigure=True))
    while len(worlds) < len(seeds):
        worlds.append(make(task, domain, **kwargs))
    batch = Batch(worlds[: len(seeds)])
    seen = batch.reset(dict(enumerate(seeds)))
    plans = [world.demonstrator(np.random.default_rng(seed)) for world, seed in zip(worlds, seeds)]
    steps = [[] for _ in seeds]
    success = torch.zeros(len(seeds), dtype=torch.bool)
    while seen:
        actions = torch.zeros(len(seeds), 1, 7)
        for row, (image, state) in seen.items():
            action = next(plans[row])
            steps[row].append((image, state, action))
            actions[row, 0] = torch.from_numpy(action)
        _, terminated, truncated = batch.step(actions, list(seen))
        success |= terminated
        seen = batch.observe([row for row in seen if not terminated[row] and not truncated[row]])
    episodes = []
    for seed, done, columns in zip(seeds, success.tolist(), steps):
        image, state, action = (np.stack(column) for column in zip(*columns))
        prompt = TASKS[task].instruction
        episodes.append(dict(image=image, state=state, action=action, prompt=prompt, success=done, seed=seed))
    return episodes


# ---- vectorised environment -------------------------------------------------------------------------------------


AT_ONCE = 32  # observations that a policy evaluates together: OpenVLA-7B remembers 0.2 GB of each


class VecEnv:
    """Environments of one task in worker processes, stepped a chunk at a time, reset by themselves.

    An observation is image uint8 [B,H,W,3], state float32 [B,7] (`proprioceptive_state`) and prompt, B strings; an
    action is that of `DeltaPoseController`. Every episode has a seed; with the actions it decides all of it, to
    the last bit, whatever its scene played before. Stage II needs `reset`, `step`, `num_envs` and `max_episode_steps`;
    `play` is for evaluation.

    The processes start in the background, in some seconds; the first `reset` waits for them.
    """

    def __init__(
        self,
        task: str,
        domain: Domain | list,
        num_envs: int = 32,
        workers: int | None = None,
        share: tuple[int, int] = (0, 1),
        **kwargs,
    ):
        """`domain`: of all, or each one's. `workers`: processes, one a core by default. `share` (r, N): these worlds
        are r, r + N, ... of N times as many, the others being elsewhere. `kwargs` are for `make`."""
        require_task(task)
        domains = [domain] * num_envs if isinstance(domain, Domain) else domain
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # which torchrun sets
        workers = max(1, min(workers or cores, num_envs))
        if kwargs.get("sim_backend") == "physx_cuda":
            workers = 1  # a GPU has all scenes in one
        self.first, self.stride = share
        kwargs["render"] = find_renderer(kwargs.get("render", "auto"))  # tried once, and not by every process
        self.num_envs = num_envs
        self.instruction = TASKS[task].instruction
        self.max_episode_steps = TASKS[task].max_episode_steps
        self.slices = [range(w, num_envs, workers) for w in range(workers)]  # the rows of each worker
        self.pipes = []
        self.processes = []
        for rows in self.slices:
            pipe, process = start_worker(task, [domains[i] for i in rows], num_envs * self.stride, kwargs)
            self.pipes.append(pipe)
            self.processes.append(process)

    def _exchange(self, command, rows, auto_reset=True, video=False):
        """Send environments by their number what they need, a seed or a chunk -> their replies by number."""
        for pipe, indices in zip(self.pipes, self.slices):
            asked = {place: rows[i] for place, i in enumerate(indices) if i in rows}
            with suppress(BrokenPipeError, ConnectionResetError):  # it is gone; what it had to say is in the pipe
                pipe.send((command, asked, auto_reset, video))
        replies = {}
        for pipe, process, indices in zip(self.pipes, self.processes, self.slices):
            replies |= {indices[place]: reply for place, reply in receive(pipe, process).items()}
        return {i: replies[i] for i in rows}

    def _stack(self, seen):
        image, state = (torch.from_numpy(np.stack(column)) for column in zip(*seen))
        return dict(image=image, state=state, prompt=[self.instruction] * len(seen))

    def reset(self, seed: int) -> dict:
        """Start every environment anew -> observation. Environment i plays the episodes seed + i, seed + i + num_envs,
        ...; of a share, i and num_envs count all."""
        seeds = {i: seed + self.first + self.stride * i for i in range(self.num_envs)}
        return self._stack(self._exchange("reset", seeds).values())

    def step(self, actions: Tensor) -> tuple[dict, Tensor, Tensor, Tensor, dict]:
        """actions float32 [B,C,7] -> observation, reward [B] (sum over the chunk), terminated [B] (success), truncated
        [B] (out of time), info.

        Episodes that end are reset, so the observation then is the next episode's first; info["final_obs"] has the last
        observations of the truncated ones, in row order, to bootstrap their value from, or None; info["length"] [B] is
        the episode's length so far in control steps.
        """
        replies = self._exchange("step", dict(enumerate(np.asarray(actions, np.float32))))
        seen, reward, terminated, truncated, length, final, *_ = zip(*replies.values())
        final = [f for f in final if f is not None]
        info = dict(length=torch.tensor(length), final_obs=self._stack(final) if final else None)
        return self._stack(seen), torch.tensor(reward), torch.tensor(terminated), torch.tensor(truncated), info

    def play(
        self, act: Callable[[dict], Tensor], seeds: Sequence[int], progress: str | None = None, video: bool = False
    ) -> dict:
        """Play the episodes `seeds` once each with `act(obs) -> actions [B,C,7]`; `progress` names the progress bar.

        -> success bool [N], length int [N] (control steps), reward [N], in the order of the seeds; snapshots, a list
        [N] of lists of `TabletopEnv.snapshot` [D], one a control step; with `video` frames, the same of [H,W,3].

        As many as there are environments are played at a time, and seeded by their first: the same program plays these
        the same way every time, whatever else it plays. In other company a policy that samples draws other noise. It
        acts on at most AT_ONCE observations at a time.
        """
        n = len(seeds)
        success = np.zeros(n, bool)
        length = np.zeros(n, int)
        reward = np.zeros(n)
        frames = [[] for _ in seeds]
        snapshots = [[] for _ in seeds]
        bar = tqdm(total=n, desc=progress, unit="episode", leave=False, disable=progress is None)
        with bar, torch.random.fork_rng():  # a policy that samples takes nothing from the caller's random numbers
            for first in range(0, n, self.num_envs):
                torch.manual_seed(seeds[first])
                running = range(min(self.num_envs, n - first))
                seen = self._exchange("reset", dict(zip(running, seeds[first:])))
                while running:
                    parts = [running[k : k + AT_ONCE] for k in range(0, len(running), AT_ONCE)]
                    actions = [act(self._stack([seen[i] for i in part])) for part in parts]
                    actions = np.concatenate([np.asarray(of_part, np.float32) for of_part in actions])
                    replies = self._exchange("step", dict(zip(running, actions)), auto_reset=False, video=video)
                    for i in running:
                        seen[i], gain, terminated, truncated, steps, _, filmed, recorded = replies[i]
                        success[first + i] = terminated
                        length[first + i] = steps
                        reward[first + i] += gain
                        frames[first + i] += filmed
                        snapshots[first + i] += recorded
                        bar.update(terminated or truncated)
                    running = [i for i in running if seen[i] is not None]
        return dict(success=success, length=length, reward=reward, frames=frames, snapshots=snapshots)

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes):
            pipe.close()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()


# ---- the worlds of a process ------------------------------------------------------------------------------------


WORKER = """
import os, sys, threading
sys.path.insert(0, {folder!r})

def load():
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + 10)
    import envs

loading = threading.Thread(target=load)
loading.start()
loading.join()
import envs
envs._worker({pipe})
"""


def start_worker(task, domains, stride, kwargs) -> tuple[Connection, subprocess.Popen]:
    """Start a process that runs `_worker`, which goes on in the background -> a pipe to it, and the process."""
    pipe, child = mp.Pipe()
    # Not multiprocessing's way, by which each worker would import the calling script with its policy. Imports take
    # seconds that a training in front needs: a thread that gives way does them. A process could not take that back.
    program = WORKER.format(folder=str(Path(__file__).parent), pipe=child.fileno())
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[child.fileno()])
    pipe.send((task, domains, stride, kwargs))
    child.close()
    return pipe, process


def receive(pipe: Connection, process: subprocess.Popen):
    """What a worker answers. UserError if it was killed, or hangs."""
    if not pipe.poll(HANGS):
        process.kill()  # it would outlive this process
        raise UserError(f"an environment worker has hung for {HANGS / 60:.0f} minutes; the same command goes on")
    try:
        reply = pipe.recv()
    except (EOFError, ConnectionResetError):
        why = "its message is above"
        if process.wait() == -signal.SIGKILL:
            why = "killed, as happens where memory runs out: take fewer worlds; the same command goes on"
        raise UserError(f"an environment worker died: {why}") from None
    if isinstance(reply, BaseException):
        raise reply
    return reply


def _worker(pipe: int):
    """Steps several environments in one process: a ManiSkill process takes half a GB, one more scene almost nothing."""
    torch.set_num_threads(1)
    pipe = Connection(pipe)
    task, domains, stride, kwargs = pipe.recv()
    try:
        batch = Batch(_make_worlds(task, domains, kwargs))
        seeds = {}  # of the episode that each row plays
        while True:
            command, asked, auto_reset, video = pipe.recv()
            if command == "reset":
                seeds |= asked
                pipe.send(batch.reset(asked))
            else:
                pipe.send(_step(batch, asked, auto_reset, video, seeds, stride))
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):  # the parent is gone
        pass
    except UserError as error:  # one clear line, from `make`
        pipe.send(error)
    except Exception as error:  # raised in the parent, with the place where it happened
        pipe.send(RuntimeError(f"an environment worker failed: {error}\n{traceback.format_exc()}"))


def _make_worlds(task, domains, kwargs):
    """A world for each domain; with sim_backend="physx_cuda" one of so many scenes, which then have one domain."""
    if kwargs.get("sim_backend") == "physx_cuda":
        if len(set(domains)) > 1:
            raise UserError("worlds with domains of their own are simulated on a CPU: leave out sim_backend=physx_cuda")
        return [make(task, domains[0], num_envs=len(domains), **kwargs)]
    worlds = []
    for domain in domains:
        gc.freeze()  # ManiSkill collects garbage for each new scene: let it not walk over all the older ones
        worlds.append(make(task, domain, **kwargs))
    return worlds


def _step(batch, chunks, auto_reset, video, seeds, stride):
    """A worker's replies to chunks [C,7] by row: what is seen (None at the end of an episode without `auto_reset`),
    reward, terminated, truncated, the length so far, the last observation of what was truncated, frames, snapshots."""
    if not chunks:
        return {}
    actions = torch.zeros(sum(batch.sizes), *next(iter(chunks.values())).shape, device=batch.view.device)
    for i, chunk in chunks.items():
        actions[i] = torch.from_numpy(chunk)
    frames = {i: [] for i in chunks}
    snapshots = {i: [] for i in chunks}
    result = batch.step(actions, chunks, frames if video else None, None if auto_reset else snapshots)
    reward, terminated, truncated = (values.tolist() for values in result)
    length = torch.cat([world.elapsed_steps for world in batch.worlds]).tolist()  # before a reset
    # What was truncated is seen once more, to bootstrap its value from; what succeeded is not.
    late = [i for i in chunks if truncated[i] and auto_reset]
    seen = batch.observe(late + [i for i in chunks if not terminated[i] and not truncated[i]])
    final = {i: seen.pop(i) for i in late}
    if auto_reset:
        ended = [i for i in chunks if terminated[i] or truncated[i]]
        for i in ended:
            seeds[i] += stride
        seen |= batch.reset({i: seeds[i] for i in ended})
    return {
        i: (seen.get(i), reward[i], terminated[i], truncated[i], length[i], final.get(i), frames[i], snapshots[i])
        for i in chunks
    }


class Batch:
    """The worlds of a process, computed at once but for what goes one by one: PhysX and the camera of each on a CPU.

    B rows: on a CPU of B worlds, each with a scene and a domain of its own; on a GPU of one world with B scenes.
    """

    def __init__(self, worlds: Sequence[TabletopEnv]):
        self.worlds = worlds
        self.sizes = [world.num_envs for world in worlds]
        self.view = worlds[0] if len(worlds) == 1 else as_one(worlds)
        self.tensors = []  # of the task's own, which its reset may write
        if len(worlds) > 1:
            new = vars(self.view).keys() - self.view._common
            self.tensors = [name for name in new if isinstance(getattr(self.view, name), Tensor)]

    def _by_world(self, rows):
        """Each world that has some of `rows`, with these and with their places in it."""
        first = 0
        for world, size in zip(self.worlds, self.sizes):
            mine = [row for row in rows if first <= row < first + size]
            if mine:
                yield world, mine, [row - first for row in mine]
            first += size

    def reset(self, seeds: dict[int, int]) -> dict:
        """Start anew the rows that have a seed, and no others -> `observe` of them."""
        if not seeds:
            return {}
        obs = {}
        for world, rows, places in self._by_world(seeds):
            options = dict(env_idx=torch.tensor(places, device=world.device))
            obs[world], _ = world.reset([seeds[row] for row in rows], options)
            for name in self.tensors:
                getattr(self.view, name)[rows] = getattr(world, name)[places]
        return self.observe(seeds, obs)

    def observe(self, rows: Sequence[int] | dict, obs: dict | None = None) -> dict:
        """What policies see of `rows`: {row: (image uint8 [H,W,3], state float32 [7])}, with `TabletopEnv.picture`'s
        `obs` of worlds that were reset just now."""
        seen = {}
        if not rows:
            return seen
        state = self.view.proprioception().cpu().numpy()
        for world, mine, places in self._by_world(rows):
            image = world.picture(places, (obs or {}).get(world)).cpu().numpy()
            seen.update((row, (image[i], state[row])) for i, row in enumerate(mine))
        return seen

    def step(
        self, actions: Tensor, rows: Sequence[int], frames: dict | None = None, snapshots: dict | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Execute a chunk [B,C,7] open loop in `rows`; the others stand still -> reward [B] (sum over the chunk),
        terminated [B] (success), truncated [B] (out of time).

        An episode that ends inside the chunk collects nothing more, and stands still while others go on. `frames` has a
        list by row, which is given a video frame [H,W,3] of each control step; `snapshots` the same with a `snapshot`.
        """
        view = self.view
        controllers = [world.agent.controller for world in self.worlds]
        executed = [world.delayed(chunk) for world, chunk in zip(self.worlds, actions.split(self.sizes))]
        held = torch.cat([controller.targets for controller in controllers])
        elapsed = torch.cat([world._elapsed_steps for world in self.worlds])
        before = torch.cat([world._potential for world in self.worlds])
        running = torch.zeros(len(actions), dtype=torch.bool, device=view.device)
        running[list(rows)] = True
        terminated = torch.zeros_like(running)
        truncated = torch.zeros_like(running)
        for target in joint_targets(controllers, torch.cat(executed)).unbind(1):
            held = torch.where(running[:, None], target, held)
            for world, goes, targets in zip(self.worlds, running.split(self.sizes), held.split(self.sizes)):
                if goes.any():  # on a GPU the scenes of ended episodes go on, held where they are
                    world.advance(targets)
            elapsed = elapsed + running
            success = view.success()
            terminated = terminated | running & success
            truncated = truncated | running & ~success & (elapsed >= view.max_episode_steps)
            if frames or snapshots:
                self._record(running.nonzero()[:, 0].tolist(), frames, snapshots)
            running = running & ~(terminated | truncated)
            if not running.any():
                break
        # The rewards' sum: of the potential's changes only the ends remain.
        potential = view._of_each("potential()", view.potential())
        for world, steps, height in zip(self.worlds, elapsed.split(self.sizes), potential.split(self.sizes)):
            world._elapsed_steps = steps
            world._potential = height
        return terminated + potential - before, terminated, truncated

    def _record(self, rows, frames, snapshots):
        for world, mine, places in self._by_world(rows):
            for row, place in zip(mine, places):
                if frames:
                    frames[row].append(world.render_rgb_array()[place].cpu().numpy())
                if snapshots:
                    snapshots[row].append(world.snapshot()[place].cpu().numpy())


def as_one(worlds: Sequence[TabletopEnv]) -> TabletopEnv:
    """Worlds with a scene each as one environment of B rows, to compute with: success, potential, states.

    A copy of the first whose objects are those of all; what a task has written for [B] environments runs on it.
    """
    view = copy.copy(worlds[0])
    view.num_envs = len(worlds)
    view.domain = None  # each has its own, and so many actions pending
    view._pending = None
    for name in vars(view).keys() - view._common:
        setattr(view, name, _merge(f"{type(view).__name__}.{name}", [getattr(world, name) for world in worlds]))
    view.agent = copy.copy(view.agent)
    view.agent.robot = _merge("", [world.agent.robot for world in worlds])
    view.agent.tcp = _merge("", [world.agent.tcp for world in worlds])
    return view


def _merge(name: str, values: list):
    """What scenes on a CPU have each, as one of B rows, like a GPU's. UserError if that cannot be."""
    first = values[0]
    if isinstance(first, Actor | Link):
        objects = [one for value in values for one in value._objs]
        bodies = [one for value in values for one in value._bodies]
        return replace(first, _objs=objects, _bodies=bodies, _scene_idxs=torch.zeros(len(objects)))
    if isinstance(first, Articulation):
        objects = [one for value in values for one in value._objs]
        return Articulations.create_from_physx_articulations(objects, first.scene, torch.zeros(len(objects)))
    if isinstance(first, Tensor):
        return torch.cat(values)
    if isinstance(first, list | tuple):
        return [_merge(name, list(each)) for each in zip(*values)]
    if isinstance(first, bool | int | float | str) and len(set(values)) > 1:
        raise UserError(f"{name} is {first} in one environment and not in another: make it a tensor [num_envs]")
    return first


class Articulations(Articulation):
    """The same articulation in several scenes on a CPU. ManiSkill's own has the joints of the first one alone."""

    @property
    def qpos(self):
        return torch.from_numpy(np.stack([one.qpos for one in self._objs]))

    @property
    def qvel(self):
        return torch.from_numpy(np.stack([one.qvel for one in self._objs]))


# ---- files for SAPIEN -------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where edited copies of others' files go, in the user's home and never in site-packages. They are named by their
    content: never out of date."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rlco"


def lowpoly_urdf(color: Vector) -> str:
    """Path of a Panda URDF whose visuals are its convex collision shapes, painted `color`.

    The stock visuals have 135,548 triangles, which is the whole cost of rendering in software.
    """
    source = Path(PACKAGE_ASSET_DIR) / "robots/panda/panda_v2.urdf"
    robot = ET.parse(source).getroot()
    for link in robot.iter("link"):
        for visual in link.findall("visual"):
            link.remove(visual)
        for collision in link.findall("collision"):
            for mesh in collision.iter("mesh"):
                # Meshes are named relative to the URDF's folder, which the copy leaves: make that absolute. Beside most
                # of them lies their convex hull, which is what physics uses and has the fewest triangles.
                stl = source.parent / mesh.get("filename")
                convex = stl.with_name(stl.name + ".convex.stl")
                mesh.set("filename", str(convex if convex.exists() else stl))
            visual = ET.SubElement(link, "visual")
            visual.extend(collision)
            # SAPIEN looks materials up by name, in the whole file: a name for each link, or all get the first's shade.
            material = ET.SubElement(visual, "material", name=f"paint of {link.get('name')}")
            shade = 0.3 if "finger" in link.get("name") else 1.0
            ET.SubElement(material, "color", rgba=" ".join(str(c * shade) for c in color) + " 1")
    urdf = ET.tostring(robot)
    path = cache_folder() / f"panda_{hashlib.sha1(urdf).hexdigest()[:10]}.urdf"
    if not path.exists():
        # SAPIEN reads from the SRDF beside it which links may touch, so that has to be there before the URDF is.
        write_file(path.with_suffix(".srdf"), source.with_suffix(".srdf").read_bytes())
        write_file(path, urdf)
    return str(path)


def shader_for_cpus() -> ShaderConfig:
    """SAPIEN's "minimal" shaders without reflections of a surrounding (an environment map), which no scene here has.

    Software rendering compiles their samplers in six seconds of every process, and spends a quarter of a picture on
    them; pictures are the same to the last bit. Where SAPIEN's text is not the one that is edited here, the stock one.
    """
    stock = Path(sapien.__file__).parent / "vulkan_shader/minimal"
    edits = {
        r"vec3 (getBackgroundColor|diffuseIBL|specularIBL)\((.*\n)*?}\n": "",
        r"  vec3 wnormal = (.*\n)*?(?=  color \+= sceneBuffer.ambientLight)": "",
        r"layout.* (samplerEnvironment|samplerBRDFLUT);\n": "",
        r"(?<=vec3 bg = ).*;": "vec3(0);",
        r'(?<=#include ")\.\.': str(stock.parent),
    }
    files = {path.name: path.read_text() for path in sorted(stock.iterdir())}
    for name in files:
        for pattern, replacement in edits.items():
            files[name] = re.sub(pattern, replacement, files[name])
    config = PREBUILT_SHADER_CONFIGS["minimal"]
    text = "".join(files.values())
    if re.search("getBackgroundColor|IBL|samplerEnvironment|samplerBRDFLUT", text):
        return config
    folder = cache_folder() / f"shaders_{hashlib.sha1(text.encode()).hexdigest()[:10]}"
    for name, content in files.items():
        if not (folder / name).exists():
            write_file(folder / name, content.encode())
    # What ManiSkill does for the shaders of that name, and for no others.
    sapien.render.set_picture_format("Color", "r8g8b8a8unorm")
    sapien.render.set_picture_format("ColorRaw", "r8g8b8a8unorm")
    sapien.render.set_picture_format("PositionSegmentation", "r16g16b16a16sint")
    return replace(config, shader_pack=str(folder))


if __name__ == "__main__":
    import tyro

    import page  # here and not above: it stands on this file

    args = tyro.extras.subcommand_cli_from_dict(
        dict(show=page.DrawArgs, demonstrators=page.MeasureArgs), description=__doc__
    )
    one_line_errors(args.debug)
    if isinstance(args, page.DrawArgs):
        page.draw_tasks(args)
    else:
        page.measure_demonstrators(args)
