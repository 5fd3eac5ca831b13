"""Pictures as the programs read them: RGB, from a file or its content."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

# A picture beyond these is refused by its header alone, before it is decoded.
MAX_PIXELS = 178_956_970  # 537 MB as RGB; where PIL, too, takes a file for a decompression bomb
MAX_SIDES_RATIO = 100  # resizing makes the short side as long as the model's: a line of 20,000 x 1 would be gigabytes


def open_rgb(source: str | Path | bytes) -> Image.Image:
    """RGB picture from a path or from a file's content.

    As in CLIP's and LLaVA's own training: the first frame of an animation, transparency left out (the colours below it
    show), EXIF rotation not applied. Grey of 16 bits is scaled to 8 (PIL would cut it off).

    Raises:
        OSError: no picture, a broken or missing one, or one too large; says which.
    """
    with _opened(source) as picture:
        if picture.mode.startswith("I;16"):
            return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
        picture = picture.convert("RGB")
        picture.info.pop("transparency", None)  # kept by PIL; transformers would put such pictures on white
        return picture


def size_of(source: str | Path | bytes) -> tuple[int, int]:
    """Height and width in pixels, from the header alone. Raises OSError as `open_rgb`, as far as the header shows it.
    """
    with _opened(source) as picture:
        return picture.height, picture.width


@contextlib.contextmanager
def _opened(source: str | Path | bytes) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, on odd but readable files: they would flood the log
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:  # reads the header
                width, height = picture.size
                if width * height > MAX_PIXELS or max(width, height) > MAX_SIDES_RATIO * min(width, height):
                    raise OSError(f"refused for its {width} x {height} pixels")
                yield picture
    except Exception as error:  # PIL's decoders raise whatever comes on broken files
        raise OSError(re.sub(" object at 0x[0-9a-f]+", "", str(error))) from error
