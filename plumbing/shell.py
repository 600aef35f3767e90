"""Commands as they can be typed into a shell."""

import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

from plumbing.options import flag, flat


def command(program: str, options: Any, names: Collection[str]) -> str:
    """The command that calls a program with these options, quoted for the shell: --target, and of the others
    that have such names those that are not as usual.
    """
    words, usual = ["--target", str(options.target)], flat(type(options)())
    for name, value in flat(options).items():
        if name != "target" and name in names and value not in (None, usual[name]):
            typed = value if isinstance(value, tuple) else (value,)
            words += [flag(name if value is not False else f"no_{name}")]
            words += [] if isinstance(value, bool) else map(str, typed)
    return f"{program} {shlex.join(words)}"


def quoted(path: str | Path) -> str:
    """A path as it can be typed into a shell."""
    return shlex.quote(str(path))
