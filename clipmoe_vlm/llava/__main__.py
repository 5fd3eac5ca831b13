"""`python -m clipmoe_vlm.llava [options] SCRIPT.py|MODULE [its arguments]`: a script of LLaVA's with our towers."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import runpy
import sys
from pathlib import Path

from ..runs import fail
from ..tuning import TOWER_TUNING
from . import Settings, patch, settings


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m clipmoe_vlm.llava", allow_abbrev=False,
        description="Runs a script or module of LLaVA's, unmodified, in which CLIP-MoE folders serve as vision towers.")
    parser.add_argument("--tower", choices=TOWER_TUNING, help="what of the tower trains (default: as LLaVA's own "
                        "arguments say: nothing, but for LLaVA-NeXT's that unfreeze it)")
    parser.add_argument("--tower_last_n", type=int, default=Settings.tower_last_n,
                        help="blocks, for --tower last_n (default: %(default)s)")
    parser.add_argument("--tower_learning_rate", type=float, help="default: as LLaVA's own arguments say")
    parser.add_argument("--router_aux_loss_coef", type=float, default=Settings.router_aux_loss_coef,
                        help="weight of the routers' auxiliary loss, if they train (default: %(default)s)")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher puts it in front of the script
    parser.add_argument("script", help="a .py file, or a module such as llava.train.train_mem")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="handed on to it")
    values = parser.parse_args()
    for field in dataclasses.fields(Settings):
        setattr(settings, field.name, getattr(values, field.name))
    is_file = values.script.endswith(".py")
    if is_file and not os.path.isfile(values.script):
        fail(f"{values.script}: no such file")
    try:
        patch()
    except ImportError as error:
        fail(str(error))
    rank = [] if values.local_rank is None else [f"--local_rank={values.local_rank}"]
    sys.argv = [values.script, *rank, *values.arguments]
    if is_file:
        sys.path.insert(0, str(Path(values.script).resolve().parent))  # as `python SCRIPT.py` does
        runpy.run_path(values.script, run_name="__main__")
    elif _is_module(values.script):
        runpy.run_module(values.script, run_name="__main__", alter_sys=True)
    else:
        fail(f"{values.script}: neither a .py file nor a module")


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(f"{error.name}."):
            raise  # something that one of its packages needs
        return False


if __name__ == "__main__":
    main()
