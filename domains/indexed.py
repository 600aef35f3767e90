"""What pretrain.py learns from: pictures by index, those of a built-in domain with labels."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

import domains
from plumbing import distributed
from plumbing.picture_folder import ImageFolder
from plumbing.pictures import to_tensor

Batches = Callable[[Iterable[Tensor]], Iterator[tuple[Tensor, Tensor | None]]]
"""From indices (B,), batch by batch, to images (B, 3, H, W), and labels (B, attributes) or None."""


def attributes_of(source: str, with_targets: bool) -> dict[str, list[str]]:
    """What the labels of a drawn source tell, in their order: attributes and their values; of others none.

    With its targets' pictures among them the last label is the domain.
    """
    found = {name: list(values) for name, values in domains.ATTRIBUTES.get(source, {}).items()}
    return found | (dict(domain=domains.family(source)) if with_targets else {})


def load_pictures(source: str, size: int, images: int, seed: int, with_targets: bool) -> tuple[Batches, int]:
    """The pictures of a source, and how many there are.

    Of a built-in domain about `images` are drawn, with labels, and on request its targets' among them.  Of a
    folder all are taken, without labels.
    """
    if source not in domains.SOURCES:
        folder = ImageFolder(source, size, recursive=True, skip=True)
        return (lambda order: ((images, None) for images in folder.batches(order))), len(folder)
    draw = domains.draw_family if with_targets else domains.draw
    drawn = draw(source, images, seed, size, distributed.rank() == 0)
    pixels, labels = (torch.from_numpy(values) for values in drawn)
    return (lambda order: ((to_tensor(pixels[i]), labels[i]) for i in order)), len(pixels)
