"""Training data of any supported layout -> one index: a JSON line per sample, `{"id", "image", "caption"}`.

Batches of one cluster need random access, which a stream of shards does not give. So a source is read once, from its
beginning to its end and without holding more than a shard of it, into an index: where each picture lies (a path, or
[file, offset, size] inside a tar or Arrow file) and its caption. The index also pins the sample numbers that clusters
and checkpoints refer to. docs/data.md shows an example of each layout.
"""

from __future__ import annotations

import csv
import glob
import itertools
import json
import os
import tarfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ijson
import numpy as np
from braceexpand import UnbalancedBracesError, braceexpand

from clipmoe_vlm.runs import UserError, atomic_write, iterate_jsonl, progress, write_json

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
FIRST_SENTENCE = "first_sentence"  # the value of short_captions that names no column


@dataclass
class Found:
    """What a reader found under one key; `problem` says why it is no sample, where the rest does not."""

    id: str
    image: str | list | None  # path, or [file, offset, size]
    texts: list[Any]  # the wanted columns: text, a list of texts, a LLaVA conversation, or None
    names: Iterable[str]  # columns, or endings and JSON fields, that there are
    problem: str | None = None


def captions_of(value: Any) -> list[str]:
    """The captions in a column: one, a list, or the first answer of a LLaVA conversation; empty ones are dropped."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = [turn.get("value") for turn in value if turn.get("from") == "gpt"][:1]
    values = value if isinstance(value, list) else [value]
    return [text for one in values if one is not None and (text := str(one).strip())]


def first_sentence(caption: str) -> str:
    """Long-CLIP's short caption (train/sharegpt4v.py of its code): all before the first period that a space follows."""
    return " ".join(caption.split()).split(". ")[0]


# --- readers -------------------------------------------------------------------------------------------------------


def read_captions(file: str, image_column: str, columns: list[str], root: str | None) -> Iterator[Found]:
    """Rows of a .csv, .tsv, .jsonl or .json file. Relative paths start at `root`, or beside the file.

    CSV and TSV need a header line; a tab in it makes the file tab-separated whatever its ending (open_clip writes
    such .csv files). A .json file holds a list of objects (ShareGPT4V's is over 1 GB, so it is read as a stream).

    Raises:
        UserError: the file is of another kind or not what its ending says.
    """
    base = Path(root) if root else Path(file).parent
    suffix = Path(file).suffix
    try:
        with open(file, "rb") as stream:
            if suffix == ".jsonl":
                rows = iterate_jsonl(file)
            elif suffix == ".json":
                rows = ijson.items(stream, "item", use_float=True)
            elif suffix in (".csv", ".tsv"):
                lines = (line.decode("utf-8-sig" if number == 0 else "utf-8") for number, line in enumerate(stream))
                header = next(lines, "")
                rows = csv.DictReader(itertools.chain([header], lines),
                                      delimiter="\t" if "\t" in header or suffix == ".tsv" else ",")
            else:
                raise UserError(f"{file}: a captions file ends in .csv, .tsv, .jsonl or .json")
            for row in rows:
                if not isinstance(row, dict):
                    raise UserError(f"{file} holds no objects with '{image_column}' and '{columns[0]}' but "
                                    f"{str(row)[:60]!r}")
                image = row.get(image_column)
                image = image if isinstance(image, str) and image else None
                yield Found(_id(row, image), image and str(base / image), [row.get(column) for column in columns],
                            [str(name) for name in row if name is not None])
    except (ijson.JSONError, csv.Error, UnicodeDecodeError) as error:
        hint = "; JSON lines are named .jsonl" if suffix == ".json" else ""
        what = " ".join(str(error).split())
        raise UserError(f"{file}: not valid {suffix[1:].upper()} in UTF-8 ({what}){hint}") from error


def read_shards(shards: list[str], columns: list[str]) -> Iterator[Found]:
    """Samples of webdataset's tar files: headers and captions are read, pictures passed over.

    Raises:
        UserError: a shard is compressed or torn.
    """
    parent = os.path.commonpath([os.path.dirname(os.path.abspath(shard)) for shard in shards])
    for shard in shards:
        try:
            with open(shard, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:

                def read(where: list, stream=stream) -> bytes:
                    stream.seek(where[1])
                    return stream.read(where[2])

                members = ((member.name, [shard, member.offset_data, member.size])
                           for member in archive if member.isfile())
                yield from _grouped(members, os.path.relpath(shard, parent).removesuffix(".tar"), columns, read)
        except tarfile.TarError as error:
            raise UserError(f"{shard} is no plain tar file, or torn ({error}); unpack it, or fetch it again") from error


def read_folder(folder: str, columns: list[str]) -> Iterator[Found]:
    """Pictures in `folder` and below, each with files of the same name that hold its caption (img2dataset's `files`).

    A folder without pictures holds something else (img2dataset puts its statistics into one) and is passed over.
    """
    for directory, subfolders, names in os.walk(folder):
        subfolders.sort()
        if any(name.lower().endswith(PICTURES) for name in names):
            members = ((name, os.path.join(directory, name)) for name in sorted(names))
            within = os.path.relpath(directory, folder)
            yield from _grouped(members, "" if within == "." else within, columns, lambda path: Path(path).read_bytes())


def _grouped(members: Iterable[tuple[str, Any]], prefix: str, columns: list[str],
             read: Callable[[Any], bytes]) -> Iterator[Found]:
    """Members with one name up to the first dot are one sample, as in webdataset.

    The column `caption` is the member `.txt`; any other is the member of that ending. Where there is none, it is the
    field of that name in the member `.json`.
    """
    samples: dict[str, dict[str, Any]] = {}
    twice: set[str] = set()
    for path, where in members:
        folder, _, name = path.rpartition("/")
        key, _, ending = name.partition(".")
        if not key:  # a hidden file
            continue
        key = f"{folder}/{key}" if folder else key
        if samples.setdefault(key, {}).setdefault(ending.lower(), where) is not where:
            twice.add(key)
    for key, parts in samples.items():
        picture = next((parts[ending] for ending in PICTURES if ending in parts), None)
        texts, fields = [], None
        for column in columns:
            ending = "txt" if column == "caption" else column
            if ending in parts:
                texts.append(read(parts[ending]).decode("utf-8", "replace"))
                continue
            if fields is None:
                fields = _json_fields(read(parts["json"])) if "json" in parts else {}
            texts.append(fields.get(column))
        name = f"{prefix}/{key}" if prefix else key
        yield Found(name, picture, texts, [*parts, *(fields or ())])
        if key in twice:
            yield Found(name, None, [], [], problem="with a key used before")


def _json_fields(data: bytes) -> dict:
    try:
        fields = json.loads(data)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def read_arrow(files: list[str], image_column: str, columns: list[str], root: str) -> Iterator[Found]:
    """Rows of the Arrow files of a `datasets` folder; relative picture paths start at `root`.

    `datasets` does not compress: a picture's bytes lie in one piece in the file, and are read from there without it.

    Raises:
        UserError: the files are compressed after all, or pictures are stored in another way.
    """
    import pyarrow

    count = itertools.count()
    for file in files:
        with pyarrow.memory_map(file) as mapped:
            whole = mapped.read_buffer()
            mapped.seek(0)
            for batch in pyarrow.ipc.open_stream(mapped):
                names = batch.schema.names
                images: list = [None] * batch.num_rows
                if image_column in names:
                    images = _picture_places(batch.column(image_column), file, whole, Path(root))
                wanted = {name: batch.column(name).to_pylist() for name in {"id", "key", *columns} if name in names}
                for row, image in enumerate(images):
                    values = {name: column[row] for name, column in wanted.items()}
                    yield Found(_id(values, str(next(count))), image, [values.get(column) for column in columns], names)


def _picture_places(column, file: str, whole, root: Path) -> list[str | list | None]:
    """Where each picture of an Arrow column lies: its path, [file, offset, size], or None."""
    from pyarrow import types

    paths: list[str | None] = [None] * len(column)
    if types.is_struct(column.type):  # datasets.Image
        paths, column = column.field("path").to_pylist(), column.field("bytes")
    if types.is_string(column.type) or types.is_large_string(column.type):
        paths = column.to_pylist()
    elif types.is_binary(column.type) or types.is_large_binary(column.type):
        _, offsets, data = column.buffers()
        ends = np.frombuffer(offsets, np.int64 if types.is_large_binary(column.type) else np.int32)
        ends = ends[column.offset:column.offset + len(column) + 1] + (data.address - whole.address if data else 0)
        if data and not 0 <= ends[0] <= ends[-1] <= whole.size:
            raise UserError(f"{file} is compressed; write the data set again with save_to_disk of `datasets`")
        return [[file, int(start), int(end - start)] if there else path and str(root / path) for start, end, there, path
                in zip(ends, ends[1:], column.is_valid().to_pylist(), paths, strict=False)]
    elif not types.is_null(column.type):
        raise UserError(f"{file}: pictures are stored as bytes, as a path or as `datasets` Image, not as {column.type}")
    return [path and str(root / path) for path in paths]


def _id(row: dict, default: str | None) -> str:
    return next((str(row[key]) for key in ("id", "key") if row.get(key) is not None), str(default))


# --- the index -----------------------------------------------------------------------------------------------------


def find_files(source: str) -> tuple[str, list[str]]:
    """What kind of source this is (captions, tar, parquet, datasets or pictures), and the files that make it up.

    Raises:
        UserError: no such files, or files of several kinds.
    """
    if Path(source).is_dir():
        names = sorted(entry.name for entry in os.scandir(source))
        files = [os.path.join(source, name) for name in names]
        tars = [file for file in files if file.endswith(".tar")]
        # img2dataset writes a parquet file with a report beside each folder of pictures.
        parquets = [f for f in files if f.endswith(".parquet") and not Path(f.removesuffix(".parquet")).is_dir()]
        if "dataset_dict.json" in names:
            splits = [name for name in names if (Path(source) / name).is_dir()]
            raise UserError(f"{source} holds several splits; name one of {', '.join(splits)} as {source}/NAME")
        if tars:
            return "tar", tars
        if "state.json" in names:
            return "datasets", files
        return ("parquet", parquets) if parquets else ("pictures", files)
    try:
        patterns = [source] if Path(source).is_file() else list(braceexpand(source))
    except UnbalancedBracesError as error:
        raise UserError(f"{source}: a brace pattern is written like x-{{000..099}}.tar ({error})") from error
    files = [file for pattern in patterns for file in sorted(glob.glob(pattern)) or [pattern]]
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"{file}: no such file (train_data or its like)")
    kinds = {Path(file).suffix[1:] if file.endswith((".tar", ".parquet")) else "captions" for file in files}
    if len(kinds) > 1 or kinds == {"captions"} and len(files) > 1:
        raise UserError(f"{source}: give one captions file, tar shards only, or parquet files only")
    return kinds.pop(), files


def read_source(source: str, kind: str, files: list[str], image_column: str, columns: list[str],
                image_root: str | None) -> Iterator[Found]:
    """Everything in a source, in an order that follows from its files' names and contents only."""
    if kind == "captions":
        return read_captions(source, image_column, columns, image_root)
    if kind == "tar":
        return read_shards(files, columns)
    if kind == "pictures":
        return read_folder(source, columns)
    import datasets
    import pyarrow

    try:
        if kind == "datasets":
            data = datasets.load_from_disk(source)
        else:  # parquet gives no random access: `datasets` turns it into Arrow files in its cache, once
            data = datasets.load_dataset("parquet", data_files=files, split="train")
    except (FileNotFoundError, pyarrow.ArrowInvalid, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{source}: `datasets` cannot read it ({error.__cause__ or error})") from error
    return read_arrow([part["filename"] for part in data.cache_files], image_column, columns,
                      image_root or os.path.dirname(files[0]))


def build_index(source: str, index: Path, image_column: str, caption_column: str, image_root: str | None,
                short_captions: str | None = None) -> str:
    """Reads `source` into `index` (.jsonl, with the line starts in .npy) unless it is there.

    A sample with several captions makes several lines. What lacks a picture or a caption is left out.

    Args:
        short_captions: a column with short captions, or "first_sentence"; each line then has a "short" one, too.

    Returns:
        What was found, in one line.

    Raises:
        UserError: nothing usable in the source, or it changed since the index was made (sample numbers would no
            longer hold).
    """
    kind, files = find_files(source)
    state = [[file, os.path.getsize(file) if os.path.isfile(file) else 0] for file in files]
    stamp = index.with_suffix(".source.json")
    if stamp.is_file():
        known = json.loads(stamp.read_text())
        if known["files"] != state:
            raise UserError(f"{source} changed since {index.parent.parent} was begun (files or their sizes); use "
                            "another output_dir for the new data")
        return known["found"]
    columns = [caption_column] + ([short_captions] if short_captions not in (None, FIRST_SENTENCE) else [])
    starts, total, first, paths = array("q", [0]), 0, None, []
    left_out: dict[str, list] = {}  # why -> [how many, the first one's id]
    with atomic_write(index, "wb") as stream:
        for sample in progress(read_source(source, kind, files, image_column, columns, image_root),
                               description=f"reading {source}"):
            total, first = total + 1, first or sample
            captions, *short = map(captions_of, sample.texts or [None])
            if sample.problem or sample.image is None or not captions or short == [[]]:
                why = sample.problem or ("without a picture" if sample.image is None else "without a caption")
                left_out.setdefault(why, [0, sample.id])[0] += 1
                continue
            if isinstance(sample.image, str) and len(paths) < 100:
                paths.append(sample.image)
            for caption in captions:
                row = {"id": sample.id, "image": sample.image, "caption": caption}
                if short_captions:
                    row["short"] = short[0][0] if short else first_sentence(caption)
                starts.append(starts[-1] + stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n"))
        reasons = ", ".join(f"{count} {why} (the first: {name})" for why, (count, name) in left_out.items())
        if len(starts) == 1:
            _refuse(source, kind, first, reasons, image_column, columns)
        if paths and not any(map(os.path.exists, paths)):
            raise UserError(f"{source}: there is no picture {paths[0]}, nor any of the first {len(paths)}; set "
                            "image_root to the folder that the paths start from")
    with atomic_write(index.with_suffix(".npy"), "wb") as stream:
        np.save(stream, np.frombuffer(starts, np.int64))
    found = f"{len(starts) - 1} samples in {source}" + (f"; left out: {reasons}" if reasons else "")
    write_json(stamp, {"files": state, "found": found})
    return found


def _refuse(source: str, kind: str, first: Found | None, reasons: str, image_column: str, columns: list[str]) -> None:
    """Says why a source without one usable sample is none."""
    if first is None:
        raise UserError(f"{source} holds no samples; it needs pictures with captions ('{columns[0]}')")
    names = ", ".join(first.names)
    if kind in ("tar", "pictures"):
        hint = "; if a file holds the captions, name that file" if kind == "pictures" else ""
        raise UserError(f"{source}: no sample with a picture and a caption ('{columns[0]}'); left out: {reasons}; the "
                        f"first has: {names}{hint}")
    for key, column in zip(("image_column", "caption_column", "short_captions"), (image_column, *columns),
                           strict=False):
        if column not in first.names:
            raise UserError(f"{source}, sample 1: there is no column '{column}' (found: {names}); set {key}")
    raise UserError(f"{source}: no usable sample; left out: {reasons}")
