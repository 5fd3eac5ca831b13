"""Samples in LLaVA's form: `{id, image: path | [paths] | absent, conversations: [{from, value}]}`.

Read from a JSON file or from a folder of Hugging Face `datasets` with the same columns, where `image` may also hold
encoded pictures. Pictures are read and texts tokenised in the loader's workers.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from clipmoe_vlm.runs import UserError
from train_vlm.chat import IGNORE_INDEX, IMAGE_TOKEN, ROLES, ChatEncoder


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


class ConversationDataset(Dataset):
    """Samples ready for the model; one that can't be used comes back with its `problem` instead of raising.

    Args:
        samples: from `read_samples`.
        image_folder: where picture paths start.
        image_processor: of the tower, with the aspect rule of training.
        tokens_per_picture: tokens that replace each `<image>` mark.
        max_length: longer samples are cut, but never inside a picture.
    """

    def __init__(self, samples: Sequence[dict[str, Any]], image_folder: Path, encoder: ChatEncoder,
                 image_processor: Any, image_token_id: int, tokens_per_picture: int, max_length: int):
        self.samples = samples
        self.image_folder = image_folder
        self.encoder = encoder
        self.image_processor = image_processor
        self.image_token_id = image_token_id
        self.tokens_per_picture = tokens_per_picture
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`{id, input_ids [T], labels [T], pixel_values [pictures, C, H, W], truncated}` or `{id, problem}`."""
        sample = self.samples[index]
        item: dict[str, Any] = {"id": str(sample.get("id", index))}
        try:
            input_ids, labels = self.encoder.encode(sample["conversations"])
        except ValueError as error:
            return item | {"problem": str(error)}
        pictures = []
        for picture in pictures_of(sample):
            try:
                pictures.append(read_picture(picture, self.image_folder))
            except OSError as error:
                name = picture.get("path") if isinstance(picture, dict) else self.image_folder / picture
                return item | {"problem": f"unreadable picture {name}: {error}"}
        input_ids, labels, kept, truncated = self._expand(input_ids, labels)
        if all(label == IGNORE_INDEX for label in labels[1:]):
            return item | {"problem": f"no answer left within max_length {self.max_length}"}
        if kept:
            item["pixel_values"] = self.image_processor(pictures[:kept], return_tensors="pt")["pixel_values"]
        return item | {"input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels), "truncated": truncated}

    def _expand(self, input_ids: list[int], labels: list[int]) -> tuple[list[int], list[int], int, bool]:
        """Repeats each picture's mark once per picture token and cuts at `max_length`."""
        long_ids: list[int] = []
        long_labels: list[int] = []
        kept = 0
        for token, label in zip(input_ids, labels, strict=True):
            repeat = self.tokens_per_picture if token == self.image_token_id else 1
            if len(long_ids) + repeat > self.max_length:
                return long_ids, long_labels, kept, True
            kept += token == self.image_token_id
            long_ids += [token] * repeat
            long_labels += [label] * repeat
        return long_ids, long_labels, kept, False


class Collator:
    """Pads a micro-batch on the right.

    A micro-batch without pictures gets one black dummy picture, so that every process runs tower and projector, and
    one without any usable sample a dummy token without a label: processes that share parameters (ZeRO-3) stay in step.
    """

    def __init__(self, pad_token_id: int, picture_shape: tuple[int, int, int]):
        self.pad_token_id = pad_token_id
        self.picture_shape = picture_shape

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """-> `input_ids`, `labels` `[B, T]`, `pixel_values` `[pictures or 1, C, H, W]` and counts."""
        good = [item for item in items if "problem" not in item]
        rows = [item["input_ids"] for item in good] or [torch.tensor([self.pad_token_id])]
        labels = [item["labels"] for item in good] or [torch.tensor([IGNORE_INDEX])]
        pictures = [item["pixel_values"] for item in good if "pixel_values" in item]
        padded_labels = _pad(labels, IGNORE_INDEX)
        padded_labels[:, 0] = IGNORE_INDEX  # nothing comes before the first token to predict it from
        return {
            "input_ids": _pad(rows, self.pad_token_id),
            "labels": padded_labels,
            "pixel_values": torch.cat(pictures) if pictures else torch.zeros(1, *self.picture_shape),
            "pictures": sum(len(part) for part in pictures),
            "label_tokens": int((padded_labels != IGNORE_INDEX).sum()),
            "tokens": sum(len(row) for row in rows) if good else 0,
            "ids": [item["id"] for item in good],
            "truncated": sum(item["truncated"] for item in good),
            "problems": [f"{item['id']}: {item['problem']}" for item in items if "problem" in item],
        }


def _pad(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
