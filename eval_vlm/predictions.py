"""A run's files of answers: `predictions/<suite>.jsonl`, what made them, and the routing of their pictures.

Lines are appended as they are known. A run that several processes share has a file per process until it ends; a kill
may leave a torn last line. `merge` makes one whole file of all that.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from clipmoe_vlm.runs import UserError, atomic_write, read_jsonl, write_json

# What makes an answer, and the words for it.
OWNER = {"model_sha256": "another model", "questions_sha256": "other questions or another prompt_suffix",
         "max_new_tokens": "another max_new_tokens", "precision": "another precision",
         "answering": "another answering"}


def predictions_file(output_dir: str | Path, suite: str) -> Path:
    """A line per question: the record, its `prompt`, the `answer`; `cut` if max_new_tokens ended it, `yes_no` with the
    two logits if it was made of them."""
    return Path(output_dir) / "predictions" / f"{suite}.jsonl"


def routing_file(output_dir: str | Path, suite: str) -> Path:
    """A line per picture (eval_vlm/routing_rows.py); only of towers with experts."""
    return Path(output_dir) / "predictions" / f"{suite}.routing.jsonl"


def owner_file(file: Path) -> Path:
    return file.with_suffix(".owner.json")


def part_file(file: Path, rank: int) -> Path:
    """Where a process appends: the main one to the file itself, others to one that is merged later."""
    return file if rank == 0 else file.with_name(f"{file.stem}.part{rank}.jsonl")


def parts_of(file: Path) -> list[Path]:
    """What other processes than the main one left there."""
    return sorted(file.parent.glob(f"{file.stem}.part*.jsonl"))


def check_owner(file: Path, ours: dict) -> None:
    """Raises:
        UserError: the predictions there were made by another model, from other questions or with other settings.
    """
    if not file.exists() and not parts_of(file):
        return
    owner = owner_file(file)
    try:
        theirs = json.loads(owner.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        raise UserError(f"{file}: {owner.name} beside it, which says what made these predictions, is missing or "
                        "broken; name another output_dir, or remove the predictions") from None
    differences = [words for key, words in OWNER.items() if theirs.get(key) != ours[key]]
    if differences:
        raise UserError(f"{file} holds predictions made with {' and '.join(differences)}; name another output_dir, or "
                        "remove the predictions to start anew")


def begin(output_dir: str | Path, suite: str, ours: dict) -> None:
    """Says what makes the predictions from here on; where there are none, routing of removed ones goes too."""
    file, routing = predictions_file(output_dir, suite), routing_file(output_dir, suite)
    if not file.exists() and not parts_of(file):
        for old in (routing, *parts_of(routing)):
            old.unlink(missing_ok=True)
    write_json(owner_file(file), ours)


def hash_questions(records: list[dict]) -> str:
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def hash_folder(folder: Path) -> str:
    """sha256 over names and contents of the files at the top of a model folder: weights, tokenizer, processor."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with open(file, "rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def read_predictions(file: Path, records: list[dict]) -> dict[str, dict]:
    """Predictions by question id.

    Raises:
        UserError: a broken line before the last, or a prediction for a question that is not among `records`.
    """
    return _read(file, "id", {record["id"] for record in records})


def read_routing(file: Path, records: list[dict]) -> dict[str, dict]:
    """The routing rows by picture; as `read_predictions`."""
    return _read(file, "image", {record["image"] for record in records})


def answered_ids(output_dir: str | Path, suite: str, records: list[dict]) -> set[str]:
    """The questions that need no answer any more. Where routing is kept and a picture's row is lost (the machine went
    down before it was on the disk), its questions are asked again."""
    predictions = read_predictions(predictions_file(output_dir, suite), records)
    routed = read_routing(routing_file(output_dir, suite), records)
    return {record["id"] for record in records
            if record["id"] in predictions and (not routed or record["image"] in routed)}


def _read(file: Path, key: str, known: set[str]) -> dict[str, dict]:
    rows = {}
    # Whatever follows the last line break is not whole: a kill cut it short.
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            name = row[key]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}, line {number} is not a prediction ({error!r}); remove that line, its question is "
                            "then answered anew") from error
        if name not in known:
            raise UserError(f"{file}, line {number} is about {'question' if key == 'id' else 'picture'} {name}, which "
                            "is not among this run's; name another output_dir, or remove the predictions")
        rows[name] = row
    return rows


def with_grades(output_dir: str | Path, suite: str, rows: list[dict]) -> list[dict]:
    """Predictions with the `grade` that a judge gave each answer (eval_vlm/judge.py), if one did.

    Raises:
        UserError: several judges did.
    """
    files = sorted((Path(output_dir) / "judge").glob(f"{suite}.*.jsonl"))
    if not files:
        return rows
    if len(files) > 1:
        raise UserError(f"{files[0].parent} holds grades of {suite} by {len(files)} judges ({files[0].name}, "
                        f"{files[1].name}); leave one there, whose figures are to be the run's")
    grades = {(str(row["question_id"]), row["text"]): row.get("tuple", row.get("score"))
              for row in read_jsonl(files[0])}
    return [{**row, "grade": grades.get((str(row["question_id"]), row["answer"]))} for row in rows]


def merge(output_dir: str | Path, suite: str, records: list[dict]) -> dict[str, dict]:
    """Makes of a suite's files and their processes' parts one whole file each, in the questions' order.

    Returns:
        the predictions by question id.
    """
    order = {record["id"]: number for number, record in enumerate(records)}
    predictions = _merge(predictions_file(output_dir, suite), "id", order)
    _merge(routing_file(output_dir, suite), "image",
           {image: number for number, image in enumerate(dict.fromkeys(record["image"] for record in records))})
    return predictions


def _merge(file: Path, key: str, order: dict[str, int]) -> dict[str, dict]:
    parts = parts_of(file)
    rows = _read(file, key, set(order))
    for part in parts:
        rows |= _read(part, key, set(order))
    rows = dict(sorted(rows.items(), key=lambda item: order[item[0]]))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()).encode()
    if parts or file.exists() and file.read_bytes() != text:
        with atomic_write(file, "wb") as stream:
            stream.write(text)
    for part in parts:
        part.unlink()
    return rows
