"""The built-in image domains: which there are, and reproducible pictures of each with labels.

    python domains.py            # writes a contact sheet per domain to runs/domains/
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import churches
import faces
import paintings

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


def contact_sheet(pictures, columns=8, enlarge=1):
    """Tiles pictures (n, s, s, 3) row by row, each enlarged by an integer; n must be a multiple of `columns`."""
    n, size = pictures.shape[:2]
    tiles = pictures.reshape(n // columns, columns, size, size, 3).transpose(0, 2, 1, 3, 4)
    return Image.fromarray(tiles.reshape(n // columns * size, columns * size, 3).repeat(enlarge, 0).repeat(enlarge, 1))


def main():
    parser = argparse.ArgumentParser(description="Writes a contact sheet of each built-in domain.")
    parser.add_argument("--size", type=int, default=32, help="pixels per side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/domains"))
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for domain in PAINTERS:
        path = args.output_dir / f"{domain}_{args.size}.png"
        contact_sheet(draw(domain, 32, args.seed, args.size)[0], enlarge=max(1, 128 // args.size)).save(path)
        print(path)


if __name__ == "__main__":
    main()
