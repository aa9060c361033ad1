"""Machines and shells that are not as usual: addresses of IPv6, no temporary directory, no home, plain terminals,
applications with a log of their own."""

from __future__ import annotations

import contextlib
import http.server
import json
import logging
import os
import pty
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import threadcards
from helpers import REPOSITORY, command_line, free_port
from smalljob import a_job, write_dataset

from gaudi_batch import InputError, JobConfig
from gaudi_batch.cluster.address import address_of, check_reachable
from gaudi_batch.driver.runner import run
from gaudi_batch.reporting.terminal import open_view

pytestmark = pytest.mark.usefixtures("thread_cards")

log = logging.getLogger("gaudi_batch")
HALF = {"time": "2026-01-01T00:00:00Z", "images": 5, "images_total": 10, "cards": {}, "faults": []}


# -- addresses ---------------------------------------------------------------------------------------------------


@pytest.fixture
def ipv6() -> Iterator[int]:
    """A port of ::1 at which somebody listens."""
    with socket.socket(socket.AF_INET6) as listening:
        listening.bind(("::1", 0))
        listening.listen()
        yield listening.getsockname()[1]


def test_an_address_of_ipv6_is_tried_and_given_to_ray_as_it_is(ipv6: int) -> None:
    address = address_of(f"[::1]:{ipv6}")
    assert address == f"[::1]:{ipv6}"
    check_reachable(address)
    with pytest.raises(InputError, match="Connection refused"):
        check_reachable(f"[::1]:{free_port()}")


def test_a_cluster_that_does_not_answer_costs_no_beginning_of_an_output(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    address, output = f"[::1]:{free_port()}", tmp_path / "out"
    flags = ["--device=simulated", f"--prompts={tmp_path}", f"--output={output}"]
    refused = command_line("run", "--address", address, *flags)
    assert refused.returncode == 2
    assert f"no Ray cluster answers at '{address}'" in refused.stderr
    assert not output.exists()


def test_an_address_of_ipv6_without_brackets_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"'::1:6379'.* as in \[::1\]:6379"):
        address_of("::1:6379")


@pytest.mark.ray
def test_an_address_of_the_jobs_api_needs_brackets_too() -> None:
    refused = command_line("stop", "job", "--address", "http://::1:8265")
    assert refused.returncode == 2
    assert "'http://::1:8265': an address of IPv6 is written in brackets, as in http://[::1]:8265" in refused.stderr


@pytest.mark.ray
def test_the_jobs_api_is_found_at_an_address_of_ipv6() -> None:
    asked: list[str] = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.path} {self.headers['Host']}")
            self.send_error(404, "no such thing here")

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(http.server.HTTPServer):
        address_family = socket.AF_INET6

    with Server(("::1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        refused = command_line("stop", "a-job", "--address", f"http://[::1]:{server.server_port}")
        server.shutdown()
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert asked[0].endswith(f"[::1]:{server.server_port}")


# -- logs and terminals ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, term: str = "xterm") -> Iterator[int]:
    """Standard error is a terminal meanwhile; yields the end at which one reads what is on it."""
    reader, end = pty.openpty()
    with os.fdopen(end, "w", buffering=1) as stream, monkeypatch.context() as patched:
        patched.setenv("TERM", term)
        patched.setattr(sys, "stderr", stream)
        yield reader
    os.close(reader)


def appears(text: str, reader: int) -> bool:
    """Whether a text comes to the terminal, which takes the system a moment."""
    seen = ""
    while text not in seen and select.select([reader], [], [], 10)[0]:
        seen += os.read(reader, 4096).decode(errors="replace")
    return text in seen


def test_an_application_keeps_its_log_handlers_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "gaudi_batch"), terminal(monkeypatch) as reader:
        kept, on_terminal = logging.FileHandler(tmp_path / "log"), logging.StreamHandler(sys.stderr)
        monkeypatch.setattr(log, "handlers", [kept, on_terminal])
        with open_view() as view:
            view.show(lambda: HALF)
            log.info("while it runs")
            assert on_terminal not in log.handlers
        log.info("afterwards")
        assert log.handlers == [kept, on_terminal]
        assert appears("while it runs", reader)
    kept.close()
    assert (tmp_path / "log").read_text() == "while it runs\nafterwards\n"


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_that_can_not_redraw_gets_lines(
    term: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "gaudi_batch"), terminal(monkeypatch, term) as reader:
        monkeypatch.setattr(log, "handlers", [logging.StreamHandler(sys.stderr)])
        with open_view() as view:
            view.show(lambda: HALF)
        assert appears("5/10 images", reader)


# -- places that can't be written ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run that is complete and its job.yaml, whose paths are those of /mnt. There `run` has nothing
    to make and joins the manifests."""
    home = tmp_path_factory.mktemp("finished")
    (home / "prompts").mkdir()
    write_dataset(home / "prompts")
    with pytest.MonkeyPatch.context() as patched:
        threadcards.put_in_place(patched)
        run(JobConfig(**a_job(home / "prompts", home / "out")), address=cluster)
    (home / "job.yaml").write_text(json.dumps(a_job("/mnt/prompts", "/mnt/out")))
    return home


MOUNTS = """set -e
mount --bind "$1" /mnt; mount -t tmpfs -o size=8k tmpfs /tmp; cd /tmp
if [ "$2" = full ]; then dd if=/dev/zero of=filling bs=4k 2> /dev/null || true; else mount -o remount,ro /tmp; fi
for place in /var/tmp /usr/tmp; do if [ -d $place ]; then mount --bind /tmp $place; fi; done
shift 2; exec "$@" """
"""A directory is at /mnt, and all places for temporary files are one tiny file system that is full or can't be written,
in namespaces of their own."""
NO_PLACE = "no temporary directory can be written; set TMPDIR to one that can"


def without_temporary_files(state: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    if Path(sys.prefix).is_relative_to("/tmp"):
        pytest.skip("Python lies in /tmp, which would not be there")
    namespaces = ["unshare", "--mount", *(["--map-root-user"] if os.getuid() else [])]
    return subprocess.run(
        [*namespaces, "sh", "-c", MOUNTS, "sh", str(home), state, sys.executable, "-m", "gaudi_batch", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        check=False,
    )


@pytest.mark.parametrize("state", ["full", "read-only"])
def test_the_join_says_that_there_is_no_temporary_directory(state: str, finished: Path) -> None:
    ended = without_temporary_files(state, finished, "run", "/mnt/job.yaml")
    assert "Traceback" not in ended.stderr
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.rstrip().endswith(NO_PLACE)


def test_emulate_says_that_there_is_no_place_for_its_state(finished: Path) -> None:
    ended = without_temporary_files("read-only", finished, "emulate", "--", "true")
    assert "Traceback" not in ended.stderr
    assert ended.returncode == 2
    assert ended.stderr.rstrip().endswith("name a directory with --state")


@pytest.mark.ray
def test_a_user_without_a_home_reaches_the_jobs_api() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "RAY_AUTH_TOKEN")}
    ended = subprocess.run(
        [sys.executable, "-m", "gaudi_batch", "follow", "a-job", "--address", "http://127.0.0.1:1"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        # Nobody's number, which the list of users does not have: whose home it is asks the real one.
        preexec_fn=(lambda: os.setresuid(54321, 0, 0)) if os.getuid() == 0 else None,
        check=False,
    )
    assert "Traceback" not in ended.stderr
    assert ended.returncode == 2
    assert "no cluster takes jobs at" in ended.stderr
