"""Which module this process holds. One process per module, enforced by a lock that goes with the process."""

from __future__ import annotations

import fcntl
import os
import threading

from habana_frameworks._emulation import faults
from habana_frameworks._emulation.counters import counters
from habana_frameworks._emulation.settings import settings

VISIBLE = "HABANA_VISIBLE_MODULES"
BUSY = "synStatus=8 [Device not found] Device acquire failed."

_held: tuple[int, int] | None = None  # module, file descriptor of its lock
_owner = 0
_acquiring = threading.RLock()


def visible_modules() -> list[int]:
    """The modules of HABANA_VISIBLE_MODULES that the machine has; all of them without it. Acquires nothing."""
    return [module for module in _wished() if module in settings().modules]


def held_module() -> int | None:
    """The module that this process has acquired."""
    return _held[0] if _held is not None and _owner == os.getpid() else None


def in_bad_fork() -> bool:
    """Whether this process was forked from one that holds a module, which is of no use to it."""
    return _held is not None and _owner != os.getpid()


def acquire() -> int:
    """Takes the first free visible module for the life of this process; returns its id.

    Raises:
        RuntimeError: HABANA_VISIBLE_MODULES names a module that is not there, or every visible module is taken.
    """
    global _held, _owner
    with _acquiring:
        if in_bad_fork():
            raise RuntimeError("Cannot re-initialize HPU in forked subprocess. Use the 'spawn' start method instead.")
        if _held is not None:
            return _held[0]
        for module in _checked_visible():
            if faults.acquire_is_refused(module):
                continue
            lock = _lock(module)
            if lock is not None:
                _held, _owner = (module, lock), os.getpid()
                counters.acquired(module)
                return module
        raise RuntimeError(BUSY)


def holder(module: int) -> int | None:
    """Process id of the one that holds a module, for hl-smi."""
    path = settings().state / "modules" / f"{module}.lock"
    if not path.exists():
        return None
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return int(os.pread(descriptor, 32, 0) or 0)
    finally:
        os.close(descriptor)
    return None


def _wished() -> list[int]:
    visible = os.environ.get(VISIBLE)
    if visible is None:
        return list(settings().modules)
    try:
        return [int(module) for module in visible.split(",") if module.strip()]
    except ValueError:
        raise RuntimeError(f"Invalid {VISIBLE}={visible}. Module IDs should be numbers") from None


def _checked_visible() -> list[int]:
    present = settings().modules
    wished = _wished()
    if any(module not in present for module in wished):
        visible = os.environ[VISIBLE]
        raise RuntimeError(
            f"Invalid {VISIBLE}={visible}. Module IDs should be between {min(present)} and {max(present)}"
        )
    return wished


def _lock(module: int) -> int | None:
    """A POSIX record lock: a fork does not inherit it, and any death of the process frees it."""
    directory = settings().state / "modules"
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory / f"{module}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor
