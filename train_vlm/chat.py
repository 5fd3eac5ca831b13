"""Conversations to token ids and labels.

One jinja template per format renders the prompt in training and travels with the saved processor, so that inference
sees exactly the text of training. A sample is tokenised once; which tokens have labels follows from their offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from clipmoe_vlm.chat_templates import IMAGE_TOKEN
from clipmoe_vlm.runs import UserError

IGNORE_INDEX = -100
_ANSWER = "\ue000"  # stands for an answer while its place in the prompt is looked for; of no script
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def to_messages(conversations: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """LLaVA's `[{from, value}]` -> `[{role, content}]`.

    As in LLaVA, a turn's one `<image>` mark moves to its front, and an opening turn of the assistant is left out. The
    marks of a turn with several stay where they are.
    """
    messages: list[dict[str, Any]] = []
    for turn in conversations:
        role, text = ROLES[turn["from"]], turn["value"]
        if role == "assistant" and not any(message["role"] == "user" for message in messages):
            continue
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
        question = [{"role": "user", "content": "question"}]
        ask = self._render(question, add_generation_prompt=True)[len(self._render(question)):]
        before, *after = self._render([*question, {"role": "assistant", "content": _ANSWER}]).split(_ANSWER)
        if len(after) != 1 or ask not in before:
            raise UserError("the chat template does not render an answer behind its own generation prompt "
                            f"({ask!r}), so the model would learn from another prompt than it is asked with")
        # An answer is labelled from right behind the generation prompt (Vicuna's space before it counts) to the mark
        # that ends the turn; line breaks that only separate turns are not.
        self.lead = before[before.rindex(ask) + len(ask):]
        self.opening = ask + self.lead
        self.closing = after[0].rstrip() or after[0]
        self.trims = " x " not in self._render([*question, {"role": "assistant", "content": " x "}])

    def prompt(self, conversations: Sequence[dict[str, str]]) -> str:
        """The prompt up to where the assistant answers next."""
        return self._render(to_messages(conversations), add_generation_prompt=True)

    def encode(self, conversations: Sequence[dict[str, str]]) -> tuple[list[int], list[int]]:
        """Token ids (one `<image>` id per picture) and labels: the assistant's words and what ends its turn, else -100.

        Raises:
            ValueError: nothing of the conversation has labels, or the template renders a turn in its own way.
        """
        messages = to_messages(conversations)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        if not answers:
            raise ValueError("no turn of the assistant to learn from")
        # One rendering with stand-ins for the answers shows where each of them goes.
        text, *pieces = self._render([{**message, "content": _ANSWER} if message["role"] == "assistant" else message
                                      for message in messages]).split(_ANSWER)
        if len(pieces) != len(answers):
            raise ValueError(f"the conversation holds the character {_ANSWER!r}, or the template leaves out turns")
        spans = []
        for answer, piece in zip(answers, pieces, strict=True):
            if not (text.endswith(self.opening) and piece.startswith(self.closing)):
                raise ValueError("the chat template renders one of the turns in another way than the others")
            start = len(text) - len(self.lead)
            text += answer.strip() if self.trims else answer
            spans.append((start, len(text) + len(self.closing)))
            text += piece
        encoding = self.tokenizer(text, return_offsets_mapping=True)
        labels = [IGNORE_INDEX] * len(encoding.input_ids)
        remaining = iter([*spans, (len(text) + 1, len(text) + 2)])
        start, end = next(remaining)
        for position, (token_start, token_end) in enumerate(encoding.offset_mapping):
            while token_start >= end:
                start, end = next(remaining)
            if start <= token_start < token_end <= end:
                labels[position] = encoding.input_ids[position]
        return encoding.input_ids, labels

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(messages, chat_template=self.template, tokenize=False,
                                                  add_generation_prompt=add_generation_prompt)
