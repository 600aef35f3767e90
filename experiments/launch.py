"""Runs of train_tan.py and of the GAN baselines that an experiment needs: started, resumed, or left alone if
they are as of today."""

import dataclasses
import functools
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import domains
import settings
from baselines import gan_methods, gan_settings
from checkpoints.load import load_source
from checkpoints.run_folder import MAY_CHANGE, read_options
from plumbing.options import InputError, flag, flat, replace

# Options of which nothing shows in the weights.
UNSEEN = (MAY_CHANGE - {"iterations", "source", "target"} | {"overwrite", "paper", "classifier_check"}
          | flat(settings.Options().pictures).keys())


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that adapts a source, and what its module of settings knows."""
    words: tuple[str, ...]
    options: type
    suited: Callable[[Any, Any], Any]
    used_by: Callable[[str], Collection[str]]


TRAIN_TAN = Program((str(Path(__file__).parents[1] / "train_tan.py"),),
                    settings.Options, settings.suited, settings.used_by)
GAN_TRANSFER = Program(("-m", "baselines.gan_transfer"),
                       gan_settings.Options, gan_settings.suited, gan_settings.used_by)


def program_of(method: str) -> Program:
    """Which program knows this method."""
    return GAN_TRANSFER if method in gan_methods.METHODS else TRAIN_TAN


def relevant(options: dict[str, Any]) -> dict[str, Any]:
    """Of a run's (flat) options, those that its figures depend on: {name: value as in JSON}."""
    program = program_of(options["method"])
    usual = flat(program.options())
    gone = options.keys() - usual.keys()  # an option of another version: that run is like none of today
    options = usual | options  # an older run does not name what has become an option since
    seen = program.used_by(options["method"]) - UNSEEN | gone
    found = {name: value for name, value in options.items() if name in seen}
    if found.get("classifier_targets"):
        found["classifier_targets"] = Path(found["classifier_targets"]).name  # the folder of runs may move
    return json.loads(json.dumps(found))


known_source = functools.cache(load_source)


def relevant_today(**flags: Any) -> dict[str, Any]:
    """`relevant` of a run that is started now with these options of its program."""
    program = program_of(flags["method"])
    options = replace(program.options(), **flags)
    return relevant(flat(program.suited(options, known_source(options.source))))


def heed_signals() -> None:
    """From now on SIGTERM and a closed terminal are a Ctrl-C, too: the run that is being trained saves."""
    for name in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(name) != signal.SIG_IGN:
            signal.signal(name, signal.default_int_handler)


def call_train(program: Program, arguments: list[str], log: Path) -> int:
    """Exit status of a program with these arguments, its output added to `log`.

    When this program is told to stop (`heed_signals`), so is that one, which then saves.
    """
    with open(log, "a") as file:
        process = subprocess.Popen([sys.executable, *program.words, *arguments], stdout=file, stderr=file,
                                   start_new_session=True)
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise


def _same_file(one: Any, other: Any) -> bool:
    """Whether both are paths to the same file or folder, spelt differently."""
    paths = all(isinstance(path, str) and path not in domains.TARGETS and Path(path).exists()
                for path in (one, other))
    return paths and Path(one).samefile(other)


def check_known(folder: Path, known: dict[str, Any], today: dict[str, Any]) -> None:
    """InputError if the run in the folder has other settings than it would have today."""
    for name, value in relevant(known).items():
        wanted = today.get(name, "no such option")
        if value != wanted and not _same_file(value, wanted):
            raise InputError(f"{folder}: was trained with {flag(name)} {value}, wanted is {wanted}; "
                             "remove the folder, or choose another --output-dir")


def train(folder: Path, device: str, **flags: Any) -> Path:
    """A finished run with this method and these options in `folder`, which is returned.

    What is there is resumed or left alone.  Raises InputError if the run stops, or if the one in the folder
    has other settings.
    """
    program, weights = program_of(flags["method"]), folder / "weights.safetensors"
    arguments = ["--output-dir", folder, "--device", device]
    if (folder / "options.json").exists():
        check_known(folder, read_options(folder), relevant_today(**flags))
        if weights.exists():
            return folder
        arguments.append("--resume")
    else:  # pictures are drawn by who asks for the run; the classifier's accuracy is not asked for
        for name, value in flags.items():
            arguments += [flag(name), value]
        arguments += ["--samples", 0]
        guided = "classifier_check" in program.used_by(flags["method"])
        arguments += ["--no-classifier-check"] if guided else []
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "train.log"
    before = log.stat().st_size if log.exists() else 0
    status = call_train(program, list(map(str, arguments)), log)
    if status or not weights.exists():
        said = log.read_bytes()[before:].decode(errors="replace").strip().splitlines()
        reason = f": {said[-1]}" if said else ""
        remedy = "" if status == 2 else "; run the same command again to continue"
        raise InputError(f"{folder}: training stopped (see {log}){reason}{remedy}")
    return folder
