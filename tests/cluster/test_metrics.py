"""A real Prometheus that scrapes the cluster of a running job has an answer to every query of the dashboard."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from helpers import REPOSITORY, called, free_port, only_with, wait_until
from raynodes import RayCluster

from gaudi_batch.card.mailbox import Mailbox
from gaudi_batch.card.messages import CardReport
from gaudi_batch.card.readings import Readings
from gaudi_batch.driver import loop, metrics
from gaudi_batch.driver.metrics import METRICS, run_label

pytestmark = only_with("prometheus")

DASHBOARD = json.loads((REPOSITORY / "monitoring/grafana-dashboard.json").read_text())
CONFIG = (REPOSITORY / "monitoring/prometheus.yml").read_text()
QUERIES = {target["expr"]: panel["title"] for panel in DASHBOARD["panels"] for target in panel["targets"]}
OFTEN = {"enable_metrics_collection": True, "metrics_report_interval_ms": 1000}


@dataclass
class Prometheus:
    """A server that runs."""

    port: int

    def get(self, path: str, **parameters: str) -> Any:
        """What its API answers."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def values(self, query: str) -> list[float]:
        """The values of a query now, those that are no number left out."""
        results = self.get("query", query=query)["result"]
        return [value for result in results if math.isfinite(value := float(result["value"][1]))]

    def is_up(self) -> bool:
        """Whether it answers."""
        with contextlib.suppress(OSError):
            self.get("labels")
            return True
        return False


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A cluster of four cards as `ray start` makes it, that reports each second."""
    head = ("--num-cpus", "4", "--resources", '{"HPU": 4}')
    cluster = RayCluster(tmp_path_factory.mktemp("cluster"), head, dashboard=True, system_config=OFTEN)
    try:
        yield cluster.start()
    finally:
        cluster.stop()


@pytest.fixture
def prometheus(measured: RayCluster, tmp_path: Path) -> Iterator[Prometheus]:
    """One that scrapes this cluster each second, by the repository's own configuration."""
    config = CONFIG
    for before, now in (
        ("/tmp/ray/", f"{measured.session}/"),
        ("scrape_interval: 10s", "scrape_interval: 1s"),
        ("refresh_interval: 10s", "refresh_interval: 1s"),
    ):
        assert config.count(before) == 1
        config = config.replace(before, now)
    (tmp_path / "prometheus.yml").write_text(config)
    subprocess.run(["promtool", "check", "config", tmp_path / "prometheus.yml"], check=True, capture_output=True)
    server = Prometheus(free_port())
    options = [f"--web.listen-address=127.0.0.1:{server.port}", f"--storage.tsdb.path={tmp_path}/data"]
    with (tmp_path / "prometheus.log").open("wb") as log:
        command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", *options]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until(server.is_up)
        yield server
    finally:
        process.kill()
        process.wait()


def as_grafana(query: str, run: str) -> str:
    """A query with its variables filled in."""
    query = query.replace("$run", run).replace("$__rate_interval", "4s")
    assert "$" not in query
    return query


@pytest.mark.usefixtures("thread_cards")
def test_every_query_of_the_dashboard_has_an_answer_while_a_job_runs(
    measured: RayCluster,
    prometheus: Prometheus,
    write_prompts: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts, output = write_prompts({"prompt": [None, *(f"prompt {row}" for row in range(4000))]}), tmp_path / "night"
    monkeypatch.setattr(loop, "METRICS_INTERVAL_S", 0.5)
    poll = Mailbox.poll

    def with_watts(mailbox: Mailbox, acknowledged: int, timeout_s: float) -> CardReport:
        report = poll(mailbox, acknowledged, timeout_s)
        return replace(report, status=replace(report.status, readings=Readings(watts=300.0)))  # as a Gaudi has it

    monkeypatch.setattr(Mailbox, "poll", with_watts)
    over, series = threading.Event(), "sum(ray_gaudi_batch_images_total)"

    def ask() -> None:
        try:
            wait_until(lambda: (output / "run.json").exists())
            run = run_label(str(output), json.loads((output / "run.json").read_text())["run_id"])
            variable = next(variable for variable in DASHBOARD["templating"]["list"] if variable["name"] == "run")
            metric, label = re.findall(r"\w+", variable["query"].removeprefix("label_values"))
            wait_until(lambda: run in prometheus.get(f"label/{label}/values", **{"match[]": metric}))
            unanswered = {as_grafana(query, run): title for query, title in QUERIES.items()}

            def all_are_answered() -> bool:
                for query in [query for query in unanswered if prometheus.values(query)]:
                    del unanswered[query]
                return not unanswered

            with contextlib.suppress(AssertionError):
                wait_until(all_are_answered, 60)
            assert not unanswered
        finally:
            if not over.is_set():
                os.kill(os.getpid(), signal.SIGTERM)  # as a person ends a run

    with ThreadPoolExecutor(1) as asking:
        asked = asking.submit(ask)
        flags = ("--cards", "2", "--batch-size", "4", "--shard-size", "8", "--simulated.batch-seconds", "0.3")
        where = ("--address", measured.address, "--prompts", prompts, "--output", output)
        ended = called("run", *where, "--device", "simulated", *flags)
        over.set()
        asked.result()
    assert ended.returncode == 130, ended.stderr
    assert "metrics" not in ended.stderr
    rows = pa.concat_tables(pq.read_table(path) for path in (output / "manifest").glob("*.parquet"))
    made = rows.filter(pc.field("status") == "ok").num_rows
    wait_until(lambda: prometheus.values(series) == [made])
    wait_until(lambda: {target["health"] for target in prometheus.get("targets")["activeTargets"]} == {"up"})
    names = {name.removesuffix("_bucket") for name in prometheus.get("label/__name__/values") if "gaudi_batch" in name}
    names = {name for name in names if not name.endswith(("_count", "_sum"))}
    assert names == {f"ray_{metric.name}" for metric in METRICS} - {
        f"ray_{metric.name}" for metric in (metrics.RETRIES, metrics.FAULTS)
    }, "nothing failed"
