"""Started by torchrun: all cases of the auxiliary loss under `Trainer` and `SFTTrainer`, one file a process."""

import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from aux_loss_case import run  # noqa: E402

CASES = list(itertools.product(("transformers", "trl"), (1, 4), ("routers", "experts")))

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    results = {case: run(*case, folder) for case in CASES}
    torch.save(results, folder / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
