"""What the built-in domains are drawn with: filled shapes and strokes with Pillow, smooth or as pencil."""

import functools

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLING = 4
UNITS = 32  # every coordinate is in 1/32 of the picture's side, whatever the size in pixels
WHITE, PAPER, PENCIL, GRAPHITE = (255, 255, 255), (248, 246, 241), (122, 122, 124), (66, 66, 68)


def mix(a, b, amount):
    """Colour `a` with the fraction `amount` of colour `b`."""
    return tuple(round(p + (q - p) * amount) for p, q in zip(a, b))


def oval(cx, cy, rx, ry, start=0.0, end=360.0):
    """Points (48, 2) on an ellipse from angle `start` to `end` in degrees; 0 is right, 90 is down."""
    angle = np.radians(np.linspace(start, end, 48))
    return np.stack([cx + rx * np.cos(angle), cy + ry * np.sin(angle)], axis=1)


class Canvas:
    """A supersampled picture. Points are (k, 2) relative to `centre` and turn about it by `tilt` radians."""

    def __init__(self, size, colour, centre=(0.0, 0.0), tilt=0.0):
        self.size, self.scale = size, size * SUPERSAMPLING / UNITS
        self.centre, self.tilt = np.array(centre), tilt
        self.image = self.background(colour)
        self.pen = ImageDraw.Draw(self.image)

    def background(self, colour):
        rows = np.linspace(mix(colour, WHITE, 0.12), mix(colour, (0, 0, 0), 0.06), self.size * SUPERSAMPLING)
        return Image.fromarray(rows[:, None].round().astype(np.uint8)).resize([self.size * SUPERSAMPLING] * 2, Image.NEAREST)

    def pixels(self, points):
        points, (cos, sin) = np.asarray(points, float), (np.cos(self.tilt), np.sin(self.tilt))
        turned = points @ np.array([[cos, sin], [-sin, cos]])
        return [tuple(p) for p in ((turned + self.centre) * self.scale - 0.5).tolist()]

    def shape(self, points, colour, pencil="outline"):
        """Fills a polygon. `pencil` says what a sketch makes of it: "outline", "hatch", "solid", "blank" or None (left out)."""
        self.pen.polygon(self.pixels(points), fill=colour)

    def stroke(self, points, width, colour, pencil="solid"):
        """Draws an open line with round ends."""
        self.trace(self.pixels(points), width, colour)

    def trace(self, pixels, width, colour):
        radius = width * self.scale / 2
        self.pen.line(pixels, fill=colour, width=round(2 * radius), joint="curve")
        for x, y in (pixels[0], pixels[-1]):
            self.pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)

    def finish(self):
        """The picture, uint8 (size, size, 3)."""
        return np.asarray(self.image.reduce(SUPERSAMPLING))


class PencilCanvas(Canvas):
    """The same shapes as grey pencil strokes on paper."""

    def background(self, colour):
        return Image.new("RGB", [self.size * SUPERSAMPLING] * 2, PAPER)

    def shape(self, points, colour, pencil="outline"):
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
            self.image.paste(GRAPHITE, mask=Image.composite(mask, Image.new("L", mask.size), hatching(self.size)))
        self.trace(pixels + pixels[:1], 1.0, PENCIL)

    def stroke(self, points, width, colour, pencil="solid"):
        if pencil is not None:
            self.trace(self.pixels(points), min(width, 1.25), GRAPHITE)


@functools.lru_cache(maxsize=4)
def hatching(size):
    """A mask of parallel slanted pencil strokes."""
    scale = size * SUPERSAMPLING / UNITS
    image = Image.new("L", [size * SUPERSAMPLING] * 2)
    pen = ImageDraw.Draw(image)
    for x in np.arange(-UNITS, UNITS, 2.9):
        pen.line([x * scale, UNITS * scale, (x + UNITS * 0.8) * scale, 0], fill=255, width=round(0.75 * scale))
    return image
