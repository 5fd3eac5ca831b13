"""Lets a language model grade answers: `python -m eval_vlm.judge SUITE RUN_OR_ANSWERS --questions FILE --model NAME`.

SUITE: mmvet (MM-Vet's grading) or llava_bench (LLaVA-Bench's review). RUN_OR_ANSWERS: the output folder of a run, or
any prediction file that eval_vlm.score reads. The judge is any server with OpenAI's chat completions (`--base-url`);
the key is OPENAI_API_KEY. Grades are written as they come; the same command goes on where it was stopped.
docs/judge.md says more.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NoReturn

from clipmoe_vlm.runs import Metrics, UserError, fail, progress, read_jsonl, write_json
from eval_vlm import score
from eval_vlm.judge_prompts import MMVET, MMVET_AGAIN, REVIEW, REVIEWER
from eval_vlm.suites import last_answers, module
from eval_vlm.suites.questions import is_dataset, read_rows

USAGE = ("python -m eval_vlm.judge mmvet|llava_bench RUN_OR_ANSWERS --questions FILE --model NAME [--base-url URL] "
         "[--output GRADES.jsonl] [--workers 4]")
TRIES = 5  # of one question, as in MM-Vet's script: until the judge's reply can be read
START = b'{"question_id": '  # of every grade's line
RETRIES = 8  # of one request, by the client: after an error of the server or of the line, with growing pauses


class MmvetJudge:
    """A grade from 0 to 1."""

    max_tokens = 8  # MM-Vet's script asks for 3, which cuts some other models' numbers

    def __init__(self, questions: str):
        pass

    def messages(self, row: dict, attempt: int) -> list[dict]:
        truth = row["label"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        text = MMVET + " | ".join([row["question"], truth, row["answer"], ""])
        return [{"role": "user", "content": text + (MMVET_AGAIN if attempt else "")}]

    def read(self, reply: str) -> dict | None:
        """The first word as a number of 0 to 1; None if it is none."""
        words = reply.split()
        grade = float(words[0]) if words and re.fullmatch(r"\d*\.?\d+|\d+\.", words[0]) else 2.0
        return {"score": grade} if grade <= 1 else None

    def unread(self) -> dict:
        """MM-Vet's script counts such an answer as wrong."""
        return {"score": 0.0}


class LlavaBenchJudge:
    """The reference's and the model's points, of 10.

    Args:
        questions: questions.jsonl, with context.jsonl and answers_gpt4.jsonl beside it; or lmms-lab's columns.

    Raises:
        UserError: one of them is missing.
    """

    max_tokens = 1024

    def __init__(self, questions: str):
        if is_dataset(questions):
            rows, _ = read_rows(questions, ("question_id", "caption", "gpt_answer"), split="train")
            self.material = {str(row["question_id"]): (row["caption"], row["gpt_answer"]) for row in rows}
            return
        folder = Path(questions).parent
        contexts = {row["image"]: row["caption"] for row in _beside(folder / "context.jsonl", "image", "caption")}
        references = {str(row["question_id"]): row["text"]
                      for row in _beside(folder / "answers_gpt4.jsonl", "question_id", "text")}
        self.material = {}
        for row in read_jsonl(questions):
            name = str(row["question_id"])
            if row["image"] not in contexts or name not in references:
                raise UserError(f"{folder}: question {name} has no context in context.jsonl or no answer in "
                                "answers_gpt4.jsonl; get the files again")
            self.material[name] = contexts[row["image"]], references[name]

    def messages(self, row: dict, attempt: int) -> list[dict]:
        context, reference = self.material[row["id"]]
        context = context if isinstance(context, str) else "\n".join(context)
        parts = [f"[Context]\n{context}", f"[Question]\n{row['question']}",
                 f"[Assistant 1]\n{reference}", "[End of Assistant 1]",
                 f"[Assistant 2]\n{row['answer']}", "[End of Assistant 2]", f"[System]\n{REVIEW}"]
        return [{"role": "system", "content": REVIEWER},
                {"role": "user", "content": "".join(part + "\n\n" for part in parts)}]

    def read(self, reply: str) -> dict | None:
        """The first line's two numbers; None if there are not two."""
        words = reply.split("\n")[0].replace(",", " ").split()
        if len(words) != 2 or not all(re.fullmatch(r"\d+\.?\d*", word) and float(word) <= 10 for word in words):
            return None
        return {"tuple": [float(word) for word in words]}

    def unread(self) -> dict:
        """LLaVA's script puts -1 there, which its mean then takes for points; we leave the question out."""
        return {"tuple": None}


JUDGES = {"mmvet": MmvetJudge, "llava_bench": LlavaBenchJudge}


def _beside(file: Path, *fields: str) -> list[dict]:
    rows = read_jsonl(file)
    for number, row in enumerate(rows, 1):
        absent = [field for field in fields if field not in row]
        if absent:
            raise UserError(f"{file}, line {number}: no field {', '.join(absent)}; get the file again")
    return rows


def judge(suite: str, answers: str, questions: str, model: str, base_url: str | None = None, output: str | None = None,
          workers: int = 4) -> dict[str, Any]:
    """Grades the answers and returns what `eval_vlm.score` makes of the grades, with what is known of the judge.

    Raises:
        UserError: unknown suite, broken files, unanswered questions, grades of another judge or of other answers in
            `output`, a judge that refuses or does not answer.
    """
    if suite not in JUDGES:
        raise UserError(f"{suite} is scored without a judge; those with one are {', '.join(JUDGES)}")
    if workers < 1:
        raise UserError(f"--workers: {workers} is less than 1; give a positive number")
    file = Path(answers)
    file = file / "predictions" / f"{suite}.jsonl" if file.is_dir() else file
    rows = _answered(suite, file, questions)
    grader = JUDGES[suite](questions)
    client = _client(base_url)
    grades = Path(output) if output else _place(Path(answers), suite, model)
    done = _graded(grades, {row["id"]: row["answer"] for row in rows}, model)
    log, lock = Metrics(grades), threading.Lock()
    todo = [row for row in rows if row["id"] not in done]

    def grade(row: dict) -> None:
        result = {"question_id": row["question_id"], "category": f"{suite}_{row['category']}", "text": row["answer"],
                  "judge": model, **_ask(client, model, grader, row)}
        with lock:
            log.log(**result)
            done[row["id"]] = result

    with ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(grade, row) for row in todo]
        bar = progress(as_completed(waiting), description=suite, total=len(rows), initial=len(rows) - len(todo))
        try:
            for one in bar:
                one.result()
        except UserError as error:
            raise UserError(f"{error}; {len(done)} of {len(rows)} questions are graded and kept in {grades}: the same "
                            "command goes on with the others") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # requests on their way are still written
            log.stream.close()
    scores, _ = score.score_file(suite, str(grades), questions)
    made = list(done.values())
    scores["judge"] = {"model": model, "answered_as": sorted({one["model"] for one in made if one["model"]}),
                       "base_url": str(client.base_url), "temperature": 0, "answers": str(file),
                       "requests": sum(one["tries"] for one in made),
                       "unreadable": sum(not one["read"] for one in made)}
    write_json(grades.with_suffix(".scores.json"), scores)
    return scores


def _answered(suite: str, file: Path, questions: str) -> list[dict]:
    config = score.suite_config(suite, questions, [])
    records, _ = module(suite).load(config)
    rows = score.match(score.read_predictions(file), records, suite, file, questions)
    rows = last_answers(rows)[0]
    missing = [row["id"] for row in rows if row["answer"] is None]
    if missing:
        raise UserError(f"{file} has no answer to {len(missing)} questions, the first is {missing[0]}; let the model "
                        "answer them first")
    return rows


def _place(answers: Path, suite: str, model: str) -> Path:
    name = f"{suite}.{re.sub(r'[^A-Za-z0-9._-]', '_', model)}.jsonl"
    return answers / "judge" / name if answers.is_dir() else answers.with_name(f"{answers.stem}.{name}")


def _graded(file: Path, answers: dict[str, str], model: str) -> dict[str, dict]:
    """The grades that are there already, by question; a line that a kill cut short is left out.

    Raises:
        UserError: they are another judge's, or of other answers.
    """
    if not file.exists():
        return {}
    done: dict[str, dict] = {}
    lines = file.read_bytes().split(b"\n")
    if START.startswith(lines[-1][:len(START)]) and not lines[-1].endswith(b"}"):
        lines.pop()  # nothing, or a line of ours that a kill cut short
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            name, judge_name, answer = str(row["question_id"]), row["judge"], row["text"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file}, line {number} is no grade of this program; name another --output") from None
        if judge_name != model or answers.get(name) != answer:
            what = f"the judge {judge_name}" if judge_name != model else "other answers"
            raise UserError(f"{file} holds grades of {what}; name another --output, or remove it")
        done[name] = row
    return done


def _client(base_url: str | None) -> Any:
    try:
        import openai
    except ImportError:
        raise UserError("a judge needs the package openai: pip install 'clipmoe-vlm[judge]'") from None
    key, base_url = os.environ.get("OPENAI_API_KEY"), base_url or os.environ.get("OPENAI_BASE_URL")
    if not key and not base_url:
        raise UserError("there is no key for the judge: set OPENAI_API_KEY, or name a server of your own by --base-url")
    return openai.OpenAI(api_key=key or "none", base_url=base_url, max_retries=RETRIES, timeout=120)


def _ask(client: Any, model: str, grader: Any, row: dict) -> dict:
    """The judge's reply: its grade, whether it was `read`, the `tries`, the text, and who says to have replied.

    The first two tries are at temperature 0, the later ones 0.5 hotter each, as in MM-Vet's script: asked alike, a
    judge that was not understood would say the same again.
    """
    import openai

    reply, name = "", ""
    for attempt in range(TRIES):
        try:
            answer = client.chat.completions.create(
                model=model, messages=grader.messages(row, attempt), max_tokens=grader.max_tokens,
                temperature=0.5 * max(0, attempt - 1))
            reply, name = answer.choices[0].message.content or "", answer.model
        except openai.APIStatusError as error:
            raise UserError(f"the judge refuses question {row['id']}: {_sentence(error)}") from error
        except openai.APIConnectionError as error:
            raise UserError(f"the judge at {client.base_url} does not answer ({_sentence(error)})") from error
        except (openai.OpenAIError, AttributeError, IndexError, TypeError, ValueError):
            reply = ""  # no chat completion: as unreadable as any other reply
        grade = grader.read(reply)
        if grade is not None:
            break
    return {**(grade or grader.unread()), "read": grade is not None, "tries": attempt + 1, "content": reply,
            "model": name}


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; usage: {USAGE}")


def main(arguments: list[str]) -> None:
    parser = Parser(add_help=False)
    for name in ("suite", "answers"):
        parser.add_argument(name)
    for name in ("--questions", "--model"):
        parser.add_argument(name, required=True)
    for name in ("--base-url", "--output"):
        parser.add_argument(name)
    parser.add_argument("--workers", type=int, default=4)
    scores = judge(**vars(parser.parse_intermixed_args(arguments)))
    score.show(scores)
    told = scores["judge"]
    print(f"judge: {told['model']} ({', '.join(told['answered_as'])}) at {told['base_url']}; {told['requests']} "
          f"requests, {told['unreadable']} questions without a readable grade")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(str(error))
