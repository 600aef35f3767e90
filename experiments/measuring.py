"""How long work takes on a device, its FLOPs and memory, and the floor that its convolutions set."""

import functools
import platform
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import flop_counter


class Convolution(NamedTuple):
    """A convolution of a pass through a network: the shapes of its input and weight, stride and padding."""

    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]


@torch.no_grad()
def convolutions(model: nn.Module, x: Tensor, t: Tensor) -> Counter[Convolution]:
    """The convolutions of model(x, t), one- and two-dimensional, and how often there is each."""
    found, hooks = Counter(), []

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        shapes = tuple(inputs[0].shape), tuple(layer.weight.shape)
        found[Convolution(*shapes, layer.stride, layer.padding)] += 1

    for layer in model.modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
            hooks.append(layer.register_forward_hook(count))
    try:
        model(x, t)
    finally:  # also where memory runs out
        for hook in hooks:
            hook.remove()
    return found


def forward_and_input_gradient(x: Tensor, weight: Tensor, stride: tuple[int, ...],
                               padding: tuple[int, ...]) -> None:
    """The convolution alone, and the gradient of its sum with respect to x alone."""
    where = (stride, padding, [1] * len(stride), False, [0] * len(stride), 1)
    out = torch.ops.aten.convolution(x, weight, None, *where)
    torch.ops.aten.convolution_backward(out, x, weight, None, *where, (True, False, False))


@torch.no_grad()
def floor(found: Counter[Convolution], device: torch.device, precision: str) -> float:
    """Seconds of the forward passes and input gradients of these convolutions, each in its best layout."""
    total, dtype = 0.0, torch.bfloat16 if precision == "bf16" else torch.float32
    for convolution, count in found.items():
        x, weight = (torch.randn(shape, device=device, dtype=dtype) for shape in convolution[:2])
        times = []
        for layout in (torch.contiguous_format, torch.channels_last)[:len(convolution.stride)]:
            tensors = (values.contiguous(memory_format=layout) for values in (x, weight))
            job = functools.partial(forward_and_input_gradient, *tensors, *convolution[2:])
            job()
            times.append(min(seconds(job, device, calls=3) for _ in range(2)))
        total += count * min(times)
    return total


def seconds(job: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """How long a call takes, the mean of several one after the other."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        job()
    synchronize(device)
    return (time.perf_counter() - started) / calls


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _attention_flops(query: tuple, key: tuple, value: tuple, *_: object, **__: object) -> int:
    return flop_counter.sdpa_flop_count(query, key, value)


def _attention_backward_flops(gradient: tuple, query: tuple, key: tuple, value: tuple, *_: object,
                              **__: object) -> int:
    return flop_counter.sdpa_backward_flop_count(gradient, query, key, value)


# torch's counter knows fused attention on a GPU, but not on a CPU.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def flops(job: Callable[[], object]) -> int:
    """Floating-point operations of a call, in convolutions, matrix products and attention."""
    with flop_counter.FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        job()
    return counter.get_total_flops()


def peak_memory(job: Callable[[], object], device: torch.device) -> int:
    """Bytes of a GPU during a call; on a CPU those of the process at its largest so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        job()
        return torch.cuda.max_memory_allocated(device)
    job()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes there, kilobytes elsewhere


def device_name(device: torch.device) -> str:
    """The model of the GPU, or of the CPU with the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    name = model[1] if model else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} thread(s)"
