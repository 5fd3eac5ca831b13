"""MME (Fu et al. 2023, arXiv 2306.13394): two yes/no questions per picture, ten perception and four cognition subtasks.

Release layout: `<subtask>/` holds pictures and, for each, a text file of the same stem with two lines
`question<TAB>Yes|No`; some subtasks keep them in `<subtask>/images/` and `<subtask>/questions_answers_YN/`. Or
lmms-lab/MME.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipmoe_vlm.intervals import Estimate, combined, mean_of
from clipmoe_vlm.runs import UserError
from eval_vlm.config import MmeConfig
from eval_vlm.stats import with_spread
from eval_vlm.suites import SHORT_ANSWER, Points, check_rule, last_answers, vlmevalkit_yes_no, yes_or_no
from eval_vlm.suites.questions import check_records, first_pictures, holds_dataset, read_rows

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASKS = PERCEPTION + COGNITION
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
YES_OR_NO = "Please answer yes or no."  # ends every question
CHANCE = 75.0  # a fair coin: 100 * 1/2 + 100 * 1/4


def load(config: MmeConfig, limit: int | None = None) -> tuple[list[dict], dict[str, str]]:
    """The questions of all subtasks present and the sha256 of each subtask's text files, in order of their names.

    Args:
        limit: from each subtask only its first pictures, until there are so many questions.

    Raises:
        UserError: no subtask, a text file without its picture or without exactly two questions, a bad line or label.
    """
    root = Path(config.folder)
    tasks = [task for task in TASKS if (root / task).is_dir()]
    if not tasks and holds_dataset(config.folder):
        return _load_dataset(config, limit)
    if not tasks:
        raise UserError(f"{root} holds no MME subtask; name the folder that holds {', '.join(TASKS[:4])}, ...")
    records, hashes = [], {}
    for task in tasks:
        texts, pictures = root / task, root / task
        if (texts / "questions_answers_YN").is_dir():
            texts, pictures = texts / "questions_answers_YN", pictures / "images"
        stems = {file.stem: file for file in sorted(pictures.glob("*")) if file.suffix.lower() in PICTURES}
        digest, rows = hashlib.sha256(), []
        for text in sorted(texts.glob("*.txt")):
            if text.stem not in stems:
                raise UserError(f"{text}: there is no picture {text.stem}.jpg or .png in {pictures} (questions "
                                f"{task}/{text.stem}/1 and 2); put it there or remove the text file")
            digest.update(text.name.encode() + b"\0" + text.read_bytes() + b"\0")
            rows += _questions(text, task, stems[text.stem].relative_to(root).as_posix())
        if not rows:
            raise UserError(f"{texts} holds no question files; remove the folder {task} or fill it")
        hashes[task] = digest.hexdigest()
        records += rows if limit is None else rows[:limit + limit % 2]
    return records, hashes


def _load_dataset(config: MmeConfig, limit: int | None) -> tuple[list[dict], dict[str, str]]:
    """lmms-lab's rows: `question_id` is `<subtask>/<picture>` for both questions of a picture."""
    rows, sha256 = read_rows(config.folder, ("question_id", "image", "question", "answer", "category"),
                             config.image_folder, config.split)
    records, seen = [], {}
    for row in rows:
        seen[row["question_id"]] = number = seen.get(row["question_id"], 0) + 1
        name = f"{row['question_id'].rpartition('/')[2].rpartition('.')[0] or row['question_id']}/{number}"
        yes_or_no(row["answer"], f"{config.folder}, question {row['question_id']}")
        records.append({"id": f"{row['category']}/{name}", "suite": "mme", "category": row["category"],
                        "image": row["image"], "question_id": name, "question": row["question"].strip(),
                        "label": row["answer"].strip()})
    check_records(records, config.folder)
    odd = next((question for question, count in seen.items() if count % 2), None)
    if odd is not None:
        raise UserError(f"{config.folder}: {odd} has {seen[odd]} of its {seen[odd] + 1} questions; get the dataset "
                        "again")
    tasks = {task: [record for record in records if record["category"] == task] for task in TASKS}
    return ([record for chosen in tasks.values() for record in first_pictures(chosen, limit)],
            {task: sha256 for task, chosen in tasks.items() if chosen})


def _questions(text: Path, task: str, image: str) -> list[dict]:
    """The two questions of one text file."""
    try:
        lines = [line for line in text.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{text} is not UTF-8 text ({error}); get the file again") from error
    if len(lines) != 2:
        raise UserError(f"{text}: {image} has {len(lines)} of its 2 questions; get the file again, or remove the "
                        "picture")
    rows = []
    for number, line in enumerate(lines, 1):
        question, tab, label = line.strip().rpartition("\t")
        where = f"{text}, line {number}"
        if not tab:
            raise UserError(f"{where}: expected question<TAB>Yes or No, found {line.strip()[:60]!r}")
        yes_or_no(label, where)
        rows.append({"id": f"{task}/{text.stem}/{number}", "suite": "mme", "category": task, "image": image,
                     "question_id": f"{text.stem}/{number}", "question": question.strip(), "label": label.strip(),
                     "llava_id": image})
    return rows


def prompt(record: dict, suffix: str | None = None) -> str:
    """LLaVA-1.5 asks for a word or phrase in place of the question's own `Please answer yes or no.`"""
    if suffix is not None:
        return record["question"] + suffix
    return record["question"].removesuffix(YES_OR_NO).rstrip() + SHORT_ANSWER


def picture_folder(config: MmeConfig) -> Path:
    return Path(config.image_folder or config.folder)


def parse(record: dict, rule: str = "official") -> str:
    """How `rule` reads the answer.

    official: the first four characters, lower-cased: `yes` if they contain yes, else `no` if they contain no, else
    `other`; nothing is stripped. lmms_eval: stripped and without full stops, a lone y or n counts too. vlmevalkit:
    `Yes`, `No` or `Unknown`.
    """
    check_rule(rule)
    answer = record["answer"].lower()
    if rule == "vlmevalkit":
        return vlmevalkit_yes_no(answer)
    if rule == "lmms_eval":
        answer = answer.strip().replace(".", "")
        if answer in ("y", "n"):
            return {"y": "yes", "n": "no"}[answer]
    start = answer[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def _pairs(rows: list[dict], rule: str) -> dict[tuple[str, int], list[tuple[str, str]]]:
    """(picture, its how-manieth pair) -> `[(label, read answer)] * 2` of one subtask; a missing answer reads `other`.

    Raises:
        UserError: a picture with an odd number of questions, or a label other than Yes or No.
    """
    by_picture: dict[str, list[tuple[str, str]]] = {}
    for record in rows:
        label = yes_or_no(record["label"], f"MME {record['category']}, question {record['question_id']}")
        answer = "other" if record["answer"] is None else parse(record, rule).lower()
        by_picture.setdefault(record["image"], []).append((label, answer))
    for image, answers in by_picture.items():
        if len(answers) % 2:
            raise UserError(f"{image} has {len(answers)} of its {len(answers) + 1} questions")
    return {(image, start // 2): answers[start:start + 2]
            for image, answers in by_picture.items() for start in range(0, len(answers), 2)}


def _figures(pairs: Sequence[list[tuple[str, str]]]) -> dict[str, Any]:
    """The official script's figures of one subtask. Precision and recall leave out answers read as other, and are 0
    where they are undefined, as scikit-learn gives them."""
    answers = [answer for pair in pairs for answer in pair]
    tp, fn = answers.count(("yes", "yes")), answers.count(("yes", "no"))
    tn, fp = answers.count(("no", "no")), answers.count(("no", "yes"))
    accuracy = (tp + tn) / len(answers)
    accuracy_plus = sum(all(label == answer for label, answer in pair) for pair in pairs) / len(pairs)
    return {"score": 100 * accuracy + 100 * accuracy_plus, "accuracy": accuracy, "accuracy_plus": accuracy_plus,
            "TP": tp, "FN": fn, "TN": tn, "FP": fp, "precision": tp / (tp + fp) if tp + fp else 0.0,
            "recall": tp / (tp + fn) if tp + fn else 0.0, "other": len(answers) - tp - fn - tn - fp,
            "questions": len(answers)}


def score(records: list[dict], rule: str = "official") -> dict[str, Any]:
    """Figures per subtask (`tasks`) and the two sums.

    The two questions of a picture are paired by picture, wherever they stand; of a question answered twice the last
    counts; one without an answer is wrong. A subtask that can't be scored is `{"error": sentence}`; a sum with a
    subtask missing is None, and `warn` names it.

    Raises:
        UserError: a subtask that MME does not have.
    """
    check_rule(rule)
    rows, warnings = last_answers(records)
    unknown = {record["category"] for record in rows} - set(TASKS)
    if unknown:
        raise UserError(f"MME has no subtask {', '.join(sorted(unknown))}; the subtasks are {', '.join(TASKS)}")
    unanswered = sum(record["answer"] is None for record in rows)
    if unanswered:
        warnings.append(f"{unanswered} {'question has' if unanswered == 1 else 'questions have'} no answer: wrong")
    tasks: dict[str, Any] = {}
    for task in TASKS:
        chosen = [record for record in rows if record["category"] == task]
        if chosen:
            try:
                tasks[task] = _figures(list(_pairs(chosen, rule).values()))
            except UserError as error:
                tasks[task] = {"error": str(error)}
                warnings.append(f"{task} is not scored: {error}")
    sums = {}
    for name, members in (("perception", PERCEPTION), ("cognition", COGNITION)):
        absent = [task for task in members if "score" not in tasks.get(task, {})]
        sums[name] = None if absent else sum(tasks[task]["score"] for task in members)
        if absent:
            warnings.append(f"no {name} sum: no score for {', '.join(absent)}")
    names = {"official": ("perception", "cognition"), "lmms_eval": ("mme_perception_score", "mme_cognition_score"),
             "vlmevalkit": ("perception", "reasoning")}[rule]
    if rule != "official":
        tasks = {task: figures.get("score", figures) for task, figures in tasks.items()}
    result: dict[str, Any] = {names[0]: sums["perception"], names[1]: sums["cognition"], "tasks": tasks}
    return result | ({"warn": "; ".join(warnings)} if warnings else {})


def points(records: list[dict], rule: str = "official") -> dict[str, Points]:
    """Per subtask: each picture's points, 50 a right answer and 100 more if both are right; their mean is its score."""
    rows = last_answers(records)[0]
    result = {}
    for task in TASKS:
        chosen = [record for record in rows if record["category"] == task]
        if chosen:
            pairs = _pairs(chosen, rule)
            result[task] = Points([f"{image}#{number}" for image, number in pairs],
                                  [_figures([pair])["score"] for pair in pairs.values()], [image for image, _ in pairs])
    return result


def estimates(records: list[dict], rule: str = "official") -> dict[str, Estimate]:
    """Points of each subtask, of `perception` and `cognition` if all their subtasks are there, and of `total`."""
    tasks = {task: mean_of(one.values, one.pictures, 200.0) for task, one in points(records, rule).items()}
    result = dict(tasks)
    for name, members in (("perception", PERCEPTION), ("cognition", COGNITION), ("total", tuple(tasks))):
        if members and all(task in tasks for task in members):
            result[name] = combined([tasks[task] for task in members], [1.0] * len(members))
    return result


def report(records: list[dict], rule: str, hashes: dict[str, str]) -> dict[str, Any]:
    """Each subtask's figures with the interval of its score clustered by picture, and the sums; for scores.json.

    `perception` and `cognition` are None unless all their subtasks are there; `total` sums the subtasks that are
    (of `total_max`). `always_yes` is the score of a model that says yes to everything; `chance` that of a fair coin.
    """
    figures = score(records, rule)
    spread = estimates(records, rule)
    rows = last_answers(records)[0]
    result: dict[str, Any] = {}
    tasks = [task for task in TASKS if task in spread]
    for task in tasks:
        chosen = [record for record in rows if record["category"] == task]
        one = _figures(list(_pairs(chosen, rule).values()))
        yes = _figures(list(_pairs([{**record, "answer": "Yes"} for record in chosen], rule).values()))
        result[task] = {
            "score": one["score"], "acc": one["accuracy"], "acc_plus": one["accuracy_plus"],
            **with_spread(spread[task]), "n": one["questions"], "pictures": len(spread[task].errors),
            "other": one["other"], "yes_ratio": (one["TP"] + one["FP"]) / one["questions"],
            "empty_answers": sum(not record["answer"] for record in chosen), "always_yes": yes["score"],
            "chance": CHANCE, "questions_sha256": hashes.get(task)}
    perception, cognition = list(figures.values())[:2]
    result |= {"perception": perception, "cognition": cognition, "total": spread["total"].value,
               "total_max": 200 * len(tasks)}
    for name in ("perception", "cognition", "total"):
        if name in spread:
            result |= with_spread(spread[name], name)
    return result
