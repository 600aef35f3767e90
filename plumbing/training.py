"""What every training program shares: averaged weights, learning rates, and what comes after each step.

A run can be killed at any moment.  All randomness of an iteration comes from a generator made of the seed and
its number, and a checkpoint holds weights, average and optimiser: on a CPU a resumed run computes bit for bit
what one that was never stopped computes.
"""

import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from plumbing import distributed, progress
from plumbing.board import Board
from plumbing.files import add_metrics, save_checkpoint, trim_metrics
from plumbing.options import InputError, is_out_of_memory


class EMA:
    """Exponential moving average of parameters.

    Update i (from 0) has decay min(decay, (1 + i) / (10 + i)): so a short run's average soon forgets
    the weights it began with.
    """

    def __init__(self, parameters: list[Tensor], decay: float):
        self.parameters, self.decay, self.updates = parameters, decay, 0
        self.average = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the live parameters."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, p in zip(self.average, self.parameters, strict=True):
            average.lerp_(p.detach(), 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averages and the live parameters; calling it again undoes it."""
        for average, p in zip(self.average, self.parameters, strict=True):
            held = p.detach().clone()
            p.copy_(average)
            average.copy_(held)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return dict(average=self.average, updates=self.updates)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.updates = state["updates"]
        for average, saved in zip(self.average, state["average"], strict=True):
            average.copy_(saved)


def warmup(iteration: int, iterations: int) -> float:
    """Linear from 1/n to 1 over the first n iterations: the factor on the learning rate."""
    return min(1.0, (iteration + 1) / iterations) if iterations else 1.0


def cosine_decay(iteration: int, iterations: int) -> float:
    """Half a cosine from 1 to 0 over the run: the factor on the learning rate."""
    return 0.5 * (1 + math.cos(math.pi * iteration / iterations))


def speed_up(models: Iterable[torch.nn.Module], precision: str, form: str, compiled: bool) -> None:
    """With precision bf16 what is frozen is held in it; with `compiled` the networks are compiled.

    form     of psi: a low-rank one is added to weights, and where these are in bf16 its small changes would
             be rounded away
    """
    for model in models:
        if precision == "bf16" and form != "low-rank":
            _hold_frozen_in_bf16(model)
        if compiled:
            model.compile()


def _hold_frozen_in_bf16(model: torch.nn.Module) -> None:
    """Weights that do not learn need not be cast at every pass of autocast; norms and biases are small."""
    for p in model.parameters():
        if p.dim() > 1 and not p.requires_grad:
            p.data = p.data.bfloat16()


class StopSignal:
    """In the `with` block Ctrl-C and SIGTERM only set `received`: the loop stops when it suits.

    A second Ctrl-C kills.  A second SIGTERM does not, and neither does what comes within a second: torchrun
    passes on what every process of a job was sent already.
    """

    def __enter__(self) -> "StopSignal":
        self.received, self.at = False, 0.0
        self.previous = {s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """The handler of both signals."""
        if self.received and number == signal.SIGINT and time.monotonic() - self.at > 1:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self.at = True, time.monotonic()

    def __exit__(self, *exception: object) -> None:
        for s, handler in self.previous.items():
            signal.signal(s, handler)


class Loop:
    """The iterations of a training program, and what comes before and after each step.

        for iteration in loop:
            ...                                       the gradients, summed over the ranks
            gradient_norm = loop.check(loss, remedy)
            optimizer.step()
            ema.update()
            loop.record(loss=loss, ...)

    Goes on from a checkpoint; sets the learning rate and clears the gradients; writes metrics.jsonl and
    moves the bar.  Saves checkpoint.pt every `save_every` iterations, at the end, and on Ctrl-C or SIGTERM,
    which end the program with status 130.

    text             label of the bar
    parameters       what learns, with its optimizer and its average
    learning_rate    of an iteration
    batch_size       pictures an iteration, over all ranks
    state            of a checkpoint to go on from
    keep             what else a checkpoint holds
    board            where metrics go as well
    also             called with the checkpoint that is resumed, to restore what else learns
    after            called before the first iteration and after each with the number done and whether it
                     is saved (before the first: whether it is the end)
    """

    def __init__(self, out: Path, text: str, iterations: int, save_every: int, batch_size: int,
                 parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, ema: EMA,
                 learning_rate: Callable[[int], float], device: torch.device, state: dict[str, Any] | None,
                 keep: dict[str, Any], after: Callable[[int, bool], None], board: Board | None = None,
                 also: Callable[[dict[str, Any]], None] | None = None):
        self.out, self.iterations, self.save_every, self.batch_size = out, iterations, save_every, batch_size
        self.parameters, self.optimizer, self.ema = parameters, optimizer, ema
        self.learning_rate, self.device, self.keep, self.after = learning_rate, device, keep, after
        self.board, self.also = board, also
        self.start = self.restore(state) if state else 0
        if distributed.rank() == 0:
            trim_metrics(out / "metrics.jsonl", self.start)
        self.bar = progress.bar(range(self.start, iterations), text, True, iterations, self.start)
        self.warned: set[str] = set()

    def restore(self, state: dict[str, Any]) -> int:
        """Go on from what `save` kept; returns how many iterations are done."""
        try:
            with torch.no_grad():
                for p, saved in zip(self.parameters, state["parameters"], strict=True):
                    p.copy_(saved)
            self._restore_optimizer(state["optimizer"])
            self.ema.load_state_dict(state["ema"])
            if self.also:
                self.also(state)
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise InputError(f"{self.out}/checkpoint.pt: is of another network than the options describe; "
                             "start anew with --overwrite") from None
        distributed.say(f"resuming at iteration {state['iteration']}")
        return state["iteration"]

    def _restore_optimizer(self, state: dict[str, Any]) -> None:
        """As kept, but laid out, and fused or not, as here: fused Adam takes numbers in their order."""
        groups = [dict(kept, fused=here.get("fused"))
                  for kept, here in zip(state["param_groups"], self.optimizer.param_groups, strict=True)]
        self.optimizer.load_state_dict(dict(state, param_groups=groups))
        for p, kept in self.optimizer.state.items():
            kept.update({name: torch.empty_like(p).copy_(value) for name, value in kept.items()
                         if torch.is_tensor(value) and value.shape == p.shape})

    def save(self, done: int) -> None:
        """checkpoint.pt after so many iterations."""
        state = dict(self.keep, parameters=[p.detach() for p in self.parameters], iteration=done,
                     optimizer=self.optimizer.state_dict(), ema=self.ema.state_dict())
        if distributed.rank() == 0:
            save_checkpoint(self.out / "checkpoint.pt", state)

    def __iter__(self) -> Iterator[int]:
        self.after(self.start, self.start == self.iterations)
        with StopSignal() as stop:
            for iteration in self.bar:
                self.iteration, self.started, done = iteration, time.perf_counter(), iteration + 1
                self.optimizer.param_groups[0]["lr"] = self.learning_rate(iteration)
                self.optimizer.zero_grad()
                yield iteration
                stopping = distributed.any_rank(stop.received, self.device)
                saving = stopping or done % self.save_every == 0 or done == self.iterations
                if saving:  # before any pictures: who was told to stop has little time
                    self.save(done)
                if stopping and done < self.iterations:
                    self.bar.close()
                    distributed.say(f"\nstopped and saved after {done} iterations; continue with the same "
                                    "command and --resume")
                    distributed.cleanup()
                    sys.exit(130)
                self.after(done, saving)

    def check(self, loss: float, remedy: str, with_state: str | None = None) -> float:
        """The norm of all gradients that there are; InputError if it or the loss is not finite.

        with_state    the remedy where a state was saved, if that is another one
        Nothing is saved then: from this state the same iteration would fail again.
        """
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]).item()
        if not math.isfinite(loss + norm):
            self.bar.close()
            file, state = self.out / "checkpoint.pt", ""
            if file.exists():
                state, remedy = f"; the last state that was saved is in {file}", with_state or remedy
            raise InputError(f"loss {loss}, gradient {norm} at iteration {self.iteration}{state}; {remedy}")
        return norm

    def record(self, **line: Any) -> None:
        """A line of metrics.jsonl, and the loss beside the bar."""
        seconds, rate = time.perf_counter() - self.started, self.optimizer.param_groups[0]["lr"]
        speed = dict(learning_rate=rate, seconds=seconds, images_per_second=self.batch_size / seconds)
        if distributed.rank() == 0:
            add_metrics(self.out / "metrics.jsonl", iteration=self.iteration, **line, **speed)
        if self.board:
            self.board.line(self.iteration + 1, **line, **speed)
        self.bar.set_postfix(loss=f"{line['loss']:.4f}", refresh=False)

    def warn(self, text: str) -> None:
        """Print a warning above the bar, once a run."""
        if text not in self.warned and distributed.rank() == 0:
            self.bar.write(f"warning: {text}", file=sys.stderr)
        self.warned.add(text)
