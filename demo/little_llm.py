"""`python -m demo.little_llm DATA FOLDER`: a language model small enough to be taught to read on two cores.

A BPE tokenizer and a Llama, both trained on the text of the training scenes alone: maps of words, their descriptions,
and questions about them. It never sees a picture, so that what a VLM made of it says about pictures comes from its
tower. Killed, it goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from clipmoe_vlm.runs import (
    Metrics,
    UserError,
    fail,
    load_checkpoint,
    progress,
    save_checkpoint,
    set_seed,
    write_json,
)

PAD, END, QUESTION, ANSWER, UNKNOWN = "<pad>", "</s>", "<q>", "<a>", "<unk>"
# Short, because every token counts on two cores.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<q>' + message['content'] if message['role'] == 'user' else '<a>' + message['content'] + '</s>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<a>' -}}{%- endif -%}"
)
HELD_OUT = 200  # conversations that are not trained on, to measure with
CHECKPOINT_EVERY = 100  # steps
IGNORED = -100  # label of what is not learned


@dataclass(frozen=True)
class Settings:
    vocabulary: int = 800
    width: int = 128
    layers: int = 4
    heads: int = 4
    steps: int = 2000
    batch_size: int = 16
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    seed: int = 0


def read_conversations(file: Path) -> list[list[dict]]:
    try:
        return [row["conversations"] for row in json.loads(file.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; make the data with python -m demo.data") from None


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Only the bytes that occur get an entry: 256 of them would leave little room for words.
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False,
                                  special_tokens=[PAD, END, QUESTION, ANSWER, UNKNOWN])
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN,
                                   extra_special_tokens=[QUESTION, ANSWER], chat_template=CHAT_TEMPLATE,
                                   padding_side="left", clean_up_tokenization_spaces=False)


def encode(tokenizer: PreTrainedTokenizerFast, conversation: list[dict]) -> tuple[list[int], list[int]]:
    """Token ids, and labels of the same length: the answers and what ends them are learned."""
    ids: list[int] = []
    labels: list[int] = []
    texts = [f"{ANSWER}{turn['value']}{END}" if turn["from"] == "gpt" else QUESTION + turn["value"]
             for turn in conversation]
    for turn, tokens in zip(conversation, tokenizer(texts).input_ids, strict=True):
        ids += tokens
        labels += [IGNORED, *tokens[1:]] if turn["from"] == "gpt" else [IGNORED] * len(tokens)
    return ids, labels


def batches(conversations: list, tokenizer: PreTrainedTokenizerFast, settings: Settings,
            first_step: int) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of the run from `first_step` on; their order depends on the seed alone."""
    generator = torch.Generator().manual_seed(settings.seed)
    order: list[int] = []
    for step in range(settings.steps):
        if len(order) < settings.batch_size:
            order += torch.randperm(len(conversations), generator=generator).tolist()
        chosen, order = order[:settings.batch_size], order[settings.batch_size:]
        if step >= first_step:
            yield collate([encode(tokenizer, conversations[i]) for i in chosen], tokenizer.pad_token_id)


def collate(samples: list[tuple], pad: int) -> dict[str, torch.Tensor]:
    length = max(len(ids) for ids, _ in samples)
    ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in samples])
    labels = torch.tensor([labels + [IGNORED] * (length - len(labels)) for _, labels in samples])
    # Padding stands behind the text, where a causal model cannot see it: no mask is needed.
    return {"input_ids": ids, "labels": labels}


def learning_rate(step: int, settings: Settings) -> float:
    warm = min(1.0, (step + 1) / settings.warmup_steps)
    return settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def train(model: LlamaForCausalLM, conversations: list, tokenizer: PreTrainedTokenizerFast, settings: Settings,
          folder: Path) -> None:
    """Trains the model in place, from its last checkpoint on if there is one; the losses go to metrics.jsonl."""
    checkpoint = folder / "checkpoint.safetensors"
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    trainable = dict(model.named_parameters())
    resumed = load_checkpoint(checkpoint, trainable, optimizer)
    step = int(resumed["step"]) if resumed else 0
    metrics = Metrics(folder / "metrics.jsonl", keep=lambda row: row["step"] <= step)
    bar = progress(description="little LLM", total=settings.steps, initial=step)
    model.train()
    for batch in batches(conversations, tokenizer, settings, step):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        metrics.log(step=step, loss=loss.item(), lr=learning_rate(step - 1, settings))
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if step % CHECKPOINT_EVERY == 0:
            save_checkpoint(checkpoint, trainable, optimizer, step=step)
    bar.close()


def kind_of(question: str) -> str:
    for kind, pattern in (("existence", r"Is there an? "), ("color", r"ground"),
                          ("count", r"How many|Is there only|Are "), ("place", r"Where|What is at")):
        if re.search(pattern, question.split("\n")[-1]):
            return kind
    return "side"


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, conversations: list[list[dict]]) -> dict:
    """Share of answers right in every token, by kind of question, the earlier answers of the conversation given."""
    model.eval()
    right: dict[str, list[bool]] = defaultdict(list)
    for conversation in conversations:
        ids, labels = (torch.tensor(values) for values in encode(tokenizer, conversation))
        guesses = model(input_ids=ids[None]).logits[0].argmax(-1)
        starts = (ids == tokenizer.convert_tokens_to_ids(ANSWER)).nonzero()[:, 0].tolist()
        ends = (ids == tokenizer.eos_token_id).nonzero()[:, 0].tolist()
        if "?" not in conversation[0]["value"]:
            continue  # a description: its objects may come in any order
        for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
            same = bool((guesses[start:end] == labels[start + 1:end + 1]).all())
            right[kind_of(conversation[2 * number]["value"])].append(same)
    return {kind: {"accuracy": sum(values) / len(values), "n": len(values)} for kind, values in sorted(right.items())}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.little_llm", description=__doc__)
    parser.add_argument("data", type=Path, help="the demo's data folder")
    parser.add_argument("folder", type=Path, help="where the language model goes")
    for name, value in vars(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    data, folder = arguments.pop("data"), arguments.pop("folder")
    settings = Settings(**arguments)
    set_seed(settings.seed)
    try:
        conversations = read_conversations(data / "llm_text.json")
    except UserError as error:
        fail(str(error))
    held_out, training = conversations[:HELD_OUT], conversations[HELD_OUT:]
    stage_1 = read_conversations(data / "llava_stage1.json")
    stage_2 = read_conversations(data / "llava_stage2.json")
    texts = (turn["value"].replace("<image>\n", "") for row in training[:5000] + stage_1[:2000] + stage_2
             for turn in row)
    tokenizer = train_tokenizer(texts, settings.vocabulary)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=settings.width, intermediate_size=settings.width * 8 // 3,
        num_hidden_layers=settings.layers, num_attention_heads=settings.heads, max_position_embeddings=1024,
        # Larger than Llama's 0.02: at this width attention would start out all but even, and stay so for long.
        initializer_range=settings.width**-0.5, tie_word_embeddings=True, use_cache=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    parameters = sum(p.numel() for p in model.parameters())
    tokens = sum(len(encode(tokenizer, row)[0]) for row in held_out) / len(held_out)
    print(f"{parameters:,} parameters, {len(tokenizer)} entries, {tokens:.0f} tokens a conversation", flush=True)
    train(model, training, tokenizer, settings, folder)
    scores = accuracy(model, tokenizer, held_out)
    for kind, score in scores.items():
        print(f"{kind:10} {score['accuracy']:.1%} of {score['n']} answers about maps right")
    model.config.use_cache = True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / "text_questions.json", {"parameters": parameters, "kinds": scores})
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
