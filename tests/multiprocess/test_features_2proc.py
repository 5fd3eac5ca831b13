"""Two processes (gloo) write the very shards that one process writes, and go on where one was stopped."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from clipmoe_vlm.runs import Distributed
from train_encoder import features

sys.path.insert(0, str(Path(__file__).parent.parent))
from test_train_encoder_mcl import encode_items  # noqa: E402


def work(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    features.CHUNK, features.SHARD = 4, 16
    sentences = encode_items(folder / "two", 43, distributed=Distributed(rank, 2, torch.device("cpu")))
    (folder / f"errors_{rank}").write_text("\n".join(sentences))
    torch.distributed.destroy_process_group()


def test_two_processes_make_the_same_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 4)
    monkeypatch.setattr(features, "SHARD", 16)
    sentences = encode_items(tmp_path / "one", 43)
    encode_items(tmp_path / "two", 43)
    for shard in ("00001.npy", "00002.npy"):
        (tmp_path / "two" / shard).unlink()
    torch.multiprocessing.spawn(work, (tmp_path,), nprocs=2)
    assert {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "two").iterdir()}
    assert all((tmp_path / f"errors_{rank}").read_text() == "\n".join(sentences) for rank in range(2))
