"""Reads weights and JSON from files, folders and the hub. Nothing in a file is ever run."""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor

State = dict[str, Tensor]


class Tensors:
    """A state dict that is emptied name by name, so that no tensor is read twice or forgotten."""

    def __init__(self, state: State, source: str | Path):
        self.rest = dict(state)
        self.source = source

    def take(self, name: str) -> Tensor:
        """Raises ValueError if there is no such tensor."""
        if name not in self.rest:
            raise ValueError(f"{self.source} has no tensor {name}, which its configuration asks for")
        return self.rest.pop(name)

    def linear(self, theirs: str, ours: str, bias: bool = True) -> State:
        """Weight and bias of a linear layer or a norm under their new names."""
        kinds = ("weight", "bias") if bias else ("weight",)
        return {f"{ours}.{kind}": self.take(f"{theirs}.{kind}") for kind in kinds}

    def block(self, names: dict[str, str], theirs: str, ours: str) -> State:
        """A transformer block with query, key and value in one linear layer. `names`: ours to theirs."""
        state: State = {}
        for our_name, their_name in names.items():
            for kind in ("weight", "bias"):
                tensor = self.take(theirs + their_name.format(kind))
                if our_name == "self_attn.qkv":
                    state |= split(tensor, "qkv", f"{ours}self_attn.{{}}_proj.{kind}")
                else:
                    state[f"{ours}{our_name}.{kind}"] = tensor
        return state

    def end(self) -> None:
        """Raises ValueError if a tensor is left over."""
        if self.rest:
            raise ValueError(f"{self.source} holds {len(self.rest)} tensors that its configuration has no place for, "
                             f"for example {min(self.rest)}")


def split(tensor: Tensor, letters: str, name: str) -> State:
    """Linear layers that are stored one below the other."""
    parts = tensor.chunk(len(letters))
    return {name.format(letter): part.clone() for letter, part in zip(letters, parts, strict=True)}


def local(source: str | Path) -> Path:
    """The file or folder itself; else the folder of the hub's model of that name, downloaded if need be.

    Raises:
        FileNotFoundError: `source` looks like a hub name, and the hub has no such model or cannot be reached.
    """
    path = Path(source)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return path
    try:
        texts = ["*.json", "*.txt", "*.model"]
        folder = Path(snapshot_download(str(source), allow_patterns=[*texts, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(str(source), allow_patterns=[*texts, "*.bin"]))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(f"{source}: no such file or folder here, and no such model from the hub "
                                f"({str(error).splitlines()[0]})") from error
    return folder


def read_json(file: Path) -> dict[str, Any]:
    """Raises ValueError if the file holds no JSON object."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return values


def read_folder(folder: Path, *names: str) -> State:
    """The tensors of the first of these files that the folder has, whole or in shards.

    Raises:
        FileNotFoundError: there is none of them.
        ValueError: as `read_weights`.
    """
    for name in names:
        if (folder / name).is_file():
            return read_weights(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            state: State = {}
            for shard in sorted(set(read_json(index)["weight_map"].values())):
                state.update(read_weights(folder / shard))
            return state
    raise FileNotFoundError(f"{folder} holds no weights: expected {' or '.join(names)}")


def read_weights(file: Path) -> State:
    """The tensors of a safetensors or torch file or of a TorchScript archive, without running any code in it.

    Of a training checkpoint its `state_dict`; names without the `module.` that DistributedDataParallel puts in front.

    Raises:
        ValueError: it is not readable, or holds anything but tensors.
    """
    try:
        if file.suffix == ".safetensors":
            state = safetensors.torch.load_file(file)
        elif _is_torchscript(file):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # TorchScript goes; what OpenAI published stays
                state = torch.jit.load(file, map_location="cpu").state_dict()
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found:
            raise ValueError(f"{file} is no plain archive of tensors: it holds the Python object {found[1]}, and "
                             "unpickling that could run any code; have it saved again as a state dict") from error
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} is not a readable weights file ({reason})") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} holds no state dict (a mapping of names to tensors)")
    if all(name.startswith("module.") for name in state):
        state = {name[len("module."):]: tensor for name, tensor in state.items()}
    return dict(state)


def _is_torchscript(file: Path) -> bool:
    """Whether this is a TorchScript archive, as OpenAI publishes its models.

    Its pickles are read by torch's own reader, which knows no Python. Its code is not called either, unless a module
    brings a `__setstate__`, which loading would call.
    """
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if not any(Path(name).name == "constants.pkl" for name in names):
            return False
        if any(b"__setstate__" in archive.read(name) for name in names if name.endswith(".py")):
            raise ValueError(f"{file} is a TorchScript archive that runs code of its own when it is loaded "
                             "(__setstate__); have it saved again as a state dict")
    return True
