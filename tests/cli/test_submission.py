"""What may be sent to a cluster, and what is refused here."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from helpers import REPOSITORY, called

from gaudi_batch.cluster import jobs_client
from gaudi_batch.cluster.submission import Submission, require_portable
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.errors import InputError


def test_the_handlers_that_an_application_has_on_the_log_of_ray_keep_their_level() -> None:
    handler = logging.NullHandler()
    logging.getLogger("ray").addHandler(handler)
    try:
        with pytest.raises(InputError, match="jobs are submitted to a dashboard"):
            jobs_client.JobsClient("head:8265")
        assert handler.level == logging.NOTSET
        assert not logging.getLogger("ray.dashboard.modules.job.sdk").isEnabledFor(logging.WARNING)
    finally:
        logging.getLogger("ray").removeHandler(handler)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompts": "prompts.parquet"}, "prompts: 'prompts.parquet' is a path of this machine"),
        ({"output": "out"}, "output: 'out' is a path of this machine"),
        ({"model": "gaudi_batch/models/shapes"}, "model: .* is a path of this machine"),
        ({"gaudi": {"config": "./gaudi_config.json"}}, "gaudi.config: .* is a path of this machine"),
        ({"prompts": "https://host/p.parquet?signature=xyzzy"}, "has a secret"),
        ({"output": "s3://user:xyzzy@bucket/out"}, "has a secret"),
        ({"output": "s3://user:xy/zzy@bucket/out"}, "has a secret"),
        ({"prompts": "https://xyzzy@host/p.parquet"}, "has a secret"),
        ({"prompts": "abfs://box@account.dfs.core.windows.net/p?sv=1&sig=xyzzy"}, "has a secret"),
        ({"output": "s3://xyzzy@bucket/out"}, "has a secret"),
        ({"output": "s3://bucket/xyzzyxyzzy/out"}, "has a secret"),
        ({"gaudi": {"recipe_store": "s3://user:xyzzy@bucket/recipes"}}, "gaudi.recipe_store: .*has a secret"),
        ({"gaudi": {"recipe_store": "~/recipes"}}, "gaudi.recipe_store: '~/recipes' is a path of this machine"),
        (
            {"gaudi": {"quantize": {"config": "scales.json", "mode": "measure"}}},
            "gaudi.quantize.config: 'scales.json' is a path of this machine",
        ),
        ({"on_end": "https://hooks/xyzzy"}, r"on_end\[0\]: holds a URL .* variable .* as in on_end: \${SLACK_WEBHOOK}"),
        ({"on_end": ["true", "curl -d @- 'https://hooks/xyzzy'"]}, r"on_end\[1\]: holds a URL"),
        ({"on_end": "HTTPS://hooks/xyzzy"}, r"on_end\[0\]: holds a URL"),
        ({"on_end": "https://${HOST}/xyzzy"}, r"on_end\[0\]: holds a URL"),
        ({"on_end": 'curl -d @- "https://hooks/xyzzy/$STATE"'}, r"on_end\[0\]: holds a URL"),
        ({"on_end": "curl hc-ping.com/8f3c2a1b-aaaa-4bbb-8ccc-123456789abc"}, r"on_end\[0\]: holds .* a secret"),
        ({"on_end": "curl -H 'Authorization: Bearer xyzzyxyzzyxyzzy' host"}, r"on_end\[0\]: holds .* a secret"),
        ({"on_end": "curl hooks.slack.com/T0/B0/xyzzy0123456789abcdef01"}, r"on_end\[0\]: holds .* a secret"),
        ({"on_end": "tell xyzzyxyzzy"}, r"on_end\[0\]: holds .* a secret"),
        ({"storage_options": {"secret": "xyzzy"}}, "storage_options: holds a secret"),
        ({"prompts_storage_options": {"client_kwargs": {"token": "xyzzy"}}}, "prompts_storage_options: holds a secret"),
    ],
)
def test_what_means_nothing_elsewhere_or_is_secret_does_not_leave(
    fields: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "xyzzyxyzzy")
    job = {"prompts": "s3://bucket/p", "output": "s3://bucket/out", "model": "some/model"} | fields
    with pytest.raises(InputError, match=message) as refused:
        require_portable(JobConfig.model_validate(job))
    assert "xyzzy" not in str(refused.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompts": "s3://bucket/part-?.parquet"},
        {"prompts": "s3://bucket/day=0?/hour=1/*.parquet"},
        {"output": "abfs://box@account.dfs.core.windows.net/out"},
        {"output": "s3://bucket/team@example/a:b@c"},
        {"output": "s3://bucket/latest"},
        {
            "on_end": [
                "${HOOK}",
                'curl -d @- "$HOOK"',
                "/home/u/run_on_end_of_batch_2026.sh --to-everybody-who-wants-it-in-2026",
            ]
        },
    ],
)
def test_a_url_that_only_looks_like_a_secret_may_leave(
    fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    job = {"prompts": "s3://bucket/p", "output": "s3://bucket/out", "model": "some/model"} | fields
    require_portable(JobConfig.model_validate(job))


def test_the_script_names_its_flags() -> None:
    script = [sys.executable, str(REPOSITORY / "jobs/text_to_image.py")]
    result = subprocess.run(script, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "--config" in result.stderr


@pytest.mark.parametrize(("flags", "sent"), [((), False), (("--log-format", "json"), True)])
def test_the_driver_logs_in_the_format_that_submit_was_given(
    flags: tuple[str, ...], sent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[Submission] = []

    class Client:
        def __init__(self, address: str) -> None:
            self.address = address

        def submit(self, submission: Submission) -> str:
            submitted.append(submission)
            return "a-job"

    monkeypatch.setattr(jobs_client, "JobsClient", Client)
    job = ("--prompts=s3://bucket/p", "--output=s3://bucket/out", "--device=simulated")
    ended = called("submit", *job, "--address=http://head:8265", "--no-wait", *flags)
    assert (ended.returncode, ended.stdout) == (0, "job: a-job\n"), ended.stderr
    assert ("--log-format=json" in submitted[0].entrypoint) == sent
