"""MMStar (Chen et al. 2024, arXiv 2403.20330): 1,500 questions with four choices, six abilities of three kinds each.

Files: Lin-Chen/MMStar on the hub or as a folder, or OpenCompass's `MMStar.tsv`.
"""

from __future__ import annotations

import re
from typing import Any

from eval_vlm.config import MmstarConfig
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
from eval_vlm.suites.choices import extract_letter, vlmevalkit_letter
from eval_vlm.suites.questions import check_records, first_pictures, option_letter, read_rows, with_options


def load(config: MmstarConfig, limit: int | None = None) -> tuple[list[dict], dict[str, str]]:
    """Raises:
        UserError: a broken or wrong file, an index twice, a label outside A to D.
    """
    rows, sha256 = read_rows(config.questions, ("index", "question", "image", "answer", "category", "l2_category"),
                             config.image_folder, config.split)
    records = [{"id": str(row["index"]), "suite": "mmstar", "category": row["category"], "image": row["image"],
                "question_id": str(row["index"]), "question": row["question"].strip(),
                "choices": {letter: row[letter] for letter in "ABCD" if row.get(letter) is not None},
                "label": option_letter(row["answer"], 4, f"{config.questions}, index {row['index']}"),
                "l2_category": row["l2_category"]} for row in rows]
    check_records(records, config.questions)
    return first_pictures(records, limit), {"questions": sha256}


def prompt(record: dict, suffix: str | None = None) -> str:
    """The dataset's questions end with their options; OpenCompass's sheet has these in columns."""
    question = with_options(record["question"], record["choices"]) if record["choices"] else record["question"]
    return question + (OPTION_LETTER if suffix is None else suffix)


def _choices(record: dict) -> dict[str, str]:
    """Letter -> text, out of `Options: A: ..., B: ...` where there are no columns; unknown texts are empty."""
    if record.get("choices"):
        return record["choices"]
    texts = re.search(r"\bA: (.*?),? B: (.*?),? C: (.*?),? D: (.*)", record["question"], re.DOTALL)
    return {letter: texts[number].strip() if texts else "" for number, letter in enumerate("ABCD", 1)}


def parse(record: dict, rule: str = "official") -> dict[str, Any]:
    """`{"letter", "hit"}`. official: the lower-cased answer starts with the letter, or `(a`, `option a`, `the answer is
    a`: whatever follows, so that `An apple` is A."""
    check_rule(rule)
    if rule == "lmms_eval":
        letter = extract_letter(record["answer"], "ABCD")
    elif rule == "vlmevalkit":
        letter = vlmevalkit_letter(record["answer"], _choices(record))
    else:
        answer = record["answer"].lower().strip()
        letter = [answer[len(start):][:1].upper() or None for start in ("", "(", "option ", "the answer is ")
                  if answer.startswith(start)][-1]
    return {"letter": letter, "hit": int(letter == record["label"])}


def _hits(rows: list[dict], rule: str) -> list[float]:
    return [0.0 if row["answer"] is None else float(parse(row, rule)["hit"]) for row in rows]


def score(records: list[dict], rule: str = "official") -> dict[str, Any]:
    """official: `final score`, each ability and each `ability(kind)`, shares of right answers (the script divides by
    1500 and 250, the numbers of questions of the whole set). lmms_eval: abilities and `average` as means over kinds.
    vlmevalkit: `Overall`, abilities and kinds."""
    check_rule(rule)
    rows, warnings = last_answers(records)
    if not has_labels(rows):
        return NO_LABELS
    warnings += count_missing(rows)
    hits: dict[tuple[str, str], list[float]] = {}
    for row, hit in zip(rows, _hits(rows, rule), strict=True):
        hits.setdefault((row["category"], row["l2_category"]), []).append(hit)
    abilities = list(dict.fromkeys(ability for ability, _ in hits))
    kinds = {ability: [one for (name, _), one in hits.items() if name == ability] for ability in abilities}
    everything = [hit for one in hits.values() for hit in one]
    if rule == "lmms_eval":
        return with_warnings({**{ability: mean([mean(one) for one in kinds[ability]]) for ability in abilities},
                              "average": mean([mean(one) for one in hits.values()])}, warnings)
    shares = {ability: mean([hit for one in kinds[ability] for hit in one]) for ability in abilities}
    if rule == "vlmevalkit":
        return with_warnings({"Overall": mean(everything), **shares,
                              **{kind: mean(one) for (_, kind), one in hits.items()}}, warnings)
    return with_warnings({"final score": mean(everything), **shares,
                          **{f"{ability}({kind})": mean(one) for (ability, kind), one in hits.items()}}, warnings)


def points(records: list[dict], rule: str = "official") -> dict[str, Points]:
    rows = last_answers(records)[0]
    if not has_labels(rows):
        return {}
    sets = {"all": rows, **{name: [row for row in rows if row["category"] == name]
                            for name in dict.fromkeys(row["category"] for row in rows)}}
    return {name: to_points(chosen, [100 * hit for hit in _hits(chosen, rule)]) for name, chosen in sets.items()}
