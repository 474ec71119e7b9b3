"""The model card: front matter that parses, the model's figures, nothing that breaks it."""

import json
import re

import pytest
import yaml

from d2m.convert.model_card import model_card
from d2m.recipe.recipe import preset, to_dict
from runtime.files.parameters import count

D = 32
SPARSE = {
    "blocks.0.ff.shared.fc1.weight": (D, D),
    "blocks.0.ff.shared.fc1.bias": (D,),
    "blocks.0.ff.shared.fc2.weight": (D, D),
    "blocks.0.ff.shared.fc2.bias": (D,),
    "blocks.0.ff.gate.weight": (12, D),
    "blocks.0.ff.experts.w1": (12, D, D // 4),
    "blocks.0.ff.experts.b1": (12, D // 4),
    "blocks.0.ff.experts.w2": (12, D // 4, D),
    "blocks.0.attn.weight": (D, D),
}
FACTS = {
    "tags": ("flux",),
    "name": "shapes-L",
    "base_model": "models/shapes-dense",
    "recipe": to_dict(preset("L")),
    "parameters": {"dense": count({"w": (9 * D, D), "b": (5 * D,)}), "sparse": count(SPARSE, 2)},
}
RATE = {"score": 0.84, "low": 0.808, "high": 0.867, "n": 600}
SCORE = {
    "suite": "shapes",
    "n": 600,
    "seed": 0,
    "overall": RATE,
    "categories": {"two_object": RATE | {"score": 0.5, "n": 100}},
}


def front_matter(card):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.S)[1])


def test_front_matter_is_what_the_hub_reads():
    matter = front_matter(model_card(**FACTS, licence="apache-2.0"))
    assert matter["base_model"] == "models/shapes-dense"
    assert matter["library_name"] == "diffusers" and matter["pipeline_tag"] == "text-to-image"
    assert matter["license"] == "apache-2.0" and {"flux", "d2m"} <= set(matter["tags"])
    assert "license" not in front_matter(model_card(**FACTS))


@pytest.mark.parametrize("text", ['a: "b" #c', "no", "x\ny: z", "ü 'q' \\ {1}", "- 1"])
def test_front_matter_survives_any_name(text):
    card = model_card(**(FACTS | {"base_model": text, "name": text}), licence=text)
    matter = front_matter(card)
    assert matter["base_model"] == text and matter["license"] == text
    assert "\n# " + " ".join(text.split()) + "\n" in card


def test_figures_are_the_models():
    card = model_card(**FACTS)
    sparse = FACTS["parameters"]["sparse"]
    assert f"| sparse transformer, activated | {sparse['activated']:,} |" in card
    assert f"| sparse transformer, total | {sparse['total']:,} |" in card
    assert "37.5 % of the feed-forward weights" in card
    assert "| shared | shared | 0 | " in card and "| experts | experts, gate | 2 | " in card
    assert "## Scores" not in card


def test_scores_and_defaults():
    card = model_card(**FACTS, scores={"dense": SCORE, "sparse": SCORE}, defaults={"height": 32})
    assert "| two object | 0.500 (0.808 – 0.867) | 0.500 (0.808 – 0.867) |" in card
    assert "| overall | 0.840 (0.808 – 0.867) |" in card
    assert 'left of a blue square", height=32).images[0]' in card
    one = model_card(**FACTS, scores={"sparse": SCORE})
    assert "| category | sparse |" in one


def test_an_untrained_model_says_so():
    card = model_card(**(FACTS | {"recipe": to_dict(preset("L")) | {"stages": []}}))
    assert "not trained" in card and "distilled" not in card
    assert json.loads(json.dumps(card)) == card
