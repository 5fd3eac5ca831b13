"""A cache of the frozen tower's features on the disk, computed once and shared by all runs on the same pictures.

Features lie in shards (safetensors, memory-mapped) in a folder named by what they depend on: the tower's weights, the
layer, preprocessing and precision. Each picture is found by the hash of its encoded bytes, so neither its path nor its
place in the data matters, and a changed file is another picture.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from filelock import FileLock
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import Dataset

from clipmoe_vlm.loading import loader
from clipmoe_vlm.pictures import open_rgb
from clipmoe_vlm.runs import Distributed, UserError, atomic_write, progress
from train_vlm.index import pictures_of
from train_vlm.loss import tower_features
from train_vlm.model import VLM
from train_vlm.samples import picture_bytes

# What a configuration says besides what makes features; the weights' types are hashed with them.
NOT_OF_FEATURES = ("dtype", "transformers_version", "architectures", "_name_or_path", "processor_class")
CHUNK = 32  # pictures of one forward
SHARD_BYTES = 2**28  # of one file's features: what a killed run has to do again at most


class FeatureCache:
    """Features `[tiles, P, D]` and sizes of pictures by the hash of their bytes.

    Args:
        folder: of one tower and preprocessing, from `cache_folder`; need not exist.

    Raises:
        UserError: a shard cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = sorted(folder.glob("[!.]*.safetensors"))
        self.shards: dict[int, Any] = {}  # opened files; each worker opens its own
        keys, places = [], []
        for number in range(len(self.files)):
            theirs = self._open(number).get_tensor("keys").numpy()
            keys.append(theirs)
            places.append(np.stack([np.full(len(theirs), number), np.arange(len(theirs))], 1))
        all_keys = np.concatenate(keys) if keys else np.empty((0, 32), np.uint8)
        heads = np.ascontiguousarray(all_keys[:, :8]).view(np.uint64).ravel()  # enough to tell pictures apart
        order = np.argsort(heads, kind="stable")
        self.heads = heads[order]
        self.places = (np.concatenate(places) if places else np.empty((0, 2), np.int64))[order]

    def __len__(self) -> int:
        return len(self.heads)

    def __contains__(self, key: bytes) -> bool:
        return self._find(key) is not None

    def get(self, key: bytes) -> tuple[Tensor, tuple[int, int]] | None:
        """`[tiles, P, D]`, and (height, width) in pixels, of the picture whose bytes have this hash; None if it is not
        here.

        Raises:
            UserError: its shard is gone or damaged.
        """
        place = self._find(key)
        if place is None:
            return None
        shard, row = self._open(place[0]), place[1]
        try:
            start, end = shard.get_slice("starts")[row : row + 2].tolist()
            features = shard.get_slice("features")[start:end]
            checksum = int(shard.get_slice("checksums")[row : row + 1])
            height, width = shard.get_slice("sizes")[row : row + 1][0].tolist()
        except SafetensorError as error:
            raise self._damaged(place[0], error) from error
        if _checksum(features) != checksum:
            raise self._damaged(place[0], "a checksum is wrong")
        return features, (height, width)

    def _find(self, key: bytes) -> tuple[int, int] | None:
        head = np.frombuffer(key[:8], np.uint64)[0]
        at = int(np.searchsorted(self.heads, head))
        return tuple(map(int, self.places[at])) if at < len(self.heads) and self.heads[at] == head else None

    def _open(self, number: int) -> Any:
        if number not in self.shards:
            try:
                self.shards[number] = safetensors.safe_open(self.files[number], "pt")
            except (OSError, SafetensorError) as error:
                raise self._damaged(number, error) from error
        return self.shards[number]

    def _damaged(self, number: int, problem: object) -> UserError:
        return UserError(f"feature_cache: {self.files[number]} cannot be read ({problem}); remove that file and run "
                         "the same command again: its features are computed anew")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"shards": {}}


def key_of(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _checksum(features: Tensor) -> int:
    return zlib.crc32(features.contiguous().view(torch.uint8).numpy().reshape(-1))


def cache_folder(root: str, model: VLM, image_processor: Any) -> Path:
    """`root/HASH`: another tower, layer, preprocessing or precision has another folder."""
    config, state = model.config, model.model.vision_tower.state_dict()
    settings = [{name: value for name, value in part.to_dict().items() if name not in NOT_OF_FEATURES}
                for part in (config.vision_config, image_processor)]
    digest = hashlib.sha256(json.dumps([config.vision_feature_layer, config.vision_feature_select_strategy, *settings],
                                       sort_keys=True, default=str).encode())
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(str(state[name].dtype).encode())
        digest.update(state[name].cpu().contiguous().view(torch.uint8).numpy().reshape(-1))
    return Path(root) / digest.hexdigest()[:16]


@dataclass(frozen=True)
class _Picture:
    key: bytes
    size: tuple[int, int]  # height, width
    tiles: Tensor  # `[tiles, C, H, W]`, later `[tiles, P, D]`


class _Pictures(Dataset):
    """Sample n -> the pictures of it that are not in the cache; none that can't be read."""

    def __init__(self, samples: Sequence[dict[str, Any]], image_processor: Any, cache: FeatureCache):
        self.samples = samples
        self.image_processor = image_processor
        self.cache = cache

    def __getitem__(self, index: int) -> list[_Picture]:
        found = []
        for picture in pictures_of(self.samples[index]):
            try:
                data = picture_bytes(picture)
                key = key_of(data)
                if key not in self.cache:
                    image = open_rgb(data)
                    found.append(_Picture(key, (image.height, image.width), pixels_of(image, self.image_processor)))
            except OSError:
                continue  # the sample will be skipped, with the reason, when its turn comes
        return found


def pixels_of(picture: Image.Image, image_processor: Any) -> Tensor:
    """`[tiles, C, H, W]` of one picture: of several, transformers would fill up those of few tiles with black ones."""
    return image_processor(picture, return_tensors="pt")["pixel_values"].flatten(0, -4)


@torch.no_grad()
def fill(root: str, model: VLM, samples: Sequence[dict[str, Any]], image_processor: Any, workers: int,
         processes: Distributed) -> FeatureCache:
    """Computes the features that the cache lacks, each process for its share of the samples.

    Every process calls it before the model is handed to the engine; the tower is moved to the device meanwhile.

    Raises:
        UserError: see `FeatureCache`; the disk is full (what is written stays and is used).
    """
    folder = cache_folder(root, model, image_processor)
    lock = FileLock(folder.with_suffix(".lock"))  # runs that start together do not compute the same twice
    folder.mkdir(parents=True, exist_ok=True)
    processes.main_first(lambda: lock.acquire() and None)
    cache, tower = FeatureCache(folder), model.model.vision_tower
    bounds = [len(samples) * rank // processes.world_size for rank in (processes.rank, processes.rank + 1)]
    mine = range(*bounds)
    batches = [mine[start : start + CHUNK] for start in range(0, len(mine), CHUNK)]
    pictures = loader(_Pictures(samples, image_processor, cache), _flat, batches, workers)
    home = next(tower.parameters()).device
    tower.to(processes.device)
    shard: list[_Picture] = []
    size = 0
    seen: set[bytes] = set()
    for batch in progress(pictures, description="tower features", total=len(batches),
                          enabled=processes.is_main and len(batches) > 4):
        new = list({picture.key: picture for picture in batch if picture.key not in seen}.values())
        seen |= {picture.key for picture in new}
        for picture in _encode(model, new, processes.device):
            shard.append(picture)
            size += picture.tiles.nbytes
            if size > SHARD_BYTES:
                _write(folder, shard, processes.rank)
                shard, size = [], 0
    if shard:
        _write(folder, shard, processes.rank)
    tower.to(home)
    processes.barrier()
    lock.release()
    cache = FeatureCache(folder)
    if processes.is_main:
        print(f"feature_cache: {folder} has the features of {len(cache)} pictures", flush=True)
    return cache


def _flat(found: list[list[_Picture]]) -> list[_Picture]:
    return [picture for pictures in found for picture in pictures]


def _encode(model: VLM, pictures: list[_Picture], device: torch.device) -> Iterator[_Picture]:
    if not pictures:
        return
    tiles = torch.cat([picture.tiles for picture in pictures])
    features = torch.cat([tower_features(model, part.to(device))[0].cpu() for part in tiles.split(CHUNK)])
    for picture, part in zip(pictures, features.split([len(picture.tiles) for picture in pictures]), strict=True):
        yield replace(picture, tiles=part)


def _write(folder: Path, shard: list[_Picture], rank: int) -> None:
    keys = b"".join(picture.key for picture in shard)
    tensors = {
        "keys": torch.tensor(np.frombuffer(keys, np.uint8).reshape(len(shard), 32)),
        "sizes": torch.tensor([picture.size for picture in shard]),
        "starts": torch.tensor([0, *np.cumsum([len(picture.tiles) for picture in shard])]),
        "features": torch.cat([picture.tiles for picture in shard]),
        "checksums": torch.tensor([_checksum(picture.tiles) for picture in shard]),
    }
    with atomic_write(folder / f"{key_of(keys).hex()[:16]}-{rank}.safetensors", "wb") as stream:
        stream.write(safetensors.torch.save(tensors))
