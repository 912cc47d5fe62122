"""pocket's world: still lifes of one to three solids, as data that can be drawn, described and compared.

Coordinates: x to the right, y up from the ground, z away from the camera. The camera never moves, so a place in the
picture is a place in the world and the oracle can read coordinates back.
"""

import math
import random
from dataclasses import dataclass

SHAPES = ("sphere", "cube", "cylinder", "cone", "torus")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
SIZES = ("small", "large")
FINISHES = ("matte", "shiny")
SKIES = ("day", "sunset", "night")
GROUNDS = ("tiles", "wood", "sand")
RELATIONS = ("left of", "right of", "in front of", "behind", "on top of")

# One shape of every colour is never shown to the text-to-image model, so that "has it learned to combine words?" has
# an answer. Each shape loses one or two colours and keeps at least six, each colour keeps four shapes.
HELD_OUT = frozenset((colour, SHAPES[(2 * i + 1) % 5]) for i, colour in enumerate(COLOURS))

SCALE = {"small": 0.43, "large": 0.72}  # half the width of a solid's bounding cube, in world units
HALF_HEIGHT = {"sphere": 0.92, "cube": 0.84, "cylinder": 0.90, "cone": 0.96, "torus": 0.96}  # in units of SCALE

CAMERA = (0.0, 2.3, -6.4)
LOOK_AT = (0.0, 0.75, 0.0)
PITCH = math.atan2(CAMERA[1] - LOOK_AT[1], LOOK_AT[2] - CAMERA[2])  # how far the camera looks down, in radians
TAN_HALF_FOV = 0.43
DEPTH = 1.9  # things stand within this distance of z = 0

MARGIN = 0.35  # a stated relation leads over every other by this much, in world units
SEPARATION = 0.9  # and its two things stand at least this far apart along it


@dataclass(frozen=True)
class Thing:
    """One solid: what it is, and where. `y` is the height of what it stands on, `yaw` is in radians."""

    shape: str
    colour: str
    size: str
    finish: str
    x: float
    y: float
    z: float
    yaw: float = 0.0

    @property
    def scale(self) -> float:
        return SCALE[self.size]

    @property
    def centre(self) -> tuple[float, float, float]:
        return self.x, self.y + HALF_HEIGHT[self.shape] * self.scale, self.z

    @property
    def top(self) -> float:
        return self.y + 2 * HALF_HEIGHT[self.shape] * self.scale

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape


@dataclass(frozen=True)
class Reading:
    """What the oracle read in a picture: things with coordinates, and the sky. Confidence is the detection's, 0 to 1."""

    things: tuple[Thing, ...]
    sky: str
    ground: str
    confidence: tuple[float, ...] = ()


@dataclass(frozen=True)
class Agreement:
    """A scene against a reading: one entry for every fact that is asked for, True where the picture shows it."""

    objects: tuple[bool, ...]
    held_out: tuple[bool, ...]  # which of the objects are pairs the text-to-image model never saw
    relations: tuple[bool, ...]
    finishes: tuple[bool, ...]  # of the objects that are there and whose finish is asked for
    sky: tuple[bool, ...]  # one entry, or none where no sky is asked for
    exact: bool  # every object is there, and nothing else


@dataclass(frozen=True)
class Scene:
    """A still life. `relations` are the stated ones: (subject, relation, object), by index into `things`.

    Introduced in notebooks/00_measure_first.ipynb.
    """

    things: tuple[Thing, ...]
    relations: tuple[tuple[int, str, int], ...]
    sky: str
    ground: str
    seed: int

    def render(self, size: int = 256, device: str = "cpu"):
        """Draw the scene: uint8 [3, size, size]."""
        from sdopt.pocket.renderer import render

        return render([self], size, device)[0]

    def caption(self, seed: int | None = None) -> str:
        """Describe the scene in one sentence; another seed may choose other words for the same facts."""
        from sdopt.pocket.captions import describe

        return describe(self, self.seed if seed is None else seed)

    def compare(self, reading: Reading, text: str | None = None) -> Agreement:
        """Check what was read against the scene: its objects, its relations, finishes and sky.

        `text`: the prompt the picture was drawn from. A prompt always names objects and relations, but a finish or the sky
        only sometimes: with a text, those it leaves out are not asked for. A relation counts only if both of its things
        are there with their colour and shape, and it is the relation that leads between the two places read.
        """
        from sdopt.pocket.captions import named

        finishes, sky = named(text, self) if text else ((True,) * len(self.things), True)
        found = [next((t for t in reading.things if t.pair == thing.pair), None) for thing in self.things]
        return Agreement(
            objects=tuple(f is not None for f in found),
            held_out=tuple(t.pair in HELD_OUT for t in self.things),
            relations=tuple(
                bool(found[a] and found[b] and leading_relation(found[a], found[b])[0] == relation)
                for a, relation, b in self.relations
            ),
            finishes=tuple(f.finish == t.finish for f, t, asked in zip(found, self.things, finishes) if f and asked),
            sky=(reading.sky == self.sky,) if sky else (),
            exact=all(found) and len(reading.things) == len(self.things),
        )


def leading_relation(a: Thing, b: Thing) -> tuple[str, float]:
    """The relation of `a` to `b` that leads, and by how much it leads over the next, in world units.

    On top of: higher by more than half a small thing, and not beside. Otherwise the longer of the two ground axes.
    """
    dx, dz = a.x - b.x, a.z - b.z
    if a.y - b.y > 0.4 and math.hypot(dx, dz) < 0.8:
        return "on top of", 0.4
    name = ("right of" if dx > 0 else "left of") if abs(dx) > abs(dz) else ("behind" if dz > 0 else "in front of")
    return name, abs(abs(dx) - abs(dz))


def project(x: float, y: float, z: float) -> tuple[float, float, float]:
    """World to picture: (u, v, depth), u and v from -1 to 1 with v down, depth along the camera's axis in world units."""
    ry, rz = y - CAMERA[1], z - CAMERA[2]
    depth = rz * math.cos(PITCH) - ry * math.sin(PITCH)
    up = rz * math.sin(PITCH) + ry * math.cos(PITCH)
    return (x - CAMERA[0]) / (depth * TAN_HALF_FOV), -up / (depth * TAN_HALF_FOV), depth


def _readable(things: list[Thing], stacked: tuple[int, int] | None) -> bool:
    """Everything inside the picture, nothing mostly hidden, nothing inside anything else."""
    discs = []
    for t in things:
        u, v, depth = project(*t.centre)
        r = t.scale / (depth * TAN_HALF_FOV)
        if abs(u) + r > 0.97 or v + r > 0.97 or v - r < -0.97:
            return False
        discs.append((u, v, r))
    for i in range(len(things)):
        for j in range(i):
            if stacked == (i, j) or stacked == (j, i):
                continue
            a, b = things[i], things[j]
            (ua, va, ra), (ub, vb, rb) = discs[i], discs[j]
            if math.hypot(ua - ub, va - vb) < 0.85 * (ra + rb):
                return False
            if math.hypot(a.x - b.x, a.z - b.z) < 1.1 * (a.scale + b.scale):
                return False
    return True


def _place(rng: random.Random, pairs: list[tuple[str, str]], wanted: list[str]) -> tuple[tuple, tuple] | None:
    """Place the pairs at random; None where they cannot be read clearly or their relations are not those wanted."""
    stack = wanted[:1] == ["on top of"]
    things: list[Thing] = []
    for i, (colour, shape) in enumerate(pairs):
        size, finish = rng.choice(SIZES), rng.choice(FINISHES)
        z = rng.uniform(-DEPTH, DEPTH)
        reach = 0.38 * (z - CAMERA[2])
        x, y = rng.uniform(-reach, reach), 0.0
        # a ring turned edge-on and a cube seen face-on are hard to tell, so both keep away from it
        yaw = rng.uniform(-0.6, 0.6) if shape == "torus" else rng.uniform(0.25, 1.3)
        if stack and i == 0:
            if shape not in ("cube", "cylinder"):  # only these are flat enough to stand on
                return None
            size = "large"
        if stack and i == 1:
            base = things[0]
            size, x, y, z = "small", base.x, base.top, base.z
        things.append(Thing(shape, colour, size, finish, x, y, z, yaw))
    if not _readable(things, (0, 1) if stack else None):
        return None
    relations = [(1, "on top of", 0)] if stack else []
    for i in range(len(relations) + 1, len(things)):
        # "left of the thing on top" would be read as left of the stack, so relate to what stands on the ground
        other = 0 if stack else rng.randrange(i)
        a, b = (i, other) if rng.random() < 0.5 else (other, i)
        name, lead = leading_relation(things[a], things[b])
        apart = max(abs(things[a].x - things[b].x), abs(things[a].z - things[b].z))
        if name != wanted[i - 1] or lead < MARGIN or apart < SEPARATION:
            return None
        relations.append((a, name, b))
    return tuple(things), tuple(relations)


def sample(seed: int, held_out: bool | None = None) -> Scene:
    """Draw the scene of a seed, always the same one.

    `held_out`: None draws from all 40 colour-shape pairs, False from those the text-to-image model trains on, True puts
    at least one pair in the scene that it never saw.
    """
    rng = random.Random(f"pocket-{seed}-{held_out}")
    every = [(c, s) for c in COLOURS for s in SHAPES]
    allowed = [p for p in every if p not in HELD_OUT] if held_out is False else every
    count = rng.choices((1, 2, 3), weights=(1, 2, 2))[0]
    wanted = [rng.choice(RELATIONS[:4]) for _ in range(count - 1)]
    if wanted and rng.random() < 0.2:
        wanted[0] = "on top of"
    while True:
        pairs = rng.sample(allowed, count)
        if held_out and not any(p in HELD_OUT for p in pairs):
            continue
        placed = _place(rng, pairs, wanted)
        if placed:
            return Scene(*placed, rng.choice(SKIES), rng.choice(GROUNDS), seed)
