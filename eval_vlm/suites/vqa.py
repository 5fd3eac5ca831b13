"""VQA accuracy (Goyal et al. 2017, visualqa.org/evaluation.html) and its normalisation of answers.

Shared by VQAv2, TextVQA and VizWiz; VLMEvalKit's variant of the punctuation rule also reads POPE and MME there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from clipmoe_vlm.runs import UserError

MARKS = ';/[]"{}()=+\\_-><@`,?!'
COMMA = re.compile(r"\d,\d")
COMMA_EVALAI = re.compile(r"\d,+\d")
FULL_STOP = re.compile(r"\.(?!\d)")
FULL_STOP_VLMEVALKIT = re.compile(r"(?<!\d)\.(?!\d)")
NUMBERS = {word: str(number) for number, word in
           enumerate("zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
ARTICLES = ("a", "an", "the")
# The words whose lost apostrophe is put back: a spelling with exactly one apostrophe missing becomes the word. The last
# one is a misprint of the script.
CONTRACTIONS = {word[:at] + word[at + 1:]: word for word in """
    ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't oughtn't
    shan't shouldn't wasn't weren't won't wouldn't couldn't've hadn't've mightn't've shouldn't've wouldn't've
    could've might've must've not've should've they've we've what've where've who've would've you've
    he'd how'd it'd someone'd something'd there'd they'd where'd who'd you'd
    he'd've it'd've she'd've somebody'd've someone'd've something'd've there'd've they'd've we'd've who'd've you'd've
    how'll it'll somebody'll someone'll something'll they'll what'll who'll why'll you'll
    he's how's somebody's someone's that's there's what's when's where's who's why's
    there're they're what're why're you're ma'am o'clock 'twas y'all y'all'll y'all'd've 'ow's'at
    """.split() for at, letter in enumerate(word) if letter == "'"} | {"somebody'd": "somebodyd"}
# What a spreadsheet's empty cell and pandas' words for a missing value come back as in VLMEvalKit: the text `nan`.
MISSING_WORDS = frozenset(("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
                           "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"))


def from_sheet(answer: str) -> str:
    """The answer as VLMEvalKit reads it back from its spreadsheet."""
    return "nan" if answer in MISSING_WORDS else answer


def without_breaks(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(text: str, full_stop: re.Pattern = FULL_STOP, comma: re.Pattern = COMMA) -> str:
    """The VQA script's punctuation rule.

    It looks at the whole text: a mark beside a blank anywhere is deleted everywhere, else it becomes a blank; only the
    first 32 full stops are deleted (a flag is passed as the count).
    """
    cleaned = text
    digits_with_comma = comma.search(text) is not None
    for mark in MARKS:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_blank or digits_with_comma else " ")
    return full_stop.sub("", cleaned, count=int(re.UNICODE))


def plain_words(text: str) -> str:
    """Lower case, numbers as digits, no articles, contractions mended."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(maxsize=1 << 16)  # annotators repeat themselves
def normalise(text: str, full_stop: re.Pattern = FULL_STOP, comma: re.Pattern = COMMA) -> str:
    """The VQA script's normalisation of an answer."""
    return plain_words(strip_punctuation(without_breaks(text), full_stop, comma))


def normalise_textvqa(text: str) -> str:
    """TextVQA's (EvalAI's): commas and question marks go first, `'s` becomes a word of its own."""
    return normalise(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def normalise_vlmevalkit(text: str) -> str:
    """VLMEvalKit's: the VQA rule, but a full stop after a digit stays."""
    return normalise(text, FULL_STOP_VLMEVALKIT)


def annotator_answers(answers: Any, where: str) -> list[str] | None:
    """The annotators' texts out of the official `[{"answer": ...}]` or a dataset's columns; None if there are none.

    Raises:
        UserError: one of them is no text; `where` names the question.
    """
    if isinstance(answers, dict):
        answers = answers.get("answer")
    texts = [one.get("answer") if isinstance(one, dict) else one for one in answers or []]
    if isinstance(answers, str) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: the annotators' answers must be a list of texts, found {str(answers)[:60]!r}; get "
                        "the file again")
    return texts or None


def vqa_accuracy(answer: str, annotators: Sequence[str]) -> float:
    """Mean over the annotators of min(1, matches among the others / 3): with ten, 1 to 4 matches give 0.3, 0.6, 0.9, 1.

    Both sides normalised already. Annotators are left out by position, so equal ones stay apart.
    """
    matches, n = sum(one == answer for one in annotators), len(annotators)
    return (matches * min(1.0, (matches - 1) / 3) + (n - matches) * min(1.0, matches / 3)) / n if matches else 0.0
