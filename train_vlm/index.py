"""Where the samples of a source lie: read and checked once, as a stream, into a small file that all processes map.

LLaVA's data is one list in one JSON file, often of gigabytes. No more than one sample of it is in memory at a time;
later each is read by its place in that same file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from clipmoe_vlm.chat_templates import IMAGE_TOKEN
from clipmoe_vlm.runs import UserError, atomic_write, progress, write_json
from train_vlm.chat import ROLES

# Of each sample: its place in a JSON file (bytes), its words (negative without a picture), its checksum, and what tells
# whether two samples have the same words and pictures.
ROW = np.dtype([("start", "<i8"), ("size", "<i4"), ("words", "<i4"), ("checksum", "<u4"), ("content", "<u8")])
PACKED = struct.Struct("<qiiIQ")  # the same
CHUNK = 1 << 20  # characters
LONGEST = 1 << 26  # characters; what is no whole sample by then is no sample
_SPACE = re.compile(r"[ \t\n\r]*")


def build_index(source: str, image_folder: str, index: Path) -> None:
    """Reads `source`, a JSON list or a folder of `datasets`, into `index` unless it is there.

    Raises:
        UserError: no such source or not of LLaVA's form; samples that can't be used (how many; the first three by
            number and id); or the source changed since the index was made, so that sample numbers no longer hold.
    """
    state, stamp = _state(Path(source)), index.with_suffix(".source.json")
    known = None
    if index.is_file() and stamp.is_file():
        if json.loads(stamp.read_text(encoding="utf-8")) == state:
            return
        known = np.load(index)
    rows = _read(source, image_folder)
    if known is None:
        with atomic_write(index, "wb") as stream:
            np.save(stream, rows)
    elif not np.array_equal(known, rows):
        raise UserError(f"data: {source} changed since {index.parent.parent} was begun; bring the old one back, or use "
                        "another output_dir for the new data")
    write_json(stamp, state)


def _state(path: Path) -> list[list]:
    """Names, sizes and times of a source's files: what changes when it does."""
    try:
        files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
        return [[file.name, (status := file.stat()).st_size, status.st_mtime_ns] for file in files]
    except FileNotFoundError:
        raise UserError(f"data: {path}: no such file") from None


def _read(source: str, image_folder: str) -> np.ndarray:
    """The `ROW` of each sample; raises as `build_index`."""
    rows, paths, bad, first = bytearray(), [], 0, []
    elements = datasets_rows(source) if Path(source).is_dir() else json_list(source)
    for number, (start, raw, sample) in enumerate(progress(elements, description=f"reading {source}")):
        problem = problem_of(sample, image_folder)
        if problem:
            bad += 1
            if bad <= 3:
                name = f" (id {sample['id']!r})" if isinstance(sample, dict) and "id" in sample else ""
                first.append(f"sample {number}{name} {problem}")
            continue
        pictures = pictures_of(sample)
        if len(paths) < 100:
            paths += filter(None, map(path_of, pictures))
        words = max(1, sum(len(turn["value"].split()) for turn in sample["conversations"]))
        rows += PACKED.pack(start, len(raw), words if pictures else -words, zlib.crc32(raw),
                            _content(sample, image_folder))
    if bad:
        raise UserError(f"data: {source}: {'; '.join(first)}" + (f"; and {bad - 3} more samples" if bad > 3 else ""))
    if not rows:
        raise UserError(f"data: {source} holds no samples")
    if paths and not any(os.path.exists(os.path.join(image_folder, path)) for path in paths):
        raise UserError(f"data: {source}: there is no picture {os.path.join(image_folder, paths[0])}, nor any of the "
                        f"first {len(paths)}; set image_folder to the folder that the paths start from")
    return np.frombuffer(rows, ROW)


# --- readers -------------------------------------------------------------------------------------------------------


def json_list(source: str) -> Iterator[tuple[int, bytes, Any]]:
    """The elements of the list in a JSON file: the byte where each begins, its bytes and its value.

    Raises:
        UserError: no such list, or not valid JSON (says behind which sample and in which line).
    """
    try:
        with open(source, encoding="utf-8", newline="") as stream:  # line breaks stay as they are: places hold
            yield from _elements(stream)
    except UnicodeDecodeError as error:
        raise UserError(f"data: {source} is not in UTF-8 ({error})") from error
    except ValueError as error:
        raise UserError(f"data: {source} {error}") from error


def _elements(stream: TextIO) -> Iterator[tuple[int, bytes, Any]]:
    """Raises ValueError: what is wrong and where."""
    parse = json.JSONDecoder().raw_decode
    text, at = "", 0  # what is read of the file, and how far it is done
    number, place, line = 0, 0, 1  # samples before text[at], the byte where it stands, its line
    while True:
        try:
            mark = _SPACE.match(text, at).end()
            if text[mark] == "]" and number:
                break
            if text[mark] != "[" and not number:
                raise ValueError(f"must hold a list of samples, found {text[mark:mark + 20]!r}")
            begin = _SPACE.match(text, mark + 1).end()
            if text[begin] == "]" and not number:
                mark = begin
                break
            value, end = parse(text, begin)
            if text[_SPACE.match(text, end).end()] not in ",]":  # or it is a number that goes on
                raise json.JSONDecodeError("no comma behind it", text, end)
        except (IndexError, json.JSONDecodeError) as error:  # wrong, or not yet read to its end
            more = stream.read(max(CHUNK, len(text) - at)) if len(text) - at < LONGEST else ""
            if not more:
                line += text.count("\n", at, getattr(error, "pos", None))
                what = getattr(error, "msg", "the list has no end")
                raise ValueError(f"is not valid JSON: {what} (line {line}, sample {number})") from error
            text, at = text[at:] + more, 0
            continue
        raw = text[begin:end].encode()
        yield place + begin - at, raw, value  # all before text[begin] is of one byte each
        place, line = place + begin - at + len(raw), line + text.count("\n", at, end)
        number, at = number + 1, end
    if (text[mark + 1:] + stream.read(CHUNK)).strip():
        raise ValueError(f"is not valid JSON: it goes on behind the list's end (line {line})")


def open_datasets(source: str) -> Any:
    """The memory-mapped data set in a folder, as Arrow: pictures stay as they are stored.

    Raises:
        UserError: no such folder, several splits, or no column `conversations`.
    """
    import datasets

    try:
        samples = datasets.load_from_disk(source)
    except FileNotFoundError as error:
        raise UserError(f"data: {source} is a folder, but not one that `datasets` wrote: {error}") from error
    if not isinstance(samples, datasets.Dataset):
        raise UserError(f"data: {source} holds several splits; name one of {', '.join(samples)} as {source}/NAME")
    if "conversations" not in samples.column_names:
        raise UserError(f"data: {source} has no column 'conversations' (it has {', '.join(samples.column_names)})")
    names = [name for name in ("id", "image", "conversations") if name in samples.column_names]
    return samples.select_columns(names).with_format("arrow")


def datasets_rows(source: str) -> Iterator[tuple[int, bytes, Any]]:
    """The rows of a `datasets` folder in the form of `json_list`, without their pictures, whose bytes are not read."""
    for table in open_datasets(source).iter(1000):
        for batch in table.to_batches():
            names = batch.schema.names
            columns = [_without_bytes(column) if name == "image" else column.to_pylist()
                       for name, column in zip(names, batch.columns, strict=True)]
            for values in zip(*columns, strict=True):
                sample = dict(zip(names, values, strict=True))
                yield 0, json.dumps(sample, ensure_ascii=False, default=str).encode(), sample


def _without_bytes(column: Any) -> list:
    """`to_pylist` of an Arrow column of pictures, with True in place of their bytes."""
    from pyarrow import types

    if types.is_list(column.type) or types.is_large_list(column.type):
        values, ends = _without_bytes(column.values), column.offsets.to_pylist()
        return [values[start:end] if there else None
                for start, end, there in zip(ends, ends[1:], column.is_valid().to_pylist(), strict=False)]
    if types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        stored, paths = column.field("bytes").is_valid().to_pylist(), column.field("path").to_pylist()
        return [{"bytes": true, "path": path} if there else None
                for there, true, path in zip(column.is_valid().to_pylist(), stored, paths, strict=True)]
    return column.to_pylist()


def _content(sample: dict[str, Any], image_folder: str) -> int:
    """64 bits of a hash. Pictures that are stored in the data itself count as the same."""
    paths = [os.path.abspath(os.path.join(image_folder, path)) if (path := path_of(picture)) else ""
             for picture in pictures_of(sample)]
    words = [turn["value"] for turn in sample["conversations"]]
    return int.from_bytes(hashlib.blake2b(json.dumps([paths, words]).encode(), digest_size=8).digest(), "little")


# --- a sample ------------------------------------------------------------------------------------------------------


def problem_of(sample: Any, image_folder: str) -> str | None:
    """What is wrong with the form of a sample, to be read behind its name."""
    if not isinstance(sample, dict):
        return "is no object with 'conversations'"
    turns = sample.get("conversations")
    if not isinstance(turns, list) or not turns:
        return "has no 'conversations'; each sample needs a list of {from, value}"
    marks = 0
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("from") not in ROLES or not isinstance(turn.get("value"), str):
            return f"has a turn {str(turn)[:80]}; each must be {{from: human or gpt, value: text}}"
        marks += turn["value"].count(IMAGE_TOKEN)
    pictures = pictures_of(sample)
    if marks != len(pictures):
        return (f"has {len(pictures)} picture(s) but {marks} {IMAGE_TOKEN} mark(s) in its conversations; write one "
                "mark per picture")
    root = os.path.join(os.path.abspath(image_folder), "")
    for picture in pictures:
        if isinstance(picture, dict) and picture.get("bytes"):
            continue
        path = path_of(picture)
        if not isinstance(path, str) or not path:
            return f"has a picture {str(picture)[:80]!r}; a picture is a path, several are a list of paths"
        if not os.path.abspath(os.path.join(root, path)).startswith(root):
            return f"has a picture outside image_folder {image_folder}: {path}; set it to a folder that holds them all"
    return None


def pictures_of(sample: dict[str, Any]) -> list[Any]:
    """The sample's pictures: paths, or `{"bytes": ..., "path": ...}` from `datasets`."""
    image = sample.get("image")
    if image is None or image == "" or image == []:
        return []
    return list(image) if isinstance(image, (list, tuple)) else [image]


def path_of(picture: Any) -> Any:
    """The path of a picture that is not stored in the data itself."""
    if isinstance(picture, dict):
        return None if picture.get("bytes") else picture.get("path")
    return picture
