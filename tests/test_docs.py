"""README and quickstart say what works: each of their commands is run as it is written, and the job's fields are those
that there are.

A command is what stands on a line of a block `sh`. It is run by a shell, in a directory that looks like a checkout, or
stands in `NOT_RUN` with the reason. Files are the blocks whose first line names them (`# job.yaml`). A bucket is a
directory of this machine here.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import REPOSITORY

from gaudi_batch import load_manifest
from gaudi_batch.cli.parser import parse
from tools import job_file, site

README, QUICKSTART = REPOSITORY / "README.md", REPOSITORY / "docs/quickstart.md"
BUCKET = "s3://bucket/"
"""Stands for a directory of this machine."""
NOT_RUN = {
    "python3 -m venv .venv": "the tests run in the environment that CI has made",
    ". .venv/bin/activate": "the same",
    "pip install -c constraints.txt .": "it would change that environment; CI has installed the same constraints in it",
    "pip install -c constraints-gaudi.txt '.[gaudi,s3]'": "the same",
    "gaudi-batch submit job.yaml --address http://127.0.0.1:8265 --job-id night-1": (
        "it needs a cluster's dashboard on this port; tests/cluster/test_submit.py submits"
    ),
    "gaudi-batch stop night-1 --address http://127.0.0.1:8265": "the same",
}
DEAR = (
    "find out/images -name '00000002-00.png' -delete",
    "gaudi-batch run job.yaml --repair",
)
"""Of the quickstart: loads the model a second time, and is left to `make thorough`."""
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """The commands of a page, without comments, in order."""
    blocks = [text for language, text in _FENCE.findall(page.read_text()) if language == "sh"]
    return [re.sub(r"\s+#.*", "", line) for block in blocks for line in block.splitlines() if line.strip()]


def files_of(page: Path) -> Iterator[tuple[str, str]]:
    """The files of a page and their text."""
    for _, text in _FENCE.findall(page.read_text()):
        if match := re.match(r"# ([\w.-]+\.\w+)\n", text):
            yield match[1], text


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A directory with what a checkout has in which `make setup` was run."""
    for path in REPOSITORY.iterdir():
        if path.name not in (".venv", "demo-output", "build", ".git", ".cache"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name != ".base":
            (tmp_path / ".venv" / path.name).symlink_to(path)
    (tmp_path / ".venv/.base").touch()  # so that `make demo` installs nothing
    return tmp_path


@pytest.fixture
def run_page(checkout: Path, cluster: str) -> Callable[..., None]:
    """Runs the commands of a page, one after the other, on the cluster of the session."""

    def run(page: Path, left_out: Collection[str] = ()) -> None:
        for name, text in files_of(page):
            (checkout / name).write_text(text.replace(BUCKET, f"{checkout}/bucket/"))
        search = f"{checkout}/.venv/bin{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"RAY_ADDRESS": cluster, "PATH": search}
        for command in commands(page):
            if command in NOT_RUN or command in left_out:
                continue
            ended = subprocess.run(
                ["bash", "-c", command.replace(BUCKET, f"{checkout}/bucket/")],
                cwd=checkout,
                env=environment,
                capture_output=True,
                text=True,
                timeout=400,
                check=False,
            )
            assert ended.returncode == 0, f"{command}\n{ended.stdout}{ended.stderr}"

    return run


@pytest.mark.torch
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("left_out", [DEAR, pytest.param((), marks=pytest.mark.thorough)], ids=["cheap", "every"])
def test_every_command_of_the_quickstart_works(
    run_page: Callable[..., None], checkout: Path, left_out: Collection[str]
) -> None:
    run_page(QUICKSTART, left_out)
    images = load_manifest(checkout / "out").to_table().sort_by("row").to_pylist()
    assert [image["id"] for image in images] == ["r1", "b2", "g3", "w4"]
    assert all((checkout / "out" / image["path"]).exists() for image in images)
    assert pq.read_table(checkout / "set/data").num_rows == 4


@pytest.mark.thorough
@pytest.mark.torch
@pytest.mark.timeout(1200)
def test_every_command_of_the_readme_works(run_page: Callable[..., None], checkout: Path) -> None:
    prompts = checkout / "bucket/prompts/p.parquet"
    prompts.parent.mkdir(parents=True)
    pq.write_table(pa.table({"caption": [f"a red circle on a white background, {row}" for row in range(12)]}), prompts)
    run_page(README)
    assert (checkout / "demo-output/contact_sheet.png").exists()
    assert load_manifest(checkout / "bucket/runs/first").count_rows() == 12
    assert re.search(r"^batch_size: \d+$", (checkout / "job.yaml").read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", [README, *sorted((REPOSITORY / "docs").glob("*.md"))], ids=lambda page: page.stem)
def test_every_documented_command_is_one_that_there_is(page: Path) -> None:
    text = page.read_text().replace("\\\n", " ")
    for block in [block for _, block in _FENCE.findall(text)]:
        for line in re.findall(r"^gaudi-batch (.*)", block, re.MULTILINE):
            parse(shlex.split(line, comments=True))


def test_no_reason_is_left_of_a_command_that_is_gone() -> None:
    assert {*NOT_RUN, *DEAR} <= {*commands(README), *commands(QUICKSTART)}


def test_the_fields_of_the_job_file_are_those_that_there_are() -> None:
    text = job_file.PAGE.read_text()
    assert job_file.page(text) == text, "a field has changed: run tools/job_file.py (make format does)"


def test_the_readme_can_be_read_in_some_minutes() -> None:
    assert len(README.read_text().split()) <= 1567


@pytest.mark.skipif(sys.version_info < (3, 11), reason="zensical needs Python 3.11")
@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[a](nothing.md)", "nothing.md leads nowhere"),
        ("[a](cluster.md#nothing)", "anchor does not exist"),
        ('<img src="https://example.com/a.png">', "fetches https://example.com/a.png"),
        ("[a](cluster.md#aws)", ""),
    ],
    ids=["page", "anchor", "fetch", "nothing"],
)
def test_the_site_is_refused_with_what_is_broken_in_it(
    text: str, wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(f"# A page\n\n{text}\n")
    (tmp_path / "docs/cluster.md").write_text("# Another\n\n## AWS\n")
    settings = (REPOSITORY / "mkdocs.yml").read_text().partition("nav:")[0]
    (tmp_path / "mkdocs.yml").write_text(settings)
    assert site.main(tmp_path) == bool(wrong)
    assert wrong in capsys.readouterr().out
