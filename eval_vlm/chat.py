"""Talk with a VLM about a picture: `python -m eval_vlm.chat FOLDER [FOLDER2] [--image FILE] [--web]`.

In the terminal a line is a question, or one of the commands that /help lists; two folders answer one after the other.
`--web` opens a page instead. Questions may also come through a pipe.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from clipmoe_vlm.runs import UserError, fail

if TYPE_CHECKING:
    from eval_vlm.conversation import ChatModel, Conversation

HELP = """/image FILE     another picture, and a new conversation
/reset          a new conversation about the same picture
/routing FILE   writes the routing map of the picture (PNG); a number after it names the block
/quit           ends, as Ctrl-D does; Ctrl-C stops an answer"""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; python -m eval_vlm.chat --help lists the options")


def arguments_of(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m eval_vlm.chat", description="Talk with one VLM, or two side by side.")
    parser.add_argument("folder", help="a VLM folder, or its name on the hub")
    parser.add_argument("second", nargs="?", help="another one, to compare")
    parser.add_argument("--image", help="the picture to begin with")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--web", action="store_true", help="a page in the browser instead of the terminal")
    parser.add_argument("--host", default="127.0.0.1", help="--web: the address to listen on (default: this machine)")
    parser.add_argument("--port", type=int, default=7860, help="--web: 0 takes a free one")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = arguments_of(arguments)
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {options.max_new_tokens} is less than 1")
    picture = open_picture(options.image) if options.image else None
    if options.web:
        from eval_vlm.web import check_gradio, serve

        check_gradio()
    from eval_vlm.conversation import ChatModel

    models = [ChatModel(folder, options.precision, options.max_new_tokens)
              for folder in (options.folder, options.second) if folder]
    if options.web:
        serve(models, picture, options.host, options.port)
    else:
        Terminal(models, picture).run(sys.stdin)


def open_picture(file: str):
    """Raises:
        UserError: no picture that can be read.
    """
    from clipmoe_vlm.pictures import open_rgb

    try:
        return open_rgb(Path(file).expanduser())
    except OSError as error:
        raise UserError(f"{file}: no picture that can be read ({error})") from error


class Terminal:
    """Questions from a stream, answers to the terminal as they come."""

    def __init__(self, models: list[ChatModel], picture=None):
        from rich.console import Console

        self.models, self.picture = models, picture
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self.conversations = self.new()

    def new(self) -> list[Conversation]:
        from eval_vlm.conversation import Conversation

        return [Conversation(self.picture) for _ in self.models]

    def run(self, stream) -> None:
        about = "a picture" if self.picture else "no picture yet (/image FILE)"
        self.console.print(f"{' and '.join(model.folder for model in self.models)}: ask about {about}; /help")
        for line in self.lines(stream):
            try:
                if line.strip() == "/quit":
                    return
                if line.startswith("/"):
                    self.command(*line.strip().split(maxsplit=1))
                elif line.strip():
                    self.ask(line.strip())
            except UserError as error:
                self.console.print(str(error), style="red")
            except RuntimeError as error:  # such as too little memory
                self.console.print(f"the model failed: {str(error).splitlines()[0]}; /reset begins anew", style="red")

    def lines(self, stream) -> Iterator[str]:
        """Lines until the end of the input; at a terminal with a prompt and an editable line."""
        if not stream.isatty():
            yield from stream
            return
        try:
            import readline  # noqa: F401  (input() then edits and remembers lines)
        except ImportError:
            pass
        while True:
            try:
                yield input("> ")
            except EOFError:
                self.console.print()
                return
            except KeyboardInterrupt:
                self.console.print("\n/quit ends")

    def command(self, name: str, rest: str = "") -> None:
        if name == "/help":
            self.console.print(HELP)
        elif name == "/reset":
            self.conversations = self.new()
        elif name == "/image" and rest:
            self.picture = open_picture(rest)
            self.conversations = self.new()
        elif name == "/routing" and rest:
            self.write_routing(rest)
        else:
            raise UserError(f"{name}: no such command, or something is missing after it; /help lists them")

    def ask(self, question: str) -> None:
        for model, conversation in zip(self.models, self.conversations, strict=True):
            if len(self.models) > 1:
                self.console.print(f"{model.name}: ", end="", style="bold")
            stop = threading.Event()
            pieces = model.answer(conversation, question, stop)
            while True:
                try:
                    piece = next(pieces, None)
                except KeyboardInterrupt:
                    stop.set()
                    pieces.close()
                    break
                if piece is None:
                    break
                self.console.print(printable(piece), end="")
                self.console.file.flush()
            self.console.print()

    def write_routing(self, rest: str) -> None:
        from eval_vlm import routing_map

        words = rest.rsplit(maxsplit=1)
        layer = int(words[1]) if len(words) == 2 and words[1].isdecimal() else None
        file = Path(words[0] if layer is not None else rest)
        for number, (model, conversation) in enumerate(zip(self.models, self.conversations, strict=True)):
            row = conversation.routing
            if row is None:
                self.console.print(f"{model.name}: no routing to draw: the tower has no experts, or nothing was asked "
                                   "about a picture yet")
                continue
            layers = routing_map.layers_of(row)
            if layer is not None and layer not in layers:
                raise UserError(f"block {layer} has no experts; those that have: {', '.join(map(str, layers))}")
            target = file if len(self.models) == 1 else file.with_name(f"{file.stem}_{number + 1}{file.suffix}")
            try:
                routing_map.draw(conversation.seen, row, layers[-1] if layer is None else layer).save(target)
            except (OSError, ValueError) as error:
                raise UserError(f"{target} can't be written ({error}); name a file ending with .png") from error
            self.console.print(f"wrote {target}")


def printable(text: str) -> str:
    """Without control characters, which a terminal would obey."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(str(error))
