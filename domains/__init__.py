"""The built-in image domains: which there are, and reproducible pictures of each with labels.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from domains import churches, faces, paintings
from plumbing.options import InputError
from plumbing.pictures import ImageFolder, load_folder, to_tensor

SOURCES = {"toyfaces": faces.sample_face, "toychurches": churches.sample_church}  # source -> what samples its scenes
ATTRIBUTES = {"toyfaces": faces.ATTRIBUTES, "toychurches": churches.ATTRIBUTES}   # source -> {attribute: its values}, the labels
TARGETS = {"sunglasses": "toyfaces", "sketches": "toyfaces", "babies": "toyfaces", "modigliani": "toyfaces", "raphael": "toyfaces",
           "haunted-houses": "toychurches", "landscape-drawings": "toychurches"}  # target -> its source
PAINTERS = {"toyfaces": faces.paint_toyfaces, "sunglasses": faces.paint_sunglasses, "sketches": faces.paint_sketches, "babies": faces.paint_babies,
            "modigliani": paintings.paint_modigliani, "raphael": paintings.paint_raphael,
            "toychurches": churches.paint_toychurches, "haunted-houses": churches.paint_haunted_houses,
            "landscape-drawings": churches.paint_landscape_drawings}
STREAMS = {"train": 0, "shots": 1, "eval": 2}
SHOTS_SEEDS = {"toyfaces": 986, "toychurches": 31}  # chosen for ten scenes that together show every value of every attribute


def _draw(domain, n, seed, size, stream, progress=False):
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


def draw(domain: str, n: int, seed: int, size: int = 32, progress: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Draws n pictures, uint8 (n, size, size, 3), and labels, int64 (n, A) in the order of the A attributes of its source in ATTRIBUTES.

    Picture i depends on (domain, seed, i) alone. A target shows the scenes that its source has for the same seed, and its
    labels are theirs. Raises ValueError for an unknown domain or a negative seed.
    """
    return _draw(domain, n, seed, size, "train", progress)


def ten_shots(target: str, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """The ten fixed training pictures of a target, as `draw` returns them: the same scenes at each size, never drawn by `draw`."""
    return _draw(target, 10, SHOTS_SEEDS.get(TARGETS.get(target, target), 0), size, "shots")


def evaluation_pictures(domain: str, n: int, size: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Fresh pictures, as `draw` returns them, from a random stream of their own: never those of `draw` or `ten_shots`."""
    return _draw(domain, n, seed, size, "eval")


def drawn_by(source: str) -> str | None:
    """The domain of a built-in source model, pixel or latent (toyfaces-latent: toyfaces); None for any other name."""
    domain = source.removesuffix("-latent")
    return domain if domain in SOURCES else None


# Built-in targets that stay what they are when their colours change; others are flipped and shifted only.
AUGMENT = {"sunglasses": ("flip", "shift", "colour"), "babies": ("flip", "shift", "colour")}


def target_images(name_or_folder, size):
    """The pictures to adapt to: the ten of a built-in target, or all of a folder -> float32 (N, 3, size, size).

    A built-in name wins over a folder of that name; `./sunglasses` means the folder. Raises InputError for neither.
    """
    if name_or_folder in TARGETS:
        return to_tensor(ten_shots(name_or_folder, size=size)[0])
    _need_folder(name_or_folder, "target", TARGETS)
    return load_folder(name_or_folder, size)


def source_images(name_or_folder, n, size, seed):
    """n pictures of a source -> float32 (n, 3, size, size): drawn for a built-in name, else picked from a folder.

    From a folder they are distinct, and all there are if fewer than n. The same seed gives the same pictures.
    """
    if name_or_folder in SOURCES:
        return to_tensor(draw(name_or_folder, n, seed, size=size)[0])
    _need_folder(name_or_folder, "source", SOURCES)
    folder = ImageFolder(name_or_folder, size)
    return folder.batch(torch.randperm(len(folder), generator=torch.Generator().manual_seed(seed))[:n])


def _need_folder(name, role, built_in):
    if not Path(name).exists():
        raise InputError(f"{name}: neither a folder nor a built-in {role}; "
                         f"give a folder of images or one of: {', '.join(sorted(built_in))}")
