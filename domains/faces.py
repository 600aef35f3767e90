"""Toy faces, drawn with Pillow: the built-in source domain `toyfaces` and its targets.

A `Face` holds what is drawn: integer attributes (the labels) and a few continuous measures.  One small
function per part draws it on a `Canvas` (canvas.py).  A target changes the face (`babies`), adds a part
(`sunglasses`) or changes the canvas (`sketches`).
"""

import dataclasses

import numpy as np

from domains.canvas import WHITE, Canvas, Colour, PencilCanvas, mix, oval

BACKGROUNDS = {"sky": (150, 203, 240), "mint": (168, 226, 186), "lemon": (253, 238, 160),
               "rose": (246, 172, 190), "lavender": (194, 178, 240), "teal": (64, 148, 158)}
SKINS = {"porcelain": (254, 226, 204), "peach": (243, 198, 160), "tan": (217, 160, 112),
         "brown": (172, 116, 78), "deep": (128, 82, 60)}
HAIR_COLOURS = {"black": (40, 36, 46), "brown": (88, 48, 28), "ginger": (222, 94, 32),
                "blond": (238, 190, 70), "silver": (196, 198, 208), "blue": (62, 92, 200)}
EYE_COLOURS = {"brown": (62, 38, 28), "blue": (40, 100, 190), "green": (40, 128, 76)}
SHIRTS = {"white": (246, 246, 248), "red": (208, 66, 72), "navy": (50, 70, 124), "mustard": (222, 160, 44)}
LENSES = {"black": (22, 22, 28), "brown": (56, 30, 18), "blue": (18, 30, 74)}

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "background": tuple(BACKGROUNDS),
    "skin": tuple(SKINS),
    "hair_colour": tuple(HAIR_COLOURS),  # of the brows and the side tufts where the style is bald
    "hair_style": ("bald", "short", "bob", "long", "bun", "curly"),
    "eyes": tuple(EYE_COLOURS),
    "brows": ("straight", "arched"),
    "nose": ("button", "long"),
    "mouth": ("smile", "neutral", "open"),
    "pose": ("left", "centre", "right"),
    "shirt": tuple(SHIRTS),
}


@dataclasses.dataclass(frozen=True)
class Face:
    """One portrait.

    The integers index `ATTRIBUTES`; lengths are in 1/32 of the picture, from the centre of the head, y down.
    """

    background: int
    skin: int
    hair_colour: int
    hair_style: int
    eyes: int
    brows: int
    nose: int
    mouth: int
    pose: int
    shirt: int
    x: float  # centre of the head in the picture
    y: float
    tilt: float  # radians
    width: float  # half axes of the head
    height: float
    eye_y: float
    eye_gap: float = 3.8  # from the middle of the face to the middle of an eye
    eye_size: float = 1.0
    nose_y: float = 3.2
    mouth_y: float = 6.3
    mouth_size: float = 1.0
    cheeks: float = 0.0  # how far the cheeks widen the head, as a fraction
    baby: bool = False

    def style(self, attribute: str) -> str:
        """The name of an attribute's value, e.g. style("mouth") == "smile"."""
        return ATTRIBUTES[attribute][getattr(self, attribute)]

    @property
    def turn(self) -> int:
        return self.pose - 1  # -1 left, 0, 1 right

    def eye(self, side: int) -> tuple[float, float]:
        """Centre x of the eye on `side` (-1 or 1) and its foreshortening when the head is turned."""
        narrowing = 1 - 0.1 * max(0, side * self.turn)
        return 1.5 * self.turn + side * self.eye_gap * narrowing, narrowing


def sample_face(rng: np.random.Generator) -> Face:
    """A random face; all attributes are independent and uniform."""
    labels = {name: int(rng.integers(len(values))) for name, values in ATTRIBUTES.items()}
    return Face(**labels, x=16 + rng.uniform(-0.7, 0.7), y=16.6 + rng.uniform(-0.5, 0.5),
                tilt=0.06 * (labels["pose"] - 1) + rng.uniform(-0.05, 0.05),
                width=8.0 * rng.uniform(0.93, 1.07), height=10.0 * rng.uniform(0.97, 1.03),
                eye_y=rng.uniform(-0.6, 0.4))


def place(face: Face) -> tuple[Colour, tuple[float, float], float]:
    """What a canvas wants to know: the background's colour, the centre of the head and its tilt."""
    return BACKGROUNDS[face.style("background")], (face.x, face.y), face.tilt


def draw_body(canvas: Canvas, face: Face) -> None:
    tilt, canvas.tilt = canvas.tilt, 0.0  # the shoulders stay level
    skin, shirt = SKINS[face.style("skin")], SHIRTS[face.style("shirt")]
    shade = mix(skin, (90, 30, 20), 0.22)
    if face.baby:
        canvas.shape(oval(0, face.height + 6.5, 9.5, 8.5), shirt, "hatch")
    else:
        canvas.shape(oval(0, 18, 12.5, 6.6), shirt, "hatch")
        canvas.shape([(-3.2, 6), (3.2, 6), (3.4, 11.6), (1.6, 13.2), (-1.6, 13.2), (-3.4, 11.6)], shade)
    canvas.tilt = tilt


def draw_head(canvas: Canvas, face: Face) -> None:
    skin = SKINS[face.style("skin")]
    for side in (-1, 1):
        ear = oval(side * face.width - 0.5 * face.turn, face.eye_y + 1.2, 1.7, 2.3)
        canvas.shape(ear, mix(skin, (150, 40, 20), 0.16))
    outline = oval(0, 0, face.width, face.height)
    down = outline[:, 1] / face.height  # -1 at the crown, 1 at the chin
    chin = (0 if face.baby else 0.07) * np.clip(down, 0, 1)
    outline[:, 0] *= 1 + face.cheeks * np.exp(-((down - 0.45) / 0.4) ** 2) - chin
    canvas.shape(outline, skin)
    for side in (-1, 1):
        x, narrowing = face.eye(side)
        blush = oval(x + 0.9 * side * narrowing, face.eye_y + 4.0, 1.9 * narrowing, 1.4)
        canvas.shape(blush, mix(skin, (240, 70, 80), 0.36 if face.baby else 0.24), None)


def draw_eyes(canvas: Canvas, face: Face) -> None:
    for side in (-1, 1):
        x, narrowing = face.eye(side)
        size = face.eye_size
        canvas.shape(oval(x, face.eye_y, 2.1 * size * narrowing, 1.9 * size), WHITE, "blank")
        x += 0.35 * face.turn
        iris = oval(x, face.eye_y + 0.1, 1.35 * size * narrowing, 1.5 * size)
        canvas.shape(iris, EYE_COLOURS[face.style("eyes")], "solid")
        canvas.shape(oval(x + 0.45, face.eye_y - 0.5, 0.5 * size, 0.5 * size), WHITE, "blank")


def draw_brows(canvas: Canvas, face: Face) -> None:
    colour = mix(HAIR_COLOURS[face.style("hair_colour")], (30, 20, 20), 0.2)
    if face.baby:
        colour = mix(colour, SKINS[face.style("skin")], 0.45)
    for side in (-1, 1):
        x, narrowing = face.eye(side)
        y = face.eye_y - 1.9 * face.eye_size - 1.4
        rise = 1.3 if face.style("brows") == "arched" else 0.0
        reach = 1.8 * side * narrowing  # the outer end hangs lowest, or the face would frown
        points = [(x - reach, y), (x - 0.2 * reach, y - 0.5 * rise), (x + reach, y + 0.6 * rise)]
        canvas.stroke(points, 0.9 if face.baby else 1.4, colour)


def draw_nose(canvas: Canvas, face: Face) -> None:
    shade = mix(SKINS[face.style("skin")], (130, 30, 10), 0.3)
    x, y = 2.1 * face.turn, face.eye_y + face.nose_y
    if face.baby:
        canvas.shape(oval(x, y, 1.1, 0.8), shade, "solid")
    elif face.style("nose") == "button":
        canvas.shape(oval(x, y, 1.6, 1.15), shade)
    else:
        canvas.stroke([(x, y - 2.6), (x + 0.9 * (face.turn or 1), y + 0.5), (x - 0.4, y + 0.6)], 1.3, shade)


def draw_mouth(canvas: Canvas, face: Face) -> None:
    lips = mix(SKINS[face.style("skin")], (170, 20, 40), 0.65)
    x, y, size = 1.7 * face.turn, face.mouth_y, face.mouth_size
    if face.style("mouth") == "smile":
        canvas.stroke(oval(x, y - 1.6 * size, 3.2 * size, 2.4 * size, 20, 160), 1.3, lips)
    elif face.style("mouth") == "neutral":
        canvas.stroke([(x - 2.3 * size, y - 0.2), (x, y + 0.1), (x + 2.3 * size, y - 0.2)], 1.3, lips)
    else:
        canvas.shape(oval(x, y - 0.9 * size, 3.2 * size, 3.0 * size, 0, 180), (120, 22, 38), "solid")
        if not face.baby:
            canvas.shape(oval(x, y - 0.9 * size, 2.5 * size, 1.2 * size, 0, 180), WHITE, "blank")


def draw_hair_behind(canvas: Canvas, face: Face) -> None:
    """The part of the hair that the head covers."""
    colour = mix(HAIR_COLOURS[face.style("hair_colour")], (20, 10, 20), 0.15)
    w, h, style = face.width, face.height, face.style("hair_style")
    if style == "bob":
        sides = [(w + 2.8, 5.6), (w + 1.4, 7.2), (-w - 1.4, 7.2), (-w - 2.8, 5.6)]
        canvas.shape([*oval(0, -1.5, w + 2.4, h, 180, 360), *sides], colour, "hatch")
    elif style == "long":
        canvas.shape([*oval(0, -1.5, w + 2.2, h, 180, 360), (w + 2.6, 24), (-w - 2.6, 24)], colour, "hatch")
    elif style == "bun":
        canvas.shape(oval(0, -h - 2.2, 3.8, 3.4), colour, "hatch")
    elif style == "curly":
        for x, y in oval(0, -1.5, w + 0.8, h - 0.6, 155, 385)[::5]:
            canvas.shape(oval(x, y, 3.1, 3.1), colour, "hatch")


def draw_hair_in_front(canvas: Canvas, face: Face) -> None:
    """The part of the hair that lies on the forehead and temples."""
    colour = HAIR_COLOURS[face.style("hair_colour")]
    w, h, turn, style = face.width, face.height, face.turn, face.style("hair_style")
    shine = mix(colour, WHITE, 0.28)
    crown = oval(0, -1.0, w + 0.9, h + 0.3, 188, 352)
    if style == "bald":
        for side in (-1, 1):
            canvas.shape(oval(side * (w - 0.1), face.eye_y - 2.2, 1.5, 2.6), colour, "hatch")
        canvas.shape(oval(-2.5, -h + 2.4, 2.2, 1.0), mix(SKINS[face.style("skin")], WHITE, 0.35), None)
        return
    if style == "short":  # swept to one side
        fringe = [(w - 0.4, -3.2), (w - 1.6, -5.4), (1 + turn, -6.8), (-w + 2.6 + turn, -5.6),
                  (-w + 0.6, -2.0)]
    elif style == "bob":  # straight fringe
        fringe = [(w - 0.2, 1.0), (w - 1.5 + 0.6 * turn, -5.1), (-w + 1.5 + 0.6 * turn, -5.1),
                  (-w + 0.2, 1.0)]
    elif style == "long":  # parted in the middle
        fringe = [(w - 0.4, 1.0), (w - 1.2 + 0.6 * turn, -3.6), (1.2 * turn, -8.4),
                  (-w + 1.2 + 0.6 * turn, -3.6), (-w + 0.4, 1.0)]
        lock = np.array([(w - 1, -3), (w + 1.6, -3), (w + 2.4, 24), (w - 3, 24), (w - 2, 13), (w - 0.8, 2)])
        for side in (-1, 1):  # over the shoulders, so that the shirt stays in sight
            canvas.shape(lock * (side, 1), colour, "hatch")
    elif style == "bun":  # combed back
        fringe = [*oval(turn, -1.0, w - 1.0, h - 4.2, 340, 200)]
    else:
        for x, y in oval(0.5 * turn, -1.2, w - 1.4, h - 2.0, 195, 345)[::8]:
            canvas.shape(oval(x, y, 2.5, 2.1), colour, "hatch")
        return
    canvas.shape([*crown, *fringe], colour, "hatch")
    canvas.stroke(oval(0, -1.0, w - 1.6, h - 1.6, 215, 250), 1.3, shine, None)


def draw_baby_hair(canvas: Canvas, face: Face) -> None:
    colour, style, top = HAIR_COLOURS[face.style("hair_colour")], face.style("hair_style"), -face.height
    if style in ("short", "long"):  # one curl
        canvas.stroke([(-1.0, top + 2.6), (0.9, top + 0.2), (0.4, top - 1.8), (-1.4, top - 1.6)], 1.7, colour)
    elif style in ("curly", "bob"):  # fluff
        for x, y in ((-3.0, 1.3), (-1.0, 0.6), (1.2, 0.6), (3.1, 1.3)):
            canvas.shape(oval(x, top + y, 1.9, 1.5), colour, "hatch")
    elif style == "bun":
        tuft = [(-2.4, top + 1.9), (-1.6, top - 1.6), (0, top - 0.6), (1.5, top - 2.2), (2.4, top + 1.9)]
        canvas.shape(tuft, colour, "hatch")


def draw_portrait(canvas: Canvas, face: Face) -> None:
    if not face.baby:
        draw_hair_behind(canvas, face)
    draw_body(canvas, face)
    draw_head(canvas, face)
    for part in (draw_nose, draw_mouth, draw_eyes, draw_brows):
        part(canvas, face)
    (draw_baby_hair if face.baby else draw_hair_in_front)(canvas, face)


def draw_sunglasses(canvas: Canvas, face: Face, rng: np.random.Generator) -> None:
    lens = tuple(LENSES.values())[rng.integers(len(LENSES))]
    shape = ("round", "square", "aviator")[rng.integers(3)]
    rim, y = mix(lens, (0, 0, 0), 0.5), face.eye_y + 0.2
    for side in (-1, 1):
        x, narrowing = face.eye(side)
        canvas.stroke([(x, y - 1.2), (side * (face.width + 0.6), y - 0.6)], 1.2, rim)
        x, rx = x + 0.35 * side, 3.0 * narrowing
        if shape == "round":
            points = oval(x, y, rx, 3.2)
        elif shape == "square":
            square = [(-rx, -2.7), (rx, -2.7), (rx, 1.9), (rx - 0.8, 2.7), (0.8 - rx, 2.7), (-rx, 1.9)]
            points = np.array(square) + (x, y)
        else:  # hangs outwards
            drop = [(-rx, -2.5), (rx, -2.5), (rx, 0.6), (rx * 0.7, 2.8), (0, 3.5), (-rx * 0.6, 2.2),
                    (-rx, -0.4)]
            points = np.array(drop) * (side, 1) + (x, y)
        canvas.shape(points, lens)
        canvas.stroke([*points, points[0]], 0.7, rim)
        canvas.stroke([(x - 1.5 * narrowing, y + 0.2), (x - 0.2, y - 1.3)], 0.9, mix(lens, WHITE, 0.55))
    canvas.stroke([(face.eye(-1)[0] + 2, y - 1.2), (face.eye(1)[0] - 2, y - 1.2)], 1.3, rim)


def paint_toyfaces(face: Face, size: int, rng: np.random.Generator) -> np.ndarray:
    canvas = Canvas(size, *place(face))
    draw_portrait(canvas, face)
    return canvas.finish()


def paint_sunglasses(face: Face, size: int, rng: np.random.Generator) -> np.ndarray:
    canvas = Canvas(size, *place(face))
    draw_portrait(canvas, face)
    draw_sunglasses(canvas, face, rng)
    return canvas.finish()


def paint_sketches(face: Face, size: int, rng: np.random.Generator) -> np.ndarray:
    canvas = PencilCanvas(size, *place(face))
    draw_portrait(canvas, face)
    return canvas.finish()


def paint_babies(face: Face, size: int, rng: np.random.Generator) -> np.ndarray:
    canvas_face = dataclasses.replace(
        face, y=face.y + 0.9, width=face.width * 1.17, height=9.6, cheeks=0.08, eye_y=face.eye_y + 2.4,
        eye_gap=4.3, eye_size=1.3, nose_y=2.9, mouth_y=face.eye_y + 7.3, mouth_size=0.6, baby=True)
    canvas = Canvas(size, *place(canvas_face))
    draw_portrait(canvas, canvas_face)
    return canvas.finish()
