"""Webhooks and commands are told how a run ended, are tried again, and keep nobody waiting for long."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import wait_until

from gaudi_batch.config.schema import JobConfig
from gaudi_batch.driver import on_end
from gaudi_batch.driver.on_end import OnEnd, tell_all
from gaudi_batch.driver.outcome import Outcome
from gaudi_batch.errors import ForcedInterrupt, InputError, Interrupted, RunStopped
from gaudi_batch.redaction import redact

SECRET = "T00/B00/xyzzy-of-somebody"
SUMMARY = {
    "state": "complete with failed rows",
    "reason": None,
    "images": 3,
    "failed_rows": 1,
    "rows": 4,
    "wall_s": 90.0,
    "images_per_s_wall": 0.0333,
    "card_hours": 0.05,
    "cost": 1.5,
    "started_at": "2026-11-01T00:00:00+00:00",
    "ended_at": "2026-11-01T00:01:30+00:00",
}


class Hook(ThreadingHTTPServer):
    """Keeps what is posted to it, and answers as it is told to, at last with 200."""

    def __init__(self, *answers: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = list(answers)
        self.posted: list[dict[str, Any]] = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/services/{SECRET}"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        hook: Any = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hook.posted.append(json.loads(body) | {"to": self.path, "type": self.headers["Content-Type"]})
        self.send_response(hook.answers.pop(0) if hook.answers else 200)
        self.send_header("Location", "/elsewhere")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(on_end, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(logging.getLogger("gaudi_batch"), "propagate", True)
    caplog.set_level(logging.INFO, "gaudi_batch")


@pytest.fixture
def hooks() -> Iterator[list[Hook]]:
    """Those that a test makes, which end with it."""
    made: list[Hook] = []
    yield made
    for hook in made:
        hook.shutdown()
        hook.server_close()


def a_run(summary: dict[str, Any] | None = None, begun: bool = True) -> Any:
    ledger = SimpleNamespace(storage=SimpleNamespace(url="s3://bucket/out"))
    info = SimpleNamespace(run_id="abc", rows=4, images=4)
    return SimpleNamespace(summary=summary, begun=begun, ledger=ledger, info=info)


def end(told: Any, run: Any, error: BaseException | None = None) -> None:
    """The end of a run, as it comes about in the driver."""
    job = JobConfig(prompts="p", output="o", device="simulated", on_end=told)
    context = OnEnd(job)
    context.run = run
    context.__exit__(None if error is None else type(error), error, None)


def assert_killed(pid: int) -> None:
    """Its parent is killed, too, so that nobody may ever ask how it ended."""
    status = Path(f"/proc/{pid}/status")
    wait_until(lambda: not status.exists() or "State:\tZ" in status.read_text(), 10)


def test_a_webhook_gets_the_outcome_as_json_once_it_accepts_it(
    hooks: list[Hook], caplog: pytest.LogCaptureFixture
) -> None:
    hooks.append(Hook(500, 429))
    end(hooks[0].url, a_run(SUMMARY))
    assert hooks[0].posted == 3 * [hooks[0].posted[0]]
    told = hooks[0].posted[0]
    figures = {name: told[name] for name in SUMMARY}
    assert figures == SUMMARY
    assert told["type"] == "application/json"
    assert (told["output"], told["run_id"], told["exit_code"]) == ("s3://bucket/out", "abc", 3)
    assert (told["images_planned"], told["rows_planned"], told["energy_j"]) == (4, 4, None)
    assert caplog.messages[0] == ("on_end[0] is not told yet, and is tried again in 0.01 s: it answers 500")
    assert caplog.messages[-1] == "on_end[0] is told that the run is over"
    assert "xyzzy" not in caplog.text
    assert redact(f"can't open {hooks[0].url}") == "can't open ***"


def test_slack_gets_sentences_in_its_own_form(hooks: list[Hook], monkeypatch: pytest.MonkeyPatch) -> None:
    hooks.append(Hook())
    monkeypatch.setattr(on_end, "SLACK_HOST", "127.0.0.1")
    stopped = SUMMARY | {"state": "stopped", "reason": "rows <1 & 2> failed"}
    end(hooks[0].url, a_run(stopped), RunStopped("stopped: ..."))
    end({"url": hooks[0].url, "format": "json"}, a_run(stopped), RunStopped("stopped: ..."))
    end({"url": hooks[0].url, "format": "slack"}, a_run(), ForcedInterrupt("interrupted at once"))
    assert [told.get("text") for told in hooks[0].posted] == [
        "gaudi-batch: s3://bucket/out is stopped: rows &lt;1 &amp; 2&gt; failed."
        " It has 3 images and 1 failed row in 1 min 30 s, 0.03 images/s. It cost 1.50.",
        None,
        "gaudi-batch: s3://bucket/out is stopped: interrupted at once.",
    ]


@pytest.mark.parametrize(
    ("error", "exit_code", "reason"),
    [
        (None, 0, None),
        (RunStopped("stopped: no card is left"), 1, "stopped: no card is left"),
        (Interrupted("interrupted with 1 of 4 rows done"), 130, "interrupted with 1 of 4 rows done"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("a fault of ours"), 1, "ValueError: a fault of ours"),
    ],
)
def test_the_outcome_has_the_exit_code_of_the_command(
    error: BaseException | None, exit_code: int, reason: str | None
) -> None:
    outcome = Outcome.of(a_run(SUMMARY | {"failed_rows": 0}), error)
    assert (outcome.exit_code, outcome.reason) == (exit_code, reason)


def test_a_webhook_that_refuses_is_not_asked_again(hooks: list[Hook], caplog: pytest.LogCaptureFixture) -> None:
    hooks += [Hook(404), Hook(302)]
    end([hook.url for hook in hooks], a_run(SUMMARY))
    assert [len(hook.posted) for hook in hooks] == [1, 1], "a redirect would lose what is posted"
    assert sorted(caplog.messages) == [
        "on_end[0] is not told that the run is over: it answers 404",
        "on_end[1] is not told that the run is over: it answers 302",
    ]


def test_nobody_is_told_of_a_run_that_had_nothing_to_make(hooks: list[Hook]) -> None:
    hooks.append(Hook())
    end(hooks[0].url, a_run(SUMMARY, begun=False))
    end(hooks[0].url, None, InputError("no such prompts"))
    assert not hooks[0].posted


def test_a_command_gets_the_outcome_and_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What it leaves in the background is not waited for."""
    left = tmp_path / "left"
    script = f"cat >> {tmp_path}/told; echo >> {tmp_path}/told; env >> {tmp_path}/env; sleep 100 & echo $! >> {left};"
    end(f"{script} test -e {tmp_path}/again || {{ touch {tmp_path}/again; echo not yet; exit 7; }}", a_run(SUMMARY))
    first, second = (tmp_path / "told").read_text().splitlines()
    assert first == second
    assert json.loads(first)["images"] == 3
    variables = (tmp_path / "env").read_text().splitlines()
    assert {"GAUDI_BATCH_EXIT_CODE=3", "GAUDI_BATCH_STATE=complete with failed rows"} <= set(variables)
    assert caplog.messages == [
        "on_end[0] (a command) is not told yet, and is tried again in 0.01 s: it ended with exit code 7;"
        " what it printed is not kept",
        "on_end[0] (a command) is told that the run is over",
    ]
    for pid in left.read_text().split():
        os.kill(int(pid), signal.SIGKILL)


@pytest.mark.parametrize("error", [None, Interrupted("interrupted"), ForcedInterrupt("interrupted at once")])
def test_what_hangs_is_killed_when_its_time_is_over(
    error: BaseException | None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"TOTAL_TIMEOUT_S": None, "INTERRUPTED_TIMEOUT_S": Interrupted, "FORCED_TIMEOUT_S": ForcedInterrupt}
    for name, kind in limits.items():
        is_meant = error is None if kind is None else type(error) is kind
        monkeypatch.setattr(on_end, name, 5.0 if is_meant else 1000.0)
    end(f"sleep 100 & echo $! > {tmp_path}/pid; wait", a_run(SUMMARY), error)
    assert_killed(int((tmp_path / "pid").read_text()))
    assert caplog.messages == [
        "on_end[0] (a command) is not told that the run is over, and is not tried again:"
        " it took too long and was killed"
    ]


def test_a_signal_ends_the_telling_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pid = tmp_path / "pid"

    def interrupt() -> None:
        wait_until(lambda: pid.exists() and pid.read_text().endswith("\n"))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    end(f"sleep 100 & echo $! > {pid}; wait", a_run(SUMMARY))
    assert_killed(int(pid.read_text()))
    assert "on_end: interrupted, so nobody is told any more" in caplog.messages


def test_a_server_that_never_answers_keeps_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class Silent:
        name = "on_end[0]"

        def tell(self, *_: Any) -> None:
            held.wait()

    held = threading.Event()
    began = time.monotonic()
    tell_all([Silent()], Outcome.of(a_run(SUMMARY), None), 0.1)
    assert time.monotonic() - began < 30
    held.set()
    assert caplog.messages == ["on_end[0] is not told that the run is over: it has not answered for 0.1 s"]


def test_what_a_command_prints_is_in_no_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the URL that it posts to, as in the error of a library, or without end."""
    monkeypatch.setenv("HOOK", f"hooks.invalid/{SECRET}")
    monkeypatch.setattr(on_end, "TOTAL_TIMEOUT_S", 5.0)
    end(
        [
            "echo no answer from $HOOK; exit 3",
            "$HOOK and more",
            f"/no/such/{SECRET}",
            "head -c 100000000 /dev/zero; exit 126",
        ],
        a_run(SUMMARY),
    )
    assert SECRET not in caplog.text
    assert any("can't be run (exit code 127)" in message for message in caplog.messages)


def test_a_url_may_come_from_the_environment(hooks: list[Hook], monkeypatch: pytest.MonkeyPatch) -> None:
    hooks.append(Hook())
    for name, value in (("HOOK", hooks[0].url), ("SECRET", SECRET)):
        monkeypatch.setenv(name, value)
    end("${HOOK}", a_run(SUMMARY))
    end(hooks[0].url.replace(SECRET, "${SECRET}"), a_run(SUMMARY))
    assert [told["to"] for told in hooks[0].posted] == 2 * [f"/services/{SECRET}"]
    monkeypatch.delenv("HOOK")
    with pytest.raises(InputError, match=r"on_end\[0\].url: the environment of this process has no variable HOOK"):
        end("${HOOK}", a_run(SUMMARY))
    monkeypatch.setenv("HOOK", f"ftp://host/{SECRET}")
    with pytest.raises(InputError, match=r"on_end\[0\].url: must be a URL that begins with http") as refused:
        end("${HOOK}", a_run(SUMMARY))
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"url": f"https://h/{SECRET}", "command": "true"}, "on_end.0: must have either a url or a command"),
        ({}, "on_end.0: must have either a url or a command"),
        ({"uri": f"https://h/{SECRET}"}, "on_end.0.uri: is not a field of a job"),
        ({f"https://h/{SECRET}": None}, "on_end.0: must be a text, or a mapping"),
        ({"url": f"ftp://h/{SECRET}"}, "on_end.0: must be a URL that begins with http"),
        ({"url": f"https://me:{SECRET}@h/"}, "on_end.0: must be a URL"),
        ({"url": "https://me:xyzzy@h/"}, "on_end.0: has a user name or a password"),
        ({"url": f"https://h/{SECRET}", "format": "teams"}, "on_end.0.format: input should be 'json' or 'slack'"),
        ({"command": "true", "format": "slack"}, "on_end.0: format belongs to a url"),
        (" ", "on_end.0: command must be what a shell can run"),
        ([{"url": [f"https://h/{SECRET}"]}], "on_end.0.url: input should be a valid string"),
    ],
)
def test_what_can_t_be_told_is_refused_without_a_secret(told: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        JobConfig(prompts="p", output="o", device="simulated", on_end=told)
    assert "xyzzy" not in str(refused.value)


def test_a_short_form_is_a_url_or_a_command() -> None:
    told = [f"https://h/{SECRET}", "${HOOK}", "curl -d @- https://h/x, y: z", {"command": "true"}]
    job = JobConfig.model_validate({"prompts": "p", "output": "o", "device": "simulated", "on_end": told})
    assert [(each.url, each.command) for each in job.on_end] == [
        (told[0], None),
        ("${HOOK}", None),
        (None, told[2]),
        (None, "true"),
    ]
    assert not JobConfig.model_validate({"prompts": "p", "output": "o", "device": "simulated", "on_end": None}).on_end
