"""What the programs' plans of a run share: what a GPU can do, and how a plan is asked for."""

from __future__ import annotations

import argparse

from .runs import UserError

A100_TFLOPS = 312.0  # dense bfloat16, as its data sheet says
GPU_OVERHEAD = 2**30  # bytes of CUDA's context and the libraries' workspaces


def plan_parser(program: str, description: str, utilisation: float, source: str) -> argparse.ArgumentParser:
    """The options that every plan has.

    Args:
        utilisation: the default share of a GPU's FLOPs that training reaches.
        source: where that comes from.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description,
                                     usage="%(prog)s CONFIG.yaml [key=value ...] [options]")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--tflops", type=float, default=A100_TFLOPS, help="of a GPU, bfloat16 (default: A100's 312)")
    parser.add_argument("--utilisation", type=float, default=utilisation,
                        help=f"default: {utilisation:g}, {source}")
    return parser


def read_options(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the arguments that are none.

    Raises:
        UserError: a number that is not above 0.
    """
    options, others = parser.parse_known_args(arguments)
    for name, value in vars(options).items():
        if isinstance(value, (int, float)) and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0")
    return options, others


def hours(flops: float, gpus: int, tflops: float, utilisation: float) -> float:
    """Args:
        tflops: what one GPU can do, in 10^12 FLOPs per second.
        utilisation: the share of that which training reaches.
    """
    return flops / (gpus * tflops * 1e12 * utilisation * 3600)
