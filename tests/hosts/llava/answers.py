"""Loads LLaVA's checkpoints as its users do, and asks what is in a picture."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from host import TRAIN
from safetensors.torch import load_file

PROMPT = [1, 300, -200, 400, 13]


def in_fork(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """The function's result, from a fork of this process: LLaVA is imported here, and patched in the fork alone.

    Raises:
        RuntimeError: the function raised an error; with its traceback.
    """
    import llava.train.train  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.pt"
        process = multiprocessing.get_context("fork").Process(target=_child, args=(file, function, args, kwargs))
        process.start()
        process.join(timeout=120)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{function.__name__} did not end")
        if not file.is_file():
            raise RuntimeError(f"{function.__name__} ended with {process.exitcode}")
        failed, result = torch.load(file)
    if failed:
        raise RuntimeError(result)
    return result


def _child(file: Path, function: Callable, args: tuple, kwargs: dict) -> None:
    try:
        result = False, function(*args, **kwargs)
    except BaseException:
        result = True, traceback.format_exc()
    torch.save(result, file)
    os._exit(0)


@contextlib.contextmanager
def float32() -> Iterator[None]:
    """Within the block `load_pretrained_model` reads in float32 what it would read in the float16 written into it."""
    from llava.model import builder

    builder.torch = types.SimpleNamespace(**{**vars(torch), "float16": torch.float32})
    try:
        yield
    finally:
        builder.torch = torch


def load(checkpoint: Path | str, base: Path | None = None, name: str = "llava", **changed: Any) -> Any:
    """What `load_pretrained_model` gives: tokenizer, model, image processor, context length."""
    from llava.model.builder import load_pretrained_model

    import clipmoe_vlm.llava  # noqa: F401

    return load_pretrained_model(str(checkpoint), None if base is None else str(base), name,
                                 **{"device": "cpu", **changed})


def answer(model: Any, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What the tower makes of a picture, the logits of the first answered token, and an answer of 12 tokens."""
    pictures = load_file(TRAIN / "pixels.safetensors")
    picture = pictures[min(name for name in pictures if name.startswith("pad."))][None].to(dtype)
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        features = model.get_vision_tower()(picture)
        logits = model(input_ids=ids, images=picture, use_cache=False).logits[:, -1]
        tokens = model.generate(ids, images=picture, do_sample=False, max_new_tokens=12, min_new_tokens=12,
                                use_cache=True)
    return {"features": features.clone(), "logits": logits.clone(), "tokens": tokens.clone()}


def reloaded(checkpoint: Path | str, base: Path | None = None, name: str = "llava", **changed: Any) -> dict[str, Any]:
    """In a fork, in float32: the tower's weights (`tower`), `answer`, and `mm_vision_tower` (`source`)."""
    return in_fork(_reloaded, checkpoint, base, name, **changed)


def _reloaded(checkpoint: Path | str, base: Path | None, name: str, **changed: Any) -> dict[str, Any]:
    with float32():
        model = load(checkpoint, base, name, **changed)[1]
    return {"tower": model.get_vision_tower().vision_tower.state_dict(), "source": model.config.mm_vision_tower,
            **answer(model)}
