"""data.py: LeRobot datasets round trip, agree with lerobot's own reading, and fail readably; the mixture is exact."""

import gc
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from scipy.spatial.transform import Rotation
from torch.utils.data import DataLoader

import data
from checkpoints import UserError, one_line_errors
from data import ACTION, IMAGE, STATE, DatasetWriter, Mixture, load_dataset, statistics, write_dataset

FIXTURES = Path(__file__).parent / "data"
DATA_FILE, VIDEO_FILE = "data/chunk-000/file-000.parquet", f"videos/{IMAGE}/chunk-000/file-000.mp4"
EPISODES_FILE = "meta/episodes/chunk-000/file-000.parquet"


def make_episode(seed, length, height=32, width=48):
    """A moving square over a gradient: smooth enough for video, every frame different."""
    rng = np.random.default_rng(seed)
    image = np.empty((length, height, width, 3), np.uint8)
    image[:] = np.stack(np.broadcast_arrays(np.arange(width) * 5, np.arange(height)[:, None] * 7, 10 * seed + 40), -1)
    for t in range(length):
        image[t, 8:24, 3 * t % 32 : 3 * t % 32 + 16] = 200, 40, 60
    return {
        "image": image,
        "state": rng.normal(size=(length, 7)).astype(np.float32),
        "action": rng.normal(size=(length, 7)).astype(np.float32),
        "prompt": ["push", "pull the other way"][seed % 2],
        "seed": seed,
    }


EPISODES = [make_episode(seed, length) for seed, length in enumerate((7, 1, 12, 5))]


def concatenated(key):
    return np.concatenate([episode[key] for episode in EPISODES])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """EPISODES as <folder>/image and <folder>/video."""
    folder = tmp_path_factory.mktemp("datasets")
    write_dataset(folder / "image", EPISODES, fps=10)
    write_dataset(folder / "video", iter(EPISODES), fps=10, video=True)
    return folder


# ---- round trip ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("max_bytes", [1 << 30, 0], ids=["memory", "disk"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_round_trip(folder, kind, max_bytes):
    demos = load_dataset(folder / kind, max_bytes)
    assert isinstance(demos.frames, np.ndarray) == (max_bytes > 0)
    assert demos.bounds.tolist() == [0, 7, 8, 20, 25] and len(demos) == 25 and demos.fps == 10
    np.testing.assert_array_equal(demos.state, concatenated("state"))
    np.testing.assert_array_equal(demos.action, concatenated("action"))
    assert demos.prompt.tolist() == [e["prompt"] for e in EPISODES for _ in e["state"]]
    frames, truth = demos.frames[np.arange(25)], concatenated("image")
    if kind == "image":
        np.testing.assert_array_equal(frames, truth)
    else:
        # Lossy (crf 18, halved colour resolution): but every frame must be nearest to its own original.
        error = np.abs(frames[:, None].astype(int) - truth).mean((2, 3, 4))
        assert error.diagonal().max() < 6
        assert (error.argmin(1) == np.arange(25)).all()
    order = np.array([24, 3, 3, 0, 19, 8, 7])  # any order, repeats included
    np.testing.assert_array_equal(demos.frames[order], frames[order])


@pytest.mark.parametrize("max_bytes", [1 << 30, 0], ids=["memory", "disk"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_first_episodes_alone(folder, kind, max_bytes):
    demos, few = load_dataset(folder / kind), load_dataset(folder / kind, max_bytes, num_episodes=2)
    assert few.bounds.tolist() == [0, 7, 8] and len(few) == len(few.state) == len(few.prompt) == 8
    np.testing.assert_array_equal(few.action, demos.action[:8])
    np.testing.assert_array_equal(few.frames[np.arange(8)], demos.frames[:8])
    for wrong in (0, 5):
        with pytest.raises(UserError, match="has 4 episodes"):
            load_dataset(folder / kind, num_episodes=wrong)


def test_several_files(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "FILE_BYTES", 0)
    for video in (False, True):
        path = tmp_path / f"video-{video}"
        write_dataset(path, EPISODES, fps=10, video=video)
        assert len(list(path.glob("data/*/*.parquet"))) == 4 and len(list(path.glob("videos/*/*/*.mp4"))) == 4 * video
        demos, one_file = load_dataset(path), load_dataset(folder / ("video" if video else "image"))
        np.testing.assert_array_equal(demos.action, one_file.action)
        assert np.abs(demos.frames.astype(int) - one_file.frames).mean() < 3  # neighbours differ by 5
        on_disk = load_dataset(path, max_bytes=0)
        np.testing.assert_array_equal(on_disk.frames[np.array([24, 0, 7])], demos.frames[[24, 0, 7]])


@pytest.mark.parametrize("max_bytes", [1 << 30, 0], ids=["memory", "disk"])
@pytest.mark.parametrize("name", ["lerobot_v30_image", "lerobot_v30_video", "lerobot_v21_image", "lerobot_v21_video"])
def test_reads_as_lerobot_does(name, max_bytes):
    """Written by lerobot 0.6.1 (v3.0) and 0.3.3 (v2.1); `expected` is what these return for horizon 3."""
    demos, expected = load_dataset(FIXTURES / name, max_bytes), np.load(FIXTURES / name / "as_read_by_lerobot.npz")
    np.testing.assert_array_equal(np.diff(demos.bounds), np.bincount(expected["episode"]))
    np.testing.assert_array_equal(demos.state, expected["state"])
    assert demos.prompt.tolist() == expected["task"].tolist()
    # AV1 decoders agree to the bit; the conversion to RGB may round differently on another processor.
    difference = np.abs(demos.frames[expected["shown"]].astype(int) - expected["image"])
    assert difference.max() <= (2 if "video" in name else 0)
    chunks = Mixture(demos, batch_size=1, horizon=3, seed=0)._sample(demos, np.arange(len(demos)))
    np.testing.assert_array_equal(chunks["action"], expected["action"])
    np.testing.assert_array_equal(chunks["action_is_pad"], expected["pad"])


@pytest.mark.parametrize("max_bytes", [1 << 30, 0], ids=["memory", "disk"])
@pytest.mark.parametrize("name", ["vid_fps30", "interrupted_by_lerobot", "last_ep_missing_in_meta"])
def test_reads_the_listed_episodes_of_what_other_tools_left(name, max_bytes):
    """A video of three frames a step; rows of an episode that the metadata do not list. `expected` is what lerobot
    0.4.4 returns of the listed ones, with PyAV for the frames at the times that it asks for."""
    demos, expected = load_dataset(FIXTURES / name, max_bytes), np.load(FIXTURES / name / "as_read_by_lerobot.npz")
    np.testing.assert_array_equal(np.diff(demos.bounds), np.bincount(expected["episode"]))
    np.testing.assert_array_equal(demos.state, expected["state"])
    np.testing.assert_array_equal(demos.action, expected["action"])
    difference = np.abs(demos.frames[expected["shown"]].astype(int) - expected["image"])
    assert difference.max() <= (0 if name == "last_ep_missing_in_meta" else 2)


def test_rows_are_found_by_their_episode(folder, tmp_path):
    """In files that the metadata do not name, in another order, beside what other recordings left."""
    shutil.copytree(folder / "image", tmp_path / "demos")
    whole = load_dataset(folder / "image")
    file = tmp_path / "demos" / DATA_FILE
    table = pq.read_table(file, partitioning=None)
    foreign = table.slice(20).set_column(table.column_names.index("episode_index"), "episode_index", [[9] * 5])
    mixed = pa.concat_tables(
        [foreign, table.slice(20), table.slice(7, 1), table.slice(8, 12).take(np.arange(11, -1, -1))]
    )
    pq.write_table(mixed, file.with_name("file-001.parquet"), row_group_size=3)
    pq.write_table(table.slice(0, 12), file)  # episodes 0 and 1, and the beginning of 2
    file.with_name("file-002.parquet").write_bytes(b"PAR1 cut off")
    for max_bytes in (1 << 30, 0):
        demos = load_dataset(tmp_path / "demos", max_bytes)
        assert demos.bounds.tolist() == whole.bounds.tolist()
        np.testing.assert_array_equal(demos.action, whole.action)
        np.testing.assert_array_equal(demos.frames[np.arange(25)], whole.frames)


@pytest.mark.parametrize("subsampling", [0, 2], ids=["4:4:4", "4:2:0"])
def test_pictures_are_what_pil_decodes(folder, tmp_path, subsampling):
    shutil.copytree(folder / "image", tmp_path / "demos")
    sharp = np.random.default_rng(0).integers(256, size=(25, 32, 48, 3), dtype=np.uint8)
    files, expected = [], []
    for i, picture in enumerate(sharp):
        file = io.BytesIO()
        if i % 5:
            Image.fromarray(picture).save(file, "JPEG", subsampling=subsampling, quality=80)
            expected.append(np.asarray(Image.open(file)))
        else:
            alpha = np.full((32, 48, 1), 40, np.uint8)
            Image.fromarray(np.concatenate([picture, alpha], 2)).save(file, "PNG")
            expected.append(picture)
        files.append({"bytes": file.getvalue(), "path": None})
    rewrite(tmp_path / "demos" / DATA_FILE, **{IMAGE: pa.array(files)})
    np.testing.assert_array_equal(load_dataset(tmp_path / "demos").frames, np.stack(expected))


# ---- keys, cameras, rates, names ------------------------------------------------------------------------------------
def foreign(root, keys, extra=()):
    """Rename columns of a dataset as others call them; `extra` features are in the metadata alone."""
    info = json.loads((root / "meta/info.json").read_text())
    info["features"] = {keys.get(key, key): feature for key, feature in info["features"].items()} | dict(extra)
    (root / "meta/info.json").write_text(json.dumps(info))
    table = pq.read_table(root / DATA_FILE, partitioning=None)
    pq.write_table(table.rename_columns([keys.get(name, name) for name in table.column_names]), root / DATA_FILE)


OPENPI = {IMAGE: "image", STATE: "state", ACTION: "actions"}
WRIST = {"dtype": "image", "shape": [3, 32, 48], "names": None}
DEPTH = {"dtype": "video", "shape": [32, 48, 3], "info": {"video.is_depth_map": True}}


@pytest.mark.parametrize(
    "keys, extra, camera, line",
    [
        (OPENPI, {}, None, ""),
        (OPENPI, {"wrist_image": WRIST}, None, "camera image; wrist_image left out\n"),
        ({IMAGE: "top"}, {"far": DEPTH, "depth": WRIST}, None, "camera top; far, depth left out\n"),
        ({IMAGE: "a.top"}, {"a.wrist": WRIST}, "top", "camera a.top; a.wrist left out\n"),
        ({}, {"wrist": WRIST}, None, f"camera {IMAGE}; wrist left out\n"),
    ],
)
def test_columns_and_cameras_by_other_names(folder, tmp_path, capsys, keys, extra, camera, line):
    root = tmp_path / "demos"
    shutil.copytree(folder / "image", root)
    foreign(root, keys, extra)
    demos, whole = load_dataset(root, camera=camera), load_dataset(folder / "image")
    assert capsys.readouterr().out == (f"{root}: {line}" if line else "")
    for key in ("frames", "state", "action"):
        np.testing.assert_array_equal(getattr(demos, key), getattr(whole, key))


def test_a_camera_that_is_not_certain_is_asked_for(folder, tmp_path):
    root = tmp_path / "demos"
    shutil.copytree(folder / "image", root)
    foreign(root, {IMAGE: "top"}, {"wrist": WRIST, "far": DEPTH})
    with pytest.raises(UserError, match=r"--camera KEY; it has \['top', 'wrist'\]"):
        load_dataset(root)
    for camera in ("far", "left"):
        with pytest.raises(UserError, match=rf"no camera {camera}; it has \['top', 'wrist'\]"):
            load_dataset(root, camera=camera)


@pytest.mark.parametrize("max_bytes", [1 << 30, 0], ids=["memory", "disk"])
def test_every_third_frame_and_the_motion_of_three_actions(tmp_path, capsys, max_bytes):
    episodes = [make_episode(seed, length) for seed, length in enumerate((7, 1, 12))]
    for episode in episodes:
        episode["action"] *= 0.1
    write_dataset(tmp_path / "demos", episodes, fps=30)
    demos = load_dataset(tmp_path / "demos", max_bytes, fps=10)
    assert "30 Hz: one frame in 3 is used, and 3 actions become one of 10 Hz" in capsys.readouterr().out
    assert demos.bounds.tolist() == [0, 3, 4, 8] and demos.fps == 10 and demos.steps == 1
    kept = [(e, k) for e, n in enumerate((7, 1, 12)) for k in range(0, n, 3)]
    np.testing.assert_array_equal(demos.frames[np.arange(8)], np.stack([episodes[e]["image"][k] for e, k in kept]))
    np.testing.assert_array_equal(demos.state, np.stack([episodes[e]["state"][k] for e, k in kept]))
    for action, (e, k) in zip(demos.action, kept):
        steps = episodes[e]["action"][k : k + 3].astype(np.float64)
        np.testing.assert_allclose(action[:3], steps[:, :3].sum(0), atol=1e-6)
        turn = np.eye(3)
        for step in steps:  # each in the base frame, after the one before: what envs.move_target does
            turn = Rotation.from_euler("xyz", step[3:6]).as_matrix() @ turn
        np.testing.assert_allclose(Rotation.from_euler("xyz", action[3:6]).as_matrix(), turn, atol=1e-6)
        assert action[6] == np.float32(steps[-1, 6])


def test_two_steps_a_frame(tmp_path, capsys):
    """Of a dataset of 5 Hz at 10 Hz: what both halves of an action do is what it did; frames are seen where they were
    taken, and a chunk from there goes on in steps of 10 Hz to the end of the episode."""
    write_dataset(tmp_path / "demos", EPISODES, fps=5)
    demos = load_dataset(tmp_path / "demos", fps=10)
    assert "5 Hz: each action becomes 2 equal parts at 10 Hz" in capsys.readouterr().out
    assert len(demos) == 25 and demos.steps == 2 and demos.action.shape == (50, 7)
    half = demos.action[::2]
    np.testing.assert_array_equal(half, demos.action[1::2])
    np.testing.assert_allclose(2 * half[:, :3], concatenated("action")[:, :3], rtol=1e-6)
    np.testing.assert_array_equal(half[:, 6], concatenated("action")[:, 6])
    turn = Rotation.from_euler("xyz", half[:, 3:6])
    whole = Rotation.from_euler("xyz", concatenated("action")[:, 3:6])
    assert (turn * turn * whole.inv()).magnitude().max() < 1e-5
    chunks = Mixture(demos, 1, 5, 0)._sample(demos, np.array([0, 5]))  # of the first episode, 7 frames
    np.testing.assert_array_equal(chunks["action"][0], demos.action[:5])
    np.testing.assert_array_equal(chunks["action"][1], demos.action[[10, 11, 12, 13, 13]])
    assert chunks["action_is_pad"].sum() == 1 and chunks["action_is_pad"][1, 4]
    part = demos.part(2, 4)
    np.testing.assert_array_equal(part.action, demos.action[16:])
    assert part.bounds.tolist() == [0, 12, 17] and part.prompt[0] == EPISODES[2]["prompt"]


@pytest.mark.parametrize("max_bytes", [1 << 30, 0], ids=["memory", "disk"])
def test_pictures_become_the_twins_size(folder, max_bytes, capsys):
    demos, whole = load_dataset(folder / "image", max_bytes, image_size=16), load_dataset(folder / "image")
    assert demos.image_shape == (16, 16, 3)
    assert "the square middle of its 32 x 48 pixels is scaled to 16 x 16" in capsys.readouterr().out
    middle = whole.frames[:, :, 8:40].reshape(25, 16, 2, 16, 2, 3).mean((2, 4))
    assert np.abs(demos.frames[np.arange(25)] - middle).max() <= 0.5
    np.testing.assert_array_equal(demos.part(2, 4).frames[np.arange(3)], demos.frames[np.arange(8, 11)])
    with pytest.raises(UserError, match="has pictures of 32 x 48 pixels, the policy sees 64: .* --image-size 64"):
        load_dataset(folder / "image", max_bytes, image_size=64)


# ---- other people's units -----------------------------------------------------------------------------------------
DOWN = Rotation.from_euler("x", np.pi)


def motions():
    """Six episodes of 40 frames in README's units: state [240,7] and action [240,7] of an arm that turns and grasps,
    and follows its commands a step late."""
    rng = np.random.default_rng(0)
    states, actions = [], []
    for _ in range(6):
        action = np.zeros((40, 7))
        action[:, :3] = rng.normal(0, 0.015, (4, 3)).repeat(10, 0) + rng.normal(0, 0.001, (40, 3))
        action[5:20, 3:6] = rng.normal(0, 0.03, 3)
        action[:, 6] = np.where(np.arange(40) % 30 < 15, 1, -1)
        late = np.concatenate([np.zeros((1, 7)), action[:-1]])
        late[0, 6] = 1
        turn = Rotation.identity()
        state = np.empty((40, 7))
        for t in range(40):
            turn = Rotation.from_euler("xyz", late[t, 3:6]) * turn
            state[t, 3:6] = turn.as_euler("xyz")
        state[:, :3] = np.array([0.5, 0, 0.2]) + late[:, :3].cumsum(0)
        state[:, 6] = late[:, 6]
        states.append(state)
        actions.append(action)
    return np.concatenate(states), np.concatenate(actions)


def load_as(tmp_path, state, action, names=None):
    episodes = [
        dict(image=np.zeros((40, 8, 8, 3), np.uint8), state=s, action=a, prompt="push")
        for s, a in zip(np.split(state, 6), np.split(action, 6))
    ]
    write_dataset(tmp_path / "demos", episodes, fps=10)
    edit_info(tmp_path / "demos", lambda info: [info["features"][k].update(names=names) for k in (STATE, ACTION)])
    return load_dataset(tmp_path / "demos")


def as_rlinf(state, action):
    """RL-Co's data: roll pitch yaw of the tool from the base's axes, width in metres, turns in the tool's frame."""
    tool = Rotation.from_euler("xyz", state[:, 3:6]) * DOWN
    state[:, 3:6] = tool.as_euler("xyz")
    state[:, 6] = (state[:, 6] + 1) * 0.04
    turn = Rotation.from_euler("xyz", action[:, 3:6]).as_rotvec()
    action[:, 3:6] = Rotation.from_rotvec(tool.inv().apply(turn)).as_euler("xyz")


def as_bridge(state, action):
    for x in (state, action):
        x[:, 6] = (x[:, 6] + 1) / 2


def as_fingers_and_reversed(state, action):
    state[:, 6] = (state[:, 6] + 1) * 0.02
    action[:, 6] *= -1


def as_grasping_hand(state, action):
    """Ours, of a hand that never closes more than half."""
    state[:, 6] = np.maximum(state[:, 6], 0)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda state, action: None, ""),
        (as_grasping_hand, ""),
        (
            as_bridge,
            "action: gripper from 0 (taken for closed) .. 1 (open) to -1 .. 1; observation.state: gripper from 0",
        ),
        (
            as_fingers_and_reversed,
            "observation.state: gripper from 0 .. 0.04 m to -1 .. 1; action: gripper turned round",
        ),
        (
            as_rlinf,
            "observation.state: gripper from 0 .. 0.08 m to -1 .. 1; roll pitch yaw of the state are counted from "
            "pointing down instead of from the base's axes; rotations of the action are brought from the tool's frame",
        ),
    ],
)
def test_motions_in_others_units_are_the_same_motions(tmp_path, capsys, change, said):
    state, action = motions()
    their_state, their_action = state.copy(), action.copy()
    change(their_state, their_action)
    if change is as_grasping_hand:
        state = their_state
    names = {"motors": ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]}
    demos = load_as(tmp_path, their_state, their_action, names)
    line = capsys.readouterr().out
    assert said in line and line.count("\n") == bool(said)
    np.testing.assert_allclose(demos.state, state, atol=1e-5)
    np.testing.assert_allclose(demos.action, action, atol=1e-5)


def test_a_gripper_of_zeros_and_ones_is_certain_in_few_frames(tmp_path):
    episode = make_episode(0, 5) | {"action": np.zeros((5, 7)), "state": np.zeros((5, 7))}
    episode["action"][:, 6] = 1, 1, 0, 0, 1
    write_dataset(tmp_path / "demos", [episode], fps=10)
    demos = load_dataset(tmp_path / "demos")
    assert demos.action[:, 6].tolist() == [1, 1, -1, -1, 1] and not demos.state.any()


def absolute(state, action):
    action[:, :6] = state[:, :6]
    return "absolute poses"


def absolute_from_the_start(state, action):
    state[:, :3] -= state[0, :3]
    action[:-1, :3] = state[1:, :3]
    return "is where the state comes to be"


def joints(state, action):
    angles = np.array([0, -0.78, 0, -2.35, 0, 1.57, 0.78])
    action[:] = angles + np.random.default_rng(0).normal(0, 0.2, state.shape).cumsum(0) / 20
    state[:] = action
    return "joint angles"


def joint_changes(state, action):
    action[:] = np.random.default_rng(0).normal(0, 0.03, state.shape)
    return "gripper of at most .*joint angles"


def quaternions(state, action):
    state[:, 3:] = (Rotation.from_euler("xyz", state[:, 3:6]) * DOWN).as_quat()
    return "observation.state has a length of 1 in its last four numbers: quaternions"


def normalised(state, action):
    action[:, :3] /= 0.05
    return r"action adds up to (1[89]|2[01]).* times the way of the state"


def millimetres(state, action):
    action[:, :3] *= 1000
    return "action has a x of .*: not in m"


def degrees(state, action):
    state[:, 3:6] = np.rad2deg((Rotation.from_euler("xyz", state[:, 3:6]) * DOWN).as_euler("xyz"))
    return "observation.state has a roll of .*: not in m, rad"


def percent(state, action):
    action[:, 6] = (action[:, 6] + 1) * 50
    return "action has a gripper of 100: not in"


def out_of_reach(state, action):
    state[:, 0] += 3
    return "observation.state has a x between .*: out of an arm's reach"


def another_frame(state, action):
    action[:, :3] *= -1
    return "or in another frame"


@pytest.mark.parametrize(
    "change",
    [
        absolute,
        absolute_from_the_start,
        joints,
        joint_changes,
        quaternions,
        normalised,
        millimetres,
        degrees,
        percent,
        out_of_reach,
        another_frame,
    ],
)
def test_what_is_no_change_of_pose_is_refused(tmp_path, change):
    state, action = motions()
    with pytest.raises(UserError, match=f"demos: .*{change(state, action)}.*-1 \\(closed\\) .. 1 are needed$") as error:
        load_as(tmp_path, state, action)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "names, what",
    [
        ([f"j{i}" for i in range(1, 8)], "joint angles"),
        ({"motors": [f"panda_joint{i}" for i in range(1, 8)]}, "joint angles"),
        (["main_shoulder_pan", *"abcde", "main_gripper"], "joint angles"),
        (["x", "y", "z", "qx", "qy", "qz", "qw"], "quaternions"),
        ([["vx", "vy", "vz", "wx", "wy", "wz", "gripper"]], "velocities"),
        (["x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3", "gripper"], "axes of rotation"),
    ],
)
def test_names_tell_what_the_numbers_are(tmp_path, names, what):
    with pytest.raises(UserError, match=f"observation.state is named .*: {what}; x y z .* are needed"):
        load_as(tmp_path, *motions(), names)


@pytest.mark.parametrize(
    "names",
    [
        None,
        ["state"],
        list("abcdefg"),
        [f"motor_{i}" for i in range(7)],
        ["delta_x", "dy", "dz", "rx", "ry", "rz", "grip"],
    ],
)
def test_other_names_tell_nothing(tmp_path, names, capsys):
    demos = load_as(tmp_path, *motions(), names)
    assert len(demos) == 240 and not capsys.readouterr().out


def test_a_dataset_by_its_hub_name(folder, tmp_path, monkeypatch):
    """A folder first, then lerobot's, then the caches, then the Hub; also where it is deeper inside, as in RLinf's."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path / "lerobot"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="nobody/demos is no folder here, not in .*lerobot or .*cache, and the Hub does not"
    ):
        load_dataset("nobody/demos")
    with pytest.raises(UserError, match="push_cube-twin is no LeRobot dataset.*data.py collect"):
        load_dataset("demos/push_cube-twin")
    snapshots = tmp_path / "cache/datasets--nobody--demos/snapshots"
    (snapshots / "1/meta").mkdir(parents=True)  # the metadata alone
    shutil.copytree(folder / "image", snapshots / "0/inner/demos")
    assert data.find_dataset("nobody/demos") == snapshots / "0/inner/demos"
    shutil.copytree(folder / "image", tmp_path / "lerobot/nobody/demos")
    assert data.find_dataset("nobody/demos") == tmp_path / "lerobot/nobody/demos"
    shutil.copytree(folder / "image", tmp_path / "nobody/demos/a")
    assert data.find_dataset("nobody/demos") == Path("nobody/demos/a")
    shutil.copytree(folder / "image", tmp_path / "nobody/demos/b")
    with pytest.raises(UserError, match="has 2 datasets in it: name one, such as nobody/demos/a"):
        load_dataset("nobody/demos")


def test_the_last_tenth_is_held_out(folder, monkeypatch, capsys):
    """Of a dataset of one's own without another for validation; never what is trained on."""
    args = SimpleNamespace(
        task="push_cube", target="standin", real=folder / "image", real_val=None, num_real=None, camera=None
    )
    whole = load_dataset(folder / "image", fps=10, image_size=16)
    real, held_out = data.open_real(args, 16, train=True)
    assert "its last 1 of 4 episodes are held out" in capsys.readouterr().out
    for part, rows in ((real, slice(0, 20)), (held_out, slice(20, 25))):
        np.testing.assert_array_equal(part.state, whole.state[rows])
        np.testing.assert_array_equal(part.frames, whole.frames[rows])
    args.num_real = 2
    assert data.open_real(args, 16, train=True)[0].bounds.tolist() == [0, 7, 8]
    args.num_real = 4
    with pytest.raises(UserError, match="last 1 are held out: use at most 3, or name others with --real-val"):
        data.open_real(args, 16, train=True)
    args.real_val = folder / "video"
    real, held_out = data.open_real(args, 16, train=False)
    assert real is None and len(held_out) == 25


# ---- statistics ---------------------------------------------------------------------------------------------------
def test_statistics(folder):
    demos, other = load_dataset(folder / "image"), load_dataset(FIXTURES / "lerobot_v30_image")
    union = np.concatenate([demos.action, other.action]).astype(np.float64)
    stats = statistics(demos, other)[ACTION]
    quantiles = np.stack([np.quantile(d.action.astype(np.float64), [0.01, 0.99], 0) for d in (demos, other)])
    for name, value in dict(
        mean=union.mean(0),
        std=union.std(0),
        min=union.min(0),
        max=union.max(0),
        q01=quantiles[:, 0].min(0),
        q99=quantiles[:, 1].max(0),
    ).items():
        np.testing.assert_allclose(stats[name], value, rtol=1e-12)
    np.testing.assert_allclose(  # each its share, as in the batches
        statistics(demos, other, alpha=0.8)[ACTION]["mean"],
        0.2 * demos.action.astype(np.float64).mean(0) + 0.8 * other.action.astype(np.float64).mean(0),
    )

    written = json.loads((folder / "image/meta/stats.json").read_text())
    assert {k: written[STATE][k] for k in stats} == statistics(demos)[STATE]
    pixels = concatenated("image").reshape(-1, 3) / 255
    for name, value in dict(
        mean=pixels.mean(0),
        std=pixels.std(0),
        min=pixels.min(0),
        max=pixels.max(0),
        q01=np.quantile(pixels, 0.01, 0, method="inverted_cdf"),
        q50=np.quantile(pixels, 0.5, 0, method="inverted_cdf"),
    ).items():
        np.testing.assert_allclose(np.array(written[IMAGE][name])[:, 0, 0], value, rtol=1e-12, err_msg=name)
    assert written[IMAGE]["count"] == [25]


@pytest.mark.parametrize("turning", [3, 1])
@pytest.mark.parametrize("alpha", [0.2, 0.8, 0.99])
def test_a_motion_that_only_the_robot_makes_survives(real, alpha, turning, capsys):
    """Twin demonstrations that never turn are ten times as many; ten real ones turn in some of 40 frames, both ways."""
    rng = np.random.default_rng(0)

    def dataset(name, episodes):
        action = rng.normal(0, 0.01, (episodes * 40, 7)).astype(np.float32)
        action[:, 3:] = 0
        return replace(real, path=Path(name), state=action, action=action, prompt=None, bounds=None, frames=None)

    twin, robot = dataset("demos/twin", 100), dataset("demos/robot", 10)
    turn = np.zeros((10, 40), np.float32)
    turn[::2, :turning] = 0.2
    turn[1::2, :turning] = -0.2
    if turning == 1:
        turn[2:] = 0  # in one of 200 frames: no quantile sees it
    robot.action[:, 5] = turn.ravel()
    robot.action[:, 3] = rng.normal(0, 1e-10, 400)
    stats = statistics(robot, twin, alpha)[ACTION]
    assert stats["q01"][5] == pytest.approx(-0.2) and stats["q99"][5] == pytest.approx(0.2)
    assert abs(stats["q01"][3]) < 1e-9 and stats["q99"][3] == stats["q01"][3]  # rounding is no motion
    line = "never moved: roll pitch gripper in demos/robot; roll pitch yaw gripper in demos/twin\n"
    assert capsys.readouterr().out == line
    only_twin = statistics(robot, twin, 1.0)[ACTION]  # what is in no batch counts for nothing
    assert only_twin["q01"][5] == only_twin["q99"][5] == 0
    assert statistics(robot, twin, 0.0) == statistics(robot)
    robot.action[:] = rng.normal(size=robot.action.shape)
    assert data.still_dims(robot) == ""


# ---- mixture ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def real(folder):
    return load_dataset(folder / "image")


@pytest.fixture(scope="module")
def sim(tmp_path_factory):
    path = tmp_path_factory.mktemp("sim") / "demos"
    write_dataset(path, [make_episode(seed, 9) for seed in range(10, 13)], fps=10)
    return load_dataset(path)


@pytest.mark.parametrize("alpha, batch_size", [(0.29, 100), (0.7, 10), (1 / 3, 7), (0.05, 8), (0.999, 16)])
def test_alpha_is_exact(real, sim, alpha, batch_size):
    mixture = Mixture(real, batch_size, 1, 0, sim, alpha)
    counts = np.cumsum([mixture[k]["is_sim"].sum() for k in range(100)])
    share = alpha * batch_size * np.arange(1, 101)
    assert (np.abs(counts - share) < 1).all()
    assert counts[-1] == int(share[-1] + 1e-6)


def test_pure_mixtures_need_one_dataset(real, sim):
    assert not Mixture(real, 6, 2, 0)[0]["is_sim"].any()
    assert Mixture(None, 6, 2, 0, sim, 1)[0]["is_sim"].all()
    for real_data, sim_data, alpha in ((real, None, 0.5), (None, sim, 0.5), (real, sim, 1.5)):
        with pytest.raises(UserError, match="alpha"):
            Mixture(real_data, 6, 2, 0, sim_data, alpha)
    with pytest.raises(UserError, match=r"images \(32, 48, 3\).*\(64, 80, 3\)"):
        Mixture(real, 6, 2, 0, load_dataset(FIXTURES / "lerobot_v30_image"), 0.5)


def test_batch_against_a_slow_loop(real, sim):
    horizon = 4
    mixture = Mixture(real, 64, horizon, 3, sim, 0.4)
    batch = mixture[5]
    assert batch["image"].dtype == torch.uint8 and batch["state"].dtype == batch["action"].dtype == torch.float32
    assert batch["action"].shape == (64, horizon, 7) and batch["action_is_pad"].dtype == torch.bool
    seen_padding = 0
    for i in range(64):
        source = sim if batch["is_sim"][i] else real
        (t,) = np.flatnonzero((source.state == batch["state"][i].numpy()).all(1))
        np.testing.assert_array_equal(batch["image"][i], source.frames[t])
        assert batch["prompt"][i] == source.prompt[t]
        episode = next(e for e in range(len(source.bounds) - 1) if t < source.bounds[e + 1])
        for h in range(horizon):
            inside = t + h < source.bounds[episode + 1]
            assert batch["action_is_pad"][i, h] == (not inside)
            last = t + h if inside else source.bounds[episode + 1] - 1
            np.testing.assert_array_equal(batch["action"][i, h], source.action[last])
            seen_padding += not inside
    assert seen_padding > 10


def test_frames_are_drawn_uniformly(real):
    mixture = Mixture(real, 250, 1, seed=0)
    states = np.concatenate([mixture[k]["state"] for k in range(40)])
    counts = np.array([(states[:, 0] == s).sum() for s in real.state[:, 0]])
    assert counts.sum() == 10_000
    assert ((counts - 400) ** 2 / 400).sum() < 51  # chi-square with 24 degrees of freedom, p = 0.001


def test_deterministic_and_resumable(real, sim):
    def load(start, seed=0):
        return list(DataLoader(Mixture(real, 8, 2, seed, sim, 0.3), batch_size=None, sampler=range(start, 6)))

    def same(a, b):
        return all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)

    batches = load(0)
    assert len(batches) == 6 and all(map(same, batches, load(0))) and all(map(same, batches[4:], load(4)))
    assert not same(batches[0], batches[1]) and not same(batches[0], load(0, seed=1)[0])


@pytest.mark.parametrize("video", [False, True], ids=["image", "video"])
def test_workers_decode_what_memory_holds(tmp_path, video):
    rng = np.random.default_rng(0)  # noise: a file far larger than any read buffer
    noise = [make_episode(0, 60) | {"image": rng.integers(256, size=(60, 64, 64, 3), dtype=np.uint8)} for _ in range(3)]
    write_dataset(tmp_path / "demos", noise, 10, video)
    held, on_disk = (Mixture(load_dataset(tmp_path / "demos", n), 16, 2, 0) for n in (1 << 30, 0))
    on_disk[0]  # opens the file in this process, before the workers fork
    loader = DataLoader(on_disk, batch_size=None, sampler=range(16), num_workers=2)
    for k, batch in enumerate(loader):
        assert torch.equal(batch["image"], held[k]["image"])


def test_a_forked_worker_may_drop_a_video_of_its_parent(folder):
    """FFmpeg would wait for the decoder's threads, which a fork does not have."""

    def drop_videos():
        data._opened.cache_clear()
        gc.collect()

    gc.collect()
    load_dataset(folder / "video", max_bytes=0).frames[np.arange(20)]
    worker = get_context("fork").Process(target=drop_videos)
    worker.start()
    worker.join(30)
    worker.kill()
    assert worker.exitcode == 0


# ---- errors -------------------------------------------------------------------------------------------------------
def rewrite(path, **columns):
    table = pq.read_table(path, partitioning=None)
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), name, [column])
    pq.write_table(table, path)


def edit_info(root, edit):
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    edit(info)
    path.write_text(json.dumps(info))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def nan_action(root):
    action = concatenated("action").tolist()
    action[10][2] = float("nan")
    rewrite(root / DATA_FILE, action=pa.array(action, pa.list_(pa.float32())))


def short_action(root):
    action = concatenated("action").tolist()
    action[7] = action[7][:6]
    rewrite(root / DATA_FILE, action=pa.array(action, pa.list_(pa.float32())))


def slow_video(root):
    """Of 5 frames a second: every other frame of a dataset of 10 Hz is not in it."""
    write_dataset(root / "slow", EPISODES, fps=5, video=True)
    return root / "slow" / VIDEO_FILE


BROKEN = {
    "no dataset": (lambda r: shutil.rmtree(r / "meta"), "is no LeRobot dataset"),
    "corrupt info": (lambda r: truncate(r / "meta/info.json"), r"info\.json: corrupt"),
    "incomplete info": (lambda r: edit_info(r, lambda i: i.pop("fps")), "meta: .*'fps'"),
    "unknown version": (lambda r: edit_info(r, lambda i: i.update(codebase_version="v1.6")), "codebase_version v1.6"),
    "another rate": (lambda r: edit_info(r, lambda i: i.update(fps=15)), "at 15 Hz: neither 10 Hz.* nor a multiple"),
    "wrong rate": (
        lambda r: edit_info(r, lambda i: i.update(fps=30)),
        "says 30 Hz, but its timestamps are 0.100 s apart",
    ),
    "no action": (lambda r: edit_info(r, lambda i: i["features"].pop(ACTION)), "action has shape None"),
    "two cameras": (
        lambda r: edit_info(r, lambda i: i["features"].update(a=i["features"][IMAGE], b=i["features"].pop(IMAGE))),
        r"a camera observation.images.base_0_rgb .*\['a', 'b'\]",
    ),
    "listed twice": (
        lambda r: rewrite(r / EPISODES_FILE, episode_index=pa.array([0, 1, 2, 2])),
        "meta lists an episode twice",
    ),
    "lost episodes": (lambda r: edit_info(r, lambda i: i.update(total_episodes=5)), "4 episodes are listed .* says 5"),
    "feature shape": (
        lambda r: edit_info(r, lambda i: i["features"][STATE].update(shape=[8])),
        r"state has shape \(8,\)",
    ),
    "image shape": (
        lambda r: edit_info(r, lambda i: i["features"][IMAGE].update(shape=[32, 32, 3])),
        r"file-000.*frame . of episode . .*\(32, 48, 3\)",
    ),
    "truncated parquet": (lambda r: truncate(r / DATA_FILE), "file-000.parquet: truncated .*episode 0"),
    "missing parquet": (lambda r: (r / DATA_FILE).unlink(), "file-000.parquet: missing; episode 0"),
    "missing video": (lambda r: (r / VIDEO_FILE).unlink(), "file-000.mp4: missing; .*episode 0"),
    "truncated video": (lambda r: truncate(r / VIDEO_FILE), "file-000.mp4: frame .* of episode .* cannot be read"),
    "slow video": (
        lambda r: shutil.copy(slow_video(r), r / VIDEO_FILE),
        r"file-000.mp4: frame .* cannot be read \(the video has no frame at 0.\d00 s",
    ),
    "short video": (
        lambda r: shutil.copy(FIXTURES / "lerobot_v30_video" / VIDEO_FILE, r / VIDEO_FILE),
        "file-000.mp4: frame .* of episode .* cannot be read",
    ),
    "NaN": (nan_action, "file-000.parquet: action has a NaN .*episode 2, row 10"),
    "vector length": (short_action, "file-000.parquet: action has 6 values in episode 1, row 7"),
    "no vectors": (lambda r: rewrite(r / DATA_FILE, action=pa.array([0.5] * 25)), "action is no column of lists"),
    "lengths differ": (
        lambda r: rewrite(r / EPISODES_FILE, length=pa.array([7, 2, 12, 5])),
        "file-000.parquet: .*episode 1 has 1 rows, its length is 2",
    ),
    "unknown task": (lambda r: rewrite(r / "meta/tasks.parquet", task_index=pa.array([0, 7])), "no task 1"),
    "no task names": (
        lambda r: pq.write_table(pa.table({"task_index": [0, 1]}), r / "meta/tasks.parquet"),
        "meta: corrupt or incomplete",
    ),
    "no length": (lambda r: rewrite(r / EPISODES_FILE, length=pa.nulls(4, pa.int64())), "meta: corrupt or incomplete"),
    "no image shape": (
        lambda r: edit_info(r, lambda i: i["features"][IMAGE].update(shape=[])),
        "meta: corrupt or incomplete",
    ),
    "empty": (lambda r: shutil.rmtree(r / "meta/episodes"), "an empty dataset"),
}


@pytest.mark.parametrize("max_bytes", [1 << 30, 0], ids=["memory", "disk"])
@pytest.mark.parametrize("case", BROKEN)
def test_bad_dataset_is_one_clear_line(folder, tmp_path, case, max_bytes):
    root = tmp_path / "demos"
    shutil.copytree(folder / "video", root)
    damage, message = BROKEN[case]
    damage(root)
    with pytest.raises(UserError, match=message) as error:
        load_dataset(root, max_bytes, fps=10)
    assert str(root) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_dataset_collected_anew_is_read_anew(folder, tmp_path, kind):
    shutil.copytree(folder / kind, tmp_path / "demos")
    before = load_dataset(tmp_path / "demos").frames
    shutil.rmtree(tmp_path / "demos")
    write_dataset(tmp_path / "demos", [e | {"image": e["image"][:, ::-1]} for e in EPISODES], 10, video=kind == "video")
    assert np.abs(load_dataset(tmp_path / "demos").frames[:, ::-1].astype(int) - before).mean() < 3


def test_broken_picture_names_its_episode(folder, tmp_path):
    shutil.copytree(folder / "image", tmp_path / "demos")
    pictures = pq.read_table(tmp_path / "demos" / DATA_FILE)[IMAGE].to_pylist()
    pictures[9]["bytes"] = pictures[9]["bytes"][:60]
    rewrite(tmp_path / "demos" / DATA_FILE, **{IMAGE: pa.array(pictures)})
    with pytest.raises(UserError, match="file-000.parquet: frame 1 of episode 2 cannot be read"):
        load_dataset(tmp_path / "demos")


def test_a_picture_that_a_worker_cannot_read_is_one_line(folder, tmp_path, capsys, monkeypatch):
    """In the middle of a file, of which opening it on disk sees the ends alone."""
    shutil.copytree(folder / "image", tmp_path / "demos")
    pictures = pq.read_table(tmp_path / "demos" / DATA_FILE)[IMAGE].to_pylist()
    small = io.BytesIO()
    Image.new("RGB", (48, 16)).save(small, "PNG")
    pictures[9]["bytes"] = small.getvalue()
    rewrite(tmp_path / "demos" / DATA_FILE, **{IMAGE: pa.array(pictures)})
    mixture = Mixture(load_dataset(tmp_path / "demos", max_bytes=0), 100, 1, 0)
    monkeypatch.setattr("sys.excepthook", None)
    one_line_errors()
    with pytest.raises(UserError) as error:
        next(iter(DataLoader(mixture, batch_size=None, sampler=[0], num_workers=1)))
    sys.excepthook(UserError, error.value, None)
    line = capsys.readouterr().err
    assert re.fullmatch(r".*: /.*file-000.parquet: frame 1 of episode 2 cannot be read .*\(16, 48, 3\).*\n", line)
    assert "Traceback" not in line


@pytest.mark.parametrize("sent, why", [(signal.SIGKILL, "worker .* memory .* --workers"), (signal.SIGSTOP, "hangs")])
def test_a_loading_process_that_is_lost_is_one_line(folder, sent, why, capsys, monkeypatch):
    mixture = Mixture(load_dataset(folder / "image", max_bytes=0), 100, 1, 0)
    batches = iter(DataLoader(mixture, batch_size=None, sampler=range(1000), num_workers=1, timeout=2))
    os.kill(multiprocessing.active_children()[0].pid, sent)
    monkeypatch.setattr("sys.excepthook", None)
    one_line_errors()
    with pytest.raises(RuntimeError) as error:
        list(batches)
    sys.excepthook(RuntimeError, error.value, None)
    assert re.fullmatch(f".*: .*{why}.*the same command goes on\n", capsys.readouterr().err)
    assert not multiprocessing.active_children()  # Python would wait for it, for ever


def test_a_simulator_process_that_is_lost_is_one_line(monkeypatch):
    with pytest.raises(UserError, match="died"), data.worker_pool(1) as pool:
        list(data.in_order(pool, os._exit, [(1,)]))
    monkeypatch.setattr(data, "HANGS", 1)
    with pytest.raises(UserError, match="has not answered"), data.worker_pool(1) as pool:
        list(data.in_order(pool, time.sleep, [(3600,)]))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"action": np.full((5, 7), np.nan)}, "episode 1: action has a NaN"),
        ({"state": np.zeros((4, 7))}, "episode 1: state has shape"),
        ({"action": np.zeros((5, 6))}, "episode 1: action has shape"),
        ({"image": np.zeros((5, 32, 48, 3))}, "episode 1: image must be uint8"),
        ({"image": np.zeros((5, 16, 48, 3), np.uint8)}, "episode 1: image must be uint8"),
        ({"image": np.zeros((0, 32, 48, 3), np.uint8)}, "episode 1: image must be uint8"),
    ],
)
def test_writing_is_whole_or_not_at_all(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        write_dataset(tmp_path / "demos", [EPISODES[0], EPISODES[3] | change], fps=10, video=True)
    assert list(tmp_path.iterdir()) == []


def test_writing_leaves_what_exists_alone(folder, tmp_path):
    with pytest.raises(UserError, match="exists already"):
        DatasetWriter(folder / "image", fps=10)
    with pytest.raises(UserError, match="no episode"):
        write_dataset(tmp_path / "demos", [], fps=10)
    with pytest.raises(UserError, match="exists already"), DatasetWriter(tmp_path / "demos", fps=10) as writer:
        writer.add_episode(EPISODES[0])
        write_dataset(tmp_path / "copy", EPISODES[1:], fps=5)
        (tmp_path / "copy").rename(tmp_path / "demos")  # somebody else was faster
    assert load_dataset(tmp_path / "demos").fps == 5 and len(list(tmp_path.iterdir())) == 1


# ---- collection ---------------------------------------------------------------------------------------------------
def test_collect_keeps_successes_in_seed_order(tmp_path, monkeypatch):
    """Whichever worker is faster and whatever it played before; in a domain where the demonstrator fails now and then.
    A progress bar that is switched off, as TQDM_DISABLE=1 does, counts nothing."""
    import envs

    monkeypatch.setattr(data, "tqdm", partial(data.tqdm, disable=True))
    domain = replace(envs.TWIN, name="slow", action_delay=6)
    with data.worker_pool(workers=2) as pool:
        lengths = data.collect_dataset("push_cube", domain, 6, tmp_path / "demos", first_seed=3, pool=pool)
        blocks = [pool.submit(envs.demonstrations, "push_cube", domain, seeds) for seeds in (range(8, 13), range(3, 8))]
        episodes = [e for block in reversed(blocks) for e in block.result() if e["success"]][:6]
    demos = load_dataset(tmp_path / "demos")
    assert episodes[-1]["seed"] > 3 + 5, "no failure before the last one: the test needs another domain"
    for key, collected in (("image", demos.frames), ("state", demos.state), ("action", demos.action)):
        np.testing.assert_array_equal(collected, np.concatenate([e[key] for e in episodes]), err_msg=key)
    assert pq.read_table(tmp_path / "demos" / EPISODES_FILE)["seed"].to_pylist() == [e["seed"] for e in episodes]
    assert list(lengths) == [len(e["action"]) for e in episodes]
    assert demos.fps == envs.CONTROL_HZ and set(demos.prompt) == {episodes[0]["prompt"]}

    data.collect_dataset("push_cube", domain, 6, tmp_path / "demos", first_seed=3, pool=None)  # there already: kept
    with pytest.raises(UserError, match="has 6 episodes, not 5"):
        data.collect_dataset("push_cube", domain, 5, tmp_path / "demos", first_seed=3, pool=None)


def test_collect_domains_has_all_tasks_each_as_a_new_world_shows_it(tmp_path):
    """One environment of each task is reconfigured from domain to domain: nothing of the last one may stay."""
    import envs

    data.collect(data.CollectArgs(domains=2, out=tmp_path, workers=1))
    demos = load_dataset(tmp_path / "domains")
    assert list(dict.fromkeys(demos.prompt)) == [task.instruction for task in envs.TASKS.values()]
    seeds = pq.read_table(tmp_path / "domains" / EPISODES_FILE)["seed"].to_pylist()
    first = envs.SEEDS["domains"]
    assert set(seeds) == set(range(first, first + 4)) and len(seeds) > 12
    number = max(
        e for e, seed in enumerate(seeds) if seed == first + 2
    )  # the first of close drawer in the second domain
    rows = slice(*demos.bounds[number : number + 2])
    [alone] = envs.demonstrations("close_drawer", envs.random_domain(first + 1), [first + 2])
    np.testing.assert_array_equal(demos.frames[rows], alone["image"])
    np.testing.assert_array_equal(demos.action[rows], alone["action"])
    other = load_dataset(tmp_path / "domains-val")
    assert not set(pq.read_table(tmp_path / "domains-val" / EPISODES_FILE)["seed"].to_pylist()) & set(seeds)
    assert abs(other.frames[0].mean() - demos.frames[0].mean()) > 1  # another lab


def test_a_simulator_that_dies_is_one_line_and_leaves_no_dataset(tmp_path):
    import envs

    died = pytest.raises(UserError, match="a simulator process died.*fewer --workers")
    with died, data.worker_pool(workers=1) as pool:
        pool.submit(os._exit, 1)  # as the kernel ends a process when memory runs out
        data.collect_dataset("push_cube", envs.TWIN, 2, tmp_path / "demos", first_seed=3, pool=pool)
    assert not list(tmp_path.iterdir())
