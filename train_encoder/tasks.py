"""Retrieval and hard captions from the files that people have: Karpathy's JSON, captions files and shards; triples of
our own, SugarCrepe's and ARO's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from PIL import Image

from clipmoe_vlm.runs import UserError, read_jsonl

from .config import EncoderConfig
from .data import Samples, open_picture
from .features import Items
from .sources import build_index
from .zero_shot import HardCaptions, HeldOut, Retrieval

Picture = str | bytes | list | tuple  # path, a file's content, [shard, offset, size], or (path, box to cut out)


@dataclass
class TaskConfig:
    """One task. docs/evaluation.md has the layouts of the files."""

    kind: str = MISSING  # retrieval | classification | hard_captions
    data: str = MISSING
    image_root: str | None = None  # null: the folder of `data`
    split: str | None = None  # of a Karpathy JSON (null: test; all: every picture) or of a `datasets` folder
    image_column: str = "image"
    caption_column: str = "caption"
    label_column: str = "label"
    classes: str | None = None  # imagenet, or a file of names; null: the folders' or labels' own names
    templates: str = "imagenet"  # imagenet: CLIP's 80; or a file


class Opener:
    """Opens the n-th picture of a list, or gives the sentence that says why not."""

    def __init__(self, pictures: Sequence[Picture]):
        self.pictures = pictures

    def __call__(self, number: int) -> Image.Image | str:
        where, box = self.pictures[number], None
        if isinstance(where, tuple):
            where, box = where
        picture = open_picture(where, f"number {number}" if isinstance(where, bytes) else str(where))
        return picture if box is None or isinstance(picture, str) else picture.crop(box)


def items_of(pictures: Sequence[Picture]) -> Items:
    return Items(len(pictures), Opener(pictures))


def check_there(paths: Sequence[str], source: str | Path) -> None:
    """Raises:
        UserError: pictures are missing (how many, and the first).
    """
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise UserError(f"{source}: {len(missing)} of its {len(paths)} pictures are not there, the first is "
                        f"{missing[0]}; put them there or set image_root")


def read_json(file: Path) -> Any:
    """Raises:
        UserError: no such file, or no JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid JSON ({error})") from error


def load_held_out(config: EncoderConfig, index: Path) -> HeldOut:
    """What a training run measures, from `validation_data` and `hard_captions`. See the loaders below.

    Raises:
        UserError: what is wrong with the files.
    """
    retrieval = hard = None
    if config.validation_data:
        retrieval = load_retrieval(config.validation_data, index, config.image_column, config.caption_column,
                                   config.image_root, config.validation_split)
        print(f"validation data: {len(retrieval.pictures)} pictures with {len(retrieval.captions)} captions in "
              f"{config.validation_data}", flush=True)
    if config.hard_captions:
        hard = load_hard_captions(config.hard_captions, config.image_root)
    return HeldOut(retrieval, hard)


# --- retrieval -----------------------------------------------------------------------------------------------------


def load_retrieval(source: str, index: Path, image_column: str, caption_column: str, image_root: str | None,
                   split: str) -> Retrieval:
    """One split of a JSON of Karpathy's, or all samples of what `build_index` takes (through `index`)."""
    rows = karpathy_rows(source)
    if rows is not None:
        return load_karpathy(source, rows, image_root, split)
    found = build_index(source, index, image_column, caption_column, image_root)
    print(f"held-out data: {found}", flush=True)
    return retrieval_of(Samples(index))


def karpathy_rows(source: str) -> list | None:
    """The pictures of a file of Karpathy's splits (dataset_coco.json, dataset_flickr30k.json); None for other sources.

    A captions file is a list, perhaps of gigabytes: then its first character is all that is read.
    """
    if not source.endswith(".json") or not Path(source).is_file():
        return None
    with open(source, "rb") as stream:
        if not stream.read(64).lstrip().startswith(b"{"):
            return None
    rows = read_json(Path(source)).get("images")
    return rows if isinstance(rows, list) else None


def load_karpathy(source: str, rows: list, image_root: str | None, split: str) -> Retrieval:
    """The pictures of one split with all their captions. They lie in `image_root`, in COCO's folders (val2014/...) or
    side by side.

    Raises:
        UserError: no such split, wrong fields, pictures that are not there.
    """
    root = Path(image_root) if image_root else Path(source).parent
    pictures, captions, owners, splits = [], [], [], set()
    for number, row in enumerate(rows, 1):
        try:
            name, sentences = row["filename"], [sentence["raw"] for sentence in row["sentences"]]
            splits.add(row["split"])
        except (KeyError, TypeError):
            raise UserError(f"{source}, picture {number}: Karpathy's files have filename, split and sentences (each "
                            f"with raw), found: {', '.join(row) if isinstance(row, dict) else row}") from None
        if split not in ("all", row["split"]):
            continue
        nested = root / row.get("filepath", "") / name
        captions += sentences
        owners += [len(pictures)] * len(sentences)
        pictures.append(str(nested if nested.is_file() or not (root / name).is_file() else root / name))
    if not pictures:
        raise UserError(f"{source}: no pictures of the split '{split}' (found: {', '.join(sorted(splits))}, or all)")
    check_there(pictures, source)
    return Retrieval(items_of(pictures), captions, owners)


def retrieval_of(samples: Samples) -> Retrieval:
    """Indexed samples; those of one picture are put together."""
    numbers: dict[str, int] = {}
    pictures, captions, owners = [], [], []
    for number in range(len(samples)):
        row = samples.record(number)
        where = row["image"]
        owner = numbers.setdefault(json.dumps(where), len(pictures))
        if owner == len(pictures):
            pictures.append(where)
        captions.append(row["caption"])
        owners.append(owner)
    return Retrieval(items_of(pictures), captions, owners)


# --- hard captions -------------------------------------------------------------------------------------------------


def load_hard_captions(source: str, image_root: str | None) -> HardCaptions:
    """Hard captions in any of the layouts of docs/evaluation.md; which one it is shows in the file itself.

    Raises:
        UserError: a row lacks a field (names file, row and the fields found), pictures are not there.
    """
    data = Path(source)
    files = sorted(data.glob("*.json")) if data.is_dir() else [data]
    if not files:
        raise UserError(f"{data}: no .json files (SugarCrepe has one for each category)")
    root = Path(image_root) if image_root else (data if data.is_dir() else data.parent)
    rows = [row for file in files for row in read_hard_file(file)]
    numbers: dict[tuple[str, tuple | None], int] = {}
    for row in rows:
        row["picture"] = numbers.setdefault((str(root / row["image"]), row.pop("box")), len(numbers))
    check_there(list(dict.fromkeys(path for path, _ in numbers)), source)
    return HardCaptions(items_of(list(numbers)), rows)


def read_hard_file(file: Path) -> list[dict]:
    """Rows of one file with id, image, true, false (a list), kind and box."""
    values = read_jsonl(file) if file.suffix == ".jsonl" else read_json(file)
    if isinstance(values, dict):  # SugarCrepe
        values = [{"id": key, **row} if isinstance(row, dict) else row for key, row in values.items()]
    if not isinstance(values, list) or not values:
        raise UserError(f"{file} holds no hard captions")
    rows = []
    for number, row in enumerate(values, 1):
        if not isinstance(row, dict):
            raise UserError(f"{file}, row {number}: expected an object, found {row!r:.60}")
        image = first_of(row, "image", "filename", "image_path")
        options = row.get("caption_options")  # ARO's order sets, the true one first
        true, false = (options[0], options[1:]) if isinstance(options, list) and len(options) > 1 else (
            first_of(row, "true", "caption", "true_caption"),
            first_of(row, "false", "negative_caption", "false_caption"))
        false = [false] if isinstance(false, str) else false
        kind = first_of(row, "kind", "relation_name", "attributes")
        if file.suffix != ".jsonl":
            kind = kind or file.stem
        kind = "_".join(map(str, kind)) if isinstance(kind, list) else kind
        missing = [name for name, value in (("image", image), ("true", true), ("kind", kind))
                   if not isinstance(value, str)]
        if not isinstance(false, list) or not false or not all(isinstance(text, str) for text in false):
            missing.append("false")
        if missing:
            raise UserError(f"{file}, row {number}: no text in '{missing[0]}' (found: {', '.join(row)}); hard captions "
                            "have image, true, false and kind (or the fields of SugarCrepe or ARO)")
        corner = [row.get(f"bbox_{side}") for side in "xywh"]
        box = None
        if any(value is not None for value in corner):
            if not all(isinstance(value, int | float) for value in corner):
                raise UserError(f"{file}, row {number}: a box has the numbers bbox_x, bbox_y, bbox_w and bbox_h, found "
                                f"{corner}")
            x, y, width, height = corner
            box = (x, y, x + width, y + height)
        rows.append({"id": row.get("id", number), "image": image, "true": true, "false": false, "kind": kind,
                     "box": box})
    return rows


def first_of(row: dict, *names: str) -> Any:
    """The first of these fields that the row has."""
    return next((row[name] for name in names if name in row), None)
