"""Our VLMs as a model of lmms-eval: `lmms_eval --model clipmoe_vlm --model_args pretrained=FOLDER --tasks pope`.

lmms-eval finds it by the entry point `lmms_eval.models` of this package; nothing else is needed but to install both.
docs/harnesses.md says what differs from `python -m eval_vlm.run`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from clipmoe_vlm.runs import UserError, init_distributed, progress
from eval_vlm.generate import Answerer
from eval_vlm.models import find_folder, load_vlm

PICTURE_MARK = "<image>"
AT_ONCE = 1024  # requests whose pictures are in memory together; those about one picture share its prefix


def manifest() -> ModelManifest:
    """What the entry point hands to lmms-eval."""
    return ModelManifest("clipmoe_vlm", simple_class_path="eval_vlm.lmms.ClipmoeVlm")


class ClipmoeVlm(lmms):
    """Answers of a VLM folder, greedy, several questions at once.

    Args:
        pretrained: a VLM folder or its name on the hub, as eval_vlm.run's `model`.
        batch_size: questions at once (lmms-eval's --batch_size); changes no answer.
        device: not used; the GPU of this process, or the CPU.
        precision: as eval_vlm.run's.

    Raises:
        UserError: the folder is no VLM.
    """

    def __init__(self, pretrained: str, batch_size: int | str = 16, device: str | None = None,
                 precision: str = "auto", **unknown: Any):
        super().__init__()
        if unknown:
            raise UserError(f"clipmoe_vlm has no {', '.join(unknown)}; its model_args are pretrained and precision")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"--batch_size {batch_size}: clipmoe_vlm takes a positive number, such as 16")
        place = init_distributed()
        self._rank, self._world_size, self.device = place.rank, place.world_size, place.device
        model, processor = load_vlm(find_folder(pretrained), place.device, precision)
        self.answerer = Answerer(model, processor, int(batch_size))

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of the requests; a stop string of the task ends an answer.

        Raises:
            UserError: sampling or beams are asked for, or not exactly one picture.
        """
        answers: list[str] = [""] * len(requests)
        settings = [self._settings(request.args[1], request.task_name) for request in requests]
        with progress(description="clipmoe_vlm", total=len(requests), enabled=self.rank == 0) as bar:
            for chosen in dict.fromkeys(settings):
                numbers = [number for number, one in enumerate(settings) if one == chosen]
                self.answerer.max_new_tokens, stops = chosen
                for start in range(0, len(numbers), AT_ONCE):
                    records = list(self._records(requests, numbers[start:start + AT_ONCE]))
                    for record, result in self.answerer.answers(records, Path()):
                        answers[record["id"]] = cut_at(result["answer"], stops)
                        bar.update()
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args[:2], answer)
        return answers

    @staticmethod
    def _settings(arguments: dict[str, Any], task: str) -> tuple[int, tuple[str, ...]]:
        """max_new_tokens and the stop strings."""
        if arguments.get("do_sample") or (arguments.get("temperature") or 0) > 0 or \
                (arguments.get("num_beams") or 1) > 1:
            raise UserError(f"task {task} asks for sampling or beams, clipmoe_vlm answers greedily; give lmms-eval "
                            "--gen_kwargs do_sample=False,temperature=0,num_beams=1")
        until = arguments.get("until") or ()
        return int(arguments.get("max_new_tokens", 1024)), (until,) if isinstance(until, str) else tuple(until)

    def _records(self, requests: list[Instance], numbers: list[int]) -> Iterator[dict]:
        for number in numbers:
            context, _, doc_to_visual, doc_id, task, split = requests[number].args
            pictures = doc_to_visual(self.task_dict[task][split][doc_id])
            if len(pictures) != 1 or not isinstance(pictures[0], Image.Image):
                raise UserError(f"task {task}, document {doc_id}: clipmoe_vlm takes questions about one picture, this "
                                f"one has {len(pictures)}{'' if pictures else ' (a text alone)'}; leave the task out")
            picture = pictures[0].convert("RGB")
            name = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()
            yield {"id": number, "image": name, "pil": picture, "prompt": context.replace(PICTURE_MARK, "").strip()}

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise UserError("clipmoe_vlm answers in words; choose the variant of the task that generates")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise UserError("clipmoe_vlm answers single questions; leave out tasks of several rounds")


def cut_at(answer: str, stops: tuple[str, ...]) -> str:
    """The part before the first of the stop strings."""
    for stop in stops:
        answer = answer.split(stop)[0] if stop else answer
    return answer
