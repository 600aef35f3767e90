"""The augmentations of ADA (Karras et al. 2020a), each applied to a picture with probability p.

Those of its published pipeline "bgc": flips, quarter turns, shifts; scaling, turning; colour.  Each is a
matrix for each picture; their product is applied once, and gradients flow through.  Unlike there, pictures
are not filtered before they are sampled anew, between pixels bilinearly, beyond the border by reflection.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SHIFT, SPREAD = 0.125, 0.2  # whole-pixel shifts at most, in sizes; standard deviations of log2 of the scales


class Draw:
    """Random numbers for n pictures on the CPU, and the choice of those to which a transform applies."""

    def __init__(self, n: int, generator: torch.Generator):
        self.n, self.generator = n, generator

    def uniform(self, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(self.n, generator=self.generator)

    def normal(self, deviation: float) -> Tensor:
        return deviation * torch.randn(self.n, generator=self.generator)

    def below(self, n: int) -> Tensor:
        return torch.randint(n, (self.n,), generator=self.generator).float()

    def sometimes(self, p: float, matrix: Tensor) -> Tensor:
        """These matrices (n, m, m), each with probability p, else the identity."""
        chosen = torch.rand(self.n, 1, 1, generator=self.generator) < p
        return torch.where(chosen, matrix, torch.eye(matrix.shape[1]))


# ---- matrices, (N, 3, 3) of the plane and (N, 4, 4) of colours -------------------------------------------

def diagonal(*values: Tensor) -> Tensor:
    """(N,) each, and a last 1 -> (N, m, m)."""
    return torch.diag_embed(torch.stack([*values, torch.ones_like(values[0])], 1))


def translation(*by: Tensor) -> Tensor:
    """x + by: (N,) each -> (N, m, m)."""
    matrix = torch.eye(len(by) + 1).repeat(len(by[0]), 1, 1)
    matrix[:, :-1, -1] = torch.stack(by, 1)
    return matrix


def rotation(angle: Tensor) -> Tensor:
    """Of the plane, from the first axis to the second: (N,) -> (N, 3, 3)."""
    matrix, cos, sin = torch.eye(3).repeat(len(angle), 1, 1), angle.cos(), angle.sin()
    matrix[:, 0, 0], matrix[:, 0, 1], matrix[:, 1, 0], matrix[:, 1, 1] = cos, -sin, sin, cos
    return matrix


def hue(angle: Tensor) -> Tensor:
    """Of colours about the axis of greys: (N,) -> (N, 4, 4)  (Rodrigues' formula)."""
    grey, cross = torch.full((3, 3), 1 / 3), torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    matrix = torch.eye(4).repeat(len(angle), 1, 1)
    matrix[:, :3, :3] = cos * torch.eye(3) + sin * cross + (1 - cos) * grey
    return matrix


def along_grey(luma: Tensor, colour: Tensor) -> Tensor:
    """What is grey in a colour times luma, the rest times colour: (N,) each -> (N, 4, 4)."""
    grey, matrix = torch.full((3, 3), 1 / 3), torch.eye(4).repeat(len(luma), 1, 1)
    matrix[:, :3, :3] = luma[:, None, None] * grey + colour[:, None, None] * (torch.eye(3) - grey)
    return matrix


# ---- what is drawn ---------------------------------------------------------------------------------------

def random_geometry(n: int, p: float, size: int, generator: torch.Generator) -> Tensor:
    """(n, 3, 3) from a picture's plane, [-1, 1] each way, to that of the augmented one."""
    draw, one = Draw(n, generator), torch.ones(n)
    turn = 1 - math.sqrt(1 - p)  # two of these, with the chance p that there is one
    pixel = 2 / size
    shifts = [(draw.uniform(-SHIFT, SHIFT) * size).round() * pixel for _ in range(2)]
    scale, squeeze = draw.normal(SPREAD).exp2(), draw.normal(SPREAD).exp2()
    steps = [draw.sometimes(p, diagonal(1 - 2 * draw.below(2), one)),
             draw.sometimes(p, rotation(draw.below(4) * math.pi / 2)),
             draw.sometimes(p, translation(*shifts)),
             draw.sometimes(p, diagonal(scale, scale)),
             draw.sometimes(turn, rotation(draw.uniform(-math.pi, math.pi))),
             draw.sometimes(p, diagonal(squeeze, 1 / squeeze)),
             draw.sometimes(turn, rotation(draw.uniform(-math.pi, math.pi))),
             draw.sometimes(p, translation(draw.normal(2 * SHIFT), draw.normal(2 * SHIFT)))]
    return product(steps)


def random_colour(n: int, p: float, generator: torch.Generator) -> Tensor:
    """(n, 4, 4) of colours."""
    draw, one = Draw(n, generator), torch.ones(n)
    brightness, contrast = draw.normal(0.2), draw.normal(0.5).exp2()
    return product([draw.sometimes(p, translation(brightness, brightness, brightness)),
                    draw.sometimes(p, diagonal(contrast, contrast, contrast)),
                    draw.sometimes(p, along_grey(1 - 2 * draw.below(2), one)),
                    draw.sometimes(p, hue(draw.uniform(-math.pi, math.pi))),
                    draw.sometimes(p, along_grey(one, draw.normal(1.0).exp2()))])


def product(steps: list[Tensor]) -> Tensor:
    """The first of these matrices (N, m, m) applied first."""
    found = steps[0]
    for step in steps[1:]:
        found = step @ found
    return found


# ---- applied ---------------------------------------------------------------------------------------------

def apply_geometry(images: Tensor, matrix: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) moved by (N, 3, 3)."""
    backwards = matrix.inverse()[:, :2].to(images)
    grid = F.affine_grid(backwards, list(images.shape), align_corners=False)               # (N, H, W, 2)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def apply_colour(images: Tensor, matrix: Tensor) -> Tensor:
    """Colours (N, 3, H, W) changed by (N, 4, 4)."""
    matrix = matrix.to(images)
    return torch.einsum("nij,njhw->nihw", matrix[:, :3, :3], images) + matrix[:, :3, 3, None, None]


def augment(images: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Pictures (N, 3, H, W), each transform with probability p; with p = 0 the pictures themselves."""
    if p == 0:
        return images
    images = apply_geometry(images, random_geometry(len(images), p, images.shape[2], generator))
    return apply_colour(images, random_colour(len(images), p, generator))
