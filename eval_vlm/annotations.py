"""What is in which picture, read from annotations: COCO's instances JSON, or scenes as JSON lines.

A scene is `{"image": "a.png", "objects": [...]}`. An object is `{"name": "cow", "places": ["top left", ...]}`, each
place a quarter of the picture with one of it (demo/scenes.py, whose `ground` is the picture's colour), or a name alone,
as in the list of objects that POPE is built from (github.com/RUCAIBox/POPE).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipmoe_vlm.runs import UserError, read_jsonl

Box = tuple[float, float, float, float]  # left, top, right, bottom; y grows downwards
QUARTERS: dict[str, Box] = {"top left": (0, 0, 1, 1), "top right": (1, 0, 2, 1), "bottom left": (0, 1, 1, 2),
                            "bottom right": (1, 1, 2, 2)}
TOO_SMALL = 0.01  # of the picture: nobody counts or places what covers less


@dataclass(frozen=True)
class Picture:
    """One picture's annotation.

    Args:
        image: its file, relative to the folder of pictures.
        objects: name -> a box for each of them; empty where it is not known how many there are or where.
        ground: the colour of the ground, if the annotations tell it.
    """

    image: str
    objects: dict[str, list[Box]]
    ground: str | None = None


def read_pictures(file: str | Path) -> list[Picture]:
    """Raises:
        UserError: no such file, another format, or broken content (names the picture, annotation or line).
    """
    file = Path(file)
    if not file.is_file():
        raise UserError(f"{file}: no such file; name COCO's instances JSON or a file of scenes")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no text ({error}); name COCO's instances JSON or a file of scenes") from error
    except json.JSONDecodeError:  # of several lines, or broken: then this names the line
        content = read_jsonl(file)
    if isinstance(content, dict) and "images" in content:
        return _coco(content, file)
    rows = [content] if isinstance(content, dict) else content
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and "objects" in row for row in rows):
        raise UserError(f"{file} is neither COCO's instances JSON (an object with images, annotations and categories) "
                        "nor scenes (JSON lines with image and objects); name such a file")
    pictures = [scene(row, f"{file}, scene {number}") for number, row in enumerate(rows, 1)]
    _once((picture.image for picture in pictures), f"{file}: the picture")
    _once((row["id"] for row in rows if "id" in row), f"{file}: the id")
    return pictures


def scene(row: dict, where: str = "scene") -> Picture:
    """Raises:
        UserError: a field is missing or of the wrong kind; `where` names the row.
    """
    if not isinstance(row.get("image"), str) or not isinstance(row["objects"], list):
        raise UserError(f"{where}: needs image (a file) and objects (a list); correct it")
    objects: dict[str, list[Box]] = {}
    for item in row["objects"]:
        name, places = (item.get("name"), item.get("places")) if isinstance(item, dict) else (item, [])
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{where}: an object has no name: {str(item)[:60]}; give it one")
        if not isinstance(places, list) or not set(map(str, places)) <= QUARTERS.keys():
            raise UserError(f"{where}: the places of {name} must be some of {', '.join(QUARTERS)}; correct them")
        objects.setdefault(name, []).extend(QUARTERS[place] for place in places)
    return Picture(row["image"], objects, row.get("ground"))


def _coco(content: dict, file: Path) -> list[Picture]:
    """COCO's instances. A crowd (`iscrowd`) is there, as for POPE, but nobody says how many it is."""
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list) or not all(isinstance(row, dict) for row in content[key]):
            raise UserError(f"{file} has no list of {key}; name COCO's instances JSON (its captions are another file)")
        _once((_field(row, "id", f"{file}: one of {key}") for row in content[key]), f"{file}: among {key} the id")
    names = {row["id"]: row.get("name") for row in content["categories"]}
    nameless = [number for number, name in names.items() if not isinstance(name, str) or not name.strip()]
    if nameless:
        raise UserError(f"{file}: category {nameless[0]} has no name; give it one")
    images = {row["id"]: row for row in content["images"]}
    files = {number: _field(row, "file_name", f"{file}, image {number}") for number, row in images.items()}
    _once(files.values(), f"{file}: the picture")
    objects: dict[Hashable, dict[str, list[Box]]] = {number: {} for number in images}
    unclear: set[tuple[Hashable, str]] = set()
    for number, row in enumerate(content["annotations"], 1):
        where = f"{file}, annotation {row.get('id', number)}"
        image, category = _field(row, "image_id", where), _field(row, "category_id", where)
        if image not in images or category not in names:
            what = f"image {image}" if image not in images else f"category {category}"
            raise UserError(f"{where} is of {what}, which the file does not have; get the file again")
        box = _box(row.get("bbox"), where)
        boxes = objects[image].setdefault(names[category], [])
        area = images[image].get("width", 0) * images[image].get("height", 0)
        if box is None or row.get("iscrowd") or (box[2] - box[0]) * (box[3] - box[1]) < TOO_SMALL * area:
            unclear.add((image, names[category]))
        else:
            boxes.append(box)
    for image, name in unclear:
        objects[image][name].clear()
    return [Picture(files[number], objects[number]) for number in images]


def _box(box: Any, where: str) -> Box | None:
    """COCO's left, top, width and height as a `Box`."""
    if box is None:
        return None
    numbers = isinstance(box, list) and len(box) == 4 and all(
        isinstance(side, int | float) and math.isfinite(side) for side in box)
    if not numbers or min(box[2:]) < 0:
        raise UserError(f"{where}: the bbox must be four numbers (left, top, width, height), found {box}; correct it")
    return box[0], box[1], box[0] + box[2], box[1] + box[3]


def _field(row: dict, key: str, where: str) -> Any:
    if not isinstance(row.get(key), str | int):
        raise UserError(f"{where} has no {key}; get the file again")
    return row[key]


def _once(values: Iterable[Hashable], what: str) -> None:
    double = next((value for value, count in Counter(values).items() if count > 1), None)
    if double is not None:
        raise UserError(f"{what} {double} is there twice; keep one of them")
