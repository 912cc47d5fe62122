"""Sentences about scenes: many wordings for the same facts, and which sentences training may see."""

import random
from dataclasses import dataclass
from zlib import crc32

from sdopt.pocket.scenes import Scene, sample

WORDS = {
    "sphere": ("sphere", "ball"), "cube": ("cube", "block"), "cylinder": ("cylinder",), "cone": ("cone",), "torus": ("torus", "ring"),
    "small": ("small", "little"), "large": ("large", "big"), "matte": ("matte", "chalky"), "shiny": ("shiny", "glossy"),
    "day": ("by day", "in daylight", "under a cloudy sky"), "sunset": ("at sunset", "at dusk", "under a sunset sky"),
    "night": ("at night", "under the stars", "under a starry sky"),
    "tiles": ("on tiles", "on a tiled floor"), "wood": ("on planks", "on a wooden floor"), "sand": ("on sand", "in the desert"),
    "left of": ("left of", "to the left of"), "right of": ("right of", "to the right of"),
    "in front of": ("in front of", "before"), "behind": ("behind",), "on top of": ("on top of", "on"),
}  # fmt: skip
# Training counts scenes from 0 and never comes this far; the two parts never meet either.
FIRST_SEED = {"test": 1_000_000_000, "validation": 2_000_000_000}


@dataclass(frozen=True)
class Prompt:
    """A sentence and the scene it describes."""

    text: str
    scene: Scene


def split(text: str) -> str:
    """The part a sentence belongs to, by its checksum: "test" (10 %), "validation" (5 %) or "train".

    Training uses sentences of its own part alone, so no test prompt was ever trained on, whatever the scenes were.
    """
    part = crc32(text.encode()) % 20
    return "test" if part < 2 else "validation" if part == 2 else "train"


def describe(scene: Scene, seed: int) -> str:
    """One sentence about the scene; the seed chooses among wordings, and which sizes, finishes and settings to mention.

    Colours, shapes and the scene's relations are always mentioned.
    """
    rng = random.Random(f"caption-{scene.seed}-{seed}")
    word = lambda fact: rng.choice(WORDS[fact])
    nouns = [f"{t.colour} {word(t.shape)}" for t in scene.things]

    def introduce(i):
        thing = scene.things[i]
        said = [word(fact) for fact in (thing.size, thing.finish) if rng.random() < 0.6]
        phrase = " ".join([*said, nouns[i]])
        return ("an " if phrase[0] in "aeiou" else "a ") + phrase

    known: set[int] = set()

    def mention(i):
        if i in known:
            return f"the {nouns[i]}"
        known.add(i)
        return introduce(i)

    sentence = rng.random() < 0.5  # "a cube is left of a cone", or a title: "a cube left of a cone"
    clauses = [] if scene.relations else [mention(0)]
    for a, relation, b in scene.relations:
        if not known and rng.random() < 0.25:
            clauses.append(f"{mention(b)} with {mention(a)} {word(relation)} it")
        else:
            verb = rng.choice(("is ", "stands ")) if sentence else ""
            clauses.append(f"{mention(a)} {verb}{word(relation)} {mention(b)}")
    body = rng.choice((" and ", ", and ", ", ")).join(clauses)
    setting = [word(fact) for fact, share in ((scene.ground, 0.6), (scene.sky, 0.8)) if rng.random() < share]
    rng.shuffle(setting)
    if setting and rng.random() < 0.2:
        return f"{' '.join(setting)}, {body}"
    opening = "" if sentence else rng.choice(("", "", "a picture of ", "a still life with "))
    return f"{opening}{body}{rng.choice((' ', ', ')) if setting else ''}{' '.join(setting)}"


def named(text: str, scene: Scene) -> tuple[tuple[bool, ...], bool]:
    """Which facts of the scene a sentence about it may leave out and does not: each thing's finish, and the sky."""
    finishes = tuple(
        any(f"{f} {t.colour} {s}" in text for f in WORDS[t.finish] for s in WORDS[t.shape]) for t in scene.things
    )
    return finishes, any(phrase in text for phrase in WORDS[scene.sky])


def wording(scene: Scene, part: str, first: int = 0, tries: int = 200) -> str | None:
    """The first wording of the scene from seed `first` on that belongs to `part`, or None after `tries`."""
    texts = (describe(scene, first + k) for k in range(tries))
    return next((text for text in texts if split(text) == part), None)


def prompts(n: int, part: str, seed: int = 0, held_out: bool | None = False) -> list[Prompt]:
    """`n` prompts of a part ("test" or "validation"), of scenes no training run draws. See `scenes.sample` for `held_out`."""
    out: list[Prompt] = []
    number = FIRST_SEED[part] + seed * 1_000_000
    while len(out) < n:
        scene = sample(number, held_out)
        text = wording(scene, part)
        if text and all(text != p.text for p in out[-50:]):
            out.append(Prompt(text, scene))
        number += 1
    return out


def test_prompts(n: int, seed: int = 0, held_out: bool | None = False) -> list[Prompt]:
    """`n` prompts that pocket was never trained on, the same ones for the same seed.

    `held_out=True` gives prompts with a colour-shape pair that training never showed.
    Introduced in notebooks/00_measure_first.ipynb.
    """
    return prompts(n, "test", seed, held_out)
