"""Times VLM training on this machine: `python -m benchmarks.train_vlm [docs/performance.md] [key=value ...]`.

For stage 2 (language model and projector train) and stage 1 (the projector alone), on the same samples in one order:
(a) transformers' `LlavaForConditionalGeneration` under its `Trainer`, with a collator that pads;
(b) `train_vlm` as it is, and with one thing at a time done the plain way.

A measurement is a process of its own, so that its peak of memory is known; the variants take turns within every
repeat, each repeat beginning with another one, and ratios are taken within a repeat. Precision, AdamW, clipping,
threads, loader workers and logging are alike. Time is from the end of one update to the end of the next, data and
logging included. Keys: `llm`, `vision_tower`, `data`, `data_stage_1`, `image_folder` (default: what
`make demo SIZE=tiny LLM=smollm2` leaves), `template`, `batch`, `steps` (timed ones per
measurement; one more warms up), `repeats`, `workers`, `json` (a file for all single times).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.document import around_results, write_results
from benchmarks.encoder import processor_name
from clipmoe_vlm import CLIPMoEVisionModel
from clipmoe_vlm.runs import UserError, fail, write_json
from clipmoe_vlm.vlm import tokens_per_picture
from train_vlm import data as data_module
from train_vlm.chat import IGNORE_INDEX, ChatEncoder
from train_vlm.config import VLMConfig
from train_vlm.data import make_dataset
from train_vlm.loss import LabelLoss
from train_vlm.model import build
from train_vlm.sampler import BatchPlan
from train_vlm.samples import Samples, read_samples
from train_vlm.train import train
from train_vlm.tuning import set_trainable

SETTINGS: dict[str, Any] = {
    "llm": "runs/cache/smollm2", "vision_tower": "runs/demo_tiny_smollm2/encoder/dmu/model",
    "data": "runs/demo_tiny_smollm2/data/llava_stage2.json",
    "data_stage_1": "runs/demo_tiny_smollm2/data/llava_stage1.json", "image_folder": "runs/demo_tiny_smollm2/data",
    "template": "chat", "batch": 8, "steps": 2, "repeats": 3, "workers": 1, "json": "runs/benchmark_train_vlm.json"}
MARKS = ("<!-- results of benchmarks.train_vlm -->", "<!-- end of results of benchmarks.train_vlm -->")
OURS = "train_vlm"
VARIANTS = {  # by stage; what each does is in `run_ours` and `run_trainer`
    2: ("Trainer", OURS, "padding", "logits everywhere", "all blocks of the tower"),
    1: ("Trainer", OURS, "feature cache"),
}
TARGET = 1.5


# --- one measurement, in a process of its own -----------------------------------------------------------------------


class Clock:
    """Notes when updates end (every optimizer tells torch), in seconds of the wall and of this process's threads."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []
        register_optimizer_step_post_hook(self.tick)

    def tick(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append((time.perf_counter(), time.process_time()))

    def seconds(self) -> dict[str, list[float]]:
        """Without the first update, which warms up."""
        pairs = list(zip(self.ends, self.ends[1:], strict=False))
        return {"wall": [b[0] - a[0] for a, b in pairs], "cpu": [b[1] - a[1] for a, b in pairs]}


def config_of(values: dict[str, Any], stage: int, folder: str, **changes: Any) -> VLMConfig:
    return VLMConfig(
        output_dir=folder, data=values["data" if stage == 2 else "data_stage_1"], llm=values["llm"],
        vision_tower=values["vision_tower"], image_folder=values["image_folder"], template=values["template"],
        image_aspect_ratio="square", llm_tuning="full" if stage == 2 else "frozen", learning_rate=1e-5, max_length=512,
        precision="bf16" if torch.cuda.is_available() else "fp32", zero_stage=0, workers=values["workers"],
        global_batch_size=values["batch"], micro_batch_size=values["batch"], max_steps=values["steps"] + 1, **changes)


def run_ours(config: VLMConfig, variant: str) -> None:
    """train_vlm, with one thing done the plain way."""
    if variant == "padding":
        config.packing = False
    if variant == "feature cache":
        config.feature_cache = config.output_dir + ".features"
    if variant == "logits everywhere":
        data_module.labelled = everywhere
        LabelLoss.CHUNK = sys.maxsize
    if variant == "all blocks of the tower":
        forward = CLIPMoEVisionModel.forward
        CLIPMoEVisionModel.forward = lambda model, pixels, **_: forward(model, pixels, output_hidden_states=True)
    train(config)


def everywhere(labels: Tensor) -> tuple[Tensor, Tensor]:
    """All positions as if they were labelled; cross-entropy leaves out the others' targets."""
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    return torch.arange(len(following)), following


def run_trainer(config: VLMConfig) -> None:
    """What a user of transformers writes."""
    from transformers import Trainer, TrainingArguments

    config.packing = False
    model, processor = build(config)
    set_trainable(model, config)
    samples = samples_of(config, config.output_dir)
    dataset, _ = make_dataset(config, samples, model, processor)
    batches = BatchPlan(samples.lengths, config.micro_batch_size, 1, 1, config.group_by_modality_length,
                        config.seed).micro_batches(0, 0, config.max_steps)
    arguments = TrainingArguments(
        config.output_dir, per_device_train_batch_size=config.micro_batch_size, max_steps=config.max_steps,
        learning_rate=config.learning_rate, lr_scheduler_type="cosine", weight_decay=0.0, max_grad_norm=1.0,
        bf16=config.precision == "bf16", dataloader_num_workers=config.workers, remove_unused_columns=False,
        train_sampling_strategy="sequential", logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True)
    order = torch.utils.data.Subset(dataset, [index for batch in batches for index in batch])
    Trainer(model, arguments, train_dataset=order, data_collator=partial(pad, processor.tokenizer.pad_token_id)).train()


def pad(pad_token_id: int, items: list[dict[str, Any]]) -> dict[str, Tensor]:
    def rows(samples: list[Tensor], padding: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=padding)

    ids = [item["input_ids"] for item in items]
    return {"input_ids": rows(ids, pad_token_id), "labels": rows([item["labels"] for item in items], IGNORE_INDEX),
            "attention_mask": rows([torch.ones_like(sample) for sample in ids], 0),
            "pixel_values": torch.cat([item["pictures"] for item in items if "pictures" in item])}


def samples_of(config: VLMConfig, folder: str) -> Samples:
    return read_samples(config.data, config.image_folder, Path(folder) / "index")


def measure(values: dict[str, Any], stage: int, variant: str) -> dict[str, Any]:
    """Seconds per update and the peak of memory in GiB (on a GPU its own)."""
    multiprocessing.set_start_method("fork", force=True)  # the loader's workers see what was changed
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        config = config_of(values, stage, folder)
        if variant == "Trainer":
            run_trainer(config)
        else:
            run_ours(config, variant)
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated() / 2**30
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"stage": stage, "variant": variant, "memory": memory, **clock.seconds()}


# --- all of them -----------------------------------------------------------------------------------------------------


def measure_all(values: dict[str, Any]) -> list[dict[str, Any]]:
    kinds = [(stage, variant) for stage, variants in VARIANTS.items() for variant in variants]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.train_vlm"])  # a measurement begins with all imports done
    rows = []
    for repeat in range(values["repeats"]):
        first = repeat % len(kinds)
        for stage, variant in kinds[first:] + kinds[:first]:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                rows.append({"repeat": repeat, **pool.submit(measure, values, stage, variant).result()})
            print(f"stage {stage}, {variant}: {median(rows[-1]['wall']):.2f} s", file=sys.stderr, flush=True)
    return rows


def padding(values: dict[str, Any]) -> dict[str, float]:
    """Facts of stage 2's data that need no clock: labelled share, and tokens computed for each token of a sample."""
    config = config_of(values, 2, "unused", packing=False)
    model, processor = build(config)
    encoder, mark = ChatEncoder(processor.tokenizer, processor.chat_template), model.config.image_token_id
    lengths, labels = [], 0
    with tempfile.TemporaryDirectory() as folder:
        samples = list(samples_of(config, folder))
    for sample in samples:
        input_ids, own = encoder.encode(sample["conversations"])
        lengths.append(len(input_ids) + input_ids.count(mark) * (tokens_per_picture(model.config) - 1))
        labels += sum(label != IGNORE_INDEX for label in own)
    facts = {"labelled": labels / sum(lengths)}
    for name, grouped in (("random", False), ("grouped", True)):
        plan = BatchPlan(lengths, values["batch"], 4, 1, grouped, 0)
        batches = [batch for batch in plan.micro_batches(0, 0, plan.steps_per_epoch) if batch]
        facts[name] = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches) / sum(lengths)
    return facts


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: medians (ranges) over the repeats, and ratios within them."""
    def spread(values: list[float]) -> str:
        return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"

    def of(stage: int, variant: str, what: str) -> list[float]:
        found = [row for row in rows if (row["stage"], row["variant"]) == (stage, variant)]
        return [row[what] if what == "memory" else median(row[what])
                for row in sorted(found, key=lambda row: row["repeat"])]

    clocks = {"wall": "seconds per update"} | ({} if torch.cuda.is_available() else {"cpu": "CPU seconds"})
    lines = [f"| stage | | {' | '.join(f'{name} | / train_vlm' for name in clocks.values())} | peak memory, GiB |",
             f"|---|---|{'---:|' * (2 * len(clocks) + 1)}"]
    for stage, variants in VARIANTS.items():
        for variant in variants:
            cells = []
            for clock in clocks:
                ours = of(stage, OURS, clock)
                cells += [spread(of(stage, variant, clock)), spread([
                    a / b for a, b in zip(of(stage, variant, clock), ours, strict=True)])]
            cells.append(f"{median(of(stage, variant, 'memory')):.1f}")
            lines.append(f"| {stage} | {variant} | {' | '.join(cells)} |")
    ratio = median(a / b for a, b in zip(of(2, "Trainer", "wall"), of(2, OURS, "wall"), strict=True))
    return [*lines, "", f"Stage 2, Trainer / train_vlm: {ratio:.2f}; at least {TARGET:.2f}: "
            f"{'met' if ratio >= TARGET else 'missed'}."]


def report(values: dict[str, Any], rows: list[dict[str, Any]], facts: dict[str, float]) -> str:
    if torch.cuda.is_available():
        machine = f"{torch.cuda.get_device_name()}, bfloat16"
    else:
        machine = f"{processor_name()}, {torch.get_num_threads()} thread(s), float32"
    about = (
        f"{machine}, torch {torch.__version__}. {Path(values['llm']).name}, {Path(values['data']).name}; batches of "
        f"{values['batch']}, {values['steps']} updates timed in each of {values['repeats']} repeats. "
        f"{facts['labelled']:.0%} of stage 2's tokens have a label. Padded batches compute {facts['random']:.2f} "
        f"tokens per token of a sample in random order, {facts['grouped']:.2f} grouped by length as LLaVA does; packed "
        "rows compute 1.")
    return "\n".join([textwrap.fill(about, 120), "", *table(rows)])


def read(arguments: list[str]) -> tuple[dict[str, Any], Path | None]:
    values, document = dict(SETTINGS), None
    for argument in arguments:
        key, _, value = argument.partition("=")
        if isinstance(values.get(key), str) and value:
            values[key] = value
        elif key in values and value.isdecimal() and (int(value) or key == "workers"):
            values[key] = int(value)
        elif argument.endswith(".md"):
            document = Path(argument)
        else:
            raise UserError(f"'{argument}' is not a document (.md) or one of {', '.join(f'{k}=...' for k in values)}")
    return values, document


def main(arguments: list[str]) -> None:
    values, document = read(arguments)
    if document:
        around_results(document, MARKS)  # told before the work
    facts, rows = padding(values), measure_all(values)
    text = report(values, rows, facts)
    print(text)
    write_json(values["json"], {**values, "torch": torch.__version__, **facts, "measurements": rows})
    if document:
        write_results(document, MARKS, text)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(str(error))
