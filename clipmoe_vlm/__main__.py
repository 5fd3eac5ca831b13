"""`python -m clipmoe_vlm convert SOURCE FOLDER [--top-k K] [--architecture NAME] [--to official]`."""

from __future__ import annotations

import argparse

from safetensors import SafetensorError

from .convert import SUPPORTED, convert
from .runs import fail, is_disk_full


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m clipmoe_vlm")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "convert", help="turn a CLIP or the published CLIP-MoE into a CLIP-MoE folder, or back",
        description=f"Turns SOURCE into a model folder for transformers, LLaVA and the programs here; {SUPPORTED}.",
    )
    command.add_argument("source", help="a folder, or a weights file")
    command.add_argument("target", metavar="FOLDER", help="folder to write; with --to official a file")
    command.add_argument("--top-k", type=int, help="experts per token, which an official state dict does not say")
    command.add_argument("--architecture", help="for an open_clip weights file: its name in open_clip, or a model.json")
    command.add_argument("--to", choices=["official"],
                         help="write the official CLIP-MoE state dict: .safetensors if the name ends so, else .pt")
    arguments = parser.parse_args()
    try:
        print(convert(arguments.source, arguments.target, arguments.top_k, arguments.architecture, arguments.to))
    except (ValueError, FileNotFoundError) as error:
        fail(str(error))
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error) and not isinstance(error, PermissionError):
            raise
        fail(f"cannot write {arguments.target}: {error}")


if __name__ == "__main__":
    main()
