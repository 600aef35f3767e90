"""Folders and repositories of diffusers: which files of them are needed, and what they describe.

    model_index.json                      names the pipeline
    unet/config.json, unet/diffusion_pytorch_model.safetensors      or beside it; unet_ema/ is better
    scheduler/scheduler_config.json
    vqvae/ or vae/                        of latent models
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from autoencoder import KL, VQ
from checkpoints import diffusers_first_stage
from checkpoints.diffusers_unet import schedule_options, unet_options
from checkpoints.published import ARCHITECTURES, LINEAR, read_json
from checkpoints.weights_file import SUFFIXES, read_parts
from plumbing import distributed
from plumbing.options import InputError

INDEX = "model_index.json"
SCHEDULER = "scheduler_config.json"
UNETS = ("unet_ema/", "unet/", "")  # the first that has weights is taken
STAGE_PLACES = ("vqvae/", "vae/")
MODEL = r"diffusion_pytorch_model"
SHARD = r"-(\d+)-of-(\d+)"
# From the best: whole, in parts, a variant such as fp16; each safely stored or pickled.
FORMS = (rf"{MODEL}\.safetensors", rf"{MODEL}{SHARD}\.safetensors", rf"{MODEL}\.bin", rf"{MODEL}{SHARD}\.bin",
         rf"{MODEL}\.\w+({SHARD})?\.safetensors", rf"{MODEL}\.\w+({SHARD})?\.bin")
NOT_NETWORKS = re.compile(r"(optimizer|scheduler|random_states|scaler|checkpoint|training_args|classifier).*")


# ---- which files -------------------------------------------------------------------------------------------

def weights_at(place: str, names: Collection[str]) -> list[str]:
    """The files of one network's weights among the names in `place`, "unet/" say; none if there are none.

    Raises InputError for several variants, and for parts that are missing.
    """
    there = sorted(name for name in names if name.startswith(place) and "/" not in name[len(place):])
    for form in FORMS:
        if found := [name for name in there if re.fullmatch(form, name[len(place):])]:
            break
    else:
        return []
    kinds = {re.sub(SHARD, "", name) for name in found}
    if len(kinds) > 1:
        raise InputError(f"{place or 'the folder'}: has several variants, {', '.join(sorted(kinds))}; give "
                         "the file of one")
    parts = re.search(SHARD, found[0])
    if parts and len(found) != int(parts[2]):
        raise InputError(f"{place or 'the folder'}: {len(found)} of the {int(parts[2])} parts of the "
                         "weights are there; download the others")
    return found


def weights_of(names: Collection[str]) -> list[str]:
    """The files of the U-Net's weights among all files of a folder or repository; none if there are none.

    Without diffusers' names the only file of weights there is; InputError if there are several.
    """
    for place in UNETS:
        if weights := weights_at(place, names):
            return weights
    if "model.safetensors" in names:  # of pretrain.py
        return ["model.safetensors"]
    others = sorted(name for name in names if name.endswith(SUFFIXES) and name[0] != "."
                    and not NOT_NETWORKS.fullmatch(name.rpartition("/")[2]))
    if len(others) > 1:
        raise InputError(f"several files of weights, {', '.join(others[:5])}; give one of them")
    return others


def first_stage_at(names: Collection[str]) -> list[str]:
    """The files of the first stage's weights among all of a folder or repository; none if there is none."""
    return next(filter(None, (weights_at(place, names) for place in STAGE_PLACES)), [])


def missing_first_stage(folder: Path) -> str | None:
    """The place of the first stage that model_index.json names, if its weights are not there."""
    index = _read(folder / INDEX) if (folder / INDEX).exists() else {}
    named = [place for place in STAGE_PLACES if any(index.get(place[:-1]) or ())]
    return named[0] if named and not first_stage_at(names_in(folder)) else None


def needed(names: Collection[str], file: str | None = None) -> list[str]:
    """Of all files of a repository those that are read; none if it holds no network that is known here.

    file    the one that is asked for, instead of the best
    """
    if file and file not in names:
        return []
    if file and not _is_of_diffusers(file):
        return [file]  # stands alone
    # The folder of the pipeline, "" or that of a checkpoint, whose scheduler may be in the folder above.
    root = re.sub(r"unet(_ema)?/$", "", file[: file.rfind("/") + 1]) if file else ""
    above = re.sub(r"[^/]+/$", "", root) + f"scheduler/{SCHEDULER}"
    inside = [name.removeprefix(root) for name in names if name.startswith(root)]
    weights = [file.removeprefix(root)] if file else weights_of(inside)
    places = {*UNETS, *STAGE_PLACES, "scheduler/"}
    described = [name for name in inside if name == INDEX
                 or name.endswith("config.json") and name[: name.rfind("/") + 1] in places]
    found = [root + name for name in (*weights, *first_stage_at(inside), *sorted(described))]
    return [*found, *({above} & {*names} - {*found})] if weights else []


def undescribed(names: Collection[str]) -> list[str]:
    """The weights with diffusers' names that have no config.json beside them."""
    return [name for name in names
            if _is_of_diffusers(name) and name[: name.rfind("/") + 1] + "config.json" not in names]


def _is_of_diffusers(name: str) -> bool:
    """Whether a file is called as diffusers calls weights."""
    return any(re.fullmatch(form, name.rpartition("/")[2]) for form in FORMS)


def names_in(folder: Path) -> set[str]:
    """The files in a folder and in those right below it, relative to it."""
    return {path.relative_to(folder).as_posix() for depth in ("*", "*/*") for path in folder.glob(depth)
            if not path.is_dir()}


def files_in(folder: Path) -> list[Path]:
    """`weights_of` a folder on disk; InputError for one without a network, and for a run of train_tan.py."""
    names = names_in(folder)
    if {"options.json", "metrics.jsonl"} <= names:
        raise InputError(f"{folder}: a run of train_tan.py, which cannot be the source of another; give the "
                         "source it was made from (python -m checkpoints.export makes one of a run with "
                         "--method finetune)")
    runs = sorted(name.partition("/")[0] for name in names if name.endswith("/options.json"))
    try:
        found = weights_of({name for name in names if name.partition("/")[0] not in runs})
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    if runs and not found:
        raise InputError(f"{folder}: holds runs, {', '.join(runs[:5])}; give the folder of one")
    if not found:
        raise InputError(f"{folder}: holds no network: no run (options.json), no folder of diffusers "
                         "(diffusion_pytorch_model.safetensors or .bin), no file of weights")
    return [folder / name for name in found]


# ---- what they are -----------------------------------------------------------------------------------------

def describe(file: Path, arch: str | None, layout: str) -> dict[str, Any]:
    """What the weights in `file` are, from the config.json beside them, the first stage's and the
    scheduler's.

    arch    whose schedule to take if there is none: a name of ARCHITECTURES or a JSON file
    layout  in words, as it shall stand in the description
    Raises InputError for what unet.py and autoencoder.py cannot be.
    """
    place, folder, theirs = file.parent, _folder_of(file), file.parent / "config.json"
    description = dict(network="UNet", config=unet_options(_read(theirs), theirs),
                       schedule=_schedule_in(folder, arch), layout=layout)
    if place.name == "unet_ema":
        description["layout"] += ", averaged weights (unet_ema/)"
        distributed.say_once(f"{folder}: its averaged weights are taken, unet_ema/")
    if missing := missing_first_stage(folder):
        raise InputError(f"{folder}: {INDEX} names a first stage, but {missing} has no weights; download it, "
                         "too")
    if stage := first_stage_at(names_in(folder)):
        config = folder / Path(stage[0]).parent / "config.json"
        network, scale = diffusers_first_stage.first_stage_options(_read(config), config)
        description |= dict(first_stage=network, scale_factor=scale, clip=_limit_in(folder))
    return description


def first_stage_weights(model: VQ | KL, file: Path) -> dict[str, Tensor]:
    """The first stage's weights in the folder of the U-Net's `file`, named as in Network.state_dict.

    Raises InputError unless they are exactly its own.
    """
    folder = _folder_of(file)
    files = [folder / name for name in first_stage_at(names_in(folder))]
    tensors, _ = read_parts(files)
    ours = diffusers_first_stage.translated(model, tensors, files[0])
    return {f"first_stage.{key}": value for key, value in ours.items()}


def _folder_of(file: Path) -> Path:
    """The folder with model_index.json: that of the file, or the one above unet/."""
    place = file.absolute().parent
    return place.parent if f"{place.name}/" in UNETS else place


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{file}: diffusers' description of the network cannot be read ({error})") from None


def _scheduler_of(folder: Path) -> Path | None:
    """Where the scheduler is described: in the folder or, of a checkpoint of a training, in the one above."""
    places = (folder / "scheduler", folder, folder.parent / "scheduler")
    return next((place / SCHEDULER for place in places if (place / SCHEDULER).exists()), None)


def _limit_in(folder: Path) -> float | None:
    """What a latent model's scheduler limits the predicted x_0 to, if to anything.

    1 is what diffusers writes where nobody chose; latents of unit variance exceed it.
    """
    theirs = _read(file) if (file := _scheduler_of(folder)) else {}
    limit = theirs.get("clip_sample_range", 1.0)
    return limit if theirs.get("clip_sample") and limit != 1.0 else None


def _schedule_in(folder: Path, arch: str | None) -> dict[str, Any]:
    """Options of our Schedule: those of the folder's scheduler, else those of `arch`."""
    if file := _scheduler_of(folder):
        if arch is not None:
            raise InputError(f"--arch {arch}: {file} says how it was trained; leave it out")
        return schedule_options(_read(file), file)
    if arch in ARCHITECTURES:
        return ARCHITECTURES[arch]["schedule"]
    if arch is not None:
        return read_json(arch).get("schedule", LINEAR)
    raise InputError(f"{folder}: no {SCHEDULER} that says with which schedule it was trained; "
                     "add --arch ddpm256 (linear) or --arch FILE.json")
