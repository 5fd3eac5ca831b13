"""Greedy answers of a VLM to questions about pictures: the picture and what its prompts share is computed once.

Prompts about one picture start alike (template, picture, line break) and differ from the question on. That common
start, found by comparing token ids, goes through the language model once per picture; its keys and values are then
shared by the picture's questions, which run in batches, left-padded, several pictures together. Pictures with prompts
of like length come together, the longest first, so that there is little padding and too large a batch fails at once.

An answer does not depend on the batch: other shapes give other rounding, so a question whose two best tokens come
closer than rounding could matter (`NEAR_TIE`) is answered again on its own, where every run computes the same.

Legend of shapes: P pictures, B questions, L prefix length, S suffix length, H key heads, D head size, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import DynamicCache, LlavaForConditionalGeneration

from clipmoe_vlm.pictures import open_rgb
from clipmoe_vlm.runs import UserError
from eval_vlm.models import TILED
from eval_vlm.routing_rows import RoutingRows

# A lead of the best token over the second that rounding can't turn round; logits are of order 10.
NEAR_TIE = {torch.float32: 1e-3, torch.float16: 0.06, torch.bfloat16: 0.5}
# transformers renamed the argument; its old name still works but warns.
CACHE = "cache" if "cache" in inspect.signature(LlavaForConditionalGeneration.forward).parameters else "past_key_values"

KeysValues = list[tuple[torch.Tensor, torch.Tensor]]  # one pair of [H, L, D] per layer


@dataclass
class Picture:
    """A picture with the token ids of all its prompts; `features` and `cache` are filled in when first needed."""

    name: str
    path: Path
    ids: dict[str, torch.Tensor]  # record id -> [length]
    pixel_values: torch.Tensor  # [tiles, C, H, W]; one tile but for LLaVA-NeXT
    size: tuple[int, int]  # height and width on the disk
    prefix: int  # tokens that all prompts share
    cache: KeysValues = field(default_factory=list)
    features: torch.Tensor | None = None


class Answerer:
    """Answers questions about pictures with one model.

    Args:
        model, processor: from `load_vlm`.
        batch_size: questions at once.
        max_new_tokens: an answer ends there at the latest.
        answering: `generate`; or `yes_no`, which lets the model say one of the two words alone, whichever has the
            larger logit (see `_yes_no_tokens`).

    Raises:
        UserError: `yes_no` with a tokenizer that does not tell the two words apart by their first tokens.
    """

    def __init__(self, model: Any, processor: Any, batch_size: int = 16, max_new_tokens: int = 128,
                 answering: str = "generate"):
        self.model, self.processor = model, processor
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        ends = [model.generation_config.eos_token_id, model.config.text_config.eos_token_id,
                processor.tokenizer.eos_token_id]
        self.end_tokens = sorted({token for end in ends for token in (end if isinstance(end, list) else [end])
                                  if token is not None})
        self.tiled = model.config.model_type in TILED
        self.near_tie = NEAR_TIE[model.dtype]
        self.yes_no = _yes_no_tokens(processor.tokenizer) if answering == "yes_no" else None
        self._routing = RoutingRows(model)
        self._routed: dict[str, dict] = {}

    @torch.inference_mode()
    def answers(self, records: list[dict], folder: Path, answered: frozenset[str] | set[str] = frozenset()
                ) -> Iterator[tuple[dict, dict]]:
        """Yields (record, result) for every record whose id is not in `answered`, picture by picture.

        A result has the `answer`; `cut` (True) if it was ended by max_new_tokens; `yes_no` (the two logits) if it was
        made of them.

        Args:
            records: dicts with `id`, `image` (relative to `folder`) and `prompt`; with `pil` that picture is taken, and
                `image` is its name alone. Give all records also when going on with a stopped run: what a picture's
                prompts share, and with it the rounding, depends on all.

        Raises:
            UserError: an unreadable picture, a prompt with the model's mark for pictures or longer than the
                model's positions, non-finite logits.
        """
        batch: list[tuple[Picture, dict]] = []
        for group in self._by_length(records):
            todo = [record for record in group if record["id"] not in answered]
            if not todo:
                continue
            picture = self._prepare(group, folder)
            for record in sorted(todo, key=lambda record: -len(picture.ids[record["id"]])):
                batch.append((picture, record))
                if len(batch) == self.batch_size:
                    yield from self._answer(batch)
                    batch = []
        yield from self._answer(batch)

    def take_routing(self) -> list[dict]:
        """Rows of routing_rows.py of the pictures seen since the last call."""
        rows, self._routed = list(self._routed.values()), {}
        return rows

    def _by_length(self, records: list[dict]) -> list[list[dict]]:
        """The records of each picture, those with the longest prompts first."""
        by_image: dict[str, list[dict]] = {}
        for record in records:
            by_image.setdefault(record["image"], []).append(record)
        groups = list(by_image.values())
        texts = [max((record["prompt"] for record in group), key=len) for group in groups]
        tokens = self.processor.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        lengths = [len(one) for one in tokens]
        return [groups[index] for index in sorted(range(len(groups)), key=lambda index: -lengths[index])]

    def _prepare(self, group: list[dict], folder: Path) -> Picture:
        """Reads one picture and tokenises all prompts about it."""
        path = folder / group[0]["image"]
        image = group[0].get("pil") or self._open(path, group[0]["id"])
        mark = self.processor.image_token
        for record in group:
            if mark in record["prompt"]:
                raise UserError(f"question {record['id']} holds {mark}, by which the model knows the place of its "
                                "picture; take it out of the question")
        texts = [self._prompt(record["prompt"]) for record in group]
        # The processor treats the picture once; the number of picture tokens is the same in every prompt about it.
        first = self.processor(text=texts[0], images=image, return_tensors="pt",
                               add_special_tokens=self._add_special_tokens(texts[0]))
        count = int((first["input_ids"] == self.model.config.image_token_id).sum())
        ids = {}
        for record, text in zip(group, texts, strict=True):
            tokens = self.processor.tokenizer(text.replace(mark, mark * count),
                                              add_special_tokens=self._add_special_tokens(text))["input_ids"]
            ids[record["id"]] = torch.tensor(tokens)
            positions = self.model.config.text_config.max_position_embeddings
            if len(tokens) >= positions:
                raise UserError(f"question {record['id']} about {path} has {len(tokens)} tokens with the picture's, "
                                f"the language model has {positions} positions; shorten the question or take another "
                                "model")
        shortest = min(len(one) for one in ids.values())
        same = torch.stack([one[:shortest] == next(iter(ids.values()))[:shortest] for one in ids.values()]).all(0)
        shared = int(same.long().cumprod(0).sum())
        return Picture(group[0]["image"], path, ids, first["pixel_values"].flatten(0, -4), (image.height, image.width),
                       min(shared, shortest - 1))

    @staticmethod
    def _open(path: Path, question: str) -> Image.Image:
        try:
            return open_rgb(path)
        except OSError as error:
            raise UserError(f"{path}: the picture of question {question} can't be read ({error}); "
                            "put a whole file there and run the same command again") from error

    def _prompt(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def _add_special_tokens(self, text: str) -> bool:
        """A template that writes the start token itself must not get a second one."""
        start = self.processor.tokenizer.bos_token
        return start is None or not text.startswith(start)

    def _answer(self, batch: list[tuple[Picture, dict]]) -> list[tuple[dict, dict]]:
        if not batch:
            return []
        pictures = {id(picture): picture for picture, _ in batch}
        self._compute_prefixes([picture for picture in pictures.values() if picture.features is None])
        results, close = self._decode(batch)
        for index in close if len(batch) > 1 else []:
            picture, record = batch[index]
            alone = Picture(picture.name, picture.path, picture.ids, picture.pixel_values, picture.size, picture.prefix)
            self._compute_prefixes([alone])
            results[index] = self._decode([(alone, record)])[0][0]
        return [(record, result) for (_, record), result in zip(batch, results, strict=True)]

    def _embed(self, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Token ids `[length]` and picture features `[n, d]` -> input embeddings `[length, d]`."""
        ids = ids.to(self.model.device)
        embeddings = self.model.get_input_embeddings()(ids)
        mask = (ids == self.model.config.image_token_id).unsqueeze(-1)
        return embeddings.masked_scatter(mask, features.to(embeddings.dtype))

    def _compute_prefixes(self, pictures: list[Picture]) -> None:
        """Fills in the features and the keys and values of the shared prefix of these pictures, all at once.

        Prefixes are padded on the right: no real token can see the padding, and it is cut off again.
        """
        if not pictures:
            return
        pixels = torch.cat([picture.pixel_values for picture in pictures]).to(self.model.device, self.model.dtype)
        sizes = {"image_sizes": [picture.size for picture in pictures]} if self.tiled else {}
        outputs = self.model.get_image_features(pixel_values=pixels, return_dict=True, **sizes)
        for row in self._routing.take([picture.name for picture in pictures],
                                      [len(picture.pixel_values) for picture in pictures]):
            self._routed[row["image"]] = row
        starts = []
        for picture, features in zip(pictures, outputs.pooler_output, strict=True):
            picture.features = features
            starts.append(self._embed(next(iter(picture.ids.values())), features)[:picture.prefix])
        if not any(len(start) for start in starts):  # the keys' shape is wanted all the same
            starts[0] = torch.zeros(1, starts[0].shape[1], dtype=starts[0].dtype, device=starts[0].device)
        embeddings = torch.nn.utils.rnn.pad_sequence(starts, batch_first=True)
        lengths = torch.tensor([picture.prefix for picture in pictures], device=self.model.device)
        columns = torch.arange(embeddings.shape[1], device=self.model.device)
        cache = DynamicCache()
        self.model(inputs_embeds=embeddings, attention_mask=(columns < lengths[:, None]).long(),
                   position_ids=columns.expand(len(pictures), -1), use_cache=True, logits_to_keep=1, **{CACHE: cache})
        for index, picture in enumerate(pictures):
            picture.cache = [(layer.keys[index, :, :picture.prefix].clone(),
                              layer.values[index, :, :picture.prefix].clone()) for layer in cache.layers]

    def _decode(self, batch: list[tuple[Picture, dict]]) -> tuple[list[dict], list[int]]:
        """Results of B questions, and the indices of those with a near tie on the way."""
        device, size = self.model.device, len(batch)
        suffixes = [self._embed(picture.ids[record["id"]], picture.features)[picture.prefix:]
                    for picture, record in batch]
        # Sequences are [padding, prefix, padding, suffix]: the last real token of each is at the end.
        longest_prefix = max(picture.prefix for picture, _ in batch)
        longest_suffix = max(len(suffix) for suffix in suffixes)
        mask = torch.zeros(size, longest_prefix + longest_suffix, dtype=torch.long, device=device)
        positions = torch.zeros(size, longest_suffix, dtype=torch.long, device=device)
        embeddings = suffixes[0].new_zeros(size, longest_suffix, suffixes[0].shape[-1])
        for row, ((picture, _), suffix) in enumerate(zip(batch, suffixes, strict=True)):
            mask[row, longest_prefix - picture.prefix:longest_prefix] = 1
            mask[row, mask.shape[1] - len(suffix):] = 1
            positions[row, longest_suffix - len(suffix):] = picture.prefix + torch.arange(len(suffix), device=device)
            embeddings[row, longest_suffix - len(suffix):] = suffix
        cache = self._batch_cache([picture for picture, _ in batch], longest_prefix)

        next_position = torch.tensor([len(picture.ids[record["id"]]) for picture, record in batch], device=device)
        finished = torch.zeros(size, dtype=torch.bool, device=device)
        close, ends = finished.clone(), torch.tensor(self.end_tokens, device=device)
        tokens = []
        for _ in range(self.max_new_tokens if self.yes_no is None else 1):
            logits = self.model(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=True,
                                logits_to_keep=1, **{CACHE: cache}).logits[:, -1].float()  # [B, V]
            self._check_finite(logits, finished, batch)
            if self.yes_no is not None:
                two = torch.stack([logits[:, tokens].amax(-1) for tokens in self.yes_no], dim=-1)  # [B, 2]
                close = (two[:, 0] - two[:, 1]).abs() < self.near_tie
                results = [{"answer": "Yes" if yes >= no else "No", "yes_no": [yes, no]} for yes, no in two.tolist()]
                return results, close.nonzero().flatten().tolist()
            best = logits.topk(2, dim=-1)
            token = best.indices[:, 0]
            close |= ~finished & (best.values[:, 0] - best.values[:, 1] < self.near_tie)
            tokens.append(token.masked_fill(finished, -1))
            finished = finished | torch.isin(token, ends)
            if finished.all():
                break
            embeddings = self.model.get_input_embeddings()(token).unsqueeze(1)
            mask = torch.cat([mask, mask.new_ones(size, 1)], dim=1)
            positions = next_position.unsqueeze(1)
            next_position = next_position + 1
        rows = torch.stack(tokens, dim=1).tolist()
        kept = [[token for token in row if token >= 0 and token not in self.end_tokens] for row in rows]
        results = [{"answer": self.processor.tokenizer.decode(row, skip_special_tokens=True).strip(),
                    **({} if whole else {"cut": True})} for row, whole in zip(kept, finished.tolist(), strict=True)]
        return results, close.nonzero().flatten().tolist()

    def _batch_cache(self, pictures: list[Picture], length: int) -> DynamicCache:
        """The pictures' prefix keys and values, padded on the left to `length`: `[B, H, length, D]` per layer."""
        cache = DynamicCache()
        for layer in range(len(pictures[0].cache)):
            keys, values = (torch.stack([
                torch.nn.functional.pad(picture.cache[layer][part], (0, 0, length - picture.prefix, 0))
                for picture in pictures]) for part in (0, 1))
            if length:
                cache.update(keys, values, layer)
        return cache

    def _check_finite(self, logits: torch.Tensor, finished: torch.Tensor, batch: list[tuple[Picture, dict]]) -> None:
        bad = (~torch.isfinite(logits).all(dim=-1) & ~finished).nonzero().flatten().tolist()
        if bad:
            picture, record = batch[bad[0]]
            raise UserError(f"question {record['id']} about {picture.path}: the model's logits are not finite; "
                            "its weights or the precision are at fault (try precision=fp32)")


def _yes_no_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that yes and no can begin with: of the words as they are, capitalised and in capitals, with and
    without a blank before.

    Raises:
        UserError: there are none that begin only one of them.
    """
    starts = []
    for word in ("yes", "no"):
        spellings = [blank + form for form in (word, word.capitalize(), word.upper()) for blank in ("", " ")]
        starts.append({tokenizer(spelling, add_special_tokens=False)["input_ids"][0] for spelling in spellings})
    yes, no = starts[0] - starts[1], starts[1] - starts[0]
    if not yes or not no:
        raise UserError("answering=yes_no: this model's tokenizer begins yes and no with the same tokens; "
                        "use answering=generate")
    return sorted(yes), sorted(no)
