"""Progress bars: tqdm's on a terminal, a plain line now and then in a log file; rank 0 alone shows them."""

import contextlib
import sys
from collections.abc import Iterable
from typing import TextIO

from tqdm import tqdm

from plumbing import distributed

EVERY = 30  # seconds between the lines in a log file
LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Lines:
    """A stream in which each state of a bar is a line of its own, without carriage returns."""

    def __init__(self, stream: TextIO):
        self.stream, self.last = stream, ""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line and line != self.last:
            with contextlib.suppress(BrokenPipeError):  # nobody reads it any more; there is work to save
                self.stream.write(line + "\n")
            self.last = line

    def flush(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.stream.flush()


def say(text: str) -> None:
    """Print a line above the bars that are shown."""
    if distributed.rank() == 0:
        tqdm.write(text)


def bar(steps: Iterable | None, text: str, leave: bool = False, total: int | None = None,
        initial: int = 0) -> tqdm:
    """`steps`, shown as they are taken.  With steps None the caller takes them: bar.update().

    leave    the bar stays when it is done
    """
    shown = dict(desc=text, leave=leave, total=total, initial=initial, disable=distributed.rank() != 0)
    if sys.stderr.isatty():
        return tqdm(steps, mininterval=0.5, **shown)
    return tqdm(steps, file=Lines(sys.stderr), position=0, mininterval=EVERY, maxinterval=EVERY,
                bar_format=LINE, **shown)
