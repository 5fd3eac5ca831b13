"""Scenes: which objects, where, how many, on which ground; drawn, and put into words.

One annotation is the truth of one picture:
    {"id": "train_000012", "image": "images/train/000012.png", "ground": "blue",
     "objects": [{"name": "cow", "places": ["top left", "bottom right"]}, ...]}
An object's count is the number of its places. A place is a quarter of the picture and holds at most one stamp, wholly
inside it, so that no place is ambiguous.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import combinations

from PIL import Image

from demo.stamps import OBJECTS, THEMES, Stamps
from eval_vlm.annotations import QUARTERS
from eval_vlm.probing import NUMBERS, plural, with_article

PLACES = tuple(QUARTERS)
COLORS = {"red": (205, 55, 50), "gray": (150, 150, 150), "yellow": (240, 220, 90), "green": (80, 160, 80),
          "blue": (70, 110, 205), "purple": (130, 75, 160), "pink": (240, 165, 190), "white": (240, 240, 240)}
THINGS_IN_A_SCENE = {1: 8, 2: 30, 3: 35, 4: 27}  # number of stamps: weight
FREQUENCY_IN_THEME = (6, 5, 4, 3, 2, 2)  # of a theme's first, second, ... object
FREQUENCY_OF_THEME = (3, 3, 3, 2, 2, 2, 2, 1, 1, 1)
FROM_THE_THEME, REPEATED = 0.8, 0.35  # chances that an object is of the scene's theme; that it comes two or three times

MAP_SIDE = 8  # words
WITH_PLACES = 0.7  # share of detailed captions that name places
TEMPLATES = ("{items} on a {ground} ground.", "On a {ground} ground, {items}.", "A {ground} picture with {items}.",
             "{items}; the ground is {ground}.")


# --- annotations ---------------------------------------------------------------------------------------------------


def annotations(seed: int, split: str, count: int, taken: set[tuple]) -> list[dict]:
    """`count` scenes that differ from each other and from those in `taken` (which grows) in what they show."""
    rng = random.Random(f"{seed} scenes {split}")
    rows: list[dict] = []
    while len(rows) < count:
        row = _annotation(rng)
        if content(row) not in taken:
            taken.add(content(row))
            number = len(rows)
            rows.append({"id": f"{split}_{number:06d}", "image": f"images/{split}/{number:06d}.png", **row})
    return rows


def content(annotation: dict) -> tuple:
    """What a scene shows, whatever the order in which its objects are listed."""
    return annotation["ground"], tuple(sorted((o["name"], tuple(sorted(o["places"]))) for o in annotation["objects"]))


def _annotation(rng: random.Random) -> dict:
    things = rng.choices(list(THINGS_IN_A_SCENE), list(THINGS_IN_A_SCENE.values()))[0]
    free = rng.sample(PLACES, things)
    theme = rng.choices(list(THEMES), FREQUENCY_OF_THEME)[0]
    objects: list[dict] = []
    while free:
        source = theme if rng.random() < FROM_THE_THEME else rng.choice(list(THEMES))
        name = rng.choices(list(THEMES[source]), FREQUENCY_IN_THEME)[0]
        if any(name == o["name"] for o in objects):
            continue
        count = rng.randint(2, 3) if rng.random() < REPEATED else 1
        places, free = free[:count], free[count:]
        objects.append({"name": name, "places": sorted(places, key=PLACES.index)})
    return {"ground": rng.choice(list(COLORS)), "objects": objects}


# --- pictures ------------------------------------------------------------------------------------------------------


def ground(rng: random.Random, color: str, size: int) -> Image.Image:
    """A square of about this colour: each channel shifted by up to 10 of 255."""
    return Image.new("RGB", (size, size), tuple(min(255, c + rng.randint(-10, 10)) for c in COLORS[color]))


def draw(annotation: dict, stamps: Stamps, size: int, seed: int) -> Image.Image:
    """The scene as a picture of `size` x `size` pixels; stamps vary in size, position and mirroring."""
    rng = random.Random(f"{seed} draw {annotation['id']}")
    picture = ground(rng, annotation["ground"], size)
    for item in annotation["objects"]:
        for place in item["places"]:
            stamp = stamps.picture(OBJECTS[item["name"]], round(size * rng.uniform(0.38, 0.46)), rng.random() < 0.5)
            paste(picture, stamp, _corner(place, size), size // 2, rng)
    return picture


def paste(picture: Image.Image, stamp: Image.Image, corner: tuple[int, int], box: int, rng: random.Random) -> None:
    """Puts the stamp somewhere inside the square of side `box` whose top left corner is `corner`."""
    x = corner[0] + rng.randint(0, max(0, box - stamp.width))
    y = corner[1] + rng.randint(0, max(0, box - stamp.height))
    picture.paste(stamp, (x, y), stamp)


def _corner(place: str, size: int) -> tuple[int, int]:
    row, column = place.split()
    return (size // 2 if column == "right" else 0), (size // 2 if row == "bottom" else 0)


# --- words ---------------------------------------------------------------------------------------------------------


def listing(parts: list[str]) -> str:
    """`a, b and c`"""
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]


def counted(name: str, count: int) -> str:
    return with_article(name) if count == 1 else f"{NUMBERS[count]} {plural(name)}"


def short_caption(annotation: dict, rng: random.Random) -> str:
    """Names the objects and nothing else, as web alt text does: no count, place or colour."""
    names = [o["name"] for o in annotation["objects"]]
    rng.shuffle(names)
    return listing(names)


def detailed_caption(annotation: dict, rng: random.Random, with_places: bool | None = None) -> str:
    """Objects, counts, ground, and usually places; the order and the wording vary."""
    if with_places is None:
        with_places = rng.random() < WITH_PLACES
    return _say(annotation, rng.choice(TEMPLATES), with_places, rng.sample(range(4), 4))


def word_map(annotation: dict, rng: random.Random) -> str:
    """The scene as a map of 8 x 8 words in capitals, row by row: what covers each part, an object or the ground.

    To a language model it is what the patches of a picture will be: one token each (of a word and the space before
    it), whose position says where.
    """
    cells = [[annotation["ground"]] * MAP_SIDE for _ in range(MAP_SIDE)]
    half = MAP_SIDE // 2
    for o in annotation["objects"]:
        for x, y in (_corner(place, MAP_SIDE) for place in o["places"]):
            x, y = x + rng.randint(0, 1), y + rng.randint(0, 1)
            for row in cells[y:y + half - 1]:
                row[x:x + half - 1] = [o["name"]] * (half - 1)
    return "".join(f" {word.upper()}" for row in cells for word in row)


def _say(annotation: dict, template: str, with_places: bool, order: list[int]) -> str:
    objects = annotation["objects"]
    items = []
    for o in (objects[i] for i in order if i < len(objects)):
        words = counted(o["name"], len(o["places"]))
        items.append(f"{words} {listing(o['places'])}" if with_places else words)
    text = template.format(items="; ".join(items) if with_places else listing(items), ground=annotation["ground"])
    return text[0].upper() + text[1:]


def hard_captions(annotation: dict, rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """(kind, true caption, false caption) for each kind of detail: the false one differs in one detail of that kind."""
    for kind, change in (("object", _other_object), ("color", _other_color), ("place", _other_place),
                         ("count", _other_count)):
        false = {**annotation, "objects": [{**o, "places": list(o["places"])} for o in annotation["objects"]]}
        change(false, rng)
        template, order = rng.choice(TEMPLATES), rng.sample(range(4), 4)
        # A caption that lists places would contradict a false count by itself.
        with_places = kind != "count"
        yield kind, _say(annotation, template, with_places, order), _say(false, template, with_places, order)


def _other_object(annotation: dict, rng: random.Random) -> None:
    present = {o["name"] for o in annotation["objects"]}
    rng.choice(annotation["objects"])["name"] = rng.choice([name for name in OBJECTS if name not in present])


def _other_color(annotation: dict, rng: random.Random) -> None:
    annotation["ground"] = rng.choice([color for color in COLORS if color != annotation["ground"]])


def _other_place(annotation: dict, rng: random.Random) -> None:
    """Two objects change places where there are two; else the one moves."""
    objects = annotation["objects"]
    if len(objects) > 1:
        one, other = rng.sample(objects, 2)
        # One thing of each: with other numbers a swap would change the counts too.
        i, j = rng.randrange(len(one["places"])), rng.randrange(len(other["places"]))
        one["places"][i], other["places"][j] = other["places"][j], one["places"][i]
        for o in (one, other):
            o["places"].sort(key=PLACES.index)
    else:
        count = len(objects[0]["places"])
        objects[0]["places"] = rng.choice([p for p in _choices(count) if p != objects[0]["places"]])


def _choices(count: int) -> list[list[str]]:
    return [list(places) for places in combinations(PLACES, count)]


def _other_count(annotation: dict, rng: random.Random) -> None:
    changed = rng.choice(annotation["objects"])
    count = rng.choice([n for n in (1, 2, 3) if n != len(changed["places"])])
    changed["places"] = list(PLACES[:count])
