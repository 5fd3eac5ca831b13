"""`python -m clipmoe_vlm convert SOURCE FOLDER [--top-k K] [--architecture NAME] [--image-size N]
[--to official]` and
`python -m clipmoe_vlm convert-vlm SOURCE FOLDER [--base FOLDER] [--tower FOLDER] [--template NAME] [--to llava]`."""

from __future__ import annotations

import argparse
from functools import partial

from safetensors import SafetensorError

from .convert import SUPPORTED, convert
from .llava_layout import convert_vlm
from .runs import UserError, fail, is_disk_full


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
    command.add_argument("--image-size", type=int, metavar="N", help="make it a model for pictures of N px (a multiple "
                         "of the patch size): positions are interpolated, the image processor is set to N")
    command = commands.add_parser(
        "convert-vlm", help="turn a checkpoint of LLaVA's into a VLM of transformers', or back",
        description="Turns a checkpoint of LLaVA's (whole, stage 1, or LoRA) into a folder for transformers' "
                    "LlavaForConditionalGeneration, or with --to llava such a folder into one that LLaVA loads.",
    )
    command.add_argument("source", help="the output folder of a LLaVA training; with --to llava a VLM of transformers'")
    command.add_argument("target", metavar="FOLDER", help="folder to write")
    command.add_argument("--base", metavar="FOLDER", help="the language model that a stage 1 or LoRA was trained on")
    command.add_argument("--tower", metavar="FOLDER",
                         help="the vision tower, if it is not where config.json's mm_vision_tower says")
    command.add_argument("--template", choices=["plain", "v1", "chat"],
                         help="the conversations' format: LLaVA's plain (default for a stage 1) or v1 (default for "
                              "others), or the tokenizer's own")
    command.add_argument("--to", choices=["llava"], help="write LLaVA's layout")
    arguments = vars(parser.parse_args())
    command = arguments.pop("command")
    try:
        if command == "convert":
            print(convert(**arguments))
        else:
            convert_vlm(**arguments, say=partial(print, flush=True))
    except (ValueError, FileNotFoundError, UserError) as error:
        fail(str(error))
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error) and not isinstance(error, PermissionError):
            raise
        fail(f"cannot write {arguments['target']}: {error}")


if __name__ == "__main__":
    main()
