"""`python -m demo.data FOLDER --stamps STAMPS`: makes the demo's data set from stamps. Same seed, same bytes."""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from clipmoe_vlm.runs import UserError, atomic_folder, fail, progress
from demo import questions, scenes, signs
from demo.stamps import OBJECTS, Stamps
from eval_vlm import probing
from eval_vlm.annotations import Picture, scene
from eval_vlm.build import write_mme
from eval_vlm.suites.pope import SETS

DESCRIBED = 0.2  # share of the text-only conversations that describe; the others answer questions


@dataclass(frozen=True)
class Sizes:
    """How much to make.

    Args:
        train, test: scenes. pope: test scenes with POPE questions, at most (those with three different objects).
        mme: pictures per MME subtask, two questions each. signs: training pictures per subtask that is no scene.
        llm_texts: text-only conversations. size: side of a picture, in pixels.
    """

    train: int = 12000
    test: int = 800
    pope: int = 200
    mme: int = 60
    signs: int = 400
    llm_texts: int = 40000
    size: int = 64


def make(folder: str | Path, stamps_folder: str | Path, sizes: Sizes, seed: int = 0) -> None:
    """Writes the data folder at once: it is there whole, or not at all.

    Raises:
        UserError: the stamps folder lacks a stamp.
    """
    stamps = Stamps(stamps_folder)
    missing = [stamp for stamp in OBJECTS.values() if not (stamps.folder / f"{stamp}.png").is_file()]
    if missing:
        raise UserError(f"{stamps.folder} has no {missing[0]}.png; fetch the stamps: python -m demo.fetch stamps")
    taken: set[tuple] = set()
    # Test scenes first: they stay the same however many training scenes are asked for.
    test = scenes.annotations(seed, "test", sizes.test, taken)
    train = scenes.annotations(seed, "train", sizes.train, taken)
    company = probing.Company(map(scene, train))
    test_pictures = [scene({**row, "image": Path(row["image"]).name}) for row in test]
    with atomic_folder(folder) as new:
        _draw_scenes(new, train + test, stamps, sizes.size, seed)
        _jsonl(new / "annotations.jsonl", train + test)
        _captions(new, {"train": train, "test": test}, seed)
        sign_samples = _train_signs(new, stamps, sizes, seed)
        _llava(new, train, sign_samples, company, seed)
        _llm_text(new, train, company, sizes.llm_texts, seed)
        _pope(new, test_pictures, company, sizes.pope, seed)
        _mme(new, test_pictures, company, stamps, sizes, seed)
        (new / "sizes.json").write_text(json.dumps({**asdict(sizes), "seed": seed}) + "\n", encoding="utf-8")


def _draw_scenes(folder: Path, rows: list[dict], stamps: Stamps, size: int, seed: int) -> None:
    for split in ("train", "test"):
        (folder / "images" / split).mkdir(parents=True)
    draw = partial(_draw_one, folder=folder, stamps_folder=stamps.folder, size=size, seed=seed)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for _ in progress(pool.map(draw, rows, chunksize=100), description="scenes", total=len(rows)):
            pass


_STAMPS: dict[Path, Stamps] = {}  # one reader per process, so that each stamp is read once


def _draw_one(row: dict, folder: Path, stamps_folder: Path, size: int, seed: int) -> None:
    stamps = _STAMPS.setdefault(stamps_folder, Stamps(stamps_folder))
    (folder / row["image"]).write_bytes(signs.image_bytes(scenes.draw(row, stamps, size, seed)))


def _captions(folder: Path, splits: dict[str, list[dict]], seed: int) -> None:
    for split, rows in splits.items():
        rng = random.Random(f"{seed} captions {split}")
        with open(folder / f"short_{split}.csv", "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
            writer.writerow(["filepath", "title"])
            writer.writerows([row["image"], scenes.short_caption(row, rng)] for row in rows)
        _jsonl(folder / f"detailed_{split}.jsonl",
               [{"image": row["image"], "caption": scenes.detailed_caption(row, rng)} for row in rows])
    rng = random.Random(f"{seed} hard captions")
    _jsonl(folder / "hard_test.jsonl",
           [{"id": f"{row['id']}_{kind}", "image": row["image"], "true": true, "false": false, "kind": kind}
            for row in splits["test"] for kind, true, false in scenes.hard_captions(row, rng)])


def _train_signs(folder: Path, stamps: Stamps, sizes: Sizes, seed: int) -> list[dict]:
    samples = []
    (folder / "images" / "signs").mkdir()
    for subtask in signs.SUBTASKS:
        for i in range(sizes.signs):
            sign = signs.Sign(subtask, f"{seed} train {subtask} {i}", stamps, sizes.size)
            image = f"images/signs/{subtask}_{i:05d}.png"
            (folder / image).write_bytes(signs.image_bytes(sign.picture))
            samples.append({"id": f"{subtask}_{i:05d}", "image": image,
                            "conversations": questions.conversation("<image>", sign.turns())})
    return samples


def _llava(folder: Path, train: list[dict], sign_samples: list[dict], company: probing.Company, seed: int) -> None:
    rng = random.Random(f"{seed} llava")
    stage_1 = [{"id": row["id"], "image": row["image"],
                "conversations": [{"from": "human", "value": "<image>"},
                                  {"from": "gpt", "value": scenes.detailed_caption(row, rng, with_places=True)}]}
               for row in train]
    stage_2 = sign_samples + [
        {"id": row["id"], "image": row["image"],
         "conversations": questions.conversation("<image>", questions.turns(row, company, rng))} for row in train]
    _json(folder / "llava_stage1.json", stage_1)
    _json(folder / "llava_stage2.json", stage_2)


def _llm_text(folder: Path, train: list[dict], company: probing.Company, count: int, seed: int) -> None:
    """Maps of training scenes, to be described or with questions: what a language model can learn without seeing."""
    rng = random.Random(f"{seed} llm text")
    samples = []
    for i in range(count):
        row = train[i % len(train)]
        scene = scenes.word_map(row, rng)
        if rng.random() < DESCRIBED:
            talk = [{"from": "human", "value": scene},
                    {"from": "gpt", "value": scenes.detailed_caption(row, rng, with_places=True)}]
        else:
            talk = questions.conversation(scene, questions.turns(row, company, rng))
        samples.append({"id": f"text_{i:06d}", "conversations": talk})
    _json(folder / "llm_text.json", samples)


def _pope(folder: Path, test: list[Picture], company: probing.Company, count: int, seed: int) -> None:
    """What is frequent and what keeps company is told by the training scenes alone."""
    (folder / "pope").mkdir()
    enough = [picture for picture in test if len(picture.objects) >= probing.HALF][:count]
    for kind in SETS:
        _jsonl(folder / "pope" / f"coco_pope_{kind}.json", probing.pope_set(enough, company, kind, seed))


def _mme(folder: Path, test: list[Picture], company: probing.Company, stamps: Stamps, sizes: Sizes, seed: int) -> None:
    """MME's release layout; the pairs about scenes are eval_vlm's, those about signs our own."""
    for subtask in probing.SUBTASKS:
        pairs = probing.mme_pairs(test, subtask, company, seed)[:sizes.mme]
        write_mme(pairs, folder / "images" / "test", folder / "mme" / subtask)
    for subtask in signs.SUBTASKS:
        target = folder / "mme" / subtask
        target.mkdir()
        for i in range(sizes.mme):
            sign = signs.Sign(subtask, f"{seed} test {subtask} {i}", stamps, sizes.size)
            (target / f"{i:04d}.png").write_bytes(signs.image_bytes(sign.picture))
            (target / f"{i:04d}.txt").write_text("{}\tYes\n{}\tNo\n".format(*sign.pair), encoding="utf-8")


def _jsonl(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _json(file: Path, value: list) -> None:
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in value)
    file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.data", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stamps", type=Path, required=True, help="the stamps package's folder of stamps")
    parser.add_argument("--seed", type=int, default=0)
    for name, default in asdict(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    arguments = vars(parser.parse_args())
    folder, stamps, seed = arguments.pop("folder"), arguments.pop("stamps"), arguments.pop("seed")
    try:
        make(folder, stamps, Sizes(**arguments), seed)
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
