"""Started by the deepspeed launcher: one training per ZeRO stage, in the same processes to save their start-up."""

import dataclasses
import sys

from clipmoe_vlm.runs import load_config
from train_vlm.config import VLMConfig
from train_vlm.train import train

if __name__ == "__main__":
    config = load_config(VLMConfig, sys.argv[1:], "zero_stages.py")
    for stage in (0, 1, 2, 3):
        train(dataclasses.replace(config, zero_stage=stage, output_dir=f"{config.output_dir}/zero{stage}"))
