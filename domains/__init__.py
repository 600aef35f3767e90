"""The built-in image domains: which there are, and reproducible pictures of each with labels.

  python -m domains            32 pictures of each, in runs/domains/

A new target is a line in TARGETS and a function in PAINTERS.  To score it takes a judge that has seen it
(docs/built-in-weights.md), with which all runs of its source's targets are scored anew.
"""

import sys
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch

from domains import churches, faces, paintings
from plumbing import distributed
from plumbing.options import InputError, did_you_mean
from plumbing.picture_folder import ImageFolder, load_folder
from plumbing.pictures import to_tensor

# source -> what samples its scenes
SOURCES = {"toyfaces": faces.sample_face, "toychurches": churches.sample_church}
# source -> {attribute: its values}, the labels
ATTRIBUTES = {"toyfaces": faces.ATTRIBUTES, "toychurches": churches.ATTRIBUTES}
# target -> its source
TARGETS = {
    "sunglasses": "toyfaces",
    "sketches": "toyfaces",
    "babies": "toyfaces",
    "modigliani": "toyfaces",
    "raphael": "toyfaces",
    "haunted-houses": "toychurches",
    "landscape-drawings": "toychurches",
}
# Built-in targets that stay what they are when their colours change; others are flipped and shifted only.
AUGMENT = {"sunglasses": ("flip", "shift", "colour"), "babies": ("flip", "shift", "colour")}
PAINTERS = {
    "toyfaces": faces.paint_toyfaces,
    "sunglasses": faces.paint_sunglasses,
    "sketches": faces.paint_sketches,
    "babies": faces.paint_babies,
    "modigliani": paintings.paint_modigliani,
    "raphael": paintings.paint_raphael,
    "toychurches": churches.paint_toychurches,
    "haunted-houses": churches.paint_haunted_houses,
    "landscape-drawings": churches.paint_landscape_drawings,
}
FEW = 5  # pictures to adapt to: fewer are warned of
STREAMS = {"train": 0, "shots": 1, "eval": 2}
# Chosen for ten scenes that together show every value of every attribute.
SHOTS_SEEDS = {"toyfaces": 986, "toychurches": 31}


def _draw(domain: str, n: int, seed: int, size: int, stream: str,
          progress: bool = False) -> tuple[np.ndarray, np.ndarray]:
    if domain not in PAINTERS:
        raise ValueError(f"unknown domain {domain!r}; known: {', '.join(PAINTERS)}")
    source = TARGETS.get(domain, domain)
    pictures = np.empty((n, size, size, 3), np.uint8)
    labels = np.empty((n, len(ATTRIBUTES[source])), np.int64)
    for i in range(n):
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(STREAMS[stream], i)))
        scene = SOURCES[source](rng)
        pictures[i] = PAINTERS[domain](scene, size, rng)
        labels[i] = [getattr(scene, name) for name in ATTRIBUTES[source]]
        if progress and (i + 1) % 1000 == 0:
            print(f"{domain}: {i + 1}/{n}", file=sys.stderr)
    return pictures, labels


def draw(domain: str, n: int, seed: int, size: int = 32,
         progress: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """n pictures, uint8 (n, size, size, 3), with labels, int64 (n, A), of the A attributes of their source.

    Picture i depends on (domain, seed, i) alone. A target shows the scenes that its source has for the same
    seed, and its labels are theirs. Raises ValueError for an unknown domain or a negative seed.
    """
    return _draw(domain, n, seed, size, "train", progress)


def ten_shots(target: str, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """The ten fixed training pictures of a target, as `draw` returns them.

    The same scenes at each size, and from a random stream of their own: never those of `draw`.
    """
    return _draw(target, 10, SHOTS_SEEDS.get(TARGETS.get(target, target), 0), size, "shots")


def evaluation_pictures(domain: str, n: int, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Fresh pictures, as `draw` returns them, from a third random stream: none of `draw` or `ten_shots`."""
    return _draw(domain, n, 0, size, "eval")


def family(source: str) -> list[str]:
    """A source and its targets."""
    return [source, *(target for target, of in TARGETS.items() if of == source)]


def draw_family(source: str, n: int, seed: int, size: int = 32,
                progress: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """About n pictures of a source and its targets, as `draw` returns them; the domain is the last label."""
    names = family(source)
    drawn = [draw(domain, n // len(names), seed, size, progress) for domain in names]
    labels = [np.column_stack([labels, np.full(len(labels), i)]) for i, (_, labels) in enumerate(drawn)]
    return np.concatenate([pictures for pictures, _ in drawn]), np.concatenate(labels)


def drawn_by(source: str) -> str | None:
    """The drawn domain that a source learned (of toyfaces-latent: toyfaces); None for others."""
    domain = source.removesuffix("-latent").removesuffix("-stylegan2")
    return domain if domain in SOURCES else None


def check_pair(source: str, target: str) -> None:
    """InputError if a built-in target is one of another built-in source."""
    drawn, wanted = drawn_by(source), TARGETS.get(target)
    if drawn and wanted and wanted != drawn:
        raise InputError(f"--target {target}: a target of {wanted}, not of {drawn}; leave --source out, or "
                         f"choose among {', '.join(family(drawn)[1:])}")


def target_images(name_or_folder: str | Path, size: int, recursive: bool = False) -> torch.Tensor:
    """The pictures to adapt to: the ten of a built-in target, all of a folder -> float32 (N, 3, size, size).

    A built-in name wins over a folder of that name, and says so; `./sunglasses` means the folder.  Raises
    InputError for neither, and as load_folder does.
    """
    if name_or_folder in TARGETS:
        _say_which(name_or_folder)
        return to_tensor(ten_shots(name_or_folder, size=size)[0])
    _need_folder(name_or_folder, "target", TARGETS)
    images = load_folder(name_or_folder, size, recursive)
    if len(images) < FEW:
        distributed.say_once(f"note: {name_or_folder}: {len(images)} picture(s) are few; expect copies of "
                             "them, about ten are better")
    return images


def training_images(name_or_folder: str | Path, size: int, hold_out: int = 0,
                    recursive: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """`target_images`, those to train on and the last `hold_out`, which are kept from training.

    Raises InputError if that leaves fewer than two to train on, and as target_images does.
    """
    images = target_images(name_or_folder, size, recursive)
    kept = len(images) - hold_out
    if hold_out and kept < 2:
        raise InputError(f"--hold-out {hold_out}: {name_or_folder} has {len(images)} pictures; at least 2 "
                         "must be left to train on")
    if any(held_out.equal(image) or held_out.equal(image.flip(2))
           for held_out in images[kept:] for image in images[:kept]):
        distributed.say_once(f"note: {name_or_folder}: a picture that is held out, or its mirror image, is "
                             "also trained on, so the held-out loss says little")
    return images[:kept], images[kept:]


def source_images(name_or_folder: str | Path, n: int, size: int, seed: int) -> torch.Tensor:
    """n pictures of a source -> float32 (n, 3, size, size): drawn for a domain, else from a folder.

    From a folder and its subfolders they are distinct, and all there are if fewer than n.  The same seed
    gives the same pictures.  Raises InputError as target_images does.
    """
    if name_or_folder in SOURCES:
        _say_which(name_or_folder)
        return to_tensor(draw(name_or_folder, n, seed, size=size)[0])
    _need_folder(name_or_folder, "source", SOURCES)
    folder = ImageFolder(name_or_folder, size, recursive=True)
    order = torch.randperm(len(folder), generator=torch.Generator().manual_seed(seed))
    return folder.batch(order[:n])


def keep_apart(out: Path, name_or_folder: str | None, recursive: bool) -> None:
    """InputError if a program would write its pictures into a folder that it reads pictures from.

    recursive   it reads those in subfolders, too
    """
    if name_or_folder is None or name_or_folder in (*TARGETS, *SOURCES) or not Path(name_or_folder).is_dir():
        return
    ours, theirs = Path(out).resolve(), Path(name_or_folder).resolve()
    if ours == theirs or recursive and theirs in ours.parents:
        raise InputError(f"--output-dir {out}: pictures are read from there ({name_or_folder}); choose one "
                         "elsewhere")


def _say_which(name: str) -> None:
    """Says so if a built-in name is taken beside a folder of that name."""
    if Path(name).is_dir():
        distributed.say_once(f"note: the built-in {name} is taken; for the folder here give ./{name}")


def need_still_there(target: str, run: Path) -> None:
    """InputError if the pictures that a run in this folder was trained on have moved."""
    if target not in TARGETS and not Path(target).exists():
        raise InputError(f"{target}: the pictures of the run in {run} are not there any more; give them with "
                         "--target")


def _need_folder(name: str | Path, role: str, built_in: Collection[str]) -> None:
    if not Path(name).exists():
        meant = did_you_mean(str(name), built_in)
        raise InputError(f"{name}: neither a folder nor a built-in {role}{meant}; give a folder of images "
                         f"(links are not fetched) or one of: {', '.join(sorted(built_in))}")
