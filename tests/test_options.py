"""The command line that options.py makes of a dataclass."""
import dataclasses

import pytest

from plumbing.options import REQUIRED, InputError, option, parse, run


@dataclasses.dataclass
class Options:
    run: str = option(REQUIRED, "where to write", positional=True)
    seeds: tuple[int, ...] = option((), "extra seeds", positional=True)
    batch_size: int = option(40, "pictures a step, 1.3 % of all")
    gamma: float = option(5.0, "guidance", group="the paper")
    source: str = option("faces", "what to start from", choices=["faces", "churches"])
    ema: bool = option(True, "average the weights", group="the paper")
    lr: float | None = option(None, "learning rate; a text that is long enough to need a second line in the help of "
                                    "any terminal but a very wide one (default: what the source suggests)")
    limit: int | None = option(None, "at most so many")
    name: str | None = option(None, "a name")
    mult: tuple[int, ...] = option((1, 2), "channel multipliers")
    parts: tuple[str, ...] = option(("nose", "ears"), "what to draw", choices=["nose", "ears", "mouth_of_a_name_that_is_rather_long"])
    plain: int = 3


def test_defaults_and_nothing_given():
    options, given = parse(Options, ["out"])
    assert options == Options("out")
    assert (options.seeds, options.gamma, options.ema, options.lr, options.mult) == ((), 5.0, True, None, (1, 2))
    assert given == {"run"}


def test_every_type():
    argv = "out 7 8 --batch-size 2 --gamma 1 --source churches --no-ema --lr 1e-3 --limit 4 --name x --mult 1 2 4 --parts ears --plain 5"
    options, given = parse(Options, argv.split())
    assert options == Options("out", (7, 8), 2, 1.0, "churches", False, 1e-3, 4, "x", (1, 2, 4), ("ears",), 5)
    assert isinstance(options.gamma, float) and isinstance(options.limit, int) and isinstance(options.seeds, tuple)
    assert given == {field.name for field in dataclasses.fields(Options)}


def test_given_counts_what_was_typed_even_if_it_equals_the_default():
    assert parse(Options, ["out", "--batch-size", "40", "--ema"])[1] == {"run", "batch_size", "ema"}


def test_optional_positional_of_a_type(capsys):
    @dataclasses.dataclass
    class One:
        steps: int = option(300, "steps", positional=True)
    assert parse(One, []) == (One(300), frozenset())
    assert parse(One, ["4"]) == (One(4), {"steps"})
    with pytest.raises(SystemExit):
        parse(One, ["many"])
    assert "argument steps: invalid int value: 'many'" in capsys.readouterr().err


def test_optional_tuple():
    @dataclasses.dataclass
    class Maybe:
        layers: tuple[int, ...] | None = option(None, "layers")
    assert parse(Maybe, []) == (Maybe(None), frozenset())
    assert parse(Maybe, ["--layers", "1", "2"]) == (Maybe((1, 2)), {"layers"})


@pytest.mark.parametrize("argv, says", [
    (["out", "--batch-size", "many"], "--batch-size: invalid int value: 'many'"),
    (["out", "--source", "cats"], "--source: invalid choice: 'cats'"),
    (["out", "--batch", "3"], "unrecognized arguments: --batch"),  # no abbreviations
    ([], "required: run"),
])
def test_wrong_input_is_two_short_lines(argv, says, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Options, argv)
    usage, error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and usage.endswith("[options] run [seeds ...]") and says in error


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Options, ["--help"], description="First line.\n\n    an indented line")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "First line.\n\n    an indented line\n" in text
    assert "pictures a step, 1.3 % of all (default: 40)" in text
    assert "--ema, --no-ema" in text and "average the weights (default: on)" in text
    assert "channel multipliers (default: 1 2)" in text
    assert "--parts NAME [NAME ...]" in text and text.count("rather_long") == 1
    assert "None" not in text and "(default: )" not in text and "SUPPRESS" not in text
    assert text.count("the paper:") == 1 and text.index("the paper:") < text.index("--gamma X")
    assert text.index("--batch-size N") < text.index("the paper:")
    assert max(map(len, text.splitlines())) <= 110


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
