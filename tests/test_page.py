"""The pages, in the browser that people have; what is drawn, against what was played."""

import io
import json
import os
import shutil
import subprocess
import time
import urllib.request
from contextlib import ExitStack, closing
from html.parser import HTMLParser

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from websockets.sync.client import connect

import envs
import eval_real
import machines
import page

POLICIES = ("runs/sft/best", "runs/</script>&{{head}}/best")  # whatever a folder is called


class Browser:
    """Headless Chromium with one page, over its debugging protocol."""

    def __init__(self, program, url, profile):
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        flags += "--disable-component-update --disable-sync --autoplay-policy=no-user-gesture-required "
        flags += f"--remote-debugging-port=0 --window-size=1440,900 --user-data-dir={profile}"
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen([program, *flags.split(), url], **quiet)
        port = self.wait_for(lambda: (profile / "DevToolsActivePort").read_text().split()[0])
        address = f"http://127.0.0.1:{port}/json"
        tabs = self.wait_for(lambda: [t for t in json.load(urllib.request.urlopen(address)) if t["type"] == "page"])
        self.opened = ExitStack()
        self.socket = self.opened.enter_context(connect(tabs[0]["webSocketDebuggerUrl"], max_size=1 << 26))
        self.wait_for(lambda: self("document.readyState") == "complete" and self("typeof tiles") != "undefined")

    def wait_for(self, something):
        until = time.time() + 60
        while time.time() < until:
            try:
                if found := something():
                    return found
            except (OSError, IndexError):
                pass
            time.sleep(0.1)
        raise TimeoutError(f"Chromium has not: {something}")

    def call(self, method, **params):
        self.socket.send(json.dumps(dict(id=1, method=method, params=params)))
        while "id" not in (reply := json.loads(self.socket.recv(timeout=60))):
            pass  # an event
        return reply["result"]

    def __call__(self, script):
        """What a line of JavaScript gives in the page."""
        reply = self.call("Runtime.evaluate", expression=script, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def close(self):
        self.opened.close()
        self.process.terminate()
        self.process.wait()


@pytest.fixture
def chromium(tmp_path):
    """Opens a page -> Browser. Where CI says it tests this, a missing browser is a failure."""
    program = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    if not program and not os.environ.get("CI"):
        pytest.skip("apt install chromium")
    opened = []

    def open_page(path):
        opened.append(Browser(program, path.as_uri(), tmp_path / "profile"))
        return opened[0]

    yield open_page
    for browser in opened:
        browser.close()


@pytest.fixture
def evaluation(tmp_path):
    """OUT of an evaluation of 100 starts with 400 videos."""
    args = eval_real.StandinArgs(policies=POLICIES, out=tmp_path / "eval")
    rng = np.random.default_rng(0)
    outcomes = {"twin": {}, "standin": {}}
    results = []
    ends = {}
    picture = [np.full((36, 48, 3), grey, np.uint8) for grey in range(0, 250, 25)]
    page.write_video(tmp_path / "video.mp4", [picture])
    (args.out / "videos").mkdir(parents=True)
    for domain, by_policy in outcomes.items():
        for name, rate in zip(POLICIES, (0.3, 0.6)):
            success = (rng.random(100) < rate).tolist()
            by_policy[name] = dict(enumerate(success))
            results.append(eval_real.summary(name, domain, "push_cube", success, [56] * 100))
            for seed in range(100):
                ends[domain, name, seed] = (success[seed], 30 if success[seed] else 56)
                path = eval_real.video_path(args.out, name, domain, seed, success[seed])
                path.parent.mkdir(exist_ok=True, parents=True)
                os.link(tmp_path / "video.mp4", path)
    pairs = eval_real.differences(outcomes)
    eval_real.write_evaluation(args, "push_cube", results, pairs, ends)
    return args.out / "index.html", outcomes


def test_the_page_of_an_evaluation_in_a_browser(evaluation, chromium):
    path, outcomes = evaluation
    browser = chromium(path)
    count = "[...document.querySelectorAll('.tile')].filter(t => t.offsetParent).length"
    choose = "document.getElementById('{}').{} = {}; document.forms[0].oninput()"
    assert browser(count) == browser("tiles.filter(t => t.cell.video).length") == 400
    assert browser("document.querySelectorAll('.tile.good').length") == sum(
        sum(by_seed.values()) for by_policy in outcomes.values() for by_seed in by_policy.values()
    )
    twin = list(outcomes["twin"].values())
    browser(choose.format("group", "value", "'twin'"))
    assert browser(count) == 200
    browser(choose.format("differ", "checked", "true"))
    assert browser(count) == 2 * sum(twin[0][seed] != twin[1][seed] for seed in range(100))
    browser(choose.format("differ", "checked", "false"))
    browser(choose.format("success", "value", "'true'"))
    assert browser(count) == 2 * sum(twin[0][seed] or twin[1][seed] for seed in range(100))
    # what is not seen is not loaded, what is seen plays, a click shows it large, and keys go through them
    browser.wait_for(lambda: browser("document.querySelectorAll('.tile video[src]').length"))
    assert browser("document.querySelectorAll('.tile video[src]').length") < 60
    browser.wait_for(lambda: browser("document.querySelector('.tile video[src]').currentTime > 0"))
    browser("document.querySelector('.tile video[src]').parentElement.click()")
    browser.wait_for(lambda: browser("large.currentTime > 0 && dialog.open"))
    first = browser("current.caption")
    for key, again in (("ArrowRight", False), ("ArrowLeft", True)):
        browser.call("Input.dispatchKeyEvent", type="keyDown", key=key)
        assert (browser("current.caption") == first) == again
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="Escape", windowsVirtualKeyCode=27)
    browser.wait_for(lambda: browser("!dialog.open"))
    for width in (1440, 390):
        browser.call("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=True)
        assert browser("document.documentElement.scrollWidth") <= width


def test_a_page_needs_nothing_but_its_folder(evaluation):
    path, _ = evaluation
    text = path.read_text()
    assert "{{title}}" not in text and "://" not in text
    parser = HTMLParser()
    inside = []
    parser.handle_starttag = lambda tag, attributes: inside.append(tag)
    parser.feed(text)
    assert inside.count("script") == 2 and inside.count("table") == 2
    assert "points [" in text and text.count(".mp4") == 400
    template = (page.Path(page.__file__).with_name("page.html")).read_text()
    assert template.count("\n") < 150


def test_a_video_is_of_the_episode_that_was_played(tmp_path):
    """Its last moment is where the world stood at the end; its inset is what the policy was shown, noise and all."""
    shown = []

    def act(obs):
        shown.append(obs["image"][0].numpy())
        return torch.tensor([0.02, 0.01, -0.02, 0, 0, 0, 1]).expand(1, 4, 7)

    with closing(envs.VecEnv("push_cube", envs.STANDIN, num_envs=1)) as world:
        played = world.play(act, [7])
    snapshots = played["snapshots"][0]
    assert len(snapshots) == played["length"][0] == 56 and np.ptp(snapshots, 0).max() > 0.1
    page.film(tmp_path / "v.mp4", "push_cube", envs.STANDIN, None, 7, snapshots[:8], chunk=4)
    seen, large = page._scenes("push_cube", envs.STANDIN, None, "auto", 64)
    for scene in (seen, large):
        np.testing.assert_allclose(scene.snapshot()[0], snapshots[7], atol=1e-5)
    with av.open(str(tmp_path / "v.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 9 + 10 and frames[0].shape == (360, 480, 3)
    for t, picture in ((0, shown[0]), (3, shown[0]), (4, shown[1]), (8, shown[2])):
        inset = frames[t][10:138, 10:138].reshape(64, 2, 64, 2, 3).mean((1, 3))
        assert np.abs(inset - picture).mean() < 6  # H.264 keeps little of the noise
    assert np.abs(frames[8].astype(int) - frames[0]).max() > 100


@pytest.mark.parametrize("name", ["lerobot_v21_video", "lerobot_v30_image"])
def test_a_dataset_is_shown_in_a_browser(name, tmp_path, chromium, capsys):
    dataset = page.Path(__file__).parent / "data" / name
    page.show(page.ShowArgs(str(dataset), episodes=2, out=tmp_path / "shown"))
    assert "index.html" in capsys.readouterr().out
    browser = chromium(tmp_path / "shown/index.html")
    assert browser("tiles.length") == 2 and browser("document.querySelectorAll('table tr').length") == 8
    browser("tiles[1].click()")
    browser.wait_for(lambda: browser("large.currentTime > 0"))
    assert browser("charts.querySelectorAll('polyline').length") == 14  # seven dimensions of the state and the action
    loaded = page.data.load_dataset(dataset)
    seconds = (loaded.bounds[-1] - loaded.bounds[-2]) / loaded.fps + 1
    assert browser("large.duration") == pytest.approx(seconds, abs=0.11)


def test_tensorboard_gets_the_validation_video(tmp_path):
    pictures = [np.full((8, 16, 3), 10 * t, np.uint8) for t in range(12)]
    page.write_video(tmp_path / "v.mp4", [pictures])
    with SummaryWriter(tmp_path) as writer:
        page.log_video(writer, tmp_path / "v.mp4", 5)
    (event,) = EventAccumulator(str(tmp_path), size_guidance=dict(images=0)).Reload().Images("validation")
    gif = Image.open(io.BytesIO(event.encoded_image_string))
    assert (event.step, event.width, gif.size, gif.info["duration"]) == (5, 16, (16, 8), 100) and gif.n_frames > 8


def test_a_slow_machine_is_told_what_to_do(capsys, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(torch.get_num_threads() + 1))
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0, 0))
    machines.say_if_slow(3000, "fewer --steps")
    assert not capsys.readouterr().out
    machines.say_if_slow(7200, "fewer --steps")
    said = capsys.readouterr().out
    assert all(word in said for word in ("2.0 hours", "99 programs", "OMP_NUM_THREADS", "fewer --steps"))
