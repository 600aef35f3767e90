"""One way for every program here to turn a documented dataclass into a command line.

    @dataclasses.dataclass
    class Options:
        source: str = option("toyfaces", "built-in source or a folder of images", positional=True)
        gamma: float = option(5.0, "strength of the classifier's correction", group="the paper")

    options, given = parse(Options, description=__doc__)
"""
import argparse
import dataclasses
import math
import sys
import types
import typing

REQUIRED = dataclasses.MISSING  # as a default: the user has to give this one


class InputError(Exception):
    """Something the user gave is wrong; the message is one line that names the file or flag and says what to do."""


def option(default, help, choices=None, metavar=None, positional=False, group=None, short=None):
    """Dataclass field that knows its command line: `--name` (`short` instead, or a positional), under `group` in --help."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, metavar=metavar, positional=positional, group=group, short=short))


def flag(field):
    """How a field stands on the command line: `--name`, its short form, or a positional's bare name."""
    return field.name if field.metadata.get("positional") else field.metadata.get("short") or "--" + field.name.replace("_", "-")


def parse(cls, argv=None, description=None):
    """Read `argv` (default: this program's) into the dataclass `cls`.

    Field types: int, float, str, bool, these `| None`, and tuple[int, ...] and the like (several values after one flag).
    Returns (options, given): an instance of `cls`, and the frozenset of the field names that stood on the command line.
    A wrong flag or value prints one line of usage and one of what is wrong, and exits with status 2.
    """
    fields, hints = dataclasses.fields(cls), typing.get_type_hints(cls)
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, usage=" ".join(["%(prog)s [options]"] + _positionals(fields)),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=110))
    groups = {None: parser}
    for field in fields:
        title = field.metadata.get("group")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add(groups[title], field, hints[field.name])
    # What was not typed is None or [], for argparse is told no defaults: the dataclass has them.
    values = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None and value != []}
    for name, value in values.items():
        if isinstance(value, list):  # argparse collects into lists
            values[name] = tuple(value)
    return cls(**values), frozenset(values)


def at_least(options, **bounds):
    """InputError that names the flag of the first field in `bounds` whose value lies below its bound; None passes."""
    fields = {field.name: field for field in dataclasses.fields(options)}
    for name, low in bounds.items():
        value = getattr(options, name)
        if value is not None and not value >= low:  # nan is not, either
            raise InputError(f"{flag(fields[name])} {value}: must be at least {low}")


def positive(options, *names):
    """InputError that names the flag of the first of these fields that is not a positive, finite number."""
    for name in names:
        if not 0 < getattr(options, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be a positive number")


def run(main):
    """Call `main()`; an InputError, or a file that cannot be read or written, becomes one line on stderr and exit status 2, Ctrl-C one
    and 130, without a traceback."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def _positionals(fields):
    """How the positional fields look in the usage line."""
    found = [f for f in fields if f.metadata.get("positional")]
    names = [(f.metadata["metavar"] or f.name) + (" ..." if isinstance(f.default, tuple) else "") for f in found]
    return [name if f.default is REQUIRED else f"[{name}]" for name, f in zip(names, found)]


def _add(group, field, kind):
    """Add one dataclass field to an argparse parser or group."""
    metadata, default = field.metadata, field.default
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:  # `float | None` reads a float
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    several = typing.get_origin(kind) is tuple
    kind = typing.get_args(kind)[0] if several else kind

    if default is REQUIRED:
        note = " (required)"
    elif default in (None, "", ()):  # the help text says what that means
        note = ""
    elif kind is bool and not several:
        note = " (default: on)" if default else " (default: off)"
    else:
        note = f" (default: {' '.join(map(str, default)) if several else default})"
    how = dict(help=(metadata.get("help", "") + note).replace("%", "%%"))
    if kind is bool and not several:
        group.add_argument(flag(field), action=argparse.BooleanOptionalAction, required=default is REQUIRED, **how)
        return
    how.update(type=kind, choices=metadata.get("choices"), metavar=metadata.get("metavar"))
    if metadata.get("positional"):
        nargs = {(False, False): "?", (False, True): None, (True, False): "*", (True, True): "+"}
        group.add_argument(field.name, nargs=nargs[several, default is REQUIRED], **how)
        return
    if several and how["choices"]:  # argparse would print the choices twice
        how["metavar"] = "NAME"
        how["help"] += f"; of {' '.join(how['choices'])}" if how["choices"] != list(default or ()) else ""
    if how["metavar"] is None and how["choices"] is None and kind in (int, float):
        how["metavar"] = "N" if kind is int else "X"
    group.add_argument(flag(field), dest=field.name, nargs="+" if several else None, required=default is REQUIRED, **how)
