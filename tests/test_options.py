"""plumbing/options.py: dataclasses as command lines, by tyro; what was typed; one-line errors."""

import dataclasses
from typing import Annotated, Literal

import pytest

from plumbing import options
from plumbing.options import InputError, Positional, Unset, each_once, flat, parse, replace, run, short


@dataclasses.dataclass
class Paper:
    """Of the paper."""

    gamma: float = 5.0
    """Guidance."""
    average: bool = True
    """Average the weights."""


@dataclasses.dataclass
class Options:
    """Of a program."""

    out: Positional[str]
    """Where to write."""
    n: Annotated[int, short("-n")] = 40
    """Pictures, 1.3 % of all."""
    source: Literal["faces", "churches"] = "faces"
    """What to start from."""
    lr: Unset[float] = None
    """Learning rate (default: what the source suggests)."""
    mult: tuple[int, ...] = (1, 2)
    """Channel multipliers."""
    parts: Unset[tuple[Literal["nose", "ears"], ...]] = None
    """What to draw."""
    paper: Paper = dataclasses.field(default_factory=Paper)


def test_defaults():
    assert parse(Options, "", ["out"]) == (Options("out"), frozenset())


def test_every_type_and_what_was_typed():
    argv = "out -n 2 --source churches --lr 1e-3 --mult 1 2 4 --parts ears --gamma=-1 --no-average"
    found, typed = parse(Options, "", argv.split())
    assert found == Options("out", 2, "churches", 1e-3, (1, 2, 4), ("ears",), Paper(-1.0, False))
    assert typed == {"n", "source", "lr", "mult", "parts", "gamma", "average"}
    assert parse(Options, "", ["out", "--n", "40", "--average"])[1] == {"n", "average"}  # even if it is the default


@pytest.mark.parametrize("argv, says", [
    (["out", "-n", "many"], "invalid literal for int() with base 10: 'many'"),
    (["out", "--gama", "3"], "--gamma FLOAT"), ([], "Missing from"), (["out", "--sour", "faces"], "Unrecognized options"),
])
def test_wrong_input(argv, says, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Options, "", argv)
    assert stop.value.code == 2 and says in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Options, "First line.\n\n    an indented line", ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "    an indented line\n" in text and "None" not in text
    assert "Pictures, 1.3 % of all. (default: 40)" in text and "Learning rate (default: what the source suggests)." in text
    assert "-n INT" in text and "--average, --no-average" in text and text.index("Of the paper.") < text.index("--gamma FLOAT")


def test_flat_and_replace():
    given = Options("out")
    assert flat(given) == dict(out="out", n=40, source="faces", lr=None, mult=(1, 2), parts=None, gamma=5.0, average=True)
    changed = replace(given, n=1, gamma=0.0)
    assert changed == Options("out", 1, paper=Paper(0.0)) and given == Options("out")
    with pytest.raises(TypeError, match="no such option: colour"):
        replace(given, colour=1)
    assert each_once(replace(given, mult=(2, 1, 2)), "mult").mult == (2, 1)


@pytest.mark.parametrize("check, given, says", [
    (lambda o: options.at_least(o, n=1), dict(n=0), "-n 0: must be at least 1"),
    (lambda o: options.at_least(o, mult=1), dict(mult=(0, 1)), "--mult 0 1: must be at least 1"),
    (lambda o: options.at_least(o, gamma=0), dict(gamma=float("nan")), "--gamma nan: must be at least 0"),
    (lambda o: options.below(o, gamma=9), dict(gamma=9.0), "--gamma 9.0: must be below 9"),
    (lambda o: options.positive(o, "gamma", "lr"), dict(lr=0.0), "--lr 0.0: must be a positive number"),
    (lambda o: options.finite(o, "gamma"), dict(gamma=float("-inf")), "--gamma -inf: must be a number"),
])
def test_numbers(check, given, says):
    check(Options("out"))  # None, too, is sound
    with pytest.raises(InputError) as error:
        check(replace(Options("out"), **given))
    assert str(error.value) == says


@dataclasses.dataclass
class Run:
    """Of a program without words of its own."""

    target: str = "sunglasses"
    """To what."""
    resume: bool = False
    """Go on."""
    overwrite: bool = False
    """Begin anew."""


@pytest.mark.parametrize("argv, says", [
    ("photos/", r"photos/: .* \(did you mean --target photos/\?\); --help lists them"), ("--target=", "--target: is empty"),
    ("--resume --overwrite", "--resume goes on with a run, --overwrite replaces it")])
def test_what_a_program_can_refuse_by_itself(argv, says):
    with pytest.raises(InputError, match=says):
        parse(Run, "", argv.split())


@pytest.mark.parametrize("argv, says", [
    ("out --source face", r"--source face: must be one of faces, churches \(did you mean faces\?\)"), ("out --parts nose eyes", None),
    ("out --source=face", "--source face: must be one of"), ("--source faces out --n", None),
    ("out --parts eyes", "--parts eyes: must be one of nose, ears"), ("--out out", "--out: is no flag here; write its value alone")])
def test_choices_and_words_without_a_flag(argv, says, capsys):
    with pytest.raises(InputError if says else SystemExit, match=says):
        parse(Options, "", argv.split())


def test_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parse(Run, "", ["--target=~/photos"]) == (Run("/home/me/photos"), {"target"})


def test_run_prints_one_line_and_exits_with_2(capsys):
    def main():
        raise InputError("a.png: too small")
    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: a.png: too small\n"


def test_run_names_the_file_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        run(lambda: (tmp_path / "file" / "out").mkdir())
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {tmp_path}/file/out: Not a directory\n"


def test_run_hides_nothing_else():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


def test_another_runtime_error_is_not_hidden():
    def main():
        raise RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError):
        run(main)
