"""Our VLMs as models of VLMEvalKit, which has no plugins: its run.py with their names put in.

    python -m eval_vlm.vlmevalkit VLMEvalKit/run.py NAME=FOLDER [NAME=FOLDER ...] -- --data POPE --model NAME

What stands after `--` goes to run.py. From code of your own: `register({"NAME": "FOLDER"})` before run.py's imports.
"""

from __future__ import annotations

import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

from clipmoe_vlm.runs import UserError, fail

USAGE = "python -m eval_vlm.vlmevalkit VLMEvalKit/run.py NAME=FOLDER [NAME=FOLDER ...] -- OPTIONS OF run.py"


def register(models: dict[str, str], **settings: Any) -> None:
    """Puts `models` (name -> VLM folder or name on the hub) into `vlmeval.config.supported_VLM`.

    Args:
        settings: `precision`, `max_new_tokens`.

    Raises:
        UserError: VLMEvalKit is not installed.
    """
    try:
        from vlmeval import config
    except ImportError as error:
        raise UserError(f"VLMEvalKit can't be imported ({error}); install it from its repository: pip install -e "
                        "VLMEvalKit") from error
    for name, folder in models.items():
        config.supported_VLM[name] = partial(make_model, folder, **settings)


def make_model(folder: str, precision: str = "auto", max_new_tokens: int = 1024, **_: Any) -> Any:
    """A `vlmeval.vlm.base.BaseModel` of a VLM folder; run.py's own settings (retries, verbosity) are for APIs."""
    from vlmeval.vlm.base import BaseModel

    from clipmoe_vlm.pictures import open_rgb
    from clipmoe_vlm.runs import init_distributed
    from eval_vlm.generate import Answerer
    from eval_vlm.models import find_folder, load_vlm

    class ClipmoeVlm(BaseModel):
        """One question about one picture at a time, as VLMEvalKit asks; of several pictures the first."""

        def __init__(self):
            super().__init__()
            model, processor = load_vlm(find_folder(folder), init_distributed().device, precision)
            self.answerer = Answerer(model, processor, 1, max_new_tokens)

        def generate_inner(self, message: list[dict], dataset: str | None = None) -> str:
            prompt, picture = self.message_to_promptimg(message, dataset=dataset)
            if picture is None:
                raise UserError(f"{dataset}: a question without a picture ({prompt[:60]!r}); clipmoe_vlm takes "
                                "questions about one picture")
            picture = picture if hasattr(picture, "convert") else open_rgb(Path(picture))
            record = {"id": 0, "image": "picture", "pil": picture.convert("RGB"), "prompt": prompt}
            (_, result), = self.answerer.answers([record], Path())
            return result["answer"]

    return ClipmoeVlm()


def main(arguments: list[str]) -> None:
    ours, found, theirs = (arguments[:arguments.index("--")], True, arguments[arguments.index("--") + 1:]) \
        if "--" in arguments else (arguments, False, [])
    models = dict(one.split("=", 1) for one in ours[1:] if "=" in one)
    if not found or not models or len(models) != len(ours) - 1:
        raise UserError(f"usage: {USAGE}")
    script = Path(ours[0])
    if not script.is_file():
        raise UserError(f"{script}: no such file; name run.py in your copy of VLMEvalKit")
    sys.path.insert(0, str(script.parent))
    register(models)
    sys.argv = [str(script), *theirs]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(str(error))
