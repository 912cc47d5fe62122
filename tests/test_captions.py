import re

import pytest
from transformers import CLIPTokenizer

from sdopt.pocket import PIPELINE
from sdopt.pocket.captions import (
    FIRST_SEED,
    WORDS,
    describe,
    prompts,
    split,
    wording,
)
from sdopt.pocket.captions import (
    test_prompts as draw_prompts,
)
from sdopt.pocket.scenes import HELD_OUT, sample

SCENES = [sample(seed) for seed in range(200)]


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(PIPELINE / "tokenizer")


def test_a_caption_names_every_pair_and_relation():
    for scene in SCENES:
        text = describe(scene, 0)
        for thing in scene.things:
            assert any(f"{thing.colour} {word}" in text for word in WORDS[thing.shape]), text
        for _, relation, _ in scene.relations:
            assert any(f" {word} " in text for word in WORDS[relation]), text


def test_wording_varies_and_is_the_same_for_a_seed():
    texts = {describe(SCENES[0], seed) for seed in range(20)}
    assert len(texts) > 12
    assert describe(SCENES[0], 3) == describe(sample(0), 3) == SCENES[0].caption(3)
    first_words = {describe(scene, 1).split()[0] for scene in SCENES}
    assert len(first_words) >= 5


def test_no_word_of_one_fact_hides_in_another():
    text = " ".join(describe(scene, 0) for scene in SCENES)
    assert set(re.findall(r"\b(?:red|orange|yellow|green|cyan|blue|purple|white)\b", text)) == {c for c, _ in HELD_OUT}


def test_training_never_sees_a_test_prompt():
    parts = [split(describe(scene, seed)) for scene in SCENES for seed in range(10)]
    assert 0.07 < parts.count("test") / len(parts) < 0.13
    assert 0.03 < parts.count("validation") / len(parts) < 0.07
    assert all(split(p.text) == "test" for p in draw_prompts(40))
    assert all(split(p.text) == "validation" for p in prompts(20, "validation"))
    assert all(split(wording(scene, "train", first=1000 * k)) == "train" for scene in SCENES[:50] for k in range(4))


def test_prompts_are_the_same_for_a_seed_and_keep_their_pairs():
    asked = draw_prompts(30)
    assert asked[:10] == draw_prompts(10) and asked != draw_prompts(30, seed=1)
    assert all(p.scene.seed >= FIRST_SEED["test"] for p in asked)
    assert all(p.scene.seed >= FIRST_SEED["validation"] for p in prompts(5, "validation"))
    assert not any(t.pair in HELD_OUT for p in asked for t in p.scene.things)
    assert all(any(t.pair in HELD_OUT for t in p.scene.things) for p in draw_prompts(30, held_out=True))


def test_every_word_is_one_token(tokenizer):
    for scene in SCENES:
        text = describe(scene, 0)
        ids = tokenizer(text).input_ids
        assert len(ids) == len(re.findall(r"\w+|,", text)) + 2
        assert len(ids) <= tokenizer.model_max_length
    assert (
        tokenizer.decode(tokenizer("a shiny red ball").input_ids, skip_special_tokens=True).strip()
        == "a shiny red ball"
    )
