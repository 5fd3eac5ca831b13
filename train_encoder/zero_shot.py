"""What a CLIP knows without training on a task: retrieval, classification by prompts, captions wrong in one detail.

The three kinds of task hold their pictures and texts; `measure` encodes these on all ranks and scores them on the main
one. A task's result keeps the outcome of every picture, caption and question, so that two models can be compared item
by item (compare.py).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from clipmoe_vlm import CLIPMoEModel
from clipmoe_vlm.intervals import cluster_interval
from clipmoe_vlm.routing import routing_statistics
from clipmoe_vlm.runs import Distributed, UserError, write_json
from clipmoe_vlm.upcycling import is_moe

from .config import EncoderConfig
from .data import Collate
from .features import Features, Items, encode

TOP = (1, 5, 10)
ROUTING_SAMPLES = 64  # pictures and captions whose routing is recorded
BLOCK = 2**22  # scores held at once


# --- scores --------------------------------------------------------------------------------------------------------


def blocks(rows: int, columns: int):
    """Slices of at most `BLOCK` scores (one row at least) that cover a matrix of `rows` by `columns`."""
    step = max(1, BLOCK // max(1, columns))
    return (slice(start, start + step) for start in range(0, rows, step))


def retrieval(image: np.ndarray, text: np.ndarray, owners: np.ndarray, device: torch.device | str = "cpu") -> dict:
    """R@1/5/10 both ways; with several captions of a picture, any of them counts as found from the picture.

    A tie counts against the model: what scores the same as the right answer ranks before it. (Where no scores are
    equal this is the recall of the CLIP papers and of clip-benchmark.) The matrix of scores is made block by block.

    Args:
        image: [I, D], text: [C, D], L2-normalised; owners: [C] picture of each caption.

    Returns:
        the recalls, the rank (from 0) of each picture's best caption and of each caption's picture, and the owners.
    """
    images, texts, owner = (torch.as_tensor(np.asarray(array)).to(device) for array in (image, text, owners))
    # Filled in place: small results kept between the large blocks would scatter these over ever more memory.
    image_rank, text_rank = (torch.empty(len(rows), dtype=torch.int64, device=device) for rows in (images, texts))
    for block in blocks(len(texts), len(images)):
        scores = texts[block] @ images.T
        text_rank[block] = (scores >= scores.gather(1, owner[block, None])).count_nonzero(1) - 1
    for block in blocks(len(images), len(texts)):
        scores = images[block] @ texts.T
        mine = ((owner >= block.start) & (owner < block.stop)).nonzero()[:, 0]
        row = owner[mine] - block.start
        best = scores.new_full((len(scores),), -torch.inf).scatter_reduce(0, row, scores[row, mine], "amax")
        scores[row, mine] = -torch.inf
        image_rank[block] = (scores >= best[:, None]).count_nonzero(1)
    ranks = {"image_to_text": image_rank, "text_to_image": text_rank}
    recalls = {way: {f"R@{k}": float((rank < k).double().mean()) for k in TOP} for way, rank in ranks.items()}
    return {"n_images": len(image), "n_captions": len(text), **recalls,
            **{f"{way}_ranks": rank.tolist() for way, rank in ranks.items()}, "owners": owner.tolist()}


def classification(image: np.ndarray, classifier: np.ndarray, labels: np.ndarray,
                   device: torch.device | str = "cpu") -> dict:
    """Top-1, top-5 (with five classes or more), and the mean over the classes of their top-1. Ties count as wrong.

    Args:
        image: [N, D], classifier: [classes, D], L2-normalised; labels: [N].
    """
    images, classes, label = (torch.as_tensor(np.asarray(array)).to(device) for array in (image, classifier, labels))
    ranks = torch.empty(len(images), dtype=torch.int64, device=device)
    for block in blocks(len(images), len(classes)):
        scores = images[block] @ classes.T
        ranks[block] = (scores >= scores.gather(1, label[block, None])).count_nonzero(1) - 1
    rank = ranks.cpu().numpy()
    per_class = [float((rank[labels == number] < 1).mean()) for number in np.unique(labels)]
    return {"n_images": len(image), "n_classes": len(classifier), "top_1": float((rank < 1).mean()),
            "top_5": float((rank < 5).mean()) if len(classifier) >= 5 else None,
            "mean_per_class": float(np.mean(per_class)), "ranks": rank.tolist(), "labels": np.asarray(labels).tolist()}


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


# --- tasks ---------------------------------------------------------------------------------------------------------


@dataclass
class Encoder:
    """A model with what it takes to encode pictures and texts with it, on all ranks."""

    name: str  # for the progress bar
    model: CLIPMoEModel
    collate: Collate
    distributed: Distributed
    workers: int
    precision: str
    scratch: Path

    def pictures(self, pictures: Items) -> tuple[np.ndarray, list[str]]:
        """[N, P] features, NaN where unreadable, and why. Off the main rank the features are empty."""
        return self._encode("pictures", self.model.get_image_features, pictures, self.collate.pictures)

    def texts(self, texts: list[str]) -> np.ndarray:
        """[N, P] features. Off the main rank they are empty."""
        return self._encode("texts", self.model.get_text_features, Items(len(texts), texts.__getitem__),
                            self.collate.captions)[0]

    def _encode(self, what: str, feature, items: Items, collate) -> tuple[np.ndarray, list[str]]:
        folder, dim = self.scratch / what, self.model.config.projection_dim
        self.distributed.main_first(lambda: shutil.rmtree(folder, ignore_errors=True))  # what a killed run left
        errors = encode(feature, items, collate, folder, dim=dim, distributed=self.distributed, workers=self.workers,
                        precision=self.precision, description=f"evaluating {self.name}: {what}")
        if not self.distributed.is_main:
            return np.empty((0, dim), np.float32), []
        features = Features([folder])[np.arange(len(items))]
        shutil.rmtree(folder)
        for sentence in errors:
            print(f"evaluating {self.name}: skipped {sentence}", flush=True)
        return features, errors

    def counts(self, texts: list[str], skipped: list[str]) -> dict:
        """What to know about a result besides its scores."""
        length = self.collate.text_length
        lengths = self.collate.tokenizer(texts, verbose=False)["input_ids"]
        return {"skipped_pictures": len(skipped), "text_length": length,
                "truncated_texts": sum(len(ids) > length for ids in lengths)}


def readable_rows(features: np.ndarray, name: str) -> np.ndarray:
    """[N] which pictures could be read.

    Raises:
        UserError: none of them.
    """
    readable = ~np.isnan(features[:, 0])
    if not readable.any():
        raise UserError(f"{name}: none of its {len(features)} pictures is readable; check image_root")
    return readable


@dataclass
class Retrieval:
    """Distinct pictures, captions, and the picture (by number) that each caption belongs to."""

    pictures: Items
    captions: list[str]
    owners: list[int]

    def measure(self, encoder: Encoder) -> dict | None:
        """The result; None off the main rank. Pictures that cannot be read are left out with their captions."""
        image, errors = encoder.pictures(self.pictures)
        text = encoder.texts(self.captions)
        if not encoder.distributed.is_main:
            return None
        readable, owners = readable_rows(image, encoder.name), np.array(self.owners)
        kept = readable[owners]
        result = retrieval(image[readable], text[kept], (np.cumsum(readable) - 1)[owners[kept]],
                           encoder.distributed.device)
        return {"retrieval": result, **encoder.counts(self.captions, errors)}


@dataclass
class Classification:
    """Pictures, the class (by number) of each, the names of the classes, and templates with {} where a name goes."""

    pictures: Items
    labels: list[int]
    classes: list[str]
    templates: list[str]

    def measure(self, encoder: Encoder) -> dict | None:
        """The result; None off the main rank.

        A class is the mean of its prompts' normalised features, normalised again, as in OpenAI's CLIP.
        """
        texts = [template.replace("{}", name) for name in self.classes for template in self.templates]
        image, errors = encoder.pictures(self.pictures)
        prompts = encoder.texts(texts)
        if not encoder.distributed.is_main:
            return None
        readable = readable_rows(image, encoder.name)
        classifier = prompts.reshape(len(self.classes), len(self.templates), -1).mean(1)
        classifier /= np.linalg.norm(classifier, axis=-1, keepdims=True)
        result = classification(image[readable], classifier, np.array(self.labels)[readable],
                                encoder.distributed.device)
        return {"classification": result, **encoder.counts(texts, errors)}


@dataclass
class HardCaptions:
    """Questions about pictures: which caption is true. A row is right if its true caption beats every false one.

    rows: {"id", "image" (a name; rows of one picture share it), "kind", "picture" (its number in `pictures`),
    "true" (a text), "false" (texts)}.
    """

    pictures: Items
    rows: list[dict]

    def measure(self, encoder: Encoder) -> dict | None:
        """The result; None off the main rank. A tie is wrong; rows of a picture that cannot be read are left out."""
        texts = [text for row in self.rows for text in (row["true"], *row["false"])]
        image, errors = encoder.pictures(self.pictures)
        text = encoder.texts(texts)
        if not encoder.distributed.is_main:
            return None
        readable = readable_rows(image, encoder.name)
        items, start = [], 0
        for row in self.rows:
            stop = start + 1 + len(row["false"])
            if readable[row["picture"]]:
                true, *false = text[start:stop] @ image[row["picture"]]
                items.append({"id": row["id"], "image": row["image"], "kind": row["kind"],
                              "correct": int(all(true > score for score in false))})
            start = stop
        return {"hard": hard_accuracy(items), "hard_items": items, **encoder.counts(texts, errors)}


# --- during a training run -----------------------------------------------------------------------------------------


@dataclass
class HeldOut:
    """What train_encoder measures after each stage."""

    retrieval: Retrieval | None
    hard: HardCaptions | None

    def parts(self) -> list[Retrieval | HardCaptions]:
        return [task for task in (self.retrieval, self.hard) if task]


def routing(model: CLIPMoEModel, held_out: HeldOut, collate: Collate, device: torch.device) -> dict | None:
    """Expert load and router entropy per MoE layer over some pictures and captions; None for a dense model."""
    if not is_moe(model):
        return None
    task = held_out.parts()[0]
    captions = task.captions if held_out.retrieval else [row["true"] for row in task.rows]
    pixels, valid, _ = collate.pictures([task.pictures[n] for n in range(min(len(task.pictures), ROUTING_SAMPLES))])
    ids, _, _ = collate.captions(captions[:ROUTING_SAMPLES])
    return routing_statistics(model, pixels[valid].to(device), ids.to(device))


def evaluate(name: str, model: CLIPMoEModel, where: str, held_out: HeldOut, collate: Collate, folder: Path,
             config: EncoderConfig, distributed: Distributed) -> None:
    """Writes `folder/evaluation/<name>.json` and prints one line; nothing happens if the file is there.

    Every rank takes part in the encoding. `where` is the model's folder, relative to the output folder.
    """
    file = folder / "evaluation" / f"{name}.json"
    if file.is_file() or not held_out.parts():
        return
    encoder = Encoder(name, model.to(distributed.device).eval(), collate, distributed, config.workers,
                      config.precision, folder / "evaluation" / f".{name}")
    measured = [task.measure(encoder) for task in held_out.parts()]
    if not distributed.is_main:
        return
    encoder.scratch.rmdir()
    result = {"name": name, "model": where, "retrieval": None, "hard": {}, "hard_items": []}
    for part in measured:
        result |= part
    for key in ("skipped_pictures", "truncated_texts"):
        result[key] = sum(part[key] for part in measured)
    result["routing"] = routing(model, held_out, collate, distributed.device)
    write_json(file, result)
    print(f"[{name}] {line(result)}", flush=True)


def line(result: dict) -> str:
    """What was measured, in percent, in one line."""
    parts = []
    if found := result.get("retrieval"):
        for way, arrow in (("image_to_text", "image->text"), ("text_to_image", "text->image")):
            parts.append(f"{arrow} R@1/5/10 " + "/".join(f"{100 * found[way][f'R@{k}']:.1f}" for k in TOP))
    if found := result.get("classification"):
        parts += [f"{name} {100 * found[key]:.1f}" for name, key in (
            ("top-1", "top_1"), ("top-5", "top_5"), ("mean per class", "mean_per_class")) if found[key] is not None]
    if found := result.get("hard"):
        correct = np.mean([item["correct"] for item in result["hard_items"]])
        kinds = ", ".join(f"{kind} {100 * value['accuracy']:.1f}" for kind, value in found.items())
        parts.append(f"hard captions {kinds}" if len(found) <= 10 else
                     f"hard captions {100 * correct:.1f} ({len(found)} kinds)")
    return "; ".join(parts)
