"""`ray up` for real, with the repository's own cluster.yaml: three hosts that are namespaces of this machine.

    python tests/cluster/ray_up.py        # as root; needs iproute2, openssh-server, rsync and an installed gaudi-batch

Each host has its own network, process ids, hostname, home, /tmp and sshd; a bridge joins them with a fourth namespace
in which `ray up`, `gaudi-batch submit` and `ray down` run. All of it is one process tree in namespaces of its own:
when that ends, however it ends, the network and every process are gone; the directory it worked in, under /var/tmp, is
removed, unless by `kill -9`. A script beside this one stands in for Docker, and what runs pip is left out; the rest of
cluster.yaml is used as it stands.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent.parent
BIN = Path(sys.executable).parent
NETWORK = "10.77.0"
HEAD, WORKERS = "gaudi-head", ("gaudi-a", "gaudi-b")
ADDRESSES = {HEAD: f"{NETWORK}.10", WORKERS[0]: f"{NETWORK}.11", WORKERS[1]: f"{NETWORK}.12"}
MODULES = {WORKERS[0]: (0, 1), WORKERS[1]: (4, 5)}
ROWS = 64
COMMAND_TIMEOUT_S = 200
READY_TIMEOUT_S = 60

HOST = """
set -eu
mount --bind "$1/tmp" /tmp
mount --bind "$1/passwd" /etc/passwd
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
hostname "$2"
until ip link show eth0 > /dev/null 2>&1; do sleep 0.05; done
ip link set lo up
ip address add "$3/24" dev eth0
ip link set eth0 up
ip route add default via "$4"
exec /usr/sbin/sshd -D -e -f "$1/sshd_config"
"""
SSHD = """
HostKey {home}/host_key
AuthorizedKeysFile {home}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
"""


def what_is_missing() -> str | None:
    """Why this machine can't do it, or None."""
    if os.geteuid() != 0:
        return "namespaces and their networks need root"
    for tool in ("ip", "ssh", "ssh-keygen", "ssh-keyscan", "rsync", "unshare", "setpriv"):
        if shutil.which(tool) is None:
            return f"there is no {tool}"
    if not Path("/usr/sbin/sshd").exists():
        return "there is no sshd (openssh-server)"
    if any(path.is_relative_to("/tmp") for path in (REPOSITORY, Path(sys.prefix), Path(sys.base_prefix))):
        return "each host has its own /tmp, so the repository and Python must be elsewhere"
    bridge = ["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "ip", "link", "add", "br0", "type", "bridge"]
    tried = subprocess.run(bridge, capture_output=True, text=True, check=False)
    return f"namespaces with a bridge can't be made: {tried.stderr.strip()}" if tried.returncode else None


def main() -> None:
    """Does it all in namespaces, and removes what is left of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    inside = parser.parse_args().inside
    if inside is not None:
        try:
            play(inside)
        except BaseException:
            show_logs(inside)
            raise
        return
    missing = what_is_missing()
    if missing:
        sys.exit(missing)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    home = Path(tempfile.mkdtemp(prefix="gaudi-batch-ray-up-", dir="/var/tmp"))
    try:
        alone = ["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
        # The tree ends with this process, also when this one is killed.
        command = ["setpriv", "--pdeathsig", "KILL", *alone, sys.executable, __file__, "--inside", str(home)]
        code = subprocess.run(command, check=False).returncode
    finally:
        for _ in range(10):
            shutil.rmtree(home, ignore_errors=True)
            if not home.exists():
                break
            time.sleep(0.2)
    sys.exit(code)


def play(home: Path) -> None:
    """From nothing to a finished job, and back."""
    laptop = home / "laptop"
    for directory in ("tmp", ".ray", ".ssh"):
        (laptop / directory).mkdir(parents=True)
    run(["mount", "--bind", str(laptop / "tmp"), "/tmp"])
    run(["hostname", "laptop"])
    for key in ("key", "host_key"):
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / key)])
    for command in ("link set lo up", "link add br0 type bridge", "link set br0 up"):
        run(["ip", *command.split()])
    run(["ip", "address", "add", f"{NETWORK}.1/24", "dev", "br0"])
    os.environ |= {"HOME": str(laptop), "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    os.environ |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ["RAY_AUTH_MODE"] = "token"
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        os.environ.pop(name, None)
    os.chdir(laptop)
    for number, (name, address) in enumerate(ADDRESSES.items()):
        start_host(home, number, name, address)
    until(lambda: all(map(ssh_answers, ADDRESSES.values())), "no sshd answers")
    step("three hosts have sshd")

    run(["ray", "get-auth-token", "--generate"])
    cluster_file = laptop / "cluster.yaml"
    cluster_file.write_text(yaml.safe_dump(cluster(home)))
    (laptop / "dist").mkdir()
    shutil.copy(REPOSITORY / "constraints-gaudi.txt", laptop / "dist")
    run(["ray", "up", "-y", str(cluster_file)])
    step("ray up has started the head")
    with tunnel(cluster_file):
        until(lambda: " 0.0/4.0 HPU" in run(["ray", "exec", str(cluster_file), "ray status"]).stdout, "no workers")
        step("the head's autoscaler has started the workers")
        submit_and_check(home)
    run(["ray", "down", "-y", str(cluster_file)])
    step("ray down is done")
    until(lambda: not rays(), "Ray's processes are still there")
    step("no process of Ray is left on any host")


def cluster(home: Path) -> dict[str, Any]:
    """The repository's cluster.yaml for these hosts."""
    text = (REPOSITORY / "cluster.yaml").read_text()
    # A host's own directory is /tmp; the others are this machine's.
    config: dict[str, Any] = yaml.safe_load(re.sub("/(opt|etc)/gaudi-batch", r"/tmp/\1", text))
    config["provider"] |= {"head_ip": ADDRESSES[HEAD], "worker_ips": [ADDRESSES[name] for name in WORKERS]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(home / "key")}
    config["setup_commands"] = [command for command in config["setup_commands"] if "pip install" not in command]
    # What habana_frameworks would count on a node.
    config["worker_start_ray_commands"][-1] += " --num-cpus=1 --resources='{\"HPU\": 2}'"
    config["head_start_ray_commands"][-1] += " --num-cpus=1"
    return config


def start_host(home: Path, number: int, name: str, address: str) -> None:
    """A host: namespaces around an sshd, and a cable to the bridge."""
    host = home / name
    home_of_root = host / "home"
    for directory in (home_of_root / "bin", host / "tmp/etc"):
        directory.mkdir(parents=True)
    users = [line.split(":") for line in Path("/etc/passwd").read_text().splitlines()]
    users = [[*user[:5], str(home_of_root), "/bin/bash"] if user[0] == "root" else user for user in users]
    (host / "passwd").write_text("".join(":".join(user) + "\n" for user in users))
    (host / "sshd_config").write_text(SSHD.format(home=home))
    path = f"{home_of_root}/bin:{BIN}:{os.defpath}"
    (home_of_root / ".bashrc").write_text(f"export PATH={path} PYTHONPATH={REPOSITORY}\n")
    (host / "tmp/etc/credentials.env").write_text("AWS_ACCESS_KEY_ID=of-this-host\n")
    shutil.copy(Path(__file__).with_name("docker"), home_of_root / "bin/docker")
    if name in MODULES:
        hl_smi = home_of_root / "bin/hl-smi"
        hl_smi.write_text("#!/bin/sh\nprintf '%s\\n' " + " ".join(map(str, reversed(MODULES[name]))) + "\n")
        hl_smi.chmod(0o755)
    log = (home / f"{name}.log").open("wb")
    apart = ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
    process = subprocess.Popen(
        [*apart, "bash", "-c", HOST, "host", str(host), name, address, f"{NETWORK}.1"], stdout=log, stderr=log
    )
    # The process is in the new network once it has another one than this process.
    until(lambda: network_of(str(process.pid)) != network_of("self"), "no network")
    run(["ip", "link", "add", f"to{number}", "type", "veth", "peer", "name", "eth0", "netns", str(process.pid)])
    run(["ip", "link", "set", f"to{number}", "master", "br0", "up"])


def network_of(process: str) -> str:
    """The network namespace that a process is in."""
    return str(Path(f"/proc/{process}/ns/net").readlink())


def ssh_answers(address: str) -> bool:
    """Whether an sshd listens there."""
    scan = subprocess.run(["ssh-keyscan", "-T", "1", address], capture_output=True, check=False)
    return bool(scan.stdout)


@contextlib.contextmanager
def tunnel(cluster_file: Path) -> Iterator[None]:
    """`ray dashboard`: the Jobs API at this namespace's own address."""
    process = subprocess.Popen(["ray", "dashboard", str(cluster_file)], stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def submit_and_check(home: Path) -> None:
    """A simulated job on the cards of both workers, its result, and that nobody gets in without the token."""
    prompts, output = home / "prompts.parquet", home / "out"
    pq.write_table(pa.table({"prompt": [f"prompt {row}" for row in range(ROWS)]}), prompts)
    job = ["gaudi-batch", "submit", "--prompts", str(prompts), "--output", str(output), "--device", "simulated"]
    refused = subprocess.run(
        job, env=os.environ | {"RAY_AUTH_MODE": "disabled"}, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "Missing authentication token" in refused.stderr, refused.stderr
    step("submit without the token is refused")
    # So long that the second worker's cards find something to do, however late they start.
    run([*job, "--shard-size", "2", "--simulated.batch-seconds", "1.5", "--job-id", "night-1"])
    assert f"complete: {ROWS} images" in run(["gaudi-batch", "follow", "night-1"]).stdout
    assert f"{ROWS}" in run(["gaudi-batch", "status", str(output)]).stdout
    rows = pq.read_table(output / "manifest.parquet").to_pylist()
    assert sorted(row["row"] for row in rows) == list(range(ROWS)), rows
    assert {row["status"] for row in rows} == {"ok"}, rows
    assert {str(path.relative_to(output)) for path in output.glob("images/*/*")} == {row["path"] for row in rows}
    cards = {row["card"] for row in rows}
    print("cards:", sorted(cards), flush=True)
    assert cards <= {f"{name}-{module}" for name, modules in MODULES.items() for module in modules}, cards
    assert {card.rpartition("-")[0] for card in cards} == set(WORKERS), cards
    step("submit has made every image once, on the cards of both workers")


def rays() -> list[str]:
    """Command lines of Ray's processes on all hosts."""
    commands = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if "raylet" in command or "gcs_server" in command:
                commands.append(command)
    return commands


def show_logs(home: Path) -> None:
    """Prints the ends of the logs that say why a cluster did not come up."""
    logs = [*home.glob("*.log"), *home.glob(f"{HEAD}/tmp/ray/session_2*/logs/monitor.*")]
    for log in logs:
        print(f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-60:], sep="\n", flush=True)


BEGUN = time.monotonic()


def step(done: str) -> None:
    """Says what has been reached, and when."""
    print(f"{time.monotonic() - BEGUN:6.1f} s  {done}", flush=True)


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; shows what it said if it failed."""
    done = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=COMMAND_TIMEOUT_S, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def until(reached: Callable[[], bool], otherwise: str) -> None:
    """Waits for something; raises with the reason if it does not come."""
    end = time.monotonic() + READY_TIMEOUT_S
    while not reached():
        if time.monotonic() > end:
            raise TimeoutError(otherwise)
        time.sleep(0.2)


if __name__ == "__main__":
    main()
