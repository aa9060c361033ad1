"""The command that a report names is the job again."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from gaudi_batch import JobConfig
from gaudi_batch.cli.flags import job_from
from gaudi_batch.cli.parser import parse
from gaudi_batch.config.command import run_command
from gaudi_batch.redaction import redacted_options

NEEDED = {"prompts": "s3://b/my prompts/*.parquet", "output": "out", "model": "some/model"}
FIELDS: list[dict[str, Any]] = [
    {},
    {"columns": {"prompt": "my caption", "id": "key"}, "carry": ["a b", "c"]},
    {"carry": ["*"], "cards": 3, "use_safetensors": False},
    {"negative_prompt": "--no $(rm -rf) 'quotes' \"and\" \n lines", "seed": 2**63 - 1, "guidance_scale": 1e-7},
    {"negative_prompt": "-blurry", "steps": 7, "min_cards": 2, "max_cards": 4},
    {"encoding": {"type": "jpeg", "quality": 80}, "format": "parquet", "dtype": "bfloat16"},
    {"lora": [{"path": "style", "scale": 0.5}, {"path": "s3://b/x.safetensors", "weight_name": "w"}]},
    {"gaudi": {"recipe_store": None, "recipe_cache": None, "max_graphs": 3, "config": {"use_torch_autocast": False}}},
    {"gaudi": {"quantize": {"config": "q.json", "mode": "measure"}}, "cards": 1, "device": "hpu"},
    {"gaudi": {"config": "Habana/stable-diffusion"}, "limits": {"batch": 90.5}, "cpu": {"threads": 2}},
    {"device": "simulated", "simulated": {"raise_rows": [1, 2], "seconds_by_size": {"64x64": 0.5}}, "limit": 5},
    {"storage_options": {"endpoint_url": "http://127.0.0.1:9000"}, "price_per_card_hour": 2.5},
]


@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: "-".join(fields) or "nothing")
def test_the_command_is_the_same_job(fields: dict[str, Any]) -> None:
    config = JobConfig(**NEEDED | fields)
    program, *arguments = shlex.split(run_command(redacted_options(config.model_dump(mode="json")), "elsewhere"))
    assert program == "gaudi-batch"
    assert job_from(parse(arguments)) == config.model_copy(update={"output": "elsewhere"})


def test_secrets_and_what_belongs_to_one_command_are_left_out() -> None:
    config = JobConfig(
        **NEEDED, storage_options={"key": "AKIA0123456789"}, on_end=[{"url": "https://h.example/s3cret"}]
    )
    config = config.model_copy(update={"deadline": "8h", "budget": 3.0, "max_failed": 12})
    assert run_command(redacted_options(config.model_dump(mode="json")), "x") == (
        "gaudi-batch run --prompts 's3://b/my prompts/*.parquet' --output x --model some/model"
    )


def test_fields_of_other_versions_are_passed_over() -> None:
    assert run_command({"prompts": "p", "later_field": 3, "gaudi": "a text"}, "o") == (
        "gaudi-batch run --prompts p --output o"
    )
