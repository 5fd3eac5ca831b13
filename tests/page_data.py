"""Runs for tests of pages, made without a model."""

import itertools
import json
import random
import shutil
from pathlib import Path

from omegaconf import OmegaConf
from PIL import Image, ImageDraw

from clipmoe_vlm.runs import write_json
from eval_vlm.config import EvalConfig
from eval_vlm.predictions import predictions_file, routing_file
from eval_vlm.routing_rows import DIGITS
from eval_vlm.suites import module, report

THINGS = ["cat", "big red truck", "apple", "cup", "dog", "boat", "tree", "owl", "kite", "clock", "bench", "spoon"]


def draw_pictures(folder: Path, count: int, size: tuple[int, int] = (640, 480)) -> None:
    """Pictures as hard to compress as photographs: coarse noise with shapes on it."""
    generator = random.Random(0)
    folder.mkdir(parents=True)
    for index in range(count):
        if index >= 20:  # drawing takes longer than anything that is tested
            shutil.copy(folder / f"{index % 20}.jpg", folder / f"{index}.jpg")
            continue
        noise = Image.frombytes("RGB", (32, 24), generator.randbytes(32 * 24 * 3)).resize((size[0] // 2, size[1] // 2))
        noise = Image.blend(noise, Image.frombytes("RGB", noise.size, generator.randbytes(3 * noise.width
                                                                                          * noise.height)), 0.15)
        pen = ImageDraw.Draw(noise)
        for _ in range(6):
            x, y = generator.randrange(noise.width), generator.randrange(noise.height)
            pen.ellipse((x, y, x + 60, y + 40), fill=tuple(generator.randbytes(3)))
        noise.resize(size).save(folder / f"{index}.jpg", quality=90)


def make_pope(folder: Path, pictures: int, sets: tuple[str, ...] = ("random", "popular", "adversarial")) -> Path:
    """POPE's files: 6 questions a picture, spread over `sets`."""
    generator = random.Random(1)
    (folder / "pope").mkdir(parents=True)
    lines = {name: [] for name in sets}
    for index in range(pictures):
        for number, thing in enumerate(generator.sample(THINGS, 6)):
            name = sets[(index + number) % len(sets)]
            article = "an" if thing[0] in "aeiou" else "a"
            lines[name].append({"question_id": len(lines[name]) + 1, "image": f"{index}.jpg",
                                "text": f"Is there {article} {thing} in the image?",
                                "label": "yes" if (index + number // 3) % 2 else "no"})
    for name, rows in lines.items():
        (folder / "pope" / f"coco_pope_{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_run(folder: Path, config: EvalConfig, answer, routing=None) -> Path:
    """A finished run's folder without report.html.

    Args:
        answer: record -> answer, or a dict with what else the prediction holds.
        routing: picture's name -> its row of the routing file.
    """
    scores = {"model": config.model, "rule": config.rule, "suites": {}}
    folder.mkdir(parents=True)
    config.output_dir = str(folder)
    OmegaConf.save(OmegaConf.structured(config), folder / "config.yaml")
    for suite in config.suites:
        records, hashes = module(suite).load(getattr(config, suite), None)
        rows = []
        for record in records:
            result = answer(record)
            rows.append({**record, "prompt": module(suite).prompt(record, None),
                         **(result if isinstance(result, dict) else {"answer": result})})
        write_lines(predictions_file(folder, suite), rows)
        if routing:
            write_lines(routing_file(folder, suite),
                        [routing(image) for image in dict.fromkeys(row["image"] for row in rows)])
        scores["suites"][suite] = report(suite, rows, config.rule, hashes)
    write_json(folder / "scores.json", scores)
    return folder


def write_lines(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def guess(seed: int, right: float):
    """Answers of a model that is right so often, and sometimes says neither word."""
    generator, number = random.Random(seed), itertools.count(seed)

    def answer(record: dict) -> str | dict:
        label = record["label"].lower()
        word = label if generator.random() < right else {"yes": "no", "no": "yes"}[label]
        kind = next(number) % 60
        if kind == 20:
            return {"answer": "I see many things in it, and", "cut": True}
        return "" if kind == 40 else f"{word.capitalize()}."

    return answer


def routing_row(image: str, grid: tuple[int, int] = (6, 6), experts: int = 4) -> dict:
    generator = random.Random(image)
    return {"image": image, "grid": list(grid), "num_experts": experts,
            "layers": {str(layer): "".join(generator.choice(DIGITS[:experts]) for _ in range(grid[0] * grid[1]))
                       for layer in (0, 1, 2, 5, 8)}}
