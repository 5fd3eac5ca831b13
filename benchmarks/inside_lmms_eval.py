"""Answers questions by a model class of the real lmms-eval, in its environment; for benchmarks/eval_vlm.py.

Reads a job as JSON from the standard input; the last line of its output is `{"answers": ..., "seconds": ...}`.
"""

import json
import sys
import time
from pathlib import Path

import torch
from lmms_eval.api.instance import Instance

from clipmoe_vlm.pictures import open_rgb
from eval_vlm.models import load_vlm


def main() -> None:
    job = json.load(sys.stdin)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if job["ours"]:
        from eval_vlm.lmms import ClipmoeVlm

        model = ClipmoeVlm(job["model"], batch_size=16)
    else:
        from lmms_eval.models.simple.llava_hf import LlavaHf

        template = load_vlm(job["model"], torch.device("cpu"))[1].chat_template
        model = LlavaHf(job["model"], device=device, device_map=device, chat_template=template,
                        dtype="bfloat16" if device == "cuda" else "float32")
    questions = job["questions"]
    model.task_dict = {"pope": {"test": questions}}

    def visuals(question: dict) -> list:
        return [open_rgb(Path(job["images"]) / question["image"])]

    requests = [Instance("generate_until", (question["prompt"], {"max_new_tokens": job["tokens"], "temperature": 0},
                                            visuals, number, "pope", "test"), 0,
                         {"task": "pope", "doc_id": number, "repeats": 1})
                for number, question in enumerate(questions)]
    start = time.perf_counter()
    answers = model.generate_until(requests)
    seconds = time.perf_counter() - start
    texts = [getattr(answer, "text", answer).strip() for answer in answers]
    print(json.dumps({"answers": {question["id"]: text for question, text in zip(questions, texts, strict=True)},
                      "seconds": seconds}))


if __name__ == "__main__":
    main()
