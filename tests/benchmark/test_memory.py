"""The count of tensors' memory against sizes known by hand and against torch's profiler."""

import itertools
import json

import pytest
import torch
from tiny import tiny_model
from torch import nn
from torch.profiler import ProfilerActivity, profile

from vidtwin.benchmark.memory import TensorMemory, counter_name, peak_memory, within_memory
from vidtwin.errors import UserError

CPU = torch.device("cpu")


def small():
    """Weights of 800 and 400 bytes, and 160 bytes to put in; the hidden values are 320 bytes, the output 80."""
    return nn.Sequential(nn.Linear(10, 20, bias=False), nn.ReLU(), nn.Linear(20, 5, bias=False)), torch.zeros(4, 10)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_peak_is_the_weights_the_input_and_the_two_largest_neighbours(mode):
    network, x = small()
    with mode():
        assert peak_memory(lambda: network(x), CPU, [network.state_dict(), x]) == 800 + 400 + 160 + 320 + 320


def test_tensors_kept_for_the_backward_pass_count_until_they_are_used():
    weight, x = torch.ones(1000, requires_grad=True), torch.ones(1000)
    with TensorMemory(CPU) as memory:
        memory.track([weight, x])
        loss = (weight * x).exp().sum()
        assert memory.live == 3 * 4000 + 4  # exp keeps its result
        loss.backward()
        assert memory.live == 3 * 4000 + 4  # in its place the gradient
    assert memory.peak == 4 * 4000 + 2 * 4  # beside these, the loss and its gradient of 1


def test_adam_doubles_weights_and_gradients():
    weight = torch.ones(1000, requires_grad=True)
    optimizer = torch.optim.Adam([weight], foreach=False, fused=False)
    with TensorMemory(CPU) as memory:
        memory.track(weight)
        weight.sum().backward()
        optimizer.step()
    assert 4 * 4000 <= memory.live < 4 * 4000 + 100


def test_a_view_and_a_change_in_place_take_nothing_and_growth_counts():
    x = torch.zeros(1000)
    with TensorMemory(CPU) as memory:
        memory.track([x, x])
        x.view(10, 100).add_(1)
        assert memory.peak == 4000
        x.resize_(3000)
    assert memory.peak == 12000


def test_freed_memory_makes_room():
    x = torch.zeros(1000)
    with TensorMemory(CPU) as memory:
        for _ in range(5):
            x + 1
    assert (memory.live, memory.peak) == (0, 4000)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_tensors_made_inside_of_a_composite_operation_are_seen(mode):
    # tensordot lays its transposed operand out anew; in inference mode it is one operation to those who watch.
    x, weight = torch.zeros(4, 50, 60).transpose(1, 2), torch.zeros(50, 3)
    with mode():
        peak = peak_memory(lambda: torch.tensordot(x, weight, dims=([2], [0])), CPU, [x, weight])
    assert peak == 4 * (2 * 4 * 50 * 60 + 50 * 3 + 4 * 60 * 3)


def profiled(run, file):
    """Peak of what `run()` asks the CPU's allocator for, as torch's profiler saw it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    profiler.export_chrome_trace(str(file))
    changes = [event for event in json.loads(file.read_text())["traceEvents"] if event["name"] == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    return max(itertools.accumulate(event["args"]["Bytes"] for event in changes))


def test_if_kernels_need_no_memory_of_their_own_the_profiler_sees_the_same_peak(tmp_path):
    model, clip = tiny_model().eval(), torch.zeros(2, 3, 4, 32, 32)
    weights = [*model.parameters(), *model.buffers()]
    held = sum(tensor.nbytes for tensor in [*weights, clip])
    with torch.inference_mode():
        model.encode(clip)  # what is made in the first pass and kept
        expected = held + profiled(lambda: model.encode(clip).mode(), tmp_path / "trace.json")
        assert peak_memory(lambda: model.encode(clip).mode(), CPU, [weights, clip]) == expected


def test_a_gradient_that_stands_before_is_held_too():
    weight = torch.ones(1000, requires_grad=True)
    weight.sum().backward()
    assert peak_memory(lambda: None, CPU, [weight]) == 8000


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has …"), "20.00 GiB more"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 80 bytes."), "80 bytes more"),
        (MemoryError(), "out of memory;"),
    ],
)
def test_out_of_memory_is_reported_with_what_was_tried(error, words):
    def run():
        raise error

    with pytest.raises(UserError, match=f"on cpu for 4 clips, got .*{words}") as raised:
        within_memory(run, CPU, "4 clips")
    assert raised.value.__context__ is None  # nothing keeps the tensors of the frames that it went through


def test_a_real_request_that_no_machine_can_meet_is_reported():
    with pytest.raises(UserError, match="got out of memory when it asked for 4398046511104000 bytes more"):
        within_memory(lambda: torch.empty(2**40 * 1000), CPU, "a petabyte")


def test_another_error_is_raised_unchanged():
    with pytest.raises(RuntimeError, match="must match the size"):
        within_memory(lambda: torch.zeros(2) + torch.zeros(3), CPU, "a sum")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_the_allocator_counts_and_what_else_stands_there_is_taken_off():
    device = torch.device("cuda")
    x = torch.zeros(2**20, device=device)
    alone = peak_memory(lambda: x + 1, device, [x])
    other = torch.zeros(2**24, device=device)
    assert peak_memory(lambda: x + 1, device, [x]) == alone == 2 * 4 * 2**20
    assert other.shape == (2**24,)
    assert counter_name(device) == "CUDA allocator"
