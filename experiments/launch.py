"""Runs of train_tan.py that another program needs: started, resumed, or left alone if they are there with the settings of today."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from checkpoints import run_folder
from checkpoints.load import load_source
from plumbing.options import InputError
from settings import METHODS, Options, suited

# Which methods the groups of Options concern, where not all.
CONCERNS = {"similarity-guided training (Eq. 6)": ("guided", "tan"), "adversarial noise (Eq. 8)": ("tan",), "pairwise losses (--method pa)": ("pa",),
            "pictures": ()}
UNSEEN = run_folder.MAY_CHANGE - {"iterations"} | {"overwrite", "classifier_check"}  # nothing of them shows in the result


def settings(options: dict) -> dict:
    """Of the options of a run, what its figures depend on: {name: value as in JSON}."""
    found = {}
    for field in dataclasses.fields(Options):
        concerned = options["method"] in CONCERNS.get(field.metadata["group"], METHODS) and field.name not in UNSEEN
        if concerned and not (field.name == "adaptor_width" and options["method"] in run_folder.ALL_WEIGHTS):
            found[field.name] = json.loads(json.dumps(options.get(field.name)))
    if found.get("classifier_targets"):
        found["classifier_targets"] = Path(found["classifier_targets"]).name  # the folder of runs may move
    return found


def settings_today(**flags) -> dict:
    """`settings` of a run that is started now with these options of train_tan.py."""
    options = Options(**flags)
    return settings({**dataclasses.asdict(options), **suited(options, load_source(options.source)), **flags})


def call_train(arguments: list[str], log: Path) -> int:
    """Exit status of train_tan.py with these arguments, its output added to `log`.  When this program is told to stop, so is that one, which then saves."""
    with open(log, "a") as file:
        process = subprocess.Popen([sys.executable, str(Path(__file__).parents[1] / "train_tan.py"), *arguments], stdout=file, stderr=file, start_new_session=True)
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise


def train(folder: Path, device: str, **flags) -> Path:
    """A finished run of train_tan.py with these options in `folder`; what is there is resumed or left alone.  Returns the folder.

    Raises InputError if the run stops, or if the one in the folder has other settings.
    """
    today = settings_today(**flags)
    known = json.loads((folder / "options.json").read_text()) if (folder / "options.json").exists() else None
    if known:
        for name, value in settings(known).items():
            goes_on = name == "iterations" and name in flags and value <= today[name]
            if value != today[name] and not goes_on:
                raise InputError(f"{folder}: was trained with --{name.replace('_', '-')} {value}, wanted is {today[name]}; "
                                 "remove the folder, or choose another --output-dir")
        if (folder / "weights.safetensors").exists() and known["iterations"] == today["iterations"]:
            return folder
    folder.mkdir(parents=True, exist_ok=True)
    arguments = ["--output-dir", folder, "--device", device]
    arguments += ["--resume"] if known else [text for name, value in flags.items() if name != "iterations" for text in (f"--{name.replace('_', '-')}", value)]
    arguments += ["--iterations", flags["iterations"]] if "iterations" in flags else []
    if not known:
        arguments += ["--samples", 0, "--no-classifier-check"]  # pictures are drawn here, the classifier's accuracy is not asked for
    log = folder / "train.log"
    before = log.stat().st_size if log.exists() else 0
    status = call_train(list(map(str, arguments)), log)
    if status or not (folder / "weights.safetensors").exists():
        said = log.read_bytes()[before:].decode(errors="replace").strip().splitlines()
        raise InputError(f"{folder}: training stopped (see {log}){': ' + said[-1] if said else ''}"
                         + ("" if status == 2 else "; run the same command again to continue"))
    return folder
