"""POPE (Li et al. 2023, arXiv 2305.10355): is an object in the picture? Three sets of yes/no questions.

Standard files: `coco_pope_{random,popular,adversarial}.json`, JSON lines `question_id, image, text, label`, and
`{aokvqa,gqa}_pope_seem_*.json` alike; or lmms-lab/POPE.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from clipmoe_vlm.intervals import Estimate, combined, mean_of, ratio_of
from clipmoe_vlm.runs import UserError, read_jsonl
from eval_vlm.config import PopeConfig
from eval_vlm.stats import with_spread
from eval_vlm.suites import (
    SHORT_ANSWER,
    Points,
    check_rule,
    last_answers,
    vlmevalkit_yes_no,
    yes_or_no,
)
from eval_vlm.suites.questions import check_records, first_pictures, holds_dataset, read_json, read_rows

SETS = ("random", "popular", "adversarial")
SOURCES = ("coco", "aokvqa", "gqa")
LLAVA_QUESTIONS = "llava_pope_test.jsonl"  # numbers the questions of all three sets; LLaVA's answers go by its numbers


def load(config: PopeConfig, limit: int | None = None) -> tuple[list[dict], dict[str, str]]:
    """The questions of the three sets (of one, if `questions_dir` is its file) and the sha256 of each file.

    Args:
        limit: from each set only its first pictures, until there are so many questions.

    Raises:
        UserError: a file is missing, a line lacks a field, repeats a question_id or has another label than yes or no.
    """
    if config.source not in SOURCES:
        raise UserError(f"pope.source: '{config.source}' is unknown; choose one of {', '.join(SOURCES)}")
    folder = Path(config.questions_dir)
    files = {category: _file(folder, config.source, category) for category in SETS}
    if holds_dataset(config.questions_dir):
        return _load_dataset(config, limit)
    if folder.is_file():
        files = {category: folder for category in SETS if category in folder.stem}
        if not files:
            raise UserError(f"{folder}: the name must say which set it is ({', '.join(SETS)}); rename it, or name the "
                            "folder of all three")
    numbers = _llava_numbers(folder)
    records, hashes = [], {}
    for category, file in files.items():
        rows, seen = [], set()
        for number, row in enumerate(_read(file), 1):
            absent = [field for field in ("question_id", "image", "text", "label") if field not in row]
            if absent or not isinstance(row["image"], str) or not isinstance(row["text"], str):
                raise UserError(f"{file}, line {number}: " + (f"no field {', '.join(absent)}" if absent else "image or "
                                "text is no string") + "; POPE lines have question_id, image, text and label")
            if str(row["question_id"]) in seen:
                raise UserError(f"{file}, line {number}: question_id {row['question_id']} is there twice; number them "
                                "anew")
            seen.add(str(row["question_id"]))
            record = _record(category, row["question_id"], row["image"], row["text"], row["label"], str(file))
            llava_id = numbers.get((category, row["image"], row["text"]))
            rows.append(record | ({"llava_id": llava_id} if llava_id else {}))
        if not rows:
            raise UserError(f"{file} holds no question; get the set again")
        hashes[category] = hashlib.sha256(file.read_bytes()).hexdigest()
        records += first_pictures(rows, limit)
    return records, hashes


def _file(folder: Path, source: str, category: str) -> Path:
    """Where a set's file lies in the release's layouts; the first of them if it lies nowhere."""
    names = [f"{source}_pope_{category}.json", f"{source}_pope_seem_{category}.json"]
    places = [place / name for place in (folder, folder / source, folder / "seem" / source) for name in names]
    return next((place for place in places if place.is_file()), places[0])


def _read(file: Path) -> list[dict]:
    """JSON lines; the A-OKVQA and GQA sets are lists."""
    whole = file.is_file() and file.read_bytes().lstrip().startswith(b"[")
    return read_json(file) if whole else read_jsonl(file)


def _record(category: str, question_id: object, image: str, text: str, label: object, where: str) -> dict:
    return {"id": f"{category}/{question_id}", "suite": "pope", "category": category, "image": image,
            "question_id": question_id, "question": text,
            "label": yes_or_no(label, f"{where}, question {question_id}")}


def _llava_numbers(folder: Path) -> dict[tuple[str, str, str], str]:
    for place in (folder, folder.parent):
        if (place / LLAVA_QUESTIONS).is_file():
            return {(row["category"], row["image"], row["text"].removesuffix(SHORT_ANSWER)): str(row["question_id"])
                    for row in read_jsonl(place / LLAVA_QUESTIONS)}
    return {}


def _load_dataset(config: PopeConfig, limit: int | None) -> tuple[list[dict], dict[str, str]]:
    rows, sha256 = read_rows(config.questions_dir, ("question_id", "question", "answer", "category", "image"),
                             config.image_folder, config.split)
    records = [_record(row["category"], row["question_id"], row["image"], row["question"], row["answer"],
                       config.questions_dir) for row in rows]
    check_records(records, config.questions_dir)
    sets = {name: [record for record in records if record["category"] == name] for name in SETS}
    return ([record for chosen in sets.values() for record in first_pictures(chosen, limit)],
            {name: sha256 for name, chosen in sets.items() if chosen})


def prompt(record: dict, suffix: str | None = None) -> str:
    return record["question"] + (SHORT_ANSWER if suffix is None else suffix)


def parse(record: dict, rule: str = "official") -> Any:
    """How `rule` reads the answer.

    official: `no` if the part before the first full stop, without commas, split at single blanks, has a piece `No`,
    `no` or `not`, else `yes` (an empty answer too). lmms_eval: `{"prediction", "score"}`; the whole answer must be the
    label. vlmevalkit: `Yes`, `No` or `Unknown`.
    """
    check_rule(rule)
    answer = record["answer"]
    if rule == "official":
        pieces = answer.split(".")[0].replace(",", "").split(" ")
        return "no" if {"No", "no", "not"} & set(pieces) else "yes"
    if rule == "lmms_eval":
        prediction = answer.strip().lower()
        return {"prediction": prediction, "score": float(prediction == _label(record))}
    return vlmevalkit_yes_no(answer)


def _label(record: dict) -> str:
    return yes_or_no(record["label"], f"POPE {record['category']}, question {record['question_id']}")


def _cells(records: list[dict], rule: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per record: label is yes, answer read as yes, answer right (`[n]` of bool each)."""
    parsed = [parse(record, rule) for record in records]
    if rule == "lmms_eval":
        parsed = [one["prediction"] for one in parsed]
    label = np.array([_label(record) == "yes" for record in records], dtype=bool)
    predicted = np.array([str(one).lower() for one in parsed], dtype=object)
    right = predicted == np.where(label, "yes", "no").astype(object)
    return label, predicted, right


def _figures(label: np.ndarray, predicted: np.ndarray, right: np.ndarray, rule: str) -> dict[str, Any]:
    """The rule's figures of one set; precision, recall and F1 are 0 where they are undefined."""
    says_yes = predicted == "yes"
    # lmms-eval counts an answer that is neither yes nor no in no cell; the others take everything but yes as no.
    says_no = predicted == "no" if rule == "lmms_eval" else ~says_yes
    tp, fp = int((says_yes & label).sum()), int((says_yes & ~label).sum())
    fn, tn = int((says_no & label).sum()), int((says_no & ~label).sum())
    precision = tp / (tp + fp) if tp + fp else 0.0
    recall = tp / (tp + fn) if tp + fn else 0.0
    f1 = 2 * precision * recall / (precision + recall) if tp else 0.0
    accuracy = float(right.mean())
    if rule == "lmms_eval":
        return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1_score": f1,
                "yes_ratio": float(label.mean())}
    if rule == "vlmevalkit":
        return {"f1": 100 * f1, "accuracy": 100 * accuracy, "precision": 100 * precision, "recall": 100 * recall}
    figures: dict[str, Any] = {
        "samples": len(label), "TP": tp, "FP": fp, "TN": tn, "FN": fn, "accuracy": accuracy, "precision": precision,
        "recall": recall, "f1": f1, "yes_ratio": float(says_yes.mean())}
    return figures


def _undefined(label: np.ndarray, predicted: np.ndarray) -> list[str]:
    says_yes = predicted == "yes"
    if not says_yes.any():
        return ["precision and f1 undefined: no yes answer"]
    if not label.any():
        return ["recall undefined: no yes label"]
    if not (says_yes & label).any():
        return ["f1 undefined"]
    return []


def score(records: list[dict], rule: str = "official") -> dict[str, Any]:
    """The figures of each set present, and what the rule adds: `mean` of the three sets (official) or `all` (pooled).

    Answers are matched by question_id; of a question answered twice the last counts; questions whose answer is None
    are left out. A set's `warn` says so, and which figures are undefined (0). VLMEvalKit's figures are percent.
    `mean` is None unless all three sets are there.

    Raises:
        UserError: no predictions, or a label other than yes or no.
    """
    check_rule(rule)
    figures: dict[str, Any] = {}
    for category in dict.fromkeys([*SETS, *(record["category"] for record in records)]):
        rows, warnings = last_answers(record for record in records if record["category"] == category)
        answered = [record for record in rows if record["answer"] is not None]
        missing = len(rows) - len(answered)
        if missing:
            warnings.append(f"{missing} {'question has' if missing == 1 else 'questions have'} no answer")
        if answered:
            label, predicted, right = _cells(answered, rule)
            figures[category] = _figures(label, predicted, right, rule)
            warnings += _undefined(label, predicted)
            if warnings:
                figures[category]["warn"] = "; ".join(warnings)
    if not figures:
        raise UserError("POPE: no predictions for this category; run the model on the questions first")
    if rule == "official":
        names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
        whole = all(category in figures for category in SETS)
        figures["mean"] = None
        if whole:
            figures["mean"] = {name: sum(figures[category][name] for category in SETS) / 3 for name in names}
    else:
        answered = [record for record in last_answers(records)[0] if record["answer"] is not None]
        figures["all"] = _figures(*_cells(answered, rule), rule)
    return figures


def points(records: list[dict], rule: str = "official") -> dict[str, Points]:
    """Per set: 1 for a right answer, 0 for a wrong one; `all` pools the sets."""
    rows = [record for record in last_answers(records)[0] if record["answer"] is not None]
    right = _cells(rows, rule)[2]
    result = {}
    for name in (*SETS, "all"):
        chosen = [index for index, record in enumerate(rows) if name in (record["category"], "all")]
        if chosen:
            result[name] = Points([f"{rows[index]['category']}/{rows[index]['question_id']}" for index in chosen],
                                  [float(right[index]) for index in chosen], [rows[index]["image"] for index in chosen])
    return result


def estimates(records: list[dict], rule: str = "official") -> dict[str, Estimate]:
    """Accuracy (of 1) of each set and of `all`, then `<set> F1`; `mean accuracy` and `mean F1` of the three sets, which
    ask about the same pictures."""
    rows = [record for record in last_answers(records)[0] if record["answer"] is not None]
    accuracy, f1 = {}, {}
    for name in (*SETS, "all"):
        chosen = [record for record in rows if name in (record["category"], "all")]
        if not chosen:
            continue
        label, predicted, right = _cells(chosen, rule)
        pictures = [record["image"] for record in chosen]
        says_yes = predicted == "yes"
        missed = label & (predicted == "no" if rule == "lmms_eval" else ~says_yes)
        hits = 2.0 * (says_yes & label)
        accuracy[name] = mean_of(right.astype(float), pictures, 1.0)
        f1[name] = ratio_of(hits, hits + (says_yes & ~label) + missed, pictures, 1.0)
    result = accuracy | {f"{name} F1": one for name, one in f1.items()}
    if all(name in accuracy for name in SETS):
        for figure, sets in (("accuracy", accuracy), ("F1", f1)):
            result[f"mean {figure}"] = combined([sets[name] for name in SETS], [1 / 3] * 3)
    return result


def report(records: list[dict], rule: str, hashes: dict[str, str]) -> dict[str, Any]:
    """Each set's figures with intervals clustered by picture, and `all` (pooled); for scores.json.

    `always_yes` beside each set is the accuracy and F1 of a model that says yes to everything; chance is 0.5.
    """
    scale = 100.0 if rule == "vlmevalkit" else 1.0
    f1_name = "f1_score" if rule == "lmms_eval" else "f1"
    figures, spread = score(records, rule), estimates(records, rule)
    rows = [record for record in last_answers(records)[0] if record["answer"] is not None]
    result: dict[str, Any] = {}

    def spreads(name: str, suffix: str = "") -> dict[str, Any]:
        parts = (("accuracy", f"{name}{suffix}"), ("f1", f"{name} F1"))
        return {key: value for part, key_of in parts
                for key, value in with_spread(combined([spread[key_of]], [scale]), part).items()}

    for name in (*SETS, "all"):
        chosen = [record for record in rows if name in (record["category"], "all")]
        if not chosen:
            continue
        label, predicted, right = _cells(chosen, rule)
        one = dict(figures[name]) if name in figures else _figures(label, predicted, right, rule)
        yes = _figures(label, np.full(len(label), "yes", dtype=object), label, rule)
        one |= {**spreads(name), "n": len(chosen), "pictures": len(spread[name].errors),
                "empty_answers": sum(not r["answer"] for r in chosen),
                "always_yes": {"accuracy": yes["accuracy"], "f1": yes[f1_name]}, "chance": 0.5 * scale}
        if name in hashes:
            one["questions_sha256"] = hashes[name]
        result[name] = one
    if figures.get("mean"):
        result["mean"] = figures["mean"] | spreads("mean", " accuracy")
    return result
