"""Answers of the model while it trains: whether it has learnt to answer at all shows long before any score."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import BatchFeature, LlavaNextProcessor, LlavaProcessor

from clipmoe_vlm.chat_templates import IMAGE_TOKEN
from train_vlm.data import ConversationDataset
from train_vlm.index import pictures_of
from train_vlm.samples import read_picture

if TYPE_CHECKING:
    from train_vlm.train import Run

MAX_NEW_TOKENS = 64


@dataclass
class Question:
    """A sample up to its first answer."""

    id: str
    pictures: list[str]
    text: str  # of the turn before the answer, without picture marks
    expected: str
    inputs: BatchFeature  # of `generate`, made by the processor as in inference


def choose_questions(dataset: ConversationDataset, processor: LlavaProcessor | LlavaNextProcessor,
                     count: int) -> list[Question]:
    """Up to `count` usable samples, from all over the data."""
    stride = max(1, len(dataset) // count)
    questions: list[Question] = []
    for index in (index for start in range(stride) for index in range(start, len(dataset), stride)):
        if len(questions) == count:
            break
        if "problem" not in dataset[index]:
            questions.append(to_question(dataset, processor, index))
    return questions


def to_question(dataset: ConversationDataset, processor: LlavaProcessor | LlavaNextProcessor,
                index: int) -> Question:
    """Sample `index` of `dataset`, which must be usable."""
    sample = dataset.samples[index]
    turns = sample["conversations"]
    human = next(n for n, turn in enumerate(turns) if turn["from"] == "human")
    first = next(n for n, turn in enumerate(turns) if turn["from"] == "gpt" and n > human)
    asked = turns[:first]
    pictures = pictures_of(sample)[:sum(turn["value"].count(IMAGE_TOKEN) for turn in asked)]
    images = [read_picture(picture) for picture in pictures]
    inputs = processor(text=dataset.encoder.prompt(asked), images=images or None, return_tensors="pt")
    names = [str(picture.get("path")) if isinstance(picture, dict) else picture for picture in pictures]
    return Question(str(sample.get("id", index)), names, asked[-1]["value"].replace(IMAGE_TOKEN, "").strip(),
                    turns[first]["value"], inputs)


def answer(run: Run, question: Question) -> str:
    """A greedy answer of the model as it stands; every process gives it, in evaluation mode.

    Under ZeRO-3 all processes take part in every token, so all of them answer the same questions.
    """
    model, tokenizer = run.model, run.processor.tokenizer
    zero3 = run.config.zero_stage == 3
    with head_gathered(model.lm_head) if zero3 else contextlib.nullcontext():
        output = model.generate(**question.inputs.to(run.processes.device, model.dtype), do_sample=False,
                                max_new_tokens=MAX_NEW_TOKENS, synced_gpus=zero3 and run.processes.world_size > 1)
    return tokenizer.decode(output[0, question.inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()


@contextlib.contextmanager
def head_gathered(head: nn.Module) -> Iterator[None]:
    """Under ZeRO-3 only the loss (`LabelLoss`) puts the head's weight together; generation calls the head itself."""
    import deepspeed

    gathered: list[Any] = []

    def before(*_: Any) -> None:
        gathered.append(deepspeed.zero.GatheredParameters(list(head.parameters())))
        gathered[-1].__enter__()

    def after(*_: Any) -> None:
        gathered.pop().__exit__(None, None, None)

    hooks = [head.register_forward_pre_hook(before), head.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
