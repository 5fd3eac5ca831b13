"""Indexed samples as tensors: pictures and captions by number, opened and prepared inside the loader's workers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import transforms
from transformers import AutoImageProcessor, AutoTokenizer

from clipmoe_vlm import CLIPMoEConfig
from clipmoe_vlm.pictures import open_rgb
from clipmoe_vlm.runs import UserError

CHARACTERS_PER_TOKEN = 64  # more text than the longest caption can use is not tokenized at all


class Samples:
    """The indexed samples of a source: `id`, picture and caption of each by number."""

    def __init__(self, index: Path):
        self.lines = np.memmap(index, np.uint8, "r")
        self.starts = np.load(index.with_suffix(".npy"), mmap_mode="r")

    def __len__(self) -> int:
        return len(self.starts) - 1

    def record(self, number: int) -> dict:
        """{"id", "image": path or [file, offset, size], "caption"}, and "short" where there are short captions."""
        return json.loads(bytes(self.lines[self.starts[number]:self.starts[number + 1]]))

    def picture(self, number: int) -> Image.Image | str:
        """As `open_picture`."""
        row = self.record(number)
        return open_picture(row["image"], row["id"])

    def caption(self, number: int) -> str:
        return self.record(number)["caption"]


def read_part(file: str, offset: int, size: int) -> bytes:
    """Bytes of a shard.

    Raises:
        UserError: the shard is gone, or shorter than when it was indexed.
    """
    problem = "it became shorter"
    try:
        with open(file, "rb") as stream:
            stream.seek(offset)
            data = stream.read(size)
        if len(data) == size:
            return data
    except OSError as error:
        problem = error.strerror
    raise UserError(f"{file} can no longer be read ({problem}); bring it back and run the same command again: finished "
                    "work is intact and the run resumes from its last checkpoint")


def open_picture(where: str | bytes | list, name: str) -> Image.Image | str:
    """RGB picture (as `open_rgb`) from a path, a file's content or [file, offset, size]; or a sentence saying why not
    (a skip).

    Raises:
        UserError: the whole shard is gone.
    """
    if isinstance(where, list):
        where = read_part(*where)
    try:
        return open_rgb(where)
    except OSError as error:
        return f"sample {name}: unreadable picture ({error})"


class Pairs(Dataset):
    """Item n -> (n, picture or error sentence, caption, short caption or None)."""

    def __init__(self, samples: Samples):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> tuple[int, Image.Image | str, str, str | None]:
        row = self.samples.record(number)
        return int(number), open_picture(row["image"], row["id"]), row["caption"], row.get("short")


def picture_transform(processor) -> Callable[[Image.Image], torch.Tensor]:
    """RGB picture -> [3, H, W] as the processor says.

    What CLIP does (shortest side, centre crop) and SigLIP (both sides) goes through torchvision on PIL's pictures, as
    in the code of OpenAI and open_clip: transformers cuts an odd margin on the other side, so that a picture in four
    would get other pixels.
    """
    size, crop = processor.size, processor.crop_size if getattr(processor, "do_center_crop", None) else None
    if not crop and size.get("height"):
        side = (size["height"], size["width"])
    elif crop and size.get("shortest_edge"):
        side = size["shortest_edge"]
    else:
        return lambda picture: processor(images=picture, return_tensors="pt")["pixel_values"][0]
    interpolation = transforms.InterpolationMode(Image.Resampling(processor.resample).name.lower())
    return transforms.Compose([
        transforms.Resize(side, interpolation),
        *([transforms.CenterCrop((crop["height"], crop["width"]))] if crop else []), transforms.ToTensor(),
        transforms.Normalize(processor.image_mean, processor.image_std)])


class Collate:
    """Makes tensors of pictures and captions with the base's own processors; runs inside the workers.

    A picture given as a sentence (why it is unreadable) becomes a row that is not valid.
    """

    def __init__(self, image_processor, tokenizer, text_length: int, image_size: int):
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.transform = picture_transform(image_processor)
        self.text_length, self.image_size = text_length, image_size

    def __call__(self, items: list[tuple[int, Image.Image | str, str, str | None]]) -> dict:
        """Items of `Pairs` -> `pixel_values` [b, 3, H, W], `input_ids` [b, T], `valid` [b], `errors` (sentences), and
        `short_input_ids` [b, T] where there are short captions."""
        _, pictures, captions, short = zip(*items, strict=True)
        pixels, valid, errors = self.pictures(pictures)
        batch = {"pixel_values": pixels, "input_ids": self.captions(captions)[0], "valid": valid, "errors": errors}
        if short[0] is not None:
            batch["short_input_ids"] = self.captions(short)[0]
        return batch

    def pictures(self, pictures: Sequence[Image.Image | str]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """-> pixels [b, 3, H, W] (zeros where unreadable), valid [b], errors."""
        pixels = torch.zeros(len(pictures), 3, self.image_size, self.image_size)
        valid = torch.tensor([not isinstance(picture, str) for picture in pictures])
        if valid.any():
            pixels[valid] = torch.stack([self.transform(picture) for picture in pictures
                                         if not isinstance(picture, str)])
        return pixels, valid, [picture for picture in pictures if isinstance(picture, str)]

    def captions(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """-> ids [b, T], padded to the tower's length (as the public code does; its balance loss counts padding), and
        valid and errors as of `pictures`: a caption always is."""
        longest = CHARACTERS_PER_TOKEN * self.text_length
        ids = self.tokenizer([caption[:longest] for caption in captions], padding="max_length", truncation=True,
                             max_length=self.text_length, return_tensors="pt")["input_ids"]
        return ids, torch.ones(len(captions), dtype=torch.bool), []


def load_collate(folder: str | Path) -> Collate:
    """With the processors of a CLIP-MoE folder."""
    config = CLIPMoEConfig.from_pretrained(folder)
    # PIL's resizing is what CLIP was trained with; torchvision's differs in the last bits.
    return Collate(AutoImageProcessor.from_pretrained(folder, backend="pil"), AutoTokenizer.from_pretrained(folder),
                   config.text_config.max_position_embeddings, config.vision_config.image_size)
