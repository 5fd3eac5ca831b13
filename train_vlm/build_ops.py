"""Builds what DeepSpeed would otherwise compile during the first run: `python -m train_vlm.build_ops` (about a minute).

DeepSpeed's CPU processes share memory through a small C++ operator. It lies in the environment, under
`torch_extensions` (or in `TORCH_EXTENSIONS_DIR`). torch guards the build with a lock that dies with its holder, so
that a build which was killed is just done again.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import sysconfig
from pathlib import Path

OPERATOR = "deepspeed_shm_comm"


def prepare_deepspeed() -> None:
    """Imports DeepSpeed quietly, with its operators in the environment; builds the CPU operator if it is not there.

    Without a C++ compiler or Python's headers the operator is left out and processes talk through gloo alone.
    """
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    # Where the environment is not activated, its ninja is not on the path.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if _has_cuda() else "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None:  # a GPU, which needs no such operator
        return
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if shutil.which(os.environ.get("CXX", "g++")) is None or not headers.exists():
        deepspeed.ops.__compatible_ops__[OPERATOR] = False
        return
    if not (Path(os.environ["TORCH_EXTENSIONS_DIR"]) / OPERATOR / f"{OPERATOR}.so").exists():
        print("building DeepSpeed's CPU communication operator (once, about a minute) ...", flush=True)
    builder.load()


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    prepare_deepspeed()
