"""results.json: every run that experiments.tables ever scored, by the part that asked for it."""

import json
from pathlib import Path
from typing import Any

from filelock import FileLock

from domains import judge
from experiments import launch
from plumbing.files import read_json, write_text

Row = dict[str, Any]
"""One scored run: "run" (method, target, seed ...), "score" (figures by name), "rate", "seconds", and the
"settings" that it was trained with."""


def read(file: Path) -> dict[str, list[Row]]:
    """The runs of each part; none if there is no file yet."""
    return read_json(file)


def add(file: Path, part: str, found: Row) -> None:
    """One more run, or the same one anew."""
    with FileLock(f"{file}.lock"):  # another command may add to it, too
        results = read(file)
        if found in results.get(part, []):
            return
        known = {identity(row): row for row in results.get(part, [])} | {identity(found): found}
        text = json.dumps(results | {part: list(known.values())}, indent=1)
        write_text(file, text)


def identity(found: Row) -> str:
    """What tells a run from the others."""
    hashes = ("weights", "source_weights", "judge")
    what = {name: value for name, value in found["run"].items() if name not in hashes}
    trained = found.get("settings")
    return json.dumps([what, trained and launch.relevant(trained)], sort_keys=True)


def scored_alike(found: Row, n: int, steps: int) -> bool:
    """Whether a run was scored as it would be today, from n samples of so many steps."""
    scored = found["run"]
    if "source" not in scored and scored["method"] != "fresh pictures":
        return False  # of an older version, which did not say whose
    return judge.protocol(scored["target"], n, steps, scored.get("source")).items() <= scored.items()


def current(found: Row, n: int, steps: int) -> bool:
    """Whether a run was trained, too, as it would be today."""
    scored, trained = found["run"], found.get("settings")
    if not scored_alike(found, n, steps):
        return False
    if trained is None:
        return "seed" not in scored  # the ends of the scale
    asked = {name: trained[name] for name in ("target", "source", "method", "seed")}
    return launch.relevant(trained) == launch.relevant_today(**asked, **scored.get("flags", {}))
