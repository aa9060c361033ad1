"""The process that reads the counters of one card, by Intel's libhlml.

It stands beside the card's own process, so that a library that hangs, crashes or floods its output costs no image; it
imports pyhlml and nothing heavy. It ends when its standard input closes, which is when the card's process ends. Each
line of its input is the number of a mark. It answers each mark, and about each second of its own accord, with a line of
JSON: what `sample` returns, and the mark. A line with `error` is its last.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

SAMPLE_INTERVAL_S = 1.0
"""Seconds between two samples."""
MAX_DEVICES = 64
"""Indices of devices that are tried: libhlml's are those of /dev/accel, with gaps where a card did not come up. A node
has 8 cards."""
ON_CHIP = 0
"""The temperature sensor of the chip, `HLML_TEMPERATURE_ON_AIP` of hlml.h."""


def find(hlml: Any, module: int, timeout_s: float) -> Any:
    """The device that is a module. The card may be in a reset that its last process left, so it is looked for again.

    Raises:
        LookupError: it is not there, or several say that they are.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        devices = []
        for index in range(MAX_DEVICES):
            with contextlib.suppress(Exception):  # there is no such device, or it does not answer
                device = hlml.hlmlDeviceGetHandleByIndex(index)
                if hlml.hlmlDeviceGetModuleID(device) == module:
                    devices.append(device)
        if len(devices) == 1:
            return devices[0]
        if time.monotonic() > deadline:
            raise LookupError(f"libhlml knows {len(devices)} devices of module {module}")
        time.sleep(SAMPLE_INTERVAL_S)


def sample(hlml: Any, device: Any) -> dict[str, Any]:
    """What the card's counters say, in libhlml's units; None for what it does not tell.

    Returns:
        `energy_mj` since the driver was loaded, and `at`, when that was read, monotonic; `power_mw`, `temperature_c`,
        `utilisation_percent`, `memory_used` in bytes, `throttle_bits`.
    """
    energy = _ask(lambda: hlml.hlmlDeviceGetTotalEnergyConsumption(device))
    return {
        "at": time.monotonic(),
        "energy_mj": energy,
        "power_mw": _ask(lambda: hlml.hlmlDeviceGetPowerUsage(device)),
        "temperature_c": _ask(lambda: hlml.hlmlDeviceGetTemperature(device, ON_CHIP)),
        "utilisation_percent": _ask(lambda: hlml.hlmlDeviceGetUtilizationRates(device).aip),
        "memory_used": _ask(lambda: hlml.hlmlDeviceGetMemoryInfo(device).used),
        "throttle_bits": _ask(lambda: hlml.hlmlDeviceGetCurrentClocksThrottleReasons(device)),
    }


def _ask(question: Callable[[], int]) -> int | None:
    try:
        return question()
    except Exception:  # pyhlml has an exception for each code of an error; a card need not know every counter
        return None


def _answer(answers: TextIO, marks: queue.SimpleQueue[int], hlml: Any, device: Any) -> None:
    while True:
        mark = None
        with contextlib.suppress(queue.Empty):
            mark = marks.get(timeout=SAMPLE_INTERVAL_S)
        answers.write(json.dumps({"mark": mark, **sample(hlml, device)}) + "\n")
        answers.flush()


def _serve(answers: TextIO, marks: queue.SimpleQueue[int], module: int, library: str, timeout_s: float) -> None:
    try:
        hlml = importlib.import_module("pyhlml")
        main = importlib.import_module("pyhlml.main")
        main.LibHLML = functools.partial(main.LibHLML, library)  # type: ignore[attr-defined]
        hlml.hlmlInit()
        _answer(answers, marks, hlml, find(hlml, module, timeout_s))
    except Exception as error:
        with contextlib.suppress(OSError):
            answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
            answers.flush()
    os._exit(1)


def main(module: int, library: str, timeout_s: float) -> None:
    """Answers until standard input closes; does not return.

    Args:
        module: number of the module.
        library: path of libhlml.so.
        timeout_s: seconds for which the device is looked for.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to standard output
    marks: queue.SimpleQueue[int] = queue.SimpleQueue()
    threading.Thread(target=_serve, args=(answers, marks, module, library, timeout_s), daemon=True).start()
    for line in sys.stdin:
        marks.put(int(line))
    os._exit(0)  # whatever the library is at


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
