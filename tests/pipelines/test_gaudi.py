"""Jobs with device hpu on emulated cards: found by themselves, the same images as on the CPU, graphs captured once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import threadcards
from helpers import REPOSITORY, TESTS, command_line, put_into_hub_cache, read_manifest

from gaudi_batch import InputError, JobConfig, run
from gaudi_batch.bench.published import PUBLISHED
from gaudi_batch.cli.check import check
from gaudi_batch.config.sections import QuantizeConfig
from gaudi_batch.job import resolve
from gaudi_batch.pipelines.base import DeviceError, Item, OutOfDeviceMemory
from gaudi_batch.pipelines.gaudi import GaudiPipeline
from gaudi_batch.pipelines.gaudi_environment import digest_of_quantization, environment, prepare
from gaudi_batch.pipelines.sources import BUILTIN_MODELS, describe_model
from gaudi_batch.plan import Bucket

CONFIGS = REPOSITORY / "jobs/configs"
COLOURS = ("red", "green", "blue", "white", "black")
FLAGS = ("--model", "builtin:shapes", "--batch-size", "4", "--steps", "2", "--shard-size", "8", "--cpu.threads", "1")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two shapes, of which one can't be run, so that batches are short in places."""
    path = tmp_path_factory.mktemp("gaudi") / "prompts.parquet"
    texts = [f"a large {COLOURS[row % 5]} circle on a yellow background" for row in range(18)]
    table = {"prompt": [None if row == 11 else text for row, text in enumerate(texts)], "width": [64, 96, 64] * 6}
    pq.write_table(pa.table(table), path)
    return path


@pytest.fixture(scope="module")
def on_cpu(prompts: Path, tmp_path_factory: pytest.TempPathFactory, cluster: str) -> dict[int, str | None]:
    """What the same job makes on the CPU: the SHA-256 of each row."""
    job = JobConfig(
        prompts=str(prompts),
        output=str(tmp_path_factory.mktemp("cpu") / "out"),
        model="builtin:shapes",
        device="cpu",
        cards=1,
        batch_size=4,
        steps=2,
        cpu={"threads": 1},
    )
    with pytest.MonkeyPatch.context() as patched:
        threadcards.put_in_place(patched)
        assert run(job, address=cluster).exit_code == 3
    return hashes(Path(job.output))


def hashes(output: Path) -> dict[int, str | None]:
    return {row["row"]: row["sha256"] for row in read_manifest(output)}


def counters(state: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in (state / "counters").glob("*.json")]


@pytest.mark.torch
def test_cards_are_found_and_make_the_images_of_the_cpu_with_one_capture_per_graph_key(
    prompts: Path, tmp_path: Path, on_cpu: dict[int, str | None]
) -> None:
    job: tuple[str | Path, ...] = (
        "run",
        "--prompts",
        prompts,
        "--output",
        tmp_path / "out",
        "--dtype",
        "float32",
        *FLAGS,
    )
    state = tmp_path / "machine"
    emulate = ("emulate", "--modules", "4,5", "--state", state, "--", "gaudi-batch")
    result = command_line(*emulate, *job, "--gaudi.recipe-cache", tmp_path / "recipes")
    assert result.returncode == 3, result.stderr
    assert "2 cards, device hpu" in result.stderr
    # A card makes what its environment names: so Ray has put it there.
    assert (tmp_path / "recipes").is_dir()
    assert hashes(tmp_path / "out") == on_cpu
    assert json.loads((tmp_path / "out/run.json").read_text())["job"]["device"] == "hpu"
    cards = counters(state)
    # One may have made all before the other has loaded.
    assert {card["module"] for card in cards} <= {4, 5}
    assert all(card["captures"] <= 2 for card in cards)
    assert sum(card["captures"] for card in cards) >= 2
    assert sum(card["compilations"] for card in cards) >= 2
    lines = [json.loads(line) for path in (tmp_path / "out/throughput").rglob("*.jsonl") for line in path.open()]
    assert {line["device"] for line in lines} == {"hpu GAUDI2 (emulated)"}
    assert {line["module"] for line in lines} <= {4, 5}

    (place,) = (tmp_path / "out/recipes").iterdir()
    assert place.name == "hpu-GAUDI2-emulated-1.24.0"
    assert sorted(path.suffix for path in place.iterdir()) == [".metadata"] * 2 + [".recipe"] * 2


WITHOUT_OPTIMUM = """
import sys


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("optimum.habana"):
            raise ImportError(f"{name} is not installed here")


sys.meta_path.insert(0, Refuse())
"""


@pytest.mark.thorough
@pytest.mark.torch
def test_in_eager_mode_a_job_needs_no_optimum_habana_and_a_card_whose_device_fails_is_replaced_on_its_module(
    prompts: Path, tmp_path: Path, on_cpu: dict[int, str | None]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_OPTIMUM)
    job = ("run", "--prompts", prompts, "--output", tmp_path / "out", "--dtype", "float32", *FLAGS)
    state = tmp_path / "machine"
    emulate = ("emulate", "--modules", "1", "--fault", "oom:0@3", "--state", state, "--", "gaudi-batch")
    result = command_line(*emulate, *job, "--gaudi.mode", "eager", PYTHONPATH=str(tmp_path))
    assert result.returncode == 3, result.stderr
    assert "guidance 7.5); try --batch-size 2" in result.stderr
    assert hashes(tmp_path / "out") == on_cpu, "nothing is lost"
    assert [(card["module"], card["captures"]) for card in counters(state)] == [(0, 0), (0, 0)]
    assert json.loads((tmp_path / "out/run.json").read_text())["fingerprint"]["gaudi"] == {"mode": "eager"}


@pytest.mark.thorough
@pytest.mark.torch
def test_bench_measures_and_says_that_the_cards_are_emulated(tmp_path: Path) -> None:
    bench = (
        "bench",
        "--model",
        "builtin:shapes",
        "--steps",
        "2",
        "--calls",
        "2",
        "--batch-size",
        "2",
        "--gaudi.mode=eager",
    )
    result = command_line("emulate", "--modules", "2", "--state", tmp_path, "--", "gaudi-batch", *bench)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("EMULATED CARDS")
    assert re.search(r"\| one card +\| [\d.]+ s \([\d.]+ to [\d.]+\) +\| [\d.]+ images/s", result.stdout)
    assert "2 cards at once" in result.stdout
    assert not [each.source for each in PUBLISHED if each.source in result.stdout]


@pytest.mark.thorough
@pytest.mark.torch
def test_tune_ends_where_the_device_s_memory_ends_and_says_how_much_a_size_takes(tmp_path: Path) -> None:
    """With memory for the model and one image; a batch of 2 fails in a process that has made nothing else, too."""
    job_file = tmp_path / "job.yaml"
    job_file.write_text("prompts: p\noutput: o\nmodel: builtin:shapes\nsteps: 2\ncpu: {threads: 1}\n")
    machine = ("emulate", "--modules", "1", "--memory-gib", "0.0308", "--state", tmp_path / "machine", "--")
    result = command_line(*machine, "gaudi-batch", "tune", job_file, "--calls", "1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("EMULATED CARDS")
    assert re.search(r"\| 1 +\| [\d.]+ +\| [\d.]+ \(.*\) \| 0.030\d of 0.0308 GiB \|", result.stdout)
    assert "stopped: the device has no memory for batch size 2" in result.stdout
    assert "out of device memory at batch size 2 (64x64, 2 steps, guidance 7.5); try --batch-size 1" in result.stderr
    assert len(counters(tmp_path / "machine")) == 2, "the process that ran out of memory was replaced"
    assert "batch_size: 1\n" in job_file.read_text()
    (measured,) = json.loads((tmp_path / "job.tune.json").read_text())["measurements"]
    assert measured["device_name"] == "hpu GAUDI2 (emulated)"
    assert 0.9 * measured["memory_bytes"] < measured["memory_peak_bytes"] <= measured["memory_bytes"]


def test_without_intels_stack_the_error_says_where_it_comes_from(tmp_path: Path, prompts: Path) -> None:
    job = ("run", "--prompts", prompts, "--output", tmp_path / "out", "--device", "hpu", *FLAGS)
    result = command_line(*job)
    assert result.returncode == 2
    assert "habana_frameworks is not installed here; it comes with Intel's Gaudi container" in result.stderr
    assert not (tmp_path / "out/images").exists()


def hpu_job(**fields: Any) -> JobConfig:
    return JobConfig(prompts="p", output="o", device="hpu", **({"model": "builtin:shapes"} | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheduler": "euler"}, "'euler' draws noise while it steps.*; use ddim"),
        ({"scheduler": "euler_ancestral"}, "draws noise while it steps"),
        ({"scheduler": "unipc"}, "'unipc' is not known for device hpu; use ddim"),
        ({"gaudi": {"config": {"use_autocast": True}}}, "'use_autocast' is not a field of a Gaudi config"),
        ({"gaudi": {"config": {"use_torch_autocast": "no"}}}, "use_torch_autocast must be true or false"),
        ({"gaudi": {"config": {"autocast_bf16_ops": ["add"]}}}, "go together"),
        ({"gaudi": {"config": "./no/such/config.json"}}, "there is no such file, and it is not a hub id"),
    ],
)
def test_what_a_gaudi_card_can_not_run_is_refused(
    fields: dict[str, Any], message: str, prompts: Path, tmp_path: Path
) -> None:
    places = {"prompts": str(prompts), "output": str(tmp_path), "device": "hpu", "model": "builtin:shapes"}
    with pytest.raises(InputError, match=message):
        resolve(JobConfig.load(None, places | fields))


def test_a_hub_id_that_is_not_in_the_cache_is_refused_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompts: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="model 'someone/else': no such directory here, the hub can't be reached"):
        describe_model(hpu_job(model="someone/else"))
    job = hpu_job(gaudi={"config": "Habana/stable-diffusion"}).model_copy(update={"prompts": str(prompts)})
    with pytest.raises(InputError, match=r"gaudi\.config 'Habana/stable-diffusion'"):
        resolve(job.model_copy(update={"output": str(tmp_path)}))


def test_a_gaudi_config_is_read_once_and_shapes_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompts: Path
) -> None:
    lists = {"autocast_bf16_ops": ["conv2d", "linear"], "autocast_fp32_ops": ["softmax"]}
    (tmp_path / "gaudi_config.json").write_text(
        json.dumps({"use_torch_autocast": True, "optimum_version": "1.8.0", **lists})
    )
    job = hpu_job(gaudi={"config": str(tmp_path), "recipe_cache": str(tmp_path / "recipes")})
    resolved = resolve(job.model_copy(update={"prompts": str(prompts), "output": str(tmp_path / "out")}))
    assert resolved.config.gaudi.config == {"use_torch_autocast": True, **lists}
    assert resolved.fingerprint()["gaudi"]["config"] == resolved.config.gaudi.config
    assert "device   hpu, autocast to bfloat16" in check(resolved.config).text

    variables = environment(resolved.config)
    assert variables["PT_HPU_LAZY_MODE"] == "1"
    assert variables["PT_HPU_RECIPE_CACHE_CONFIG"] == f"{tmp_path}/recipes,false,16384"
    for name, value in variables.items():  # as Ray does it on the node
        monkeypatch.setenv(name, value.replace("${HOME}", str(tmp_path / "home")))
    prepare(resolved.config)
    assert (tmp_path / "recipes").is_dir()
    for name, ops in (("LOWER_PRECISION", "conv2d\nlinear\n"), ("FP32", "softmax\n")):
        assert (
            Path(
                re.sub(r"\$\{HOME\}", str(tmp_path / "home"), variables[f"PT_HPU_AUTOCAST_{name}_OPS_LIST"])
            ).read_text()
            == ops
        )


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        ("RuntimeError: PT_DEVMEM Allocation failed for size", OutOfDeviceMemory, "try --batch-size 2"),
        ("no scales", DeviceError, "gaudi.quantize: the model can't be converted: no scales"),
    ],
)
def test_a_conversion_that_fails_ends_the_card_and_one_without_memory_says_so(
    error: str, kind: type[DeviceError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(**_: Any) -> None:
        raise RuntimeError(error)

    monkeypatch.setattr("gaudi_batch.pipelines.calls.call_arguments", lambda *_: {})
    monkeypatch.setattr(GaudiPipeline, "graph_key", lambda *_: None)
    pipeline: Any = GaudiPipeline.__new__(GaudiPipeline)
    pipeline._pipeline, pipeline._family, pipeline._quant_mode, pipeline._graphs = convert, None, "quantize", {}
    with pytest.raises(DeviceError, match=message) as raised:
        pipeline.generate(Bucket(64, 64, 2, 4.0), [Item(row, 0, "p", "", row) for row in range(4)])
    assert raised.type is kind


def test_scales_and_their_configuration_are_part_of_the_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quant.json").write_text('{"mode": "QUANTIZE", "dump_stats_path": "./measured/scales"}')
    (tmp_path / "measured").mkdir()
    quantize = QuantizeConfig(config=str(tmp_path / "quant.json"), mode="quantize")
    digests = [digest_of_quantization(quantize)]
    for content in ("a", "b"):
        (tmp_path / "measured/scales_hooks_maxabs.json").write_text(content)
        digests.append(digest_of_quantization(quantize))
    assert len(set(digests)) == 3


def test_float32_turns_autocast_off() -> None:
    from gaudi_batch.pipelines.gaudi_environment import gaudi_mapping

    assert gaudi_mapping(hpu_job()) == {"use_torch_autocast": True}
    assert gaudi_mapping(hpu_job(dtype="float32")) == {"use_torch_autocast": False}


CHECK_EACH = """
import contextlib, io, json, sys
from gaudi_batch.cli.main import main
for config in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.redirect_stderr(io.StringIO()) as errors:
        code = main(["check", config])
    print(json.dumps([code, text.getvalue(), errors.getvalue()]))
"""


def test_every_ready_made_job_can_be_checked_without_a_network(tmp_path: Path) -> None:
    configs = sorted(CONFIGS.glob("*.yaml"))
    asked = subprocess.run(
        [sys.executable, "-c", CHECK_EACH, *configs],
        cwd=CONFIGS.parent.parent,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    checked = dict(zip(configs, map(json.loads, asked.stdout.splitlines()), strict=True))
    for config, (code, text, errors) in checked.items():
        if config.stem.endswith("lightning"):  # whose model has to be put together first
            assert code == 2
            assert "there is no such directory" in errors
            continue
        assert code == 0, (config.stem, errors)
        if config.stem in ("stable-diffusion-1.5", "stable-diffusion-2-base"):
            assert "plan     20 images in 2 shards and 6 batches of 4" in text
        if config.stem not in ("shapes-cpu", "simulated-node"):
            assert "not looked at" in text


@pytest.mark.thorough
@pytest.mark.torch
def test_the_published_example_runs_word_for_word(tmp_path: Path) -> None:
    put_into_hub_cache(tmp_path / "hub", "stabilityai/stable-diffusion-2-base", BUILTIN_MODELS / "shapes")
    (tmp_path / "config").mkdir()
    (tmp_path / "config/gaudi_config.json").write_text('{"use_torch_autocast": true}')
    put_into_hub_cache(tmp_path / "hub", "Habana/stable-diffusion-2", tmp_path / "config")
    script = TESTS / "emulated/published_example.py"
    result = command_line(
        *("emulate", "--modules", "1", "--state", tmp_path / "machine", "--", sys.executable, script),
        HF_HUB_OFFLINE="1",
        HF_HUB_CACHE=str(tmp_path / "hub"),
        PT_HPU_LAZY_MODE="1",
    )
    assert result.returncode == 0, result.stderr
    # Five full batches of 50 steps: one capture, and a replay for every other step.
    assert json.loads(result.stdout.splitlines()[-1]) == {"images": 20, "captures": 1, "replays": 5 * 50 - 1}
