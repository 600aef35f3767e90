"""Plain torch.distributed: one process a GPU under torchrun, or one alone; the caller sees no difference.

Every rank draws the same global batch from the same generator and keeps its own share; gradients are summed
once an iteration.  So N processes and one with the same global batch compute the same step, up to rounding.
"""

import datetime
import functools
import os

import torch
import torch.distributed as dist

from plumbing.options import InputError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what it sets


def setup(device: str = "auto") -> torch.device:
    """Join the process group if torchrun started us; returns this process's device.

    device    auto, cpu, cuda, cuda:1 or mps; InputError for another, or one that is not there
    """
    launched = is_launched()
    if device == "auto":
        mps = torch.backends.mps.is_available() and not launched
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = None
    available = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if kind not in available:
        raise InputError(f"--device {device}: not a device; give auto, cpu, cuda or mps")
    if not available[kind]:
        raise InputError(f"--device {device}: not available on this machine; --device cpu always is")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {device}: this machine has {torch.cuda.device_count()} GPU(s), of which "
                         "the first is cuda:0")
    if kind == "cuda":  # few shapes, used again and again; TF32's mantissa is long enough for products
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if launched and device not in ("cuda", "cpu"):
        raise InputError(f"--device {device}: under torchrun give cuda (one GPU a process), cpu, or nothing")
    if launched and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            gpus = torch.cuda.device_count()
            raise InputError(f"--nproc_per_node: more processes than the {gpus} GPUs of this machine")
    if launched and not dist.is_initialized():
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo",
                                timeout=datetime.timedelta(hours=2))  # others wait while rank 0 draws
    return torch.device(device)


def setup_alone(device: str, program: str) -> torch.device:
    """`setup` of a program that works in one process: InputError if torchrun started several."""
    found = setup(device)
    if world() > 1:
        raise InputError(f"{program}: works in one process; start it without torchrun")
    return found


def is_launched() -> bool:
    """Whether torchrun started this process; InputError if there are to be several, without all it sets."""
    there = {name for name in TORCHRUN if name in os.environ}
    if len(there) == len(TORCHRUN):
        return True
    if os.environ.get("WORLD_SIZE", "1") != "1":
        missing = ", ".join(name for name in TORCHRUN if name not in there)
        raise InputError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {missing} is not set: start with "
                         "torchrun, or unset it")
    return False  # LOCAL_RANK, say, of a notebook server


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The precision of the networks in the block: fp32, or bf16, which --precision says."""
    if precision == "bf16":
        _say_if_imitated(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@functools.cache
def _say_if_imitated(device: torch.device) -> None:
    """Say once if a CPU has no bf16 of its own and will imitate it."""
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if device.type == "cpu" and native and not native():
        say("note: this CPU has no bf16 of its own; imitating it may take 20 times as long as fp32")


def layout(device: torch.device | str) -> torch.memory_format:
    """How the weights of convolutions are best laid out: channels-last, but on a GPU group norms undo it."""
    return torch.contiguous_format if torch.device(device).type == "cuda" else torch.channels_last


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(n: int) -> slice:
    """This rank's part of n items; the parts differ by at most one item."""
    return slice(rank() * n // world(), (rank() + 1) * n // world())


def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Replace each gradient by its sum over all ranks, in one message."""
    if world() == 1:
        return
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = torch.empty_like(p).copy_(part.view_as(p))  # laid out as p, which fused Adam asks for


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all ranks; the same on each."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def gather(mine: torch.Tensor, n: int, device: torch.device) -> torch.Tensor:
    """All n items (n, ...) on the CPU, of which this rank has its `share`; the same on each."""
    if world() == 1:
        return mine
    all_items = torch.zeros(n, *mine.shape[1:], device=device)
    all_items[share(n)] = mine.to(device)
    return sum_over_ranks(all_items).cpu()


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank if it is on one: what a signal told one process, all must heed together."""
    return flag if world() == 1 else sum_over_ranks(torch.tensor(float(flag), device=device)).item() > 0


def barrier() -> None:
    """Wait until every rank is here."""
    if world() > 1:
        dist.barrier()


def say(text: str) -> None:
    """Print on rank 0."""
    if rank() == 0:
        print(text, flush=True)


@functools.cache
def say_once(text: str) -> None:
    """Print on rank 0, the first time."""
    say(text)


def cleanup() -> None:
    """Leave the process group, when every rank is here."""
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()
