"""Samples in LLaVA's form: `{id, image: path | [paths] | absent, conversations: [{from, value}]}`.

Read from a JSON file or from a folder of Hugging Face `datasets` with the same columns, where `image` may also hold
encoded pictures.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from clipmoe_vlm.chat_templates import IMAGE_TOKEN
from clipmoe_vlm.runs import UserError
from train_vlm.chat import ROLES


def read_samples(source: str) -> Sequence[dict[str, Any]]:
    """Reads `source` and checks every sample's form.

    Raises:
        UserError: no such file, not LLaVA's JSON, a sample without `conversations`, pictures and marks that disagree
            (names the file and the sample).
    """
    path = Path(source)
    if path.is_dir():
        samples, columns = _read_datasets_folder(path)
    else:
        samples = columns = _read_json(path)
    if not len(samples):
        raise UserError(f"{source} holds no samples")
    for number, sample in enumerate(columns):
        _check(sample, number, source)
    return samples


def _read_json(path: Path) -> list[dict]:
    try:
        samples = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"data: {path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"data: {path} is not valid JSON: {error}") from error
    if not isinstance(samples, list):
        raise UserError(f"data: {path} must hold a list of samples, found {type(samples).__name__}")
    return samples


def _read_datasets_folder(path: Path) -> tuple[Any, Any]:
    """The data set, and the same without pictures' bytes, to look through."""
    import datasets

    try:
        samples = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise UserError(f"data: {path} is a folder, but not one that `datasets` wrote: {error}") from error
    if not isinstance(samples, datasets.Dataset):
        raise UserError(f"data: {path} holds several splits; name one of {', '.join(samples)} as {path}/NAME")
    if "conversations" not in samples.column_names:
        raise UserError(f"data: {path} has no column 'conversations' (it has {', '.join(samples.column_names)})")
    if "image" in samples.column_names:
        feature = samples.features["image"]
        if isinstance(feature, datasets.Image):  # decoded here, so that a broken picture is only a skipped sample
            samples = samples.cast_column("image", datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            samples = samples.cast_column("image", datasets.List(datasets.Image(decode=False)))
    return samples, samples


def _check(sample: Any, number: int, source: str) -> None:
    where = f"{source}: sample {number}"
    if isinstance(sample, dict) and "id" in sample:
        where += f" (id {sample['id']!r})"
    if not isinstance(sample, dict):
        raise UserError(f"{where} is no object with 'conversations'")
    turns = sample.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where} has no 'conversations'; each sample needs a list of {{from, value}}")
    marks = 0
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("from") not in ROLES or not isinstance(turn.get("value"), str):
            raise UserError(f"{where}: a turn must be {{from: human or gpt, value: text}}, found {str(turn)[:80]}")
        marks += turn["value"].count(IMAGE_TOKEN)
    pictures = len(pictures_of(sample))
    if marks != pictures:
        raise UserError(f"{where} has {pictures} picture(s) but {marks} {IMAGE_TOKEN} mark(s) in its conversations; "
                        "write one mark per picture")


def pictures_of(sample: dict[str, Any]) -> list[Any]:
    """The sample's pictures: paths, or `{"bytes": ..., "path": ...}` from `datasets`."""
    image = sample.get("image")
    if image is None or image == "" or image == []:
        return []
    return list(image) if isinstance(image, (list, tuple)) else [image]


def sample_lengths(samples: Sequence[dict[str, Any]]) -> list[int]:
    """Words of each sample, negative without a picture: what batches are grouped by."""
    lengths = []
    for sample in samples:
        words = max(1, sum(len(turn["value"].split()) for turn in sample["conversations"]))
        lengths.append(words if pictures_of(sample) else -words)
    return lengths


def read_picture(picture: Any, folder: Path) -> Image.Image:
    """Opens and decodes a picture as RGB. Raises OSError (also for what is no picture)."""
    try:
        if isinstance(picture, dict):
            stream = io.BytesIO(picture["bytes"]) if picture.get("bytes") else folder / picture["path"]
            return Image.open(stream).convert("RGB")
        return Image.open(folder / picture).convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise OSError(str(error)) from error  # PIL's decoders raise all of these on broken files
