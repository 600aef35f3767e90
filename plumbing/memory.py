"""How much a device holds, and going on with fewer pictures at once where it runs out."""

import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from plumbing.options import InputError

T = TypeVar("T")


def device_memory(device: torch.device) -> float:
    """The bytes of memory that a device has; infinity where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # a system without it, or without these names
        return math.inf
    return pages * size if pages > 0 else math.inf


def fitting(work: Callable[[int], T], size: int, flag: str = "") -> T:
    """work(size), the pictures that go through the network together; from the start with half as many, and
    so on, where the device runs out of memory.  Raises InputError where even one does not fit.

    flag    the program's option for their number, if it has one
    """
    while True:
        try:
            return work(size)
        except torch.OutOfMemoryError:
            pass  # what the error holds on to is free after this line
        size = _half(size, flag)


def _half(size: int, flag: str) -> int:
    """Half as many pictures, said so; InputError if it was one."""
    if size == 1:
        raise InputError("out of memory with 1 picture at once; --checkpoint-blocks and --precision bf16, "
                         "where --help has them, need less")
    torch.cuda.empty_cache()
    advice = f" ({flag} {size // 2} saves the failed attempts)" if flag else ""
    print(f"out of memory with {size} pictures at once: going on with {size // 2}{advice}", file=sys.stderr,
          flush=True)
    return size // 2


class MicroBatches:
    """The parts of a batch that go through the network together; halved where the device runs out of memory.

        for parts in micro_batches(x0, eps):     # again, from the start of the batch, if memory ran out
            with micro_batches:
                for x0_, eps_ in parts:
                    ...

    As gradients are summed over the parts, smaller ones give the same result, but for rounding.

    size     pictures together
    fixed    their number must not change: running out of memory is an InputError at once
    """

    def __init__(self, size: int, fixed: bool):
        self.size, self.fixed, self.complete = size, fixed, True

    def __call__(self, *batch: Tensor) -> Iterator[list[tuple[Tensor, ...]]]:
        self.size, self.complete = min(self.size, len(batch[0])), False
        while not self.complete:
            yield list(zip(*(values.split(self.size) for values in batch)))

    def __enter__(self) -> None:
        self.complete = True

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, torch.OutOfMemoryError):
            return False
        if self.fixed:
            raise InputError(f"out of memory with {self.size} pictures at once; --checkpoint-blocks, "
                             "--precision bf16 and a smaller --micro-batch-size need less") from None
        self.size, self.complete = _half(self.size, "--micro-batch-size"), False
        return True
