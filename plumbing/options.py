"""The command line of every program: a dataclass read by tyro, one-line errors, Ctrl-C.

    @dataclasses.dataclass
    class Options:
        model: Positional[str]
        '''Folder of a run, or a source.'''
        source: Unset[str] = None
        '''What to adapt (default: the source of the target).'''
        guidance: Guidance = dataclasses.field(default_factory=Guidance)     # a group of --help

    options, typed = parse(Options, __doc__)
"""

import dataclasses
import difflib
import io
import math
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import typeguard
import tyro
from tyro.conf import Positional

T = TypeVar("T")
Unset = Annotated[T | None, tyro.conf.arg(help_behavior_hint="")]
"""An option that is None unless typed; its help says what that means."""

CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName)
POSITIONAL, = Positional[str].__metadata__
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "bad allocation")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, of whichever library, says that memory ran out."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


class InputError(Exception):
    """Something the user gave is wrong; the message is one line: the file or flag, and what to do."""


def did_you_mean(name: str, known: Collection[str]) -> str:
    """What to add to the refusal of a name: the known one that is nearest, if one is near."""
    near = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def short(name: str) -> Any:
    """Annotation of an option that has a short form, such as -n."""
    return tyro.conf.arg(aliases=[name])


def parse(options: type[T], description: str | None,
          argv: list[str] | None = None) -> tuple[T, frozenset[str]]:
    """Read `argv` (default: this program's) into a dataclass; also the names of the flags that were typed.

    A wrong flag or value is answered by tyro, with what it suggests, and ends the program with status 2.
    A ~ at the beginning of a name is the home folder, also where the shell leaves it (--target=~/photos).
    """
    argv = sys.argv[1:] if argv is None else argv
    hints = get_type_hints(options, include_extras=True)
    words = [name for name, hint in hints.items() if POSITIONAL in getattr(hint, "__metadata__", ())]
    if argv and not argv[0].startswith("-") and not words:
        meant = f" (did you mean --target {argv[0]}?)" if "target" in hints else ""
        raise InputError(f"{argv[0]}: say which option this is for{meant}; --help lists them")
    _check_choices(options, argv)
    if asked := [name for name in words if flag(name) in argv]:
        raise InputError(f"{flag(asked[0])}: is no flag here; write its value alone")
    typed = {word.split("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("-")}
    typed |= {word.removeprefix("no_") for word in typed}
    found = tyro.cli(options, prog=_program(), description=description, args=argv, config=CONFIG)
    values = flat(found)
    if values.get("resume") and values.get("overwrite"):
        raise InputError("--resume goes on with a run, --overwrite replaces it: give one of the two")
    for name, value in values.items():
        if value == "":
            raise InputError(f"{flag(name)}: is empty; leave it out, or say which")
    home = {name: os.path.expanduser(value) for name, value in values.items() if isinstance(value, str)}
    return replace(found, **home), frozenset(typed & values.keys())


def _choices(hint: Any) -> tuple[str, ...]:
    """The values that an option of this type may have, if they can be listed."""
    if get_origin(hint) is Literal:
        return tuple(map(str, get_args(hint)))
    return tuple(value for part in get_args(hint) for value in _choices(part))


def _check_choices(options: type, argv: list[str]) -> None:
    """InputError for the first value typed for an option that has choices, if it is none of them."""
    words = [part for word in argv for part in word.split("=", 1 if word.startswith("--") else 0)]
    for name, hint in get_type_hints(options, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            _check_choices(hint, argv)
        known = _choices(hint)
        for word, value in zip(words, words[1:]) if known else ():
            if word == flag(name) and value not in known and not value.startswith("-"):
                raise InputError(f"{word} {value}: must be one of {', '.join(known)}"
                                 f"{did_you_mean(value, known)}")


def _program() -> str:
    """How this program was called: python train_tan.py, python -m checkpoints."""
    module = sys.modules["__main__"].__spec__
    if module is None:
        return f"python {Path(sys.argv[0]).name}"
    return f"python -m {module.name.removesuffix('.__main__')}"


def flag(name: str) -> str:
    """How an option stands on the command line: --batch-size, -n."""
    return f"-{name}" if len(name) == 1 else "--" + name.replace("_", "-")


def flat(options: Any) -> dict[str, Any]:
    """Every option by name, those of the groups among them."""
    found = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        found |= flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return found


def picked(options: Any, names: Collection[str]) -> dict[str, Any]:
    """Those options, as `flat` has them."""
    return {name: value for name, value in flat(options).items() if name in names}


def check_types(options: Any, values: dict[str, Any], where: str) -> None:
    """InputError if one of these values, which are from `where`, is not of the type that its option has."""
    hints = {}
    for part in (options, *(getattr(options, field.name) for field in dataclasses.fields(options))):
        hints |= get_type_hints(type(part)) if dataclasses.is_dataclass(part) else {}
    for name, value in values.items():
        try:
            typeguard.check_type(tuple(value) if isinstance(value, list) else value, hints[name])
            sound = not isinstance(value, bool) or "bool" in str(hints[name])  # True passes for 1
        except typeguard.TypeCheckError:
            sound = False
        if not sound:
            raise InputError(f"{where}: damaged, {name} is {value!r}")


def replace(options: T, **values: Any) -> T:
    """A copy with other values of options named as in `flat`; TypeError for a name that there is not."""
    if unknown := values.keys() - flat(options).keys():
        raise TypeError(f"no such option: {', '.join(sorted(unknown))}")
    changed = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            of_group = {name: values[name] for name in flat(value) if name in values}
            changed[field.name] = replace(value, **of_group)
        elif field.name in values:
            changed[field.name] = values[field.name]
    return dataclasses.replace(options, **changed)


def each_once(options: T, *names: str) -> T:
    """The options with these lists of values without what they name again."""
    return replace(options, **{name: tuple(dict.fromkeys(flat(options)[name])) for name in names})


def _refuse(options: Any, names: tuple[str, ...], sound: Callable[[Any], bool], must: str) -> None:
    """InputError that names the flag of the first of these whose number is not sound; None is sound."""
    for name, value in flat(options).items():
        numbers = value if isinstance(value, tuple) else (value,)
        if name in names and not all(number is None or sound(number) for number in numbers):
            raise InputError(f"{flag(name)} {' '.join(map(str, numbers))}: must be {must}")


def at_least(options: Any, **lowest: float) -> None:
    """InputError that names the flag of the first option below its bound, infinite or not a number."""
    for name, low in lowest.items():
        _refuse(options, (name,), lambda number, low=low: low <= number < math.inf, f"at least {low}")


def below(options: Any, **bounds: float) -> None:
    """InputError that names the flag of the first option that is not below its bound."""
    for name, bound in bounds.items():
        _refuse(options, (name,), lambda number, bound=bound: number < bound, f"below {bound}")


def positive(options: Any, *names: str) -> None:
    """InputError that names the flag of the first of these that is not a positive, finite number."""
    _refuse(options, names, lambda number: 0 < number < math.inf, "a positive number")


def finite(options: Any, *names: str) -> None:
    """InputError that names the flag of the first of these that is infinite or not a number."""
    _refuse(options, names, math.isfinite, "a number")


def check_seed(options: Any) -> None:
    """InputError for a --seed that the generators do not take: 0 to 2^63 - 1."""
    _refuse(options, ("seed", "seeds"), lambda number: 0 <= number < 2 ** 63, "from 0 to 2^63 - 1")


def run(main: Callable[[], None]) -> None:
    """Call `main()`; what goes wrong becomes one line on stderr and an exit status, without a traceback.

    Status 2 for an InputError, a file that cannot be read or written, a full disk or memory; 130 for Ctrl-C;
    141 where nobody reads the output any more.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names that are no UTF-8 can be printed, too
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        sys.exit(141)
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print("error: out of memory; fewer pictures at once need less: of --micro-batch-size, --batch-size, "
              "--checkpoint-blocks, --precision bf16, those that --help has", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
