"""Pictures of coloured shapes with a sentence that names some of them, drawn from a random generator.

The form of a sentence (which attributes it mentions, singular or plural) is drawn first, and pictures are then redrawn
until one fits. So the form tells nothing about whether anything is named: a generator without this care lets a network
recognise the sentences that name nothing without looking.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np

SHAPES = ("circle", "square", "triangle")
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230),
    "yellow": (230, 210, 40), "purple": (150, 50, 190), "cyan": (40, 200, 210),
}  # fmt: skip
RADII: Mapping[str, tuple[float, float]] = {"small": (5.0, 7.0), "large": (10.0, 13.0)}
"""Pixels on a canvas of 64."""
SIDES = (("left", "right"), ("top", "bottom"))
ATTRIBUTES = ("size", "colour", "shape", "side")
WORDS = (
    "the", "all", "small", "large", *COLOURS, *SHAPES, "object", *(f"{shape}s" for shape in SHAPES), "objects",
    "on", "left", "right", "top", "bottom", "a", "at", "in", "of", "half", "picture",
)  # fmt: skip
"""29 words; the last six never occur in sentences made here, and are there for those who type."""
LONGEST_SENTENCE = 7
"""Words of "the small red circle on the left"."""
_CLEARANCE = 1.15
"""Centres are this many summed radii apart: corners of squares reach beyond their radius."""
_TRIES = 20

Kind = Literal["single", "plural", "none"]


@dataclass(frozen=True, slots=True)
class Thing:
    """One object of a picture."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float

    def side(self, axis: int, canvas: int) -> str:
        """Half of the picture in which its centre lies: left or right (axis 0), top or bottom (axis 1)."""
        return SIDES[axis][(self.x, self.y)[axis] >= canvas / 2]


class Form(NamedTuple):
    """A sentence without its values."""

    attributes: tuple[str, ...]
    axis: int
    """Whether ``side`` means left and right (0) or top and bottom (1)."""
    plural: bool
    article: bool


class Scene(NamedTuple):
    """A picture, a sentence, and what the sentence names."""

    image: np.ndarray
    """uint8 ``[3, S, S]``"""
    mask: np.ndarray
    """bool ``[S, S]``: the union of what is named."""
    sentence: str
    kind: Kind


def draw_scene(random: np.random.Generator, canvas: int, *, generalised: bool = False) -> Scene:
    """One picture of ``canvas`` x ``canvas`` pixels with its sentence.

    With ``generalised``, 60 % of sentences name one object, 20 % two or more, and 20 % nothing in the picture.
    """
    kind: Kind = "single"
    if generalised:
        kind = ("single", "plural", "none")[int(np.searchsorted((0.6, 0.8), random.random(), side="right"))]
    plural = kind == "plural" or (kind == "none" and random.random() < 0.25)
    form = draw_form(random, plural)
    while True:
        things = draw_things(random, canvas)
        values = _values(random, form, things, kind, canvas)
        named = [thing for thing in things if _matches(thing, values, form.axis, canvas)]
        if {"single": len(named) == 1, "plural": len(named) > 1, "none": not named}[kind]:
            image, masks = render(random, things, canvas)
            chosen = [mask for thing, mask in zip(things, masks, strict=True) if thing in named]
            union = np.any(chosen, axis=0) if chosen else np.zeros((canvas, canvas), dtype=bool)
            return Scene(image, union, sentence_of(form, values), kind)


def draw_form(random: np.random.Generator, plural: bool) -> Form:
    """Any attributes for one object; one or two of them for several, which would otherwise hardly ever share them."""
    most = 2 if plural else len(ATTRIBUTES)
    subsets = [chosen for size in range(1, most + 1) for chosen in combinations(ATTRIBUTES, size)]
    attributes = subsets[random.integers(len(subsets))]
    return Form(attributes, int(random.integers(2)), plural, bool(random.random() < 0.5))


def draw_things(random: np.random.Generator, canvas: int) -> list[Thing]:
    """Two to five objects that do not touch. Later ones like to share colour or shape with the first."""
    wanted = int(random.integers(2, 6))
    things: list[Thing] = []
    while len(things) < 2:  # a canvas can be so full with one that no other finds room
        things = []
        for _ in range(wanted):
            thing = _place(random, canvas, things)
            if thing is not None:
                things.append(thing)
    return things


def _place(random: np.random.Generator, canvas: int, others: list[Thing]) -> Thing | None:
    size = tuple(RADII)[random.integers(2)]
    colour, shape = tuple(COLOURS)[random.integers(len(COLOURS))], SHAPES[random.integers(len(SHAPES))]
    copies_colour, copies_shape = random.random() < 0.4, random.random() < 0.5
    if others:
        colour = others[0].colour if copies_colour else colour
        shape = others[0].shape if copies_shape else shape
    radius = float(random.uniform(*RADII[size])) * canvas / 64
    for _ in range(_TRIES):
        x, y = random.uniform(radius + 1, canvas - radius - 1, size=2)
        if all(
            np.hypot(x - other.x, y - other.y) >= _CLEARANCE * (radius + other.radius) + 1 for other in others
        ):
            return Thing(shape, colour, size, float(x), float(y), radius)
    return None


def _values(
    random: np.random.Generator, form: Form, things: list[Thing], kind: Kind, canvas: int
) -> dict[str, str]:
    """Values of the mentioned attributes: those of one of the objects, or any at all where nothing is to be named."""
    if kind == "none":
        choices = {"size": tuple(RADII), "colour": tuple(COLOURS), "shape": SHAPES, "side": SIDES[form.axis]}
        return {name: choices[name][random.integers(len(choices[name]))] for name in form.attributes}
    thing = things[random.integers(len(things))]
    return {name: _attribute(thing, name, form.axis, canvas) for name in form.attributes}


def _attribute(thing: Thing, name: str, axis: int, canvas: int) -> str:
    return thing.side(axis, canvas) if name == "side" else str(getattr(thing, name))


def _matches(thing: Thing, values: Mapping[str, str], axis: int, canvas: int) -> bool:
    return all(_attribute(thing, name, axis, canvas) == value for name, value in values.items())


def sentence_of(form: Form, values: Mapping[str, str]) -> str:
    """``[the] [small|large] [colour] shape|object [on the side]``, or the same with ``all`` and a plural."""
    noun = values.get("shape", "object") + ("s" if form.plural else "")
    opening = "all" if form.plural else ("the" if form.article else "")
    side = f"on the {values['side']}" if "side" in values else ""
    return " ".join(filter(None, (opening, values.get("size"), values.get("colour"), noun, side)))


def render(
    random: np.random.Generator, things: list[Thing], canvas: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The picture on a dim, noisy ground, uint8 ``[3, S, S]``, and the pixels of each object, bool ``[S, S]``."""
    rows, columns = np.mgrid[:canvas, :canvas].astype(np.float64) + 0.5
    pixels = random.uniform(15, 55) + random.normal(0, 10, (3, canvas, canvas))
    masks = []
    for thing in things:
        mask = _inside(thing, columns - thing.x, rows - thing.y)
        colour = np.array(COLOURS[thing.colour])[:, None, None] + random.normal(0, 12, (3, canvas, canvas))
        pixels = np.where(mask, colour, pixels)
        masks.append(mask)
    return pixels.clip(0, 255).astype(np.uint8), masks


def _inside(thing: Thing, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    inside: np.ndarray
    if thing.shape == "circle":
        inside = dx**2 + dy**2 <= thing.radius**2
    elif thing.shape == "square":
        inside = np.maximum(np.abs(dx), np.abs(dy)) <= 0.8 * thing.radius
    else:  # upright: the tip above, the base below
        half_width = (dy + thing.radius) / (1.8 * thing.radius) * thing.radius
        inside = (np.abs(dx) <= half_width) & (dy >= -thing.radius) & (dy <= 0.8 * thing.radius)
    return inside
