"""The commands that count how damage is answered: quick parts of them, and that they can tell right from wrong."""

import itertools
import random

from experiments import kills, malformed
from plumbing import files
from plumbing.options import InputError


def test_saves_that_fail_at_every_byte(tmp_path):
    tried, whole = kills.failed_saves(tmp_path / "saves")
    assert tried == whole > 1000


def test_a_save_in_place_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(kills, "write_atomic", lambda path, write: write(path))
    monkeypatch.setattr(kills, "contents", lambda: {"a.json": b"{}  " * 5})
    tried, whole = kills.failed_saves(tmp_path / "saves")
    assert tried == 22 and whole == 0


def test_malformed_inputs(tmp_path):
    (tmp_path / "bad").mkdir()
    malformed.sound(tmp_path)
    for case in itertools.islice(malformed.cases(tmp_path, random.Random(0)), 0, 60, 3):
        assert malformed.fault_of(case, tmp_path)[0] is None, case.name


def test_wrong_answers_would_be_seen(tmp_path):
    (tmp_path / "bad").mkdir()
    for name in ("photos", "run"):
        (tmp_path / name).mkdir()

    def answers(main, harmless=False):
        return malformed.fault_of(malformed.Case("case", main, [], harmless), tmp_path)[0]

    def refuses():
        raise InputError("a.pt: damaged")

    def raises():
        raise KeyError("weights")

    def overwrites():
        files.write_atomic(tmp_path / "run" / "a", lambda temporary: temporary.write_text("b"))
        refuses()

    assert answers(refuses) is None and answers(raises) == "traceback" and answers(overwrites) == "overwritten"
    assert answers(lambda: None) == "silent success" and answers(lambda: None, harmless=True) is None
