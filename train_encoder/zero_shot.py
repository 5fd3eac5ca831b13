"""What a model knows on held-out pictures: retrieval both ways, and captions that are wrong in one detail."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from clipmoe_vlm import CLIPMoEModel
from clipmoe_vlm.intervals import cluster_interval
from clipmoe_vlm.routing import expert_load, router_entropy
from clipmoe_vlm.runs import Distributed, UserError, read_jsonl, write_json
from clipmoe_vlm.upcycling import is_moe

from .config import EncoderConfig
from .data import Collate, Samples, open_picture
from .features import Items, encode

TOP = (1, 5, 10)
ROUTING_SAMPLES = 64  # pictures and captions whose routing is recorded


@dataclass
class HeldOut:
    """Held-out data: distinct pictures, captions with the picture each belongs to, and hard pairs of captions."""

    pictures: list[str | list]  # path, or [shard, offset, size]
    captions: list[str]
    picture_of_caption: list[int]
    hard: list[dict]  # {"id", "image", "true", "false", "kind"}, image as a path


def load_held_out(config: EncoderConfig, validation: Samples | None) -> HeldOut:
    """Reads the held-out captions (by index) and the hard captions (JSON lines).

    Raises:
        UserError: a hard-caption row lacks a field (names the line and the fields found).
    """
    numbers: dict[str, int] = {}
    pictures, captions, owners = [], [], []
    for number in range(len(validation) if validation else 0):
        caption = validation.caption(number)
        if caption is None:
            continue
        where = validation.record(number)["image"]
        if json.dumps(where) not in numbers:
            numbers[json.dumps(where)] = len(pictures)
            pictures.append(where)
        captions.append(caption)
        owners.append(numbers[json.dumps(where)])
    hard = []
    if config.hard_captions:
        file = Path(config.hard_captions)
        root = Path(config.image_root) if config.image_root else file.parent
        for line, row in enumerate(read_jsonl(file), 1):
            missing = [key for key in ("image", "true", "false", "kind") if not isinstance(row.get(key), str)]
            if missing:
                raise UserError(f"{file}, row {line}: no text in '{missing[0]}' (found: {', '.join(row)}); hard "
                                "captions have image, true, false and kind")
            hard.append({"id": line, **row, "path": str(root / row["image"])})
    return HeldOut(pictures, captions, owners, hard)


class _Opener:
    """Opens the n-th picture of a list, or gives the sentence that says why not."""

    def __init__(self, pictures: list):
        self.pictures = pictures

    def __call__(self, number: int):
        return open_picture(self.pictures[number], str(self.pictures[number]))


def retrieval(image: np.ndarray, text: np.ndarray, owners: np.ndarray) -> dict:
    """R@1/5/10 both ways; with several captions of a picture, any of them counts as found from the picture.

    A tie counts against the model: what scores the same as the right answer ranks before it.

    Args:
        image: [I, D], text: [C, D], L2-normalised; owners: [C] picture of each caption.
    """
    scores = text @ image.T  # [C, I]
    own = scores[np.arange(len(text)), owners]
    text_rank = (scores >= own[:, None]).sum(1) - 1
    image_rank = np.empty(len(image), np.int64)
    for number in range(len(image)):
        mine = owners == number
        best = scores[mine, number].max() if mine.any() else -np.inf
        image_rank[number] = (scores[~mine, number] >= best).sum()

    def recalls(rank: np.ndarray) -> dict[str, float]:
        return {f"R@{k}": float((rank < k).mean()) for k in TOP}

    return {"n_images": len(image), "n_captions": len(text), "image_to_text": recalls(image_rank),
            "text_to_image": recalls(text_rank), "image_to_text_hits": (image_rank < 1).astype(int).tolist(),
            "text_to_image_hits": (text_rank < 1).astype(int).tolist()}


def hard_accuracy(items: list[dict]) -> dict:
    """Accuracy per kind with its 95% interval, clustered by picture. `items`: {"image", "kind", "correct"}."""
    result = {}
    for kind in sorted({item["kind"] for item in items}):
        rows = [item for item in items if item["kind"] == kind]
        interval = cluster_interval([row["correct"] for row in rows], [row["image"] for row in rows])
        known = interval.clusters > 1  # one picture says nothing about the spread; JSON has no NaN
        result[kind] = {"accuracy": interval.mean, "low": interval.low if known else None,
                        "high": interval.high if known else None, "n": interval.n}
    return result


@torch.no_grad()
def routing(model: CLIPMoEModel, held_out: HeldOut, collate: Collate, device: torch.device) -> dict | None:
    """Expert load and router entropy per MoE layer over some pictures and captions; None for a dense model."""
    if not is_moe(model):
        return None
    pictures = held_out.pictures or sorted({row["path"] for row in held_out.hard})
    captions = held_out.captions or [row["true"] for row in held_out.hard]
    pixels, valid, _ = collate.pictures([_Opener(pictures)(n) for n in range(min(len(pictures), ROUTING_SAMPLES))])
    ids, _, _ = collate.captions(captions[:ROUTING_SAMPLES])
    result = {}
    eos = model.config.text_config.eos_token_id
    end = ids.argmax(-1) if eos == 2 else (ids == eos).int().argmax(-1)  # as the text tower finds it
    real = (torch.arange(ids.shape[1]) <= end[:, None]).flatten().to(device)  # padding's routing says nothing
    for tower, name, inputs, keep in ((model.vision_model, "vision", pixels[valid], slice(None)),
                                      (model.text_model, "text", ids, real)):
        logits = [layer[keep] for layer in tower(inputs.to(device)).router_logits]
        result[f"{name}_load"] = expert_load(logits, tower.config.num_experts_per_tok).tolist()
        result[f"{name}_entropy"] = router_entropy(logits).tolist()
    return result


def evaluate(name: str, model: CLIPMoEModel, where: str, held_out: HeldOut, collate: Collate, folder: Path,
             config: EncoderConfig, distributed: Distributed) -> None:
    """Writes `folder/evaluation/<name>.json` and prints one line; nothing happens if the file is there.

    Every rank takes part in the encoding. `where` is the model's folder, relative to the output folder.
    """
    file = folder / "evaluation" / f"{name}.json"
    if file.is_file() or not (held_out.pictures or held_out.hard):
        return
    model = model.to(distributed.device).eval()
    scratch = folder / "evaluation" / f".{name}"
    names = sorted({row["path"] for row in held_out.hard})
    texts = [row[side] for row in held_out.hard for side in ("true", "false")]
    arrays, errors = {}, []
    for key, values in (("pictures", held_out.pictures), ("captions", held_out.captions), ("hard_pictures", names),
                        ("hard_captions", texts)):
        if not values:
            continue
        of_pictures = key.endswith("pictures")
        errors += encode(
            model.get_image_features if of_pictures else model.get_text_features,
            Items(len(values), _Opener(values) if of_pictures else values.__getitem__),
            collate.pictures if of_pictures else collate.captions, scratch / f"{key}.npy",
            dim=model.config.projection_dim, distributed=distributed, workers=config.workers,
            precision=config.precision, description=f"evaluating {name}: {key.replace('_', ' ')}")
        if distributed.is_main:
            arrays[key] = np.load(scratch / f"{key}.npy")
    if not distributed.is_main:
        return
    for sentence in errors:
        print(f"evaluating {name}: skipped {sentence}", flush=True)
    result = {"name": name, "model": where, "retrieval": None, "hard": {}, "hard_items": [],
              "skipped_pictures": len(errors), "routing": routing(model, held_out, collate, distributed.device)}
    if held_out.pictures:
        readable = ~np.isnan(arrays["pictures"][:, 0])
        owners = np.array(held_out.picture_of_caption)
        kept = readable[owners]
        if not readable.any():
            raise UserError(f"validation_data {config.validation_data}: no picture in it is readable; check image_root")
        result["retrieval"] = retrieval(arrays["pictures"][readable], arrays["captions"][kept],
                                        (np.cumsum(readable) - 1)[owners[kept]])
    if held_out.hard:
        at = {path: number for number, path in enumerate(names)}
        for number, row in enumerate(held_out.hard):
            picture = arrays["hard_pictures"][at[row["path"]]]
            if not np.isnan(picture[0]):
                true, false = arrays["hard_captions"][2 * number:2 * number + 2] @ picture
                result["hard_items"].append({"id": row["id"], "image": row["image"], "kind": row["kind"],
                                             "correct": int(true > false)})
        result["hard"] = hard_accuracy(result["hard_items"])
    shutil.rmtree(scratch)
    write_json(file, result)
    print(line(result), flush=True)


def line(result: dict) -> str:
    """One line with what was measured, in percent."""
    parts = []
    if result["retrieval"]:
        for way, arrow in (("image_to_text", "image->text"), ("text_to_image", "text->image")):
            recalls = result["retrieval"][way]
            parts.append(f"{arrow} R@1/5/10 " + "/".join(f"{100 * recalls[f'R@{k}']:.1f}" for k in TOP))
    if result["hard"]:
        parts.append("hard captions " + ", ".join(f"{kind} {100 * value['accuracy']:.1f}"
                                                  for kind, value in result["hard"].items()))
    return f"[{result['name']}] " + "; ".join(parts)
