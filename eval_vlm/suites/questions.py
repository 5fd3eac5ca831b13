"""Reads question files: JSON, JSON lines, TSV, and `datasets` folders or hub names with lmms-lab's columns.

Pictures that lie inside (parquet, TSV) are written into the suite's picture folder, each under a name made from its
content, so that generation finds files as it does everywhere else.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from clipmoe_vlm.runs import UserError, read_jsonl
from eval_vlm.suites.vqa import MISSING_WORDS

FILES = (".json", ".jsonl", ".tsv")
SAVED = ("dataset_info.json", "dataset_dict.json")  # `datasets.save_to_disk` writes one of them
# What these fields hold in every benchmark that has them.
KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("question", "text", "imagename", "image_path", "question_type", "data_type", "data_id", "category",
                     "l2_category"), (str,)),
    **dict.fromkeys(("question_id", "image_id", "imageId", "index", "question_type_id"), (str, int)),
    **dict.fromkeys(("image", "hint", "answer_type"), (str, type(None))),
    **dict.fromkeys(("choices", "semantic", "ocr_tokens"), (list,)), **dict.fromkeys(("types", "groups"), (dict,)),
    "answers": (list, dict, str, type(None)), "capability": (list, str)}
ENDINGS = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif"}


def is_dataset(source: str | Path) -> bool:
    """A folder, or the name of one on the hub; else `source` is a file."""
    return Path(source).is_dir() or (not Path(source).exists() and Path(source).suffix not in FILES and
                                     re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) is not None)


def holds_dataset(source: str | Path) -> bool:
    """Whether `source`, a folder of files as a rule, is a dataset after all."""
    folder = Path(source)
    if not folder.is_dir():
        return is_dataset(source)
    return any((folder / name).is_file() for name in SAVED) or any(folder.rglob("*.parquet"))


def read_json(file: str | Path) -> Any:
    """Raises:
        UserError: no such file, not JSON, or an object with one name twice (of which JSON keeps the last).
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            double = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{file}: question {double} is there twice; number them anew")
        return content

    try:
        return json.loads(Path(file).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid JSON ({error})") from error


def hash_files(*files: str | Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def read_rows(source: str | Path, fields: Iterable[str], image_folder: str = "", split: str = "", subset: str = ""
              ) -> tuple[list[dict], str]:
    """All rows of a question file or dataset, and the sha256 of the file (of a dataset: of its rows without pictures).

    Args:
        fields: the columns that every row must have.
        image_folder: where pictures inside `source` are written; the row's `image` is then the file's name. With ""
            nothing is written.
        split, subset: of a dataset.

    Raises:
        UserError: no such file, dataset, split or field; broken content.
    """
    if is_dataset(source):
        rows, digest = [], hashlib.sha256()
        for row in dataset_rows(str(source), split, subset):
            picture = row.pop("image", None)
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
            if picture is not None:
                row["image"] = _stored(picture, image_folder, f"{source}, row {len(rows) + 1}")
            rows.append(row)
        sha256 = digest.hexdigest()
    else:
        if not Path(source).is_file():
            raise UserError(f"{source}: no such file; name the question file or a `datasets` folder")
        if Path(source).suffix == ".tsv":
            rows = _tsv_rows(Path(source), image_folder)
        else:
            rows = read_json(source) if Path(source).suffix == ".json" else read_jsonl(source)
        sha256 = hash_files(source)
    check_fields(rows, fields, source)
    return rows, sha256


def check_fields(rows: Any, fields: Iterable[str], source: str | Path) -> None:
    """Raises:
        UserError: no list of rows, one that lacks a field, or a field of another kind than its benchmark has there.
    """
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{source} holds no questions; name the benchmark's question file")
    for number, row in enumerate(rows, 1):
        absent = [field for field in fields if not isinstance(row, dict) or field not in row]
        if absent:
            raise UserError(f"{source}, row {number}: no field {', '.join(absent)}; name the benchmark's question file")
        for field, value in row.items():
            if field in KINDS and (not isinstance(value, KINDS[field]) or isinstance(value, bool)):
                raise UserError(f"{source}, row {number}: {field} is {str(value)[:60]!r}, which it never is in this "
                                "benchmark; get the file again")


def dataset_rows(source: str, split: str, subset: str) -> Iterator[dict]:
    """Rows as plain Python values; pictures stay undecoded `{"bytes", "path"}`."""
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in SAVED):
        import pyarrow.parquet

        files = sorted((folder / subset if (folder / subset).is_dir() else folder).rglob("*.parquet"))
        if not files:
            raise UserError(f"{folder} is no `datasets` folder (neither dataset_info.json nor parquet files); name the "
                            "question file or such a folder")
        names = {file.name.split("-")[0].removesuffix(".parquet") for file in files}
        chosen = [file for file in files if file.name.split("-")[0].removesuffix(".parquet") == split]
        if not chosen and len(names) > 1:
            raise UserError(f"{folder} has no split '{split}', only {', '.join(sorted(names))}; set the suite's split")
        for file in chosen or files:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(64):
                yield from batch.to_pylist()
        return
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source}: reading a dataset needs the package datasets (pip install datasets)") from None
    try:
        data = datasets.load_from_disk(source) if folder.is_dir() else datasets.load_dataset(source, subset or None)
    except Exception as error:  # each kind of failure has a class of its own there
        raise UserError(f"{source}: no file or folder that can be read, and no dataset of the hub that can be loaded "
                        f"({str(error).splitlines()[0]}); name the question file or the dataset's folder") from error
    if isinstance(data, dict):
        if split not in data and len(data) > 1:
            raise UserError(f"{source} has no split '{split}', only {', '.join(data)}; set the suite's split")
        data = data[split] if split in data else next(iter(data.values()))
    for table in data.with_format("arrow").iter(64):
        yield from table.to_pylist()


def _tsv_rows(file: Path, image_folder: str) -> list[dict]:
    """Rows of OpenCompass's TSV: empty cells and pandas' words for them are None, `image` is base64 or another row's
    index."""
    usual = csv.field_size_limit(2**31 - 1)  # cells hold pictures
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            rows = [{key: None if value in MISSING_WORDS else value for key, value in row.items() if key is not None}
                    for row in csv.DictReader(stream, delimiter="\t")]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} is no TSV file ({error}); get the file again") from error
    finally:
        csv.field_size_limit(usual)
    names: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        cell = row.get("image")
        if cell is not None and cell not in names:
            try:
                names[cell] = _stored({"bytes": base64.b64decode(cell, validate=True)}, image_folder, "") \
                    if len(cell) > 32 else cell
            except binascii.Error as error:
                raise UserError(f"{file}, row {number}: the picture is not base64 ({error}); get the file "
                                "again") from error
        if cell is not None:
            row["image"] = names[cell]
    pictures = {row.get("index"): row.get("image") for row in rows}
    for row in rows:
        if row.get("image") is not None and row["image"] in pictures:
            row["image"] = pictures[row["image"]]
    return rows


def _stored(picture: Any, folder: str, where: str) -> str:
    """The name of a picture in `folder`, where it is written unless it is there."""
    if isinstance(picture, str):
        return picture
    if isinstance(picture, list):  # SEED-Bench: one picture, or the frames of a video
        picture = picture[0]
    data = picture.get("bytes")
    if data is None:
        raise UserError(f"{where}: the picture {picture.get('path')} is not in the dataset; save it with its pictures")
    return store(data, folder)


def store(data: bytes, folder: str, name: str = "") -> str:
    """Writes a picture under `name` (default: from its content), whole or not at all; "" writes nothing."""
    name = name or hashlib.sha256(data).hexdigest()[:16] + ENDINGS.get(data[:4], ENDINGS.get(data[:3], ""))
    if folder and not (Path(folder) / name).is_file():
        Path(folder).mkdir(parents=True, exist_ok=True)
        temporary = Path(folder) / f".{name}.{os.getpid()}"  # several processes may write the same picture
        temporary.write_bytes(data)
        os.replace(temporary, Path(folder) / name)
    return name


def first_pictures(rows: list[dict], limit: int | None) -> list[dict]:
    """All questions of the first pictures that hold at least `limit` questions together."""
    if limit is None:
        return rows
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["image"]] = counts.get(row["image"], 0) + 1
    chosen, total = set(), 0
    for picture, count in counts.items():
        if total >= limit:
            break
        chosen.add(picture)
        total += count
    return [row for row in rows if row["image"] in chosen]


def check_records(records: list[dict], where: str | Path) -> None:
    """Raises:
        UserError: two records with one id, one without a picture, or some with annotators' answers and some without.
    """
    seen: set[str] = set()
    answered = any(record.get("answers") for record in records)
    for record in records:
        question = f"{where}: question {record['id']}"
        if record["id"] in seen:
            raise UserError(f"{question} is there twice; number them anew")
        if not record["image"] and record.get("has_image", True):
            raise UserError(f"{question} has no picture; name one or leave the question out")
        if answered and not record.get("answers"):
            raise UserError(f"{question} has no answers, others have; get the file again")
        seen.add(record["id"])


def option_letter(label: Any, count: int, where: str) -> str | None:
    """The right choice as a letter; None stays None (a test split).

    Raises:
        UserError: it is none of the first `count` letters.
    """
    if label is None:
        return None
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:count]
    if not isinstance(label, str) or len(label.strip()) != 1 or label.strip() not in letters:
        raise UserError(f"{where}: the label must be one of {', '.join(letters)}, found {label!r}; correct it")
    return label.strip()


def with_options(question: str, choices: dict[str, str]) -> str:
    """LLaVA's way to list the choices: one a line, `A. text`."""
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in choices.items())])
