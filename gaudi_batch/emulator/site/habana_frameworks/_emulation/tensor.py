"""Tensors on device hpu: each wraps a tensor of the host, and every operation on it comes to `execute`.

To PyTorch's C++ such a tensor is one on the CPU, so everything that it decides by device (which attention, which
decomposition, which autocast list) comes out as on the CPU, to the last bit. To Python it is on hpu:0: it says so, it
refuses to be mixed with tensors of the host or to be read as one, and this needs no mode that a thread might lack.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map

from habana_frameworks._emulation import faults, memory, modules
from habana_frameworks._emulation.counters import counters
from habana_frameworks._emulation.generator import default_generator, drawing_from_default, is_of_device
from habana_frameworks._emulation.settings import is_lazy

HPU = torch.device("hpu", 0)
_CPU = torch.device("cpu")

recorder = threading.local()
"""`recorder.active`, where set, is the recording of the graph that this thread captures."""


class HpuTensor(torch.Tensor):
    """A tensor on hpu:0; `_host` holds its values."""

    _host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> HpuTensor:
        """Wraps a tensor of the host, which must be the device's own from here on."""
        wrapper: HpuTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=host.device,
        )
        wrapper._host = host
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return execute(func, args, kwargs or {})
        except Exception:
            recorder.active = None  # a capture in which something failed is given up
            raise

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        special = _SPECIAL.get(func)
        if special is not None:
            return special(*args, **kwargs)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type != "hpu":
            return func(*tree_map(host_of, args), **tree_map(host_of, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    device = property(lambda self: HPU)  # type: ignore[assignment]
    is_hpu = property(lambda self: True)
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        """Index of the device."""
        return 0

    def data_ptr(self) -> int:
        """Address of the values."""
        return self._host.data_ptr()

    def untyped_storage(self) -> Any:
        """Storage of the values."""
        return self._host.untyped_storage()

    def tolist(self) -> Any:
        """The values as Python numbers."""
        return self._host.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Refused, as the values are not in the host's memory."""
        if force:
            return self._host.detach().clone().numpy()
        raise TypeError(
            "can't convert hpu:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def type(self, dtype: Any = None, non_blocking: bool = False) -> Any:
        """Name of the type, or a copy of another type."""
        if dtype is None:
            return self._host.type().replace("torch.", "torch.hpu.")
        return self.to(dtype)

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Any:
        """A tensor of data beside this one."""
        made = torch.tensor(data, dtype=dtype or self.dtype, device=HPU if device is None else device)
        return made.requires_grad_(requires_grad)

    def __format__(self, specification: str) -> str:
        return format(self.item() if self.dim() == 0 else repr(self), specification)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return repr(self._host.detach()).removesuffix(")") + ", device='hpu:0')"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copy = on_device(self._host.detach().clone()).requires_grad_(self.requires_grad)
        copy.__dict__.update({name: value for name, value in self.__dict__.items() if name != "_host"})
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._host.detach().clone(), self.requires_grad, getattr(self, "_is_param", False))

    # With these, Module.to swaps a parameter for the wrapped one instead of setting its data.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["_host"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, context: Any, size: Any, stride: Any) -> HpuTensor:
        return HpuTensor(inner["_host"])


def on_device(host: torch.Tensor) -> HpuTensor:
    """A tensor of the device from values that nobody else holds; takes the device's memory for them."""
    try:
        memory.take(host)
    except RuntimeError:
        recorder.active = None
        raise
    return HpuTensor(host)


def to_device(tensor: torch.Tensor, dtype: torch.dtype | None = None, memory_format: Any = None) -> HpuTensor:
    """A copy in the device of a tensor of the host."""
    modules.acquire()
    options = {} if memory_format is None else {"memory_format": memory_format}
    with torch.no_grad():
        values = tensor.detach().to(device="cpu", dtype=dtype, copy=True, **options)
    moved = on_device(values)
    return moved.requires_grad_(True) if tensor.requires_grad else moved


def to_host(tensor: HpuTensor, dtype: torch.dtype | None = None, memory_format: Any = None) -> torch.Tensor:
    """A copy in the host of a tensor of the device."""
    options = {} if memory_format is None else {"memory_format": memory_format}
    if not is_lazy():
        counters.count("copies")
        faults.check_launch()
    with torch.no_grad():
        return tensor._host.detach().to(device="cpu", dtype=dtype, copy=True, **options)


def host_of(value: Any) -> Any:
    """The values of a tensor of the device; anything else as it is."""
    return value._host if isinstance(value, HpuTensor) else value


_MIXING = ("aten::copy_", "aten::_to_copy", "aten::_copy_from", "aten::_has_compatible_shallow_copy_type")
"""Operations that may see tensors of the host and of the device at once; indexing may too."""


class _Facts(NamedTuple):
    draws: bool
    takes_generator: bool
    mutates: bool
    mixes: bool


@cache
def _facts(func: Any) -> _Facts:
    name = func._schema.name
    return _Facts(
        draws=torch.Tag.nondeterministic_seeded in func.tags,
        takes_generator=any(argument.name == "generator" for argument in func._schema.arguments),
        mutates=func._schema.is_mutable,
        mixes=name in _MIXING or name.startswith(("aten::index", "aten::_index")),
    )


def execute(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Runs one ATen operation on the values, wraps what is new, and records it if a graph is being captured."""
    info = _facts(func)
    given: dict[int, torch.Tensor] = {}
    host_args = [_take_values(argument, given) for argument in args]
    host_kwargs = {name: _take_values(value, given) for name, value in kwargs.items()}
    if not info.mixes and any(not isinstance(tensor, HpuTensor) and tensor.dim() for tensor in given.values()):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, hpu:0 and cpu!"
            f" (when checking the arguments of {func})"
        )
    if host_kwargs.get("device") is not None and host_kwargs["device"].type == "hpu":
        host_kwargs["device"] = _CPU
    results = _call(func, info, host_args, host_kwargs)
    recording = getattr(recorder, "active", None)
    if recording is not None:
        recording.add(func, host_args, host_kwargs, results)
    if info.mutates:
        for tensor in given.values():
            _follow_shape(tensor)
    return _give_back(results, given)


# No closures below: one that calls itself would keep tensors, and so memory, until the garbage collector runs.


def _take_values(argument: Any, given: dict[int, torch.Tensor]) -> Any:
    if isinstance(argument, torch.Tensor):
        host = host_of(argument)
        given[id(host)] = argument
        return host
    if isinstance(argument, (list, tuple)):
        return [_take_values(element, given) for element in argument]
    return argument


def _give_back(result: Any, given: dict[int, torch.Tensor]) -> Any:
    if isinstance(result, (list, tuple)):
        return type(result)([_give_back(element, given) for element in result])
    if not isinstance(result, torch.Tensor):
        return result
    if id(result) in given:
        return given[id(result)]
    if result.device.type != "cpu":
        return result
    if result.layout == torch.strided:
        storage = result.untyped_storage()._cdata
        for tensor in given.values():
            host = host_of(tensor)
            if host.layout == torch.strided and host.untyped_storage()._cdata == storage:
                # Keeps the memory of the base counted while a view of it lives.
                result._owner = getattr(host, "_owner", host)  # type: ignore[attr-defined]
                return HpuTensor(result)
    return on_device(result)


def _follow_shape(tensor: torch.Tensor) -> None:
    """Gives a tensor the shape that an operation gave its values, as `arange` does to its empty result."""
    if not isinstance(tensor, HpuTensor):
        return
    host = tensor._host
    if tensor.size() != host.size() or tensor.stride() != host.stride():
        with torch._C.DisableTorchFunctionSubclass():
            torch.Tensor.data.__set__(tensor, HpuTensor(host))  # type: ignore[attr-defined]


def _call(func: Any, info: _Facts, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if func is torch.ops.aten.copy_.default and 0 in args[0].stride():
        _copy_into_expanded(args[0], args[1])
        return args[0]
    if not info.draws:
        return func(*args, **kwargs)
    if not info.takes_generator:
        return drawing_from_default(lambda: func(*args, **kwargs))
    generator = kwargs.get("generator")
    if generator is None:
        kwargs["generator"] = default_generator()
    elif not is_of_device(generator):
        raise RuntimeError("Expected a 'hpu' device type for generator but found 'cpu'")
    return func(*args, **kwargs)


def _copy_into_expanded(target: torch.Tensor, source: torch.Tensor) -> None:
    """The device copies into an expanded tensor, such as a captured timestep of a batch; the host would refuse to."""
    source = source.expand(target.size())
    for dimension, stride in enumerate(target.stride()):
        if stride == 0:
            target, source = target.narrow(dimension, 0, 1), source.narrow(dimension, 0, 1)
    target.copy_(source)


def _rebuild(values: torch.Tensor, requires_grad: bool, is_parameter: bool) -> Any:
    moved = to_device(values)
    return torch.nn.Parameter(moved, requires_grad) if is_parameter else moved.requires_grad_(requires_grad)


def _set_data(target: Any, value: Any) -> None:
    if isinstance(target, HpuTensor) != isinstance(value, HpuTensor):
        moved = torch.nn.Parameter(value, target.requires_grad) if isinstance(target, torch.nn.Parameter) else value
        gradient = target.grad
        torch.utils.swap_tensors(target, moved)
        target.grad = None if gradient is None else gradient.to(target.device)
        return
    with torch._C.DisableTorchFunctionSubclass():
        torch.Tensor.data.__set__(target, value)  # type: ignore[attr-defined]
    target._host = value._host


def _on_values(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return on_device(function(*tree_map(host_of, args), **tree_map(host_of, kwargs)))

    return run


def _refuse(name: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name} of an hpu tensor is not emulated")

    return run


# What C++ would decide by the device that it sees, which is the host's.
_SPECIAL: dict[Any, Callable[..., Any]] = {
    torch.Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    torch.nn.functional.one_hot: _on_values(torch.nn.functional.one_hot),
    torch.Tensor.pin_memory: _refuse("pin_memory"),
    torch.Tensor.share_memory_: _refuse("share_memory_"),
    torch.Tensor.__dlpack__: _refuse("__dlpack__"),
}
