"""`python -m eval_vlm.judge` against a small server of its own: prompts, grades, bad moods, kills, and bad input."""

import hashlib
import json
import signal
import subprocess
import sys
import time

import pytest
from eval_data import environment
from judge_server import JudgeServer
from suites_data import save, write

from clipmoe_vlm.runs import UserError
from eval_vlm import judge
from eval_vlm.score import score_file

ABILITIES = (["rec"], ["ocr", "math"], ["know", "gen"])
GRADES = [0.0, 0.3, 1.0, 0.7, 0.5, 0.1]


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server():
    """Grades MM-Vet's answer `answer 3` by GRADES[3]; gives LLaVA-Bench's points by the number in the answer."""

    def reply(messages):
        text = messages[-1]["content"]
        if messages[0]["role"] == "system":
            number = int(text.split("[Assistant 2]\nanswer ")[1].split("\n")[0])
            return f"8 {number + 2}.5\nBoth are fine."
        return str(GRADES[int(text.rsplit("| answer ", 1)[1].split(" ")[0])])

    server = JudgeServer(reply)
    yield server
    server.close()


@pytest.fixture
def mmvet(tmp_path):
    """(questions, answers), six of each, as MM-Vet's own files."""
    questions = {f"v1_{i}": {"imagename": f"{i}.png", "question": f"What is {i}?", "answer": "-1<AND>5<OR>6",
                             "capability": ABILITIES[i % 3]} for i in range(6)}
    return [write(tmp_path / "mm-vet.json", questions),
            write(tmp_path / "answers.json", {name: f"answer {name[3:]}" for name in questions})]


def run(server, suite, questions, answers, *more) -> None:
    judge.main([suite, str(answers), "--questions", str(questions), "--model", "some/judge", "--base-url", server.url,
                *map(str, more)])


def rows(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_mmvets_grades_are_what_the_score_program_reads(mmvet, server, tmp_path, capsys):
    questions, answers = mmvet
    run(server, "mmvet", questions, answers)
    grades = tmp_path / "answers.mmvet.some_judge.jsonl"
    figures = score_file("mmvet", str(grades), str(questions))[0]["figures"]
    assert figures["total"] == pytest.approx(100 * sum(GRADES) / 6)
    assert figures["math"] == pytest.approx(100 * (GRADES[1] + GRADES[4]) / 2) and "warn" not in figures
    result = json.loads(grades.with_suffix(".scores.json").read_text())
    assert result["figures"] == figures and result["judge"] == {
        "model": "some/judge", "answered_as": ["judge-0613"], "base_url": f"{server.url}/", "temperature": 0,
        "answers": str(answers), "requests": 6, "unreadable": 0}
    assert "judge: some/judge (judge-0613)" in capsys.readouterr().out
    assert server.keys == {"Bearer none"} and {one["path"] for one in server.requests} == {"/v1/chat/completions"}
    assert {(one["model"], one["temperature"]) for one in server.requests} == {("some/judge", 0)}


def test_a_run_is_named_by_its_folder(mmvet, server, tmp_path):
    write(tmp_path / "run" / "predictions" / "mmvet.jsonl", [
        {"suite": "mmvet", "id": f"v1_{i}", "question": f"What is {i}?", "answer": f"answer {i}"} for i in range(6)])
    run(server, "mmvet", mmvet[0], tmp_path / "run")
    assert len(rows(tmp_path / "run" / "judge" / "mmvet.some_judge.jsonl")) == 6


def test_mmvets_prompt_is_the_published_one(mmvet, server):
    run(server, "mmvet", *mmvet, "--workers", 1)
    (message,) = server.requests[0]["messages"]
    prompt, _, question = message["content"].rpartition("\n")
    # sha256 of `prompt` in MM-Vet's mm-vet_evaluator.py
    assert hashlib.sha256((prompt).encode()).hexdigest() == MMVET_SHA256
    assert message["role"] == "user" and question == "What is 0? | -1 <AND> 5 <OR> 6 | answer 0 | "


MMVET_SHA256 = "d1b3e0a5b4e72c888b77164489d705bba4dd149934fff564dfba6443d81afe3f"
REVIEW_SHA256 = "2ce22b562d6008864970ea863ac8a4d385ea6f2e64ab1313a23f825202a9529d"


def llava_files(tmp_path):
    questions = [{"question_id": i, "image": f"00{i % 2}.jpg", "text": f"What is {i}?",
                  "category": ("conv", "detail", "complex")[i % 3]} for i in range(4)]
    write(tmp_path / "context.jsonl", [{"id": "0", "image": "000.jpg", "caption": "A cow.\nIt is red."},
                                       {"id": "1", "image": "001.jpg", "caption": ["A dog.", "It barks."]}])
    write(tmp_path / "answers_gpt4.jsonl", [{"question_id": i, "text": f"the right {i}"} for i in range(4)])
    answers = write(tmp_path / "answers.jsonl", [{"question_id": i, "text": f"answer {i}"} for i in range(4)])
    return write(tmp_path / "questions.jsonl", questions), answers


def test_llava_benchs_review(server, tmp_path):
    questions, answers = llava_files(tmp_path)
    run(server, "llava_bench", questions, answers, "--output", tmp_path / "reviews.jsonl", "--workers", 1)
    made = rows(tmp_path / "reviews.jsonl")
    assert [(row["question_id"], row["tuple"], row["category"]) for row in made[:2]] == [
        (0, [8.0, 2.5], "llava_bench_conv"), (1, [8.0, 3.5], "llava_bench_detail")]
    figures = score_file("llava_bench", str(tmp_path / "reviews.jsonl"), str(questions))[0]["figures"]
    assert figures["all"] == {"relative": 50.0, "reference": 80.0, "model": 40.0}
    system, user = (one["content"] for one in server.requests[1]["messages"])
    assert system == "You are a helpful and precise assistant for checking the quality of the answer."
    start, review = user.split("[System]\n")
    assert start == ("[Context]\nA dog.\nIt barks.\n\n[Question]\nWhat is 1?\n\n[Assistant 1]\nthe right 1\n\n"
                     "[End of Assistant 1]\n\n[Assistant 2]\nanswer 1\n\n[End of Assistant 2]\n\n")
    # sha256 of the prompt of llava_bench_conv, _detail and _complex in LLaVA's rule.json
    assert hashlib.sha256(review.removesuffix("\n\n").encode()).hexdigest() == REVIEW_SHA256
    assert "[Context]\nA cow.\nIt is red.\n\n" in server.requests[0]["messages"][1]["content"]


def test_llava_benchs_columns_of_lmms_lab(server, tmp_path):
    data = save(tmp_path / "data", {"question_id": [0, 1], "question": ["What?", "Why?"], "gpt_answer": ["moo", "woof"],
                                    "caption": ["A cow.", "A dog."], "category": ["conv", "detail"]})
    answers = write(tmp_path / "answers.jsonl", [{"question_id": i, "text": f"answer {i}"} for i in range(2)])
    run(server, "llava_bench", data, answers, "--output", tmp_path / "reviews.jsonl")
    assert {tuple(row["tuple"]) for row in rows(tmp_path / "reviews.jsonl")} == {(8, 2.5), (8, 3.5)}
    assert any("[Context]\nA dog.\n\n[Question]\nWhy?\n\n[Assistant 1]\nwoof" in one["messages"][1]["content"]
               for one in server.requests)


def test_a_bad_server_is_asked_again(mmvet, server, tmp_path):
    server.moods = ["500", "429", "garbage", "half", "empty", "500", "The grade is 1", "1.5", ""]
    run(server, "mmvet", *mmvet)
    made = rows(tmp_path / "answers.mmvet.some_judge.jsonl")
    assert {row["question_id"]: row["score"] for row in made} == {f"v1_{i}": grade for i, grade in enumerate(GRADES)}
    assert all(row["read"] for row in made)
    assert sum(row["tries"] for row in made) == 6 + 5  # garbage, empty and three replies that are no grade
    assert len(server.requests) == 6 + 9


def test_a_judge_that_never_gives_a_grade_is_counted(mmvet, server, tmp_path):
    """MM-Vet's script calls such an answer wrong after five tries; LLaVA-Bench's review is left out."""
    server.moods = ["I like it"] * 5
    run(server, "mmvet", *mmvet, "--workers", 1)
    first = rows(tmp_path / "answers.mmvet.some_judge.jsonl")[0]
    assert (first["score"], first["read"], first["tries"], first["content"]) == (0.0, False, 5, "I like it")
    assert [one["temperature"] for one in server.requests[:6]] == [0, 0, 0.5, 1.0, 1.5, 0]
    assert [one["messages"][0]["content"].endswith("Predict the correctness of the answer (digit): ")
            for one in server.requests[:6]] == [False, True, True, True, True, False]
    assert json.loads((tmp_path / "answers.mmvet.some_judge.scores.json").read_text())["judge"]["unreadable"] == 1
    questions, answers = llava_files(tmp_path)
    server.moods = ["8\n9", "8 9 7", "eight nine", "-1 -1", "8 11"]
    run(server, "llava_bench", questions, answers, "--output", tmp_path / "r.jsonl", "--workers", 1)
    figures = score_file("llava_bench", str(tmp_path / "r.jsonl"), str(questions))[0]["figures"]
    assert figures["warn"] == "1 of 4 questions have no review and are left out" and "conv" in figures


def test_no_more_requests_at_a_time_than_workers(mmvet, server):
    server.delay = 0.05
    run(server, "mmvet", *mmvet, "--workers", 3)
    assert server.busiest == 3


def test_a_stopped_judge_goes_on_where_it_was(mmvet, server, tmp_path):
    """Refused in the middle, then a last line cut in half: each question is graded once, and once again where half."""
    questions, answers = mmvet
    server.moods = [None] * 3 + ["401"] * 3
    with pytest.raises(UserError, match=r"refuses question v1_3: .*not now.*; 3 of 6 questions are graded and kept in "
                                        ".*the same command goes on"):
        run(server, "mmvet", questions, answers, "--workers", 1)
    grades = tmp_path / "answers.mmvet.some_judge.jsonl"
    assert len(rows(grades)) == 3 and not grades.with_suffix(".scores.json").exists()
    whole = grades.read_bytes()
    grades.write_bytes(whole[:-1])  # whole but for its line break
    server.moods[:] = ["401"] * 3
    with pytest.raises(UserError, match="; 3 of 6 questions are graded"):
        run(server, "mmvet", questions, answers, "--workers", 1)
    assert grades.read_bytes() == whole
    grades.write_bytes(whole[:-9])
    server.requests.clear()
    server.moods.clear()
    run(server, "mmvet", questions, answers)
    assert len(server.requests) == 4
    assert sorted((row["question_id"], row["score"]) for row in rows(grades)) == [
        (f"v1_{i}", grade) for i, grade in enumerate(GRADES)]


def test_a_killed_judge_goes_on_where_it_was(mmvet, server, tmp_path):
    questions, answers = mmvet
    server.delay = 0.3
    process = subprocess.Popen(
        [sys.executable, "-m", "eval_vlm.judge", "mmvet", answers, "--questions", questions, "--model", "some/judge",
         "--base-url", server.url, "--workers", "1"], env=environment(), stderr=subprocess.PIPE)
    grades = tmp_path / "answers.mmvet.some_judge.jsonl"
    deadline = time.monotonic() + 120
    while not (grades.exists() and grades.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = rows(grades)
    assert 2 <= len(kept) < 6
    server.delay = 0
    server.requests.clear()
    run(server, "mmvet", questions, answers)
    assert rows(grades)[:len(kept)] == kept and len(server.requests) == 6 - len(kept)
    assert sorted(row["score"] for row in rows(grades)) == sorted(GRADES)


def test_what_is_refused(mmvet, server, tmp_path, monkeypatch):
    questions, answers = mmvet
    grades = tmp_path / "grades.jsonl"
    run(server, "mmvet", questions, answers, "--output", grades)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    other = write(tmp_path / "other" / "answers.json", {**json.loads(answers.read_text()), "v1_2": "something else"})
    some = write(tmp_path / "other" / "some.json", {"v1_2": "a"})

    def refused(message: str, *arguments) -> None:
        with pytest.raises(UserError, match=message):
            judge.main([*map(str, arguments), "--base-url", server.url])

    base = ["mmvet", answers, "--questions", questions, "--model"]
    refused("holds grades of the judge some/judge; name another --output", *base, "else", "--output", grades)
    refused("holds grades of other answers", "mmvet", other, *base[2:], "some/judge", "--output", grades)
    for name, text in (("mine.json", '{"a": 1}'), ("pretty.json", '{\n "a": 1\n}\n'), ("notes", "mine")):
        (tmp_path / "other" / name).write_text(text)
        refused("line 1 is no grade of this program", *base, "some/judge", "--output", tmp_path / "other" / name)
        assert (tmp_path / "other" / name).read_text() == text
    refused("has no answer to 5 questions, the first is v1_0", "mmvet", some, *base[2:], "j")
    refused("pope is scored without a judge", "pope", *base[1:], "j")
    refused("--workers: 0 is less than 1", *base, "j", "--workers", 0)
    refused("no such file", "mmvet", tmp_path / "none.json", *base[2:], "j")
    refused("context.jsonl: no such file", "llava_bench", *llava_alone(tmp_path / "other"), "--model", "j")
    with pytest.raises(UserError, match="set OPENAI_API_KEY, or name a server"):
        judge.main([*map(str, base), "j"])
    with pytest.raises(UserError, match="the following arguments are required: --model; usage: python -m"):
        judge.main([*map(str, base[:-1])])
    monkeypatch.setitem(sys.modules, "openai", None)
    refused(r"needs the package openai: pip install 'clipmoe-vlm\[judge\]'", *base, "j")
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def llava_alone(folder):
    questions, answers = llava_files(folder)
    (folder / "context.jsonl").unlink()
    return answers, "--questions", questions


def test_a_server_that_is_not_there(mmvet, monkeypatch, server):
    server.close()
    monkeypatch.setattr(judge, "RETRIES", 0)
    with pytest.raises(UserError, match="does not answer .*; 0 of 6 questions are graded"):
        run(server, "mmvet", *mmvet)
