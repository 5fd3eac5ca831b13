"""Times answering POPE: `python -m benchmarks.eval_vlm [docs/performance.md] [key=value ...]`.

On the same questions of the same model, in turn within every repeat, without loading:
(a) transformers' `generate`, one question at a time, as a user writes it;
(b) eval_vlm's `Answerer` with batches of several sizes, and with `answering: yes_no`;
(c) lmms-eval's own `llava_hf` (which takes batches of one only) and our model there, both inside the real package, in
    the environment that `make test-hosts HOSTS=lmms-eval` makes; left out where it is not there.

Keys: `model`, `questions_dir`, `image_folder` (default: what `make demo` leaves), `pictures` (all their questions are
asked), `prompt_suffix` (default: none, as the demo's model was trained), `repeats`, `max_new_tokens`, `lmms_python`,
`json` (a file for all single times).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.document import around_results, write_results
from benchmarks.encoder import processor_name
from clipmoe_vlm.pictures import open_rgb
from clipmoe_vlm.runs import UserError, fail, init_distributed, write_json
from eval_vlm.config import PopeConfig
from eval_vlm.generate import Answerer
from eval_vlm.models import load_vlm
from eval_vlm.suites import pope

SETTINGS: dict[str, Any] = {
    "model": "runs/demo/vlm/clipmoe/stage_2/model", "questions_dir": "runs/demo/data/pope",
    "image_folder": "runs/demo/data/images/test", "pictures": 40, "prompt_suffix": "", "repeats": 3,
    "max_new_tokens": 16,
    "lmms_python": ".venv-hosts/lmms-eval/bin/python", "json": "runs/benchmark_eval_vlm.json"}
MARKS = ("<!-- results of benchmarks.eval_vlm -->", "<!-- end of results of benchmarks.eval_vlm -->")
ONE_BY_ONE, OURS, LMMS = "generate, one by one", "eval_vlm, batches of 16", "lmms-eval's llava_hf"
BATCHES = {"eval_vlm, batches of 1": 1, "eval_vlm, batches of 4": 4, OURS: 16, "eval_vlm, batches of 64": 64}
YES_NO, OURS_THERE = "eval_vlm, yes or no by logits", "clipmoe_vlm inside lmms-eval"
TARGET = 4.0


def one_by_one(model: Any, processor: Any, records: list[dict], folder: Path, tokens: int) -> dict[str, str]:
    """What a user of transformers writes."""
    answers = {}
    for record in records:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": record["prompt"]}]}]
        inputs = processor(text=processor.apply_chat_template(chat, add_generation_prompt=True),
                           images=open_rgb(folder / record["image"]), return_tensors="pt").to(model.device, model.dtype)
        with torch.inference_mode():
            out = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
        new = out[0, inputs["input_ids"].shape[1]:]
        answers[record["id"]] = processor.decode(new, skip_special_tokens=True).strip()
    return answers


def ours(model: Any, processor: Any, records: list[dict], folder: Path, tokens: int, batch_size: int,
         answering: str = "generate") -> dict[str, str]:
    answerer = Answerer(model, processor, batch_size, tokens, answering)
    return {record["id"]: result["answer"] for record, result in answerer.answers(records, folder)}


def inside_lmms_eval(values: dict[str, Any], name: str, records: list[dict]) -> tuple[dict[str, str], float]:
    """The answers, and the seconds of `generate_until`, of a process in lmms-eval's environment."""
    job = {"model": values["model"], "images": values["image_folder"], "tokens": values["max_new_tokens"],
           "ours": name == OURS_THERE,
           "questions": [{key: record[key] for key in ("id", "image", "prompt")} for record in records]}
    process = subprocess.run([values["lmms_python"], "-m", "benchmarks.inside_lmms_eval"], input=json.dumps(job),
                             capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if process.returncode:
        raise UserError(f"{values['lmms_python']} -m benchmarks.inside_lmms_eval failed: "
                        f"{process.stderr.strip()[-600:]}")
    result = json.loads(process.stdout.splitlines()[-1])
    return result["answers"], result["seconds"]


def measure(values: dict[str, Any]) -> tuple[dict[str, list[float]], dict[str, dict[str, str]], int]:
    """Per variant the seconds of each repeat, its answers, and how many questions there are."""
    place = init_distributed()
    records = pope.load(PopeConfig(values["questions_dir"], values["image_folder"]))[0]
    for record in records:
        record["prompt"] = pope.prompt(record, values["prompt_suffix"])
    chosen = set(list(dict.fromkeys(record["image"] for record in records))[:values["pictures"]])
    records = [record for record in records if record["image"] in chosen]
    folder = Path(values["image_folder"])
    loaded = load_vlm(values["model"], place.device)
    arguments = (records, folder, values["max_new_tokens"])
    variants = {ONE_BY_ONE: lambda: one_by_one(*loaded, *arguments),
                **{name: lambda size=size: ours(*loaded, *arguments, size) for name, size in BATCHES.items()},
                YES_NO: lambda: ours(*loaded, *arguments, 16, "yes_no")}
    names = list(variants) + ([LMMS, OURS_THERE] if Path(values["lmms_python"]).is_file() else [])
    ours(*loaded, records[:32], folder, 2, 16)  # warms up
    seconds: dict[str, list[float]] = {name: [] for name in names}
    answers: dict[str, dict[str, str]] = {}
    for repeat in range(values["repeats"]):
        for name in names[repeat % len(names):] + names[:repeat % len(names)]:
            if name in variants:
                start = time.perf_counter()
                answers[name] = variants[name]()
                taken = time.perf_counter() - start
            else:
                answers[name], taken = inside_lmms_eval(values, name, records)
            seconds[name].append(taken)
            print(f"repeat {repeat + 1}: {name}: {len(records) / taken:.1f} questions a second", flush=True)
    return seconds, answers, len(records)


def spread(numbers: list[float], places: int = 1) -> str:
    return f"{median(numbers):.{places}f} ({min(numbers):.{places}f}-{max(numbers):.{places}f})"


def report(values: dict[str, Any], seconds: dict[str, list[float]], answers: dict[str, dict[str, str]], count: int
           ) -> str:
    device = torch.cuda.get_device_name() + ", bfloat16" if torch.cuda.is_available() else \
        f"{processor_name()}, {torch.get_num_threads()} threads, float32"
    lines = [f"{device}, torch {torch.__version__}. {count} POPE questions about {values['pictures']} pictures, "
             f"{values['repeats']} repeats: median (range).", "",
             "| | questions a second | as fast as one by one | answers that differ from it |", "|---|---:|---:|---:|"]
    for name, taken in seconds.items():
        ratios = [base / own for base, own in zip(seconds[ONE_BY_ONE], taken, strict=True)]
        different = sum(answers[name][question] != answer for question, answer in answers[ONE_BY_ONE].items())
        lines.append(f"| {name} | {spread([count / one for one in taken])} | {spread(ratios, 2)} | {different} |")
    ratio = median(base / own for base, own in zip(seconds[ONE_BY_ONE], seconds[OURS], strict=True))
    lines += ["", f"Target: batches of 16 at least {TARGET:g} times as fast as one by one: "
              f"{'met' if ratio >= TARGET else 'missed'} ({ratio:.2f})."]
    if LMMS in seconds:
        ahead = [theirs / own for theirs, own in zip(seconds[LMMS], seconds[OURS], strict=True)]
        lines.append(f"Target: ahead of lmms-eval: {'met' if median(ahead) > 1 else 'missed'} "
                     f"({spread(ahead, 2)} times as fast).")
    return "\n".join(lines)


def read(arguments: list[str]) -> tuple[dict[str, Any], Path | None]:
    values, document = dict(SETTINGS), None
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in values:
            values[key] = type(values[key])(value)
        elif argument.endswith(".md"):
            document = Path(argument)
        else:
            raise UserError(f"'{argument}' is not a document (.md) or one of {', '.join(f'{k}=...' for k in values)}")
    return values, document


def main(arguments: list[str]) -> None:
    values, document = read(arguments)
    if document:
        around_results(document, MARKS)  # told before the work
    seconds, answers, count = measure(values)
    text = report(values, seconds, answers, count)
    print(text)
    write_json(values["json"], {**values, "torch": torch.__version__, "questions": count, "seconds": seconds})
    if document:
        write_results(document, MARKS, text)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(str(error))
