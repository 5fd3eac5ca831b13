"""Which option a free answer to a multiple-choice question means, by the rules of VLMEvalKit and lmms-eval.

Shared by ScienceQA, MMBench, SEED-Bench and MMStar. `choices` is letter -> text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer")
NO_ANSWER = "Failed to obtain answer via API"
# What may stand around a letter for lmms-eval's MMBench evaluator, in order of trust.
LETTER_MARKS = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")
# lmms-eval's extractor: phrases after which the answer may come.
PHRASES = (*(f"{lead}answer is" for lead in ("", "the ", "correct ", "the correct ", "best ", "the best ", "my ")),
           *(f"{lead}option is" for lead in ("correct ", "the correct ", "best ", "the best ")),
           *(f"{lead}choice is" for lead in ("", "the ", "correct ", "the correct ", "my ")),
           "i choose", "i select", "i pick", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは")


def by_text(answer: str, choices: dict[str, str]) -> str | None:
    """The only choice whose text is in the answer, whatever the case."""
    found = [letter for letter, text in choices.items() if str(text).lower() in answer.lower()]
    return found[0] if len(found) == 1 else None


def vlmevalkit_letter(answer: str, choices: dict[str, str]) -> str | None:
    """VLMEvalKit without a judge: a letter, `Z` for a refusal, None if nothing can be inferred.

    The only letter that is a word, if among the last four words; `Z` as a word; `answer is X` whatever follows (so
    `the answer is a kite` is A); else by text, unless the answer is longer than twice all choices together.
    """
    if NO_ANSWER not in answer:
        if any(refusal in answer for refusal in REFUSALS):
            return "Z"
        words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
        letters = [letter for letter in choices if letter in words]
        if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
            return letters[0]
        if not letters and "Z" in words:
            return "Z"
        match = re.search(r"answer\s+is\s+\**([ABCD])", answer, re.IGNORECASE)
        if match and match[1].upper() in choices:
            return match[1].upper()
    return by_text(answer, choices) if len(answer) <= 2 * sum(len(str(text)) for text in choices.values()) else None


def lmms_eval_letter(answer: str, choices: dict[str, str]) -> str | None:
    """lmms-eval's MMBench evaluator without a judge (`static`): the only letter among the words, bare (but not where
    `A` may be an article) or with marks; else by text; else its extractor."""
    words = answer.split()
    if NO_ANSWER not in answer:
        for marks in ("{}", *LETTER_MARKS):
            found = [letter for letter in "ABCDE" if marks.format(letter) in words]
            if len(found) == 1 and not (marks == "{}" and "A" in words and len(words) > 3):
                return found[0]
    return by_text(answer, choices) or extract_letter(answer, sorted(choices))


def extract_letter(answer: str, letters: Iterable[str]) -> str | None:
    """lmms-eval's `extract_mcq_answer`: of all places where a letter may stand the most trusted, of equals the last.

    In order of trust: alone at the start, alone at the end, after a phrase such as `the answer is`, in brackets, before
    a full stop, colon, bracket or blank; else anywhere.
    """
    text = answer.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    text = f" {text} "
    bare = text.strip()
    found: list[tuple[int, int, str]] = []  # trust, position, letter
    for letter in letters:
        for trust, place in ((6, f"({letter})"), (5, f"{letter}."), (4, f"{letter}:"), (3, f"{letter})"),
                             (2, f"{letter} ")):
            if place in text:
                found.append((trust, text.rfind(place), letter))
        for phrase in PHRASES:
            start = text.lower().find(phrase)
            at = text.find(letter, start + len(phrase)) if start >= 0 else -1
            if at >= 0:
                found.append((7, at, letter))
        if bare.startswith(letter) and not bare[1:2].isalpha():
            found.append((10, 0, letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            found.append((9, len(text) - 1, letter))
    if not found:
        found = [(0, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(found, key=lambda one: one[:2])[2] if found else None
