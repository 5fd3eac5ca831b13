"""A benchmark's results inside a document, between two marks."""

from __future__ import annotations

from pathlib import Path

from clipmoe_vlm.runs import UserError, atomic_write


def around_results(document: Path, marks: tuple[str, str]) -> tuple[str, str]:
    """What stands before and after the results, the marks included.

    Raises:
        UserError: the document lacks a mark.
    """
    text = document.read_text(encoding="utf-8") if document.is_file() else ""
    if not all(mark in text for mark in marks):
        raise UserError(f"{document}: a document for the results needs the lines '{marks[0]}' and '{marks[1]}'")
    return text.partition(marks[0])[0] + marks[0], marks[1] + text.partition(marks[1])[2]


def write_results(document: Path, marks: tuple[str, str], results: str) -> None:
    before, after = around_results(document, marks)
    with atomic_write(document) as stream:
        stream.write(f"{before}\n\n{results}\n\n{after}")
