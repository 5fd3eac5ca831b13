"""CLIP-MoE towers in the original LLaVA (1.5, NeXT), unmodified.

Importing this, before or after `llava`, is all that loading and generating need. To train, put the module in front of
LLaVA's script:

    python -m clipmoe_vlm.llava [--tower routers] llava/train/train_mem.py --vision_tower CLIP_MOE_FOLDER ...
    torchrun --nproc_per_node 8 -m clipmoe_vlm.llava llava/train/train_mem.py ...
    deepspeed --module clipmoe_vlm.llava llava/train/train_mem.py ...

Folders of a CLIP-MoE (`config.json` says so) become `CLIPMoEVisionTower`; every other tower stays LLaVA's own.
"""

from __future__ import annotations

import sys

from .patches import patch
from .settings import Settings, settings

__all__ = ["Settings", "patch", "settings"]

# As a command (argv[0] is '-m' while Python looks for its module) it reads its arguments before LLaVA's slow imports.
if not (sys.argv[:1] == ["-m"] and __name__ in sys.orig_argv):
    patch()
