"""An export holds what the manifests name and nothing else, in any format and store, also after it was killed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from datahub import REPOSITORY, DataHub, datahub_served
from faultproxy import Fault, FaultProxy, fault_proxy
from helpers import StoreServer, called, read_manifest, wait_until
from outside import run_outside
from PIL import Image

from gaudi_batch import JobConfig, RunStopped, run
from gaudi_batch.export import push
from gaudi_batch.export.record import RECORD
from gaudi_batch.storage.store import Storage

pytestmark = pytest.mark.usefixtures("thread_cards")

FORMATS = ["files", "webdataset", "parquet"]
Make = Callable[..., Path]


@pytest.fixture
def make(prompts: Path, tmp_path: Path, cluster: str) -> Make:
    """Makes a run of 40 rows, of which row 5 fails; returns its output."""

    def call(output_format: str = "files", **fields: Any) -> Path:
        output = tmp_path / f"run-{output_format}"
        job = {
            "prompts": str(prompts),
            "output": str(output),
            "format": output_format,
            "device": "simulated",
            "simulated": {"batch_seconds": 0.0, "raise_rows": [5]},
            "shard_size": 16,
            "cards": 2,
            "width": 64,
            "height": 64,
            "limit": 40,
        }
        run(JobConfig(**(job | fields)), address=cluster)
        return output

    return call


def export(output: Path | str, target: Path | str, *flags: str) -> str:
    """Exports by the command; returns what it prints."""
    result = called("export", str(output), str(target), "--target-size", "15kB", *flags)
    assert result.returncode == 0, result.stderr
    return result.stdout


def refused(output: Path | str, target: Path | str, *flags: str) -> str:
    """The reason for which an export is refused."""
    result = called("export", str(output), str(target), *flags)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    return result.stderr


def files(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def images(place: Path) -> dict[str, bytes]:
    """All images of an export, by name; each is there once."""
    stored: list[tuple[str, bytes]] = []
    for path in sorted(place.rglob("*")):
        if path.suffix == ".png":
            stored.append((path.name, path.read_bytes()))
        elif path.suffix == ".tar":
            with tarfile.open(path) as tar:
                members = [(member.name, tar.extractfile(member)) for member in tar]
                stored += [(name, file.read()) for name, file in members if file and name.endswith(".png")]
        elif path.suffix == ".parquet" and path.name != "metadata.parquet":
            stored += [(image["path"], image["bytes"]) for image in pq.read_table(path)["image"].to_pylist()]
    assert len(dict(stored)) == len(stored)
    return dict(stored)


def named(output: Path) -> dict[str, str]:
    """The digest of each image that a run's manifest names."""
    rows = [row for row in read_manifest(output) if row["status"] == "ok"]
    return {f"{row['row']:08d}-{row['image_index']:02d}.png": row["sha256"] for row in rows}


def prompts_beside(place: Path) -> dict[str, str]:
    """The prompt that an export has beside each image, by the image's name."""
    beside: dict[str, str] = {}
    for path in place.glob("data/*.parquet"):
        beside |= {row["image"]["path"]: row["prompt"] for row in pq.read_table(path).to_pylist()}
    for path in place.glob("data/*.tar"):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                if name.endswith(".json") and (member := tar.extractfile(name)) is not None:
                    beside[name.replace(".json", ".png")] = json.loads(member.read())["prompt"]
    for path in place.glob("*/metadata.parquet"):
        rows = pq.read_table(path).to_pylist()
        beside |= {row["file_name"].rpartition("/")[2]: row["prompt"] for row in rows}
    return beside


@pytest.mark.parametrize("source", FORMATS)
def test_any_format_is_exported_to_any_other(make: Make, tmp_path: Path, source: str) -> None:
    """A run whose torn image was made again, and that has an image which nobody names."""
    output = make(source, num_images=2)
    stranger = output / ("images/000001-zzzzz9/00000001-00.png" if source == "files" else "data/000001-zzzzz9.tar")
    stranger.parent.mkdir(exist_ok=True)
    stranger.write_bytes(b"?")
    expected = named(output)
    assert len(expected) == 78
    for target in FORMATS:
        place = tmp_path / target
        assert "78 rows" in export(output, place, "--format", target, "--split", "test=20%")
        stored = images(place)
        assert {name: hashlib.sha256(data).hexdigest() for name, data in stored.items()} == expected
        assert prompts_beside(place) == {name: f"prompt number {int(name[:8])}" for name in expected}
        parts = list(place.glob("data/*")) or list(place.glob("*/0*"))
        assert {path.name.partition("-")[0] for path in place.glob("data/*")} <= {"train", "test"}
        assert len(parts) > 2 or target == "files"
        assert len(list(place.glob("*/metadata.parquet"))) == 2 * (target == "files")


def test_names_filters_and_splits_are_as_asked_for(make: Make, tmp_path: Path) -> None:
    output = make()
    place = tmp_path / "out"
    export(output, place, "--format", "files", "--name", "{topic}-{id}", "--filter", "topic!=t0", "--split", "topic")
    rows = [row for row in read_manifest(output) if row["status"] == "ok" and row["topic"] != "t0"]
    stored = {str(path.relative_to(place)) for path in place.glob("t*/**/*.png")}
    assert stored == {f"{row['topic']}/00000/{row['topic']}-{row['id']}.png" for row in rows}
    metadata = pq.read_table(place / "t1/metadata.parquet").to_pylist()
    assert [row["file_name"] for row in metadata] == sorted(
        (f"00000/t1-{row['id']}.png" for row in rows if row["topic"] == "t1"), key=lambda name: int(name[9:-4])
    )
    failed = tmp_path / "failed"
    export(output, failed, "--filter", "status=failed")
    assert [(row["row"], row["image"], row["status"]) for row in pq.read_table(failed / "data").to_pylist()] == [
        (5, None, "failed")
    ]


@pytest.fixture
def proxy(s3: StoreServer) -> Iterator[FaultProxy]:
    with fault_proxy(s3.port) as started:
        yield started


@pytest.mark.parametrize("target_format", ["parquet", pytest.param("files", marks=pytest.mark.thorough)])
def test_an_export_that_is_killed_goes_on_with_what_is_not_there(
    make: Make, tmp_path: Path, s3: StoreServer, proxy: FaultProxy, target_format: str
) -> None:
    output, undisturbed = make(), tmp_path / "undisturbed"
    flags = ("--format", target_format, "--target-size", "15kB")
    export(output, undisturbed, *flags)
    url = s3.url(f"{tmp_path.name}-target")
    arguments = ["export", str(output), url, *flags, "--target-options", json.dumps(s3.options_at(proxy.port))]
    path = rf"{tmp_path.name}-target/(data|train)/"
    proxy.add(Fault("stall", "PUT", path, when=lambda: sum(bool(re.search(path, each)) for each in puts(proxy)) > 3))
    killed = subprocess.Popen([sys.executable, "-m", "gaudi_batch", *arguments], stderr=subprocess.DEVNULL)
    store = Storage(url, s3.options)
    wait_until(lambda: sum(bool(re.search(path, each)) for each in puts(proxy)) > 4)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    proxy.clear()
    arrived = {name for name in store.filesystem.find(store.root) if re.search(path, name)}
    before = len(puts(proxy))
    result = called(*arguments)
    assert result.returncode == 0, result.stderr
    again = [each.partition("?")[0].removeprefix("PUT /") for each in puts(proxy)[before:]]
    assert arrived, "nothing was there when it was killed"
    assert not arrived & {each for each in again if not each.endswith("metadata.parquet")}
    stored = {
        name.removeprefix(f"{store.root}/"): store.filesystem.cat_file(name)
        for name in store.filesystem.find(store.root)
    }
    assert stored == files(undisturbed)


def puts(proxy: FaultProxy) -> list[str]:
    return [each for each in list(proxy.requests) if each.startswith("PUT ")]


def test_the_nodes_of_a_cluster_export(make: Make, tmp_path: Path, cluster: str) -> None:
    output = make("webdataset")
    export(output, tmp_path / "here")
    export(output, tmp_path / "there", "--address", cluster)
    assert files(tmp_path / "there") == files(tmp_path / "here")
    size = sum(path.stat().st_size for path in output.glob("data/*"))
    told = called("export", output, tmp_path / "some", "--target-size", str(size // 4), "--filter", "row<10")
    assert "9 rows in 1 part" in told.stdout, "an image is as large as it is among all of its object"
    torn = next(output.glob("data/*"))
    torn.write_bytes(torn.read_bytes()[:2000])
    result = called("export", output, tmp_path / "torn", "--address", cluster)
    assert (result.returncode, "--repair makes it again" in result.stderr) == (1, True), result.stderr


def test_what_is_not_what_the_manifest_says_is_not_exported(make: Make, tmp_path: Path) -> None:
    output = make()
    torn, gone = sorted(output.glob("images/*/*.png"))[:2]
    whole = torn.read_bytes()
    torn.write_bytes(b"?" * 20_000)
    result = called("export", output, tmp_path / "a", "--target-size", "15kB")
    assert (result.returncode, f"{torn.relative_to(output)} is not what its manifest says" in result.stderr) == (
        1,
        True,
    )
    torn.write_bytes(whole)
    assert "39 rows in" in export(output, tmp_path / "a"), "the same command goes on, though the image has another size"
    export(output, tmp_path / "undisturbed")
    assert images(tmp_path / "a") == images(tmp_path / "undisturbed")
    gone.unlink()
    result = called("export", output, tmp_path / "b")
    assert (
        f"1 object of images that the manifest names is not there, the first {gone.relative_to(output)}"
        in result.stderr
    )


def test_a_run_that_is_not_complete_is_exported_as_far_as_it_is(make: Make, tmp_path: Path) -> None:
    with pytest.raises(RunStopped):
        make(max_failed=0, cards=1)
    output = tmp_path / "run-files"
    assert "without --complete what is committed is exported" in refused(output, tmp_path / "x", "--complete")
    result = called("export", output, tmp_path / "out")
    assert (result.returncode, "the run is not complete; what is committed is exported" in result.stderr) == (0, True)
    assert 0 < len(images(tmp_path / "out")) < 39
    assert "in a run that was not complete" in (tmp_path / "out/README.md").read_text()


def test_an_export_is_refused_where_it_would_mix_with_something_else(make: Make, tmp_path: Path) -> None:
    output = make()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/x").touch()
    assert "holds something else, 'x'" in refused(output, tmp_path / "other")
    export(output, tmp_path / "out")
    assert "holds another export" in refused(output, tmp_path / "out", "--filter", "row<9")
    (tmp_path / "out/data/train-00009-of-00010.parquet").touch()
    assert "holds something else beside this export, 'data/train-00009-of-00010.parquet'" in refused(
        output, tmp_path / "out", "--target-size", "15kB"
    )
    assert "has no column 'nope'" in refused(output, tmp_path / "y", "--name", "{nope}")
    assert "none of 40 committed rows passes the filters" in refused(output, tmp_path / "y", "--filter", "row<0")
    assert "failed rows have no image" in refused(
        output, tmp_path / "y", "--filter", "row>=0", "--filter", "status=failed", "--format", "files"
    )
    assert "there is no run here" in refused(tmp_path / "nowhere", tmp_path / "y")
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("target_format", ["webdataset", "parquet", pytest.param("files", marks=pytest.mark.thorough)])
def test_the_card_says_how_to_load_the_set_and_that_works(
    prompts: Path, make: Make, tmp_path: Path, target_format: str
) -> None:
    output = make()
    place = tmp_path / "out"
    export(output, place, "--format", target_format, "--split", "test=20%")
    card = (place / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert [each["split"] for each in front["configs"][0]["data_files"]] == ["train", "test"]
    assert (front["task_categories"], front["size_categories"]) == (["text-to-image"], ["n<1K"])
    assert "1 row of the run failed" in card
    assert str(tmp_path) not in card
    with Image.open(place / "assets/grid.jpg") as grid:
        assert grid.size == (4 * 64 + 3 * 4, 4 * 64 + 3 * 4)
    code = "\n".join(re.findall(r"```python\n(.*?)```", card, re.DOTALL))
    check = 'print({name: len(split) for name, split in dataset.items()}, dataset["test"][0].keys())'
    printed = run_outside("-c", f"{code}\n{check}", home=tmp_path / "home", cwd=place)
    counts = {split: int(count) for split, count in re.findall(r"\| (train|test) \| (\d+) \|", card)}
    assert sum(counts.values()) == 39
    assert f"{counts}" in printed


def test_the_card_says_the_licence_and_no_markup_of_prompts(
    write_prompts: Callable[..., Path], tmp_path: Path, cluster: str
) -> None:
    hostile = ["<script>alert(1)</script>", "---\nlicense: mit\n---", "[x](http://x) ![y](z)", "# `head`\n\n| a |"]
    output = tmp_path / "run"
    job = {"prompts": str(write_prompts({"prompt": hostile})), "output": str(output), "model": "builtin:shapes"}
    run(JobConfig(**job, device="cpu", steps=1, cards=1, batch_size=4), address=cluster)
    export(output, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "- Licence of the model: `apache-2.0`" in card
    assert "- Model: `builtin:shapes`" in card
    assert card.count("\n---\n") == 1
    markup = re.sub(r"`[^`\n]*`", "", card.partition("## How to load")[0])
    assert not re.search(r"<script|\]\(http|\n\|", markup)
    assert len(yaml.safe_load(card.split("---")[1])["configs"]) == 1


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[DataHub]:
    with datahub_served() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.setenv("HF_TOKEN", "hf_token_of_tests")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        yield served


def push_command(output: Path | str, target: Path | str, *flags: str) -> list[str]:
    """Exports and pushes, in a process of its own: huggingface_hub reads its address once."""
    command = [sys.executable, "-m", "gaudi_batch", "export", str(output), str(target)]
    return [*command, "--target-size", "15kB", "--push", REPOSITORY, *flags]


def pushed(output: Path | str, target: Path | str, *flags: str) -> subprocess.CompletedProcess[str]:
    """The same, to its end."""
    command = push_command(output, target, *flags)
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def test_a_push_that_is_killed_goes_on_and_nothing_is_there_twice(make: Make, tmp_path: Path, hub: DataHub) -> None:
    """The process is killed while the third large file is on its way."""
    output, place = make(), tmp_path / "out"
    export(output, place, "--split", "test=20%")
    held = threading.Event()
    release = threading.Event()

    def keep_from(oid: str) -> None:
        if len(hub.puts) >= 2 and not release.is_set():
            held.set()
            release.wait(60)
            raise ConnectionError

    hub.before_put = keep_from
    arguments = [
        "export",
        str(output),
        str(place),
        "--target-size",
        "15kB",
        "--split",
        "test=20%",
        "--push",
        REPOSITORY,
    ]
    killed = subprocess.Popen([sys.executable, "-m", "gaudi_batch", *arguments], stderr=subprocess.DEVNULL)
    assert held.wait(60)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    release.set()
    arrived = dict(hub.puts)
    assert 2 <= len(arrived) < len(list(place.glob("data/*")))
    result = pushed(output, place, "--split", "test=20%")
    assert result.returncode == 0, result.stderr
    assert f"pushed:   {hub.url}/datasets/{REPOSITORY}" in result.stdout
    expected = files(place)
    assert hub.files == expected, "what is there, and nothing else"
    assert set(hub.puts.values()) == {1}, "a file was sent twice"
    committed = [path for paths in hub.commits for path in paths]
    assert sorted(committed) == sorted(expected), "a file was committed twice"

    assert pushed(output, place, "--split", "test=20%").returncode == 0
    assert (set(hub.puts.values()), len([path for paths in hub.commits for path in paths])) == ({1}, len(committed))
    code = f"import datasets; print(datasets.load_dataset('{REPOSITORY}').num_rows)"
    printed = run_outside("-c", code, home=tmp_path / "home", HF_ENDPOINT=hub.url)
    assert sum(json.loads(printed.strip().splitlines()[-1].replace("'", '"')).values()) == 39


@pytest.mark.thorough
def test_a_second_repository_gets_all_and_no_file_that_is_not_of_the_export(
    make: Make, tmp_path: Path, hub: DataHub
) -> None:
    """The hub is away when huggingface_hub asks for the repository, which was claimed a moment before."""
    output, place = make(), tmp_path / "out"
    asked = iter([None, 502])
    hub.statuses = lambda path: next(asked, None) if path == "/api/repos/create" else None
    first_push = pushed(output, place)
    assert (first_push.returncode, next(asked, None)) == (0, None), first_push.stderr
    assert "the hub can't be reached, trying again: 502" in first_push.stderr
    first = dict(hub.files)
    hub.files.clear()
    hub.objects.clear()
    (place / ".env").write_text("SECRET=x")
    (place / "assets/.grid.jpg.part-12345678").write_text("x")
    result = pushed(output, place)
    assert result.returncode == 0, result.stderr
    assert hub.files == first


def test_an_export_in_a_store_is_pushed_by_way_of_this_disk(
    make: Make, tmp_path: Path, s3: StoreServer, hub: DataHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "staging"))
    (tmp_path / "staging").mkdir()
    url = s3.url(f"{tmp_path.name}-push")
    result = pushed(make(), url, "--target-options", json.dumps(s3.options), "--private")
    assert result.returncode == 0, result.stderr
    store = Storage(url, s3.options)
    assert {name: store.get(name) for name in hub.files} == hub.files
    assert len(hub.files) == len(store.filesystem.find(store.root))
    assert not list((tmp_path / "staging").glob("*push*"))


def test_a_hub_that_refuses_ends_a_push(make: Make, tmp_path: Path, hub: DataHub) -> None:
    """huggingface_hub itself tries for ever."""
    output = make()
    hub.exists, hub.refuses = True, True
    result = pushed(output, tmp_path / "out")
    assert (result.returncode, "the hub refuses" in result.stderr) == (2, True), result.stderr
    hub.refuses = False
    hub.files["data/train-00000-of-00001.parquet"] = b"somebody else's"
    result = pushed(output, tmp_path / "out")
    assert (result.returncode, "the repository has other files, as 'data/train-0" in result.stderr) == (2, True)
    hub.files[RECORD] = b'{"digest": "of another"}'
    result = pushed(output, tmp_path / "out")
    assert (result.returncode, "the repository has another export" in result.stderr) == (2, True)
    assert hub.files["data/train-00000-of-00001.parquet"] == b"somebody else's"
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    hub.files[RECORD] = json.dumps(record | {"cuts": {"train": [1]}}).encode()
    assert "the repository has this export, packed in another way" in pushed(output, tmp_path / "out").stderr
    hub.files[RECORD] = b"no record"
    assert "the repository has another export" in pushed(output, tmp_path / "out").stderr
    assert "is public" in pushed(output, tmp_path / "out", "--private").stderr
    assert "must be owner/name" in refused(output, tmp_path / "x", "--push", "name")


def test_more_files_than_the_hub_takes_are_refused(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push, "HUB_FILES", 40)
    told = refused(make(), tmp_path / "out", "--format", "files", "--push", REPOSITORY)
    assert "--format parquet or webdataset packs them" in told
    assert not (tmp_path / "out").exists()


def test_prompts_come_from_a_dataset_of_the_hub(prompts: Path, tmp_path: Path, cluster: str, hub: DataHub) -> None:
    hub.exists = True
    for path in prompts.iterdir():
        hub.files[f"data/{path.name}"] = path.read_bytes()
    job = JobConfig(
        prompts=f"hf://datasets/{REPOSITORY}/data/*.parquet",
        prompts_storage_options={"endpoint": hub.url},
        output=str(tmp_path / "out"),
        device="simulated",
        simulated={"batch_seconds": 0.0},
        cards=2,
    )
    run(job, address=cluster)
    assert [row["prompt"] for row in read_manifest(tmp_path / "out")] == [f"prompt number {row}" for row in range(100)]
