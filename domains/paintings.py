"""Painted portraits of the toy faces: the targets `modigliani` and `raphael` of the source `toyfaces`.

Both draw the parts of faces.py on a canvas with another palette.  `modigliani` also lengthens face and neck,
as Amedeo Modigliani did, and outlines flat colour; `raphael` sets soft warm light on a dark ground, as in the
ten portraits that the field calls Raphael's paintings.
"""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageFilter

from domains.canvas import SUPERSAMPLING, Canvas, Colour, mix, oval
from domains.faces import (
    EYE_COLOURS,
    SHIRTS,
    SKINS,
    Face,
    draw_body,
    draw_brows,
    draw_eyes,
    draw_hair_behind,
    draw_hair_in_front,
    draw_head,
    draw_mouth,
    draw_nose,
    place,
)

OCHRE, LINE, UMBER, LIGHT = (206, 132, 62), (52, 30, 24), (46, 28, 18), (255, 214, 150)
VARNISH = np.array((1.06, 0.95, 0.76))  # yellowed


class FlatCanvas(Canvas):
    """Flat warm colours with dark outlines."""

    def background(self, colour: Colour) -> Image.Image:
        return Image.new("RGB", (self.side, self.side), mix(mix(colour, OCHRE, 0.42), (60, 50, 40), 0.22))

    def shape(self, points: ArrayLike, colour: Colour, pencil: str | None = "outline") -> None:
        if pencil is None:  # blushes and shines, which flat paint leaves out
            return
        super().shape(points, mix(colour, OCHRE, 0.3))
        pixels = self.pixels(points)
        self.trace(pixels + pixels[:1], 0.6, LINE)

    def stroke(self, points: ArrayLike, width: float, colour: Colour, pencil: str | None = "solid") -> None:
        if pencil is not None:
            super().stroke(points, width, mix(colour, LINE, 0.3))


class GlowingCanvas(Canvas):
    """Muted colours on a dark ground, blurred a little, in a light that falls from the upper left."""

    def background(self, colour: Colour) -> Image.Image:
        return Image.new("RGB", (self.side, self.side), mix(colour, UMBER, 0.68))

    def shape(self, points: ArrayLike, colour: Colour, pencil: str | None = "outline") -> None:
        super().shape(points, mix(colour, (124, 78, 44), 0.34))

    def stroke(self, points: ArrayLike, width: float, colour: Colour, pencil: str | None = "solid") -> None:
        super().stroke(points, width, mix(colour, (70, 40, 26), 0.3))

    def finish(self) -> np.ndarray:
        soft = np.asarray(self.image.filter(ImageFilter.GaussianBlur(0.35 * self.scale)), float)
        y, x = np.mgrid[0:1:len(soft) * 1j, 0:1:len(soft) * 1j]
        light = np.exp(-((x - 0.42) ** 2 + (y - 0.42) ** 2) / 0.16)[..., None]
        lit = soft * (0.55 + 0.55 * light) * VARNISH + 0.10 * light * np.array(LIGHT)
        return np.asarray(Image.fromarray(lit.clip(0, 255).astype(np.uint8)).reduce(SUPERSAMPLING))


def draw_long_neck(canvas: Canvas, face: Face) -> None:
    tilt, canvas.tilt = canvas.tilt, 0.0
    canvas.shape(oval(0, 22.5, 10.8, 7.2), SHIRTS[face.style("shirt")])
    canvas.tilt = 0.4 * tilt
    neck = [(-2.5, 7), (2.5, 7), (3.0, 16.0), (1.4, 17.6), (-1.4, 17.6), (-3.0, 16.0)]
    canvas.shape(neck, mix(SKINS[face.style("skin")], (90, 30, 20), 0.16))
    canvas.tilt = tilt


def draw_almond_eyes(canvas: Canvas, face: Face) -> None:
    """Eyes without pupils."""
    for side in (-1, 1):
        x, narrowing = face.eye(side)
        r, y = 2.1 * narrowing, face.eye_y
        almond = [(x - r, y), (x - 0.5 * r, y - 1.1), (x + 0.5 * r, y - 1.1),
                  (x + r, y), (x + 0.5 * r, y + 0.9), (x - 0.5 * r, y + 0.9)]
        canvas.shape(almond, mix(EYE_COLOURS[face.style("eyes")], (150, 176, 180), 0.35))


def draw_long_nose(canvas: Canvas, face: Face) -> None:
    shade, x, y = mix(SKINS[face.style("skin")], (110, 40, 20), 0.45), 1.5 * face.turn, face.eye_y
    end = y + (5.0 if face.style("nose") == "long" else 3.8)
    side = face.turn or 1
    canvas.stroke([(x - 0.5 * side, y - 1.2), (x + 0.5 * side, end), (x - 0.9 * side, end + 0.2)], 1.1, shade)


def paint_modigliani(face: Face, size: int, rng: np.random.Generator) -> np.ndarray:
    face = dataclasses.replace(
        face, y=face.y - 4.0, tilt=2.4 * face.tilt, width=0.78 * face.width, height=1.06 * face.height,
        eye_y=face.eye_y - 0.6, eye_gap=3.0, mouth_y=7.0, mouth_size=0.62)
    canvas = FlatCanvas(size, *place(face))
    draw_hair_behind(canvas, face)
    draw_long_neck(canvas, face)
    for part in (draw_head, draw_long_nose, draw_mouth, draw_almond_eyes, draw_brows, draw_hair_in_front):
        part(canvas, face)
    return canvas.finish()


def paint_raphael(face: Face, size: int, rng: np.random.Generator) -> np.ndarray:
    canvas = GlowingCanvas(size, *place(face))
    for part in (draw_hair_behind, draw_body, draw_head, draw_nose, draw_mouth, draw_eyes, draw_brows,
                 draw_hair_in_front):
        part(canvas, face)
    return canvas.finish()
