"""The built-in image domains: which there are, and reproducible pictures of each with labels.

  python domains.py            32 pictures of each, in runs/domains/
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np

import churches
import faces
import paintings
from options import at_least, option, parse, run

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


@dataclasses.dataclass
class Options:
    size: int = option(32, "pixels per side")
    seed: int = option(0, "of the scenes")
    output_dir: str = option("runs/domains", "where they go")


def main() -> None:
    from data import to_tensor  # which imports this file
    from pictures import save_grid
    options, _ = parse(Options, description=__doc__)
    at_least(options, size=8, seed=0)
    out = Path(options.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    for domain in PAINTERS:
        path = out / f"{domain}_{options.size}.png"
        save_grid(path, to_tensor(draw(domain, 32, options.seed, options.size)[0]), columns=8)
        print(path)


if __name__ == "__main__":
    run(main)
