"""HPU graphs: ATen operations recorded once and replayed on the very tensors of the capture."""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_flatten, tree_map

from habana_frameworks._emulation import faults, modules
from habana_frameworks._emulation.counters import counters
from habana_frameworks._emulation.recipes import compile_graph
from habana_frameworks._emulation.tensor import recorder

_numbers = itertools.count()


@dataclass(frozen=True)
class _Slot:
    """Place of a value that the graph computes anew on every replay."""

    number: int


@dataclass
class _Operation:
    func: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    slots: list[int | None]
    """For each result: its slot; None where it is no tensor or one of the arguments."""
    nested: bool
    """Whether the results come in more than one list."""
    last_used: list[int]
    """Slots that nothing needs after this operation."""


class Recording:
    """The operations of one capture.

    Tensors that were there before, weights and inputs, are held as they are: a replay reads what is in them then.
    Values computed in between live only during a replay, except those that the program still held when the capture
    ended: each replay writes the new value into them.
    """

    def __init__(self) -> None:
        self._number = next(_numbers)
        self._operations: list[_Operation] = []
        self._made: list[weakref.ref[torch.Tensor]] = []
        self._outputs: list[tuple[int, torch.Tensor]] = []

    def add(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], results: Any) -> None:
        """One operation on values of the host, as it was executed; one that only reads them to the host is not kept."""
        if not func._schema.is_mutable and not any(
            isinstance(value, torch.Tensor) for value in tree_flatten(results)[0]
        ):
            return
        given = {id(value) for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)}
        operation_args, operation_kwargs = tree_map(self._symbol, (tuple(args), kwargs))
        slots: list[int | None] = []
        nested = isinstance(results, (list, tuple)) and not all(isinstance(result, torch.Tensor) for result in results)
        for result in tree_flatten(results)[0]:
            if not isinstance(result, torch.Tensor) or id(result) in given:
                slots.append(None)
                continue
            result._slot = (self._number, len(self._made))  # type: ignore[attr-defined]
            slots.append(len(self._made))
            self._made.append(weakref.ref(result))
        self._operations.append(_Operation(func, operation_args, operation_kwargs, slots, nested, []))

    def end(self) -> None:
        """Finds what the program kept of the capture, and when each other value is needed for the last time."""
        for number, reference in enumerate(self._made):
            tensor = reference()
            if tensor is not None:
                self._outputs.append((number, tensor))
        needed = {number for number, _ in self._outputs}
        for operation in reversed(self._operations):
            used = {
                value.number
                for value in tree_flatten((operation.args, operation.kwargs))[0]
                if isinstance(value, _Slot)
            }
            used |= {slot for slot in operation.slots if slot is not None}
            operation.last_used = sorted(used - needed)
            needed |= used

    @property
    def name(self) -> str:
        """A name that another graph has only if it is the same: the same operations on tensors of the same shapes."""
        hasher = hashlib.sha256()
        for operation in self._operations:
            hasher.update(f"{operation.func} {tree_map(_describe, (operation.args, operation.kwargs))}\n".encode())
        return str(int(hasher.hexdigest()[:16], 16))

    @torch.no_grad()
    def replay(self) -> None:
        """Computes everything again from what the captured inputs hold now."""
        values: dict[int, torch.Tensor] = {}
        with torch.autocast("cpu", enabled=False):
            for operation in self._operations:
                kwargs = {name: _resolve(value, values) for name, value in operation.kwargs.items()}
                results = operation.func(*[_resolve(argument, values) for argument in operation.args], **kwargs)
                if isinstance(results, torch.Tensor):
                    results = (results,)
                elif operation.nested:
                    results = tree_flatten(results)[0]
                for slot, result in zip(operation.slots, results or (), strict=True):
                    if slot is not None:
                        values[slot] = result
                for slot in operation.last_used:
                    del values[slot]
            for number, tensor in self._outputs:
                _overwrite(tensor, values[number])

    def _symbol(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            slot = getattr(value, "_slot", None)
            if slot is not None and slot[0] == self._number:
                return _Slot(slot[1])
        return value


class HPUGraph:
    """A graph that is captured once and then replayed."""

    def __init__(self) -> None:
        self._recording: Recording | None = None
        self._capturing = False

    def capture_begin(self, dry_run: bool = False) -> None:
        """Records what this thread does on the device from here on; it is executed too."""
        if dry_run:
            raise NotImplementedError("HPUGraph.capture_begin(dry_run=True) is not emulated")
        if getattr(recorder, "active", None) is not None:
            raise RuntimeError("a graph capture is already in progress")
        modules.acquire()
        counters.count("captures")
        faults.check_launch()
        self._capturing = True
        self._recording = recorder.active = Recording()

    def capture_end(self) -> None:
        """Ends the recording, and takes the time that compiling it costs."""
        if not self._capturing or self._recording is None:
            raise RuntimeError("capture_end without capture_begin")
        self._capturing = False
        given_up = getattr(recorder, "active", None) is not self._recording
        recorder.active = None
        if given_up:
            self._recording = None
            raise RuntimeError("the capture was given up, as an operation in it failed")
        self._recording.end()
        compile_graph(self._recording.name)

    def replay(self, asynchronous: bool = False) -> None:
        """Computes the graph from what its input tensors hold now, into its output tensors."""
        if self._recording is None or self._capturing:
            raise RuntimeError("replay of a graph that was not captured")
        counters.count("replays")
        faults.check_launch()
        self._recording.replay()

    def reset(self) -> None:
        """Gives up what was captured, with the memory that it holds."""
        self._recording = None

    def clear_inputs(self) -> NoReturn:
        """Not emulated."""
        raise NotImplementedError("HPUGraph.clear_inputs is not emulated")

    def mark_user_inputs(self, *args: Any) -> NoReturn:
        """Not emulated."""
        raise NotImplementedError("HPUGraph.mark_user_inputs is not emulated")

    def mark_user_outputs(self, *args: Any) -> NoReturn:
        """Not emulated."""
        raise NotImplementedError("HPUGraph.mark_user_outputs is not emulated")

    def __reduce__(self) -> NoReturn:
        raise TypeError("cannot pickle 'HPUGraph' object")


def _describe(value: Any) -> Any:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else value


def _resolve(symbol: Any, values: dict[int, torch.Tensor]) -> Any:
    if isinstance(symbol, _Slot):
        return values[symbol.number]
    return [_resolve(element, values) for element in symbol] if isinstance(symbol, (list, tuple)) else symbol


def _overwrite(target: torch.Tensor, value: torch.Tensor) -> None:
    if target.untyped_storage()._cdata == value.untyped_storage()._cdata:
        return  # a view of a tensor that the replay wrote itself
    if any(stride == 0 and size > 1 for stride, size in zip(target.stride(), target.size(), strict=True)):
        target.untyped_storage().copy_(value.untyped_storage())
        return
    target.copy_(value)
