"""A conversation with a VLM about a picture: the answers of transformers' greedy `generate`, piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from clipmoe_vlm.runs import UserError, init_distributed
from eval_vlm.models import find_folder, load_vlm
from eval_vlm.routing_rows import RoutingRows


class _Stop(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device, dtype=torch.bool)


@dataclass
class Conversation:
    """What was said about one picture.

    Args:
        picture: RGB, or None for a conversation about no picture.
        turns: question and answer, in order.
        seen: the picture as the tower saw it, after the first answer.
        routing: a row of eval_vlm/routing_rows.py, after the first answer of a model with experts.
    """

    picture: Image.Image | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)
    seen: Image.Image | None = None
    routing: dict | None = None


class ChatModel:
    """A VLM that several conversations may use, one answer at a time.

    Args:
        folder: of the VLM, or its name on the hub.
        precision: as eval_vlm.run's.
        max_new_tokens: an answer ends there at the latest.

    Raises:
        UserError: the folder is no VLM.
    """

    def __init__(self, folder: str, precision: str = "auto", max_new_tokens: int = 512):
        self.name = Path(folder).resolve().name if Path(folder).exists() else folder
        self.folder, self.max_new_tokens = folder, max_new_tokens
        self.model, self.processor = load_vlm(find_folder(folder), init_distributed().device, precision)
        self._rows = RoutingRows(self.model)
        self._lock = threading.Lock()

    def answer(self, conversation: Conversation, question: str, stop: threading.Event | None = None) -> Iterator[str]:
        """Yields the answer's pieces as they come; the turn is added when the answer ends, or was stopped.

        Raises:
            UserError: a question with the model's mark for pictures, or a conversation longer than its positions.
        """
        mark = self.processor.image_token
        if mark in question:
            raise UserError(f"the question holds {mark}, by which the model knows the place of its picture; leave "
                            "it out")
        stop = stop or threading.Event()
        with self._lock:
            inputs = self._inputs(conversation, question)
            streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
            failure: list[BaseException] = []

            def generate() -> None:
                try:
                    self.model.generate(**inputs, streamer=streamer, do_sample=False, num_beams=1,
                                        max_new_tokens=self.max_new_tokens,
                                        stopping_criteria=StoppingCriteriaList([_Stop(stop)]))
                except BaseException as error:  # told where the pieces are awaited
                    failure.append(error)
                    streamer.end()

            thread = threading.Thread(target=generate, daemon=True)
            thread.start()
            pieces: list[str] = []
            try:
                for piece in streamer:
                    pieces.append(piece)
                    if piece:
                        yield piece
            finally:
                stop.set()
                thread.join()
                conversation.turns.append((question, "".join(pieces).strip()))
            if failure:
                conversation.turns.pop()
                raise failure[0]
            self._remember(conversation, inputs)

    def _inputs(self, conversation: Conversation, question: str) -> dict[str, Any]:
        messages = []
        for number, (asked, answered) in enumerate([*conversation.turns, (question, None)]):
            parts = [{"type": "text", "text": asked}]
            if number == 0 and conversation.picture is not None:
                parts.insert(0, {"type": "image"})
            messages.append({"role": "user", "content": parts})
            if answered is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answered}]})
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        start = self.processor.tokenizer.bos_token
        pictures = {} if conversation.picture is None else {"images": conversation.picture}
        inputs = self.processor(text=text, return_tensors="pt", **pictures,
                                add_special_tokens=start is None or not text.startswith(start))
        positions = self.model.config.text_config.max_position_embeddings
        length = inputs["input_ids"].shape[1]
        if length >= positions:
            raise UserError(f"the conversation has {length} tokens, the model has {positions} positions; begin a new "
                            "one")
        inputs = inputs.to(self.model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return dict(inputs)

    def _remember(self, conversation: Conversation, inputs: dict[str, Any]) -> None:
        """What the tower saw, and where its routers sent it."""
        if conversation.seen is not None or "pixel_values" not in inputs:
            return
        tiles = inputs["pixel_values"].flatten(0, -4)
        pictures = self.processor.image_processor
        mean, spread = (torch.tensor(values).view(3, 1, 1) for values in (pictures.image_mean, pictures.image_std))
        pixels = (tiles[0].float().cpu() * spread + mean).clamp(0, 1)
        conversation.seen = Image.fromarray((255 * pixels).round().byte().permute(1, 2, 0).numpy())
        rows = self._rows.take(["picture"], [len(tiles)])
        conversation.routing = rows[0] if rows else None
