"""Pictures with captions: from a captions file or from webdataset tar shards, read sample by sample in any order.

Batches of one cluster need random access, which a stream of shards does not give. So the source is read once into an
index (one JSON line per sample, memory-mapped): a picture is a path, or [shard, offset, size] inside a plain tar file;
so is a caption inside a shard. The index also pins the sample numbers that clusters and checkpoints refer to.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from braceexpand import braceexpand
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from clipmoe_vlm.runs import UserError, atomic_write, read_jsonl, write_json

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")


# --- sources -------------------------------------------------------------------------------------------------------


def read_captions(file: Path, image_column: str, caption_column: str, image_root: str | None) -> Iterator[dict]:
    """Rows of a captions file as {"id", "image", "caption"}; a list of captions makes one row each.

    CSV and TSV need a header line; a tab in it makes the file tab-separated whatever its ending (open_clip writes
    such .csv files). A JSON file holds a list of objects. A caption column that holds a LLaVA conversation gives its
    first answer (ShareGPT4V's layout).

    Raises:
        UserError: no file, no such column (names the columns found), nothing in it.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such captions file")
    if file.suffix == ".jsonl":
        rows = read_jsonl(file)
    elif file.suffix == ".json":
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"{file}: not valid JSON ({error}); JSON lines are named .jsonl") from error
    elif file.suffix in (".csv", ".tsv"):
        with open(file, encoding="utf-8", newline="") as stream:
            header = stream.readline()
            stream.seek(0)
            rows = list(csv.DictReader(stream, delimiter="\t" if "\t" in header or file.suffix == ".tsv" else ","))
    else:
        raise UserError(f"{file}: a captions file ends in .csv, .tsv, .jsonl or .json")
    if not isinstance(rows, list) or not rows or not isinstance(rows[0], dict):
        raise UserError(f"{file} holds no samples; it needs the columns '{image_column}' and '{caption_column}'")
    root = Path(image_root) if image_root else file.parent
    for number, row in enumerate(rows):
        for key, column in (("image_column", image_column), ("caption_column", caption_column)):
            if row.get(column) is None:
                raise UserError(f"{file}, sample {number + 1}: there is no column '{column}' (found: "
                                f"{', '.join(str(c) for c in row if c is not None)}); set {key}")
        captions = row[caption_column]
        if isinstance(captions, list) and captions and isinstance(captions[0], dict):
            captions = [turn["value"] for turn in captions if turn.get("from") == "gpt"][:1]
        for caption in captions if isinstance(captions, list) else [captions]:
            yield {"id": str(row.get("id", row[image_column])), "image": str(root / row[image_column]),
                   "caption": str(caption)}


def read_shards(shards: list[str], caption_column: str) -> Iterator[dict]:
    """Samples of webdataset shards, by reading the tar headers only.

    Members with one name up to the first dot are one sample: a picture, and its caption in `.txt`, or else in the
    field `caption_column` of `.json`.

    Raises:
        UserError: a shard is missing, compressed or torn; members that are no such samples.
    """
    for shard in shards:
        parts: dict[str, dict] = {}
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    folder, _, name = member.name.rpartition("/")
                    key, _, ending = name.partition(".")
                    if member.isfile():
                        parts.setdefault(f"{folder}/{key}" if folder else key, {})[ending.lower()] = [
                            shard, member.offset_data, member.size]
        except FileNotFoundError:
            raise UserError(f"{shard}: no such shard") from None
        except tarfile.TarError as error:
            raise UserError(f"{shard} is no plain tar file ({error}); unpack or repair it") from error
        whole = 0
        for key, members in parts.items():
            picture = next((members[ending] for ending in PICTURES if ending in members), None)
            caption = members.get("txt") or members.get("json")
            if picture and caption:
                whole += 1
                yield {"id": f"{Path(shard).stem}/{key}", "image": picture,
                       "caption": [*caption, None if "txt" in members else caption_column]}
        if not whole:
            endings = sorted({ending for members in parts.values() for ending in members})
            raise UserError(f"{shard}: no sample with a picture and a .txt or .json caption (endings found: "
                            f"{', '.join(endings) or 'none'})")


def build_index(source: str, index: Path, image_column: str, caption_column: str, image_root: str | None) -> int:
    """Reads `source` into `index` (.jsonl, with the line starts in .npy) unless it is there; returns its samples.

    Raises:
        UserError: the source is wrong, or changed since the index was made (sample numbers would no longer hold).
    """
    shards = sorted(glob.glob(f"{glob.escape(source)}/*.tar")) if Path(source).is_dir() else [
        file for pattern in braceexpand(source) for file in sorted(glob.glob(pattern)) or [pattern]]
    if Path(source).is_dir() and not shards:
        raise UserError(f"{source}: a folder of webdataset shards needs .tar files; for a folder of pictures name its "
                        "captions file")
    if not all(Path(file).is_file() for file in shards):
        raise UserError(f"{next(f for f in shards if not Path(f).is_file())}: no such file (train_data or its like)")
    state = [[file, Path(file).stat().st_size] for file in shards]
    stamp = index.with_suffix(".source.json")
    if stamp.is_file():
        if json.loads(stamp.read_text()) != state:
            raise UserError(f"{source} changed since {index.parent.parent} was begun (files or their sizes); use "
                            "another output_dir for the new data")
        return len(np.load(index.with_suffix(".npy"), mmap_mode="r")) - 1
    tar = [file.endswith(".tar") for file in shards]
    if any(tar) and not all(tar) or not any(tar) and len(shards) > 1:
        raise UserError(f"{source}: give one captions file, or tar shards only")
    rows = read_shards(shards, caption_column) if any(tar) else read_captions(
        Path(source), image_column, caption_column, image_root)
    starts = [0]
    with atomic_write(index, "wb") as stream:
        for row in rows:
            starts.append(starts[-1] + stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n"))
    with atomic_write(index.with_suffix(".npy"), "wb") as stream:
        np.save(stream, np.array(starts, np.int64))
    write_json(stamp, state)
    return len(starts) - 1


# --- samples -------------------------------------------------------------------------------------------------------


def _read_member(shard: str, offset: int, size: int) -> bytes:
    with open(shard, "rb") as stream:
        stream.seek(offset)
        return stream.read(size)


class Samples:
    """The indexed samples of a source: `id`, picture and caption of each by number."""

    def __init__(self, index: Path):
        self.lines = np.memmap(index, np.uint8, "r")
        self.starts = np.load(index.with_suffix(".npy"), mmap_mode="r")

    def __len__(self) -> int:
        return len(self.starts) - 1

    def record(self, number: int) -> dict:
        return json.loads(bytes(self.lines[self.starts[number]:self.starts[number + 1]]))

    def picture(self, number: int) -> Image.Image | str:
        """The RGB picture, or a sentence that says why it cannot be read (a skip, so never an exception)."""
        row = self.record(number)
        return open_picture(row["image"], row["id"])

    def caption(self, number: int) -> str | None:
        """The caption; None where a shard's JSON has no such field."""
        caption = self.record(number)["caption"]
        if isinstance(caption, str):
            return caption
        text, field = _read_member(*caption[:3]).decode("utf-8", "replace"), caption[3]
        if field is None:
            return text.strip()
        try:
            return json.loads(text)[field]
        except (json.JSONDecodeError, KeyError, TypeError):
            return None


def open_picture(where: str | list, name: str) -> Image.Image | str:
    """RGB picture from a path or [shard, offset, size]; or a sentence saying why it is unreadable."""
    try:
        with Image.open(where if isinstance(where, str) else io.BytesIO(_read_member(*where[:3]))) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's, on bad files
        return f"sample {name}: unreadable picture ({re.sub(' object at 0x[0-9a-f]+', '', str(error))})"


class Pairs(Dataset):
    """Item n -> (n, picture or error sentence, caption)."""

    def __init__(self, samples: Samples):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> tuple[int, Image.Image | str, str]:
        picture, caption = self.samples.picture(number), self.samples.caption(number)
        if caption is None:
            picture = f"sample {self.samples.record(number)['id']}: its JSON has no such caption field"
        return int(number), picture, caption or ""


class Collate:
    """Makes tensors of pictures and captions with the base's own processors; runs inside the workers.

    A picture given as a sentence (why it is unreadable) and a caption given as None become rows that are not valid.
    """

    def __init__(self, image_processor, tokenizer, text_length: int, image_size: int):
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.text_length, self.image_size = text_length, image_size

    def __call__(self, items: list[tuple[int, Image.Image | str, str]]) -> dict:
        """Items of `Pairs` -> `pixel_values` [b, 3, H, W], `input_ids` [b, T], `valid` [b], `errors` (sentences)."""
        pixels, valid, errors = self.pictures([picture for _, picture, _ in items])
        ids, _, _ = self.captions([caption for _, _, caption in items])
        return {"pixel_values": pixels, "input_ids": ids, "valid": valid, "errors": errors}

    def pictures(self, pictures: list[Image.Image | str]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """-> pixels [b, 3, H, W] (zeros where unreadable), valid [b], errors."""
        pixels = torch.zeros(len(pictures), 3, self.image_size, self.image_size)
        valid = torch.tensor([not isinstance(picture, str) for picture in pictures])
        if valid.any():
            good = [picture for picture in pictures if not isinstance(picture, str)]
            pixels[valid] = self.image_processor(images=good, return_tensors="pt")["pixel_values"]
        return pixels, valid, [picture for picture in pictures if isinstance(picture, str)]

    def captions(self, captions: list[str | None]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """-> ids [b, T], padded to the tower's length (as the public code does; its balance loss counts padding)."""
        ids = self.tokenizer([caption or "" for caption in captions], padding="max_length", truncation=True,
                             max_length=self.text_length, return_tensors="pt")["input_ids"]
        return ids, torch.tensor([caption is not None for caption in captions]), []


def loader(dataset: Dataset, collate, batches: np.ndarray | list[list[int]], workers: int) -> DataLoader:
    """A DataLoader over the given batches of sample numbers, in that order."""
    return DataLoader(dataset, batch_sampler=[list(map(int, batch)) for batch in batches], collate_fn=collate,
                      num_workers=workers, pin_memory=torch.cuda.is_available())
