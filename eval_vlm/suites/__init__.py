"""One module per benchmark, and what they share.

A suite module (`module(name)`; its name is the suite's) has
- `RULES`, where they are not the three below (see `rules_of`);
- `load(config, limit) -> (records, hashes)`: records are dicts with `id`, `suite`, `category` (set or subtask), `image`
  (relative path), `question_id`, `question`, `label` (or the annotators' `answers`; None: a test split without), and
  what else the scorer needs; `hashes` has the sha256 of each category's question file(s);
- `prompt(record, suffix)`: what the model is asked, with LLaVA-1.5's suffix if `suffix` is None;
- `parse(record, rule)`: how that rule reads `record["answer"]`;
- `score(records, rule)`: the figures, under the names that the rule's own script uses, and `warn`;
- `points(records, rule) -> {category: Points}`: the values whose mean is the category's headline figure (POPE: of 1,
  MME: points, all others: percent);
- in the place of the functions below, POPE's and MME's `report(records, rule, hashes)` and `estimates(records, rule)`,
  and MME's `picture_folder(config)`;
- where the benchmark has a server or a judge: `write_submission(records, file)`, and `SUBMISSION`, how the file's name
  ends, where it is not `.json`.

Rules: `official` (the benchmark's own script), `lmms_eval`, `vlmevalkit`.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from clipmoe_vlm.intervals import Estimate, mean_of
from clipmoe_vlm.runs import UserError
from eval_vlm.config import SUITES
from eval_vlm.stats import difference, scored
from eval_vlm.suites.vqa import FULL_STOP_VLMEVALKIT, strip_punctuation

RULES = ("official", "lmms_eval", "vlmevalkit")
# LLaVA-1.5's, after each question.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Points:
    """Values of one category with the id of the question (or picture) each belongs to, and its picture."""

    ids: list[str]
    values: list[float]
    pictures: list[str]


def module(suite: str) -> ModuleType:
    """Raises:
        UserError: there is no such suite.
    """
    if suite not in SUITES:
        raise UserError(f"there is no suite '{suite}'; the suites are {', '.join(SUITES)}")
    return importlib.import_module(f"eval_vlm.suites.{suite}")


def picture_folder(suite: str, config: Any) -> Path:
    """What the records' `image` is relative to; `config` is the suite's own."""
    own = getattr(module(suite), "picture_folder", None)
    return own(config) if own else Path(config.image_folder)


def rules_of(suite: str) -> tuple[str, ...]:
    """The rules that a suite knows, `official` first."""
    return getattr(module(suite), "RULES", RULES)


def check_rule(rule: str, rules: tuple[str, ...] = RULES) -> None:
    if rule not in rules:
        raise UserError(f"rule '{rule}' is unknown; the rules are {', '.join(rules)}")


def yes_or_no(label: object, where: str) -> str:
    """The label as `yes` or `no`, whatever its capitals; `where` names it in the error."""
    word = label.strip().lower() if isinstance(label, str) else None
    if word not in ("yes", "no"):
        raise UserError(f"{where}: the label must be Yes or No, found {label!r}; correct it")
    return word


def last_answers(records: Iterable[dict],
                 key: Callable[[dict], Any] = lambda record: (record.get("category"), str(record["question_id"]))
                 ) -> tuple[list[dict], list[str]]:
    """One record per question, in order of first appearance; of a question answered twice the last, with a warning."""
    records = list(records)
    last = {key(record): record for record in records}
    times = Counter(key(record) for record in records)
    names = {1: "once", 2: "twice", 3: "three times"}
    warnings = [f"question {last[question]['question_id']} answered {names.get(count, f'{count} times')}; the last is "
                "used" for question, count in times.items() if count > 1]
    return list(last.values()), warnings


def count_missing(rows: list[dict], noun: str = "question") -> list[str]:
    """The warning that some have no answer, if some have none."""
    missing = sum(row["answer"] is None for row in rows)
    words = "has" if missing == 1 else "have"
    return [f"{missing} {noun}{'s' * (missing != 1)} {words} no answer"] if missing else []


def has_labels(rows: list[dict], field: str = "label") -> bool:
    """Whether there is something to score against.

    Raises:
        UserError: no rows.
    """
    if not rows:
        raise UserError("no predictions; run the model on the questions first")
    return any(row[field] is not None for row in rows)


NO_LABELS = {"warn": "no figures: the question file holds no right answers (a test split); write the submission file"}


def with_warnings(figures: dict[str, Any], warnings: list[str]) -> dict[str, Any]:
    return figures | ({"warn": "; ".join(warnings)} if warnings else {})


def mean(values: list[float], unit: float = 1.0) -> float | None:
    """None over no values."""
    return unit * sum(values) / len(values) if values else None


def to_points(rows: list[dict], values: list[float]) -> Points:
    names = [str(row.get("id", row["question_id"])) for row in rows]
    return Points(names, values, [row.get("image") or name for row, name in zip(rows, names, strict=True)])


def estimates(suite: str, records: list[dict], rule: str) -> dict[str, Estimate]:
    """Each category's headline figure with what its error is made of, clustered by picture."""
    if hasattr(module(suite), "estimates"):
        return module(suite).estimates(records, rule)
    return {name: mean_of(one.values, one.pictures, 100.0)
            for name, one in module(suite).points(records, rule).items()}


def report(suite: str, records: list[dict], rule: str, hashes: dict[str, str]) -> dict[str, Any]:
    """A suite's part of scores.json: `figures` as its scorer gives them, and the means of its points with intervals."""
    if hasattr(module(suite), "report"):
        return module(suite).report(records, rule, hashes)
    figures = module(suite).score(records, rule)
    questions = {"n": len(records), "empty_answers": sum(record["answer"] == "" for record in records),
                 "questions_sha256": hashes["questions"]}
    if figures.get("warn"):
        questions["warn"] = figures["warn"]
    scores = {name: scored(one) for name, one in estimates(suite, records, rule).items()}
    return {"questions": questions, "scores": scores, "figures": figures}


def compare(suite: str, run_a: list[dict], run_b: list[dict], rule: str) -> dict[str, Any]:
    """Run b's figures minus those of run a, on the same questions; only those that both have."""
    a, b = (estimates(suite, run, rule) for run in (run_a, run_b))
    return {name: difference(a[name], b[name]) for name in a if name in b}


def vlmevalkit_yes_no(answer: str) -> str:
    """VLMEvalKit's `YOrN_Extraction`: `Yes`, `No` or `Unknown`: which of the two is a word of the answer."""
    words = strip_punctuation(answer.lower(), FULL_STOP_VLMEVALKIT).split()
    if ("yes" in words) == ("no" in words):
        return "Unknown"
    return "Yes" if "yes" in words else "No"
