"""A job from YAML, flags and Python: one set of rules, and one line for all that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gaudi_batch.cli.flags import add_job_flags, job_from, join_mapping_flags
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.errors import InputError
from gaudi_batch.redaction import redact, redacted_options

SMALL = {"prompts": "p.parquet", "output": "out", "device": "simulated"}


def from_flags(*arguments: str) -> JobConfig:
    import argparse

    parser = argparse.ArgumentParser()
    add_job_flags(parser)
    return job_from(parser.parse_args(join_mapping_flags(list(arguments))))


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"steps": 20, "encoding": {"type": "jpeg", "quality": 70}}))
    config = from_flags(str(path), "--steps", "30", "--encoding.quality", "50")
    assert (config.steps, config.encoding.type, config.encoding.quality) == (30, "jpeg", 50)


def test_every_kind_of_flag() -> None:
    config = from_flags(
        *("--prompts", "p", "--output", "o", "--device", "simulated", "--cards", "3", "--max-failed", "5%"),
        *("--columns.prompt", "caption", "--columns.id", "17", "--storage-options.client_kwargs.region", "eu"),
        *("--storage-options.anon=true", "--negative-prompt", "null", "--simulated.raise-rows", "[1, 2]"),
        *("--width", "512", "--seed", "9223372036854775807"),
    )
    assert config.cards == 3
    assert config.max_failed == 0.05
    assert config.columns == {"prompt": "caption", "id": "17"}
    assert config.storage_options == {"client_kwargs": {"region": "eu"}, "anon": True}
    assert config.negative_prompt is None
    assert config.simulated.raise_rows == (1, 2)
    assert (config.width, config.seed) == (512, 2**63 - 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0: "),
        ({"stepz": 3}, "stepz: is not a field of a job"),
        ({"prompts": " "}, "prompts: ' ': must name a path"),
        ({"device": "gpu"}, "device: 'gpu': "),
        ({"cards": 0}, "cards: 0: "),
        ({"guidance_scale": float("nan")}, "guidance_scale: nan: "),
        ({"seed": 2**63}, "seed: "),
        ({"encoding": {"quality": 101}}, "encoding.quality: 101: "),
        ({"columns": {"promt": "x"}}, "'promt' is no column that a job knows"),
        ({"max_failed": 1.5}, "max_failed"),
        ({"device": "cpu"}, "model: is missing"),
    ],
)
def test_nonsense_is_refused_with_value_and_rule(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        JobConfig.load(None, SMALL | fields)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_field_and_an_unreadable_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"output: is missing; prompts: is missing|prompts: is missing; output"):
        JobConfig.load(None, {"device": "simulated"})
    with pytest.raises(InputError, match="can't be read: No such file"):
        JobConfig.load(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(InputError, match="must hold a mapping"):
        JobConfig.load(tmp_path / "list.yaml")


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_bytes_of_a_job_file_do_more_than_be_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(data)
    with pytest.raises(InputError):
        JobConfig.load(path)


def test_secrets_are_not_in_errors() -> None:
    with pytest.raises(InputError) as caught:
        JobConfig.load(None, SMALL | {"storage_options": "hunter2-secret"})
    assert "hunter2" not in str(caught.value)


def test_no_flag_is_lost_or_read_as_something_else() -> None:
    config = from_flags(
        *("--prompts", "p", "--output", "o", "--device", "simulated", "--max-failed", "1.0"),
        *("--columns", "{id: key}", "--columns.prompt", "yes", "--storage-options.secret", "@pa:ss%"),
    )
    assert config.columns == {"id": "key", "prompt": "yes"}
    assert config.storage_options == {"secret": "@pa:ss%"}
    assert isinstance(config.max_failed, float)
    with pytest.raises(InputError) as caught:
        from_flags("--prompts", "p", "--output", "o", "--storage-options", '{secret: "hunter2')
    assert "hunter2" not in str(caught.value)


def test_a_broken_job_file_is_not_quoted(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text('storage_options: {secret: "hunter2\n')
    with pytest.raises(InputError, match="is not YAML at line") as caught:
        JobConfig.load(tmp_path / "job.yaml")
    assert "hunter2" not in str(caught.value)


def test_secrets_are_taken_out_of_text_and_options() -> None:
    options = {"key": "AKIA123456", "secret": "s3cr3t-value", "client_kwargs": {"endpoint_url": "http://u:pw@host"}}
    text = redact("GET s3://user:pass@bucket/x?sig=abc failed for AKIA123456 with s3cr3t-value", options)
    assert not any(secret in text for secret in ("AKIA123456", "s3cr3t-value", "user:pass", "sig=abc"))
    cleaned = str(redacted_options(options))
    assert not any(secret in cleaned for secret in ("AKIA123456", "s3cr3t", "u:pw"))


def test_all_below_a_secret_name_is_secret_and_so_is_a_password_with_quotes() -> None:
    options: dict[str, Any] = {
        "headers": {"X-Access": "hunter2hunter2"},
        "client_kwargs": {"cookies": {"session": ["sessionsecret99"]}},
        "password": 12345678,
    }
    assert not any(secret in str(redacted_options(options)) for secret in ("hunter2", "sessionsecret", "12345678"))
    assert redact("got hunter2hunter2, sessionsecret99 and 12345678", options) == "got ***, *** and ***"
    assert redact("can't open \"ftp://bob:hunt'er2@host/x\"") == 'can\'t open "ftp://***@host/x"'
