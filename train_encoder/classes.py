"""Classification from folders of pictures by class and from `datasets` folders, with names and prompt templates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import datasets
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from timm.data import ImageNetInfo

from clipmoe_vlm.runs import UserError

from .sources import PICTURES
from .tasks import TaskConfig, items_of, read_json
from .zero_shot import Classification


def load_classification(config: TaskConfig) -> Classification:
    """Pictures in class folders, or a `datasets` folder (of save_to_disk, or of parquet files as the hub has them).

    Raises:
        UserError: a class without pictures, no such split or column, names that do not fit the classes.
    """
    folder = Path(config.data)
    if not folder.is_dir():
        raise UserError(f"{folder}: classification needs a folder: class folders of pictures, or a `datasets` folder")
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file() or any(folder.rglob("*.parquet")):
        pictures, labels, keys = read_dataset(config)
    else:
        pictures, labels = [], []
        keys = sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
        for number, key in enumerate(keys):
            found = sorted(str(file) for file in (folder / key).rglob("*") if file.suffix[1:].lower() in PICTURES)
            if not found:
                raise UserError(f"{folder / key}: a class folder without pictures; remove it or fill it")
            pictures += found
            labels += [number] * len(found)
    if len(keys) < 2:
        raise UserError(f"{folder}: classification needs two classes at least (class folders, or labels); found "
                        f"{', '.join(keys) or 'none'}")
    return Classification(items_of(pictures), labels, class_names(config, keys), read_templates(config.templates))


class DatasetPictures(Sequence):
    """The pictures of a `datasets` column, not decoded: each as a path or as a file's content."""

    def __init__(self, dataset: datasets.Dataset, column: str):
        self.dataset = dataset.select_columns(column).cast_column(column, datasets.Image(decode=False))
        self.column = column

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> str | bytes:
        cell = self.dataset[number][self.column]
        return cell["bytes"] or cell["path"]


def read_dataset(config: TaskConfig) -> tuple[DatasetPictures, list[int], list[str]]:
    """Pictures, labels and the labels' names (numbers as text, if they have no names)."""
    folder = Path(config.data)
    datasets.disable_progress_bars()
    try:
        if any(folder.rglob("*.parquet")):
            found = datasets.load_dataset(str(folder))
        else:
            found = datasets.load_from_disk(str(folder))
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{folder} is no readable `datasets` folder ({' '.join(str(error).split())[:200]})") from error
    if isinstance(found, datasets.DatasetDict):
        split = config.split or (next(iter(found)) if len(found) == 1 else None)
        if split not in found:
            raise UserError(f"{folder} has the splits {', '.join(found)}; set split to one of them")
        found = found[split]
    for key in ("image_column", "label_column"):
        if getattr(config, key) not in found.column_names:
            raise UserError(f"{folder}: there is no column '{getattr(config, key)}' (found: "
                            f"{', '.join(found.column_names)}); set {key}")
    labels, feature = found[config.label_column][:], found.features[config.label_column]
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        raise UserError(f"{folder}: labels are whole numbers from 0 on, but column '{config.label_column}' holds "
                        f"{next(label for label in labels if not isinstance(label, int) or label < 0)!r}")
    keys = feature.names if isinstance(feature, datasets.ClassLabel) else [str(n) for n in range(max(labels) + 1)]
    return DatasetPictures(found, config.image_column), labels, keys


def class_names(config: TaskConfig, keys: list[str]) -> list[str]:
    """What the prompts call each class. `keys`: folder names, or the names of the labels.

    Raises:
        UserError: names that do not fit.
    """
    if config.classes is None:
        if all(key.isdecimal() for key in keys):
            raise UserError(f"{config.data}: its classes are only numbered; set classes to a file of their names")
        return [key.replace("_", " ") for key in keys]
    if config.classes == "imagenet":
        by_id = dict(zip(ImageNetInfo("imagenet-1k").label_names(), IMAGENET_CLASSNAMES, strict=True))
        if all(key in by_id for key in keys):
            return [by_id[key] for key in keys]
        if len(keys) == len(IMAGENET_CLASSNAMES) and not any(re.fullmatch(r"n\d{8}", key) for key in keys):
            return IMAGENET_CLASSNAMES  # labels with names of their own: in ImageNet's order
        raise UserError(f"{config.data}: classes: imagenet needs ImageNet's ids as class names (n01440764, ...) or all "
                        f"1000 labels, found {next(key for key in keys if key not in by_id)}")
    file = Path(config.classes)
    if file.suffix == ".json":
        names = read_json(file)
        missing = [key for key in keys if not isinstance(names, dict) or not isinstance(names.get(key), str)]
        if missing:
            raise UserError(f"{file} has no name for {len(missing)} of the {len(keys)} classes of {config.data}, the "
                            f"first is {missing[0]}; it must hold an object of class: name")
        return [names[key] for key in keys]
    names = read_lines(file)
    if len(names) != len(keys):
        raise UserError(f"{file} has {len(names)} names, but {config.data} has {len(keys)} classes; one line each, in "
                        f"the order {', '.join(keys[:3])}, ..., or a .json file of class: name")
    return names


def read_templates(source: str) -> list[str]:
    """Templates with {} in the name's place; clip-benchmark's {c} is taken too.

    Raises:
        UserError: a line without a place for the name.
    """
    if source == "imagenet":
        return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    templates = [template.replace("{c}", "{}") for template in read_lines(Path(source))]
    for number, template in enumerate(templates, 1):
        if "{}" not in template:
            raise UserError(f"{source}, line {number}: a template needs {{}} where the class's name goes, found "
                            f"{template!r}")
    return templates


def read_lines(file: Path) -> list[str]:
    """The lines that are not empty.

    Raises:
        UserError: no such file, or none.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{file} is empty")
    return lines
