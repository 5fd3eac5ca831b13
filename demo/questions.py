"""Conversations about scenes in LLaVA's format.

All follow from annotations (see scenes.py); POPE's and MME's questions are eval_vlm's (eval_vlm/probing.py).
"""

from __future__ import annotations

import random

from demo.scenes import COLORS, NUMBERS, PLACES
from demo.stamps import OBJECTS
from eval_vlm.annotations import scene
from eval_vlm.probing import Company, color_question, count_question, is_there, plural, side_questions
from eval_vlm.suites import mme

YES_OR_NO = f" {mme.YES_OR_NO}"
Turn = tuple[str, str]  # question, answer


def turns(annotation: dict, company: Company, rng: random.Random) -> list[Turn]:
    """A conversation with answers in few words: which objects are there, then details, or where each thing is.

    Existence comes first, because after "Where is the cow?" nobody has to look to say whether there is a cow. One
    conversation in four has none of it, so that every kind of question also comes first.
    """
    existence = _existence_turns(annotation, company, rng) if rng.random() < 0.75 else []
    if rng.random() < 0.5:
        chosen = _detail_turns(annotation, rng)
    else:
        chosen = [_where_turn(o) for o in annotation["objects"] if len(o["places"]) == 1]
        chosen += [_place_turn(annotation, place) for place in PLACES]
    return existence + rng.sample(chosen, min(len(chosen), 4 if existence else 8))


def _where_turn(single: dict) -> Turn:
    return f"Where is the {single['name']}?", single["places"][0].capitalize()


def _place_turn(annotation: dict, place: str) -> Turn:
    there = next((o["name"] for o in annotation["objects"] if place in o["places"]), "nothing")
    return f"What is at the {place}?", there.capitalize()


def _existence_turns(annotation: dict, company: Company, rng: random.Random) -> list[Turn]:
    """A question about each object that is there, and one about as many that are not, in an order of chance."""
    present = [o["name"] for o in annotation["objects"]]
    absent: list[str] = []
    while len(absent) < len(present):
        name = _balancing(present, company, rng)
        if name not in absent:
            absent.append(name)
    result = []
    for name, answer in [(name, "Yes") for name in present] + [(name, "No") for name in absent]:
        question = is_there(name)
        if rng.random() < 0.3:
            question = question.replace("the image", "this image") + YES_OR_NO
        result.append((question, answer))
    rng.shuffle(result)
    return result


def _balancing(present: list[str], company: Company, rng: random.Random) -> str:
    """An object that is not there, for a question that balances one about an object that is.

    Half of them are drawn as often as they occur, half as often as they would be in such company. So each object is
    asked for with yes as often as with no: a question by itself says nothing about its answer.
    """
    names = [name for name in OBJECTS if name not in present]
    if rng.random() < 0.5:
        weights = [company.frequency[name] for name in names]
    else:
        weights = [sum(company.together[there][name] / company.frequency[there] for there in present) for name in names]
    return rng.choices(names, [weight + 1e-3 for weight in weights])[0]


def _detail_turns(annotation: dict, rng: random.Random) -> list[Turn]:
    """One turn of each kind that the scene allows (at least five): counts, places, sides, the ground's colour."""
    objects, color = annotation["objects"], annotation["ground"]
    some = rng.choice(objects)
    place = rng.choice(PLACES)
    other = rng.choice([c for c in COLORS if c != color])
    truth = rng.random() < 0.5
    count = len(some["places"])
    asked = count if rng.random() < 0.5 else rng.choice([n for n in (1, 2, 3) if n != count])
    found = [
        (f"How many {plural(some['name'])} are in the image?", NUMBERS[count].capitalize()),
        (count_question(some["name"], asked) + YES_OR_NO, "Yes" if asked == count else "No"),
        _place_turn(annotation, place),
        ("What color is the ground?", color.capitalize()),
        (color_question(color if truth else other) + YES_OR_NO, "Yes" if truth else "No"),
    ]
    single = [o for o in objects if len(o["places"]) == 1]
    if single:
        found.append(_where_turn(rng.choice(single)))
    sides = side_questions(scene(annotation))
    if sides:
        true = rng.random() < 0.5
        found.append((rng.choice(sides)[0 if true else 1] + YES_OR_NO, "Yes" if true else "No"))
    return found


def conversation(first_words: str, pairs: list[Turn]) -> list[dict]:
    """LLaVA's `conversations`; `first_words` (an `<image>` mark, or a map of words) stand before the first question."""
    rows = []
    for i, (question, answer) in enumerate(pairs):
        rows += [{"from": "human", "value": f"{first_words}\n{question}" if i == 0 else question},
                 {"from": "gpt", "value": answer}]
    return rows
