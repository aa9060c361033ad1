"""The same of all nodes of a Ray cluster, and what only a comparison shows: clocks, versions, and the cards that Ray
sees."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gaudi_batch.config.schema import JobConfig
from gaudi_batch.doctor.line import Line, bad, note, ok
from gaudi_batch.doctor.node import (
    PART_TIMEOUT_S,
    WITHOUT_CARDS,
    Answer,
    Question,
    examine,
    leave_mark,
    modules_here,
    remove_mark,
    sees_mark,
)
from gaudi_batch.text import one_line

NODE_TIMEOUT_S = 300.0
"""Seconds that a node may take to answer, the import of torch on it among them."""
CLOCK_S = 5.0
"""Seconds by which clocks may differ: S3 refuses signatures that are 15 minutes off, and records of cards that are
this far off mislead."""
SAME_EVERYWHERE = ("packages", "driver", "habana_frameworks", "optimum-habana")
"""Lines whose values nodes must share: all cards of a run must have the same."""


def examine_here(question: Question) -> dict[str, list[Line]]:
    """The lines of this node, by its name."""
    return {socket.gethostname(): examine(question).lines}


def examine_cluster(question: Question, address: str) -> dict[str, list[Line]]:
    """The lines of each node of a cluster, by its name.

    Raises:
        InputError: no cluster answers at the address.
    """
    from gaudi_batch.cluster.connection import attached

    with attached(address):
        import ray
        from ray.exceptions import RayError

        nodes = {_name(node): node for node in ray.nodes() if node["Alive"]}
        cards = {name: int(node["Resources"].get("HPU", 0)) for name, node in nodes.items()}
        makes_images, question = _who_makes_images(nodes, cards, question)
        asked = {}
        for name, node in nodes.items():
            is_first = name == next((each for each, makes in makes_images.items() if makes), None)
            of_node = replace(question, whole=is_first)
            if not makes_images[name]:
                of_node = replace(of_node, device=WITHOUT_CARDS)
            asked[name] = _on(node, examine).remote(of_node)
        lines = {}
        clocks: dict[str, float] = {}
        until = time.monotonic() + NODE_TIMEOUT_S
        for name, pending in asked.items():
            answer = _answer(pending, until)
            if isinstance(answer, Line):
                lines[name] = [answer]
                continue
            lines[name] = answer.lines
            try:
                clocks[name] = _offset(nodes[name])
            except RayError as error:
                lines[name].append(bad("clock", f"no answer: {one_line(error, 200)}", "look at its Ray: ray status"))
        if question.job is not None:
            _compare_outputs(question.job, nodes, lines)
    for name, own in lines.items():
        if name in clocks:
            own.append(_clock_line(name, clocks))
        if not makes_images[name]:
            own.insert(0, ok("cards", "none by hl-smi and none in Ray, so it makes no images"))
        elif question.device == "hpu":
            own[:] = [_with_ray(line, cards[name]) if line.what == "cards" else line for line in own]
    if not any(makes_images.values()):
        for own in lines.values():
            own.append(note("nodes with cards", "none yet", "the autoscaler starts them for the job; ask again then"))
    _compare({name: own for name, own in lines.items() if makes_images[name]})
    return lines


def _who_makes_images(
    nodes: Mapping[str, Any], cards: Mapping[str, int], question: Question
) -> tuple[dict[str, bool], Question]:
    """Which nodes make images, and the question for a device that is known. A node counts that has cards, whether Ray
    sees them or not."""
    import ray
    from ray.exceptions import RayError

    modules = {}
    for name, pending in {name: _on(node, modules_here).remote() for name, node in nodes.items()}.items():
        modules[name] = 0
        with contextlib.suppress(RayError):  # as its other lines will say
            modules[name] = ray.get(pending, timeout=NODE_TIMEOUT_S)
    has_cards = {name: cards[name] > 0 or modules[name] > 0 for name in nodes}
    if question.device == "auto":
        question = replace(question, device="hpu" if any(has_cards.values()) else "cpu")
    if question.device != "hpu":
        return dict.fromkeys(nodes, True), question
    is_asked_for = question.job is not None and question.job.asks_for_cards
    return has_cards if any(has_cards.values()) or is_asked_for else dict.fromkeys(nodes, True), question


def _on(node: Mapping[str, Any], function: Any) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(function).options(num_cpus=0, scheduling_strategy=strategy, max_retries=0)


def _answer(pending: Any, until: float) -> Answer | Line:
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    try:
        answer: Answer = ray.get(pending, timeout=max(1.0, until - time.monotonic()))
    except GetTimeoutError:
        return bad("node", f"no answer for {NODE_TIMEOUT_S:.0f} s", "look at its Ray: ray status, and the node's log")
    except (RayError, ImportError) as error:
        text = one_line(str(error).strip().rpartition("\n")[2], 300)
        is_missing = "ModuleNotFoundError" in text or "ImportError" in text or isinstance(error, ImportError)
        return bad("node", text, "install the same gaudi-batch there" if is_missing else "look at its Ray: ray status")
    return answer


def _offset(node: Mapping[str, Any]) -> float:
    """Seconds by which a node's clock is ahead of this machine's: half of the way of a question is taken off. Of a few
    questions the quickest counts."""
    import ray

    ask = _on(node, _now)
    best = (float("inf"), 0.0)
    for _ in range(5):
        sent = time.time()
        remote = float(ray.get(ask.remote(), timeout=NODE_TIMEOUT_S))
        came = time.time()
        best = min(best, (came - sent, remote - (sent + came) / 2))
    return best[1]


def _now() -> float:
    return time.time()


def _clock_line(name: str, clocks: Mapping[str, float]) -> Line:
    middle = sorted(clocks.values())[len(clocks) // 2]
    off = clocks[name] - middle if len(clocks) > 2 else clocks[name]
    text = f"{off:+.1f} s beside {'the others' if len(clocks) > 2 else 'this machine'}"
    if abs(off) > CLOCK_S:
        return bad("clock", text, "set it: timedatectl set-ntp true, or chronyc makestep")
    return ok("clock", text)


def _compare_outputs(job: JobConfig, nodes: Mapping[str, Any], lines: Mapping[str, list[Line]]) -> None:
    """Marks nodes that do not see what another has written: a directory of the same name on a disk of their own takes
    images that nobody finds."""
    import ray
    from ray.exceptions import RayError

    places = {
        name: (own, number)
        for name, own in lines.items()
        for number, line in enumerate(own)
        if line.what == "output" and line.verdict == "ok"
    }
    if len(places) < 2:
        return
    writer, *readers = places
    own, number = places[writer]
    try:
        place, mark = ray.get(_on(nodes[writer], leave_mark).remote(job), timeout=PART_TIMEOUT_S)
    except RayError as error:
        own[number] = bad("output", one_line(error, 300), "run the doctor again")
        return
    try:
        until = time.monotonic() + PART_TIMEOUT_S
        asked = {name: _on(nodes[name], sees_mark).remote(job, place, mark) for name in readers}
        for reader, pending in asked.items():
            own, number = places[reader]
            try:
                if not ray.get(pending, timeout=max(1.0, until - time.monotonic())):
                    text = f"{job.output} here is not what {writer} has under that name"
                    own[number] = bad("output", text, "a local path must be on a file system that all nodes share")
            except RayError as error:
                own[number] = bad("output", one_line(error, 300), "run the doctor again")
    finally:
        with contextlib.suppress(RayError):
            ray.get(_on(nodes[writer], remove_mark).remote(job, place, mark), timeout=PART_TIMEOUT_S)


def _with_ray(line: Line, cards: int) -> Line:
    """The line of the cards, with those that Ray sees."""
    value = f"{line.value}, Ray {cards}"
    match = re.search(r"torch (\d+)", line.value)
    if line.verdict != "bad" and match and int(match[1]) != cards:
        return bad(
            "cards", value, "start Ray on this node anew, after the driver, with the same HABANA_VISIBLE_MODULES"
        )
    return Line(line.what, line.verdict, value, line.advice)


def _compare(lines: Mapping[str, list[Line]]) -> None:
    """Marks what differs from what most nodes have."""
    for what in SAME_EVERYWHERE:
        values = Counter(line.value for own in lines.values() for line in own if line.what == what)
        if len(values) < 2:
            continue
        (common, most), (_, second), *_ = values.most_common()
        others = f"most nodes have {common}" if most > second else f"nodes have {' or '.join(sorted(values))}"
        for own in lines.values():
            for place, line in enumerate(own):
                if line.what == what and (line.value != common or most == second) and line.verdict == "ok":
                    own[place] = note(what, line.value, f"{others}; all cards of a run must have the same")


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {str(node['NodeID'])[:6]})"
