"""POPE (Li et al. 2023, arXiv 2305.10355): is an object in the picture? Three sets of yes/no questions.

Standard files: `coco_pope_{random,popular,adversarial}.json`, JSON lines `question_id, image, text, label`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from clipmoe_vlm.intervals import bootstrap_interval, cluster_interval, paired_interval
from clipmoe_vlm.runs import UserError, read_jsonl
from eval_vlm.config import PopeConfig
from eval_vlm.stats import bounds, difference
from eval_vlm.suites import Points, check_rule, last_answers, vlmevalkit_yes_no, yes_or_no

SETS = ("random", "popular", "adversarial")


def load(config: PopeConfig, limit: int | None = None) -> tuple[list[dict], dict[str, str]]:
    """The questions of the three sets and the sha256 of each file.

    Args:
        limit: from each set only its first pictures, until there are so many questions.

    Raises:
        UserError: a file is missing, a line lacks a field, repeats a question_id or has another label than yes or no.
    """
    records, hashes = [], {}
    for category in SETS:
        file = Path(config.questions_dir) / f"coco_pope_{category}.json"
        seen: set[str] = set()
        rows = []
        for number, row in enumerate(read_jsonl(file), 1):
            absent = [field for field in ("question_id", "image", "text", "label") if field not in row]
            if absent or not isinstance(row["image"], str) or not isinstance(row["text"], str):
                raise UserError(f"{file}, line {number}: " + (f"no field {', '.join(absent)}" if absent else "image or "
                                "text is no string") + "; POPE lines have question_id, image, text and label")
            question_id = str(row["question_id"])
            if question_id in seen:
                raise UserError(f"{file}, line {number}: question_id {question_id} is there twice; number them anew")
            seen.add(question_id)
            rows.append({"id": f"{category}/{question_id}", "suite": "pope", "category": category,
                         "image": row["image"], "question_id": row["question_id"], "question": row["text"],
                         "label": yes_or_no(row["label"], f"{file}, question {question_id}")})
        if not rows:
            raise UserError(f"{file} holds no question; get the set again")
        hashes[category] = hashlib.sha256(file.read_bytes()).hexdigest()
        records += first_pictures(rows, limit)
    return records, hashes


def first_pictures(rows: list[dict], limit: int | None) -> list[dict]:
    """All questions of the first pictures that hold at least `limit` questions together."""
    if limit is None:
        return rows
    chosen: list[dict] = []
    for picture in dict.fromkeys(row["image"] for row in rows):
        if len(chosen) >= limit:
            break
        chosen += [row for row in rows if row["image"] == picture]
    return chosen


def picture_folder(config: PopeConfig) -> Path:
    return Path(config.image_folder)


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


def _read(records: list[dict], rule: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
            label, predicted, right = _read(answered, rule)
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
        figures["all"] = _figures(*_read(answered, rule), rule)
    return figures


def points(records: list[dict], rule: str = "official") -> dict[str, Points]:
    """Per set: 1 for a right answer, 0 for a wrong one; `all` pools the sets."""
    rows = [record for record in last_answers(records)[0] if record["answer"] is not None]
    right = _read(rows, rule)[2]
    result = {}
    for name in (*SETS, "all"):
        chosen = [index for index, record in enumerate(rows) if name in (record["category"], "all")]
        if chosen:
            result[name] = Points([f"{rows[index]['category']}/{rows[index]['question_id']}" for index in chosen],
                                  [float(right[index]) for index in chosen], [rows[index]["image"] for index in chosen])
    return result


def report(records: list[dict], rule: str, hashes: dict[str, str], seed: int = 0) -> dict[str, Any]:
    """Each set's figures with intervals clustered by picture, and `all` (pooled); for scores.json.

    `always_yes` beside each set is the accuracy and F1 of a model that says yes to everything; chance is 0.5.
    """
    scale = 100.0 if rule == "vlmevalkit" else 1.0
    figures = score(records, rule)
    rows = [record for record in last_answers(records)[0] if record["answer"] is not None]
    result: dict[str, Any] = {}
    for name in (*SETS, "all"):
        chosen = [record for record in rows if name in (record["category"], "all")]
        label, predicted, right = _read(chosen, rule)
        one = dict(figures[name]) if name in figures else _figures(label, predicted, right, rule)
        pictures = [record["image"] for record in chosen]
        f1_name = "f1_score" if rule == "lmms_eval" else "f1"

        def f1(index, cells=(label, predicted, right), f1_name=f1_name):
            return _figures(*(cell[index] for cell in cells), rule)[f1_name]

        accuracy = cluster_interval(scale * right, pictures)
        yes = _figures(label, np.full(len(label), "yes", dtype=object), label, rule)
        one |= {"accuracy_interval": bounds(accuracy), "f1_interval": bounds(bootstrap_interval(f1, pictures, seed)),
                "n": len(chosen), "pictures": accuracy.clusters, "empty_answers": sum(not r["answer"] for r in chosen),
                "always_yes": {"accuracy": yes["accuracy"], "f1": yes[f1_name]}, "chance": 0.5 * scale}
        if name in hashes:
            one["questions_sha256"] = hashes[name]
        result[name] = one
    if figures.get("mean"):
        result["mean"] = figures["mean"]
    return result


def compare(a: list[dict], b: list[dict], rule: str) -> dict[str, Any]:
    """Accuracy of run b minus that of run a, on the same questions, per set and pooled."""
    points_a, points_b = points(a, rule), points(b, rule)
    result = {}
    for name, ours in points_a.items():
        theirs = dict(zip(points_b[name].ids, points_b[name].values, strict=True))
        values = [theirs[question] for question in ours.ids]
        result[name] = difference(ours.values, values, paired_interval(values, ours.values, ours.pictures))
    return result
