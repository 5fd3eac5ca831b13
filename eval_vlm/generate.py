"""Greedy answers of a VLM to questions about pictures: the picture and what its prompts share is computed once.

Prompts about one picture start alike (template, picture, line break) and differ from the question on. That common
start, found by comparing token ids, goes through the language model once per picture; its keys and values are then
shared by the picture's questions, which run in batches, left-padded, several pictures together.

An answer does not depend on the batch: other shapes give other rounding, so a question whose two best tokens come
closer than rounding could matter (`NEAR_TIE`) is answered again on its own, where every run computes the same.

Legend of shapes: P pictures, B questions, L prefix length, S suffix length, H key heads, D head size, V vocabulary.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoProcessor,
    DynamicCache,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)

import clipmoe_vlm  # noqa: F401  (registers the CLIP-MoE tower with transformers)
from clipmoe_vlm.pictures import open_rgb
from clipmoe_vlm.runs import UserError
from clipmoe_vlm.vlm import check_processor

MODELS = {"llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration}
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


def load_vlm(folder: str | Path, device: torch.device, precision: str = "auto") -> tuple[Any, Any]:
    """Model (eval mode) and processor of a VLM folder.

    Raises:
        UserError: no folder, another kind of model, weights missing, no chat template, or a processor that does not
            fit the model.
    """
    folder = Path(folder)
    model_class = MODELS[check_vlm_folder(folder)]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
             "auto": torch.bfloat16 if device.type == "cuda" else torch.float32}[precision]
    model, info = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise UserError(f"{folder}: no weights for {sorted(info['missing_keys'])[0]} and "
                        f"{len(info['missing_keys']) - 1} more; the folder is not whole, make it again")
    processor = AutoProcessor.from_pretrained(folder, backend="pil")  # the pixels of training, to the last bit
    if not processor.chat_template:
        raise UserError(f"{folder}: the processor has no chat template, so the prompt is unknown; add "
                        "chat_template.jinja")
    try:
        check_processor(model.config, processor)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error
    return model.to(device).eval(), processor


def check_vlm_folder(folder: Path) -> str:
    """The model_type of a VLM folder.

    Raises:
        UserError: `folder` is none that can answer here.
    """
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError:
        raise UserError(f"model {folder}: there is no config.json; name a model folder of train_vlm") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / 'config.json'} is not valid JSON ({error}); make the folder again") from error
    if model_type not in MODELS:
        raise UserError(f"model {folder} is not a VLM: its model_type is '{model_type}', supported are 'llava' and "
                        "'llava_next' (such as train_vlm writes)")
    return model_type


class Answerer:
    """Answers questions about pictures with one model.

    Args:
        model, processor: from `load_vlm`.
        batch_size: questions at once.
        max_new_tokens: an answer ends there at the latest.
    """

    def __init__(self, model: Any, processor: Any, batch_size: int = 16, max_new_tokens: int = 128):
        self.model, self.processor = model, processor
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        ends = [model.generation_config.eos_token_id, model.config.text_config.eos_token_id,
                processor.tokenizer.eos_token_id]
        self.end_tokens = sorted({token for end in ends for token in (end if isinstance(end, list) else [end])
                                  if token is not None})
        self.tiles = model.config.model_type == "llava_next"
        self.near_tie = NEAR_TIE[model.dtype]

    @torch.inference_mode()
    def answers(self, records: list[dict], folder: Path, answered: frozenset[str] | set[str] = frozenset()
                ) -> Iterator[tuple[dict, str]]:
        """Yields (record, answer) for every record whose id is not in `answered`, picture by picture.

        Args:
            records: dicts with `id`, `image` (relative to `folder`) and `prompt`. Give all of them also when going on
                with a stopped run: what a picture's prompts share, and with it the rounding, depends on all.

        Raises:
            UserError: an unreadable picture, a prompt longer than the model's positions, non-finite logits.
        """
        by_image: dict[str, list[dict]] = {}
        for record in records:
            by_image.setdefault(record["image"], []).append(record)
        batch: list[tuple[Picture, dict]] = []
        for group in by_image.values():
            todo = [record for record in group if record["id"] not in answered]
            if not todo:
                continue
            picture = self._prepare(group, folder)
            for record in todo:
                batch.append((picture, record))
                if len(batch) == self.batch_size:
                    yield from self._answer(batch)
                    batch = []
        yield from self._answer(batch)

    def _prepare(self, group: list[dict], folder: Path) -> Picture:
        """Reads one picture and tokenises all prompts about it."""
        path = folder / group[0]["image"]
        try:
            image = open_rgb(path)
        except OSError as error:
            raise UserError(f"{path}: the picture of question {group[0]['id']} can't be read ({error}); "
                            "put a whole file there and run the same command again") from error
        texts = [self._prompt(record["prompt"]) for record in group]
        # The processor treats the picture once; the number of picture tokens is the same in every prompt about it.
        first = self.processor(text=texts[0], images=image, return_tensors="pt",
                               add_special_tokens=self._add_special_tokens(texts[0]))
        count = int((first["input_ids"] == self.model.config.image_token_id).sum())
        mark = self.processor.image_token
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

    def _prompt(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def _add_special_tokens(self, text: str) -> bool:
        """A template that writes the start token itself must not get a second one."""
        start = self.processor.tokenizer.bos_token
        return start is None or not text.startswith(start)

    def _answer(self, batch: list[tuple[Picture, dict]]) -> list[tuple[dict, str]]:
        if not batch:
            return []
        pictures = {id(picture): picture for picture, _ in batch}
        self._compute_prefixes([picture for picture in pictures.values() if not picture.cache])
        answers, close = self._decode(batch)
        for index in close if len(batch) > 1 else []:
            picture, record = batch[index]
            alone = Picture(picture.name, picture.path, picture.ids, picture.pixel_values, picture.size, picture.prefix)
            self._compute_prefixes([alone])
            answers[index] = self._decode([(alone, record)])[0][0]
        return [(record, answer) for (_, record), answer in zip(batch, answers, strict=True)]

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
        sizes = {"image_sizes": [picture.size for picture in pictures]} if self.tiles else {}
        outputs = self.model.get_image_features(pixel_values=pixels, return_dict=True, **sizes)
        starts = []
        for picture, features in zip(pictures, outputs.pooler_output, strict=True):
            picture.features = features
            starts.append(self._embed(next(iter(picture.ids.values())), features)[:picture.prefix])
        embeddings = torch.nn.utils.rnn.pad_sequence(starts, batch_first=True)
        lengths = torch.tensor([picture.prefix for picture in pictures], device=self.model.device)
        columns = torch.arange(embeddings.shape[1], device=self.model.device)
        cache = DynamicCache()
        if embeddings.shape[1]:
            self.model(inputs_embeds=embeddings, attention_mask=(columns < lengths[:, None]).long(),
                       position_ids=columns.expand(len(pictures), -1), use_cache=True, logits_to_keep=1,
                       **{CACHE: cache})
        for index, picture in enumerate(pictures):
            picture.cache = [(layer.keys[index, :, :picture.prefix].clone(),
                              layer.values[index, :, :picture.prefix].clone()) for layer in cache.layers]

    def _decode(self, batch: list[tuple[Picture, dict]]) -> tuple[list[str], list[int]]:
        """Greedy answers of B questions, and the indices of those with a near tie on the way."""
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
        for _ in range(self.max_new_tokens):
            logits = self.model(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=True,
                                logits_to_keep=1, **{CACHE: cache}).logits[:, -1].float()  # [B, V]
            self._check_finite(logits, finished, batch)
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
        answers = [self.processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in kept]
        return answers, close.nonzero().flatten().tolist()

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
