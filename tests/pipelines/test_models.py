"""What a model's files may do: be data. Code that they bring or name is refused before any card, and never run."""

from __future__ import annotations

import json
import pickle
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import put_into_hub_cache

from gaudi_batch import InputError, JobConfig
from gaudi_batch.job import resolve
from gaudi_batch.pipelines.sources import BUILTIN_MODELS, ModelInfo, describe_model

pytestmark = pytest.mark.torch


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the built-in model, to spoil."""
    shutil.copytree(BUILTIN_MODELS / "shapes", tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """A file that hostile code makes when it runs."""
    return tmp_path / "ran"


def config(model: Path | str, **fields: Any) -> JobConfig:
    return JobConfig(prompts="p", output="o", model=str(model), **{"device": "cpu"} | fields)


def load(model: Path | str, **fields: Any) -> None:
    """Loads a model as a card does, without what the driver looks at before."""
    from gaudi_batch.pipelines.cpu import CpuPipeline

    built_in = describe_model(config("builtin:shapes"))
    fields = {"name": str(model), "path": str(model)} | fields
    CpuPipeline(ModelInfo(**vars(built_in) | fields), threads=1, dtype="float32")


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def code(ran: Path) -> str:
    """Python that tells that it ran, and defines whatever class it may be asked for."""
    return f"open({str(ran)!r}, 'w').close()\nclass Custom: pass\nCLIPTextModel = UNet2DConditionModel = Custom\n"


class Malice:
    """Pickled, it is a command that is run when it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.ran), "w"))


def pickle_weights(component: Path, content: object) -> None:
    for weights in component.glob("*.safetensors"):
        weights.unlink()
    name = "pytorch_model.bin" if component.name == "text_encoder" else "diffusion_pytorch_model.bin"
    (component / name).write_bytes(pickle.dumps(content))


@pytest.mark.parametrize(
    "component",
    [
        ["os", "system"],
        ["subprocess", "Popen"],
        ["antigravity", "fly"],
        ["diffusers.utils", "export_to_video"],
        ["diffusers", "StableDiffusionPipeline"],
        ["stable_diffusion", "StableDiffusionPipeline"],
        ["transformers", "pipeline.Pipeline"],
        ["transformers", 7],
        ["transformers"],
        ["transformers", "CLIPTextModel", "x"],
        [["os"], "system"],
        [],
    ],
)
@pytest.mark.parametrize("device", ["cpu", "hpu"])
def test_components_of_other_libraries_are_refused_and_not_imported(model: Path, component: Any, device: str) -> None:
    change(model / "model_index.json", unet=component)
    with pytest.raises(InputError, match=r"its 'unet' is \[.*no others"):
        describe_model(config(model, device=device))
    with pytest.raises(InputError, match="no others"):
        load(model)


def test_a_component_lies_in_the_model(model: Path) -> None:
    change(model / "model_index.json", **{"../unet": ["diffusers", "UNet2DConditionModel"]})
    with pytest.raises(InputError, match=r"its '\.\./unet' is"):
        describe_model(config(model))


@pytest.mark.parametrize("device", ["cpu", "hpu"])
@pytest.mark.parametrize("place", ["None.py", "text_encoder/transformers.py", "unet/diffusers.py", "tokenizer/x.py"])
def test_code_that_would_run_is_refused_before_any_card_and_by_the_card(
    model: Path, ran: Path, place: str, device: str
) -> None:
    (model / place).write_text(code(ran))
    with pytest.raises(InputError, match=rf"brings code \('{place}'\)"):
        describe_model(config(model, device=device))
    with pytest.raises(InputError, match="brings code"):
        load(model)
    assert not ran.exists()


def test_code_that_a_hub_model_hides_from_the_driver_is_refused_by_the_card(
    model: Path, ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    (model / "tokenizer/transformers.py").write_text(code(ran))
    change(model / "model_index.json", _ignore_files=["tokenizer/transformers.py"])
    commit = put_into_hub_cache(tmp_path, "someone/shapes", model)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="'someone/shapes' brings code"):
        load("someone/shapes", hub=True, revision=commit)
    assert not ran.exists()


def test_code_that_nothing_runs_is_left_alone(model: Path, ran: Path) -> None:
    for place in ("pipeline.py", "handler.py", "modeling.py"):
        (model / place).write_text(code(ran))
    for component in ("text_encoder", "unet"):
        names = {"AutoModel": "modeling.Custom", "AutoConfig": "modeling.Custom"}
        change(model / component / "config.json", auto_map=names, custom_pipeline="pipeline")
    change(model / "tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling.Custom", None]})
    change(model / "model_index.json", custom_pipeline="pipeline", trust_remote_code=True)
    describe_model(config(model))
    load(model)
    assert not ran.exists()


@pytest.mark.parametrize("name", [["pipeline", "Custom"], ["None", "x"], {"a": 1}, None, "DiffusionPipeline"])
def test_a_pipeline_of_the_models_own_is_refused(model: Path, ran: Path, name: Any) -> None:
    (model / "pipeline.py").write_text(code(ran))
    change(model / "model_index.json", _class_name=name)
    with pytest.raises(InputError, match="; supported: StableDiffusionPipeline"):
        describe_model(config(model))
    if not isinstance(name, str):
        with pytest.raises(InputError, match="which is code of its own"):
            load(model)
    assert not ran.exists()


@pytest.mark.parametrize("key", ["_attn_implementation_internal", "_attn_implementation"])
def test_attention_from_a_hub_is_refused(model: Path, key: str) -> None:
    change(model / "text_encoder/config.json", text_config={key: "someone/kernel"})
    with pytest.raises(InputError, match="wants attention from a hub"):
        describe_model(config(model))
    with pytest.raises(InputError, match="wants attention from a hub"):
        load(model)


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae"])
def test_pickled_weights_are_refused_before_any_card(model: Path, ran: Path, component: str) -> None:
    pickle_weights(model / component, Malice(ran))
    with pytest.raises(InputError, match=rf"its {component} has no \.safetensors but weights that Python has pickled"):
        describe_model(config(model))
    with pytest.raises(OSError, match="safetensors"):
        load(model)
    assert not ran.exists()


def test_pickled_weights_of_a_hub_model_are_refused_before_any_card(
    model: Path, ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    pickle_weights(model / "unet", Malice(ran))
    put_into_hub_cache(tmp_path, "someone/shapes", model)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"its unet has no \.safetensors but weights that Python has pickled"):
        describe_model(config("someone/shapes"))
    describe_model(config("someone/shapes", use_safetensors=False))


@pytest.mark.parametrize("component", ["text_encoder", "unet"])
def test_a_malicious_pickle_is_not_run_by_a_job_that_allows_pickled_weights(
    model: Path, ran: Path, component: str
) -> None:
    import torch

    pickle_weights(model / component, Malice(ran))
    info = describe_model(config(model, use_safetensors=False))
    with pytest.raises(Exception, match=r"weights_only|Weights only|Unable to load weights"):
        load(model, use_safetensors=info.use_safetensors)
    torch.save({"weight": Malice(ran)}, next((model / component).glob("*.bin")))
    with pytest.raises(Exception, match=r"weights_only|Weights only|Unable to load weights"):
        load(model, use_safetensors=info.use_safetensors)
    assert not ran.exists()


def test_a_job_can_allow_pickled_weights_and_is_then_another_job(
    model: Path, write_prompts: Callable[..., Path]
) -> None:
    import torch
    from safetensors.torch import load_file

    weights = next((model / "unet").glob("*.safetensors"))
    tensors = load_file(weights)
    weights.unlink()
    torch.save(tensors, weights.with_suffix(".bin"))
    jobs = {"prompts": str(write_prompts({"prompt": ["p"]}))}
    allowed = resolve(config(model, use_safetensors=False).model_copy(update=jobs))
    usual = resolve(config("builtin:shapes").model_copy(update=jobs))
    assert allowed.fingerprint()["use_safetensors"] is False
    assert "use_safetensors" not in usual.fingerprint()
    assert allowed.model.revision != usual.model.revision
    load(model, use_safetensors=False)
    weights.with_suffix(".bin").write_bytes(b"other")
    assert describe_model(config(model, use_safetensors=False)).revision != allowed.model.revision


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("unet/config.json", {"sample_size": "64"}),
        ("unet/config.json", {"sample_size": [1, 2, 3]}),
        ("unet/config.json", {"sample_size": 10**400}),
        ("unet/config.json", {"sample_size": -8}),
        ("vae/config.json", {"block_out_channels": 5}),
        ("vae/config.json", {"block_out_channels": [1] * 10**5}),
    ],
)
def test_a_size_that_can_not_be_is_refused(model: Path, path: str, values: dict[str, Any]) -> None:
    change(model / path, **values)
    with pytest.raises(InputError, match=r"sample_size of its unet is|block_out_channels of its vae is") as caught:
        describe_model(config(model))
    assert len(str(caught.value)) < 500 + len(str(model))


def test_the_gaudi_pipeline_looks_at_a_model_in_the_same_way(
    model: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Intel's stack: up to where the pipeline would be loaded."""
    import sys

    from gaudi_batch.pipelines import gaudi

    (model / "unet/diffusers.py").write_text(code(ran))
    pipelines = types.SimpleNamespace(GaudiStableDiffusionPipeline=None)
    optimum = types.SimpleNamespace(GaudiConfig=dict, diffusers=pipelines)
    monkeypatch.setitem(sys.modules, "optimum.habana", optimum)
    monkeypatch.setitem(sys.modules, "habana_frameworks.torch.hpu", types.SimpleNamespace(get_device_name=str))
    for name in ("require_stack", "acquire", "describe_device", "prepare"):
        monkeypatch.setattr(gaudi, name, lambda *_: None)
    info = ModelInfo(**vars(describe_model(config("builtin:shapes"))) | {"name": "m", "path": str(model)})
    with pytest.raises(InputError, match="brings code"):
        gaudi.GaudiPipeline(config(model, device="hpu"), info, 1)
    assert not ran.exists()
