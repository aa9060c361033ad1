"""What a node needs beside its cards: memory, disk, storage, the hub and the model."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gaudi_batch.config.schema import JobConfig
from gaudi_batch.doctor import hl_smi
from gaudi_batch.doctor.line import Line, bad, note, ok
from gaudi_batch.doctor.stack import gaudi_lines, python_lines
from gaudi_batch.errors import InputError, StorageError
from gaudi_batch.pipelines.gaudi_environment import require_quantization
from gaudi_batch.pipelines.sources import BUILTIN, builtin_directory, describe_model
from gaudi_batch.storage.filesystem import expanded
from gaudi_batch.storage.retry import run_with_timeout
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import counted, one_line

GIB = 1024**3
CACHE_GIB = 50
"""Free space, in GiB, that the largest models of the table (FLUX, Qwen-Image) and their recipes fit into."""
LEAST_GIB = 1
"""Free space, in GiB, without which Ray itself fails."""
SHARED_GIB = 1
"""Shared memory, in GiB, below which Ray keeps its objects on the disk; Docker gives 64 MiB if nothing is said."""
MARK = b"gaudi-batch doctor"
TRY_TIMEOUT_S = 10.0
"""Seconds of one question to storage or to the hub."""
PART_TIMEOUT_S = 60.0
"""Seconds that a part of a job may take, its storage or its model."""
WITHOUT_CARDS = "none"
"""The device of a node that makes no images, such as a head without cards; a driver may run there."""


@dataclass(frozen=True)
class Question:
    """What a node is asked about."""

    device: str
    """hpu, or another for which no card is looked for; auto for what the cards of a cluster say; `WITHOUT_CARDS`."""
    mode: str
    """Of `gaudi.mode`."""
    job: JobConfig | None
    """The job whose storage and model are looked at, if there is one."""
    whole: bool = True
    """Whether to ask, too, whether the job's parts fit together, for which a model in a directory is read whole; one
    node's answer is that of all."""


@dataclass(frozen=True)
class Answer:
    """What a node says of itself."""

    lines: list[Line]


def examine(question: Question) -> Answer:
    """Looks at this node; what hangs or can't be read costs its own line alone."""
    job = question.job
    if job is not None:
        job = job.model_copy(update={"storage_patience": TRY_TIMEOUT_S})
    makes_images = question.device != WITHOUT_CARDS
    lines = list(python_lines(("peft",) if job is not None and job.lora and makes_images else ()))
    if question.device == "hpu":
        lines += gaudi_lines(question.mode)
        lines.append(_hugepages())
    lines += _space(makes_images)
    lines.append(_shared_memory(Path("/dev/shm")))
    if job is None:
        return Answer(lines)
    for what, examine_part in (("output", _storage), ("prompts", _prompts), ("model", _model)):
        lines += _part(what, partial(examine_part, job))
    if makes_images:
        lines += _part("quantization", partial(_quantization, job))
    if question.whole and not any(line.verdict == "bad" or (line.what == "hub" and line.advice) for line in lines):
        lines += _part("job", partial(_whole, job, question.device), note)
    return Answer(lines)


def modules_here() -> int:
    """How many cards hl-smi sees on this node."""
    with contextlib.suppress(hl_smi.NoHlSmi):
        return len(hl_smi.modules())
    return 0


def _part(
    what: str, examine_part: Callable[[], Iterable[Line]], hanging: Callable[[str, str, str], Line] = bad
) -> list[Line]:
    try:
        return run_with_timeout(lambda: list(examine_part()), PART_TIMEOUT_S)
    except TimeoutError:
        text = f"not known: no answer for {PART_TIMEOUT_S:.0f} s"
        return [hanging(what, text, "look at what it reads: a file system, a store or a hub does not answer")]
    except ImportError as error:
        return [bad(what, one_line(error, 200), "install gaudi-batch here with the constraints")]
    except OSError as error:
        return [bad(what, one_line(error, 200), "let the user of the job read it, or name another place")]


def _whole(job: JobConfig, device: str) -> Iterator[Line]:
    """Whether the parts of a job fit together, as a run asks before it begins."""
    from gaudi_batch.job import resolve

    try:
        resolve(job.model_copy(update={"device": device}))
    except (InputError, StorageError) as error:
        yield bad("job", one_line(error, 300), "gaudi-batch check says the same; change the job")
    else:
        yield ok("job", "its parts fit together")


def _quantization(job: JobConfig) -> Iterator[Line]:
    quantize = job.gaudi.quantize
    if quantize is None or job.device in ("cpu", "simulated"):
        return
    try:
        require_quantization(quantize)
    except RuntimeError as error:
        yield bad("quantization", one_line(error, 300), "put both where each node has them")
    else:
        yield ok("quantization", f"{quantize.mode} by {quantize.config}")


def _hugepages() -> Line:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    count = int(fields.get("HugePages_Total", "0"))
    if count:
        return ok("hugepages", f"{count} of {fields.get('Hugepagesize', '').strip()}")
    return note(
        "hugepages", "none", "on the node, outside the container: sudo sysctl -w vm.nr_hugepages=47500 for 8 cards"
    )


def _space(makes_images: bool) -> Iterator[Line]:
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    places = {"disk for models": (cache, CACHE_GIB)} if makes_images else {}
    places["disk of Ray"] = (Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())), 2 * LEAST_GIB)
    for what, (place, wanted) in places.items():
        here = _nearest(place)
        free = shutil.disk_usage(here).free / GIB
        text = f"{free:.1f} GiB free at {here}"
        advice = "make room, or put it elsewhere by " + ("HF_HOME" if "models" in what else "RAY_TMPDIR")
        yield (
            bad(what, text, advice)
            if free < LEAST_GIB
            else note(what, text, advice)
            if free < wanted
            else ok(what, text)
        )


def _shared_memory(place: Path) -> Line:
    if not place.is_dir():
        return note("shared memory", f"no {place}", "Ray keeps its objects on the disk, which is slower")
    size = shutil.disk_usage(place).total / GIB
    if size < SHARED_GIB:
        return note("shared memory", f"{size:.2f} GiB", "start the container with --ipc=host, or --shm-size=8g")
    return ok("shared memory", f"{size:.1f} GiB")


def _storage(job: JobConfig) -> Iterator[Line]:
    try:
        output = Storage(job.output, job.storage_options, TRY_TIMEOUT_S)
        if output.local and not os.path.exists(output.root):  # noqa: PTH110 whatever it may not read is absent
            yield _not_there_yet(Path(output.root))
            return
        started = time.monotonic()
        place, name = leave_mark(job)
        try:
            seen = sees_mark(job, place, name)
        finally:
            remove_mark(job, place, name)
    except (InputError, StorageError) as error:
        yield bad("output", one_line(error, 300), "look at the bucket, the credentials of this node and its network")
    else:
        took = time.monotonic() - started
        if not seen:
            yield bad("output", f"{output.url} does not give back what was written", "look at the store")
        else:
            yield ok("output", f"{output.url}, written, read and removed in {took:.2f} s")


def leave_mark(job: JobConfig) -> tuple[str, str]:
    """Writes a small file into the output, or where a run would make it; returns where that is, and the file's name.
    Raises StorageError."""
    output = Storage(job.output, job.storage_options, TRY_TIMEOUT_S)
    place = str(_nearest(Path(output.root))) if output.local else job.output
    name = f".doctor-{secrets.token_hex(4)}"
    Storage(place, job.storage_options, TRY_TIMEOUT_S).put(name, MARK)
    return place, name


def sees_mark(job: JobConfig, place: str, name: str) -> bool:
    """Whether this node has the file that another has written. Raises StorageError."""
    return Storage(place, job.storage_options, TRY_TIMEOUT_S).get(name) == MARK


def remove_mark(job: JobConfig, place: str, name: str) -> None:
    """Removes it again. Raises StorageError."""
    Storage(place, job.storage_options, TRY_TIMEOUT_S).remove(name)


def _nearest(path: Path) -> Path:
    return next(each for each in (path, *path.parents) if os.path.exists(each))  # noqa: PTH110 as above


def _not_there_yet(output: Path) -> Line:
    """Of a directory that a run would make."""
    parent = _nearest(output)
    if os.access(parent, os.W_OK | os.X_OK):
        return ok("output", f"{output} is not there yet, and can be made in {parent}")
    return bad("output", f"{output} can't be made in {parent}: no permission", "choose another output")


def _prompts(job: JobConfig) -> Iterator[Line]:
    from gaudi_batch.dataset.discovery import open_prompts

    try:
        dataset = open_prompts(job)
    except (InputError, StorageError) as error:
        yield bad("prompts", one_line(error, 300), "give this node the prompts, or the credentials for them")
    else:
        yield ok("prompts", f"{dataset.rows:,} rows in {counted(len(dataset.files), 'file')}")


def _model(job: JobConfig) -> Iterator[Line]:
    name = job.model
    if name is None:
        return
    if "://" in name:
        yield from _in_storage(job)
        return
    path = builtin_directory(name) if name.startswith(BUILTIN) else expanded(name)
    if (path / "model_index.json").is_file():
        yield ok("model", f"{name}, on this node")
        return
    if "/" not in name or name.startswith((".", "~", "/")):
        yield bad(
            "model", f"{name} is not on this node", "put it on a file system that all nodes share, or name a hub id"
        )
        return
    yield from _of_hub(name, job.revision)


def _in_storage(job: JobConfig) -> Iterator[Line]:
    try:
        model = describe_model(job)
    except (InputError, StorageError) as error:
        yield bad("model", one_line(error, 300), "give this node the credentials for it")
    else:
        size = sum(entry.size for entry in model.files.values()) / GIB
        yield ok("model", f"{model.name}, {size:.1f} GiB, which each node fetches once")


def _of_hub(name: str, revision: str | None) -> Iterator[Line]:
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "model_index.json", revision=revision)
    here = isinstance(cached, str) and any(Path(cached).parent.glob("*/*.safetensors"))
    if constants.HF_HUB_OFFLINE:
        if here:
            yield ok("model", f"{name}, in the hub's cache; HF_HUB_OFFLINE is set")
        else:
            yield bad("model", f"{name} is not in the hub's cache, and HF_HUB_OFFLINE is set", f"hf download {name}")
        return
    try:
        info = HfApi().model_info(name, revision=revision, timeout=TRY_TIMEOUT_S, files_metadata=True)
    except Exception as error:
        hub = f"{constants.ENDPOINT}: {one_line(error, 200)}"
        advice = "open the network to it, set HF_TOKEN for a gated model, or fetch the model beforehand"
        yield note("hub", hub, advice) if here else bad("hub", hub, advice)
    else:
        size = sum(file.size or 0 for file in info.siblings or ()) / GIB
        yield ok("hub", f"{constants.ENDPOINT} answers; {name} has {size:.1f} GiB")
    if here:
        yield ok("model", f"{name}, in the hub's cache")
    else:
        yield note(
            "model",
            f"{name} is not in the hub's cache",
            f"the first card fetches it; hf download {name} does so before",
        )
