"""What scores.json and compare.json say of uncertainty: against slow plain computations, and by simulation."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from eval_data import config_file, execute, make_questions, make_vlm
from scipy import stats

from benchmarks.coverage import CASES, coverage
from clipmoe_vlm.intervals import combined, mean_of, paired, pooled_difference, ratio_of
from clipmoe_vlm.runs import UserError
from eval_vlm.compare import compare_runs, main, pool_runs
from eval_vlm.outcomes import flips, outcomes
from eval_vlm.stats import holm
from eval_vlm.suites import estimates, mme, module, pope, rules_of

REFERENCE = Path(__file__).parent / "reference" / "scorers"


def reference(suite: str) -> list[dict]:
    records = json.loads((REFERENCE / f"{suite}.json").read_text())["records"]
    return [{**record, "id": record.get("id", str(number)), "category": record.get("category", "x")}
            for number, record in enumerate(records)]


# --- question by question --------------------------------------------------------------------------------------------

SCORED = [(suite, rule) for suite in ("pope", "mme", "gqa", "vqav2", "textvqa", "vizwiz", "scienceqa", "mmbench",
                                      "seedbench") for rule in rules_of(suite)]


@pytest.mark.parametrize(("suite", "rule"), SCORED)
def test_the_mean_of_the_outcomes_is_the_suites_figure(suite, rule):
    records = [record for record in reference(suite) if record["answer"] is not None]
    if suite == "gqa":  # only balanced questions count there
        records = [record for record in records if record["isBalanced"]]
    if rule == "vlmevalkit":  # its spreadsheet makes another text of these; a run's answers don't go through one
        records = [record for record in records if record["answer"].strip().lower() not in ("", "none", "nan", "n/a")]
    found = outcomes(suite, records, rule)
    assert list(found) == [record["id"] for record in records]
    mean = np.mean([one.value for one in found.values()])
    points = {"pope": "all", "gqa": "accuracy", "vqav2": "overall", "textvqa": "accuracy", "vizwiz": "overall",
              "scienceqa": "accuracy", "seedbench": "all"}
    if suite == "mme":
        right = sum(mme.parse(record, rule).lower() == record["label"].lower() for record in records)
        assert mean == pytest.approx(right / len(records))
    elif suite == "mmbench":
        assert mean == pytest.approx(np.mean([module(suite).parse(record, rule)["vanilla_hit"] for record in records]))
    else:
        expected = module(suite).points(records, rule)[points[suite]].values
        assert mean == pytest.approx(np.mean(expected) / (1 if suite == "pope" else 100))
    assert 0 < mean < 1 and all(isinstance(one.read, str) for one in found.values())


def test_outcomes_without_label_answer_or_grade_have_no_value():
    base = {"id": "1", "question_id": 1, "category": "random", "image": "a.png", "question": "Is there a cat?"}
    assert outcomes("pope", [{**base, "label": "yes", "answer": None}])["1"].value is None
    assert outcomes("gqa", [{**base, "label": None, "answer": "x"}])["1"].value is None
    assert outcomes("mmvet", [{**base, "answers": ["x"], "answer": "y"}])["1"].value is None
    assert outcomes("mmvet", [{**base, "answer": "y", "grade": [0.5, 1]}])["1"].value == 0.75
    assert outcomes("llava_bench", [{**base, "answer": "y", "grade": [8, 6]}])["1"].value == 0.6
    with pytest.raises(UserError, match="'mine' is unknown"):
        outcomes("pope", [base], "mine")


def test_flips_name_the_questions():
    records = reference("pope")[:6]
    a = outcomes("pope", [{**record, "answer": "Yes"} for record in records])
    b = outcomes("pope", [{**record, "answer": "No"} for record in records])
    found = flips(a, b)
    assert found["better"] == [record["id"] for record in records if record["label"] == "no"]
    assert found["worse"] == [record["id"] for record in records if record["label"] == "yes"]


# --- intervals against plain computations ----------------------------------------------------------------------------


def answered(seed: int, pictures: int = 40) -> list[dict]:
    """POPE records of all three sets, answered at random, more often rightly about some pictures."""
    generator = np.random.default_rng(seed)
    easy = generator.random(pictures)
    return [{"id": f"{category}/{picture}-{number}", "suite": "pope", "category": category, "image": f"{picture}.png",
             "question_id": f"{picture}-{number}", "question": "Is there a cat?", "label": label,
             "answer": label if generator.random() < 0.5 + 0.5 * easy[picture] else {"yes": "no", "no": "yes"}[label]}
            for category in pope.SETS for picture in range(pictures) for number, label in enumerate(("yes", "no") * 3)]


def jackknife(records: list[dict], figure) -> float:
    """The standard error of `figure(records)` by leaving out each picture in turn."""
    pictures = sorted({record["image"] for record in records})
    left = np.array([figure([record for record in records if record["image"] != picture]) for picture in pictures])
    return math.sqrt((len(left) - 1) / len(left) * np.square(left - left.mean()).sum())


def test_pope_standard_errors_are_the_jackknifes():
    records = answered(0)
    found = pope.estimates(records)
    for name, figure in {
        "popular": lambda rows: pope.score(rows)["popular"]["accuracy"],
        "popular F1": lambda rows: pope.score(rows)["popular"]["f1"],
        "mean accuracy": lambda rows: pope.score(rows)["mean"]["accuracy"],
        "mean F1": lambda rows: pope.score(rows)["mean"]["f1"],
    }.items():
        assert found[name].value == pytest.approx(figure(records))
        assert found[name].interval().standard_error == pytest.approx(jackknife(records, figure), rel=0.05), name
        assert found[name].interval().clusters == 40
    report = pope.report(records, "official", {})
    assert report["mean"]["f1_standard_error"] == pytest.approx(found["mean F1"].interval().standard_error)
    percent = pope.report(records, "vlmevalkit", {})
    assert percent["popular"]["f1_interval"] == pytest.approx([100 * x for x in report["popular"]["f1_interval"]])


@pytest.mark.parametrize("shared", [False, True], ids=["pictures of their own", "shared pictures"])
def test_mme_sums(shared):
    generator = np.random.default_rng(1)
    records = [{"id": f"{task}/{picture}/{number}", "suite": "mme", "category": task,
                "image": f"{'' if shared else task}{picture}.png", "question_id": f"{picture}/{number}",
                "question": "?", "label": label, "answer": label if generator.random() < 0.7 else "other"}
               for task in mme.PERCEPTION for picture in range(12) for number, label in enumerate(("Yes", "No"))]
    found = mme.estimates(records)
    assert list(found) == [*mme.PERCEPTION, "perception", "total"]  # no cognition subtask is there
    assert found["perception"].value == pytest.approx(sum(found[task].value for task in mme.PERCEPTION))
    if shared:
        by_picture = np.array([sum(one.errors[f"{picture}.png"] for name, one in found.items() if name in mme.TASKS)
                               for picture in range(12)])
        expected = math.sqrt(np.square(by_picture).sum())
    else:
        expected = math.sqrt(sum(found[task].interval().standard_error ** 2 for task in mme.PERCEPTION))
    report = mme.report(records, "official", {})
    assert report["perception_standard_error"] == pytest.approx(expected) and "cognition_interval" not in report
    low, high = report["perception_interval"]
    assert 0 <= low < report["perception"] < high <= 2000


def test_a_paired_difference_is_a_t_test_of_the_pictures_means():
    generator = np.random.default_rng(0)
    a, b = (generator.random((30, 6)) for _ in range(2))
    pictures = np.repeat(np.arange(30), 6)
    ours = paired(mean_of(a.ravel(), pictures, 1.0), mean_of(b.ravel(), pictures, 1.0)).interval()
    theirs = stats.ttest_1samp((a - b).mean(1), 0)
    assert ours.p_value == pytest.approx(theirs.pvalue) and ours.low == pytest.approx(
        theirs.confidence_interval(0.95).low)


def test_wilson_without_clusters_and_at_the_ends():
    ours = mean_of([1.0] * 45 + [0.0] * 5, top=1.0).interval()
    size = 45 / 50 * 5 / 50 / (ours.standard_error**2)
    wilson = stats.binomtest(45, 50).proportion_ci(method="wilson")
    assert size == pytest.approx(49) and ours.low == pytest.approx(wilson.low, abs=0.01)
    perfect = mean_of([100.0] * 60, np.repeat(np.arange(10), 6), 100.0).interval()
    assert perfect.mean == perfect.high == 100 and 60 < perfect.low < 80  # ten pictures prove no more
    nothing = mean_of([0.0] * 60, np.repeat(np.arange(10), 6), 100.0).interval()
    assert nothing.low == 0 and nothing.high == pytest.approx(100 - perfect.low)


def test_a_single_picture_gives_no_interval():
    one = mean_of([1.0, 0.0], ["a", "a"], 1.0)
    assert math.isnan(one.interval().low)
    assert math.isnan(combined([one, mean_of([1.0, 0.0, 1.0], ["b", "c", "d"], 1.0)], [1, 1]).interval().low)
    assert ratio_of([0.0, 0.0], [0.0, 0.0], ["a", "b"], 1.0).value == 0
    for call in (lambda: mean_of([]), lambda: mean_of([1.0], ["a", "b"]), lambda: pooled_difference([one], [one])):
        with pytest.raises(ValueError):
            call()


def test_holm():
    assert holm([0.01, None, 0.04, 0.03, 0.5]) == pytest.approx([0.04, None, 0.09, 0.09, 0.5])


# --- by simulation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.tested])
def test_intervals_cover(case):
    """95% of 1,000 simulated evaluations, give or take three standard errors of that share (0.02)."""
    assert 0.93 <= coverage(case, runs=1000) <= 0.985 if "seeds" in case else 0.93 <= coverage(case, 1000) <= 0.975


# --- runs ------------------------------------------------------------------------------------------------------------


def write_run(folder: Path, records: list[dict]) -> Path:
    (folder / "predictions").mkdir(parents=True)
    (folder / "predictions" / "pope.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def better(records: list[dict], seed: int, share: float) -> list[dict]:
    generator = np.random.default_rng(seed)
    return [{**record, "answer": record["label"]} if generator.random() < share else record for record in records]


def test_compare_says_what_differs_and_what_flipped(tmp_path):
    records = answered(0)
    a, b = write_run(tmp_path / "a", records), write_run(tmp_path / "b", better(records, 1, 0.3))
    result = compare_runs(a, b)
    lines = result["suites"]["pope"]
    assert list(lines) == ["random", "popular", "adversarial", "all", "random F1", "popular F1", "adversarial F1",
                           "all F1", "mean accuracy", "mean F1"]
    for line in lines.values():
        assert line["interval"][0] < line["difference"] < line["interval"][1] and line["p_value"] <= line["p_holm"]
        assert line["standard_error"] > 0 and line["pictures"] == 40
    assert lines["mean F1"]["difference"] == pytest.approx(
        pope.score(better(records, 1, 0.3))["mean"]["f1"] - pope.score(records)["mean"]["f1"])
    right = {record["id"] for record in records if record["answer"] == record["label"]}
    after = {record["id"] for record in better(records, 1, 0.3) if record["answer"] == record["label"]}
    assert set(result["flips"]["pope"]["better"]) == after - right and not result["flips"]["pope"]["worse"]
    # Paired on the same pictures it is sharper than the two intervals suggest.
    alone = [pope.estimates(one)["all"].interval() for one in (records, better(records, 1, 0.3))]
    assert lines["all"]["standard_error"] < 0.8 * math.hypot(*(one.standard_error for one in alone))


def test_compare_prints_a_table_and_a_verdict(tmp_path, capsys):
    records = answered(0)
    a, b = write_run(tmp_path / "a", records), write_run(tmp_path / "b", better(records, 1, 0.3))
    main([str(a), str(b)])
    text = capsys.readouterr().out
    assert "mean F1" in text and "figures differ by themselves" in text and "another seed would move both" in text
    assert (b / "compare.json").is_file()
    main([str(a), str(a), f"output={tmp_path / 'same.json'}"])
    assert "No difference beyond chance" in capsys.readouterr().out
    assert json.loads((tmp_path / "same.json").read_text())["suites"]["pope"]["all"]["interval"] == [0, 0]


def test_two_pictures_are_no_proof(tmp_path):
    records = [record for record in answered(0) if record["category"] == "random"]
    pictures = list(dict.fromkeys(record["image"] for record in records))[:2]
    records = [record for record in records if record["image"] in pictures]
    wrong = [{**record, "answer": "no" if record["label"] == "yes" else "yes"} for record in records]
    a = write_run(tmp_path / "a = wrong", wrong)
    b = write_run(tmp_path / "b", [{**record, "answer": record["label"]} for record in records])
    main([str(a), str(b)])
    line = json.loads((b / "compare.json").read_text())["suites"]["pope"]["random"]
    assert (line["difference"], line["interval"], line["p_value"], line["pictures"]) == (1, None, 0.5, 2)


def test_several_seeds(tmp_path, capsys):
    records = answered(0)
    runs = [write_run(tmp_path / f"{side}{seed}", better(records, 10 * share + seed, share / 10))
            for side, share in (("a", 1), ("b", 4)) for seed in range(3)]
    result = pool_runs(runs[:3], runs[3:])
    line = result["suites"]["pope"]["all"]
    values = [pope.estimates([json.loads(row) for row in (one / "predictions/pope.jsonl").read_text().splitlines()])[
        "all"].value for one in runs]
    assert line["a"] == pytest.approx(np.mean(values[:3])) and line["difference"] == pytest.approx(
        np.mean(values[3:]) - np.mean(values[:3]))
    assert line["p_value"] < 0.05 and line["pictures"] == 40 and "flips" not in result
    main([",".join(map(str, runs[:3])), ",".join(map(str, runs[3:]))])
    assert "Over 3 and 3 seeds" in capsys.readouterr().out and (runs[3] / "compare.json").is_file()
    with pytest.raises(UserError, match="named twice"):
        pool_runs([runs[0], runs[0]], runs[3:])
    with pytest.raises(UserError, match="two seeds or more on each side"):
        main([",".join(map(str, runs[:3])), str(runs[3])])


@pytest.mark.parametrize(("change", "words"), [
    (lambda rows: rows[1:], "different questions.*1 differ"),
    (lambda rows: [{**rows[0], "prompt": "other"}, *rows[1:]], "different prompts"),
    (lambda rows: [{**rows[0], "label": "maybe"}, *rows[1:]], "1 differ"),
    (lambda rows: [{"id": "random/0-0"}, *rows[1:]], "line 1 is not a prediction"),
    (lambda rows: [], "different questions"),
])
def test_compare_refuses_in_a_sentence(tmp_path, change, words):
    records = answered(0)
    a, b = write_run(tmp_path / "a", records), write_run(tmp_path / "b", change(records))
    with pytest.raises(UserError, match=words) as error:
        main([str(a), str(b)])
    assert "\n" not in str(error.value) and not (b / "compare.json").exists()
    for arguments, sentence in (([str(a)], "usage"), ([str(a), str(a), "output=x.html"], "ending with .json"),
                                ([str(a), str(a), "rule=mine"], "'mine' is unknown"),
                                ([str(a), str(tmp_path)], "no suite's predictions in common")):
        with pytest.raises(UserError, match=sentence):
            main(arguments)


def test_a_run_reports_standard_errors(tmp_path):
    vlm, questions = make_vlm(tmp_path / "model"), make_questions(tmp_path / "data")
    execute(config_file(tmp_path, vlm, questions))
    scores = json.loads((tmp_path / "run/scores.json").read_text())["suites"]
    for name in (*pope.SETS, "all", "mean"):
        assert scores["pope"][name]["f1_standard_error"] >= 0 and len(scores["pope"][name]["accuracy_interval"]) == 2
    assert scores["mme"]["existence"]["standard_error"] >= 0 and scores["mme"]["total_standard_error"] >= 0
    assert "| mean of the sets | | |" in (tmp_path / "run/summary.md").read_text()
    found = estimates("pope", [json.loads(line) for line in
                               (tmp_path / "run/predictions/pope.jsonl").read_text().splitlines()], "official")
    assert scores["pope"]["mean"]["f1_interval"] == pytest.approx(
        [found["mean F1"].interval().low, found["mean F1"].interval().high])
