"""What the peers of interop.py are asked: each function runs in a peer's environment, not in ours.

Every line of stdin is FUNCTION FOLDER: the function is called in the folder, where question.npz is, leaves answer.npz
there, and is answered by a line of stdout: "done", or what went wrong.
"""

import dataclasses
import json
import os
import sys
import traceback
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np

CAMERA = "observation.images.base_0_rgb"
STATE = "observation.state"
KINDS = ("mean", "std", "q01", "q99")  # of openpi's statistics


def read(name: str) -> dict:
    """A .npz file of this folder; what is a single value comes as Python's."""
    with np.load(name) as file:
        return {key: x.item() if x.ndim == 0 else x for key, x in file.items()}


def shrink(module, paligemma: str, expert: str, sizes: dict) -> None:
    """Let `module` build its pi0.5 in small: it takes all sizes of `sizes`, which the project's code fixes, but its own
    classes. `paligemma` and `expert` are the module's names of the two classes of transformers."""
    vision_model = getattr(module, paligemma)
    expert_model = getattr(module, expert)

    def build_vision_model(config):
        vision, text = config.vision_config, config.text_config
        for key, value in sizes["vision"].items():
            setattr(vision, key, value)
        vision.projection_dim = sizes["vlm"]["width"]
        text.vocab_size = config._vocab_size = config.image_token_index = sizes["vlm"]["vocab_size"]
        return vision_model(config=config)

    def build_expert(config):
        config.vocab_size = sizes["vlm"]["vocab_size"]
        return expert_model(config=config)

    setattr(module, paligemma, build_vision_model)
    setattr(module, expert, build_expert)


def gemma_sizes(sizes: dict):
    """What the projects' tables of sizes are asked: a variant's name -> its sizes."""
    return lambda variant: SimpleNamespace(**sizes["vlm" if variant == "gemma_2b" else "action_expert"])


def perturb(model) -> None:
    """Random weights everywhere, so that no zero gate or bias hides a mistake."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)


# ---- lerobot: pi0.5 ---------------------------------------------------------------------------------------------


@cache
def small_lerobot(sizes: str):
    """lerobot's module of pi0.5, which builds models of these sizes from now on."""
    from lerobot.policies.pi05 import modeling_pi05 as module

    sizes = json.loads(sizes)
    if hasattr(module, "PiGemmaForCausalLM"):  # 0.5 and newer
        shrink(module, "PaliGemmaForConditionalGenerationWithPiGemma", "PiGemmaForCausalLM", sizes)
    else:
        shrink(module, "PaliGemmaForConditionalGeneration", "GemmaForCausalLM", sizes)
    module.get_gemma_config = gemma_sizes(sizes)
    return module


def lerobot_act() -> dict:
    """A checkpoint's actions for a picture, states, a prompt and noise, by lerobot's own preprocessor, model and
    postprocessor as it reads them from the folder."""
    import torch
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import make_pre_post_processors

    question = read("question.npz")
    folder = question["checkpoint"]
    module = small_lerobot(question["sizes"])
    config = PreTrainedConfig.from_pretrained(folder)
    config.device = "cpu"
    policy = module.PI05Policy.from_pretrained(folder, config=config, strict=True).eval()
    before, after = make_pre_post_processors(config, pretrained_path=folder)
    prompts, states, actions = [], [], []
    for state, noise in zip(question["state"], question["noise"]):
        picture = torch.tensor(question["image"]).permute(2, 0, 1).float() / 255
        batch = before({CAMERA: picture, STATE: torch.tensor(state), "task": question["prompt"]})
        prompts.append(batch["task"][0])
        states.append(batch[STATE][0])
        chunk = policy.predict_action_chunk(batch, noise=torch.tensor(noise)[None])
        actions.append(after(chunk)[0])
        tokens = batch["observation.language.tokens"][0][batch["observation.language.attention_mask"][0].bool()]
    return dict(prompt=prompts, state=np.stack(states), actions=np.stack(actions), tokens=tokens)


def lerobot_save() -> dict:
    """A new checkpoint that lerobot writes, with the question's normalisation; and its actions."""
    import torch
    from lerobot.configs.default import DatasetConfig
    from lerobot.configs.train import TrainPipelineConfig
    from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
    from lerobot.policies.pi05.configuration_pi05 import PI05Config
    from lerobot.policies.pi05.processor_pi05 import make_pi05_pre_post_processors

    question = read("question.npz")
    module = small_lerobot(question["sizes"])
    _, horizon, width = question["noise"].shape
    size = json.loads(question["sizes"])["vision"]["image_size"]
    modes = {"VISUAL": "IDENTITY", "STATE": question["state_mode"], "ACTION": question["action_mode"]}
    config = PI05Config(
        device="cpu",
        chunk_size=horizon,
        n_action_steps=horizon,
        max_action_dim=width,
        image_resolution=(size, size),
        normalization_mapping={kind: NormalizationMode[mode] for kind, mode in modes.items()},
        input_features={
            CAMERA: PolicyFeature(FeatureType.VISUAL, (3, size, size)),
            STATE: PolicyFeature(FeatureType.STATE, (question["state"].shape[1],)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
    )
    policy = module.PI05Policy(config)
    perturb(policy)
    stats = {
        feature: {kind: torch.tensor(x, dtype=torch.float32) for kind, x in kinds.items()}
        for feature, kinds in json.loads(question["stats"]).items()
    }
    run = TrainPipelineConfig(dataset=DatasetConfig("us/them"), policy=config)
    for part in (policy, run, *make_pi05_pre_post_processors(config, dataset_stats=stats)):
        part.save_pretrained(question["checkpoint"])  # as its trainer does
    return lerobot_act()


# ---- openpi: pi0.5 ----------------------------------------------------------------------------------------------


@cache
def small_openpi(sizes: str):
    """openpi's module of pi0.5, which builds models of these sizes from now on."""
    from openpi.models_pytorch import gemma_pytorch, pi0_pytorch

    sizes = json.loads(sizes)
    shrink(gemma_pytorch, "PaliGemmaForConditionalGeneration", "GemmaForCausalLM", sizes)
    pi0_pytorch._gemma = SimpleNamespace(get_config=gemma_sizes(sizes))
    return pi0_pytorch


def openpi_config(question: dict):
    """openpi's settings of its pi0.5."""
    from openpi.models.pi0_config import Pi0Config

    _, horizon, width = question["noise"].shape
    return Pi0Config(
        dtype="float32",
        pi05=True,
        action_dim=width,
        action_horizon=horizon,
        discrete_state_input=question.get("discrete_state_input", True),
        pytorch_compile_mode=None,
    )


def new_openpi(question: dict):
    """openpi's pi0.5 with random weights."""
    return small_openpi(question["sizes"]).PI0Pytorch(openpi_config(question)).eval()


def openpi_act() -> dict:
    """A checkpoint's actions by openpi's transforms (as in its ModelTransformFactory and create_trained_policy), model
    and loader. Its tokenizer has openpi's prompt and the words of tokenizer.json, as PaliGemma's is not at hand."""
    import jax
    import safetensors.torch
    import torch
    from openpi import transforms
    from openpi.models.model import Observation
    from openpi.models.tokenizer import PaligemmaTokenizer
    from openpi.shared import normalize
    from tokenizers import Tokenizer

    question = read("question.npz")
    folder = Path(question["checkpoint"])
    words = Tokenizer.from_file("tokenizer.json")
    tokenizer = object.__new__(PaligemmaTokenizer)
    tokenizer._max_len = 200
    tokenizer._tokenizer = SimpleNamespace(
        encode=lambda text, add_bos=False: [2] * add_bos + words.encode(text, add_special_tokens=False).ids
    )
    model = new_openpi(question)
    safetensors.torch.load_model(model, str(folder / "model.safetensors"))
    [assets] = (folder / "assets").iterdir()
    stats = normalize.load(assets)
    before = transforms.compose(
        [
            transforms.Normalize(stats, use_quantiles=True),
            transforms.ResizeImages(224, 224),
            transforms.TokenizePrompt(tokenizer, discrete_state_input=openpi_config(question).discrete_state_input),
            transforms.PadStatesAndActions(question["noise"].shape[2]),
        ]
    )
    after = transforms.Unnormalize(stats, use_quantiles=True)
    steps = question.get("num_steps", 4)  # whoever samples says it to openpi; 4 as in our preset
    prompts, states, actions = [], [], []
    for state, noise in zip(question["state"], question["noise"]):
        # Statistics are padded where the transforms of a robot's data pad its state and actions before they are taken.
        state = transforms.pad_to_dim(state, question.get("padded", 7))
        absent = np.zeros_like(question["image"])
        cameras = {"base_0_rgb": question["image"], "left_wrist_0_rgb": absent, "right_wrist_0_rgb": absent}
        seen = {name: np.array(name == "base_0_rgb") for name in cameras}
        inputs = before(dict(image=cameras, image_mask=seen, state=state, prompt=question["prompt"]))
        states.append(inputs["state"])
        tokens = inputs["tokenized_prompt"][inputs["tokenized_prompt_mask"]]
        prompts.append(words.decode([int(i) for i in tokens]))
        batch = jax.tree.map(lambda x: torch.from_numpy(np.array(x))[None], inputs)
        with torch.no_grad():
            chunk = model.sample_actions("cpu", Observation.from_dict(batch), torch.tensor(noise)[None], steps)
        actions.append(after(dict(state=inputs["state"], actions=chunk[0].numpy()))["actions"][:, :7])
    return dict(prompt=prompts, state=np.stack(states), actions=np.stack(actions), tokens=tokens)


def openpi_save() -> dict:
    """A new checkpoint as openpi's trainer writes it (scripts/train_pytorch.py, save_checkpoint); and its actions."""
    import safetensors.torch
    import torch
    from openpi.shared import normalize
    from openpi.training.config import get_config

    question = read("question.npz")
    folder = Path(question["checkpoint"])
    folder.mkdir()
    model = new_openpi(question)
    perturb(model)
    safetensors.torch.save_model(model, str(folder / "model.safetensors"))
    config = dataclasses.replace(get_config("pi05_libero"), model=openpi_config(question))
    torch.save(dict(global_step=1, config=dataclasses.asdict(config), timestamp=0.0), folder / "metadata.pt")
    stats = {}
    for name, feature in (("state", STATE), ("actions", "action")):
        kinds = json.loads(question["stats"])[feature]
        zeros = [0.0] * (question.get("padded", 7) - 7)
        stats[name] = normalize.NormStats(**{kind: np.array(kinds[kind] + zeros) for kind in KINDS})
    normalize.save(folder / "assets/robot", stats)
    return openpi_act()


def openpi_client() -> dict:
    """A server's actions, asked by openpi's client."""
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    question = read("question.npz")
    client = WebsocketClientPolicy("127.0.0.1", question["port"])
    obs = [dict(image=question["image"], state=state, prompt=question["prompt"]) for state in question["state"]]
    return dict(actions=np.stack([client.infer(o)["actions"] for o in obs]))


# ---- lerobot: datasets ------------------------------------------------------------------------------------------


def lerobot_dataset() -> dict:
    """All frames of a dataset as lerobot reads them, and of the same frames as it records them anew; both with
    statistics."""
    try:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
    except ImportError:
        from lerobot.common.datasets.lerobot_dataset import LeRobotDataset

    def frames(path):
        dataset = LeRobotDataset("us/them", root=path)
        rows = [dataset[i] for i in range(len(dataset))]
        pictures = [(row[CAMERA].permute(1, 2, 0) * 255).round().byte().numpy() for row in rows]
        answer = dict(image=np.stack(pictures), prompt=[row["task"] for row in rows])
        answer |= {key: np.stack([row[key].numpy() for row in rows]) for key in (STATE, "action", "episode_index")}
        for feature in (STATE, "action", CAMERA):
            for kind, x in dataset.meta.stats[feature].items():
                answer[f"stats/{feature}/{kind}"] = np.asarray(x)
        return answer

    question = read("question.npz")
    features = {CAMERA: dict(dtype="video" if question["video"] else "image", shape=tuple(question["shape"].tolist()))}
    features[CAMERA]["names"] = ["height", "width", "channels"]
    for key in (STATE, "action"):
        features[key] = dict(dtype="float32", shape=(7,), names=[str(name) for name in question["names"]])
    new = LeRobotDataset.create("us/them", 10, features, root=question["copy"], use_videos=bool(question["video"]))
    given = frames(question["dataset"]) if "dataset" in question else read("frames.npz")
    for i, episode in enumerate(given["episode_index"]):
        frame = {CAMERA: given["image"][i], STATE: given[STATE][i], "action": given["action"][i]}
        try:
            new.add_frame(frame | dict(task=str(given["prompt"][i])))
        except TypeError:  # 0.3 takes the task apart
            new.add_frame(frame, task=str(given["prompt"][i]))
        if i + 1 == len(given["episode_index"]) or given["episode_index"][i + 1] != episode:
            new.save_episode()
    if hasattr(new, "finalize"):
        new.finalize()
    copied = frames(question["copy"])
    return given | {f"copy/{key}": x for key, x in copied.items()}


if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the projects print is no reply
    for line in sys.stdin:
        function, folder = line.split()
        os.chdir(folder)
        try:
            np.savez("answer.npz", **globals()[function]())
            reply = "done"
        except Exception as error:
            traceback.print_exc()
            reply = " ".join(f"{type(error).__name__}: {error}".split())
        print(reply, file=replies, flush=True)
