"""What keeps a node from running a job is named, with what to do, before the job is tried."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import StoreServer, command_line, free_port
from raynodes import RayCluster

from gaudi_batch import JobConfig
from gaudi_batch.doctor import cluster as of_cluster
from gaudi_batch.doctor import hl_smi, node, stack
from gaudi_batch.doctor.line import Line, bad, note, ok
from gaudi_batch.doctor.node import WITHOUT_CARDS, Question, examine
from gaudi_batch.doctor.report import could_run, table
from gaudi_batch.errors import StorageError

HOLD = "from habana_frameworks._emulation.modules import acquire; print(acquire(), flush=True); input()"


class Node:
    """An emulated machine, and what the doctor says of it."""

    def __init__(self, state: Path, *machine: str) -> None:
        self.machine = ("emulate", "--state", str(state), "--modules", "2", *machine, "--", sys.executable)

    def ask(self, *arguments: str | Path, **environment: str) -> tuple[int, dict[str, Any]]:
        """The exit code, and the lines by what they are about."""
        told = command_line(*self.machine, "-m", "gaudi_batch", "doctor", "--json", *arguments, **environment)
        assert told.stdout, told.stderr
        ((_, lines),) = json.loads(told.stdout)["nodes"].items()
        return told.returncode, {line["what"]: line for line in lines}


def verdicts(lines: dict[str, Any]) -> dict[str, str]:
    return {what: line["verdict"] for what, line in lines.items()}


@pytest.mark.torch
def test_a_node_that_fits_together_could_run_a_job(tmp_path: Path) -> None:
    code, lines = Node(tmp_path).ask()
    assert code == 0
    assert lines["cards"]["value"] == "hl-smi 2, torch 2"
    assert lines["driver"]["value"] == "1.24.0-emulated"
    assert lines["firmware"]["value"] == "1.24.0"
    of_machine = {"hugepages", "disk for models", "shared memory"}  # as the machine of the test has them
    assert {line["verdict"] for what, line in lines.items() if what not in of_machine} == {"ok"}


@pytest.mark.torch
def test_a_driver_of_another_release_is_named(tmp_path: Path) -> None:
    code, lines = Node(tmp_path, "--driver", "1.23.0").ask("--gaudi.mode", "eager")
    assert code == 1
    assert lines["driver"]["verdict"] == "bad"
    assert lines["driver"]["value"] == "1.23.0-emulated; habana_frameworks is of 1.24"
    assert "install the driver of the container's" in lines["driver"]["advice"]
    assert "optimum-habana" not in lines, "which this mode does not need"


@pytest.mark.torch
@pytest.mark.thorough
def test_a_share_of_a_node_is_told_and_modules_that_are_not_there_are_a_fault(tmp_path: Path) -> None:
    node_of_two = Node(tmp_path)
    code, lines = node_of_two.ask(HABANA_VISIBLE_MODULES="1")
    assert (code, lines["cards"]["verdict"], lines["cards"]["value"]) == (0, "note", "hl-smi 2, torch 1")
    code, lines = node_of_two.ask(HABANA_VISIBLE_MODULES="7")
    assert (code, lines["cards"]["verdict"]) == (1, "bad")


@pytest.mark.torch
def test_who_holds_a_module_is_named(tmp_path: Path) -> None:
    node_of_two = Node(tmp_path)

    def occupied(module: str) -> subprocess.Popen[str]:
        holder = subprocess.Popen(
            [sys.executable, "-m", "gaudi_batch", *node_of_two.machine, "-c", HOLD],
            env=os.environ | {"HABANA_VISIBLE_MODULES": module},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == module
        return holder

    first = occupied("0")
    try:
        code, lines = node_of_two.ask()
        assert (code, lines["modules held"]["verdict"]) == (0, "note")
        assert f"0 by process {first.pid} (" in lines["modules held"]["value"]
        second = occupied("1")
        try:
            code, lines = node_of_two.ask()
            assert (code, lines["modules held"]["verdict"]) == (1, "bad")
        finally:
            second.communicate("\n", timeout=60)
    finally:
        first.communicate("\n", timeout=60)


def by_name(question: Question) -> dict[str, Line]:
    return {line.what: line for line in examine(question).lines}


def test_a_node_without_intels_stack_is_told_what_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    lines = by_name(Question("hpu", "lazy", None))
    assert lines["driver"] == bad(
        "driver", "hl-smi is not on the PATH", "install Intel's driver; in a container, start it with --runtime=habana"
    )
    assert lines["habana_frameworks"].verdict == lines["cards"].verdict == "bad"
    assert "cards" not in by_name(Question("cpu", "lazy", None))


def test_a_node_without_anything_of_gaudi_is_told_that_no_card_was_looked_for(tmp_path: Path) -> None:
    told = command_line("doctor", PATH=str(tmp_path))
    assert told.returncode == 0, told.stderr
    assert "not looked for: there is neither hl-smi nor habana_frameworks" in told.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "a/b", "--output", "o"), "--model, --output: is of a job; name its file"),
        (("--gaudi.mode", "quick"), "--gaudi.mode 'quick': must be one of lazy, compile, eager"),
        (("--device", "gpu"), "--device 'gpu': must be one of auto, hpu, cpu, simulated"),
        (("--address", ""), "--address: is empty"),
        (("--address", f"127.0.0.1:{free_port()}"), "no Ray cluster answers at"),
    ],
)
def test_what_it_can_not_be_asked_is_refused(arguments: tuple[str, ...], message: str) -> None:
    told = command_line("doctor", *arguments)
    assert told.returncode == 2
    assert message in told.stderr


def test_a_job_whose_parts_do_not_fit_could_not_run(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "lora": ["style"]}), tmp_path / "prompts.parquet")
    job = JobConfig(
        prompts=str(tmp_path / "prompts.parquet"), output=str(tmp_path / "out"), model="builtin:shapes", device="cpu"
    )
    line = by_name(Question("cpu", "lazy", job))["job"]
    assert line.verdict == "bad"
    assert "make a job of each style" in line.value
    assert not (tmp_path / "out").exists(), "what the doctor made is gone"
    assert by_name(Question("cpu", "lazy", job.model_copy(update={"carry": []})))["job"].verdict == "ok"


def test_quantization_needs_its_package_and_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fields = {"prompts": "p", "output": str(tmp_path), "model": "builtin:shapes", "device": "hpu"}
    job = JobConfig(**fields, gaudi={"quantize": {"config": str(tmp_path / "scales.json"), "mode": "quantize"}})

    def verdict() -> tuple[str, str]:
        (line,) = node._quantization(job)
        return line.verdict, line.value

    assert verdict()[0] == "bad"
    assert "needs Intel Neural Compressor" in verdict()[1]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert "is no configuration of Neural Compressor that this node can read" in verdict()[1]
    (tmp_path / "scales.json").write_text('{"mode": "MEASURE"}')
    assert "mode is 'quantize', and that of " in verdict()[1]
    (tmp_path / "scales.json").write_text('{"mode": "QUANTIZE"}')
    assert verdict()[0] == "ok"


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("echo 'no devices' >&2; exit 3", "hl-smi -Q index,module_id,driver_version -f csv,noheader,nounits fails"),
        ("echo nonsense", "hl-smi says something else than numbers of modules: 'nonsense'"),
        ("true", "no card"),
    ],
)
def test_an_hl_smi_that_fails_is_told(
    answer: str, wanted: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "hl-smi"
    script.write_text(f"#!/bin/sh\n{answer}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    line = by_name(Question("hpu", "lazy", None))["driver"]
    assert line.verdict == "bad"
    assert wanted in line.value


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a file system")
def test_a_full_disk_and_little_shared_memory_are_named(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(small))
    line = by_name(Question("cpu", "lazy", None))["disk for models"]
    assert line == bad("disk for models", f"0.1 GiB free at {small}", "make room, or put it elsewhere by HF_HOME")
    assert node._shared_memory(small) == note(
        "shared memory", "0.06 GiB", "start the container with --ipc=host, or --shm-size=8g"
    )


def job(prompts: Path | str, output: Path | str, **fields: Any) -> JobConfig:
    return JobConfig(
        **{"prompts": str(prompts), "output": str(output), "model": "builtin:shapes", "device": "cpu"} | fields
    )


def test_storage_is_tried_and_nothing_of_that_stays(
    write_prompts: Callable[..., Path], tmp_path: Path, moto: StoreServer
) -> None:
    prompts = write_prompts({"prompt": ["a", "b"]})
    (tmp_path / "out").mkdir()
    lines = by_name(Question("cpu", "lazy", job(prompts, tmp_path / "out")))
    assert (lines["output"].verdict, lines["prompts"].value) == ("ok", "2 rows in 1 file")
    assert list((tmp_path / "out").iterdir()) == []
    options = {"storage_options": moto.options}
    assert by_name(Question("cpu", "lazy", job(prompts, moto.url("doctor"), **options)))["output"].verdict == "ok"
    absent = job(tmp_path / "absent", "s3://no-such-bucket/out", **options)
    lines = by_name(Question("cpu", "lazy", absent))
    assert (lines["output"].verdict, lines["prompts"].verdict) == ("bad", "bad")
    assert "no-such-bucket" in lines["output"].value


def test_a_model_that_is_nowhere_and_a_hub_that_does_not_answer_are_named(
    write_prompts: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write_prompts({"prompt": ["a"]})

    def model(name: str) -> dict[str, Line]:
        return by_name(Question("cpu", "lazy", job(prompts, tmp_path / "out", model=name)))

    assert model("builtin:shapes")["model"].verdict == "ok"
    assert model(str(tmp_path / "absent"))["model"].verdict == "bad"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    lines = model("owner/name")
    assert (lines["hub"].verdict, lines["model"].verdict) == ("bad", "note")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert model("owner/name")["model"].verdict == "bad"


def test_the_table_says_below_each_fault_what_to_do_and_where() -> None:
    nodes = {
        "one": [ok("clock", "+0.0 s"), bad("driver", "1.23", "install 1.24")],
        "two": [ok("clock", "+0.0 s")],
        "three": [ok("clock", "+0.0 s")],
    }
    assert not could_run(nodes)
    assert [line.strip() for line in table(nodes).splitlines()] == [
        "one, two, three:",
        "ok    clock   +0.0 s",
        "BAD   driver  1.23",
        "-> install 1.24",
        "on one",
        "",
        "a job could not run: 1 fault",
    ]


def test_fifty_nodes_are_one_table_and_what_is_wrong_is_told_with_the_nodes_that_have_it() -> None:
    nodes = {
        f"n{number}": [
            ok("packages", "Python 3.10.12, Ray 2.60.0"),
            ok("disk", f"{100 + number / 10:.1f} GiB free at /tmp"),
            ok("output", f"s3://b/o, written, read and removed in 0.{number:02d} s"),
            note("hugepages", "none", "reserve them") if number % 10 == 3 else ok("hugepages", "47500 of 2048 kB"),
        ]
        for number in range(50)
    }
    nodes["n7"][1] = bad("disk", "0.2 GiB free at /tmp", "make room")
    nodes["n9"][1] = bad("disk", "0.4 GiB free at /tmp", "make room")
    assert [" ".join(line.split()) for line in table(nodes).splitlines()] == [
        "50 nodes:",
        "ok packages Python 3.10.12, Ray 2.60.0",
        "ok disk 100.0 to 104.9 GiB free at /tmp",
        "on all but n7, n9",
        "BAD disk 0.2 GiB free at /tmp",
        "-> make room",
        "on n7",
        "BAD disk 0.4 GiB free at /tmp",
        "-> make room",
        "on n9",
        "ok output s3://b/o, written, read and removed in 0.00 to 0.49 s",
        "ok hugepages 47500 of 2048 kB",
        "on 45 nodes",
        "note hugepages none",
        "-> reserve them",
        "on n3, n13, n23, n33, n43",
        "",
        "a job could not run: 2 faults",
    ]


def test_what_differs_between_nodes_is_marked() -> None:
    lines = {name: [ok("driver", "1.24.0")] for name in ("a", "b")} | {"c": [ok("driver", "1.23.0")]}
    of_cluster._compare(lines)
    assert [own[0].verdict for own in lines.values()] == ["ok", "ok", "note"]
    assert "most nodes have 1.24.0" in lines["c"][0].advice
    two = {"a": [ok("driver", "1.24.0")], "b": [ok("driver", "1.23.0")]}
    of_cluster._compare(two)
    assert [own[0].verdict for own in two.values()] == ["note", "note"]
    assert "nodes have 1.23.0 or 1.24.0" in two["a"][0].advice


def test_a_clock_that_is_off_is_a_fault() -> None:
    """Beside the others where there are enough of them, else beside this machine."""
    clocks = {"a": 0.1, "b": -40.0, "c": 0.3}
    assert [of_cluster._clock_line(name, clocks).verdict for name in clocks] == ["ok", "bad", "ok"]
    assert of_cluster._clock_line("b", {"a": 0.1, "b": 6.0}).verdict == "bad"
    assert of_cluster._clock_line("b", clocks).value.startswith("-40.1 s")


def test_cards_that_ray_does_not_see_are_a_fault() -> None:
    line = of_cluster._with_ray(ok("cards", "hl-smi 8, torch 8"), 0)
    assert (line.verdict, line.value) == ("bad", "hl-smi 8, torch 8, Ray 0")
    assert of_cluster._with_ray(ok("cards", "hl-smi 8, torch 8"), 8).verdict == "ok"


def clustered(monkeypatch: pytest.MonkeyPatch, modules: dict[str, int]) -> dict[str, Any]:
    """Nodes of a cluster without Ray, each with what hl-smi sees there."""
    monkeypatch.setattr("ray.get", lambda answer, timeout: answer)
    monkeypatch.setattr(of_cluster, "_on", lambda node, _: SimpleNamespace(remote=lambda: modules[node["name"]]))
    return {name: {"name": name} for name in modules}


def test_a_node_with_cards_that_its_ray_does_not_see_is_no_head(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = clustered(monkeypatch, {"head": 0, "good": 2, "started too early": 2})
    cards = {"head": 0, "good": 2, "started too early": 0}
    makes_images, question = of_cluster._who_makes_images(nodes, cards, Question("auto", "lazy", None))
    assert question.device == "hpu"
    assert makes_images == {"head": False, "good": True, "started too early": True}
    only_cpus = {"head": 0, "worker": 0}
    makes_images, question = of_cluster._who_makes_images(
        clustered(monkeypatch, only_cpus), only_cpus, Question("auto", "lazy", None)
    )
    assert (question.device, makes_images) == ("cpu", {"head": True, "worker": True})


def test_a_head_without_nodes_is_no_fault_where_the_job_asks_for_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nodes = clustered(monkeypatch, {"head": 0})
    job = JobConfig(prompts="p", output=str(tmp_path), model="builtin:shapes", device="hpu")
    for fields, makes in (({}, True), ({"max_cards": 16}, False)):
        asked = Question("hpu", "lazy", job.model_copy(update=fields))
        assert of_cluster._who_makes_images(nodes, {"head": 0}, asked)[0] == {"head": makes}


def test_a_head_is_asked_for_what_a_driver_needs(tmp_path: Path, prompts: Path) -> None:
    output = tmp_path / "out"
    output.write_text("a file")
    job = JobConfig(prompts=str(prompts), output=str(output), model="builtin:shapes", device="hpu")
    lines = by_name(Question(WITHOUT_CARDS, "lazy", job, whole=False))
    assert (lines["output"].verdict, lines["prompts"].verdict, lines["model"].verdict) == ("bad", "ok", "ok")
    assert not {"disk for models", "driver", "job"} & lines.keys()


def test_a_part_that_hangs_or_may_not_be_read_costs_its_own_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prompts: Path
) -> None:
    def refused(job: JobConfig) -> list[Line]:
        raise PermissionError(13, "Permission denied", "/models")

    over = threading.Event()
    monkeypatch.setattr(node, "PART_TIMEOUT_S", 3.0)
    monkeypatch.setattr(node, "_prompts", lambda job: [over.wait(60)])
    monkeypatch.setattr(node, "_model", refused)
    job = JobConfig(prompts=str(prompts), output=str(tmp_path / "o"), model="builtin:shapes", device="cpu")
    lines = by_name(Question("cpu", "lazy", job))
    over.set()
    assert lines["output"].verdict == "ok"
    assert lines["prompts"].value == "not known: no answer for 3 s"
    assert lines["model"].value.endswith("'/models'")
    assert "job" not in lines


def test_a_probe_that_is_not_given_back_does_not_stay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prompts: Path
) -> None:
    def refused(*_: Any) -> bool:
        raise StorageError("reading is denied")

    monkeypatch.setattr(node, "sees_mark", refused)
    job = JobConfig(prompts=str(prompts), output=str(tmp_path / "o"), model="builtin:shapes", device="cpu")
    (tmp_path / "o").mkdir()
    assert by_name(Question("cpu", "lazy", job))["output"].value == "reading is denied"
    assert not list((tmp_path / "o").iterdir())


def test_modules_at_work_for_the_cluster_are_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    present = [hl_smi.Module(number, number, "1.24.0") for number in range(2)]
    monkeypatch.setattr(stack, "_count_by_torch", lambda mode: (2, True, ""))
    for holder, verdict in (("process 7 (ray::Card.poll)", "note"), ("process 7 (python train.py)", "bad")):
        monkeypatch.setattr(hl_smi, "holders", lambda _, holder=holder: dict.fromkeys(range(2), holder))
        assert {line.what: line.verdict for line in stack._card_lines(present, "lazy")}["modules held"] == verdict


def test_a_package_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "_version", lambda package: "0.30.0" if package == "diffusers" else "9999.0")
    (line,) = stack.python_lines()
    assert line.verdict == "bad"
    assert re.search(r"gaudi-batch needs diffusers>=[\d.]+:", line.advice)


@pytest.mark.ray
def test_all_nodes_of_a_cluster_are_asked(cluster: str) -> None:
    told = command_line("doctor", "--json", "--device", "cpu", "--address", cluster)
    assert told.stdout, told.stderr
    nodes = json.loads(told.stdout)["nodes"]
    assert len(nodes) == 1
    for lines in nodes.values():
        assert {"packages", "disk of Ray", "clock"} <= {line["what"] for line in lines}
    assert told.returncode == 0


@pytest.mark.ray
@pytest.mark.thorough
def test_a_node_whose_clock_is_off_and_one_with_an_output_of_its_own_are_named(
    nodes: RayCluster, prompts: Path, tmp_path: Path
) -> None:
    """The whole Ray of a node, by Debian's libfaketime, and a file system of its own over the same path."""
    if shutil.which("faketime") is None:
        pytest.skip("faketime is not installed; .ci/run installs it")
    output = tmp_path / "out"
    output.mkdir()
    nodes.add("--num-cpus=1", wrapper=("faketime", "-f", "+600"))
    own_disk = f'mount -t tmpfs none {output} && exec "$@"'
    apart = ("unshare", "--mount", *(["--map-root-user"] if os.getuid() else []))
    nodes.add("--num-cpus=1", wrapper=(*apart, "sh", "-c", own_disk, "sh"))
    nodes.wait_for(3)
    job = ("--prompts", os.path.relpath(prompts), "--output", output, "--model", "builtin:shapes", "--device", "cpu")
    told = command_line("doctor", "--json", *job, "--address", nodes.address)
    assert told.returncode == 1, told.stderr
    lines = {
        what: [line for own in json.loads(told.stdout)["nodes"].values() for line in own if line["what"] == what]
        for what in ("clock", "output")
    }
    assert sorted(line["verdict"] for line in lines["clock"]) == ["bad", "ok", "ok"]
    (bad_clock,) = [line for line in lines["clock"] if line["verdict"] == "bad"]
    off = re.match(r"(\+[\d.]+) s beside the others", bad_clock["value"])
    assert off is not None
    assert abs(float(off[1]) - 600) < 30
    assert "bad" in {line["verdict"] for line in lines["output"]}, lines["output"]
    assert f"{output} here is not what " in " ".join(line["value"] for line in lines["output"])
    assert not list(output.iterdir())
