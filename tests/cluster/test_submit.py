"""Jobs sent through the Ray Jobs API to a head without cards and a node that has modules 4 to 7."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import REPOSITORY, command_line, read_manifest, wait_for_commits, wait_until
from raynodes import RAY, RayCluster, add_cards

from gaudi_batch.cluster import jobs_client
from gaudi_batch.errors import RunStopped
from gaudi_batch.text import duration

SECRET = "a-secret-of-whoever-submits"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """The cluster, with token authentication as Ray has it by default. Its `bin` has the `python3` of jobs."""
    home = tmp_path_factory.mktemp("cluster")
    (home / "bin").mkdir()
    put_python(home / "bin", sys.executable)
    cluster = RayCluster(
        home, dashboard=True, head_environment={"PATH": f"{home}/bin:{Path(RAY).parent}:{os.environ['PATH']}"}
    )
    try:
        cluster.start()
        add_cards(cluster, 4, HABANA_VISIBLE_MODULES="4,5,6,7")
        cluster.wait_for(2)
        yield cluster
    finally:
        cluster.stop()


def put_python(directory: Path, python: str) -> None:
    """Puts a `python3` into a directory that is this Python."""
    # No link: a Python of a virtual environment looks for it beside the name that it is called by.
    (directory / "new").write_text(f'#!/bin/sh\nexec {python} "$@"\n')
    (directory / "new").chmod(0o755)
    (directory / "new").replace(directory / "python3")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.parquet"
    pq.write_table(pa.table({"prompt": [None if row == 13 else f"prompt {row}" for row in range(64)]}), path)
    return path


def job(dataset: Path, output: Path, **fields: str) -> list[str]:
    """The flags of a job."""
    flags = {"device": "simulated", "shard-size": "8", "simulated.batch-seconds": "0.2"} | fields
    return [f"--prompts={dataset}", f"--output={output}", *(f"--{name}={value}" for name, value in flags.items())]


def test_a_job_is_followed_to_its_end_and_its_exit_code_comes_back(
    nodes: RayCluster, dataset: Path, tmp_path: Path
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(f"prompts: {dataset}\noutput: {tmp_path / 'out'}\ndevice: simulated\nshard_size: 8\n")
    flags = ("--address", nodes.jobs_address, "--simulated.batch-seconds", "0.2", "--ship-code")
    result = command_line("submit", file, *flags, AWS_SECRET_ACCESS_KEY=SECRET)
    assert result.returncode == 3, result.stdout + result.stderr
    assert re.match(r"job: \S+\n", result.stdout)
    assert "complete with failed rows: 63 images, 1 failed row, " in result.stdout
    assert SECRET not in result.stdout + result.stderr
    rows = read_manifest(tmp_path / "out")
    assert [row["row"] for row in rows if row["status"] == "failed"] == [13]
    assert {row["card"].rpartition("-")[2] for row in rows} <= {"4", "5", "6", "7"}
    known = subprocess.run(
        [RAY, "job", "list", "--address", nodes.jobs_address], capture_output=True, text=True, check=True
    )
    assert "python3 start.py run job.yaml" in known.stdout
    assert SECRET not in known.stdout


def test_a_job_is_stopped_gently_and_resumed_by_submitting_it_again(
    nodes: RayCluster, dataset: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"

    def submit(seconds: str) -> tuple[str, ...]:
        flags = {"shard-size": "1", "batch-size": "1", "cards": "2", "simulated.batch-seconds": seconds}
        return ("submit", "--address", nodes.jobs_address, *job(dataset, output, **flags))

    at_leisure = (*submit("5"), "--no-wait", "--job-id", f"night-{os.getpid()}")  # 64 shards: 160 s of two cards
    begun = command_line(*at_leisure)
    assert (begun.returncode, begun.stdout) == (0, f"job: night-{os.getpid()}\n"), begun.stderr
    again = command_line(*at_leisure)
    assert again.returncode == 2
    assert f"has a job 'night-{os.getpid()}' already" in again.stderr
    wait_for_commits(output, 1)
    stopped = command_line("stop", f"night-{os.getpid()}", "--address", nodes.jobs_address)
    assert stopped.stdout == f"job night-{os.getpid()}: STOPPED\n", stopped.stderr
    assert json.loads((output / "lease.json").read_text())["released"]
    assert 0 < len(list(output.glob("manifest/*"))) < 64
    assert not (output / "manifest.parquet").exists()
    resumed = command_line(*submit("0.01"))
    assert resumed.returncode == 3, resumed.stdout
    assert "of 64 shards are committed already" in resumed.stdout
    assert len(read_manifest(output)) == 64


@pytest.mark.thorough
def test_a_python_without_the_package_is_named_with_the_ways_out(
    nodes: RayCluster, dataset: Path, tmp_path: Path
) -> None:
    """Once without it, and once with the package sent along and without what it depends on."""
    submit = ("submit", "--address", nodes.jobs_address, *job(dataset, tmp_path / "out"))
    bare = str(Path(sys.base_prefix, "bin", "python3").resolve())
    put_python(nodes.home / "bin", f"{bare} -S")  # without whatever is installed in it
    try:
        without, depending = command_line(*submit), command_line(*submit, "--ship-code")
    finally:
        put_python(nodes.home / "bin", sys.executable)
    here = f"the Python of this job, {bare} on node {socket.gethostname()}, has no "
    assert (without.returncode, depending.returncode) == (2, 2), without.stdout + depending.stdout
    assert f"{here}gaudi_batch; install it there" in without.stdout
    assert "--ship-code" in without.stdout
    assert re.search(re.escape(here) + r"\w+; gaudi_batch needs it", depending.stdout)


@pytest.mark.thorough
def test_who_closes_the_log_of_a_job_is_told_that_it_goes_on(nodes: RayCluster, dataset: Path, tmp_path: Path) -> None:
    """As in `gaudi-batch follow job | head -1`."""
    address = ("--address", nodes.jobs_address)
    submit = ("submit", *address, *job(dataset, tmp_path / "out"), "--no-wait", "--job-id", "closed")
    assert command_line(*submit).returncode == 0
    follow = [sys.executable, "-m", "gaudi_batch", "follow", *address, "closed"]
    with subprocess.Popen(follow, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        try:
            log = process.communicate(timeout=60)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail("nobody reads what it prints, and it goes on")
    assert process.returncode == 141, log
    assert f"job closed goes on; `gaudi-batch follow closed --address {nodes.jobs_address}` shows it again" in log
    assert command_line("follow", "closed", *address).returncode == 3


@pytest.mark.thorough
def test_a_job_whose_id_can_t_be_printed_is_named_all_the_same(
    nodes: RayCluster, dataset: Path, tmp_path: Path
) -> None:
    submit = ("submit", "--address", nodes.jobs_address, *job(dataset, tmp_path / "out"))
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "gaudi_batch", *submit], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert result.returncode == 141
    assert "standard output can't be written: No space left on device; job gaudi-batch-" in result.stderr
    name = result.stderr.partition("; job ")[2].partition(" ")[0]
    assert command_line("follow", name, "--address", nodes.jobs_address).returncode == 3


@pytest.mark.thorough
def test_ray_s_own_command_submits_the_script(nodes: RayCluster, dataset: Path, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(f"prompts: {dataset}\noutput: {tmp_path / 'out'}\n")
    submit = [RAY, "job", "submit", "--address", nodes.jobs_address, "--working-dir", str(REPOSITORY)]
    script = ["python", "jobs/text_to_image.py", "--config", str(file), *job(dataset, tmp_path / "out")]
    result = subprocess.run([*submit, "--", *script], capture_output=True, text=True, timeout=200, check=False)
    assert "complete with failed rows: 63 images" in result.stdout, result.stdout + result.stderr
    assert len(read_manifest(tmp_path / "out")) == 64


def test_whoever_has_no_token_or_a_wrong_one_is_refused(nodes: RayCluster, dataset: Path, tmp_path: Path) -> None:
    submit = ("submit", "--address", nodes.jobs_address, *job(dataset, tmp_path / "out"))
    wrong = command_line(*submit, RAY_AUTH_TOKEN="0" * 64)
    none = command_line(*submit, RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="")
    assert (wrong.returncode, none.returncode) == (2, 2)
    assert "Invalid authentication token" in wrong.stderr
    assert "Missing authentication token" in none.stderr
    assert not (tmp_path / "out").exists()


def test_a_job_that_ray_does_not_know_is_named(nodes: RayCluster) -> None:
    result = command_line("stop", "no-such-job", "--address", nodes.jobs_address)
    assert result.returncode == 2
    assert "has no job 'no-such-job'" in result.stderr
    followed = command_line("follow", "no-such-job", "--address", nodes.jobs_address)
    assert followed.returncode == 2
    (line,) = followed.stderr.splitlines()
    assert "has no job 'no-such-job'; `ray job list --address http" in line


def test_an_output_that_is_a_file_ends_a_submitted_job_with_its_line(
    nodes: RayCluster, dataset: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("mine")
    result = command_line("submit", "--address", nodes.jobs_address, *job(dataset, tmp_path / "out"))
    assert result.returncode == 2
    assert (
        f"output '{tmp_path}/out': '{tmp_path}/out' is a file; an output is a directory, name another" in result.stdout
    )
    assert "lease" not in result.stdout


def test_a_shell_that_keeps_its_token_back_is_told_so(nodes: RayCluster) -> None:
    result = command_line("stop", "any", "--address", nodes.jobs_address, RAY_AUTH_MODE="disabled")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "a token is here (RAY_AUTH_TOKEN), and RAY_AUTH_MODE=disabled keeps it back: set RAY_AUTH_MODE=token" in line
    assert "no authentication token was found" not in line


@pytest.mark.thorough
@pytest.mark.parametrize(("grace", "seconds", "committed"), [("0", 20, 0), ("60", 3, 1)])
def test_the_grace_that_stop_gives_reaches_the_driver(
    nodes: RayCluster, tmp_path: Path, grace: str, seconds: int, committed: int
) -> None:
    """One shard of eight batches in hand, in a job that was submitted with a grace of 2 s."""
    prompts, output, name = tmp_path / "prompts.parquet", tmp_path / "out", f"grace-{grace}"
    pq.write_table(pa.table({"prompt": ["a"] * 16}), prompts)
    fields = {"simulated.batch-seconds": str(seconds), "batch-size": "1", "cards": "1"}
    given = ("--no-wait", "--job-id", name, "--grace", "2", "--address", nodes.jobs_address)
    assert command_line("submit", *given, *job(prompts, output, **fields)).returncode == 0
    wait_until(lambda: list(output.glob("images/*/*")))
    stopped = command_line("stop", name, "--address", nodes.jobs_address, "--grace", grace)
    assert stopped.stdout == f"job {name}: STOPPED\n", stopped.stderr
    assert (
        f"what has begun is committed first, for up to {grace} s; a shard takes {duration(8 * seconds)}"
        in stopped.stderr
    )
    assert ("what is not done by then is made again" in stopped.stderr) == (grace == "0")
    assert len(list(output.glob("manifest/*"))) == committed
    assert not (output / "stop.json").exists()
    assert json.loads((output / "lease.json").read_text())["released"]


def test_an_id_that_would_be_no_part_of_an_address(dataset: Path, tmp_path: Path) -> None:
    for name in ("x#y z", "a/../b", "", ".."):
        result = command_line("submit", "--job-id", name, *job(dataset, tmp_path / "out"))
        assert result.returncode == 2
        assert f"--job-id {name!r}: " in result.stderr


@pytest.mark.thorough
def test_following_ends_when_the_cluster_falls_silent(
    nodes: RayCluster, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = job(dataset, tmp_path / "out", **{"simulated.batch-seconds": "2"})
    lines: list[str] = []
    monkeypatch.setattr(jobs_client.log, "warning", lambda line, *values: lines.append(line % values))
    monkeypatch.setattr(jobs_client, "ANSWER_TIMEOUT_S", 1.5)
    monkeypatch.setattr(jobs_client, "SILENCE_TIMEOUT_S", 10.0)
    with wire(nodes.dashboard_port) as (port, open_wire):
        begun = command_line("submit", "--address", nodes.jobs_address, "--no-wait", "--job-id", "silent", *flags)
        assert begun.returncode == 0, begun.stderr
        cluster = jobs_client.JobsClient(f"http://127.0.0.1:{port}")
        threading.Timer(3.0, open_wire.clear).start()
        with pytest.raises(RunStopped, match=r"has not answered for .* s; job silent may go on"):
            cluster.follow("silent", print, lambda: None)
        assert any("does not answer, and is asked again for up to 10 s" in line for line in lines)
    assert jobs_client.JobsClient(nodes.jobs_address).follow("silent", print, lambda: None) == 3


@contextlib.contextmanager
def wire(to: int) -> Iterator[tuple[int, threading.Event]]:
    """A port that leads to another one, and what makes it silent when it is cleared: connections stay, and nothing
    comes through."""
    open_wire, listener = threading.Event(), socket.create_server(("127.0.0.1", 0))
    open_wire.set()

    def carry(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                open_wire.wait()
                sink.sendall(data)

    def listen() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", to))
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=carry, args=ends, daemon=True).start()

    threading.Thread(target=listen, daemon=True).start()
    with listener:
        yield listener.getsockname()[1], open_wire


def test_an_address_where_no_cluster_is(dataset: Path, tmp_path: Path) -> None:
    for address, message in (("http://127.0.0.1:9", "Failed to connect"), ("127.0.0.1:6379", "http://")):
        result = command_line("submit", "--address", address, *job(dataset, tmp_path / "out"))
        assert result.returncode == 2
        assert message in result.stderr
