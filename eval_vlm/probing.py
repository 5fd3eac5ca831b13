"""POPE's and MME's questions from annotations: is it there, how many, on which side, on which ground.

POPE's procedure (Li et al. 2023, arXiv 2305.10355; the rules as in the authors' code, github.com/RUCAIBox/POPE): of
each picture its first three objects are asked for, each followed by one that is absent: any (random), the most frequent
one (popular), or the one most often seen with the object before it (adversarial). Of equals the one that occurs first
in the annotations comes first. Given the published frequencies and company this makes the released COCO sets.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from itertools import combinations, permutations

from clipmoe_vlm.runs import UserError
from eval_vlm.annotations import Picture
from eval_vlm.suites.mme import YES_OR_NO

HALF = 3  # objects that are there, and that are not, per picture
SUBTASKS = ("existence", "count", "position", "color")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
COUNTED = 4  # MME's count questions: more are seldom counted alike by two people
PLURALS = {"person": "people", "knife": "knives", "mouse": "mice", "skis": "skis", "scissors": "scissors",
           "sheep": "sheep", "deer": "deer", "broccoli": "broccoli"}


class Company:
    """How often each object occurs in some pictures, and how often with which others.

    Attributes:
        frequency: of an object: the number of pictures with it, in order of first appearance.
        together: of an object: the number of pictures with it and another, by that other.
        counts, grounds: the numbers of one object in a picture, and the colours, that occur.
    """

    def __init__(self, pictures: Iterable[Picture]):
        pictures = list(pictures)
        self.frequency = Counter(name for picture in pictures for name in picture.objects)
        self.together: dict[str, Counter] = {name: Counter() for name in self.frequency}
        for picture in pictures:
            for name, other in permutations(picture.objects, 2):
                self.together[name][other] += 1
        self.counts = sorted({len(boxes) for picture in pictures for boxes in picture.objects.values()})
        self.grounds = sorted({picture.ground for picture in pictures if picture.ground})

    def absent(self, picture: Picture, asked: list[str], kind: str, rng: random.Random) -> list[str]:
        """For each object in `asked` one that is not in the picture.

        Args:
            kind: of POPE's set: `random`, `popular` or `adversarial`; where no companion of an object is absent, POPE
                draws any object.

        Raises:
            UserError: there are too few other objects.
        """
        chosen: list[str] = []
        for name in asked:
            taken = {*picture.objects, *chosen}
            company = self.together.get(name, Counter())
            ranking = {"random": Counter(), "popular": self.frequency, "adversarial": company}[kind].most_common()
            free = [other for other, _ in ranking if other not in taken]
            if not free:
                free = [other for other in self.frequency if other not in taken]
                rng.shuffle(free)
            if not free:
                raise UserError(f"{picture.image} holds all but {len(chosen)} of the {len(self.frequency)} kinds of "
                                f"objects, but {len(asked)} that are absent are asked for; annotate more kinds")
            chosen.append(free[0])
        return chosen


# --- POPE ----------------------------------------------------------------------------------------------------------


def pope_set(pictures: Iterable[Picture], company: Company, kind: str, seed: int) -> list[dict]:
    """The lines of one of POPE's files: six questions a picture, yes and no in turn.

    Args:
        pictures: with three different objects or more.
        kind: `random`, `popular` or `adversarial`.

    Raises:
        UserError: a picture holds nearly all objects.
    """
    lines = []
    for picture in pictures:
        there = list(picture.objects)[:HALF]
        absent = company.absent(picture, there, kind, random.Random(f"{seed} pope {picture.image}"))
        for pair in zip(there, absent, strict=True):
            for name, label in zip(pair, ("yes", "no"), strict=True):
                lines.append({"question_id": len(lines) + 1, "image": picture.image, "text": is_there(name),
                              "label": label})
    return lines


# --- MME -----------------------------------------------------------------------------------------------------------


def mme_pairs(pictures: list[Picture], subtask: str, company: Company, seed: int
              ) -> list[tuple[Picture, tuple[str, str]]]:
    """Each picture that allows such a question, in an order of chance, with the one to be answered Yes, and with No."""
    rng = random.Random(f"{seed} mme {subtask}")
    pairs = [(picture, _mme_pair(picture, subtask, company, rng)) for picture in rng.sample(pictures, len(pictures))]
    return [(picture, (f"{pair[0]} {YES_OR_NO}", f"{pair[1]} {YES_OR_NO}")) for picture, pair in pairs if pair]


def _mme_pair(picture: Picture, subtask: str, company: Company, rng: random.Random) -> tuple[str, str] | None:
    if subtask == "existence" and picture.objects:
        name = rng.choice(list(picture.objects))
        other = company.absent(picture, [name], "random", rng)[0]
        return is_there(name, "this"), is_there(other, "this")
    if subtask == "count":
        pairs = [(count_question(name, len(boxes)), count_question(name, wrong))
                 for name, boxes in picture.objects.items() if 0 < len(boxes) <= COUNTED
                 for wrong in company.counts if wrong and wrong != len(boxes) and abs(wrong - len(boxes)) <= 2]
        return rng.choice(pairs) if pairs else None
    if subtask == "position":
        pairs = side_questions(picture)
        return rng.choice(pairs) if pairs else None
    others = [ground for ground in company.grounds if ground != picture.ground]
    if subtask == "color" and picture.ground and others:
        return color_question(picture.ground), color_question(rng.choice(others))
    return None


# --- single questions ----------------------------------------------------------------------------------------------


def with_article(name: str) -> str:
    """POPE's rule: the first letter decides."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    if name in PLURALS:
        return PLURALS[name]
    if name[-1] == "y" and name[-2:-1] not in tuple("aeiou"):
        return name[:-1] + "ies"
    return name + ("es" if name.endswith(("s", "x", "ch", "sh", "tomato", "potato")) else "s")


def is_there(name: str, which: str = "the") -> str:
    return f"Is there {with_article(name)} in {which} image?"


def count_question(name: str, count: int) -> str:
    if count == 1:
        return f"Is there only one {name} in this image?"
    return f"Are there {NUMBERS[count]} {plural(name)} in this image?"


def color_question(color: str) -> str:
    return f"Is the ground {color} in this image?"


def side_questions(picture: Picture) -> list[tuple[str, str]]:
    """(true, false) questions about two single objects of which one is wholly left of, or above, the other."""
    single = [(name, boxes[0]) for name, boxes in picture.objects.items() if len(boxes) == 1]
    pairs = []
    for (one, box), (other, there) in combinations(single, 2):
        for start, words in ((0, ("on the left side of", "on the right side of")), (1, ("above", "below"))):
            before, after = box[start + 2] <= there[start], there[start + 2] <= box[start]
            if before != after:
                true, false = words if before else words[::-1]
                pairs.append((f"Is the {one} {true} the {other}?", f"Is the {one} {false} the {other}?"))
    return pairs
