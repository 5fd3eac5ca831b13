"""Questions and answers about scenes: LLaVA conversations, POPE's three sets, MME-style subtasks.

All follow from annotations (see scenes.py). What a question set needs to know about frequencies and company comes
from the training scenes alone.
"""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations, permutations

from demo.scenes import COLORS, NUMBERS, PLACES
from demo.stamps import OBJECTS, plural, with_article

YES_OR_NO = " Please answer yes or no."
POPE_QUESTIONS_PER_PICTURE = 6
Turn = tuple[str, str]  # question, answer


class Company:
    """How often each object occurs in the given scenes, and each pair together."""

    def __init__(self, annotations: list[dict]):
        names = [[o["name"] for o in a["objects"]] for a in annotations]
        self.frequency = Counter(name for row in names for name in row)
        self.together = Counter(pair for row in names for pair in permutations(row, 2))

    def absent(self, present: list[str], kind: str, rng: random.Random) -> list[str]:
        """The objects that are not there, those to ask for first first.

        Args:
            kind: POPE's: `random`; `popular` (most frequent first); `adversarial` (most often seen with those present
                first). Ties fall by the dice.
        """
        names = [name for name in OBJECTS if name not in present]
        rng.shuffle(names)
        if kind == "popular":
            names.sort(key=lambda name: -self.frequency[name])
        elif kind == "adversarial":
            names.sort(key=lambda name: -sum(self.together[there, name] for there in present))
        return names

    def balancing(self, present: list[str], rng: random.Random) -> str:
        """An object that is not there, for a question that balances one about an object that is.

        Half of them are drawn as often as they occur, half as often as they would be in such company. So each object
        is asked for with yes as often as with no: a question by itself says nothing about its answer.
        """
        names = [name for name in OBJECTS if name not in present]
        if rng.random() < 0.5:
            weights = [self.frequency[name] for name in names]
        else:
            weights = [sum(self.together[there, name] / self.frequency[there] for there in present) for name in names]
        return rng.choices(names, [weight + 1e-3 for weight in weights])[0]


# --- single questions ----------------------------------------------------------------------------------------------


def is_there(name: str) -> str:
    return f"Is there {with_article(name)} in the image?"


def _count_question(name: str, count: int) -> str:
    if count == 1:
        return f"Is there only one {name} in this image?"
    return f"Are there {NUMBERS[count]} {plural(name)} in this image?"


def _color_question(color: str) -> str:
    return f"Is the ground {color} in this image?"


def _side_questions(annotation: dict) -> list[tuple[str, str]]:
    """(true, false) questions about two single objects of which one is left of, or above, the other."""
    single = [(o["name"], o["places"][0].split()) for o in annotation["objects"] if len(o["places"]) == 1]
    pairs = []
    for (one, at), (other, there) in combinations(single, 2):
        if at[1] != there[1]:
            sides = (at[1], there[1])
            pairs.append(tuple(f"Is the {one} on the {side} side of the {other}?" for side in sides))
        if at[0] != there[0]:
            words = {"top": "above", "bottom": "below"}
            pairs.append(tuple(f"Is the {one} {words[row]} the {other}?" for row in (at[0], there[0])))
    return pairs


# --- conversations -------------------------------------------------------------------------------------------------


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
        name = company.balancing(present, rng)
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
        (_count_question(some["name"], asked) + YES_OR_NO, "Yes" if asked == count else "No"),
        _place_turn(annotation, place),
        ("What color is the ground?", color.capitalize()),
        (_color_question(color if truth else other) + YES_OR_NO, "Yes" if truth else "No"),
    ]
    single = [o for o in objects if len(o["places"]) == 1]
    if single:
        found.append(_where_turn(rng.choice(single)))
    sides = _side_questions(annotation)
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


# --- POPE ----------------------------------------------------------------------------------------------------------


def pope_set(annotations: list[dict], company: Company, kind: str, seed: int) -> list[dict]:
    """POPE's lines for scenes with three different objects: those three, and three that are not there, in turn."""
    lines = []
    for annotation in annotations:
        # The same objects are asked for in all three sets, as in POPE's.
        rng = random.Random(f"{seed} pope {annotation['id']}")
        present = [o["name"] for o in annotation["objects"]]
        half = POPE_QUESTIONS_PER_PICTURE // 2
        if len(present) < half:
            continue
        there = rng.sample(present, half)
        absent = company.absent(present, kind, rng)[:half]
        for name, label in [pair for y, n in zip(there, absent, strict=True) for pair in ((y, "yes"), (n, "no"))]:
            lines.append({"question_id": len(lines) + 1, "image": annotation["image"].split("/")[-1],
                          "text": is_there(name), "label": label})
    return lines


# --- MME -----------------------------------------------------------------------------------------------------------


def mme_pair(annotation: dict, subtask: str, company: Company, rng: random.Random) -> tuple[str, str] | None:
    """The two questions (answers Yes, No) of a perception subtask about a scene; None where the scene allows none."""
    names = [o["name"] for o in annotation["objects"]]
    if subtask == "existence":
        absent = company.absent(names, "random", rng)[0]
        pair = tuple(is_there(name).replace("the image", "this image") for name in (rng.choice(names), absent))
    elif subtask == "count":
        some = rng.choice(annotation["objects"])
        count = len(some["places"])
        wrong = rng.choice([n for n in (1, 2, 3) if n != count])
        pair = (_count_question(some["name"], count), _count_question(some["name"], wrong))
    elif subtask == "position":
        sides = _side_questions(annotation)
        if not sides:
            return None
        pair = rng.choice(sides)
    else:
        wrong_color = rng.choice([c for c in COLORS if c != annotation["ground"]])
        pair = (_color_question(annotation["ground"]), _color_question(wrong_color))
    return pair[0] + YES_OR_NO, pair[1] + YES_OR_NO
