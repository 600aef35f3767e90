"""What the built-in domains are drawn with: shapes and strokes with Pillow, smooth, in pencil or in ink."""

import functools

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]  # red, green and blue from 0 to 255

SUPERSAMPLING = 4
UNITS = 32  # every coordinate is in 1/32 of the picture's side, whatever the size in pixels
WHITE = (255, 255, 255)
PAPER, PENCIL, GRAPHITE = (248, 246, 241), (122, 122, 124), (66, 66, 68)
PARCHMENT, INK = (247, 241, 228), (78, 58, 44)


def mix(a: Colour, b: Colour, amount: float) -> Colour:
    """Colour `a` with the fraction `amount` of colour `b`."""
    return tuple(round(p + (q - p) * amount) for p, q in zip(a, b))


def oval(cx: float, cy: float, rx: float, ry: float, start: float = 0.0, end: float = 360.0) -> np.ndarray:
    """Points (48, 2) on an ellipse from angle `start` to `end` in degrees; 0 is right, 90 is down."""
    angle = np.radians(np.linspace(start, end, 48))
    return np.stack([cx + rx * np.cos(angle), cy + ry * np.sin(angle)], axis=1)


def box(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    """The corners of an upright rectangle, clockwise from its top left."""
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


class Canvas:
    """A supersampled picture. Points are (k, 2) relative to `centre` and turn about it by `tilt` radians."""

    def __init__(self, size: int, colour: Colour, centre: tuple[float, float] = (0.0, 0.0),
                 tilt: float = 0.0) -> None:
        self.size, self.side, self.scale = size, size * SUPERSAMPLING, size * SUPERSAMPLING / UNITS
        self.centre, self.tilt = np.array(centre), tilt
        self.image = self.background(colour)
        self.pen = ImageDraw.Draw(self.image)

    def background(self, colour: Colour) -> Image.Image:
        """The empty picture: the colour, a little lighter at the top and darker at the bottom."""
        rows = np.linspace(mix(colour, WHITE, 0.12), mix(colour, (0, 0, 0), 0.06), self.side)
        column = Image.fromarray(rows[:, None].round().astype(np.uint8))
        return column.resize((self.side, self.side), Image.Resampling.NEAREST)

    def pixels(self, points: ArrayLike) -> list[tuple[float, float]]:
        """Where points are in the supersampled picture."""
        cos, sin = np.cos(self.tilt), np.sin(self.tilt)
        turned = np.asarray(points, float) @ np.array([[cos, sin], [-sin, cos]])
        return [tuple(p) for p in ((turned + self.centre) * self.scale - 0.5).tolist()]

    def shape(self, points: ArrayLike, colour: Colour, pencil: str | None = "outline") -> None:
        """Fills a polygon.

        `pencil` says what a sketch makes of it: "outline", "hatch", "solid", "blank" or None (left out).
        """
        self.pen.polygon(self.pixels(points), fill=colour)

    def stroke(self, points: ArrayLike, width: float, colour: Colour, pencil: str | None = "solid") -> None:
        """Draws an open line with round ends."""
        self.trace(self.pixels(points), width, colour)

    def trace(self, pixels: list[tuple[float, float]], width: float, colour: Colour) -> None:
        """As stroke, through points that `pixels` has placed."""
        radius = width * self.scale / 2
        self.pen.line(pixels, fill=colour, width=round(2 * radius), joint="curve")
        for x, y in (pixels[0], pixels[-1]):
            self.pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)

    def finish(self) -> np.ndarray:
        """The picture, uint8 (size, size, 3)."""
        return np.asarray(self.image.reduce(SUPERSAMPLING))


class PencilCanvas(Canvas):
    """The same shapes as grey pencil strokes on paper."""

    def background(self, colour: Colour) -> Image.Image:
        return Image.new("RGB", (self.side, self.side), PAPER)

    def shape(self, points: ArrayLike, colour: Colour, pencil: str | None = "outline") -> None:
        if pencil is None:
            return
        pixels = self.pixels(points)
        darkness = 1 - np.dot(colour, (0.299, 0.587, 0.114)) / 255
        if pencil in ("solid", "blank"):
            self.pen.polygon(pixels, fill=GRAPHITE if pencil == "solid" else PAPER)
            return
        self.pen.polygon(pixels, fill=mix(PAPER, GRAPHITE, (0.6 if pencil == "hatch" else 0.15) * darkness))
        if pencil == "hatch":
            mask = Image.new("L", self.image.size)
            ImageDraw.Draw(mask).polygon(pixels, fill=round(255 * (0.25 + 0.6 * darkness)))
            strokes = Image.composite(mask, Image.new("L", mask.size), hatching(self.size))
            self.image.paste(GRAPHITE, mask=strokes)
        self.trace(pixels + pixels[:1], 1.0, PENCIL)

    def stroke(self, points: ArrayLike, width: float, colour: Colour, pencil: str | None = "solid") -> None:
        if pencil is not None:
            self.trace(self.pixels(points), min(width, 1.25), GRAPHITE)


class InkCanvas(Canvas):
    """The same shapes as pen lines and pale washes on parchment.  `pencil` may also be "wash": no outline."""

    def background(self, colour: Colour) -> Image.Image:
        return super().background(mix(PARCHMENT, colour, 0.16))

    def shape(self, points: ArrayLike, colour: Colour, pencil: str | None = "outline") -> None:
        if pencil is None:
            return
        pixels = self.pixels(points)
        washes = {"blank": PARCHMENT, "solid": mix(INK, colour, 0.25), "hatch": mix(PARCHMENT, colour, 0.42)}
        self.pen.polygon(pixels, fill=washes.get(pencil, mix(PARCHMENT, colour, 0.26)))
        if pencil != "wash":
            self.trace(pixels + pixels[:1], 0.6, INK)
        else:
            self.trace(pixels[:2] if len(pixels) == 4 else pixels, 0.55, mix(INK, PARCHMENT, 0.35))


@functools.lru_cache(maxsize=4)
def hatching(size: int) -> Image.Image:
    """A mask of parallel slanted pencil strokes."""
    scale = size * SUPERSAMPLING / UNITS
    image = Image.new("L", (size * SUPERSAMPLING, size * SUPERSAMPLING))
    pen = ImageDraw.Draw(image)
    for x in np.arange(-UNITS, UNITS, 2.9):
        ends = [x * scale, UNITS * scale, (x + UNITS * 0.8) * scale, 0]
        pen.line(ends, fill=255, width=round(0.75 * scale))
    return image
