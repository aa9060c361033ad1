"""What waits for the network says what for, and what ends for want of it names it."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest
from helpers import command_line, free_port

from gaudi_batch.cli import main as cli
from gaudi_batch.cluster.tokens import what_token_lacks
from gaudi_batch.storage import retrying, waits

JOB = ("--device", "simulated")


def check(
    capsys: pytest.CaptureFixture[str], prompts: str, output: Path, retry_timeout_s: float
) -> tuple[int, list[str]]:
    flags = ["--prompts", prompts, "--output", str(output), *JOB, "--storage-patience", str(retry_timeout_s)]
    code = cli.main(["check", *flags])
    return code, capsys.readouterr().err.splitlines()


def test_prompts_behind_a_host_that_is_not_to_be_found_name_the_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "FIRST_LINE_S", 0.2)
    code, lines = check(capsys, "https://host.invalid/prompts.parquet", tmp_path / "out", 1.0)
    assert code == 1
    waits_for = "prompts https://host.invalid/prompts.parquet: still looking for them: ConnectionError: "
    assert any(waits_for in line for line in lines[:-1]), lines
    assert "tried for 1 s: the network does not lead to host.invalid: " in lines[-1]


def test_prompts_of_a_hub_that_is_out_of_reach_name_the_network(tmp_path: Path) -> None:
    port = free_port()
    flags = ("--prompts", "hf://datasets/owner/name/*.parquet", "--output", tmp_path / "out", *JOB)
    result = command_line("check", *flags, "--storage-patience", "8", HF_ENDPOINT=f"http://127.0.0.1:{port}")
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    waits_for = "prompts hf://datasets/owner/name/*.parquet: still looking for them: "
    assert any(waits_for in line for line in lines[:-1]), lines
    assert "the network does not lead to 127.0.0.1: [Errno 111] Connection refused" in lines[-1]


def test_prompts_of_a_hub_that_the_environment_forbids_are_refused_at_once(tmp_path: Path) -> None:
    flags = ("--prompts", "hf://datasets/owner/name/*.parquet", "--output", tmp_path / "out", *JOB)
    result = command_line("check", *flags, HF_HUB_OFFLINE="1")
    assert result.returncode == 1
    assert "please unset the `HF_HUB_OFFLINE` environment variable" in result.stderr.splitlines()[-1]


def test_a_server_that_answers_nothing_is_not_a_file_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "FIRST_LINE_S", 0.2)
    monkeypatch.setattr(retrying, "TRY_TIMEOUT_S", 1.0)
    kept: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def take() -> None:
            while True:
                try:
                    kept.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        began = time.monotonic()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/prompts.parquet"
        code, lines = check(capsys, url, tmp_path / "out", 1.0)
    assert code == 1
    assert any(f"prompts {url}: still looking for them" in line for line in lines[:-1]), lines
    assert "no such file" not in lines[-1]
    assert "imeout" in lines[-1]
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("environment", "file", "message"),
    [
        ({}, False, "no token is here: put the cluster's into ~/.ray/auth_token, or into RAY_AUTH_TOKEN"),
        (
            {"RAY_AUTH_MODE": "disabled"},
            False,
            "no token is here: put the cluster's into ~/.ray/auth_token, or into RAY_AUTH_TOKEN, and set"
            " RAY_AUTH_MODE=token, which is disabled here",
        ),
        (
            {"RAY_AUTH_MODE": "disabled"},
            True,
            "a token is here (~/.ray/auth_token), and RAY_AUTH_MODE=disabled keeps it back: set RAY_AUTH_MODE=token",
        ),
        (
            {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "xyzzyxyzzy"},
            True,
            "a token is here (RAY_AUTH_TOKEN), and RAY_AUTH_MODE=disabled keeps it back: set RAY_AUTH_MODE=token",
        ),
        ({"RAY_AUTH_MODE": "token"}, False, "no token is here: put the cluster's into ~/.ray/auth_token, or into RAY"),
        ({}, True, "the token that is here (~/.ray/auth_token) may not be the cluster's"),
        ({"RAY_AUTH_TOKEN_PATH": "/no/where"}, True, "RAY_AUTH_TOKEN_PATH names /no/where, which is no file: put"),
    ],
)
def test_a_shell_is_told_what_it_lacks_of_a_token(
    environment: dict[str, str], file: bool, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in [name for name in os.environ if name.startswith("RAY_AUTH")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    if file:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray/auth_token").write_text("a" * 32)
    lacks = what_token_lacks()
    assert lacks.startswith(message)
    assert lacks.endswith("; unset RAY_AUTH_MODE if that cluster asks for none") is (
        environment == {"RAY_AUTH_MODE": "token"}
    )
    assert "xyzzy" not in lacks
