"""What a page's browser shows: the questions with their answers, small pictures, and where the tower's patches went."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from clipmoe_vlm.runs import progress
from eval_vlm.outcomes import Outcome

DATA_BYTES = 9_000_000  # of the data in the page, so that the whole stays below 10 MB
PICTURES = 2000  # with more, small ones would not be worth looking at
SIZES = ((320, 75), (320, 60), (256, 55), (224, 50), (160, 45), (128, 40), (96, 40))  # longer side, JPEG's quality
LONGEST = 4000  # characters of a text


def shown(rows: list[dict], most: int) -> list[dict]:
    """The questions about every n-th picture, so that at most `most` pictures are needed."""
    names = list(dict.fromkeys(row["image"] for row in rows))
    chosen = set(names[::-(-len(names) // most) or 1])
    return [row for row in rows if row["image"] in chosen]


def browser_data(runs: Sequence[Any]) -> dict[str, Any]:
    """The page's data of one run, or of two that answered the same questions.

    Args:
        runs: `eval_vlm.page.Run`s.

    Returns:
        `strings`; `questions`, rows of `[id, suite, set, picture, question, rest of the prompt, label]` followed per
        run by `[answer, read, value, cut]`, where texts are numbers of `strings`; `pictures`, dicts of `name`, `src`
        or `note` and, if there is any, `routing` per run; `fit` per run; and in `note` what was left out.
    """
    strings: dict[str, int] = {}
    pictures: dict[tuple[Path, ...], int] = {}
    entries: list[dict[str, Any]] = []
    questions, asked = [], 0

    def text(value: object) -> int:
        words = str(value)
        if len(words) > LONGEST:
            words = f"{words[:LONGEST]} ... ({len(words):,} characters)"
        return strings.setdefault(words, len(strings))

    first = runs[0]
    for suite, all_rows in first.predictions.items():
        rows = shown(all_rows, PICTURES // len(first.predictions))
        asked += len(all_rows)
        by_id = [{row["id"]: row for row in run.predictions[suite]} for run in runs]
        for row in rows:
            paths = tuple(run.pictures[suite] / row["image"] for run in runs)
            if paths not in pictures:
                pictures[paths] = len(entries)
                entries.append({"name": row["image"]} | _routing([run.routing[suite].get(row["image"])
                                                                   for run in runs]))
            prompt = row.get("prompt", "")
            line = [row["id"], text(suite), text(row["category"]), pictures[paths], text(row["question"]),
                    text(prompt.removeprefix(row["question"]).strip()), text(_label(row))]
            for run, answers in zip(runs, by_id, strict=True):
                outcome: Outcome = run.outcomes[suite][row["id"]]
                line += [text(answers[row["id"]]["answer"]), text(outcome.read), outcome.value,
                         int(answers[row["id"]].get("cut", False))]
            questions.append(line)
    data = {"names": [run.name for run in runs], "fit": [run.fit for run in runs], "strings": list(strings),
            "questions": questions, "pictures": entries, "note": ""}
    small = _add_thumbnails(list(pictures), entries, DATA_BYTES - len(to_script(data).encode("utf-8", "replace")))
    if len(questions) < asked:
        data["note"] = (f"{len(questions):,} of {asked:,} questions: those about every n-th picture, so that this page "
                        "stays small. The tables above count all.")
    if small:
        data["note"] += f" Pictures are shrunk to {small} pixels, so that this page stays small."
    return data


def _label(row: dict) -> str:
    """The right answer; of several annotators each one's, the most frequent first."""
    if row.get("label") is not None:
        return str(row["label"])
    answers = row.get("answers")
    if not isinstance(answers, list):
        return "-" if answers is None else str(answers)
    words = [str(one.get("answer", one)) if isinstance(one, dict) else str(one) for one in answers]
    return ", ".join(f"{word} ({words.count(word)})" if words.count(word) > 1 else word
                     for word in sorted(dict.fromkeys(words), key=lambda word: -words.count(word))) or "-"


def _routing(rows: list[dict | None]) -> dict[str, Any]:
    """Of each run the picture's first, middle and last map."""
    if not any(rows):
        return {}
    kept = []
    for row in rows:
        layers = sorted(row["layers"], key=int) if row else []
        chosen = sorted({0, len(layers) // 2, len(layers) - 1}) if layers else []
        kept.append({"grid": row["grid"], "experts": row["num_experts"],
                     "layers": {layers[index]: row["layers"][layers[index]] for index in chosen}} if row else None)
    return {"routing": kept}


def _add_thumbnails(paths: list[tuple[Path, ...]], entries: list[dict], budget: int) -> int | None:
    """Gives each entry its `src`, or a `note` why there is none.

    Args:
        paths: per entry the places where the picture may be.
        budget: bytes for all of them.

    Returns:
        the longer side of the smallest, if any is smaller than SIZES' first.
    """
    each = max(budget, 0) // max(len(paths), 1)
    smallest = SIZES[0][0]
    with ThreadPoolExecutor() as pool:
        results = pool.map(lambda places: thumbnail(places, each), paths)
        for entry, result in zip(entries, progress(results, description="pictures of the page", total=len(paths),
                                                   enabled=len(paths) > 1000), strict=True):
            if isinstance(result, str):
                entry["note"] = result
            else:
                entry["src"], side = "data:image/jpeg;base64," + base64.b64encode(result[0]).decode(), result[1]
                smallest = min(smallest, side)
    return smallest if smallest < SIZES[0][0] else None


def thumbnail(places: Sequence[Path], most: int) -> tuple[bytes, int] | str:
    """A JPEG of the first of `places` that can be read, in the best of SIZES that takes at most `most` bytes in the
    page (the last of them in any case), and the longer side of that size; or why there is none."""
    problem = "no picture"
    for path in places:
        try:
            with Image.open(path) as image:
                image.draft("RGB", (2 * SIZES[0][0],) * 2)
                image = ImageOps.exif_transpose(image)
                if image.has_transparency_data:
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
                image = image.convert("RGB")
        except FileNotFoundError:
            problem = "The picture was not there when this page was made."
            continue
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            problem = "The picture could not be read when this page was made."
            continue
        for side, quality in SIZES:
            smaller = image.copy()
            smaller.thumbnail((side, side), Image.Resampling.BICUBIC)
            stream = io.BytesIO()
            smaller.save(stream, "JPEG", quality=quality, optimize=True)
            if 4 * len(stream.getvalue()) / 3 + 30 <= most:
                break
        return stream.getvalue(), side
    return problem


def fit(model: Path) -> dict[str, Any] | None:
    """How a VLM's processor brings a picture to the square that its tower sees, so that maps can lie over pictures.

    Returns:
        `{"how": "pad"}` (ground added), `{"how": "stretch"}`, `{"how": "crop", "zoom": z}` (the middle square, of 1/z
        of the shorter side), or None where the folder does not tell.
    """
    values: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        try:
            content = json.loads((model / name).read_text(encoding="utf-8"))
            values |= content.get("image_processor", {} if name == "processor_config.json" else content)
        except (OSError, ValueError, AttributeError, TypeError):
            continue
    size, crop = values.get("size"), values.get("crop_size")
    if "LlavaNext" in str(values.get("image_processor_type")):
        return {"how": "stretch"}  # the first tile
    if values.get("do_pad"):
        return {"how": "pad"}
    if not isinstance(size, dict):
        return None
    if values.get("do_center_crop") and "shortest_edge" in size:
        height = crop["height"] if isinstance(crop, dict) else crop
        return {"how": "crop", "zoom": size["shortest_edge"] / height} if height else None
    return {"how": "stretch"} if "height" in size else None


def to_script(data: object) -> str:
    """JSON that may stand in a script element: no character of it ends the element or a line of JavaScript."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
