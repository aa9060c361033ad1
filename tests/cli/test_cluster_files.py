"""The files for Ray's cluster launcher and for KubeRay: what checks them there accepts them here, and they hold what
Gaudi cards, Ray's token and Intel's torch need."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from helpers import REPOSITORY
from ray.autoscaler._private.kuberay.autoscaling_config import _get_ray_resources_from_group_spec
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli as ray_cli

from gaudi_batch.cluster.jobs_client import STOP_MARGIN_S
from gaudi_batch.config.schema import JobConfig

LOCAL, AWS = REPOSITORY / "cluster.yaml", REPOSITORY / "jobs/clusters/aws-dl1.yaml"
RAYJOB = REPOSITORY / "jobs/k8s/rayjob.yaml"
KUBERAY = REPOSITORY.parent / "shared/data/ray.io_rayjobs.yaml"
"""KubeRay's own definition of a RayJob, 25,000 lines; where it is not there, the assertions below stand alone."""
CARD_OPTIONS = {
    "--runtime=habana",
    "-e HABANA_VISIBLE_DEVICES=all",
    "-e OMPI_MCA_btl_vader_single_copy_mechanism=none",
    "--cap-add=sys_nice",
}

launcher_file = pytest.mark.parametrize("file", [LOCAL, AWS], ids=lambda file: file.name)


def prepared(file: Path) -> dict[str, Any]:
    """A launcher file as `ray up` completes it."""
    config: dict[str, Any] = prepare_config(yaml.safe_load(file.read_text()))
    return config


def constraints() -> dict[str, set[str]]:
    """The versions of constraints-gaudi.txt; a package may have one for each Python."""
    versions: dict[str, set[str]] = {}
    for line in (REPOSITORY / "constraints-gaudi.txt").read_text().splitlines():
        if match := re.match(r"([\w.-]+)==([\w.]+)", line):
            versions.setdefault(match[1], set()).add(match[2])
    return versions


# -- Ray's cluster launcher ---------------------------------------------------------------------------------------


@launcher_file
def test_ray_s_own_validator_accepts_it(file: Path) -> None:
    validate_config(prepared(file))


@launcher_file
def test_cards_get_the_docker_options_that_they_need(file: Path) -> None:
    docker = prepared(file)["docker"]
    assert set(docker["worker_run_options"]) == CARD_OPTIONS
    assert "--ipc=host" in docker["run_options"]
    every = docker["run_options"] + docker["worker_run_options"] + docker.get("head_run_options", [])
    # Ray adds it, and Docker refuses a network that is named twice.
    assert not [option for option in every if "--net" in option]


@launcher_file
def test_the_container_is_intel_s_with_rsync_for_ray(file: Path) -> None:
    config = prepared(file)
    (make,) = config["initialization_commands"]
    image = config["docker"]["image"]
    release = image.removeprefix("gaudi-batch:")
    assert f"FROM vault.habana.ai/gaudi-docker/{release}/ubuntu22.04/habanalabs/pytorch-installer-" in make
    assert "apt-get install -y --no-install-recommends rsync" in make
    assert make.endswith(f"docker build -t {image} -")
    assert config["docker"]["pull_before_run"] is False
    made = subprocess.run(
        ["bash", "-c", "docker() { [ $1 = build ] && cat; }; " + make], capture_output=True, text=True, check=True
    )
    assert [line.split()[0] for line in made.stdout.splitlines()] == ["FROM", "RUN", "RUN"]


@launcher_file
def test_no_command_installs_torch_or_another_version_than_the_tested_one(file: Path) -> None:
    config = yaml.safe_load(file.read_text())
    commands = [*config["setup_commands"], *config.get("head_setup_commands", [])]
    installs = [command for command in commands if "pip install" in command]
    assert installs
    for command in installs:
        assert "constraints-gaudi.txt" in command or "--no-deps" in command
        assert not re.search(r" (--upgrade|-U)\b", command)
    assert "torch" not in constraints()
    first = next(command for command in installs if "[gaudi" in command)
    assert "-c /tmp/torch.txt" in first
    assert commands.index(first) > commands.index(next(c for c in commands if "> /tmp/torch.txt" in c))
    named = re.findall(r"([A-Za-z][\w.-]*)(?:\[\w+\])?==([\w.]+)", " ".join(installs))
    for package, version in named:
        assert constraints()[package] == {version}


@launcher_file
def test_all_nodes_ask_for_the_same_token(file: Path) -> None:
    config = prepared(file)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert re.search(r"export RAY_AUTH_MODE=token .*; ray start ", commands[-1])


def test_a_local_node_s_modules_are_named_as_hl_smi_shows_them(tmp_path: Path) -> None:
    config = prepared(LOCAL)
    for command in (config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]):
        show = 'ray() { echo "modules: ${HABANA_VISIBLE_MODULES-none}"; }; ' + command

        def modules(show: str = show, **environment: str) -> str:
            given = {"PATH": f"{tmp_path}:{os.defpath}"} | environment
            return subprocess.run(["bash", "-c", show], capture_output=True, text=True, env=given, check=True).stdout

        (tmp_path / "hl-smi").unlink(missing_ok=True)
        assert modules() == "modules: none\n"
        (tmp_path / "hl-smi").write_text("#!/bin/sh\necho ' 10'; echo 7; echo 'no name'\n")
        (tmp_path / "hl-smi").chmod(0o755)
        assert modules() == "modules: 7,10\n"
        assert modules(HABANA_VISIBLE_MODULES="2,3") == "modules: 2,3\n"


def test_every_local_worker_is_used() -> None:
    config = prepared(LOCAL)
    workers = len(config["provider"]["worker_ips"])
    (kind,) = config["available_node_types"].values()
    assert (kind["min_workers"], kind["max_workers"]) == (workers, workers)


def test_aws_grows_from_nothing_by_nodes_of_eight_cards() -> None:
    config = prepared(AWS)
    kinds = config["available_node_types"]
    assert kinds["head"]["max_workers"] == 0
    assert not kinds["head"]["node_config"]["InstanceType"].startswith("dl1")
    assert (kinds["dl1"]["min_workers"], kinds["dl1"]["max_workers"]) == (0, config["max_workers"])
    assert kinds["dl1"]["resources"]["HPU"] == 8
    assert kinds["dl1"]["node_config"]["InstanceType"] == "dl1.24xlarge"
    assert config["idle_timeout_minutes"] > 0
    # The last release of Intel's with first-generation cards.
    assert config["docker"]["image"] == "gaudi-batch:1.21.0"


@pytest.mark.parametrize("file", [LOCAL, AWS, RAYJOB], ids=lambda file: file.name)
def test_each_file_says_what_to_change_and_how_to_use_it(file: Path) -> None:
    top = file.read_text().partition("\n\n")[0]
    for word in ("# Change:", "# Once:", "# Use", "# End:"):
        assert word in top
    assert max(map(len, file.read_text().splitlines())) <= 120


def test_documented_commands_and_flags_exist() -> None:
    texts = [file.read_text() for file in (LOCAL, AWS, RAYJOB, REPOSITORY / "docs/cluster.md")]
    text = "\n".join(texts).replace("\\\n", " ")
    commands = {match for match in re.findall(r"gaudi-batch (run|submit|follow|check|stop|status)\b", text)}
    helps = ""
    for command in sorted(commands):
        asked = [sys.executable, "-m", "gaudi_batch", command, "--help"]
        helps += subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    flags = set(re.findall(r"(--[a-z][\w.-]*)", helps))
    for line in re.findall(r"gaudi-batch (?:run|submit|follow|check|stop|status)\b[^`\n#]*", text):
        assert set(re.findall(r" (--[a-z][\w.-]*)", line)) <= flags, line
    for flag in re.findall(r"`(--[a-z][\w.-]*)", (REPOSITORY / "docs/cluster.md").read_text()):
        assert flag in flags
    of_ray = re.findall(r"(?:^|[`'#&] +|[`']|gaudi-batch )ray ((?:job )?[a-z][a-z-]+)([^`\n#']*)", text, re.MULTILINE)
    assert {name for name, _ in of_ray} >= {
        "up",
        "down",
        "dashboard",
        "exec",
        "job submit",
        "drain-node",
        "get-auth-token",
    }
    for name, rest in of_ray:
        known: Any = ray_cli
        for word in name.split():
            known = known.commands[word]
        options = {option for parameter in known.params for option in parameter.opts}
        given = rest.partition(" -- ")[0]
        assert set(re.findall(r" (--[a-z][\w-]*)", given)) <= options, (name, rest)


# -- KubeRay ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documents() -> dict[str, dict[str, Any]]:
    """The documents of the RayJob's file by kind, without YAML's aliases."""
    loaded = [copy.deepcopy(document) for document in yaml.safe_load_all(RAYJOB.read_text())]
    return {document["kind"]: json.loads(json.dumps(document)) for document in loaded}


@pytest.fixture(scope="module")
def pods(documents: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The pods' specs by what they are for."""
    spec = documents["RayJob"]["spec"]
    cluster = spec["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    return {
        "submitter": spec["submitterPodTemplate"]["spec"],
        "head": cluster["headGroupSpec"]["template"]["spec"],
        "worker": workers["template"]["spec"],
    }


def closed(schema: Any) -> Any:
    """A definition of an API server's as one that refuses fields which that server would drop without a word."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    named = isinstance(schema.get("properties"), dict) and "type" in schema
    if named and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    if schema.get("nullable"):
        result["type"] = [schema["type"], "null"]
    return result


def test_the_rayjob_is_what_kuberay_defines(documents: dict[str, dict[str, Any]]) -> None:
    job = documents["RayJob"]
    assert (job["apiVersion"], job["metadata"]["name"]) == ("ray.io/v1", "gaudi-batch")
    if KUBERAY.exists():
        versions = yaml.load(KUBERAY.read_text(), yaml.CSafeLoader)["spec"]["versions"]
        schema = next(version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")
        schema["properties"]["metadata"] = {}  # an API server has its own definition of it
        strict = closed(schema)
        jsonschema.validate(job, strict)
        wrong = copy.deepcopy(job)
        wrong["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resource"] = {}
        with pytest.raises(jsonschema.ValidationError, match="resource"):
            jsonschema.validate(wrong, strict)


def test_the_autoscaler_counts_eight_cards_a_node_and_none_on_the_head(documents: dict[str, dict[str, Any]]) -> None:
    cluster = documents["RayJob"]["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert workers["minReplicas"] == workers["replicas"] == 0
    assert _get_ray_resources_from_group_spec(workers, False)["HPU"] == 8
    head = _get_ray_resources_from_group_spec(cluster["headGroupSpec"], True)
    assert (head["HPU"], head["CPU"]) == (0, 0)
    config = yaml.safe_load(documents["ConfigMap"]["data"]["job.yaml"])
    assert config["max_cards"] == 8 * workers["maxReplicas"]


def test_worker_pods_get_cards_hugepages_and_shared_memory(pods: dict[str, dict[str, Any]]) -> None:
    (container,) = pods["worker"]["containers"]
    limits = container["resources"]["limits"]
    assert container["resources"]["requests"] == limits
    assert limits["habana.ai/gaudi"] == 8
    assert limits["hugepages-2Mi"] == "95000Mi"
    assert int(limits["hugepages-2Mi"].removesuffix("Mi")) % 2 == 0
    assert {"cpu", "memory"} <= set(limits)  # without which there are no hugepages
    assert "habana.ai/gaudi" not in pods["head"]["containers"][0]["resources"]["limits"]
    for name in ("head", "worker"):
        (container,) = pods[name]["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pods[name]["volumes"]}
        assert set(mounts.values()) == set(volumes)
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        # It counts as the pod's memory.
        shared = volumes[mounts["/dev/shm"]]["emptyDir"]["sizeLimit"]
        assert int(shared.removesuffix("Gi")) * 2 <= int(container["resources"]["limits"]["memory"].removesuffix("Gi"))


def test_an_administrator_finds_nothing_to_refuse(pods: dict[str, dict[str, Any]]) -> None:
    for name, pod in pods.items():
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert not [volume for volume in pod.get("volumes", []) if "hostPath" in volume]
        for container in pod["containers"]:
            context = pod.get("securityContext", {}) | container["securityContext"]
            assert not context.get("privileged")
            assert context["allowPrivilegeEscalation"] is False
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}
            assert context["capabilities"] == ({"add": ["SYS_NICE"]} if name == "worker" else {"drop": ["ALL"]})
            assert name == "worker" or context["runAsNonRoot"] is True
            assert context["runAsUser"] == (0 if name == "worker" else 1000)
            resources = container["resources"]
            assert resources["requests"] == resources["limits"]
    # The head's account may scale its cluster; nobody else needs one.
    assert pods["worker"]["automountServiceAccountToken"] is pods["submitter"]["automountServiceAccountToken"] is False
    assert "automountServiceAccountToken" not in pods["head"]
    assert pods["submitter"]["restartPolicy"] == "Never"


def test_versions_and_images_are_the_tested_ones(
    documents: dict[str, dict[str, Any]], pods: dict[str, dict[str, Any]]
) -> None:
    assert {documents["RayJob"]["spec"]["rayClusterSpec"]["rayVersion"]} == constraints()["ray"]
    assert len({container["image"] for pod in pods.values() for container in pod["containers"]}) == 1
    release = prepared(LOCAL)["docker"]["image"].removeprefix("gaudi-batch:")
    assert pods["worker"]["containers"][0]["image"].endswith(f":{release}")


def test_secrets_come_by_reference(documents: dict[str, dict[str, Any]], pods: dict[str, dict[str, Any]]) -> None:
    spec = documents["RayJob"]["spec"]
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    for name in ("head", "worker"):
        (container,) = pods[name]["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "gaudi-batch-credentials", "optional": True}}]
        assert not [variable for variable in container["env"] if "TOKEN" in variable["name"]]
    assert "envFrom" not in pods["submitter"]["containers"][0]
    assert int(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) == 30 + STOP_MARGIN_S


def test_the_job_in_the_config_map_is_a_job(documents: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(documents["ConfigMap"]["data"]["job.yaml"])
    assert JobConfig.load(tmp_path / "job.yaml").asks_for_cards


@pytest.mark.parametrize(("code", "seen"), [(0, 0), (1, 1), (2, 2), (3, 0), (130, 130)])
def test_a_job_with_failed_rows_is_done_and_not_tried_again(
    code: int, seen: int, documents: dict[str, dict[str, Any]], pods: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    spec = documents["RayJob"]["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in pods["head"]["containers"][0]["volumeMounts"]}
    assert spec["entrypoint"] == f"bash {mounts['job']}/run.sh"
    (tmp_path / "run.sh").write_text(documents["ConfigMap"]["data"]["run.sh"])
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nexit {code}\n')
    python.chmod(0o755)
    bash = shutil.which("bash")
    assert bash is not None
    ran = subprocess.run([bash, tmp_path / "run.sh"], env={"PATH": str(tmp_path)}, capture_output=True, check=False)
    assert ran.returncode == seen
    assert (tmp_path / "asked").read_text() == f"-m gaudi_batch run {mounts['job']}/job.yaml\n"
    assert 0 < spec["backoffLimit"] <= 5
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
