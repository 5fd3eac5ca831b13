"""MMBench (Liu et al. 2023, arXiv 2307.06281), English and Chinese: two to four choices, asked in every rotation.

A group (one question) counts in `circular` if every rotation is answered right. Files: OpenCompass's
`mmbench_dev_20230712.tsv` and its like, or lmms-lab/MMBench (subset en or cn). Of test the answers lie with the server,
`write_submission` makes its file. Official here is VLMEvalKit's scorer without a judge, which MMBench names as its own.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from clipmoe_vlm.runs import UserError, atomic_write
from eval_vlm.config import MmbenchConfig
from eval_vlm.suites import (
    NO_LABELS,
    OPTION_LETTER,
    Points,
    check_rule,
    count_missing,
    has_labels,
    last_answers,
    mean,
    to_points,
    with_warnings,
)
from eval_vlm.suites.choices import lmms_eval_letter, vlmevalkit_letter
from eval_vlm.suites.questions import check_records, first_pictures, option_letter, read_rows, with_options
from eval_vlm.suites.vqa import MISSING_WORDS

SUBMISSION = ".xlsx"
ROTATION = 1_000_000  # a row's index is its group's + r * this; choices and label are then r places to the left
SUFFIXES = {"en": OPTION_LETTER, "cn": "\n请直接回答选项字母。"}


def load(config: MmbenchConfig, limit: int | None = None) -> tuple[list[dict], dict[str, str]]:
    """With `circular` every question in all its rotations (those that the file lacks are made), else unrotated only.

    Raises:
        UserError: a broken or wrong file, an index twice, a label that is none of the choices, an unknown language.
    """
    if config.language not in SUFFIXES:
        raise UserError(f"mmbench.language: '{config.language}' is unknown; choose en or cn")
    rows, sha256 = read_rows(config.questions, ("index", "question", "A", "B"), config.image_folder, config.split,
                             config.language)
    records = []
    for row in rows:
        choices = {}
        for letter in "ABCD":
            if row.get(letter) is None or row[letter] in MISSING_WORDS:
                break
            choices[letter] = row[letter]
        where = f"{config.questions}, index {row['index']}"
        if len(choices) < 2 or not str(row["index"]).isdigit() or row.get("image") is None:
            raise UserError(f"{where}: a row needs a whole number as index, a picture and at least the choices A and "
                            "B; get the file again")
        label = row.get("answer")
        records.append({"id": str(row["index"]), "suite": "mmbench", "category": row.get("category") or "none",
                        "image": row["image"], "question_id": int(row["index"]), "question": row["question"],
                        "hint": None if (row.get("hint") or "") in MISSING_WORDS else row["hint"], "choices": choices,
                        "label": option_letter(None if label in MISSING_WORDS else label, len(choices), where),
                        "l2_category": row.get("l2-category") or row.get("L2-category") or "none",
                        "split": row.get("split"), "language": config.language})
    check_records(records, config.questions)
    unrotated = [record for record in records if record["question_id"] < ROTATION]
    if config.circular:
        there = {record["question_id"] for record in records}
        records += [rotated for record in unrotated for rotated in _rotations(record)
                    if rotated["question_id"] not in there]
    else:
        records = unrotated
    return first_pictures(records, limit), {"questions": sha256}


def _rotations(record: dict) -> list[dict]:
    """The question with its choices and label moved 1, 2, ... places to the left."""
    letters, texts = list(record["choices"]), list(record["choices"].values())
    result = []
    for shift in range(1, len(letters)):
        question_id = record["question_id"] + shift * ROTATION
        label = record["label"]
        if label is not None:
            label = letters[(letters.index(label) - shift) % len(letters)]
        result.append({**record, "id": str(question_id), "question_id": question_id, "label": label,
                       "choices": dict(zip(letters, texts[shift:] + texts[:shift], strict=True))})
    return result


def prompt(record: dict, suffix: str | None = None) -> str:
    question = record["question"] if record["hint"] is None else f"{record['hint']}\n{record['question']}"
    return with_options(question, record["choices"]) + (SUFFIXES[record["language"]] if suffix is None else suffix)


def parse(record: dict, rule: str = "official") -> dict[str, Any]:
    """`{"letter", "vanilla_hit"}`: letter None if nothing can be inferred or there is no answer, Z for a refusal."""
    check_rule(rule)
    read = lmms_eval_letter if rule == "lmms_eval" else vlmevalkit_letter
    letter = None if record["answer"] is None else read(record["answer"], record["choices"])
    return {"letter": letter, "vanilla_hit": int(letter == record["label"])}


def _groups(rows: list[dict], rule: str) -> tuple[list[dict], list[int], list[str]]:
    """The unrotated rows, 1 for each whose rotations are all right, and warnings about lost rotations."""
    groups: dict[int, list[dict]] = defaultdict(list)
    for row in rows:
        groups[int(row["question_id"]) % ROTATION].append(row)
    mains, hits, warnings = [], [], []
    for group, members in groups.items():
        main = [row for row in members if int(row["question_id"]) == group]
        if not main:
            warnings.append(f"group {group} lacks its unrotated row and is left out of circular")
            continue
        if len(members) < len(main[0]["choices"]):
            warnings.append(f"group {group} has {len(members)} of {len(main[0]['choices'])} rotations")
        mains += main
        hits.append(int(all(parse(row, rule)["vanilla_hit"] for row in members)))
    return mains, hits, warnings


def _table(rows: list[dict], hits: list[int]) -> dict[str, float | None]:
    """Overall, then per l2-category and category, as MMBench's report has them in one row."""
    table = {"Overall": mean(hits)}
    for field in ("l2_category", "category"):
        for name in sorted({row[field] for row in rows if row.get(field)}):
            table[name] = mean([hit for row, hit in zip(rows, hits, strict=True) if row.get(field) == name])
    return table


def score(records: list[dict], rule: str = "official") -> dict[str, Any]:
    """`circular`, `vanilla_0` (unrotated rows) and `vanilla_all` (all rows), each with its categories, of 1. lmms_eval:
    `overall`, `category` and `l2_category`, circular."""
    check_rule(rule)
    rows, warnings = last_answers(records)
    if not has_labels(rows):
        return NO_LABELS
    warnings += count_missing(rows, "row")
    mains, hits, lost = _groups(rows, rule)
    warnings += lost if len(lost) <= 3 else [*lost[:3], f"{len(lost) - 3} more groups are not whole"]
    if rule == "lmms_eval":
        return with_warnings({"overall": mean(hits), **{field: {
            name: mean([hit for row, hit in zip(mains, hits, strict=True) if row.get(field) == name])
            for name in sorted({row[field] for row in mains if row.get(field)})}
            for field in ("category", "l2_category")}}, warnings)
    right = [parse(row, rule)["vanilla_hit"] for row in rows]
    unrotated = [(row, hit) for row, hit in zip(rows, right, strict=True) if int(row["question_id"]) < ROTATION]
    return with_warnings({"circular": _table(mains, hits),
                          "vanilla_0": _table([row for row, _ in unrotated], [hit for _, hit in unrotated]),
                          "vanilla_all": _table(rows, right)}, warnings)


def points(records: list[dict], rule: str = "official") -> dict[str, Points]:
    rows = last_answers(records)[0]
    if not has_labels(rows):
        return {}
    mains, hits, _ = _groups(rows, rule)
    unrotated = [row for row in rows if int(row["question_id"]) < ROTATION]
    sets = {"circular": (mains, hits), "vanilla_0": (unrotated, [parse(row, rule)["vanilla_hit"] for row in unrotated])}
    return {name: to_points(chosen, [100.0 * hit for hit in values])
            for name, (chosen, values) in sets.items() if chosen}


def write_submission(records: list[dict], file: str | Path) -> None:
    """The server's sheet (.xlsx) with LLaVA's columns; control characters, which a sheet can't hold, become blanks.

    Raises:
        UserError: openpyxl is not installed.
    """
    try:
        from openpyxl import Workbook
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError:
        raise UserError("MMBench's submission is an Excel sheet: pip install openpyxl") from None
    book = Workbook(write_only=True)
    sheet = book.create_sheet()
    sheet.append(["index", "question", *"ABCD", "prediction", "answer", "split"])
    for row in last_answers(records)[0]:
        cells = [row["question"], *(row["choices"].get(letter) for letter in "ABCD"), row["answer"], row["label"],
                 row.get("split")]
        sheet.append([row["question_id"], *(ILLEGAL_CHARACTERS_RE.sub(" ", cell) if cell else None for cell in cells)])
    with atomic_write(file, "wb") as stream:
        book.save(stream)
