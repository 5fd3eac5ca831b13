"""Conversations to token ids and labels.

One jinja template per format renders the prompt in training and travels with the saved processor, so that inference
sees exactly the text of training. A sample is tokenised once; which tokens have labels follows from their offsets.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from clipmoe_vlm.chat_templates import IMAGE_TOKEN
from clipmoe_vlm.runs import UserError

IGNORE_INDEX = -100
_QUESTION, _ANSWER = "\ue001", "\ue000"  # stand for a turn while its place in the prompt is looked for; of no script
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def to_messages(conversations: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """LLaVA's `[{from, value}]` -> `[{role, content}]`.

    As in LLaVA, a turn's one `<image>` mark moves to its front, and an opening turn of the assistant is left out. The
    marks of a turn with several stay where they are.

    Raises:
        ValueError: a question or an answer is empty, or an answer holds a picture.
    """
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(conversations, start=1):
        role, text = ROLES[turn["from"]], turn["value"]
        if role == "assistant" and IMAGE_TOKEN in text:
            raise ValueError(f"turn {number} is an answer with an {IMAGE_TOKEN} mark; pictures belong to questions")
        if role == "assistant" and not any(message["role"] == "user" for message in messages):
            continue
        if role != "system" and not text.strip():
            raise ValueError(f"turn {number} ({turn['from']}) is empty")
        if text.count(IMAGE_TOKEN) == 1:
            parts: Any = [{"type": "image"}, {"type": "text", "text": text.replace(IMAGE_TOKEN, "").strip()}]
            messages.append({"role": role, "content": parts})
        else:
            messages.append({"role": role, "content": text})
    return messages


class ChatEncoder:
    """Encodes conversations with one template.

    Args:
        tokenizer: a fast one, which knows `<image>` as a special token.
        template: jinja source, from `chat_template`.

    Raises:
        UserError: the tokenizer gives no offsets, or the template can't be split into prompt and answers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str):
        if not tokenizer.is_fast:
            raise UserError(f"the tokenizer in {tokenizer.name_or_path} has no fast (tokenizers) form, which gives "
                            "the character offsets that labels follow from")
        self.tokenizer = tokenizer
        self.template = template
        self.control_tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        question, answer = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
        try:
            asked = self._render([question], add_generation_prompt=True)
            before, *behind = self._render([question, answer]).split(_ANSWER)
            twice = self._render([question, answer, question, answer]).split(_ANSWER)
        except TemplateError as error:
            raise UserError(f"the chat template can't render questions and answers: {error}") from error
        if len(behind) != 1 or len(twice) != 3:
            raise UserError("the chat template leaves out answers or repeats them")
        if not before.startswith(asked):
            raise UserError("the chat template does not render an answer behind its own generation prompt "
                            f"({asked!r}), so the model would learn from another prompt than it is asked with")
        # What stands between a question and the place where the model goes on: labels start there, so that Vicuna's
        # space before an answer and Qwen3's empty thoughts count as the assistant's.
        self.ask = asked.rpartition(_QUESTION)[2]
        # What ends an answer wherever it stands, up to the token that generation stops at: line breaks behind it only
        # separate turns, and Phi-3 ends the whole conversation with one more token.
        shared = os.path.commonprefix([behind[0], twice[1]])
        ends = [shared.index(token) + len(token) for token in self.control_tokens if token in shared]
        self.closing = shared[: min(ends)] if ends else shared.rstrip() or shared
        if not self.closing:
            raise UserError("the chat template does not mark where an answer ends, so the model would never stop")

    def prompt(self, conversations: Sequence[dict[str, str]]) -> str:
        """The prompt up to where the assistant answers next."""
        return self._render(to_messages(conversations), add_generation_prompt=True)

    def encode(self, conversations: Sequence[dict[str, str]]) -> tuple[list[int], list[int]]:
        """Token ids (one `<image>` id per picture) and labels: the assistant's words and what ends its turn, else -100.

        Raises:
            ValueError: the sample can't be learned from (no answer, an empty turn, control tokens among its words), or
                the template refuses it or changes its words.
        """
        messages = to_messages(conversations)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        if not answers:
            raise ValueError("no turn of the assistant to learn from")
        for number, turn in enumerate(conversations, start=1):
            for token in self.control_tokens:
                if token != IMAGE_TOKEN and token in turn["value"]:
                    raise ValueError(f"turn {number} ({turn['from']}) holds {token!r}, which the model would read as a "
                                     "control token")
        try:
            text = self._render(messages)
            # One rendering with stand-ins for the answers shows where each of them goes.
            before, *pieces = self._render([{**message, "content": _ANSWER} if message["role"] == "assistant"
                                            else message for message in messages]).split(_ANSWER)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses it: {error}") from error
        spans = self._answer_spans(text, answers, before, pieces)
        encoding = self.tokenizer(text, return_offsets_mapping=True)
        labels = [IGNORE_INDEX] * len(encoding.input_ids)
        remaining = iter([*spans, (len(text) + 1, len(text) + 2)])
        start, end = next(remaining)
        for position, (token_start, token_end) in enumerate(encoding.offset_mapping):
            while token_start >= end:
                start, end = next(remaining)
            # Where a token begins decides: the mark of an end may take in the line break behind it (Phi-3).
            if start <= token_start < token_end:
                labels[position] = encoding.input_ids[position]
        return encoding.input_ids, labels

    def _answer_spans(self, text: str, answers: list[str], before: str, pieces: list[str]) -> list[tuple[int, int]]:
        """First and last character (excluded) of what the assistant says.

        Args:
            text: the whole conversation as the template renders it.
            before, pieces: the text in front of the first answer, and behind each one.
        """
        if len(pieces) != len(answers) or not text.startswith(before):
            raise ValueError(f"the conversation holds the character {_ANSWER!r}, or the template leaves out turns")
        spans = []
        position = len(before)
        for number, (answer, piece) in enumerate(zip(answers, pieces, strict=True), start=1):
            # Templates may trim answers, and Qwen3's the line breaks in front of the last one.
            words = next((words for words in (answer, answer.strip(), answer.lstrip("\n"))
                          if text.startswith(words + piece, position)), None)
            if words is None:
                raise ValueError(f"the chat template changes the words of answer {number}")
            if self.ask not in before or not piece.startswith(self.closing):
                raise ValueError(f"the chat template does not render answer {number} behind its generation prompt")
            start = position - len(before.rpartition(self.ask)[2]) if self.ask else position
            position += len(words)
            spans.append((start, position + len(self.closing)))
            position += len(piece)
            before = piece
        return spans

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(messages, chat_template=self.template, tokenize=False,
                                                  add_generation_prompt=add_generation_prompt)
