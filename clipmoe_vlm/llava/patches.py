"""Puts our functions around LLaVA's when `clipmoe_vlm.llava` is imported; LLaVA's files stay as they are.

`building`, `training` and `saving` hold these functions.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from . import building, saving, training
from .around import around

_OTHER_LAYOUT = "this llava is not laid out like LLaVA 1.2 or LLaVA-NeXT, so CLIP-MoE towers cannot be put into it"


def patch() -> None:
    """Puts our functions around LLaVA's, wherever these are bound by now; safe to call again.

    Raises:
        ImportError: there is no `llava`, or it is not laid out like LLaVA 1.2 or LLaVA-NeXT.
    """
    arch = _import("llava.model.llava_arch")
    builder = _import("llava.model.multimodal_encoder.builder")
    # `llava.model` swallows errors of this import; here they come out.
    _import("llava.model.language_model.llava_llama")
    for module, name in ((arch, "LlavaMetaForCausalLM.initialize_vision_tokenizer"), (arch, "build_vision_tower"),
                         (builder, "build_vision_tower")):
        if functools.reduce(lambda part, key: getattr(part, key, None), name.split("."), module) is None:
            raise ImportError(f"{module.__file__} has no {name}: {_OTHER_LAYOUT}")
    theirs = inspect.unwrap(builder.build_vision_tower)
    ours = around(builder.build_vision_tower, building.build_vision_tower)
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is theirs:
                setattr(module, name, ours)
    meta = arch.LlavaMetaForCausalLM
    meta.initialize_vision_tokenizer = around(meta.initialize_vision_tokenizer, training.initialize_vision_tokenizer)
    for model_class in _subclasses(meta):
        _patch_model_class(model_class)
    meta.__init_subclass__ = classmethod(functools.partial(_init_subclass, meta))
    from transformers import Trainer  # slow, and of no use to who asks for help

    Trainer.train = around(Trainer.train, training.train)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # something that LLaVA itself needs
        if error.name == "llava":
            raise ImportError("clipmoe_vlm.llava needs the original LLaVA, and there is no module llava: install it "
                              "(pip install llava-torch), or start in the folder of its repository") from None
        found = sys.modules["llava"]
        where = getattr(found, "__file__", None) or ", ".join(found.__path__)
        raise ImportError(f"there is no module {error.name} in {where}: {_OTHER_LAYOUT}") from None


def _subclasses(parent: type) -> Iterator[type]:
    for child in parent.__subclasses__():
        yield child
        yield from _subclasses(child)


def _init_subclass(meta: type, model_class: type, **kwargs: Any) -> None:
    """A model class that is defined later."""
    super(meta, model_class).__init_subclass__(**kwargs)
    _patch_model_class(model_class)


def _patch_model_class(model_class: type) -> None:
    # Now, not when it trains: LoRA keeps the method that it finds.
    if "forward" in vars(model_class):
        model_class.forward = around(model_class.forward, training.forward)
    config_class = getattr(model_class, "config_class", None)
    if config_class is not None:
        saving.patch_config(config_class)
