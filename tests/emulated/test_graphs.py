"""HPU graphs: what a replay sees, and what it writes."""

from __future__ import annotations

import gc
import pickle
import threading
import time
from collections.abc import Callable

import habana_frameworks.torch as ht
import pytest
import torch
from habana_frameworks._emulation.settings import settings


def capture(function: Callable[[], object]) -> tuple[ht.hpu.HPUGraph, object]:
    """A graph of one call, and what the call gave."""
    graph = ht.hpu.HPUGraph()
    with torch.no_grad(), ht.hpu.stream(ht.hpu.Stream()):
        graph.capture_begin()
        outputs = function()
        graph.capture_end()
    return graph, outputs


def hpu(*values: float) -> torch.Tensor:
    return torch.tensor(values, device="hpu")


def test_replay_reads_the_captured_inputs_and_writes_the_captured_outputs() -> None:
    inputs = {"x": hpu(1, 2)}
    weight = hpu(10, 20)
    graph, y = capture(lambda: (inputs["x"] * weight + 1).relu())
    assert y.tolist() == [11, 41]
    inputs["x"] = hpu(5, 6)  # another tensor of the same name, which the graph does not see
    graph.replay()
    assert y.tolist() == [11, 41]
    weight.copy_(hpu(1, -1))
    graph.replay()
    assert y.tolist() == [2, 0]


def test_an_input_is_seen_once_it_is_copied_in() -> None:
    x = hpu(1, 2)
    graph, y = capture(lambda: x + 1)
    ht.hpu.graphs.copy_to([x], [hpu(7, 8)])
    assert y.tolist() == [2, 3]
    graph.replay()
    assert y.tolist() == [8, 9]


def test_an_expanded_input_can_be_copied_into() -> None:
    timestep = hpu(3).expand(4)
    graph, y = capture(lambda: timestep * 2)
    ht.hpu.graphs.copy_to((timestep,), (hpu(5).expand(4),))
    graph.replay()
    assert y.tolist() == [10] * 4


def test_a_value_read_by_the_host_is_baked_in() -> None:
    x = hpu(1, 2)
    graph, y = capture(lambda: x * x.sum().item())
    x.copy_(hpu(10, 20))
    graph.replay()
    assert y.tolist() == [30, 60]


def test_python_numbers_and_copies_from_the_host_are_baked_in() -> None:
    x, factor, host = hpu(1, 2), 3, torch.tensor([1.0, 1.0])
    graph, y = capture(lambda: x * factor + host.to("hpu"))
    factor, _ = 5, host.fill_(100)
    graph.replay()
    assert y.tolist() == [4, 7]


def test_operations_in_place_change_the_captured_tensor_on_every_replay() -> None:
    total, x = hpu(0, 0), hpu(1, 2)
    graph, _ = capture(lambda: total.add_(x))
    graph.replay()
    graph.replay()
    assert total.tolist() == [3, 6]

    def scratch() -> torch.Tensor:
        made = torch.zeros(2, device="hpu")
        made += x
        made[0] = 9
        return made

    graph, made = capture(scratch)
    x.copy_(hpu(4, 5))
    graph.replay()
    assert made.tolist() == [9, 5]


def test_views_of_inputs_intermediates_and_outputs_stay_views() -> None:
    x = hpu(1, 2, 3, 4)

    def compute() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        square = x.view(2, 2)
        square[0].mul_(10)  # changes x itself
        made = square.t() + 1
        return made, made[1], made.sum(0, keepdim=True).expand(3, 2)

    graph, (made, row, wide) = capture(compute)
    later = made[0]  # a view taken after the capture sees replays too
    assert x.tolist() == [10, 20, 3, 4]
    x.copy_(hpu(1, 1, 1, 1))
    graph.replay()
    assert x.tolist() == [10, 10, 1, 1]
    assert made.tolist() == [[11, 2], [11, 2]]
    assert row.tolist() == later.tolist() == [11, 2]
    assert wide.tolist() == [[22, 4]] * 3


def test_operations_with_several_results_and_lists_replay() -> None:
    x = hpu(3, 1, 2)
    graph, (values, order, parts) = capture(lambda: (*x.sort(), torch.cat([x, x * 2]).split(3)))
    x.copy_(hpu(1, 5, 4))
    graph.replay()
    assert (values.tolist(), order.tolist()) == ([1, 4, 5], [0, 2, 1])
    assert [part.tolist() for part in parts] == [[1, 5, 4], [2, 10, 8]]


def test_random_numbers_are_drawn_anew_on_every_replay_from_the_device() -> None:
    host_state = torch.get_rng_state()
    graph, noise = capture(lambda: torch.randn(4, device="hpu"))
    ht.hpu.random.manual_seed_all(5)
    graph.replay()
    first = noise.tolist()
    graph.replay()
    assert noise.tolist() != first
    ht.hpu.random.manual_seed_all(5)
    graph.replay()
    assert noise.tolist() == first
    assert torch.equal(torch.get_rng_state(), host_state)


def test_replay_computes_in_the_precision_of_the_capture() -> None:
    layer, x = torch.nn.Linear(4, 4).to("hpu"), torch.ones(1, 4, device="hpu")
    with torch.autocast("hpu", dtype=torch.bfloat16):
        low, low_result = capture(lambda: layer(x))
    full, full_result = capture(lambda: layer(x))
    before = low_result.clone(), full_result.clone()
    assert (low_result.dtype, full_result.dtype) == (torch.bfloat16, torch.float32)
    with torch.autocast("hpu", dtype=torch.bfloat16):
        full.replay()
    low.replay()
    assert torch.equal(low_result, before[0])
    assert torch.equal(full_result, before[1])


def test_a_capture_records_its_own_thread_only_and_replays_in_any() -> None:
    x = hpu(1, 2)
    side: list[torch.Tensor] = []

    def compute() -> torch.Tensor:
        thread = threading.Thread(target=lambda: side.append(x.add(100)))
        thread.start()
        thread.join()
        return x + 1

    graph, y = capture(compute)
    x.copy_(hpu(3, 4))
    thread = threading.Thread(target=graph.replay)
    thread.start()
    thread.join()
    assert y.tolist() == [4, 5]
    assert side[0].tolist() == [101, 102]


def test_values_in_between_take_no_memory_after_the_capture() -> None:
    x = torch.ones(1000, device="hpu")
    gc.collect()
    before = ht.hpu.memory_allocated()
    graph, y = capture(lambda: (((x + 1) * 2).exp() + 3).sum())
    gc.collect()
    assert ht.hpu.memory_allocated() - before == y.element_size()
    assert ht.hpu.max_memory_allocated() >= before + 8000
    graph.replay()


def test_wrapped_module_captures_once_per_shape() -> None:
    captures, replays = captures_and_replays()
    module = ht.hpu.wrap_in_hpu_graph(torch.nn.Linear(3, 3).to("hpu"), max_graphs=2)
    with torch.no_grad():
        for rows in (1, 2, 1, 2, 1, 3):
            x = torch.randn(rows, 3, device="hpu")
            torch.testing.assert_close(module(x).cpu(), torch.nn.functional.linear(x, module.weight, module.bias).cpu())
    assert captures_and_replays() == (captures + 2, replays + 3)


def test_wrapped_module_takes_inputs_by_name_in_lists_and_none_until_it_is_cleared() -> None:
    class Sum(torch.nn.Module):
        def forward(self, x: torch.Tensor, *, more: dict[str, list[torch.Tensor]], bias: torch.Tensor | None) -> tuple:
            total = x + more["all"][0] * more["all"][1]
            return (total if bias is None else total + bias, {"x": x * 2})

    captures, replays = captures_and_replays()
    module = ht.hpu.wrap_in_hpu_graph(Sum())
    with torch.no_grad():
        for start in (0, 10):
            more = {"all": [hpu(start, 1), hpu(2, 3)]}
            total, named = module(hpu(1, start), more=more, bias=None)
            assert (total.tolist(), named["x"].tolist()) == ([1 + 2 * start, start + 3], [2, 2 * start])
            total, _ = module(hpu(1, start), more=more, bias=hpu(100, 100))
            assert total.tolist() == [101 + 2 * start, start + 103]
        assert captures_and_replays() == (captures + 2, replays + 2)
        gc.collect()
        before = ht.hpu.memory_allocated()
        del total, named, more
        module.clear_cache()
        gc.collect()
        assert ht.hpu.memory_allocated() < before
        module(hpu(1, 2), more={"all": [hpu(1, 2)] * 2}, bias=None)
    assert captures_and_replays() == (captures + 3, replays + 2)


def test_a_capture_costs_what_the_machine_says() -> None:
    assert settings().capture_seconds > 0
    start = time.perf_counter()
    graph, _ = capture(lambda: hpu(1) + 1)
    assert time.perf_counter() - start >= settings().capture_seconds
    replays = []
    for _ in range(20):  # the shortest one, as a busy machine may hold up any
        start = time.perf_counter()
        graph.replay()
        replays.append(time.perf_counter() - start)
    assert min(replays) < settings().capture_seconds


def test_a_capture_that_fails_leaves_the_device_usable() -> None:
    x = hpu(1, 2)
    with pytest.raises(RuntimeError, match="PT_DEVMEM"):
        capture(lambda: (x + 1, torch.empty(ht.hpu.mem_get_info()[1], device="hpu")))
    with pytest.raises(RuntimeError, match="hpu:0 and cpu"):
        capture(lambda: x + torch.ones(2))
    with pytest.raises(ZeroDivisionError):
        capture(lambda: x + 1 // 0)
    graph, y = capture(lambda: x + 1)
    graph.replay()
    assert y.tolist() == [2, 3]


def test_what_a_graph_cannot_do_is_an_error() -> None:
    graph, _ = capture(lambda: hpu(1) + 1)
    with pytest.raises(TypeError, match="cannot pickle 'HPUGraph'"):
        pickle.dumps(graph)
    with pytest.raises(NotImplementedError, match="clear_inputs"):
        graph.clear_inputs()
    with pytest.raises(RuntimeError, match="not captured"):
        ht.hpu.HPUGraph().replay()


def captures_and_replays() -> tuple[int, int]:
    from habana_frameworks._emulation.counters import counters

    return counters.captures, counters.replays
