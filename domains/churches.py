"""Toy churches, drawn with Pillow: the built-in source domain `toychurches` and its targets.

A `Church` holds what is drawn: integer attributes (the labels) and a few continuous measures.  One small
function per part draws it on a `Canvas` (canvas.py) in the colours of a `Palette`.  `haunted-houses` changes
the palette, the geometry and what stands around; `landscape-drawings` changes the canvas to ink and washes.
"""

import dataclasses

import numpy as np

from domains.canvas import INK, PARCHMENT, WHITE, Canvas, Colour, InkCanvas, box, mix, oval

SKIES = {"blue": (116, 184, 240), "sunset": (250, 168, 116), "overcast": (196, 202, 210),
         "turquoise": (126, 218, 206), "violet": (184, 158, 228)}
WALLS = {"white": (246, 242, 232), "sand": (232, 194, 126), "brick": (190, 92, 70), "grey": (146, 148, 158),
         "rose": (236, 160, 170)}
ROOFS = {"red": (178, 48, 44), "slate": (66, 78, 106), "copper": (66, 158, 126), "brown": (110, 68, 42)}
GROUNDS = {"grass": (104, 172, 78), "snow": (242, 246, 252), "sand": (230, 206, 144), "earth": (136, 98, 66)}
DOORS = {"brown": (88, 50, 30), "blue": (36, 78, 160), "red": (176, 32, 44)}
GLASS, SUN, BARK = (46, 62, 104), (255, 226, 92), (96, 66, 46)
LEAVES, FIR, POPLAR = (70, 140, 62), (30, 92, 66), (150, 178, 58)
NIGHT, SHADE, CANDLE, MOON = (24, 16, 52), (22, 14, 34), (255, 210, 84), (244, 238, 200)

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "sky": tuple(SKIES),
    "walls": tuple(WALLS),
    "roof": tuple(ROOFS),
    "ground": tuple(GROUNDS),
    "door": tuple(DOORS),
    "tower": ("left", "right", "middle", "two"),
    "spire": ("spire", "pyramid", "dome", "battlements"),
    "windows": ("round", "pointed", "wide"),
    "tree": ("none", "round", "fir", "poplar"),
    "above": ("clear", "sun", "cloud"),
}


@dataclasses.dataclass(frozen=True)
class Church:
    """One view.

    The integers index `ATTRIBUTES`; lengths are in 1/32 of the picture, from its top left corner, y down.
    """

    sky: int
    walls: int
    roof: int
    ground: int
    door: int
    tower: int
    spire: int
    windows: int
    tree: int
    above: int
    x: float  # middle of the nave
    base: float  # where the walls meet the ground
    half: float  # half the length of the nave
    height: float  # of the towers' walls
    hill: float  # where the hill behind is highest
    crooked: float = 0.0  # how far spires lean and ridges sag, for haunted houses

    def style(self, attribute: str) -> str:
        """The name of an attribute's value, e.g. style("spire") == "dome"."""
        return ATTRIBUTES[attribute][getattr(self, attribute)]

    @property
    def towers(self) -> list[tuple[float, float]]:
        """Middle x and half width of each tower."""
        side = self.half - 1.4
        places = {"left": [-side], "right": [side], "middle": [0.0], "two": [-side, side]}
        width = 2.5 if self.style("tower") == "two" else 3.1
        return [(self.x + place, width) for place in places[self.style("tower")]]

    @property
    def free_side(self) -> int:
        """-1 or 1: where there is no tower, and room for a tree."""
        return -1 if self.style("tower") == "right" else 1


@dataclasses.dataclass(frozen=True)
class Palette:
    """The colours of the parts."""
    sky: Colour
    walls: Colour
    roof: Colour
    ground: Colour
    door: Colour
    glass: Colour
    hill: Colour


def sample_church(rng: np.random.Generator) -> Church:
    """A random church; all attributes are independent and uniform."""
    labels = {name: int(rng.integers(len(values))) for name, values in ATTRIBUTES.items()}
    return Church(**labels, x=16 + rng.uniform(-1.0, 1.0) - (1.6 if labels["tower"] != 1 else -1.6),
                  base=26 + rng.uniform(-0.7, 0.7), half=8.4 * rng.uniform(0.95, 1.06),
                  height=13.4 + rng.uniform(-0.9, 0.9), hill=rng.uniform(6, 26))


def palette(church: Church) -> Palette:
    """The colours a church has by day."""
    sky, ground = SKIES[church.style("sky")], GROUNDS[church.style("ground")]
    return Palette(sky, WALLS[church.style("walls")], ROOFS[church.style("roof")], ground,
                   DOORS[church.style("door")], GLASS, hill=mix(mix(sky, (60, 100, 90), 0.38), ground, 0.25))


def night(colours: Palette) -> Palette:
    """The same colours in a haunted night."""
    sky = mix(colours.sky, NIGHT, 0.72)
    return Palette(sky, mix(colours.walls, SHADE, 0.58), mix(colours.roof, SHADE, 0.62),
                   mix(colours.ground, SHADE, 0.66), mix(colours.door, SHADE, 0.55), CANDLE,
                   hill=mix(sky, (10, 10, 26), 0.6))


def draw_land(canvas: Canvas, church: Church, colours: Palette) -> None:
    """The hill in the distance and the ground."""
    canvas.shape(oval(church.hill, church.base + 2.5, 15, 9), colours.hill, "wash")
    canvas.shape(box(-1, church.base - 0.6, 33, 33), colours.ground, "wash")


def draw_above(canvas: Canvas, church: Church) -> None:
    """Sun or cloud, on the side without a tower."""
    x = church.x + 9.5 * church.free_side
    if church.style("above") == "sun":
        canvas.shape(oval(x, 5.6, 2.9, 2.9), SUN)
    elif church.style("above") == "cloud":
        for dx, dy, r in ((-2.8, 0.7, 1.9), (0.2, -0.3, 2.7), (3.0, 0.8, 1.8)):
            canvas.shape(oval(x - 0.8 * church.free_side + dx, 6 + dy, 1.25 * r, r), WHITE, "blank")


def draw_tree(canvas: Canvas, church: Church) -> None:
    x, y, style = church.x + 12.6 * church.free_side, church.base, church.style("tree")
    if style == "none":
        return
    trunk = [(x - 0.7, y - 3.5), (x + 0.7, y - 3.5), (x + 0.9, y + 0.6), (x - 0.9, y + 0.6)]
    canvas.shape(trunk, BARK, "solid")
    if style == "round":
        canvas.shape(oval(x, y - 5.4, 3.3, 3.4), LEAVES)
    elif style == "fir":
        canvas.shape([(x, y - 11.5), (x + 3.1, y - 1.4), (x - 3.1, y - 1.4)], FIR)
    else:
        canvas.shape(oval(x, y - 7.0, 1.8, 5.6), POPLAR)


def draw_bare_tree(canvas: Canvas, church: Church) -> None:
    x, y = church.x + 12.4 * church.free_side, church.base
    if church.style("tree") == "none":
        return
    for points, width in (([(0, 0.8), (0.2, -5), (-0.4, -9.5)], 1.5), ([(0.1, -4.5), (2.6, -8.2)], 1.1),
                          ([(0.1, -3.6), (-2.8, -7.4)], 1.1), ([(1.4, -6.4), (3.4, -6.6)], 0.9)):
        canvas.stroke([(x + px, y + py) for px, py in points], width, (12, 8, 18))


def draw_window(canvas: Canvas, church: Church, colours: Palette, x: float, y: float) -> None:
    style = church.style("windows")
    if style == "round":
        pane = oval(x, y, 1.5, 1.5)
    elif style == "pointed":
        left, right = x - 1.05, x + 1.05
        pane = [(left, y + 2.1), (left, y - 0.9), (x, y - 2.6), (right, y - 0.9), (right, y + 2.1)]
    else:
        pane = box(x - 1.8, y - 0.9, x + 1.8, y + 1.0)
    canvas.shape(pane, colours.glass, "solid")


def draw_door(canvas: Canvas, church: Church, colours: Palette, x: float) -> None:
    y = church.base
    arch = oval(x, y - 3.0, 1.5, 1.5, 180, 360)
    canvas.shape([(x - 1.5, y + 0.4), (x - 1.5, y - 3.0), *arch, (x + 1.5, y + 0.4)], colours.door, "solid")


def draw_nave(canvas: Canvas, church: Church, colours: Palette) -> None:
    x, y, w = church.x, church.base, church.half
    top, ridge, sag = y - 7.6, y - 12.6, 1.5 * church.crooked
    canvas.shape(box(x - w, top, x + w, y + 0.4), colours.walls)
    roof = [(x - w - 0.9, top + 0.3), (x - w + 1.6, ridge - 0.5 * sag), (x, ridge + sag),
            (x + w - 1.6, ridge - 0.3 * sag), (x + w + 0.9, top + 0.3)]
    canvas.shape(roof, colours.roof, "hatch")
    places = {"left": (-1.6, 2.4, 6.2), "right": (-6.2, -2.4, 1.6), "middle": (-5.8, 5.8), "two": (-2.9, 2.9)}
    for place in places[church.style("tower")]:
        draw_window(canvas, church, colours, x + place, y - 4.4)


def draw_towers(canvas: Canvas, church: Church, colours: Palette) -> None:
    for x, w in church.towers:
        canvas.centre = np.array([x, church.base])  # each leans on its own foot
        canvas.tilt = 0.1 * church.crooked * (1 if x < church.x else -1)
        canvas.shape(box(-w, -church.height, w, 0.4), colours.walls)
        canvas.shape(box(w - 1.3, -church.height, w, 0.4), mix(colours.walls, (60, 40, 60), 0.22), None)
        draw_spire(canvas, church, colours, w, -church.height)
        draw_window(canvas, church, colours, 0, -church.height + 3.6)
        canvas.centre, canvas.tilt = np.zeros(2), 0.0
    draw_door(canvas, church, colours, church.x if len(church.towers) == 2 else church.towers[0][0])


def draw_spire(canvas: Canvas, church: Church, colours: Palette, w: float, top: float) -> None:
    """What crowns a tower of half width w whose walls end at `top`."""
    style, lean = church.style("spire"), 1.6 * church.crooked
    if style == "spire":
        canvas.shape([(-w - 0.5, top + 0.2), (lean, top - 9.6), (w + 0.5, top + 0.2)], colours.roof, "hatch")
    elif style == "pyramid":
        canvas.shape([(-w - 0.9, top + 0.2), (lean, top - 4.4), (w + 0.9, top + 0.2)], colours.roof, "hatch")
    elif style == "dome":
        canvas.shape(oval(0.4 * lean, top + 0.3, w + 1.1, w + 1.7, 180, 360), colours.roof, "hatch")
        canvas.shape(oval(0.5 * lean, top - w - 2.0, 0.9, 1.2), SUN)
    else:
        for place in (-1, 0, 1):
            x = place * (w - 0.75)
            canvas.shape(box(x - 0.75, top - 2.0, x + 0.75, top + 0.2), colours.walls)
        canvas.shape(box(-w - 0.3, top - 0.6, w + 0.3, top + 0.5), colours.roof, "hatch")


def draw_church(canvas: Canvas, church: Church, colours: Palette) -> None:
    draw_nave(canvas, church, colours)
    draw_towers(canvas, church, colours)


def paint_toychurches(church: Church, size: int, rng: np.random.Generator) -> np.ndarray:
    colours = palette(church)
    canvas = Canvas(size, colours.sky)
    draw_above(canvas, church)
    draw_land(canvas, church, colours)
    draw_tree(canvas, church)
    draw_church(canvas, church, colours)
    return canvas.finish()


def paint_haunted_houses(church: Church, size: int, rng: np.random.Generator) -> np.ndarray:
    church = dataclasses.replace(church, crooked=rng.uniform(0.6, 1.1) * rng.choice((-1, 1)))
    colours = night(palette(church))
    canvas = Canvas(size, colours.sky)
    x = church.x + 9.0 * church.free_side
    if church.style("above") != "clear":
        canvas.shape(oval(x, 6.2, 3.9, 3.9), MOON)
    if church.style("above") == "cloud":
        for dx, dy in ((-3.0, 1.8), (1.0, 2.6), (4.0, 1.6)):
            canvas.shape(oval(x + dx, 6.2 + dy, 3.0, 1.5), mix(colours.sky, (0, 0, 10), 0.45))
    else:
        for dx, dy in ((0.6, 0.4), (-4.4, 3.2)):
            wings = ((-2.0, 4.6), (-1.0, 5.6), (0.0, 4.9), (1.0, 5.6), (2.0, 4.6))
            canvas.stroke([(x + dx + across, down + dy) for across, down in wings], 1.0, (8, 6, 14))
    draw_land(canvas, church, colours)
    draw_bare_tree(canvas, church)
    draw_church(canvas, church, colours)
    return canvas.finish()


def paint_landscape_drawings(church: Church, size: int, rng: np.random.Generator) -> np.ndarray:
    colours = palette(church)
    canvas = InkCanvas(size, colours.sky)
    draw_above(canvas, church)
    draw_land(canvas, church, colours)
    for x in np.arange(2.0, 31.0, 4.3):  # grass, in a few strokes of the pen
        y = church.base + 2.2 + rng.uniform(0, 2.4)
        canvas.stroke([(x, y), (x + rng.uniform(1.2, 2.2), y - 0.3)], 0.6, mix(INK, PARCHMENT, 0.25))
    draw_tree(canvas, church)
    draw_church(canvas, church, colours)
    return canvas.finish()
