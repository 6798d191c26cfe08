"""checkpoints.py: files, the state of a run, and every layout of a checkpoint folder as its own code reads it."""

import gzip
import json
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, load_model, save_file
from test_policy import BOTH, DATA, MIXED, PROMPT, make, make_batch, make_obs
from tokenizers import Tokenizer, models

import checkpoints as C
import policy as P
from checkpoints import UserError


def full_size_keys(name):
    lines = gzip.decompress((DATA / name / "keys_full_size.txt.gz").read_bytes()).decode().splitlines()
    pairs = (line.split("\t") for line in lines if not line.startswith("#"))
    return {key: json.loads(shape) for key, shape in pairs}


# ---- files, errors, the state of a run ---------------------------------------------------------------------------


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "new/file.txt"
    with C.whole_file(path) as temporary:
        temporary.write_text("first")
        assert temporary.parent == path.parent and temporary.suffix == ".txt" and not path.exists()
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), C.whole_file(path) as temporary:
            temporary.write_text("half")
            raise error
    assert path.read_text() == "first" and [p.name for p in path.parent.iterdir()] == ["file.txt"]
    (path.parent / ".killed.7.partial.json").write_text("half")  # is not read, and does not go along
    make("tiny-pi05").save(path.parent)
    (path.parent / ".model.7.partial.safetensors").write_bytes(b"half")
    P.load_policy(path.parent).save(tmp_path / "other")
    assert not list((tmp_path / "other").glob(".*"))


def test_a_full_disk_is_one_line(tmp_path):
    with pytest.raises(UserError, match="file.txt cannot be written: the disk is full"):
        with C.whole_file(tmp_path / "file.txt"), open("/dev/full", "w") as full:
            full.write("x")
            full.flush()
    assert not list(tmp_path.iterdir())


CLAIM = """
import sys, time
sys.path.insert(0, {root!r})
import checkpoints
checkpoints.one_line_errors()
checkpoints.claim("run")
with checkpoints.whole_file("run/last/file.txt") as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_second_start_names_the_first_and_a_kill_leaves_neither_lock_nor_litter(tmp_path):
    command = [sys.executable, "-c", CLAIM.format(root=str(Path(C.__file__).parent))]
    run = partial(subprocess.Popen, command, cwd=tmp_path, stdout=-1, stderr=-1, text=True)
    first = run()
    assert first.stdout.readline() == "writing\n"
    second = run()
    output, error = second.communicate()
    assert second.returncode == 1 and not output and error.count("\n") == 1
    assert f"run is in use by process {first.pid} on" in error
    assert [p.suffix for p in (tmp_path / "run/last").iterdir()] == [".txt"]  # what the first writes is still there
    first.kill()
    first.wait()
    third = run()
    assert third.stdout.readline() == "writing\n"
    assert [p.name for p in (tmp_path / "run/last").iterdir()] == [f".file.{third.pid}.partial.txt"]
    third.terminate()
    assert third.communicate()[1] == "interrupted; the same command goes on\n" and third.returncode != 0
    assert not list((tmp_path / "run/last").iterdir())


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from checkpoints import UserError, one_line_errors
one_line_errors(debug={debug})
raise {error}
"""


@pytest.mark.parametrize(
    "error, debug, traceback, last",
    [
        ("UserError('no such dish')", False, False, "script.py: no such dish"),
        ("UserError('no such dish')", True, True, "script.py: no such dish"),
        ("ValueError('a bug')", False, True, "ValueError: a bug"),
        ("KeyboardInterrupt", False, False, "interrupted; the same command goes on"),
    ],
)
def test_only_the_users_errors_are_one_line(error, debug, traceback, last, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(Path(C.__file__).parent), debug=debug, error=error))
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert result.returncode not in (0, 2) and result.stderr.splitlines()[-1] == last
    assert ("Traceback" in result.stderr) == traceback and traceback == (result.stderr.count("\n") > 1)


@dataclass
class Args:
    lr: float = 0.1
    out: Path = Path("x")


def test_a_run_goes_on_with_its_settings_only(tmp_path):
    settings = C.run_settings(Args())
    assert settings == {"lr": 0.1, "out": "x"}
    assert C.resume_run(tmp_path, settings, free=set()) is None
    policy = make("tiny-pi05")
    policy.set_trainable("expert")
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    saver = C.RunSaver(tmp_path, settings, policy)
    saver.save(step=3, moments=[{"w": policy.action_in_proj.weight}])
    with torch.no_grad():
        policy.action_in_proj.weight += 1  # training goes on while the save is being written
    saver.close()
    assert same(P.load_policy(tmp_path / "last").state_dict(), before)
    state = C.resume_run(tmp_path, C.run_settings(Args(out=Path("y"))) | {"debug": False}, free={"out", "debug"})
    assert state["step"] == 3 and torch.equal(state["moments"][0]["w"], before["action_in_proj.weight"])
    assert state["policy"].keys() == {name for name, p in policy.named_parameters() if p.requires_grad}
    saver = C.RunSaver(tmp_path / "trainer.pt", settings, policy)  # a folder that cannot be
    saver.save(step=4)
    with pytest.raises(OSError):
        saver.close()
    with pytest.raises(UserError, match="holds a run with another lr, out: give another --out"):
        C.resume_run(tmp_path, C.run_settings(Args(lr=0.2, out=Path("y"))), free=set())
    (tmp_path / "trainer.pt").write_bytes(b"half")
    with pytest.raises(UserError, match="trainer.pt is unreadable"):
        C.resume_run(tmp_path, settings, free=set())


# ---- checkpoints ------------------------------------------------------------------------------------------------


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@BOTH
@pytest.mark.parametrize("train", ["part", "lora"])
def test_save_and_load(name, train, tmp_path):
    policy = make(name)
    policy.set_trainable(policy.PART if train == "part" else train)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.01)
    obs = make_obs(policy, MIXED)
    decision = policy.act(obs, sample=True)
    policy.save(tmp_path)
    again = P.load_policy(tmp_path)
    assert same(policy.state_dict(), again.state_dict()) and again.stats == policy.stats
    for a, b in zip(policy.evaluate(obs, decision.latent), again.evaluate(obs, decision.latent)):
        assert torch.equal(a, b)
    again.save(tmp_path)  # onto the files it came from
    assert same(policy.state_dict(), P.load_policy(tmp_path).state_dict())
    assert not list(tmp_path.glob(".*"))
    if train == "lora":  # merged for others' code: the same function without adapters
        layout = {"tiny-pi05": "openpi", "tiny-openvla": "openvla"}[name]
        policy.save(tmp_path / "merged", layout=layout)
        merged = P.load_policy(tmp_path / "merged")
        assert not P.lora_layers(merged)
        for a, b in zip(policy.evaluate(obs, decision.latent), merged.evaluate(obs, decision.latent)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, preset", [("pi05", "pi05"), ("openvla", "openvla-7b")])
def test_full_size_keys(name, preset):
    policy = P.load_policy(preset, device="meta")
    ours = {k: list(v.shape) for k, v in policy.state_dict().items() if not k.startswith(C.HEADS)}
    assert ours == full_size_keys(name)
    assert policy.value_head[0].weight.shape == (512, {"pi05": 2048, "openvla": 4096}[name])


def test_full_size_configs(tmp_path):
    """What shapes do not show. The published code builds itself from these files, and refuses unknown fields (lerobot)
    or silently takes a default (OpenVLA), so each is compared whole with what it needs."""
    gemma = {"depth": 18, "num_heads": 8, "num_kv_heads": 1, "head_dim": 256}
    sizes = {
        "vision": {
            "image_size": 224,
            "patch_size": 14,
            "hidden_size": 1152,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "intermediate_size": 4304,
        },
        "vlm": {"width": 2048, "mlp_dim": 16384, "vocab_size": 257152, **gemma},
        "action_expert": {"width": 1024, "mlp_dim": 4096, **gemma},
        "dino": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "mlp_hidden": 4096, "reg_tokens": 4},
        "siglip": {"embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_hidden": 4304},
        "llm": {
            "vocab_size": 32064,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "max_position_embeddings": 2048,
        },
    }
    for key, value in sizes.items():
        assert P.PRESETS["pi05" if key in P.PRESETS["pi05"] else "openvla-7b"][key] == value, key

    dim = {"mean": [0.0] * 7, "std": [1.0] * 7, "q01": [-1.0] * 7, "q99": [1.0] * 7}
    stats = {"observation.state": dim, "action": dim}
    openvla = P.load_policy("openvla-7b", stats=stats, device="meta")
    config = C.export(tmp_path, "openvla", openvla.config, stats, {})[1]
    prismatic = {
        "architectures": ["OpenVLAForActionPrediction"],
        "model_type": "openvla",
        "n_action_bins": 256,
        "arch_specifier": "no-align+fused-gelu-mlp",
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure",
        "use_fused_vision_backbone": True,
        "image_resize_strategy": "resize-naive",
        "auto_map": {
            "AutoConfig": "configuration_prismatic.OpenVLAConfig",
            "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
        },
        "pad_token_id": 32000,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_to_multiple_of": 64,
        "llm_max_length": 2048,
        "output_projector_states": False,
        "norm_stats": {"rlco": {"action": dim}},
        "text_config": {"model_type": "llama", "pad_token_id": 32000, **sizes["llm"]},
    }
    assert {k: config.get(k) for k in prismatic} == prismatic

    pi05 = P.load_policy("pi05", stats=stats, device="meta")
    tied = {C.LM_HEAD: torch.zeros(1), C.EMBED: torch.zeros(1)}
    config = C.export(tmp_path, "lerobot", pi05.config, stats, tied)[1]
    assert config == {
        "type": "pi05",
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "chunk_size": 8,
        "n_action_steps": 4,
        "num_inference_steps": 4,
        "tokenizer_max_length": 200,
        "max_action_dim": 32,
        "image_resolution": [224, 224],
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"},
        "input_features": {
            "observation.images.base_0_rgb": {"type": "VISUAL", "shape": [3, 224, 224]},
            "observation.state": {"type": "STATE", "shape": [7]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [7]}},
    }
    steps = [json.loads((tmp_path / f"policy_{name}processor.json").read_text())["steps"] for name in ("pre", "post")]
    assert [[s["registry_name"] for s in pipeline] for pipeline in steps] == [
        [
            "rename_observations_processor",
            "to_batch_processor",
            "normalizer_processor",
            "pi05_prepare_state_tokenizer_processor_step",
            "tokenizer_processor",
            "device_processor",
        ],
        ["unnormalizer_processor", "device_processor"],
    ]
    assert steps[0][4]["config"]["tokenizer_name"] == "google/paligemma-3b-pt-224"
    config = C.export(tmp_path, "openpi", pi05.config, stats, tied)[1]
    assert [config[k] for k in ("paligemma_variant", "action_expert_variant", "action_dim", "action_horizon")] == [
        "gemma_2b",
        "gemma_300m",
        32,
        8,
    ]  # what openpi's converter writes, and its horizon as trained
    assert json.loads((tmp_path / "assets/rlco/norm_stats.json").read_text())["norm_stats"] == {
        "state": dim,
        "actions": dim,
    }


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("untied", [False, True])
def test_pi05_layouts_round_trip(tmp_path, prefix, untied):
    """openpi's file has the tied tensor once, lerobot's has both and a prefix, and may have trained one of them."""
    tensors = load_file(DATA / "pi05/golden_weights.safetensors")
    tensors = {k: v.bfloat16() if "mlp" in k else v for k, v in tensors.items()}
    if untied:
        tensors[C.EMBED] = tensors[C.EMBED] + 1
    elif not prefix:
        del tensors[C.EMBED]
    tensors = {prefix + k: v for k, v in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(DATA / "pi05/config.json", tmp_path)
    policy = P.load_policy(tmp_path)
    policy.save(tmp_path / "out", layout="lerobot" if prefix else "openpi")
    if untied and not prefix:  # as from lerobot 0.6, whose two tensors openpi's loader refuses; only one of them acts
        tensors[C.LM_HEAD] = tensors.pop(C.EMBED)
    assert same(load_file(tmp_path / "out/model.safetensors"), tensors)
    again = P.load_policy(tmp_path / "out")
    assert prefix == "" or same(policy.state_dict(), again.state_dict())
    assert torch.equal(again.state_dict()[C.EMBED], policy.state_dict()[C.EMBED])
    if not prefix:  # as openpi's trainer and policy server load it
        policy.tie()
        del policy.value_head, policy.noise_head
        load_model(policy, tmp_path / "out/model.safetensors", strict=True)


def test_lerobot_folder(tmp_path):
    """config.json with lerobot's fields, statistics in the processors' files, and found again from them alone."""
    policy = make("tiny-pi05")
    policy.stats["action"] |= {"mean": [0.5] * 7, "std": [1.0] * 7}
    policy.save(tmp_path, layout="lerobot")
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["type"], config["chunk_size"], config["max_action_dim"]) == ("pi05", 4, 7)
    for name in ("policy_preprocessor", "policy_postprocessor"):
        for step in json.loads((tmp_path / f"{name}.json").read_text())["steps"]:
            if "state_file" in step:
                assert load_file(tmp_path / step["state_file"])["action.mean"].tolist() == [0.5] * 7
    (tmp_path / "stats.json").unlink()
    stats = P.load_policy(tmp_path).stats
    for feature in ("action", "observation.state"):  # lerobot adds no 1e-6 to the range, so the file does
        np.testing.assert_allclose(stats[feature]["q99"], policy.stats[feature]["q99"], atol=2e-6)


def lerobot_made(folder, version, modes=None):
    """A folder as lerobot writes it: no file of ours in it, and the fields of its `version` in config.json. Both have
    an empty configuration of the step that writes the state into the prompt."""
    policy = make("tiny-pi05")
    for kinds in policy.stats.values():
        kinds |= {"mean": [0.01] * 7, "std": [0.05] * 7, "min": [-0.5] * 7, "max": [0.5] * 7}
    policy.save(folder, layout="lerobot")
    for name in ("rlco.json", "stats.json", "heads.safetensors"):
        (folder / name).unlink()
    config = json.loads((folder / "config.json").read_text())
    own = {key: policy.config[key] for key in ("vision", "vlm", "action_expert")}  # in its code, as published
    config |= own | ({"use_relative_actions": False} if version == "0.6.1" else {})
    config["normalization_mapping"] |= modes or {}
    for name in ("preprocessor", "postprocessor"):
        pipeline = json.loads((folder / f"policy_{name}.json").read_text())
        for step in pipeline["steps"]:
            if "norm_map" in step["config"]:
                step["config"]["norm_map"] |= modes or {}
            if step["registry_name"] == "pi05_prepare_state_tokenizer_processor_step":
                assert step["config"] == {"max_state_dim": 7}  # which every lerobot from 0.4 on reads as 7 numbers
                step["config"] = {}
        C.write_file(folder / f"policy_{name}.json", pipeline)
    C.write_file(folder / "config.json", config)
    return policy


def prompts(policy, obs):
    ids, mask = policy.tokens(obs)
    return [policy.tokenizer.decode(row[m].tolist()[1:], skip_special_tokens=False) for row, m in zip(ids, mask)]


@pytest.mark.parametrize("version, numbers", [("0.4.4", 32), ("0.6.1", 7)])
def test_a_prompt_is_padded_as_the_lerobot_that_trained_it_does(version, numbers, tmp_path, capsys):
    """Up to 0.4.4 lerobot pads the normalised state with zeros: "0 166 255 128 128 ..." (its own step's output)."""
    policy = lerobot_made(tmp_path / version, version)
    obs = {**make_obs(policy, [PROMPT]), "state": torch.tensor([[-0.05, 0.005, 0.25, 0, 0, 0, 0.0]])}
    for folder in ("saved", "again"):  # and so it stays
        loaded = P.load_policy(tmp_path / version)
        (text,) = prompts(loaded, obs)
        state = text.split("State: ")[1].split(";")[0].split()
        assert state[:3] == ["0", "166", "255"] and state[7:] == ["128"] * (numbers - 7)
        assert loaded.config["convention"] == "lerobot"
        loaded.save(tmp_path / folder)
        loaded.save(tmp_path / folder / "lerobot", layout="lerobot")
        assert prompts(P.load_policy(tmp_path / folder), obs) == [text]
        for name in ("rlco.json", "stats.json"):
            (tmp_path / folder / "lerobot" / name).unlink()
        step = json.loads((tmp_path / folder / "lerobot/policy_preprocessor.json").read_text())["steps"][3]
        assert step["config"] == {"max_state_dim": numbers}
    said = capsys.readouterr().err
    assert ("does not say which lerobot trained it" in said) == ("newer do not" in said) == (numbers == 32)
    assert len(said.splitlines()) == (3 if numbers == 32 else 0)
    if numbers == 32:
        with pytest.raises(UserError, match="openpi cannot write the 32 numbers of state"):
            loaded.save(tmp_path / "openpi", layout="openpi")


@pytest.mark.parametrize("state", ["QUANTILES", "MEAN_STD", "MIN_MAX", "IDENTITY"])
@torch.no_grad()
def test_normalisation_is_the_checkpoints(state, tmp_path):
    """State and action apart, in and out: what lerobot's pipelines say, not what config.json says beside them."""
    action = {"QUANTILES": "MEAN_STD", "MEAN_STD": "IDENTITY"}.get(state, "QUANTILES")
    policy = lerobot_made(tmp_path / "in", "0.6.1", {"STATE": state, "ACTION": action})
    loaded = P.load_policy(tmp_path / "in")
    assert loaded.config["normalization"] == {"observation.state": state, "action": action}
    obs = make_obs(policy, MIXED)
    kinds = {key: {k: torch.tensor(v) for k, v in value.items()} for key, value in policy.stats.items()}

    def bounds(key, mode):  # lerobot's quantiles have no 1e-6, which these have in the file
        if mode == "MEAN_STD":
            return kinds[key]["mean"] - kinds[key]["std"], 2 * kinds[key]["std"]
        if mode == "MIN_MAX":
            return kinds[key]["min"], kinds[key]["max"] - kinds[key]["min"]
        if mode == "IDENTITY":
            return torch.tensor(-1.0), torch.tensor(2.0)
        return kinds[key]["q01"], kinds[key]["q99"] - kinds[key]["q01"] + 1e-6

    low, width = bounds("observation.state", state)
    expected = ((obs["state"] - low) / width * 2 - 1).numpy()
    assert prompts(loaded, obs) == [P.pi05_prompt(p, s) for p, s in zip(MIXED, expected)]
    torch.manual_seed(1)
    decision = loaded.act(obs, sample=False)
    low, width = bounds("action", action)
    torch.testing.assert_close(decision.actions, (decision.latent[:, -1] + 1) / 2 * width + low, rtol=1e-4, atol=1e-6)
    loaded.save(tmp_path / "own")
    P.load_policy(tmp_path / "own").save(tmp_path / "out", layout="lerobot")
    (tmp_path / "out/rlco.json").unlink()
    written = json.loads((tmp_path / "out/config.json").read_text())["normalization_mapping"]
    assert written == {"VISUAL": "IDENTITY", "STATE": state, "ACTION": action}
    P.load_policy(tmp_path / "own").save(tmp_path / "openpi", layout="openpi")
    (tmp_path / "openpi/stats.json").unlink()  # as its own code sees it: by quantiles
    sizes = {key: loaded.config[key] for key in ("vision", "vlm", "action_expert", "action_dim", "action_horizon")}
    C.write_file(tmp_path / "openpi/config.json", sizes)
    theirs = P.load_policy(tmp_path / "openpi")
    assert theirs.config["convention"] == "openpi" and prompts(theirs, obs) == prompts(loaded, obs)
    torch.manual_seed(1)
    torch.testing.assert_close(theirs.act(obs, sample=False).actions, decision.actions, rtol=1e-4, atol=2e-6)


def test_a_state_that_lerobots_normalizer_leaves_alone(tmp_path):
    for i, change in enumerate(({"features": {}}, {"normalize_observation_keys": ["observation.other"]})):
        lerobot_made(tmp_path / str(i), "0.6.1")
        file = tmp_path / str(i) / "policy_preprocessor.json"
        pipeline = json.loads(file.read_text())
        pipeline["steps"][2]["config"] |= change
        C.write_file(file, pipeline)
        modes = P.load_policy(tmp_path / str(i)).config["normalization"]
        assert modes == {"observation.state": "IDENTITY", "action": "QUANTILES"}


def test_an_unknown_normalisation_is_refused(tmp_path):
    lerobot_made(tmp_path, "0.6.1", {"ACTION": "QUANTILE5"})
    with pytest.raises(UserError, match="normalises its action by QUANTILE5, of which nothing is known here but QUANT"):
        P.load_policy(tmp_path)


def test_published_configs(tmp_path):
    """The three published config.json forms of pi0.5, and RLinf's names of its heads and statistics."""
    meta = {k: torch.empty(v, device="meta") for k, v in full_size_keys("pi05").items()}
    lerobot = {"type": "pi05", "chunk_size": 50, "n_action_steps": 50, "num_inference_steps": 10}
    openpi = {"action_dim": 32, "action_horizon": 15, "paligemma_variant": "gemma_2b"}
    for raw, expected in ((lerobot, (50, 50, 10)), (openpi, (15, 4, 4))):
        (tmp_path / "config.json").write_text(json.dumps(raw))
        config = C.read_config(tmp_path, meta, P.PRESETS)
        assert (config["action_horizon"], config["chunk"], config["num_steps"]) == expected
        assert config["vlm"] == P.PRESETS["pi05"]["vlm"] and config["vision"] == P.PRESETS["pi05"]["vision"]
    (tmp_path / "config.json").unlink()
    assert C.read_config(tmp_path, meta, P.PRESETS)["action_horizon"] == 8

    policy = make("tiny-pi05")
    policy.save(tmp_path)
    heads = load_file(tmp_path / "heads.safetensors")
    rlinf = {k.replace("value_head.", "value_head.mlp."): v for k, v in heads.items() if "value" in k}
    rlinf |= {
        f"noise_head.mlp_logvar.moduleList.{int(k.split('.')[1]) // 2}.linear_1.{k.split('.')[2]}": v
        for k, v in heads.items()
        if "noise" in k
    } | {"noise_head.logvar_min": torch.zeros(1)}
    save_file(load_file(tmp_path / "model.safetensors") | rlinf, tmp_path / "model.safetensors")
    (tmp_path / "heads.safetensors").unlink(), (tmp_path / "stats.json").unlink()
    assert same(P.load_policy(tmp_path).state_dict(), policy.state_dict())
    assert P.load_policy(tmp_path).stats["action"]["q01"] == policy.stats["action"]["q01"]  # from assets/
    (tmp_path / "assets/another").mkdir()
    another = {"actions": {"q01": [0] * 7, "q99": [2] * 7}}
    (tmp_path / "assets/another/norm_stats.json").write_text(json.dumps({"norm_stats": another}))
    assert not P.load_policy(tmp_path).stats  # which of them?
    assert P.load_policy(tmp_path, unnorm_key="rlco").stats["action"]["q01"] == policy.stats["action"]["q01"]
    with pytest.raises(UserError, match="unnorm_key can be another, rlco"):
        P.load_policy(tmp_path, unnorm_key="nonsense")
    safetensors = P.load_policy(tmp_path).sha256()
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "full_weights.pt")  # its trainer's own file
    (tmp_path / "model.safetensors").unlink()
    loaded = P.load_policy(tmp_path)
    assert same(loaded.state_dict(), policy.state_dict())
    assert loaded.sha256() not in (safetensors, P.load_policy("tiny-pi05").sha256())
    (tmp_path / "global_step_9").mkdir()
    shutil.copy(tmp_path / "full_weights.pt", tmp_path / "global_step_9")
    with pytest.raises(UserError, match="has 2 checkpoints: name the folder of one"):
        P.load_policy(tmp_path)
    policy.save(tmp_path / "out", layout="openpi")
    (tmp_path / "out/heads.safetensors").unlink()
    torch.manual_seed(5)
    fresh = P.load_policy(tmp_path / "out")
    assert all(torch.isfinite(p).all() and p.abs().max() > 0 for p in fresh.value_head.parameters())


def test_openvla_folder(tmp_path):
    """Their config.json, shards with an index, statistics by dataset."""
    shutil.copytree(DATA / "openvla", tmp_path / "in")
    config = json.loads((tmp_path / "in/config.json").read_text())
    sets = config["norm_stats"]
    config["norm_stats"] = {**sets, "another": {"action": {"q01": [0] * 7, "q99": [2] * 7}, "num_trajectories": 3}}
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    theirs = {
        "processing_prismatic.py": "# theirs\n",
        **{f"{name}_config.json": "{}" for name in ("generation", "preprocessor", "processor", "tokenizer")},
        "tokenizer.json": P.small_tokenizer().to_str() + "\n",
    }
    for name, text in theirs.items():
        (tmp_path / "in" / name).write_text(text)
    with pytest.raises(UserError, match="unnorm_key= one of .*another.*made_up"):
        P.load_policy(tmp_path / "in").stat("action")
    with pytest.raises(UserError, match="no statistics nonsense; unnorm_key can be another, made_up"):
        P.load_policy(tmp_path / "in", unnorm_key="nonsense")
    loaded = P.load_policy(tmp_path / "in", unnorm_key="made_up")
    loaded.save(tmp_path / "own")
    P.load_policy(tmp_path / "own").save(tmp_path / "out", layout="openvla")  # as after fine-tuning
    # transformers 4.40.1, which OpenVLA pins, needs each of these, and reads no tokenizer.json that was written anew
    assert {name: (tmp_path / "out" / name).read_text() for name in theirs} == theirs
    P.load_policy(tmp_path / "own").save(tmp_path, layout="openvla")  # into a folder round the one it came from
    assert {name: (tmp_path / name).read_text() for name in theirs} == theirs
    P.load_policy(tmp_path / "own").save(tmp_path / "own/out", layout="openvla")
    P.load_policy(tmp_path / "own").save(tmp_path / "own/out", layout="openvla")  # and into it, where it is not a part
    assert not (tmp_path / "own/out/out").exists()
    assert P.load_policy(tmp_path / "out", unnorm_key="another").stats["action"]["q99"] == [2] * 7  # not stats.json's
    assert same(load_file(tmp_path / "out/model.safetensors"), load_file(DATA / "openvla/golden_weights.safetensors"))
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["model_type"] == "openvla" and written["text_config"]["vocab_size"] == 576
    assert written["norm_stats"] == config["norm_stats"]
    again = P.load_policy(tmp_path / "out")
    assert same(again.state_dict(), loaded.state_dict()) and again.stats == loaded.stats
    # of a model that was fine-tuned with OpenVLA's own code, the file beside the base's config.json
    (tmp_path / "in/dataset_statistics.json").write_text(
        json.dumps({"mine": {"action": {"q01": [0] * 7, "q99": [3] * 7}}})
    )
    tuned = P.load_policy(tmp_path / "in")
    assert tuned.stats["action"]["q99"] == [3] * 7
    tuned.stats["action"] = {"q01": [0] * 7, "q99": [4] * 7}
    tuned.save(tmp_path / "tuned", layout="openvla")
    written = json.loads((tmp_path / "tuned/dataset_statistics.json").read_text())
    assert written["rlco"]["action"]["q99"] == [4] * 7 and written["mine"]["action"]["q99"] == [3] * 7
    # sizes from text_config alone, as published
    (tmp_path / "pub").mkdir()
    published = {
        "model_type": "openvla",
        "pad_to_multiple_of": 64,
        "image_sizes": [224, 224],
        "text_config": {"vocab_size": 32064, "hidden_size": 4096, "model_type": "llama"},
    }
    (tmp_path / "pub/config.json").write_text(json.dumps(published))
    tensors = {"projector.fc1.weight": torch.zeros(1)}
    assert C.read_config(tmp_path / "pub", tensors, P.PRESETS) == P.PRESETS["openvla-7b"]
    published["text_config"] |= {"attention_bias": True, "num_key_value_heads": 8, "rope_theta": 5e5}
    (tmp_path / "pub/config.json").write_text(json.dumps(published))
    llm = C.read_config(tmp_path / "pub", tensors, P.PRESETS)["llm"]
    assert llm == {
        **P.PRESETS["openvla-7b"]["llm"],
        **{k: published["text_config"][k] for k in ("attention_bias", "num_key_value_heads", "rope_theta")},
    }


def test_shards(tmp_path, monkeypatch):
    policy = make("tiny-openvla")
    monkeypatch.setitem(C.SHARD_SIZE, "openvla", "1MB")
    policy.save(tmp_path, layout="openvla")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2 and not (tmp_path / "model.safetensors").exists()
    assert same(P.load_policy(tmp_path).state_dict(), policy.state_dict())
    monkeypatch.undo()
    policy.save(tmp_path, layout="openvla")  # fewer files: none of the old ones stays
    assert sorted(f.name for f in tmp_path.glob("model*")) == ["model.safetensors"]


def test_dtype_on_load(tmp_path):
    shutil.copytree(DATA / "pi05", tmp_path / "in")
    policy = P.load_policy(tmp_path / "in", dtype=torch.bfloat16)
    kinds = {k: v.dtype for k, v in policy.state_dict().items()}
    expert = "paligemma_with_expert.gemma_expert.model."
    for key in (
        "action_in_proj.weight",
        "time_mlp_in.bias",
        "value_head.0.weight",
        expert + "norm.dense.bias",
        expert + "layers.0.input_layernorm.dense.weight",
        "noise_head.0.weight",
        "paligemma_with_expert.paligemma.model.language_model.norm.weight",
        "paligemma_with_expert.paligemma.model.vision_tower.vision_model.embeddings.patch_embedding.bias",
    ):
        assert kinds[key] == torch.float32, key
    for key in (
        C.LM_HEAD,
        C.EMBED,
        expert + "layers.0.mlp.up_proj.weight",
        "paligemma_with_expert.paligemma.model.multi_modal_projector.linear.weight",
    ):
        assert kinds[key] == torch.bfloat16, key
    assert policy.vlm.language_model.embed_tokens.weight is policy.paligemma_with_expert.paligemma.lm_head.weight


@BOTH
def test_another_models_tokenizer_is_refused(name, tmp_path, monkeypatch):
    policy = make(name)
    policy.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    for size, error in ((5000, "it has 5000 words, the checkpoint"), (P.VOCAB, None)):
        tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
        hub = tmp_path / str(size)
        hub.mkdir()
        tokenizer.save(str(hub / "tokenizer.json"))
        monkeypatch.setattr(C, "hub_folder", lambda *_, hub=hub: hub)
        with pytest.raises(UserError, match=error) if error else nullcontext():
            P.load_policy(tmp_path).encode_text([PROMPT])


# ---- which weights, and under which names ------------------------------------------------------------------------


def other_names(folder, rename):
    """A policy whose tensors have other names in its folder -> its tensors under ours."""
    policy = make("tiny-pi05")
    policy.save(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({rename(name): x for name, x in tensors.items()}, folder / "model.safetensors")
    return policy.state_dict()


OLD = ((".model.language_model.", ".language_model.model."), (".model.vision_tower.", ".vision_tower."))


@pytest.mark.parametrize(
    "rename",
    [
        *(lambda name, prefix=prefix: prefix + name for prefix in ("model.", "policy.model.", "module._orig_mod.")),
        lambda name: name.replace(".paligemma.", "._orig_mod.paligemma._fsdp_wrapped_module."),
        lambda name: "base_model.model." + name.replace("vision_tower.vision_model.", "vision_tower."),
        lambda name: name.replace(*OLD[0]).replace(*OLD[1]).replace(".model.multi_modal", ".multi_modal"),
    ],
)
def test_names_of_wrapped_models_and_of_other_versions(rename, tmp_path):
    assert same(other_names(tmp_path, rename), P.load_policy(tmp_path).state_dict())


def test_unknown_tensors_are_named(tmp_path):
    other_names(tmp_path, lambda name: name.replace("paligemma", "gemma"))
    with pytest.raises(UserError, match="neither pi0.5's .* nor OpenVLA's .*: they are action_in_proj.bias, ") as error:
        P.load_policy(tmp_path)
    assert "missing" not in str(error.value)
    policy = make("tiny-pi05")
    tensors = {k: v for k, v in policy.state_dict().items() if k != C.EMBED and not k.startswith(C.HEADS)}
    both = tensors | {f"ema.{name}": x.clone() for name, x in tensors.items()}
    policy.save(tmp_path)
    save_file(both, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="has two tensors .* keep one set"):
        P.load_policy(tmp_path)


def test_weights_beside_the_checkpoints_are_left_alone(tmp_path, capsys, monkeypatch):
    policy = make("tiny-openvla")
    policy.save(tmp_path)
    stray = {"projector.fc1.weight": torch.zeros(2, 2)}
    save_file(stray, tmp_path / "z_ema.safetensors")
    assert same(P.load_policy(tmp_path).state_dict(), policy.state_dict())
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "z_ema.safetensors beside them is left alone" in said
    monkeypatch.setitem(C.SHARD_SIZE, "openvla", "1MB")
    policy.save(tmp_path, layout="openvla")
    save_file(stray, tmp_path / "model.safetensors")  # the index goes before it
    assert same(P.load_policy(tmp_path).state_dict(), policy.state_dict())
    (tmp_path / "model.safetensors").unlink(), (tmp_path / "model.safetensors.index.json").unlink()
    assert same(P.load_policy(tmp_path).state_dict(), policy.state_dict())
    min(tmp_path.glob("model-*")).unlink()
    with pytest.raises(UserError, match=r"has \d of the \d parts of its weights"):
        P.load_policy(tmp_path)
    for file in tmp_path.glob("model-*"):
        file.unlink()
    (tmp_path / "heads.safetensors").unlink(), (tmp_path / "z_ema.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="no \\*.safetensors file.*pytorch_model.bin is not read"):
        P.load_policy(tmp_path)


def test_adapters_are_put_on_their_base(tmp_path, capsys):
    """Made, and merged, by peft: an adapter alone, beside its base, and as a state_dict of the whole model."""
    from peft import LoraConfig, get_peft_model

    policy = make("tiny-openvla")
    policy.save(tmp_path / "base")
    (tmp_path / "base/heads.safetensors").unlink()
    settings = json.loads((tmp_path / "base/config.json").read_text())
    del settings["value_hidden"]
    C.write_file(tmp_path / "base/config.json", settings)
    targets = ["q_proj", "up_proj", "projector.fc1", "qkv"]
    scaled = dict(alpha_pattern={"projector.fc1": 5}, rank_pattern={"q_proj": 3}, use_rslora=True)
    model = get_peft_model(policy, LoraConfig(r=4, lora_alpha=12, target_modules=targets, **scaled))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn_like(weight) * 0.1
    model.peft_config["default"].base_model_name_or_path = "base"
    model.save_pretrained(tmp_path / "alone", save_embedding_layers=False)
    shutil.copytree(tmp_path / "base", tmp_path / "beside")
    for file in (tmp_path / "alone").iterdir():
        shutil.copy(file, tmp_path / "beside")
    shutil.copytree(tmp_path / "base", tmp_path / "whole")
    state = {k: v.clone() for k, v in model.state_dict().items() if "value_head" not in k}
    save_file(state, tmp_path / "whole/model.safetensors")
    with pytest.raises(UserError, match="no adapter_config.json with its lora_alpha"):
        P.load_policy(tmp_path / "whole")
    shutil.copy(tmp_path / "alone/adapter_config.json", tmp_path / "whole")
    merged = {k: v for k, v in model.merge_and_unload().state_dict().items() if not k.startswith(C.HEADS)}
    for name in ("alone", "beside", "whole"):
        loaded = P.load_policy(tmp_path / name)
        assert loaded.stats == policy.stats and not P.lora_layers(loaded)
        for key, weight in merged.items():
            torch.testing.assert_close(loaded.state_dict()[key], weight, msg=f"{name} {key}")
    assert "adapter_model.safetensors is put on the weights beside it" in capsys.readouterr().err
    loaded = P.load_policy(tmp_path / "beside")
    loaded.save(tmp_path / "beside")  # once is enough
    assert same(P.load_policy(tmp_path / "beside").state_dict(), loaded.state_dict())
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is an adapter of base, which is no folder here"):
        P.load_policy(tmp_path / "alone")


# ---- what would act wrongly --------------------------------------------------------------------------------------


def change(file, **fields):
    C.write_file(file, json.loads(file.read_text()) | fields)


@pytest.mark.parametrize(
    "what, message",
    [
        (lambda f: change(f / "config.json", use_relative_actions=True), "was trained with use_relative_actions"),
        (lambda f: change(f / "config.json", use_visual_memory=True), "was trained with use_visual_memory"),
        (lambda f: change(f / "config.json", type="smolvla"), "is a smolvla policy"),
        (lambda f: (f / "action_head--150000_checkpoint.pt").touch(), "is an OpenVLA-OFT.*action_head--150000"),
        (lambda f: (f / "modeling_prismatic.py").write_text("NUM_ACTIONS_CHUNK"), "is an OpenVLA-OFT"),
        (
            lambda f: change(f / "policy_preprocessor.json", steps=[{"registry_name": "se3_step"}]),
            "was trained with the step se3_step of its processors",
        ),
    ],
)
def test_what_would_act_wrongly_is_refused_by_name(what, message, tmp_path):
    lerobot_made(tmp_path, "0.6.1")
    P.load_policy(tmp_path)
    what(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        P.load_policy(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_quantised_weights_are_one_line(dtype, tmp_path):
    make("tiny-pi05").save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["action_in_proj.weight"] = tensors["action_in_proj.weight"].to(dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(UserError, match=rf"quantised weights, {kind} \(action_in_proj.weight\): save the model in"):
        P.load_policy(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_broken_numbers_are_one_line(dtype, value, tmp_path):
    make("tiny-pi05").save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["action_in_proj.weight"] = tensors["action_in_proj.weight"].to(dtype)
    tensors["action_in_proj.weight"][3, 2] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="has NaN or infinity in action_in_proj.weight"):
        P.load_policy(tmp_path)


def test_broken_statistics_are_one_line(tmp_path):
    policy = make("tiny-pi05")
    policy.stats["action"] = {**policy.stats["action"], "q99": [0.1] * 6 + [float("nan")]}
    policy.save(tmp_path)
    with pytest.raises(UserError, match="the statistic q99 of action is no list of numbers"):
        P.load_policy(tmp_path)


# ---- what openpi and RLinf leave to be known ---------------------------------------------------------------------


class Harmful:
    """What a pickle can do to whoever reads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def openpi_made(folder, **model):
    """A folder as openpi's trainer writes it: weights, statistics, and a pickle of its configuration, no config.json.
    The small model's sizes are those of the preset then, which stands for openpi's own."""
    policy = make("tiny-pi05")
    padded = {kind: values + [-1e-10] * 25 for kind, values in policy.stats["action"].items()}
    policy.stats = {"action": padded, "observation.state": padded}  # as RLinf's for RL-Co
    policy.config["action_dim"] = 32
    policy.action_in_proj = torch.nn.Linear(32, 128)
    policy.action_out_proj = torch.nn.Linear(128, 32)
    policy.config["convention"] = "openpi"
    policy.save(folder, layout="openpi")
    for name in ("config.json", "stats.json", "heads.safetensors"):
        (folder / name).unlink()
    config = {"name": "pi05", "model": model, "assets": Path("a"), "filter": Harmful(folder / "harmed"), "data": {}}
    torch.save({"global_step": 9, "config": config, "weights": torch.ones(2)}, folder / "metadata.pt")
    return policy


@pytest.fixture
def tiny_is_published(monkeypatch):
    monkeypatch.setitem(P.PRESETS, "pi05", {**P.PRESETS["tiny-pi05"], "action_dim": 32})


@torch.no_grad()
def test_openpis_metadata_is_read_and_not_run(tmp_path, capsys, tiny_is_published):
    openpi_made(tmp_path, action_horizon=7, discrete_state_input=False, pi05=True)
    policy = P.load_policy(tmp_path)
    assert policy.horizon == 7 and policy.config["discrete_state_input"] is False
    assert not (tmp_path / "harmed").exists() and capsys.readouterr().err == ""
    (tmp_path / "metadata.pt").write_bytes(b"no pickle")
    policy = P.load_policy(tmp_path)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and "metadata.pt is not understood" in said[0]
    assert "assumed are action_horizon 4, chunk 4, num_steps 4, max_token_len 200" in said[1]
    assert "assumed is discrete_state_input=False" in said[2]  # the statistics are padded
    assert P.load_policy(tmp_path, discrete_state_input=True, action_horizon=5).horizon == 5
    torch.save({"config": {"model": {}, "data": {"extra_delta_transform": True}}}, tmp_path / "metadata.pt")
    with pytest.raises(UserError, match="was trained with extra_delta_transform"):
        P.load_policy(tmp_path)


@torch.no_grad()
def test_stateless_prompts_and_padded_statistics(tmp_path, tiny_is_published):
    """RLinf's pi0.5 for RL-Co: openpi's prompt without a state is the instruction and a newline, which is a text of its
    own, and its statistics are of 32 numbers, of which the robot has 7."""
    case = json.loads((DATA / "pi05/golden_prompts.json").read_text())["cases"][-1]
    calls = [call["text"] for call in case["encoded_calls"]]
    made = openpi_made(tmp_path / "in", action_horizon=4, discrete_state_input=False)
    P.load_policy(tmp_path / "in").save(tmp_path / "own")
    P.load_policy(tmp_path / "own").save(tmp_path / "out", layout="openpi")
    for name in ("in", "own", "out"):
        policy = P.load_policy(tmp_path / name)
        policy.tokenizer = made.tokenizer
        obs = make_obs(policy, [case["prompt"]])
        ids, mask = policy.tokens(obs)
        expected = [policy.tokenizer.encode(text, add_special_tokens=False).ids for text in calls]
        assert ids[0].tolist() == [2, *expected[0], *expected[1]] and mask.all()
        assert policy.moving_dims == list(range(7))
        torch.manual_seed(2)
        decision = policy.act(obs, sample=True)
        low, high = (made_stats[:7] for made_stats in (made.stats["action"]["q01"], made.stats["action"]["q99"]))
        low, width = torch.tensor(low), torch.tensor(high) - torch.tensor(low) + 1e-6
        expected = (decision.latent[:, -1, :, :7] + 1) / 2 * width + low
        torch.testing.assert_close(decision.actions, expected)
        action = P.normalize(decision.actions, *policy.stat("action"))
        assert action.shape[-1] == 32 and (action[..., 7:] < -0.99).all()  # as openpi pads before it normalises
        assert torch.isfinite(policy.sft_loss(make_batch(policy, MIXED)))
    with pytest.raises(UserError, match="lerobot's pi0.5 has the state in its prompt"):
        policy.save(tmp_path / "lerobot", layout="lerobot")
    stated = P.load_policy(tmp_path / "in", discrete_state_input=True)
    stated.tokenizer = made.tokenizer
    (text,) = prompts(stated, obs)
    assert text.split(";")[0].split()[-25:] == ["0"] * 25  # zeros, which the statistics of nothing make -1
    with pytest.raises(UserError, match="padded before it is normalised, as no lerobot does"):
        stated.save(tmp_path / "lerobot", layout="lerobot")


def test_center_crop_is_the_checkpoints(tmp_path):
    """OpenVLA's evaluation crops where its fine-tuning augmented, which the folder's name says, or nobody."""
    with np.load(DATA / "openvla/center_crop.npz") as crop:  # by TensorFlow, as in OpenVLA's experiments/robot
        ours = P.center_crop(torch.from_numpy(crop["image"])).int()
        error = (ours - torch.from_numpy(crop["cropped"]).int()).abs()
    assert error.max() <= 1 and (error > 0).float().mean() < 0.01
    for name, statistics, crop in (("base", False, False), ("tuned", True, None), ("tuned--image_aug", True, True)):
        shutil.copytree(DATA / "openvla", tmp_path / name)
        if statistics:
            (tmp_path / name / "dataset_statistics.json").write_text(json.dumps({"mine": {"action": {}}}))
        policy = P.load_policy(tmp_path / name)
        assert policy.config["center_crop"] is crop
        image = make_obs(policy, [PROMPT])["image"]
        if crop is None:
            with pytest.raises(UserError, match=r"give load_policy\(center_crop=True\) or False, or write"):
                policy.embed_patches(image)
            change(tmp_path / name / "config.json", center_crop=False)
            policy = P.load_policy(tmp_path / name)
        plain = P.load_policy(tmp_path / name, center_crop=False).embed_patches(P.center_crop(image) if crop else image)
        assert torch.equal(policy.embed_patches(image), plain)
        policy.save(tmp_path / "saved" / name)
        assert P.load_policy(tmp_path / "saved" / name).config["center_crop"] is bool(crop)


def test_clear_errors(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no preset .*tiny-pi05.* and no folder"):
        P.load_policy(tmp_path / "nothing")
    with pytest.raises(UserError, match="no \\*.safetensors"):
        P.load_policy(tmp_path)
    with pytest.raises(UserError, match="no setting chunks"):
        P.load_policy("tiny-pi05", chunks=3)
    with pytest.raises(UserError, match="chunk 9 must be between 1 and the horizon 4"):
        P.load_policy("tiny-pi05", chunk=9)
    with pytest.raises(UserError, match="no statistics of action"):
        P.load_policy("tiny-pi05").sft_loss(make_batch(make("tiny-pi05"), MIXED))
    with pytest.raises(UserError, match="openpi or lerobot, not as openvla"):
        make("tiny-pi05").save(tmp_path / "x", layout="openvla")
    monkeypatch.chdir(tmp_path)
    Path("tiny-pi05").mkdir()
    with pytest.raises(UserError, match="a preset and a folder"):
        P.load_policy("tiny-pi05")
    Path("tiny-pi05").rmdir()
    policy = make("tiny-pi05")
    with pytest.raises(UserError, match="of 7 dimensions, the data has 8"):
        policy.sft_loss({**make_batch(policy, MIXED), "state": torch.zeros(3, 8)})
    policy.save(tmp_path / "ok")
    tensors = load_file(tmp_path / "ok/model.safetensors")
    tensors["action_in_proj.bias"] = torch.zeros(3)
    tensors["surprise"] = torch.zeros(1)
    del tensors["time_mlp_in.bias"]
    save_file(tensors, tmp_path / "ok/model.safetensors")
    with pytest.raises(UserError) as error:
        P.load_policy(tmp_path / "ok")
    for part in (
        "1 missing: time_mlp_in.bias",
        "1 unexpected: surprise",
        "1 of another shape: action_in_proj.bias [3] instead of [128]",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    (tmp_path / "ok/model.safetensors").write_bytes(b"truncated")
    with pytest.raises(UserError, match="model.safetensors is unreadable"):
        P.load_policy(tmp_path / "ok")
    (tmp_path / "ok/config.json").write_text("{")
    save_file(tensors, tmp_path / "ok/model.safetensors")
    with pytest.raises(UserError, match="config.json is unreadable"):
        P.load_policy(tmp_path / "ok")


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "heads.safetensors",
        "config.json",
        "stats.json",
        "tokenizer.json",
        "assets/rlco/norm_stats.json",
    ],
)
def test_a_corrupt_file_is_named_in_one_line(name, tmp_path):
    P.load_policy("tiny-pi05", stats={}).save(tmp_path)
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[:-9] if "stats" not in name else b"{")
    with pytest.raises(UserError, match=re.escape(str(file))) as error:
        P.load_policy(tmp_path)
    assert "\n" not in str(error.value)


@BOTH
def test_a_lost_part_is_named_in_one_line(name, tmp_path):
    """Nothing is silently replaced by fresh weights, another adapter, or the published settings."""
    policy = make(name)
    policy.set_trainable("lora")
    for lost, message in (
        ("heads.safetensors", "has lost its heads.safetensors"),
        ("config.json", "has lost its config.json"),
        ("model.safetensors", "is model.safetensors missing"),
    ):
        policy.save(tmp_path)
        (tmp_path / "generation_config.json").write_text("{}")  # goes along with published ones, and is no config
        (tmp_path / lost).unlink()
        with pytest.raises(UserError, match=message):
            P.load_policy(tmp_path)
    make(name).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tower = config.get("vlm") or config["llm"]
    tower["depth" if "depth" in tower else "num_hidden_layers"] = 30
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"243 missing: .*layers.\{3..29\}.mlp.up_proj.weight") as error:
        P.load_policy(tmp_path)
    assert len(str(error.value)) < 1500 and "\n" not in str(error.value)  # each of them named, yet readable
    policy.stats = {"action": {"mean": [0.0] * 7, "std": [1.0] * 7}}  # a data set without quantiles
    with pytest.raises(UserError, match="no statistics of action"):
        policy.sft_loss(
            {**make_batch(policy, MIXED), "state": torch.zeros(3, 7)}
            if name == "tiny-openvla"
            else make_batch(policy, MIXED)
        )
