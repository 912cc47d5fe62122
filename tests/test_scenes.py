import math
from dataclasses import replace

import pytest
import torch

from sdopt.pocket.renderer import render
from sdopt.pocket.scenes import (
    COLOURS,
    HELD_OUT,
    MARGIN,
    SHAPES,
    Reading,
    Scene,
    Thing,
    leading_relation,
    project,
    sample,
)

SCENES = [sample(seed) for seed in range(300)]


def reading_of(scene):
    return Reading(scene.things, scene.sky, scene.ground)


def test_a_seed_is_a_scene_for_ever():
    scene = sample(7)
    assert [t.pair for t in scene.things] == [("white", "torus"), ("yellow", "cylinder")]
    assert [t.x for t in scene.things] == pytest.approx([2.119764, -1.688522], abs=1e-6)
    assert (scene.relations, scene.sky, scene.ground) == (((1, "left of", 0),), "sunset", "sand")
    assert scene.caption() == "a big yellow cylinder is to the left of a little matte white torus at sunset on sand"


def test_facts_can_be_read():
    for scene in SCENES:
        pairs = [t.pair for t in scene.things]
        assert 1 <= len(pairs) <= 3 and len(set(pairs)) == len(pairs)
        assert len(scene.relations) == len(pairs) - 1
        for a, relation, b in scene.relations:
            name, lead = leading_relation(scene.things[a], scene.things[b])
            assert name == relation and lead >= MARGIN
        for thing in scene.things:
            u, v, _ = project(*thing.centre)
            assert abs(u) < 1 and abs(v) < 1


def test_every_value_occurs():
    things = [t for scene in SCENES for t in scene.things]
    assert {t.pair for t in things} == {(c, s) for c in COLOURS for s in SHAPES}
    assert {r for s in SCENES for _, r, _ in s.relations} == {
        "left of",
        "right of",
        "in front of",
        "behind",
        "on top of",
    }
    assert {s.sky for s in SCENES} == {"day", "sunset", "night"}
    assert {(t.size, t.finish) for t in things} == {(a, b) for a in ("small", "large") for b in ("matte", "shiny")}


def test_held_out_pairs_stay_out():
    assert len(HELD_OUT) == 8 and {c for c, _ in HELD_OUT} == set(COLOURS) and {s for _, s in HELD_OUT} == set(SHAPES)
    for seed in range(200):
        assert not any(t.pair in HELD_OUT for t in sample(seed, held_out=False).things)
        assert any(t.pair in HELD_OUT for t in sample(seed, held_out=True).things)


def test_a_perfect_reading_agrees_with_everything():
    for scene in SCENES[:50]:
        agreement = scene.compare(reading_of(scene))
        assert all(agreement.objects) and all(agreement.relations) and all(agreement.finishes)
        assert agreement.sky == (True,) and agreement.exact


def test_what_is_wrong_is_seen():
    scene = next(s for s in SCENES if s.relations and s.relations[0][1] == "left of")
    a, _, b = scene.relations[0]
    things = list(scene.things)
    things[a], things[b] = replace(things[a], x=things[b].x), replace(things[b], x=things[a].x)
    swapped = scene.compare(replace(reading_of(scene), things=tuple(things)))
    assert all(swapped.objects) and not swapped.relations[0]
    recoloured = tuple(replace(t, colour="white" if t.colour != "white" else "red") for t in scene.things)
    wrong = scene.compare(Reading(recoloured, "day" if scene.sky != "day" else "night", scene.ground))
    assert not any(wrong.objects) and not any(wrong.relations) and wrong.sky == (False,)
    extra = Thing("cone", "cyan", "small", "matte", 0, 0, 0)
    more = scene.compare(replace(reading_of(scene), things=(*scene.things, extra)))
    assert all(more.objects) and not more.exact


def test_a_finish_or_a_sky_counts_only_where_the_prompt_names_it():
    things = (Thing("cube", "red", "small", "shiny", -1, 0, 0), Thing("torus", "blue", "large", "matte", 1, 0, 0))
    scene = Scene(things, ((0, "left of", 1),), "night", "sand", 5)
    dull = Reading(tuple(replace(t, finish="matte") for t in things), "day", "sand")
    compare = lambda text: (lambda a: (a.finishes, a.sky))(scene.compare(dull, text))
    assert compare("a red block left of a blue ring") == ((), ())
    assert compare("a glossy red block left of a big chalky blue ring") == ((False, True), ())
    assert compare("a red cube left of a chalky blue ring, under the stars") == ((True,), (False,))
    assert compare(None) == ((False, True), (False,))


def test_relations_have_opposites():
    opposite = {"left of": "right of", "in front of": "behind"}
    for scene in SCENES:
        for a, relation, b in scene.relations:
            if relation in opposite:
                assert leading_relation(scene.things[b], scene.things[a])[0] == opposite[relation]


def test_drawing_is_deterministic_and_does_not_depend_on_its_neighbours():
    one, both = SCENES[3].render(64), render(SCENES[3:5], 64)
    assert one.dtype == torch.uint8 and one.shape == (3, 64, 64)
    assert torch.equal(one, both[0]) and torch.equal(one, SCENES[3].render(64)) and not torch.equal(both[0], both[1])


def test_things_are_drawn_where_they_stand():
    thing = Thing("sphere", "red", "large", "matte", -0.8, 0.0, 0.4)
    picture = Scene((thing,), (), "day", "tiles", 1).render(96).float()
    red = (picture[0] > 1.8 * picture[1]).float()
    rows, columns = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    u, v, depth = project(*thing.centre)
    centre = [((c + 1) / 2 * 96 - 0.5) for c in (u, v)]
    assert (red * columns).sum() / red.sum() == pytest.approx(centre[0], abs=1.5)
    assert (red * rows).sum() / red.sum() == pytest.approx(centre[1], abs=1.5)
    radius = 0.92 * thing.scale / (depth * 0.43) * 48
    assert red.sum() == pytest.approx(math.pi * radius**2, rel=0.15)


def test_night_is_darker_and_shine_brighter():
    thing = Thing("sphere", "blue", "large", "matte", 0.0, 0.0, 0.0)
    draw = lambda sky, finish: Scene((replace(thing, finish=finish),), (), sky, "sand", 5).render(96).float()
    assert draw("night", "matte").mean() < 0.75 * draw("day", "matte").mean()
    middle = (slice(None), slice(30, 60), slice(35, 61))
    assert draw("day", "shiny")[middle].amin(0).max() > draw("day", "matte")[middle].amin(0).max() + 40


@pytest.mark.gpu
def test_a_gpu_draws_what_a_cpu_draws():
    cpu, gpu = render(SCENES[:8]), render(SCENES[:8], device="cuda").cpu()
    off = (cpu.int() - gpu.int()).abs()
    assert off.float().mean() < 0.05 and (off > 8).float().mean() < 1e-3
