"""The real path without an arm: openpi's own client at the server, franka-rs at franka-sim, OpenCV at video files."""
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

import envs
import eval_real
from policy import load_policy

ROOT = Path(__file__).parent.parent
ENVIRON = {**os.environ, "PYTHONWARNINGS": "ignore", "FRANKA_REALTIME": "ignore", "PYTHONUNBUFFERED": "1"}
STATS = {"observation.state": {"q01": [-1.0] * 7, "q99": [1.0] * 7},
         "action": {"q01": [-0.02] * 6 + [-1.0], "q99": [0.02] * 6 + [1.0]}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / "random"
    torch.manual_seed(1)
    load_policy("tiny-pi05", stats=STATS).save(folder)
    return folder


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    """Port of a served checkpoint."""
    pytest.importorskip("websockets", reason="pip install -r requirements-robot.txt")
    process = subprocess.Popen([sys.executable, str(ROOT / "eval_real.py"), "--target", "server", "--policies",
                                str(checkpoint), "--port", "0"], cwd=tmp_path_factory.mktemp("server"), env=ENVIRON,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    line = process.stdout.readline()
    assert "ws://127.0.0.1:" in line, line + process.stdout.read()  # loopback, unless told otherwise
    yield int(line.rsplit(":", 1)[1])
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=30)[0]
    assert "Traceback" not in output and process.returncode == 1 and "interrupted" in output


@pytest.fixture
def connect(server):
    client = pytest.importorskip("openpi_client.websocket_client_policy",
                                 reason="pip install --no-deps openpi-client==0.1.2")
    return lambda: client.WebsocketClientPolicy("127.0.0.1", server)


def some_obs(seed):
    rng = np.random.default_rng(seed)
    return dict(image=rng.integers(0, 256, (64, 64, 3), np.uint8), state=rng.random(7, np.float32), prompt="push")


def test_an_episode_through_openpis_client_is_the_one_in_process(connect, checkpoint):
    policy, client, trip = load_policy(checkpoint), connect(), []
    world = envs.VecEnv("push_cube", envs.STANDIN, num_envs=1)

    def remote(obs):
        start = time.perf_counter()
        reply = client.infer(dict(image=obs["image"][0].numpy(), state=obs["state"][0].numpy(), prompt=obs["prompt"][0]))
        trip.append((1000 * (time.perf_counter() - start), reply["server_timing"]["infer_ms"]))
        return reply["actions"][None]

    seeds = [envs.SEEDS["evaluation"]]
    here = world.evaluate(lambda obs: policy.act(obs, sample=False).actions, seeds, video=True)
    there = world.evaluate(remote, seeds, video=True)
    world.close()
    assert client.get_server_metadata()["chunk"] == policy.chunk and len(trip) == 56 / policy.chunk
    for key in ("success", "length", "reward"):
        np.testing.assert_array_equal(here[key], there[key])
    np.testing.assert_array_equal(here["frames"][0], there["frames"][0])
    total, inside = np.median(trip, 0)
    print(f"\nround trip {total:.1f} ms in the median, of which the policy takes {inside:.1f} ms")


def test_clients_do_not_mix(connect):
    alone = [connect() for _ in range(2)]
    expected = [[c.infer(some_obs(10 * i + t))["actions"] for t in range(3)] for i, c in enumerate(alone)]
    assert np.abs(expected[0][0] - expected[1][0]).max() > 1e-4
    both, got = [connect() for _ in range(2)], [[], []]

    def play(i):
        for t in range(3):
            got[i].append(both[i].infer(some_obs(10 * i + t))["actions"])

    threads = [threading.Thread(target=play, args=(i,)) for i in range(2)]
    [t.start() for t in threads], [t.join() for t in threads]
    np.testing.assert_array_equal(got, expected)


def test_a_bad_message_is_answered_and_a_client_that_goes_is_forgotten(connect, server):
    from websockets.sync.client import connect as raw
    first = connect().infer(some_obs(0))["actions"]
    client = connect()
    good = some_obs(0)
    for bad, why in (({**good, "image": good["image"].astype(np.float32)}, "uint8"), ({**good, "state": good["state"][:6]}, "7"),
                     ({**good, "state": good["state"] * np.nan}, "finite"), ({**good, "prompt": 3}, "prompt"),
                     ({"prompt": "push"}, "image"), ([1, 2], "dict"), ({**good, "image": good["image"][..., :1]}, "image")):
        with pytest.raises(RuntimeError, match=why) as error:
            client.infer(bad)
        assert "Traceback" not in str(error.value)
    np.testing.assert_array_equal(client.infer(good)["actions"], first)  # bad messages leave no trace
    flat = {"observation/image": good["image"], "observation/state": good["state"], "prompt": good["prompt"]}
    np.testing.assert_array_equal(connect().infer(flat)["actions"], first)
    with raw(f"ws://127.0.0.1:{server}") as ws:
        ws.recv()
        for garbage in (b"\xc1", b"", "text", b"\x81\xc4\x0b__ndarray__\xc3"):  # the last: an array without data
            ws.send(garbage)
            assert isinstance(ws.recv(), str)
        ws.send(b"\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x08\x00\x00\x00\x00\x00\x00\x00\x00\xc4\x05dtype\xa2|O"
                b"\xc4\x05shape\x91\x01")  # an object array would be a pointer into the server's memory
        assert "object" in ws.recv().lower()
        ws.socket.close()  # gone, without a word
    np.testing.assert_array_equal(connect().infer(good)["actions"], first)


@pytest.mark.parametrize("arguments,why", [
    ("--target server", "one checkpoint"), ("--target server --policies a b", "one checkpoint"),
    ("--target nowhere --policies a", "--target"), ("--target server --policies a --task nothing", "push_cube")])
def test_wrong_arguments_are_one_line(arguments, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in eval_real.Args.policies:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises((ValueError, SystemExit), match=why):
        eval_real.main(tyro.cli(eval_real.Args, args=arguments.split()))
