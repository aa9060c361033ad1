"""LoRAs: found, judged by their headers before any card, fused into the model, and part of what a run is."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import StoreServer, put_into_hub_cache

from gaudi_batch import InputError, JobConfig
from gaudi_batch.job import resolve
from gaudi_batch.pipelines.base import Item
from gaudi_batch.pipelines.lora import fetch_lora
from gaudi_batch.pipelines.sources import describe_model
from gaudi_batch.plan import Bucket

pytestmark = pytest.mark.torch

ITEMS = [Item(row, 0, prompt, "", row) for row, prompt in enumerate(["a red circle", "a blue square on white"])]
MODELS = {"shapes": 4.0, "xl": 5.0, "sd3": 7.0, "flux": 3.5, "qwen": 4.0, "aura": 3.5}
"""Tiny models, and a guidance scale for each."""
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
RANK = 2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | str]:
    import tiny

    directory = tmp_path_factory.mktemp("models")
    built = {name: tiny.save(getattr(tiny, name), directory / name) for name in MODELS if name != "shapes"}
    return {"shapes": "builtin:shapes", **built}


def denoiser_of(pipeline: Any) -> tuple[str, Any]:
    name = "transformer" if getattr(pipeline, "transformer", None) is not None else "unet"
    return name, getattr(pipeline, name)


def changes_of(pipeline: Any, seed: int = 0) -> dict[str, Any]:
    """Two small matrices for each projection of the denoiser's attention, in diffusers' own form."""
    import torch

    name, denoiser = denoiser_of(pipeline)
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for path, module in denoiser.named_modules():
        if path.endswith(LAYERS) and isinstance(module, torch.nn.Linear):
            made[f"{name}.{path}.lora_A.weight"] = torch.randn(RANK, module.in_features, generator=generator)
            made[f"{name}.{path}.lora_B.weight"] = torch.randn(module.out_features, RANK, generator=generator)
    assert made
    return made


def changes_of_model(model: Path | str) -> dict[str, Any]:
    from gaudi_batch.pipelines.cpu import CpuPipeline

    return changes_of(CpuPipeline(describe_model(config(model=str(model))), 1, "float32")._pipeline)


def matrices(path: str, module: Any) -> dict[str, Any]:
    import torch

    return {
        f"{path}.lora_A.weight": torch.zeros(RANK, module.in_features),
        f"{path}.lora_B.weight": torch.zeros(module.out_features, RANK),
    }


def changes_of_text_encoder(pipeline: Any) -> dict[str, Any]:
    """The same for projections of its text encoder."""
    import torch

    generator = torch.Generator().manual_seed(7)
    made = {}
    for path, module in pipeline.text_encoder.named_modules():
        if path.endswith(("q_proj", "v_proj")):
            made[f"text_encoder.{path}.lora_A.weight"] = torch.randn(RANK, module.in_features, generator=generator)
            made[f"text_encoder.{path}.lora_B.weight"] = torch.randn(module.out_features, RANK, generator=generator)
    return made


def kohya(changes: dict[str, Any]) -> dict[str, Any]:
    """The same as kohya's scripts write it."""
    import torch

    renamed: dict[str, Any] = {}
    for name, matrix in changes.items():
        path, _, kind = name.removesuffix(".weight").rpartition(".")
        path = "lora_unet_" + path.removeprefix("unet.").replace(".", "_")
        renamed[f"{path}.{'lora_down' if kind == 'lora_A' else 'lora_up'}.weight"] = matrix
        renamed[f"{path}.alpha"] = torch.tensor(float(RANK))
    return renamed


def save(changes: dict[str, Any], file: Path) -> Path:
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: matrix.contiguous() for name, matrix in changes.items()}, str(file))
    return file


def load(model: Path | str, *lora: dict[str, Any]) -> Any:
    from gaudi_batch.pipelines.cpu import CpuPipeline

    config = JobConfig(prompts="p", output="o", model=str(model), device="cpu", lora=lora)
    return CpuPipeline(describe_model(config), 1, "float32")


def images(pipeline: Any, guidance: float) -> np.ndarray[Any, Any]:
    made: np.ndarray[Any, Any] = pipeline.generate(Bucket(64, 64, 3, guidance), ITEMS).images
    return made


@pytest.mark.parametrize("name", MODELS)
def test_fused_loras_are_the_weights_with_their_products_added(
    name: str, models: dict[str, Path | str], tmp_path: Path
) -> None:
    """Two of them, each with its scale: what is expected is computed here, without diffusers' loader. One changes the
    text encoder, too, where diffusers reads that."""
    import torch

    plain = load(models[name])
    before = images(plain, MODELS[name])
    loras = []
    for number, scale in enumerate((0.5, -0.25)):
        changes = changes_of(plain._pipeline, number)
        if number and "text_encoder" in plain._pipeline._lora_loadable_modules:
            changes |= changes_of_text_encoder(plain._pipeline)
        file = save(changes, tmp_path / f"style-{number}.safetensors")
        loras.append({"path": str(file), "scale": scale})
        for part in plain._pipeline._lora_loadable_modules:
            for path, module in getattr(plain._pipeline, part).named_modules():
                first = changes.get(f"{part}.{path}.lora_A.weight")
                if first is not None:
                    second = changes[f"{part}.{path}.lora_B.weight"]
                    with torch.no_grad():
                        module.weight += scale * (second @ first)
    expected = images(plain, MODELS[name])
    made = images(load(models[name], *loras), MODELS[name])
    assert np.abs(expected - before).max() > 0.02
    assert np.abs(made - expected).max() < 1e-3


def test_a_file_of_kohyas_scripts_does_the_same(models: dict[str, Path | str], tmp_path: Path) -> None:
    changes = changes_of(load(models["shapes"])._pipeline)
    own, other = save(changes, tmp_path / "own.safetensors"), save(kohya(changes), tmp_path / "kohya.safetensors")
    made = [images(load(models["shapes"], {"path": str(file)}), 4.0) for file in (own, other)]
    assert np.abs(made[0] - made[1]).max() < 1e-4


@pytest.mark.parametrize(
    ("of", "on", "form"),
    [
        *((of, on, "own") for of, on in [("xl", "shapes"), ("shapes", "xl"), ("flux", "sd3"), ("shapes", "qwen")]),
        *((of, on, "kohya") for of, on in [("xl", "shapes"), ("shapes", "xl")]),
    ],
)
def test_one_of_another_model_is_refused_by_name_before_a_card(
    of: str, on: str, form: str, models: dict[str, Path | str], tmp_path: Path
) -> None:
    changes = changes_of(load(models[of])._pipeline)
    file = save(kohya(changes) if form == "kohya" else changes, tmp_path / "style.safetensors")
    config = JobConfig(prompts="p", output="o", model=str(models[on]), device="cpu", lora=[{"path": str(file)}])
    with pytest.raises(
        InputError, match=r"lora '.*style.safetensors' does not fit model .*: (it changes|diffusers does not read) "
    ):
        describe_model(config)


@pytest.fixture
def style(models: dict[str, Path | str], tmp_path: Path) -> Path:
    return save(changes_of(load(models["shapes"])._pipeline), tmp_path / "style/style.safetensors")


def config(*lora: dict[str, Any], **fields: Any) -> JobConfig:
    return JobConfig(
        **{"prompts": "p", "output": "o", "model": "builtin:shapes", "device": "cpu", "lora": lora} | fields
    )


def test_one_of_which_a_part_would_be_left_out_is_refused_by_name(style: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    changes = load_file(style)
    first = next(name for name in changes if ".lora_B." in name)
    alone = save({name: value for name, value in changes.items() if name != first}, tmp_path / "alone.safetensors")
    narrow = save(changes | {first: changes[first][:, :1].contiguous()}, tmp_path / "narrow.safetensors")
    for file in (alone, narrow):
        with pytest.raises(InputError, match=r"lora_A.weight is of .* values, and what it goes with of "):
            describe_model(config({"path": str(file)}))
    for name in ("unet.a.dora_scale", "lora_unet_a.lora_mid.weight", "unet.a.hada_w1_a", "unet.a.diff"):
        file = save(changes | {name: changes[first].clone()}, tmp_path / "kind.safetensors")
        with pytest.raises(InputError, match=f"{name} is of a kind that diffusers does not read"):
            describe_model(config({"path": str(file)}))
    for prefix in ("base_model.model.unet", "diffusion"):
        other = {name.replace("unet", prefix, 1): value for name, value in changes.items()}
        with pytest.raises(InputError, match=r"diffusers does not read names such as .*; those .* begin with .*unet\."):
            describe_model(config({"path": str(save(other, tmp_path / "other.safetensors"))}))


def test_modules_that_the_model_has_not_end_the_card_and_are_not_passed_over(style: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    changes = kohya(load_file(style))
    names = {name.partition(".")[0] for name in changes}
    gone = min(name for name in names if "unet" in name)
    file = save(
        {name.replace(gone, f"{gone}7"): value for name, value in changes.items()}, tmp_path / "gone.safetensors"
    )
    with pytest.raises(RuntimeError, match=r"diffusers does not take all of lora .*: .*unexpected keys"):
        load("builtin:shapes", {"path": str(file)})


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen"])
def test_changes_of_a_component_that_diffusers_passes_over_are_refused(
    name: str, models: dict[str, Path | str], tmp_path: Path
) -> None:
    """SD 3's loader knows no third text encoder, FLUX's no second, and Qwen-Image's none."""
    from gaudi_batch.pipelines.cpu import CpuPipeline

    plain: Any = CpuPipeline(describe_model(config(model=str(models[name]))), 1, "float32")
    component = {"sd3": "text_encoder_3", "flux": "text_encoder_2", "qwen": "text_encoder"}[name]
    weight = next(
        (path, module)
        for path, module in getattr(plain._pipeline, component).named_modules()
        if path.endswith((".q", ".q_proj"))
    )
    changes = changes_of(plain._pipeline) | matrices(f"{component}.{weight[0]}", weight[1])
    file = save(changes, tmp_path / "style.safetensors")
    with pytest.raises(InputError, match=rf"does not fit model .*: diffusers does not read names such as {component}"):
        describe_model(config({"path": str(file)}, model=str(models[name])))


def test_kohyas_names_are_refused_where_diffusers_converts_none(models: dict[str, Path | str], tmp_path: Path) -> None:
    changes = {name.replace("transformer", "unet", 1): value for name, value in changes_of_model(models["sd3"]).items()}
    file = save(kohya(changes), tmp_path / "style.safetensors")
    with pytest.raises(InputError, match=r"diffusers does not read names such as lora_unet_"):
        describe_model(config({"path": str(file)}, model=str(models["sd3"])))


def test_one_is_judged_by_a_model_in_a_store_too_and_not_where_its_weights_are_unknown(
    style: Path, models: dict[str, Path | str], tmp_path: Path, moto: StoreServer
) -> None:
    from gaudi_batch.pipelines.sources import BUILTIN_MODELS
    from gaudi_batch.storage.store import Storage

    fields = {"output": moto.url("out"), "storage_options": moto.options}
    store = Storage(moto.url("models"), moto.options)
    for name, directory in (("shapes", BUILTIN_MODELS / "shapes"), ("xl", Path(models["xl"]))):
        for file in directory.rglob("*.*"):
            if file.is_file():
                store.put_file(f"{name}/{file.relative_to(directory)}", str(file))
    lora = {"path": str(style)}
    assert describe_model(config(lora, model=moto.url("models/shapes"), **fields)).loras
    with pytest.raises(InputError, match=r"does not fit model .*: it changes "):
        describe_model(config(lora, model=moto.url("models/xl"), **fields))
    pickled = shutil.copytree(BUILTIN_MODELS / "shapes", tmp_path / "pickled")
    for file in pickled.rglob("*.safetensors"):
        file.rename(file.with_name("diffusion_pytorch_model.bin" if "text" not in str(file) else "pytorch_model.bin"))
    assert describe_model(config(lora, model=str(pickled), use_safetensors=False)).loras, "the card finds out"


def test_a_misfit_that_only_the_card_sees_is_named_there(style: Path, tmp_path: Path) -> None:
    from gaudi_batch.pipelines.loading import fuse_loras

    info = describe_model(config({"path": str(style)}))

    class Pipeline:
        fuse_lora = None

        def load_lora_weights(self, *_: Any, **__: Any) -> None:
            raise ValueError("Target modules {'to_k'} not found in the base model.")

    with pytest.raises(
        RuntimeError, match=r"lora '.*style.safetensors' does not fit Pipeline 'builtin:shapes': Target"
    ):
        fuse_loras(Pipeline(), info)


def test_a_path_that_a_node_does_not_have_is_told_so(style: Path, tmp_path: Path) -> None:
    (info,) = describe_model(config({"path": str(style)})).loras
    style.unlink()
    with pytest.raises(InputError, match=r"this node has no .*; a local path must be on a file system that all nodes"):
        fetch_lora(info, tmp_path)


def test_a_file_that_is_another_by_now_is_refused_on_the_card(style: Path, tmp_path: Path) -> None:
    (info,) = describe_model(config({"path": str(style)})).loras
    assert fetch_lora(info, tmp_path) == style
    style.write_bytes(style.read_bytes()[:-1] + b"\0")
    with pytest.raises(InputError, match="is not what the driver saw when the job began"):
        fetch_lora(info, tmp_path)


def test_what_holds_no_lora_is_refused_by_name(style: Path, tmp_path: Path) -> None:
    import torch

    pickled = style.with_name("pickled.bin")
    pickled.write_bytes(pickle.dumps({}))
    torn = style.with_name("torn.safetensors")
    torn.write_bytes(style.read_bytes()[:20])
    weights = save({"unet.conv_in.weight": torch.zeros(2, 2)}, tmp_path / "weights/model.safetensors")
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, message in (
        (pickled, "is not a .safetensors file, and other files may hold code"),
        (torn, "torn.safetensors can't be read: it is no safetensors file"),
        (weights, "model.safetensors has no weights of a LoRA"),
        (style.parent, "has style.safetensors, torn.safetensors; name one by weight_name"),
        (empty, "has no .safetensors file"),
        ("./nowhere.safetensors", "there is no such file or directory on this machine"),
        (tmp_path / "absent/at all", "there is no such file or directory on this machine"),
    ):
        with pytest.raises(InputError, match=message):
            describe_model(config({"path": str(path)}))
    with pytest.raises(InputError, match=r"has no 'other.safetensors'; it has style.safetensors"):
        describe_model(config({"path": str(style.parent), "weight_name": "other.safetensors"}))
    with pytest.raises(InputError, match=r"is a file, and weight_name is 'other.safetensors'; leave one out"):
        describe_model(config({"path": str(style), "weight_name": "other.safetensors"}))
    with pytest.raises(InputError, match="this is a path"):
        describe_model(config({"path": str(style), "revision": "main"}))


def test_one_from_the_hub_is_of_a_commit(style: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = put_into_hub_cache(tmp_path / "hub", "owner/style", style.parent)
    (info,) = describe_model(config({"path": "owner/style", "weight_name": style.name})).loras
    assert (info.revision, info.hub) == (commit, True)
    assert fetch_lora(info, tmp_path / "cache").read_bytes() == style.read_bytes()
    with pytest.raises(InputError, match=r"the hub can't be reached, and its cache does not have it"):
        describe_model(config({"path": "owner/other", "weight_name": style.name}))


def test_one_from_a_store_is_kept_on_the_node(style: Path, tmp_path: Path, moto: StoreServer) -> None:
    from gaudi_batch.storage.store import Storage

    url = moto.url("loras")
    Storage(url, moto.options).put("styles/style.safetensors", style.read_bytes())
    fields = {"output": moto.url("out"), "storage_options": moto.options}
    for path, name in (
        (f"{url}/styles/style.safetensors", None),
        (f"{url}/styles", style.name),
        (f"{url}/styles", None),
    ):
        (info,) = describe_model(config({"path": path, "weight_name": name}, **fields)).loras
        kept = fetch_lora(info, tmp_path / "cache")
        assert kept.read_bytes() == style.read_bytes()
    assert list((tmp_path / "cache").glob("*.safetensors")) == [kept]
    kept.unlink()
    Storage(url, moto.options).put("styles/style.safetensors", b"another")
    with pytest.raises(InputError, match="is not what it was when the job began"):
        fetch_lora(info, tmp_path / "cache")
    with pytest.raises(InputError, match=r"there is no absent.safetensors in"):
        describe_model(config({"path": f"{url}/styles/absent.safetensors"}, **fields))


def test_a_run_goes_on_with_the_same_loras_alone(
    style: Path, tmp_path: Path, write_prompts: Callable[..., Path]
) -> None:
    import torch

    prompts = str(write_prompts({"prompt": ["a"]}))

    def fingerprint(**lora: Any) -> dict[str, Any]:
        return resolve(config({"path": str(style)} | lora, prompts=prompts)).fingerprint()

    first = fingerprint()
    assert first == fingerprint()
    assert first["lora"][0]["scale"] == 1.0
    assert fingerprint(scale=0.5) != first
    assert "lora" not in resolve(config(prompts=prompts)).fingerprint(), "an older run has none"
    changed = {name: 2 * torch.ones(shape) for name, shape in _shapes(style).items()}
    save(changed, style)
    assert fingerprint() != first


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name: tuple(value["shape"]) for name, value in header.items() if name != "__metadata__"}


def test_a_column_of_loras_is_refused_with_the_way_out(write_prompts: Callable[..., Path]) -> None:
    prompts = str(write_prompts({"prompt": ["a"], "lora": ["pixels"]}))
    with pytest.raises(InputError, match="make a job of each style, with its prompts and its lora"):
        resolve(config(prompts=prompts))
    resolve(config(prompts=prompts, carry=[]))
