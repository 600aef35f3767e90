"""What a run of train_tan.py or of baselines/gan_transfer.py leaves on disk, and how it is read back.

options.json and weights.safetensors together are the adapted model: psi alone beside the source it belongs
to, or all weights after a method without adaptors (of a GAN, the generator's).  stages/ holds the same for
each row of progress.png, and what was measured there.  checkpoint.pt holds the training state; the rest is
for people.
"""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

import adaptor
import domains
from checkpoints.gan import GAN
from checkpoints.load import is_there, load_network, load_source
from checkpoints.network import Network, check_finite, fingerprint, load_strictly, reading
from checkpoints.published import ARCHITECTURES
from checkpoints.weights_file import read_tensors
from plumbing import distributed
from plumbing.files import check_replaceable, load_checkpoint, read_metrics, remove_unfinished, write_text
from plumbing.options import InputError, check_types, flag, flat, replace
from plumbing.picture_folder import hash_of, refuse_pictures
from plumbing.shell import quoted

T = TypeVar("T")
ARCH = "arch.json"  # a copy of the file that --arch named, if it named one
CLASSIFIER = "classifier.safetensors"
FILES = ("options.json", ARCH, "checkpoint.pt", CLASSIFIER, "weights.safetensors", "metrics.jsonl",
         "targets.png", "samples.png", "progress.png", "loss.png", "score.json",
         "stages.json", "stages.png", "report.html")
FOLDERS = ("progress", "stages", "tensorboard")
MAY_CHANGE = {"resume", "output_dir", "iterations", "device", "micro_batch_size", "checkpoint_blocks",
              "compile", "save_every", "tensorboard",
              "source", "target"}  # they may move; their content is compared


# ---- where a run begins, or goes on ------------------------------------------------------------------------

def resumed(out: Path, options: T, typed: frozenset[str]) -> T:
    """The options of the run in `out`, which hold when it is resumed.

    Raises InputError if there is no run, or if a flag that was typed contradicts it.
    """
    if not (out / "options.json").exists():
        raise InputError(f"{out}: no run to resume (no options.json); leave out --resume to start one")
    # An option of which nothing shows in the weights may be newer than the run.
    newer = {name: value for name, value in flat(type(options)()).items() if name in MAY_CHANGE}
    saved, asked = newer | read_options(out), flat(options)
    if saved.keys() != asked.keys():
        raise InputError(f"{out}/options.json: of another program, or of another version of this one "
                         f"(--method {saved['method']}); continue it with that, or choose --output-dir")
    check_types(options, saved, f"{out}/options.json")
    for name in sorted(typed - MAY_CHANGE):
        if json.loads(json.dumps(asked[name])) != saved[name]:
            raise InputError(f"{flag(name)} {asked[name]}: the run in {out} has {saved[name]}; leave the "
                             f"flag out (--output-dir {quoted(out)} --resume), or start another run with "
                             "another --output-dir")
    if "source" not in typed and not is_there(saved["source"]):
        raise InputError(f"{saved['source']}: the source of the run in {out} is not there any more; give it "
                         "with --source")
    if "target" not in typed:
        domains.need_still_there(saved["target"], out)
    kept = {name: asked[name] for name in (typed & MAY_CHANGE) | {"device"}}
    saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    return replace(options, **{**saved, **kept, "resume": True})


def identity_of(source: Network | GAN) -> dict[str, Any]:
    """What a source must keep while runs from it go on and are read; of a GAN it is the weights alone."""
    return dict(source=fingerprint(source), reading={} if isinstance(source, GAN) else reading(source))


def _what_differs(known: dict[str, Any], present: dict[str, Any]) -> str:
    """How `identity_of` a source differs from what is known of another, in words; empty where it does not.

    Of older runs the weights alone are known.
    """
    if known.get("source") != present["source"]:
        return "its weights are others"
    return "; ".join(f"{name} {present['reading'][name]} instead of {value}"
                     for name, value in known.get("reading", {}).items()
                     if present["reading"].get(name, value) != value)


def identity(source: Network | GAN, targets: Tensor, compared: str | None) -> dict[str, Any]:
    """What has to be the same when a run goes on: source, training pictures (K, 3, H, W), those held out
    after the others, and `compared`.

    compared    which pictures the loss compares with each other, in words; None where it compares none
    """
    return identity_of(source) | dict(pictures=hash_of(targets), compared=compared)


def read_state(out: Path, options: dict[str, Any], belongs: dict[str, Any]) -> dict[str, Any] | None:
    """The training state of the run in `out`, or None if it has saved none.

    Raises InputError if its `identity` is another one, if more iterations are done than are wanted, or if a
    run that is finished has no state: to begin it again would cost it its weights.
    """
    if not (out / "checkpoint.pt").exists():
        if (out / "weights.safetensors").exists() and read_metrics(out / "metrics.jsonl"):
            raise InputError(f"{out}: is finished, and has no checkpoint.pt to go on from; train it anew "
                             "with --overwrite or in another --output-dir")
        return None
    state = load_checkpoint(out / "checkpoint.pt", options["iterations"])
    if differs := _what_differs(state, belongs):
        raise InputError(f"{out}: belongs to another source than the present {options['source']} ({differs})")
    if state.get("pictures") != belongs["pictures"]:
        raise InputError(f"{options['target']}: the pictures have changed since the run in {out} began; "
                         "start anew with --overwrite or another --output-dir")
    if state.get("compared", belongs["compared"]) != belongs["compared"]:
        raise InputError(f"{out}: --method {options['method']} compares the pictures that go through the "
                         f"network together: the run began with {state['compared']}, now it would be "
                         f"{belongs['compared']}")
    return state


def open_run(out: Path, options: dict[str, Any], belongs: dict[str, Any]) -> dict[str, Any] | None:
    """Make the folder, emptied of an earlier run unless this one resumes it, and write the (flat) options
    and a copy of the file that --arch names.

    Returns the training state from which a resumed run goes on, or None: it begins.  Raises InputError if
    the folder holds a run that --overwrite does not give up, and as `read_state` does.
    """
    if any("\udc80" <= letter <= "\udcff" for letter in str(out)):  # safetensors does not open it
        raise InputError(f"--output-dir {out}: is no UTF-8; choose another name")
    state = read_state(out, options, belongs) if options["resume"] else None
    if options["resume"]:
        _say_what_falls(options, read_options(out)["iterations"])
    check_replaceable(out, ("options.json",), options["resume"], options["overwrite"])
    if not (out / "options.json").exists():
        if any((out / name).exists() for name in FILES + FOLDERS):
            raise InputError(f"{out}: holds files with the names a run would write, but is not a run; choose "
                             "another --output-dir")
        refuse_pictures(out)
    arch = arch_of(out, options) if options["resume"] else options.get("arch")
    described = Path(arch).read_text() if _is_file(arch) else None
    distributed.barrier()
    if distributed.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        for folder in (out, *(out / name for name in FOLDERS)):
            remove_unfinished(folder)
        if not options["resume"]:
            for name in FOLDERS:
                shutil.rmtree(out / name, ignore_errors=True)
            for name in reversed(FILES):  # options.json last: killed here, it is still a run
                (out / name).unlink(missing_ok=True)
            if old := sorted(path.name for path in out.glob("drawn*")):
                distributed.say(f"note: {', '.join(old)} in {out}: are of the run that was there before")
        done = state["iteration"] if state else 0
        for file in itertools.chain((out / "stages").glob("*"), (out / "progress").glob("*")):
            if file.stem.isdigit() and int(file.stem) > done:  # made anew, as its metrics are
                file.unlink()
        if (out / "weights.safetensors").exists() and (done < options["iterations"] or state is None):
            # A finished run that goes on is not finished.
            for name in ("samples.png", "stages.json", "stages.png", "report.html", "weights.safetensors"):
                (out / name).unlink(missing_ok=True)
        text = json.dumps(dict(options, resume=False, overwrite=False), indent=1)
        write_text(out / "options.json", text)
        if described:
            write_text(out / ARCH, described)
    distributed.barrier()
    return state


def _say_what_falls(options: dict[str, Any], before: int) -> None:
    """What follows from another number of iterations than before, for a run with these (flat) options."""
    constant = {"learning_rate_decay": "none", "guidance_fade": 0}
    falling = [flag(name) for name, value in constant.items() if options.get(name, value) != value]
    if falling and options["iterations"] != before:
        distributed.say(f"what falls with the run's length ({', '.join(falling)}) falls over "
                        f"{options['iterations']} iterations from now on, not over {before}")


# ---- read back ---------------------------------------------------------------------------------------------

def read_options(folder: Path) -> dict[str, Any]:
    """The (flat) options of a run; InputError if there are none, or if those that name its network are
    damaged."""
    file = Path(folder) / "options.json"
    try:
        options = json.loads(file.read_text())
    except OSError:
        raise InputError(f"{folder}: not the folder of a run (no options.json)") from None
    except ValueError:
        raise InputError(f"{file}: damaged; if its source is known, the run can be made anew, with the "
                         "same flags and --overwrite") from None
    texts = ("source", "target", "method")
    if (not isinstance(options, dict) or not all(isinstance(options.get(name), str) for name in texts)
            or options.get("precision", "fp32") not in ("fp32", "bf16")
            or options.get("adaptor", "bottleneck") not in tuple(adaptor.FORMS)):
        raise InputError(f"{file}: not the options of a run, or damaged")
    return options


def arch_of(folder: Path, options: dict[str, Any]) -> str | None:
    """--arch of the run with these (flat) options: its own copy of the file, or a name, or None."""
    arch, copy = options.get("arch"), Path(folder) / ARCH
    return str(copy) if _is_file(arch) and copy.exists() else arch


def _is_file(arch: str | None) -> bool:
    """Whether --arch names a file, not a known network."""
    return arch is not None and arch not in ARCHITECTURES


def stage_file(folder: Path, iteration: int) -> Path:
    """The weights of a stage, as in weights.safetensors; its record is beside them, in their description."""
    return Path(folder) / "stages" / f"{iteration:06d}.safetensors"


def pictures_of(folder: Path) -> str | None:
    """`hash_of` the pictures that a run with stages was trained on; None of an older run."""
    with safe_open(stage_file(folder, stages(folder)[0]["iteration"]), "pt") as file:
        return json.loads(file.metadata()["description"]).get("pictures")


def stages(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's stages, in order.

    iteration        how many are done
    nearest          `metrics.nearest_rms` of the eight pictures of progress.png; None without pictures
    held_out_loss, training_loss   of `run_report.Report.loss`; None where no pictures are held out
    """
    found = []
    for path in sorted((Path(folder) / "stages").glob("[0-9]*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                found.append(json.loads(file.metadata()["description"])["stage"])
        except (SafetensorError, LookupError, TypeError, ValueError):
            distributed.say_once(f"note: {path} is damaged, and left out; remove it")
    return found


def best_stage(records: list[dict[str, Any]]) -> int | None:
    """The iteration after which the held-out loss is lowest: from there on the training pictures are learnt
    by heart.  None if nothing was held out.
    """
    losses = {record["iteration"]: record["held_out_loss"] for record in records}
    return None if None in losses.values() else min(losses, key=losses.get, default=None)


def find_stage(folder: Path, at: int) -> Path:
    """The file of a run's stage after `at` iterations; InputError that lists the stages if there is none."""
    path = stage_file(folder, at)
    if not path.exists():
        known = ", ".join(str(record["iteration"]) for record in stages(folder)) or "none"
        raise InputError(f"--at {at}: no such stage; {folder} has {known}")
    return path


def load_run(folder: Path, at: int | None = None,
             source: str | None = None) -> tuple[Network | GAN, dict[str, Any]]:
    """A finished run's adapted model, or that of its stage after `at` iterations, and its options.

    source   where its source is now, if it has moved
    Raises InputError if there is none, or if a key or the source does not match.
    """
    folder, options = Path(folder), read_options(folder)
    path = folder / "weights.safetensors" if at is None else find_stage(folder, at)
    if not path.exists():
        raise InputError(f"{folder}: this run is not finished; continue it with --output-dir "
                         f"{quoted(folder)} --resume")
    try:
        tensors, description = read_tensors(path)
    except InputError as error:
        if at is not None:
            raise
        raise InputError(f"{error}, or have it written anew with --output-dir {quoted(folder)} "
                         "--resume") from None
    if (description is None or not isinstance(description.get("source"), str)
            or not isinstance(description.get("clip"), float | None)
            or not isinstance(description.get("reading", {}), dict)):
        raise InputError(f"{path}: not the weights of a run")
    try:
        network = load_source(source or options["source"], arch_of(folder, options))
    except InputError as error:
        if source or Path(options["source"]).exists():
            raise
        raise InputError(f"{folder}: the source of this run cannot be found; give it with --source "
                         f"({error})") from None
    network.precision = options.get("precision", "fp32")
    if differs := _what_differs(description, identity_of(network)):
        raise InputError(f"{path}: made from another source than the present {source or options['source']} "
                         f"({differs})")
    network.clip = description.get("clip", network.clip)
    if not any(".adaptor." in key for key in tensors):  # a method that changes theta itself
        load_strictly(network.model, tensors, path)
        return network, options
    check_finite(tensors, path)
    try:
        adaptor.attach(network.model, options.get("adaptor_width"), options.get("adaptor", "bottleneck"))
        adaptor.load_state_dict(network.model, tensors)
    except KeyError as error:
        raise InputError(f"{path}: {error.args[0]}") from None
    except (ArithmeticError, RuntimeError, TypeError, ValueError):  # no width, or another one
        raise InputError(f"{path}: does not fit the adaptors that {folder}/options.json "
                         "describes") from None
    return network, options


def load_model(name: str, arch: str | None, at: int | None = None,
               source: str | None = None) -> tuple[Network | GAN, dict[str, Any] | None]:
    """The network of a run's folder, with the run's options, or of a source (`load_source`), with None.

    psi is folded into theta where its form allows that.  Raises InputError as these do, and for an `arch`
    beside a run, or an `at` or `source` beside a source.
    """
    if not (Path(name) / "options.json").exists():
        for flag_, value in (("--at", at), ("--source", source)):
            if value is not None:
                raise InputError(f"{flag_} {value}: {name} is not a run; leave it out")
        return load_source(name, arch), None
    if arch:
        raise InputError(f"--arch {arch}: a run has the network it was trained with; leave it out")
    network, options = load_run(Path(name), at, source)
    if isinstance(network, Network):
        adaptor.fold(network.model)
    return network, options


def load_classifier(folder: Path) -> Network:
    """The fine-tuned p_phi of a run with guidance."""
    path = Path(folder) / CLASSIFIER
    if not path.exists():
        raise InputError(f"{folder}: this run has no classifier; guidance needs a run with --method tan "
                         "or guided")
    return load_network(path)
