"""One module per benchmark, and what they share.

A suite module has
- `load(config, limit) -> (records, hashes)`: records are dicts with `id`, `suite`, `category` (set or subtask), `image`
  (relative path), `question_id`, `question`, `label`; `hashes` has the sha256 of each category's question file(s);
- `picture_folder(config)`: what `image` is relative to;
- `parse(record, rule)`: how that rule reads `record["answer"]`;
- `score(records, rule)`: the figures, under the names that the rule's own script uses;
- `points(records, rule) -> {category: Points}`: the values whose mean is the category's headline figure;
- `report(records, rule, hashes, seed)`: the suite's part of scores.json;
- `compare(a, b, rule)`: paired differences `b - a` of two runs.

Rules: `official` (the benchmark's own script), `lmms_eval`, `vlmevalkit`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from clipmoe_vlm.runs import UserError

RULES = ("official", "lmms_eval", "vlmevalkit")


@dataclass(frozen=True)
class Points:
    """Values of one category with the id of the question (or picture) each belongs to, and its picture."""

    ids: list[str]
    values: list[float]
    pictures: list[str]


def check_rule(rule: str) -> None:
    if rule not in RULES:
        raise UserError(f"rule '{rule}' is unknown; the rules are {', '.join(RULES)}")


def yes_or_no(label: object, where: str) -> str:
    """The label as `yes` or `no`, whatever its capitals; `where` names it in the error."""
    word = label.strip().lower() if isinstance(label, str) else None
    if word not in ("yes", "no"):
        raise UserError(f"{where}: the label must be Yes or No, found {label!r}; correct it")
    return word


def last_answers(records: Iterable[dict]) -> tuple[list[dict], list[str]]:
    """One record per question, in order of first appearance; of a question answered twice the last, with a warning."""
    records = list(records)
    last = {(record["category"], str(record["question_id"])): record for record in records}
    times = Counter((record["category"], str(record["question_id"])) for record in records)
    names = {1: "once", 2: "twice", 3: "three times"}
    warnings = [f"question {question} answered {names.get(count, f'{count} times')}; the last is used"
                for (_, question), count in times.items() if count > 1]
    return list(last.values()), warnings


def vlmevalkit_yes_no(answer: str) -> str:
    """VLMEvalKit's `YOrN_Extraction`: `Yes`, `No` or `Unknown`: which of the two is a word of the answer.

    Its punctuation rule looks at the whole text: a mark beside a blank anywhere is deleted everywhere, else it becomes
    a blank; only the first 32 full stops are deleted (a flag is passed as the count).
    """
    text = cleaned = answer.lower()
    digits_with_comma = re.search(r"\d,\d", text) is not None
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        beside_blank = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_blank or digits_with_comma else " ")
    words = re.sub(r"(?<!\d)\.(?!\d)", "", cleaned, count=32).split()
    if ("yes" in words) == ("no" in words):
        return "Unknown"
    return "Yes" if "yes" in words else "No"
