"""Tensors on device hpu: what they say of themselves, and what they refuse."""

from __future__ import annotations

import copy
import io
import threading

import habana_frameworks.torch as ht
import pytest
import torch


def test_tensors_of_the_device_say_so_in_every_thread() -> None:
    def make() -> None:
        made.extend(
            [
                torch.zeros(2, device="hpu"),
                torch.ones(2).to("hpu"),
                torch.arange(3, device=torch.device("hpu")),
                torch.tensor([1], device="hpu:0"),
                torch.zeros_like(torch.ones(2), device="hpu") + 1,
                torch.nn.Linear(2, 2).to("hpu").weight,
            ]
        )

    made: list[torch.Tensor] = []
    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    make()
    assert {(tensor.device, tensor.device.type) for tensor in made} == {(torch.device("hpu", 0), "hpu")}
    assert len(made) == 12
    assert "device='hpu:0'" in repr(made[0])


def test_tensors_have_the_shape_of_their_values() -> None:
    x = torch.ones(2, 3, device="hpu")
    x.unsqueeze_(0).transpose_(1, 2)
    assert (x.shape, x.stride()) == ((1, 3, 2), (6, 1, 3))
    assert torch.arange(1, 6, 2, device="hpu").shape == torch.linspace(0, 1, 3, device="hpu").shape == (3,)
    assert torch.randperm(4, device="hpu").shape == (4,)
    assert torch.eye(2, device="hpu")[-1].tolist() == [0, 1]
    grid = torch.empty(0, device="hpu")
    torch.add(x, 1, out=grid)
    assert grid.shape == x.shape


def test_host_and_device_do_not_mix() -> None:
    x = torch.ones(2, 2, device="hpu")
    with pytest.raises(RuntimeError, match="hpu:0 and cpu"):
        x + torch.ones(2, 2)
    with pytest.raises(TypeError, match=r"Use Tensor.cpu\(\)"):
        x.numpy()
    with pytest.raises(RuntimeError, match="Expected a 'hpu' device type for generator"):
        torch.randn(2, device="hpu", generator=torch.Generator())
    with pytest.raises(NotImplementedError, match="pin_memory"):
        x.pin_memory()
    assert (x * torch.tensor(2.0)).sum().item() == 8  # a number may
    assert x.cpu().numpy().tolist() == x.tolist()
    assert x.to("cpu").device.type == torch.zeros_like(x, device="cpu").device.type == "cpu"


def test_values_are_copied_on_their_way() -> None:
    host = torch.zeros(2)
    x = host.to("hpu")
    back = x.cpu()
    x += 1
    assert (host.tolist(), back.tolist(), x.tolist()) == ([0, 0], [0, 0], [1, 1])
    assert x.to("hpu") is x


def test_modules_move_there_and_back_with_their_parameters() -> None:
    layer = torch.nn.Linear(3, 2)
    tied = torch.nn.Sequential(layer, torch.nn.Linear(3, 2))
    tied[1].weight = layer.weight
    expected = tied[0](torch.ones(1, 3))
    tied.to("hpu")
    assert tied[1].weight is layer.weight
    assert isinstance(layer.weight, torch.nn.Parameter)
    assert {name for name, _ in tied.named_parameters()} == {"0.weight", "0.bias", "1.bias"}
    assert torch.equal(tied[0](torch.ones(1, 3, device="hpu")).cpu(), expected)
    assert copy.deepcopy(tied)[0].weight.device.type == "hpu"
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=False)["weight"].device.type == "hpu"
    tied.to("cpu")
    assert torch.equal(tied[0](torch.ones(1, 3)), expected)


def test_autocast_on_the_device() -> None:
    layer, x = torch.nn.Linear(2, 2).to("hpu"), torch.ones(1, 2, device="hpu")
    assert not ht.hpu.is_autocast_hpu_enabled()
    with torch.autocast("hpu", dtype=torch.bfloat16):
        assert ht.hpu.is_autocast_hpu_enabled()
        assert ht.hpu.get_autocast_hpu_dtype() == torch.bfloat16
        assert layer(x).dtype == torch.bfloat16
        with torch.autocast("hpu", enabled=False):
            assert layer(x).dtype == torch.float32


def test_memory_is_counted_and_ends() -> None:
    before = ht.hpu.memory_allocated()
    x = torch.zeros(1000, device="hpu")
    view = x[10:]
    assert ht.hpu.memory_allocated() - before == 4000
    del x
    assert ht.hpu.memory_allocated() - before == 4000
    assert view.shape == (990,)
    del view
    assert ht.hpu.memory_allocated() == before
    assert ht.hpu.memory_stats()["Limit"] == ht.hpu.mem_get_info()[1]
    with pytest.raises(RuntimeError, match="PT_DEVMEM Allocation failed"):
        torch.empty(ht.hpu.mem_get_info()[1], device="hpu")


def test_what_is_not_emulated_says_its_name() -> None:
    from habana_frameworks.torch.distributed import hccl

    with pytest.raises(NotImplementedError, match=r"hccl\.initialize_distributed_hpu is not emulated"):
        hccl.initialize_distributed_hpu()
    with pytest.raises(NotImplementedError, match="ModuleCacher is not emulated"):
        ht.hpu.ModuleCacher()(model=None)


def test_a_list_of_numbers_of_the_device_is_read() -> None:
    number = torch.tensor(3.0, device="hpu")
    made = torch.tensor([number / 2, 4])
    assert (made.device.type, made.tolist()) == ("cpu", [1.5, 4.0])
    assert torch.tensor([[number]], device="hpu").device.type == "hpu"
