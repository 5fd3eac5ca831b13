"""`deepspeed train_vlm/run.py CONFIG.yaml [key=value ...]`; for one process also `python -m train_vlm.run ...`."""

from __future__ import annotations

from clipmoe_vlm.runs import run_program
from clipmoe_vlm.sigterm import end_on_sigterm
from train_vlm.config import VLMConfig
from train_vlm.train import train

if __name__ == "__main__":
    end_on_sigterm()
    run_program(train, VLMConfig, "deepspeed train_vlm/run.py")
