"""Samples made ready for the model in the loader's workers: pictures read, texts tokenised, rows put together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from train_vlm.chat import IGNORE_INDEX, ChatEncoder
from train_vlm.samples import pictures_of, read_picture


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
    """Puts the samples of a micro-batch into rows.

    A micro-batch without pictures gets one black dummy picture, so that every process runs tower and projector, and
    one without any usable sample a dummy token without a label: processes that share parameters (ZeRO-3) stay in step.

    Args:
        packing: several samples may share a row; else each has a row of its own, padded on the right.
    """

    def __init__(self, pad_token_id: int, picture_shape: tuple[int, int, int], packing: bool = False):
        self.pad_token_id = pad_token_id
        self.picture_shape = picture_shape
        self.packing = packing

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """-> `inputs` of `VLMLoss`, `counts` that are summed over the global batch, `ids` and `problems`."""
        good = [item for item in items if "problem" not in item]
        rows = pack([len(item["input_ids"]) for item in good]) if self.packing else [[i] for i in range(len(good))]
        good = [good[index] for row in rows for index in row]  # pictures come in the order of their marks
        nothing = {"input_ids": torch.tensor([self.pad_token_id]), "labels": torch.tensor([IGNORE_INDEX])}
        remaining = iter(good)
        packed = [[next(remaining) for _ in row] for row in rows] or [[nothing]]
        pictures = [item["pixel_values"] for item in good if "pixel_values" in item]
        labels = _rows([[_but_first(item["labels"]) for item in row] for row in packed], IGNORE_INDEX)
        inputs = {
            "input_ids": _rows([[item["input_ids"] for item in row] for row in packed], self.pad_token_id),
            "labels": labels,
            "pixel_values": torch.cat(pictures) if pictures else torch.zeros(1, *self.picture_shape),
            "pictures": sum(len(part) for part in pictures),
        }
        if self.packing:
            # Positions that start anew tell the language model's attention where a sample ends. Padding is one more.
            inputs["position_ids"] = _rows([[torch.arange(len(item["input_ids"])) for item in row] for row in packed],
                                           0)
        return {
            "inputs": inputs,
            "counts": {
                "label_tokens": int((labels != IGNORE_INDEX).sum()),
                "tokens": sum(len(item["input_ids"]) for item in good),
                "pictures": inputs["pictures"],
                "samples": len(good),
                "skipped": len(items) - len(good),
                "truncated": sum(item["truncated"] for item in good),
            },
            "ids": [item["id"] for item in good],
            "problems": [f"{item['id']}: {item['problem']}" for item in items if "problem" in item],
        }


def pack(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of the samples that share a row: as few rows as first-fit-decreasing finds, none longer than the longest
    sample, so that attention never costs more than with padding."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((row for row, left in enumerate(room) if left >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max(lengths))
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def _but_first(labels: Tensor) -> Tensor:
    """Nothing comes before the first token of a sample to predict it from."""
    return torch.cat([labels.new_tensor([IGNORE_INDEX]), labels[1:]])


def _rows(parts: list[list[Tensor]], value: int) -> Tensor:
    rows = [torch.cat(row) for row in parts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
