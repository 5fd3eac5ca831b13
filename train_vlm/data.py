"""Samples made ready for the model in the loader's workers: pictures read, texts tokenised, rows put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlavaNextProcessor, LlavaProcessor

from clipmoe_vlm.vlm import tokens_per_picture
from train_vlm.chat import IGNORE_INDEX, ChatEncoder
from train_vlm.config import VLMConfig
from train_vlm.features import FeatureCache, key_of, pixels_of
from train_vlm.index import pictures_of
from train_vlm.loss import labelled
from train_vlm.model import VLM
from train_vlm.samples import picture_bytes, read_picture


class ConversationDataset(Dataset):
    """Samples ready for the model; one that can't be used comes back with its `problem` instead of raising.

    Args:
        samples: from `read_samples`.
        image_processor: of the tower, with the aspect rule of training.
        tokens_per_picture: tokens that replace a picture's `<image>` mark, by its (height, width) in pixels.
        max_length: longer samples lose the turns behind the last answer that fits whole.
        cache: of the tower's features; pictures are then not decoded.
    """

    def __init__(self, samples: Sequence[dict[str, Any]], encoder: ChatEncoder, image_processor: Any,
                 image_token_id: int, tokens_per_picture: Callable[[tuple[int, int]], int], max_length: int,
                 cache: FeatureCache | None = None):
        self.samples = samples
        self.encoder = encoder
        self.image_processor = image_processor
        self.image_token_id = image_token_id
        self.tokens_per_picture = tokens_per_picture
        self.max_length = max_length
        self.cache = cache

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`{id, input_ids [T], labels [T], truncated}` or `{id, problem}`.

        With pictures also `image_sizes` (their heights and widths) and `pictures`: pixels `[N, C, H, W]` or cached
        features `[N, P, tower width]`; with anyres N counts the tiles.
        """
        sample = self.samples[index]
        item: dict[str, Any] = {"id": str(sample.get("id", index))}
        try:
            input_ids, labels = self.encoder.encode(sample["conversations"])
        except ValueError as error:
            return item | {"problem": str(error)}
        pictures, sizes = [], []
        for picture in pictures_of(sample):
            try:
                tiles, size = self._prepare(picture)
                pictures.append(tiles)
                sizes.append(size)
            except OSError as error:
                name = picture["path"] if isinstance(picture, dict) else picture
                return item | {"problem": f"unreadable picture {name}: {error}"}
        input_ids, labels, kept, truncated = self._expand(input_ids, labels, [*map(self.tokens_per_picture, sizes)])
        if all(label == IGNORE_INDEX for label in labels[1:]):
            return item | {"problem": f"no whole answer within max_length {self.max_length}"}
        if kept:
            item |= {"pictures": torch.cat(pictures[:kept]), "image_sizes": sizes[:kept]}
        return item | {"input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels), "truncated": truncated}

    def _prepare(self, picture: Any) -> tuple[Tensor, tuple[int, int]]:
        """Pixels or features of a picture, and its height and width. Raises OSError."""
        if self.cache is None:
            image = read_picture(picture)
            return pixels_of(image, self.image_processor), (image.height, image.width)
        found = self.cache.get(key_of(picture_bytes(picture)))
        if found is None:
            read_picture(picture)  # says what is wrong with it
            raise OSError("it has changed since its features were computed")
        return found

    def _expand(self, input_ids: list[int], labels: list[int],
                picture_tokens: list[int]) -> tuple[list[int], list[int], int, bool]:
        """Repeats each picture's mark once per picture token and cuts behind the last answer within `max_length`."""
        long_ids: list[int] = []
        long_labels: list[int] = []
        pictures: list[int] = []  # where each ends
        for token, label in zip(input_ids, labels, strict=True):
            repeat = picture_tokens[len(pictures)] if token == self.image_token_id else 1
            long_ids += [token] * repeat
            long_labels += [label] * repeat
            if token == self.image_token_id:
                pictures.append(len(long_ids))
        end = len(long_ids)
        if end > self.max_length:
            end = self.max_length
            if long_labels[end] != IGNORE_INDEX:  # the answer that the limit falls into goes as a whole
                while end and long_labels[end - 1] != IGNORE_INDEX:
                    end -= 1
            while end and long_labels[end - 1] == IGNORE_INDEX:
                end -= 1
        kept = sum(picture <= end for picture in pictures)
        return long_ids[:end], long_labels[:end], kept, end < len(long_ids)


class Collator:
    """Puts the samples of a micro-batch into rows.

    A micro-batch without pictures gets one black dummy picture, so that every process runs tower and projector, and
    one without any usable sample a dummy token without a label: processes that share parameters (ZeRO-3) stay in step.

    Args:
        dummy: `[1, C, H, W]` zeros in place of pixels, or `[1, P, tower width]` in place of features.
        packing: all samples in one row, end to end; else each in a row of its own, padded on the right.
    """

    def __init__(self, pad_token_id: int, dummy: Tensor, packing: bool = False):
        self.pad_token_id = pad_token_id
        self.dummy = dummy
        self.packing = packing

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """-> `inputs` of `VLMLoss`, `counts` that are summed over the global batch, `ids`, `problems`, and the ids of
        the `truncated`."""
        good = [item for item in items if "problem" not in item]
        pictures = [item["pictures"] for item in good if "pictures" in item]
        image_sizes = [size for item in good for size in item.get("image_sizes", [])]
        ids = [item["input_ids"] for item in good] or [torch.tensor([self.pad_token_id])]
        # Nothing comes before the first token of a sample to predict it from.
        labels = [F.pad(item["labels"][1:], (1, 0), value=IGNORE_INDEX) for item in good] or [
            torch.tensor([IGNORE_INDEX])]
        positions, targets = labelled(self._rows(labels, IGNORE_INDEX))
        inputs = {
            "input_ids": self._rows(ids, self.pad_token_id),
            "label_positions": positions,
            "targets": targets,
            "pixel_values": None,
            "pictures": len(image_sizes),
            "image_sizes": image_sizes,
        }
        kind = "pixel_values" if self.dummy.ndim == 4 else "image_features"
        inputs[kind] = torch.cat(pictures) if pictures else self.dummy
        if self.packing:
            inputs["position_ids"] = torch.cat([torch.arange(len(sample)) for sample in ids]).unsqueeze(0)
            inputs["sample_lengths"] = [len(sample) for sample in ids]
        return {
            "inputs": inputs,
            "counts": {
                "label_tokens": len(targets),
                "tokens": sum(len(item["input_ids"]) for item in good),
                "pictures": len(image_sizes),
                "tiles": sum(len(part) for part in pictures),  # what the tower sees
                "samples": len(good),
                "skipped": len(items) - len(good),
                "truncated": sum(item["truncated"] for item in good),
            },
            "ids": [item["id"] for item in good],
            "problems": [f"{item['id']}: {item['problem']}" for item in items if "problem" in item],
            "truncated": [item["id"] for item in good if item["truncated"]],
        }

    def _rows(self, samples: list[Tensor], padding: int) -> Tensor:
        if self.packing:
            return torch.cat(samples).unsqueeze(0)
        return torch.nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=padding)


def make_dataset(config: VLMConfig, samples: Sequence[dict[str, Any]], model: VLM,
                 processor: LlavaProcessor | LlavaNextProcessor,
                 cache: FeatureCache | None = None) -> tuple[ConversationDataset, Collator]:
    """The samples ready for the model, and what makes micro-batches of them."""
    vision = model.config.vision_config
    dataset = ConversationDataset(
        samples, ChatEncoder(processor.tokenizer, processor.chat_template), processor.image_processor,
        model.config.image_token_id, partial(tokens_per_picture, model.config), config.max_length, cache)
    if cache is None:
        dummy = torch.zeros(1, vision.num_channels, vision.image_size, vision.image_size)
    else:
        dummy = torch.zeros(1, tokens_per_picture(model.config), vision.hidden_size, dtype=model.dtype)
    return dataset, Collator(processor.tokenizer.pad_token_id, dummy, config.packing)
