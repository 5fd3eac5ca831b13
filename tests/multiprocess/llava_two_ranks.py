"""Started by the deepspeed launcher: LLaVA's recorded runs on two processes, after one another in the same ones.

Arguments: the VLM folder to start from, the folder to write to; `RANK` and the like come from the launcher.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from llava_runs import follow, settings  # noqa: E402

from train_vlm.train import train  # noqa: E402

if __name__ == "__main__":
    start, output = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    for run in ("two_ranks", "two_ranks_grouped"):
        with pytest.MonkeyPatch.context() as monkeypatch:
            follow(monkeypatch, run)
            train(settings(f"{output}/{run}", vlm=start, micro_batch_size=2, max_steps=6, loss_normalization="llava"))
