"""The routers' auxiliary loss under Trainer and SFTTrainer in two processes (torchrun, gloo): as in our own loop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from aux_loss_case import BATCH, UPDATES, largest_difference, own_loop  # noqa: E402
from aux_loss_worker import CASES  # noqa: E402
from encoder_data import ROOT, environment  # noqa: E402


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What the two processes saw, by case."""
    folder = tmp_path_factory.mktemp("aux_loss")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([sys.executable, *launcher, "tests/multiprocess/aux_loss_worker.py", str(folder)], cwd=ROOT,
                          env=environment(), text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_updates_as_our_own_loop(ranks, case):
    first, second = (rank[case] for rank in ranks)
    _, accumulation, trained = case
    counts = [[(batch["labels"] != -100).sum().item() for batch in rank["batches"]] for rank in (first, second)]
    assert len(counts[0]) == UPDATES * accumulation and sum(counts[0]) != sum(counts[1])
    assert all(len(batch["pixel_values"]) == BATCH for batch in first["batches"] + second["batches"])
    expected = own_loop([first["batches"], second["batches"]], accumulation, trained)
    assert largest_difference(first, expected) < 1e-6
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
