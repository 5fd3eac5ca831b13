"""Samples in LLaVA's form: `{id, image: path | [paths] | absent, conversations: [{from, value}]}`.

From one or several sources, each a JSON file or a folder of Hugging Face `datasets` with the same columns, where
`image` may also hold encoded pictures.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipmoe_vlm.pictures import open_rgb, size_of
from clipmoe_vlm.runs import UserError
from train_vlm.index import build_index, open_datasets, path_of, pictures_of


def read_samples(data: Any, image_folder: str, cache: Path) -> Samples:
    """Checks every sample of `data` and notes in `cache` where it lies; for the main process only.

    The result can be sent to the other processes: it holds no sample, but reads each where it lies when asked for it.

    Args:
        data: a JSON file, a `datasets` folder, or a list of `{path, image_folder, weight}`.
        image_folder: where picture paths start, for sources without their own; "" for beside the source.

    Raises:
        UserError: `data` is of another form, or as `build_index`.
    """
    entries = [{"path": data}] if isinstance(data, str) else data
    if not isinstance(entries, list) or not entries:
        raise UserError(f"data: {data!r} is neither a path nor a list of {{path, image_folder, weight}}")
    sources = [_source(number, entry, image_folder, cache) for number, entry in enumerate(entries, 1)]
    for source in sources:
        build_index(source.path, source.image_folder, source.index)
        if not round(len(source) * source.weight):
            raise UserError(f"data: {source.path} has {len(source)} samples; at weight {source.weight} none would be "
                            "used")
    return Samples(sources)


def _source(number: int, entry: Any, image_folder: str, cache: Path) -> Source:
    names = ("path", "image_folder", "weight")
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or not {*entry} <= {*names}:
        raise UserError(f"data, entry {number}: {entry!r} must have a path and may have an image_folder and a weight, "
                        "nothing else")
    path, weight = entry["path"], entry.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise UserError(f"data, entry {number} ({path}): weight {weight!r} must be a number above 0: how often its "
                        "samples come in an epoch")
    folder = str(entry.get("image_folder") or image_folder or Path(path).parent)
    return Source(path, folder, weight, cache / f"{Path(path).stem}-{zlib.crc32(f'{path} {folder}'.encode()):08x}.npy")


@dataclass(frozen=True)
class Source:
    """Samples of one file or folder; files are opened by each process when it first needs them."""

    path: str
    image_folder: str
    weight: float
    index: Path

    def __reduce__(self) -> tuple:
        return Source, tuple(getattr(self, field.name) for field in fields(self))  # without what is opened

    @cached_property
    def rows(self) -> np.ndarray:
        try:
            return np.load(self.index, mmap_mode="r")
        except FileNotFoundError:
            raise UserError(f"{self.index}, which the main process wrote, is not seen here: output_dir must lie on a "
                            "file system that all machines share") from None

    @cached_property
    def folder(self) -> Any:
        return open_datasets(self.path) if os.path.isdir(self.path) else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """As stored, with picture paths that lead to the pictures.

        Raises:
            UserError: the file is gone or another one.
        """
        row = self.rows[number].tolist()
        sample = self._read(*row) if self.folder is None else self.folder[number].to_pylist()[0]
        pictures = [os.path.join(self.image_folder, path) if (path := path_of(picture)) else picture
                    for picture in pictures_of(sample)]
        return {**sample, "image": pictures}

    def _read(self, start: int, size: int, _words: int, checksum: int, _content: int) -> dict[str, Any]:
        raw = b""
        with contextlib.suppress(OSError), open(self.path, "rb") as stream:
            stream.seek(start)
            raw = stream.read(size)
        if zlib.crc32(raw) != checksum:
            raise UserError(f"data: {self.path} is gone or changed since the run began; bring the old one back and run "
                            "the same command again: it goes on from the last checkpoint")
        return json.loads(raw)


class Samples(Sequence):
    """The samples of all sources, one after the other."""

    def __init__(self, sources: list[Source]):
        self.sources = sources
        self.ends = list(itertools.accumulate(map(len, sources)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`{id: text, image: list of paths or encoded pictures, conversations}`; the id names the source if there are
        several. Raises as `Source`."""
        which = bisect.bisect_right(self.ends, index)
        if index < 0 or which == len(self.sources):
            raise IndexError(index)
        source = self.sources[which]
        number = index - self.ends[which] + len(source)
        sample = source[number]
        name = str(sample.get("id", number))
        return {**sample, "id": name if len(self.sources) == 1 else f"{source.path}: {name}"}

    @property
    def lengths(self) -> list[int]:
        """Words of each sample, negative without a picture: what batches are grouped by."""
        return np.concatenate([source.rows["words"] for source in self.sources]).tolist()

    @property
    def contents(self) -> np.ndarray:
        """`[len(self)]`: equal for samples of the same words and pictures."""
        return np.concatenate([source.rows["content"] for source in self.sources])

    @property
    def weights(self) -> list[tuple[int, float]]:
        """Number of samples and weight of each source."""
        return [(len(source), source.weight) for source in self.sources]


def picture_bytes(picture: Any) -> bytes:
    """The encoded picture of an element of a sample's `image`. Raises OSError."""
    return picture["bytes"] if isinstance(picture, dict) else Path(picture).read_bytes()


def picture_size(picture: Any) -> tuple[int, int]:
    """Height and width, from the header alone, of an element of a sample's `image`. Raises OSError as `size_of`."""
    return size_of(picture["bytes"] if isinstance(picture, dict) else picture)


def read_picture(picture: Any) -> Image.Image:
    """The RGB picture of an element of a sample's `image`. Raises OSError as `open_rgb`."""
    return open_rgb(picture["bytes"] if isinstance(picture, dict) else picture)
