import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mani_skill.utils.structs import Pose

import envs
from checkpoints import UserError

ROOT = Path(__file__).parent.parent
CLOSED = -1.0


@pytest.fixture(scope="module")
def pair():
    """Two environments of the same task and domain, with the stand-in's delay and noise."""
    return [envs.make("push_cube", envs.STANDIN) for _ in range(2)]


@pytest.fixture(scope="module")
def twin():
    return envs.make("push_cube", envs.TWIN)


def random_actions(rng, steps):
    actions = rng.uniform(-0.02, 0.02, (steps, 7)).astype(np.float32)
    actions[:, 3:6] *= 2
    actions[:, 6] = CLOSED
    return torch.from_numpy(actions)


def test_kinematics_agree_with_sapien_and_with_finite_differences(twin):
    generator = torch.Generator().manual_seed(0)
    low, high = twin.agent.robot.get_qlimits()[0, :7].T
    for _ in range(5):
        q = low + (high - low) * torch.rand(1, 7, generator=generator)
        twin.agent.robot.set_qpos(torch.cat([q, torch.zeros(1, 2)], -1))
        tcp, jacobian = envs.panda_kinematics(q)
        torch.testing.assert_close(tcp, twin.tcp.to_transformation_matrix(), atol=2e-5, rtol=0)
        for joint in range(7):
            step = torch.zeros(1, 7)
            step[0, joint] = 1e-3
            forth, back = envs.panda_kinematics(q + step)[0], envs.panda_kinematics(q - step)[0]
            turn = (forth - back)[0, :3, :3] @ tcp[0, :3, :3].T / 2e-3
            numeric = torch.tensor([*((forth - back)[0, :3, 3] / 2e-3), turn[2, 1], turn[0, 2], turn[1, 0]])
            torch.testing.assert_close(jacobian[0, :, joint], numeric, atol=2e-3, rtol=0)


def test_an_action_is_metres_and_radians_in_the_base_frame(twin):
    twin.reset(seed=[5])
    before = twin.proprioception()[0]
    actions = torch.zeros(1, 20, 7)
    actions[0, :2, :6] = torch.tensor([0.01, 0.02, 0.015, 0.02, -0.03, 0.1])
    actions[..., 6] = 1.0
    twin.step_chunk(actions)
    moved = twin.proprioception()[0] - before
    torch.testing.assert_close(moved[:3], torch.tensor([0.02, 0.04, 0.03]), atol=1e-3, rtol=0)
    torch.testing.assert_close(moved[3:6], torch.tensor([0.04, -0.06, 0.2]), atol=0.01, rtol=0)
    assert moved[6] > 1.9  # from closed to open


def test_chunked_stepping_equals_single_stepping(pair):
    chunked, single = pair
    for seed in range(2):
        actions = random_actions(np.random.default_rng(seed), 24)
        for env in pair:
            env.reset(seed=[seed])
        for chunk in actions.split(8):
            reward, terminated, truncated, _ = chunked.step_chunk(chunk[None])
            alone = [single.step(action[None]) for action in chunk]
            torch.testing.assert_close(reward, sum(step[1] for step in alone), atol=1e-6, rtol=0)
            assert not terminated and not truncated
            torch.testing.assert_close(chunked.get_state(), single.get_state(), atol=0, rtol=0)
        # single.step rendered, and drew noise, at every step; the pictures differ by noise alone: 2 / sqrt(pi) of it
        a, b = (env.observe() for env in pair)
        assert (a["image"].float() - b["image"].float()).abs().mean() < 1.2 * envs.STANDIN.image_noise
        torch.testing.assert_close(a["state"], b["state"])


def test_an_episode_that_ends_inside_a_chunk_stops_there(twin):
    twin.reset(seed=[1])
    rewards = []
    actions = []
    for action in twin.demonstrator(np.random.default_rng(1)):
        reward, terminated, truncated, _ = twin.step_chunk(torch.from_numpy(action)[None, None])
        actions.append(action)
        rewards.append(reward)
        if terminated or truncated:
            break
    assert terminated and len(actions) < twin.max_episode_steps
    final = twin.get_state()
    twin.reset(seed=[1])
    garbage = np.tile(np.float32([0.05, 0, 0, 0, 0, 0, CLOSED]), (10, 1))
    reward, terminated, truncated, info = twin.step_chunk(torch.from_numpy(np.concatenate([actions, garbage]))[None])
    assert terminated and not truncated and info["success"]
    assert twin.elapsed_steps.item() == len(actions)
    torch.testing.assert_close(reward, sum(rewards), atol=1e-5, rtol=0)
    torch.testing.assert_close(twin.get_state(), final, atol=0, rtol=0)


def test_the_domain_sets_what_it_says(twin):
    heavy = replace(envs.TWIN, name="heavy", object_mass=0.33, friction=0.15, stiffness=400.0)
    env = envs.make("push_cube", heavy)
    assert env.cube.mass.item() == pytest.approx(0.33)
    assert env.cube._bodies[0].collision_shapes[0].physical_material.static_friction == pytest.approx(0.15)
    assert env.agent.controller.joints[0]._objs[0].stiffness == pytest.approx(400)
    env.close()


def test_the_stand_in_acts_one_step_late(pair, twin):
    for env in (pair[0], twin):
        env.reset(seed=[3])
    push = torch.tensor([[0.02, 0, 0, 0, 0, 0, CLOSED]])
    for env, first, second in ((twin, True, True), (pair[0], False, True)):
        start = env.tcp.p[0, 0].item()
        env._step_action(push)
        assert (env.tcp.p[0, 0].item() - start > 1e-3) == first
        env._step_action(torch.zeros(1, 7))
        assert (env.tcp.p[0, 0].item() - start > 1e-3) == second


def test_pictures_show_the_domain(twin, pair):
    def seen(env):
        env.reset(seed=[2])
        return env.observe()["image"][0].float()

    first, again, other = seen(twin), seen(twin), seen(pair[0])
    assert first.shape == (64, 64, 3) and first.std() > 20
    torch.testing.assert_close(first, again, atol=0, rtol=0)
    assert (first - other).abs().mean() > 20


@pytest.mark.parametrize("task", envs.TASKS)
@pytest.mark.parametrize("domain", [envs.TWIN, envs.STANDIN])
def test_the_demonstrator_finishes_in_time(task, domain):
    for episode in envs.demonstrations(task, domain, range(777_000, 777_010)):
        steps = len(episode["action"])
        assert episode["success"] and steps <= envs.TASKS[task].max_episode_steps, episode["seed"]
        assert episode["image"].shape == (steps, 64, 64, 3) and episode["state"].shape == (steps, 7)
    assert episode["prompt"] == envs.TASKS[task].instruction


def test_pushed_is_on_the_table_in_the_square_at_rest(twin):
    def success(aside=0.0, height=0.0, speed=0.0):
        twin.reset(seed=[0])
        twin.cube.set_pose(Pose.create_from_pq(twin.goal.pose.p + torch.tensor([[0, aside, twin.half_size + height]])))
        twin.cube.set_linear_velocity(torch.tensor([[speed, 0, 0]]))
        return twin.evaluate()["success"].item()

    assert success() and success(aside=0.024)
    assert not success(aside=0.026) and not success(height=0.01) and not success(speed=0.04)


def test_picked_and_placed_is_in_the_bowl_at_rest_and_released():
    env = envs.make("pick_place", envs.TWIN)

    def success(height=0.03, aside=0.0, opening=envs.GRIPPER_OPEN, speed=0.0):
        env.reset(seed=[0])
        bowl = env.bowl.pose.p
        env.block.set_pose(Pose.create_from_pq(bowl + torch.tensor([[aside, 0, height]])))
        env.block.set_linear_velocity(torch.tensor([[0, 0, speed]]))
        q = env.agent.robot.get_qpos()
        q[:, 7:] = opening
        env.agent.robot.set_qpos(q)
        return env.evaluate()["success"].item()

    assert success()
    assert not success(height=0.06) and not success(aside=0.07) and not success(speed=0.1)
    assert not success(opening=env.half_size)  # still held


@pytest.mark.parametrize("task, beyond, short", [("open_drawer", 0.151, 0.149), ("close_drawer", 0.009, 0.011)])
def test_a_drawer_counts_when_it_is_far_enough_and_rests(task, beyond, short):
    env = envs.make(task, envs.TWIN)
    for opening, speed, success in (
        (beyond, 0, True),
        (short, 0, False),
        (beyond, 0.2, False),
        (0.0, -0.1, task == "close_drawer"),
    ):  # pressed against its stop
        env.reset(seed=[0])
        env.cabinet.set_qpos(torch.tensor([[opening]]))
        env.cabinet.set_qvel(torch.tensor([[float(speed)]]))
        assert env.evaluate()["success"].item() == success


def test_unseen_variations_lie_outside_of_the_training_area():
    place, hand = [], []
    for variation in (None, *envs.VARIATIONS):
        env = envs.make("pick_place", envs.TWIN, variation=variation)
        for seed in range(20):
            env.reset(seed=[seed])
            block, tcp = env.block.pose.p[0], env.tcp.p[0]
            place.append((block[:2] - torch.tensor([0.46, 0.11])).abs().max().item() < 0.0501)
            low, high = torch.tensor(env.start_tcp)
            hand.append(((tcp > low - 1e-3) & (tcp < high + 1e-3))[:2].all().item())
        shape = type(env.block._bodies[0].collision_shapes[0]).__name__
        assert ("Cylinder" in shape) == (variation == "objects")
        assert all(place) != (variation == "positions") and all(hand) != (variation == "robot")
        assert variation != "positions" or not any(place)
        assert variation != "robot" or not any(hand)
        place, hand = [], []


def towards_the_middle(obs):
    """A policy without chance: it depends on what it sees, so that a mixed-up row shows."""
    action = torch.zeros(len(obs["state"]), 8, 7)
    action[..., :3] = ((torch.tensor([0.55, 0.0, 0.15]) - obs["state"][:, :3]) * 0.15)[:, None]
    action[..., 1] += (obs["image"].float().mean((1, 2, 3)) - 128)[:, None] * 1e-4
    action[..., 6] = CLOSED
    return action


def test_vectorised_episodes_are_those_of_one_environment(twin):
    def alone(seed):
        twin.reset(seed=[seed])
        total, end = 0.0, False
        while not end:
            reward, terminated, truncated, _ = twin.step_chunk(towards_the_middle(twin.observe()))
            total, end = total + reward.item(), bool(terminated | truncated)
        return bool(terminated), twin.elapsed_steps.item(), total

    seeds = range(50, 57)
    expected = [alone(seed) for seed in seeds]
    for num_envs, workers in ((4, 2), (3, 1)):
        world = envs.VecEnv("push_cube", envs.TWIN, num_envs, workers)
        played = world.play(towards_the_middle, seeds)
        world.close()
        assert [(s, n) for s, n, _ in expected] == list(zip(played["success"], played["length"]))
        np.testing.assert_allclose(played["reward"], [r for _, _, r in expected], atol=1e-4)


def test_each_world_may_have_a_domain_of_its_own(pair):
    """In the order of the rows, over two workers; a randomised twin lies between the twin and a random domain."""
    domains = [envs.TWIN, envs.STANDIN, envs.random_twin(5)]
    world = envs.VecEnv("push_cube", domains, 3, 2)
    image = world.reset(40)["image"]
    world.close()
    alone, _ = pair[0].reset(seed=[41], options=dict(reconfigure=True))
    assert torch.equal(image[1], pair[0].observe(alone)["image"][0])
    assert (image[2].float() - image[0].float()).abs().mean() > 1
    for seed in range(30):
        near, far = envs.random_twin(seed), envs.random_domain(seed)
        assert near == envs.random_twin(seed) and near.action_delay <= 1
        for key in ("camera_eye", "ambient", "object_color", "friction", "stiffness"):
            twin, here, there = (np.array(getattr(domain, key)) for domain in (envs.TWIN, near, far))
            assert (np.abs(here - twin) <= np.abs(there - twin) / 2 + 1e-9).all()


@pytest.mark.parametrize("task", ["pick_place", "close_drawer"])
def test_an_episode_does_not_depend_on_those_before_it(task):
    """To the last bit, contacts included: PhysX itself would remember them."""
    env = envs.make(task, envs.STANDIN)

    def play(seed, anew):
        env.reset(seed=[seed], options=dict(reconfigure=anew))
        for _, action in zip(range(40), env.demonstrator(np.random.default_rng(seed))):
            env.step_chunk(torch.from_numpy(action)[None, None])
        return torch.cat([env.get_state().flatten(), env.observe()["image"].flatten()])

    first = [play(seed, anew=True) for seed in range(3)]
    for seed in (1, 0, 2, 1):
        torch.testing.assert_close(play(seed, anew=False), first[seed], atol=0, rtol=0)


def test_every_episode_gets_its_own_actions_however_early_others_end():
    class Counting(envs.VecEnv):
        """Episode `seed` shows its seed, ends after 1 + seed % 3 chunks, and wants its seed as its action."""

        def __init__(self):
            self.num_envs = 3
            self.instruction = ""

        def _exchange(self, command, rows, auto_reset=True, video=False):
            if command == "reset":
                self.seeds = rows
                self.steps = [0] * 3
            reply = self.seen if command == "reset" else self.played
            return [reply(rows[i], i) if i in rows else None for i in range(3)]

        def seen(self, seed, row):
            return np.full((1, 1, 3), seed, np.uint8), np.float32([seed])

        def played(self, actions, row):
            seed = self.seeds[row]
            self.steps[row] += 1
            done = self.steps[row] == 1 + seed % 3
            return (
                None if done else self.seen(seed, row),
                float(actions[0, 0] == seed),
                done and seed % 2 == 0,
                done and seed % 2 == 1,
                self.steps[row],
                None,
                [],
                [],
            )

    played = Counting().play(lambda obs: obs["state"][:, None], range(7))
    assert list(played["length"]) == list(played["reward"]) == [1, 2, 3, 1, 2, 3, 1]
    assert list(played["success"]) == [True, False] * 3 + [True]


def test_auto_reset_gives_the_next_first_observation_and_the_last_of_what_was_truncated(twin):
    """Row 0 succeeds, row 1 waits till its time is over."""
    world = envs.VecEnv("push_cube", envs.TWIN, 2, 1)
    limit = envs.PushCube.max_episode_steps
    push = envs.demonstrations("push_cube", envs.TWIN, [10])[0]["action"]
    steps = len(push)
    actions = torch.zeros(2, limit, 7)
    actions[..., 6] = CLOSED
    actions[0, :steps] = torch.from_numpy(push)
    chunks = actions.split(8, 1)
    ends = []
    world.reset(10)
    for chunk in chunks:
        obs, _, terminated, truncated, info = world.step(chunk)
        ends.append((terminated.tolist(), truncated.tolist()))
        if terminated[0]:
            assert info["final_obs"] is None and info["length"][0] == steps
            twin.reset(seed=[12])  # its next episode
            torch.testing.assert_close(obs["image"][0], twin.observe()["image"][0], atol=0, rtol=0)
    assert ends.count(([True, False], [False, False])) == 1 and ends[-1] == ([False, False], [False, True])
    assert len(ends) == len(chunks) and info["length"][1] == limit and len(info["final_obs"]["image"]) == 1
    twin.reset(seed=[11])
    for _ in chunks:
        twin.step_chunk(chunks[-1][1:])
    torch.testing.assert_close(info["final_obs"]["state"][0], twin.observe()["state"][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(info["final_obs"]["image"][0], twin.observe()["image"][0], atol=1, rtol=0)
    twin.reset(seed=[13])
    torch.testing.assert_close(obs["image"][1], twin.observe()["image"][0], atol=0, rtol=0)
    world.close()


def test_the_task_of_the_docs_works(monkeypatch):
    docs = (ROOT / "docs/extend.md").read_text()
    code = next(block for block in docs.split("```python\n") if "class LiftBlock" in block).split("```")[0]
    namespace = {}
    exec(code, vars(envs), namespace)
    monkeypatch.setitem(envs.TASKS, "lift_block", namespace["LiftBlock"])
    for domain in (envs.TWIN, envs.STANDIN):
        assert all(episode["success"] for episode in envs.demonstrations("lift_block", domain, range(5)))


def test_a_failing_worker_says_why():
    world = envs.VecEnv("push_cube", envs.TWIN, 1, 1, no_such_option=1)
    with pytest.raises(RuntimeError, match="no_such_option"):
        world.reset(0)


def test_a_killed_worker_is_one_line():
    world = envs.VecEnv("push_cube", envs.TWIN, 1, 1)
    world.processes[0].kill()
    with pytest.raises(UserError, match="an environment worker died: killed, as happens where memory runs out"):
        world.reset(0)


def test_a_worker_that_hangs_is_one_line_and_does_not_stay(monkeypatch):
    world = envs.VecEnv("push_cube", envs.TWIN, 1, 1)
    world.processes[0].send_signal(signal.SIGSTOP)
    monkeypatch.setattr(envs, "HANGS", 0.5)
    with pytest.raises(UserError, match="an environment worker has hung"):
        world.reset(0)
    assert world.processes[0].wait(10) == -signal.SIGKILL


def test_a_worker_imports_no_policy():
    """It would cost each of them two seconds and 100 MB."""
    code = "import sys, envs; sys.exit(bool({'policy', 'data', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_low_polygon_robot_goes_into_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = envs.lowpoly_urdf((0.1, 0.2, 0.3))
    assert path.startswith(str(tmp_path)) and os.path.exists(path.replace(".urdf", ".srdf"))
    assert "glb" not in open(path).read() and envs.lowpoly_urdf((0.1, 0.2, 0.3)) == path
    assert envs.lowpoly_urdf((0.3, 0.2, 0.1)) != path


def test_random_domains_are_labs_of_their_own():
    """Repeatable and all different; colours in 0..1; the camera before the robot, the middle of the table in view."""
    domains = [envs.random_domain(seed) for seed in range(100)]
    assert domains[7] == envs.random_domain(7) and len({domain.camera_eye for domain in domains}) == 100
    for domain in domains:
        paints = [domain.background, domain.robot_color, domain.object_color, domain.goal_color, *domain.table_colors]
        assert np.min(paints) >= 0 and np.max(paints) <= 1
        eye, target = np.array(domain.camera_eye), np.array(domain.camera_target)
        to_middle = np.array([0.48, 0, 0]) - eye
        angle = np.arccos((target - eye) @ to_middle / np.linalg.norm(target - eye) / np.linalg.norm(to_middle))
        assert eye[2] > 0.2 and domain.light_direction[2] < 0 and angle < domain.camera_fov / 2
    assert {domain.action_delay for domain in domains} == {0, 1, 2}
    assert len({domain.robot_color for domain in domains}) <= 10  # each is a file in the user's cache


def test_seeds_of_different_uses_never_meet():
    starts = sorted(envs.SEEDS.values())
    assert min(np.diff(starts)) >= 1_000_000
    assert envs.SEEDS["rl"] == starts[-1]  # open-ended: an iteration takes ten thousand, however many there are
    for seed in (0, 1, 419, 1337, 2**40):
        assert starts[-1] <= envs.rl_seed(seed, 0) and envs.rl_seed(seed, 999) + 10_000 < 2**32
    assert envs.rl_seed(1, 999) + 10_000 == envs.rl_seed(2, 0)


def test_an_unknown_task_is_one_line():
    for build in (lambda: envs.make("fly", envs.TWIN), lambda: envs.VecEnv("fly", envs.TWIN)):
        with pytest.raises(UserError, match="no task 'fly': choose one of pick_place, push_cube"):
            build()


def test_pictures_are_those_of_the_stock_shaders(twin, monkeypatch):
    monkeypatch.setattr(envs, "shader_for_cpus", lambda: envs.PREBUILT_SHADER_CONFIGS["minimal"])
    stock = envs.make("push_cube", envs.TWIN)
    assert stock._sensor_configs["base_0_rgb"].shader_pack != twin._sensor_configs["base_0_rgb"].shader_pack
    for env in (stock, twin):
        env.reset(seed=[4])
    torch.testing.assert_close(stock.observe()["image"], twin.observe()["image"], atol=0, rtol=0)
    torch.testing.assert_close(stock.render_rgb_array(), twin.render_rgb_array(), atol=0, rtol=0)


def test_what_is_commanded_does_not_depend_on_the_company(pair):
    """Chunks of several worlds computed at once equal those of each alone, to the last bit."""
    controllers = [env.agent.controller for env in pair]
    actions = torch.stack([random_actions(np.random.default_rng(seed), 8) for seed in range(2)])
    for env, seed in zip(pair, (5, 6)):
        env.reset(seed=[seed])
    together = envs.joint_targets(controllers, actions)
    for env, seed in zip(pair, (5, 6)):
        env.reset(seed=[seed])
    alone = torch.cat([envs.joint_targets([c], a[None]) for c, a in zip(controllers, actions)])
    torch.testing.assert_close(together, alone, atol=0, rtol=0)
    assert together.shape == (2, 8, 9) and (together[0] != together[1]).any()


def test_a_task_that_returns_a_scalar_is_one_line(twin, monkeypatch):
    twin.reset(seed=[0])
    monkeypatch.setattr(twin, "evaluate", lambda: dict(success=torch.tensor(False)))
    with pytest.raises(
        UserError, match=r"PushCube.evaluate\(\)\['success'\] has shape \[\]: it must be a tensor \[1\]"
    ):
        twin.step_chunk(torch.zeros(1, 1, 7))


@pytest.mark.parametrize("task", envs.TASKS)
def test_an_episode_does_not_depend_on_its_company(task):
    """Demonstrations of four worlds in a batch and of one alone, in another row: equal to the last bit, noise too."""
    together = envs.demonstrations(task, envs.STANDIN, range(60, 64))
    for seed in (63, 61):
        [alone] = envs.demonstrations(task, envs.STANDIN, [seed])
        for key in ("image", "state", "action"):
            np.testing.assert_array_equal(alone[key], together[seed - 60][key])


def test_a_batch_is_its_worlds_one_by_one(pair, twin):
    """Rewards and ends of two domains in one batch; a reset of one row leaves the other, and what it was commanded."""
    seeds = {0: 21, 1: 22}
    chunks = torch.stack([random_actions(np.random.default_rng(seed), 24) for seed in seeds.values()]).split(8, 1)
    batch = envs.Batch([twin, pair[0]])
    batch.reset(seeds)
    together = [torch.stack([values.float() for values in batch.step(chunk, [0, 1])]) for chunk in chunks]
    for row, world in enumerate(batch.worlds):
        world.reset(seed=[seeds[row]])
        for chunk, expected in zip(chunks, together):
            alone = torch.stack([values.float() for values in world.step_chunk(chunk[row, None])[:3]])
            torch.testing.assert_close(alone[:, 0], expected[:, row], atol=0, rtol=0)
    kept = [twin.get_state(), twin.commanded, twin.elapsed_steps.clone()]
    batch.reset({1: 23})
    for before, after in zip(kept, [twin.get_state(), twin.commanded, twin.elapsed_steps]):
        torch.testing.assert_close(before, after, atol=0, rtol=0)
    assert pair[0].elapsed_steps == 0


class Moved(envs.PushCube):
    """Done as soon as the cube has been moved at all: what a task remembers."""

    def _load_objects(self):
        super()._load_objects()
        self.moved = torch.zeros(self.num_envs, dtype=torch.bool)
        self.weight = self.domain.object_mass if self.of_domain else 0.1

    def _place_objects(self, env_idx):
        super()._place_objects(env_idx)
        self.moved[env_idx] = False

    def evaluate(self):
        self.moved = self.moved | (torch.linalg.norm(self.cube.linear_velocity, dim=-1) > 0.05)
        return dict(success=self.moved.clone())

    of_domain = False


def test_a_task_may_remember(monkeypatch):
    """Of each row, and anew with each episode; a number that differs between worlds is one line."""
    worlds = [Moved(envs.TWIN), Moved(envs.STANDIN)]
    batch = envs.Batch(worlds)
    batch.reset({0: 1, 1: 2})
    still = torch.zeros(2, 1, 7)
    for _ in range(3):  # they fall on the table
        batch.step(still, [0, 1])
    batch.reset({0: 1, 1: 2})
    worlds[1].cube.set_linear_velocity(torch.tensor([[1.0, 0, 0]]))
    assert batch.step(still, [0, 1])[1].tolist() == [False, True]
    assert batch.view.moved.tolist() == [False, True]
    batch.reset({1: 3})
    assert batch.step(still, [0, 1])[1].tolist() == [False, False]
    monkeypatch.setattr(Moved, "of_domain", True)
    with pytest.raises(UserError, match=r"Moved.weight is 0.1 in one environment and not in another"):
        envs.Batch([Moved(envs.TWIN), Moved(envs.STANDIN)])


def test_places_for_other_environments_are_one_line(twin):
    twin.reset(seed=[0])
    with pytest.raises(UserError, match=r"PushCube._place_objects asks for 3 positions: .* environments that begin"):
        twin.sample_positions(2, 3)
    with pytest.raises(UserError, match="reset got 2 seeds for 1 environments"):
        twin.reset(seed=[1, 2])
