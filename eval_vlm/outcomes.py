"""Question by question: how a rule reads the answer, and what the answer earns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eval_vlm.suites import check_rule, module, rules_of

# A suite's `parse` gives a text to compare with the label, a number, or a dict with one of each of these.
READ = ("prediction", "normalised", "letter", "parsed")
EARNED = {"score": 1.0, "hit": 1.0, "vanilla_hit": 1.0, "correct": 1.0, "accuracy": 0.01}  # VQA's accuracy is percent


@dataclass(frozen=True)
class Outcome:
    """Of one question.

    Args:
        value: 1 right, 0 wrong, between for graded suites (VQA's annotators, a judge); None where there is no label,
            no grade or no answer.
        read: the answer as the rule reads it.
    """

    value: float | None
    read: str


def outcomes(suite: str, records: list[dict], rule: str = "official") -> dict[str, Outcome]:
    """By question id. MMBench's rotations count one by one here, GQA's unbalanced questions as all others.

    Args:
        records: with their `answer`, as `predictions/<suite>.jsonl` has them.

    Raises:
        UserError: an unknown rule, or a label that the suite does not have.
    """
    check_rule(rule, rules_of(suite))
    return {record["id"]: outcome(suite, record, rule) for record in records}


def outcome(suite: str, record: dict, rule: str) -> Outcome:
    answer, label = record["answer"], record.get("label", record.get("answers"))
    graded = suite in ("mmvet", "llava_bench")
    if answer is None or (label is None and not graded):
        return Outcome(None, answer or "")
    parsed = module(suite).parse(record, rule)
    if suite == "llava_bench":
        return Outcome(None if parsed is None else parsed[1] / 10, answer)
    if isinstance(parsed, dict):
        read = next((parsed[key] for key in READ if key in parsed), answer)
        return Outcome(_earned(parsed), "-" if read is None else str(read))
    if isinstance(parsed, str):
        return Outcome(float(parsed.lower() == str(label).lower()), parsed)
    return Outcome(None if parsed is None else float(parsed), answer)


def _earned(parsed: dict[str, Any]) -> float:
    key = next(key for key in EARNED if key in parsed)
    return EARNED[key] * float(parsed[key])


def flips(a: dict[str, Outcome], b: dict[str, Outcome]) -> dict[str, list[str]]:
    """The questions that run b answers `better` than run a, and those `worse`."""
    pairs = [(question, a[question].value, b[question].value) for question in a if question in b]
    known = [(question, one, other) for question, one, other in pairs if one is not None and other is not None]
    return {"better": [question for question, one, other in known if other > one],
            "worse": [question for question, one, other in known if other < one]}
