"""What is taken for secret is in nothing that is written or told, and nothing else is taken out."""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import called, command_line

from gaudi_batch import JobConfig, run
from gaudi_batch.errors import InputError, StorageError
from gaudi_batch.redaction import has_secret, redact, redacted_options
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import OneLineFormatter, one_line

pytestmark = pytest.mark.usefixtures("thread_cards")

SECRET = "xyzzy-of-somebody"
SMALL: dict[str, Any] = {"prompts": "p.parquet", "output": "out", "device": "simulated"}


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/me@example.com/run1",
        "s3://arn:aws:s3:us-west-2:123456789012:accesspoint/name/me@example.com",
        "abfs://box@account.dfs.core.windows.net/run1",
        "wasbs://box@account.blob.core.windows.net/run1",
        "sftp://me@host/run1",
        "hdfs://me@host:8020/run1",
        "smb://me@host/run1",
        "hf://datasets/me/prompts@main/train.parquet",
        "hf://me@main/train.parquet",
        "zip://*.parquet::s3://bucket/me@example.com/prompts.zip",
        "http://host:8265/jobs/me@example.com",
        "http://[2001:db8::1]:8265/me@example.com",
        "s3://bucket/part-?.parquet",
        "s3://bucket/day=0?/hour=1/*.parquet",
        "s3://bucket/part.parquet?versionId=abc",
        "/home/me@example.com/run1",
        '{"output":"http://host:80","who":"me@example.com"}',
    ],
)
def test_a_name_that_is_no_secret_stays_as_it_is(text: str) -> None:
    assert redact(text) == text
    assert not has_secret(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("s3://key:xyzzy@bucket/me@example.com/run1", "s3://***@bucket/me@example.com/run1"),
        ("s3://key:xy/zzy@bucket/run1", "s3://***@bucket/run1"),
        ("https://key:xy@zzy@host/p", "https://***@host/p"),
        ("https://key:12345@host/p", "https://***@host/p"),
        ("https://xyzzy@host/p", "https://***@host/p"),
        ("sftp://me:xyzzy@host/p", "sftp://***@host/p"),
        ("zip://*.parquet::https://me:xyzzy@host/p.zip", "zip://*.parquet::https://***@host/p.zip"),
        ("can't read 'https://host/p?xyzzy=1': no", "can't read 'https://host/p?***': no"),
        ("abfs://box@account/p?sv=1&sig=xyzzy", "abfs://box@account/p?***"),
    ],
)
def test_secrets_of_urls_are_taken_out(text: str, told: str) -> None:
    assert redact(text) == told
    assert has_secret(text)


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "HUGGINGFACEHUB_API_TOKEN",
        "RAY_AUTH_TOKEN",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AZURE_STORAGE_KEY",
        "AZURE_CLIENT_SECRET",
        "AZURE_STORAGE_SAS_TOKEN",
        "GOOGLE_API_KEY",
        "MINIO_ROOT_PASSWORD",
        "WANDB_API_KEY",
        "MYSQL_PWD",
        "some_secret_2",
        "GOOGLE_CREDENTIALS",
        "DB_PASS",
        "PGPASSWORD",
        "STORAGE_KEY",
        "STORAGE_KEY_2",
        "ENCRYPTION_KEY",
        "GITHUB_PAT",
        "HF_TOKENS",
        "B2_APPLICATION_KEY",
        "R2_KEY",
        "SIGNING_KEYS",
    ],
)
def test_values_of_variables_whose_names_say_so_are_taken_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "xyzzy/xyzzy+")
    assert redact("refused: xyzzy/xyzzy+ and xyzzy%2Fxyzzy%2B") == "refused: *** and ***"
    monkeypatch.setenv(name, "test")
    assert redact("s3://bucket/latest") == "s3://bucket/latest"


@pytest.mark.parametrize(
    "name",
    [
        "KEYBOARD",
        "TOKENIZERS_PARALLELISM",
        "MAX_TOKENS",
        "PWD",
        "OLDPWD",
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN_PATH",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "SSH_AUTH_SOCK",
        "XDG_RUNTIME_DIR",
        "XDG_SESSION_ID",
        "GOOGLE_CREDENTIALS",
        "OPENAI_MAX_NEW_TOKENS",
        "B2_APPLICATION_KEY_ID",
        "SSH_PUBLIC_KEY",
        "SORT_KEY",
        "MONKEY",
        "COMPASS",
        "BYPASS",
        "PATH",
        "PATTERN",
        "PASSES",
        "KEYS_SEEN",
    ],
)
def test_values_of_other_variables_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "/some/everyday/value")
    assert redact("can't open /some/everyday/value") == "can't open /some/everyday/value"


def test_the_secret_part_of_a_connection_string_is_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", f"AccountName=box;AccountKey={SECRET}==;EndpointSuffix=net")
    assert redact(f"bad key {SECRET}== of box") == "bad key *** of box"


def test_each_secret_in_the_credentials_of_a_variable_is_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "-----BEGIN PRIVATE KEY-----\nxyzzy/of/somebody\nxyzzy/of/nobody\n-----END PRIVATE KEY-----\n"
    account = {"type": "service_account", "token_uri": "https://oauth2.example.com/token", "private_key": key}
    monkeypatch.setenv("GOOGLE_CREDENTIALS", json.dumps(account))
    assert redact(f"bad credentials {json.dumps(account)}") == "bad credentials ***"
    assert "xyzzy" not in redact(f"no key: {key}") + redact(f"no key: {one_line(key)}") + redact(str(account))
    assert redact("service_account: no https://oauth2.example.com/token") == (
        "service_account: no https://oauth2.example.com/token"
    )
    monkeypatch.setenv("HF_TOKENS", f"{SECRET},another-{SECRET}")
    assert redact(f"401 for another-{SECRET}") == "401 for ***"


def test_how_gcsfs_comes_to_a_token_is_no_secret() -> None:
    assert redacted_options({"token": "cloud", "secret": "cloud9"}) == {"token": "cloud", "secret": "***"}


def test_a_config_that_is_shown_or_refused_keeps_its_secrets() -> None:
    options = {"secret": SECRET, "client_kwargs": {"endpoint_url": f"http://me:{SECRET}@host"}}
    secret = {**SMALL, "output": f"s3://key:{SECRET}@bucket/out", "storage_options": options}
    config = JobConfig.model_validate(secret)
    for told in (repr(config), str(config), f"{[config]}"):
        assert SECRET not in told
        assert "storage_options={'secret': '***'" in told
    assert config.storage_options == pickle.loads(pickle.dumps(config)).storage_options == options
    for wrong in ({"device": "gpu"}, {"storage_options": SECRET}, {"encoding": SECRET}, {"device": "cpu"}):
        with pytest.raises(InputError) as refused:
            JobConfig.model_validate(secret | wrong)
        assert SECRET not in str(refused.value) + repr(refused.value)
    with pytest.raises(InputError, match="seed: -1: "):
        JobConfig.model_validate(SMALL | {"seed": -1, "prompts": 1})


def test_a_webhook_is_no_secret_to_who_is_told_and_to_nobody_else(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it can't be reached, and where a command prints it."""
    monkeypatch.setattr("gaudi_batch.driver.on_end.TOTAL_TIMEOUT_S", 0.0)
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "prompts.parquet")
    url = f"http://127.0.0.1:9/services/{SECRET}"
    told = [url, {"url": url, "format": "slack"}, f"echo can't open {url}; exit 1"]
    job = SMALL | {"prompts": str(tmp_path / "prompts.parquet"), "output": str(tmp_path / "out"), "on_end": told}
    config = JobConfig.model_validate(job)
    assert SECRET not in f"{config!r} {config} {config.on_end}"
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    result = called("run", tmp_path / "job.yaml", "--address", cluster)
    assert result.returncode == 0
    assert result.stderr.count("is not told that the run is over") == 3
    assert SECRET not in result.stdout + result.stderr
    stored = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert b'"on_end"' in stored
    assert SECRET.encode() not in stored


def test_no_error_and_no_log_line_has_a_secret_whoever_writes_it() -> None:
    message = f"can't read s3://key:{SECRET}@bucket/out"
    refused = StorageError(message, refused=True)
    assert str(refused) == str(InputError(message)) == "can't read s3://***@bucket/out"
    assert pickle.loads(pickle.dumps(refused)).refused
    record = logging.LogRecord("gaudi_batch", logging.ERROR, "", 0, "%s", (message,), None)
    assert OneLineFormatter("%(message)s").format(record) == "can't read s3://***@bucket/out"


def test_what_storage_was_opened_with_is_in_no_text_of_the_process() -> None:
    """Also of a process that was sent it, as a card's is; the words of a library come without options."""
    child = "import pickle, sys; pickle.load(sys.stdin.buffer); from gaudi_batch.redaction import redact;"
    storage = Storage("/tmp", {"auto_mkdir": True, "key": SECRET})
    assert redact(f"refused: {SECRET}") == "refused: ***"
    command = [sys.executable, "-c", f"{child} print(redact('refused: {SECRET}'))"]
    told = subprocess.run(command, input=pickle.dumps(storage), capture_output=True, check=True)
    assert told.stdout == b"refused: ***\n"


def test_the_record_of_a_job_without_secrets_is_the_job(write_prompts: Any, tmp_path: Path) -> None:
    from gaudi_batch.job import resolve

    prompts = write_prompts({"prompt": ["a"]})
    config = JobConfig(prompts=str(prompts), output=str(tmp_path / "me@example.com"), device="simulated")
    assert resolve(config).describe() == config.model_dump(mode="json")


def test_a_flag_that_there_is_not_does_not_have_its_value_repeated() -> None:
    for flags in (["--storage-option", f"{{secret: {SECRET}}}"], [f"--storage-optionz.secret={SECRET}"]):
        result = command_line("run", *flags)
        assert result.returncode == 2
        assert f"unrecognized arguments: {flags[0].partition('=')[0]}" in result.stderr
        assert SECRET not in result.stderr
    assert "unrecognized arguments: more (" in command_line("check", "job.yaml", "more").stderr


def test_a_result_says_where_the_images_are_and_shows_no_secret(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", SECRET)
    pq.write_table(pa.table({"prompt": ["a", "b"]}), tmp_path / "prompts.parquet")
    output = tmp_path / f"me@example.com-{SECRET}"
    config = JobConfig(prompts=str(tmp_path / "prompts.parquet"), output=str(output), device="simulated")
    result = run(config, address=cluster)
    assert result.output == str(output)
    assert SECRET not in repr(result)
    assert SECRET not in "".join(path.read_text() for path in output.glob("*.json"))
    assert dataclasses.asdict(result)["output"] == str(output)
