"""eval_vlm.run on suites of other kinds than POPE and MME: several pictures inside a dataset, rotations, no scorer."""

import json

import pytest
from eval_data import ROOT, config_file, execute, make_vlm
from suites_data import MAKERS

from clipmoe_vlm.runs import UserError, load_config
from eval_vlm import config as config_module
from eval_vlm.compare import compare_runs


def test_the_configuration_of_the_llava_table_is_valid():
    config = load_config(config_module.EvalConfig, [str(ROOT / "eval_vlm" / "configs" / "llava15.yaml")], "test")
    config_module.check(config)
    assert config.prompt_suffix is None and config.scienceqa.images_only and config.mmbench.circular


def test_a_run_scores_and_compares_every_kind_of_suite(tmp_path):
    folder = tmp_path / "suites"
    values = {}
    for name in ("vqav2", "mmbench", "mmvet"):
        questions = MAKERS[name](folder / name)["dataset"]["questions"]
        values[name] = {"questions": str(questions), "image_folder": str(folder / name / "pictures")}
    vlm = make_vlm(tmp_path / "model")
    config = config_file(tmp_path, vlm, tmp_path, suites=list(values), **values)
    execute(config)
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())["suites"]
    assert scores["vqav2"]["scores"]["overall"]["n"] == 2 and scores["mmbench"]["questions"]["n"] == 5
    assert scores["mmbench"]["figures"]["circular"].keys() == {"Overall", "perceive", "reason", "place", "shape"}
    assert "graded by a judge" in scores["mmvet"]["questions"]["warn"] and scores["mmvet"]["scores"] == {}
    summary = (tmp_path / "run" / "summary.md").read_text()
    assert "## mmbench" in summary and scores["vqav2"]["questions"]["questions_sha256"] in summary
    rows = [json.loads(line) for line in (tmp_path / "run/predictions/mmbench.jsonl").read_text().splitlines()]
    assert rows[0]["prompt"].endswith("from the given choices directly.") and len(rows) == 5
    result = compare_runs(tmp_path / "run", tmp_path / "run")
    assert result["suites"]["vqav2"]["overall"]["difference"] == 0
    assert result["suites"]["mmbench"]["circular"]["n"] == 2
    assert result["flips"]["mmbench"] == {"better": [], "worse": []}
    with pytest.raises(UserError, match="'vlmevalkit' is unknown; the rules are official, official_after"):
        execute(config, "rule=vlmevalkit", "suites=[vqav2]")
    with pytest.raises(UserError, match="gqa.questions is empty"):
        execute(config, "suites=[gqa]")


def test_a_judges_grades_become_the_runs_figures(tmp_path):
    folder = tmp_path / "suites"
    questions = MAKERS["mmvet"](folder / "mmvet")["dataset"]["questions"]
    config = config_file(tmp_path, make_vlm(tmp_path / "model"), tmp_path, suites=["mmvet"],
                         mmvet={"questions": str(questions), "image_folder": str(folder / "mmvet" / "pictures")})
    execute(config)
    rows = [json.loads(line) for line in (tmp_path / "run/predictions/mmvet.jsonl").read_text().splitlines()]
    grades = [{"question_id": row["question_id"], "text": row["answer"], "judge": "one", "score": number / 2}
              for number, row in enumerate(rows)]
    (tmp_path / "run" / "judge").mkdir()
    file = tmp_path / "run" / "judge" / "mmvet.one.jsonl"
    file.write_text("".join(json.dumps(grade) + "\n" for grade in grades))
    execute(config)
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())["suites"]["mmvet"]
    total = scores["scores"]["total"]["score"]
    assert total == pytest.approx(100 * sum(grade["score"] for grade in grades) / len(rows))
    assert compare_runs(tmp_path / "run", tmp_path / "run")["suites"]["mmvet"]["total"]["a"] == total
    file.write_text(json.dumps({**grades[1], "text": "of another answer"}) + "\n")
    execute(config)
    assert json.loads((tmp_path / "run" / "scores.json").read_text())["suites"]["mmvet"]["scores"] == {}
    (tmp_path / "run" / "judge" / "mmvet.two.jsonl").write_text("")
    with pytest.raises(UserError, match="by 2 judges .*mmvet.one.jsonl"):
        execute(config)
