"""The configuration of the LLaVA-1.5 table, against the folders that LLaVA's evaluation guide has people make."""

import json
import re
import shutil
from pathlib import Path

import pytest
from eval_data import ROOT, execute, make_vlm
from suites_data import MAKERS, PICTURES, write

from clipmoe_vlm.runs import UserError
from eval_vlm.suites.vizwiz import SUFFIX

CONFIG = ROOT / "eval_vlm" / "configs" / "llava15.yaml"
SHORT = "\nAnswer the question using a single word or phrase."
# As in docs/Evaluation.md and scripts/v1_5/eval/*.sh of github.com/haotian-liu/LLaVA, below playground/data/eval.
FILES = {
    "pope": {"output/coco": "pope/coco"}, "mme": {"release": "MME/MME_Benchmark_release_version"},
    "gqa": {"testdev_balanced_questions.json": "gqa/data/testdev_balanced_questions.json"},
    "textvqa": {"TextVQA_0.5.1_val.json": "textvqa/TextVQA_0.5.1_val.json",
                "llava_textvqa_val_v051_ocr.jsonl": "textvqa/llava_textvqa_val_v051_ocr.jsonl"},
    "scienceqa": {"release/problems.json": "scienceqa/problems.json",
                  "release/pid_splits.json": "scienceqa/pid_splits.json"},
    "mmbench": {"mmbench_dev_20230712.tsv": "mmbench/mmbench_dev_20230712.tsv"},
    "mmbench_cn": {"mmbench_dev_20230712.tsv": "mmbench/mmbench_dev_cn_20231003.tsv"},
    "seedbench": {"SEED-Bench.json": "seed_bench/SEED-Bench.json"},
    "llava_bench": {"questions.jsonl": "llava-bench-in-the-wild/questions.jsonl"},
    "mmvet": {"mm-vet.json": "mm-vet/mm-vet.json"}}
IMAGES = ("pope/val2014/0.jpg", "pope/val2014/1.jpg", "gqa/data/images/n1.jpg", "gqa/data/images/n2.jpg",
          "textvqa/train_images/00ab.jpg", "scienceqa/images/test/5/image.png", "scienceqa/images/test/7/image.png",
          "seed_bench/SEED-Bench-image/55_0", "seed_bench/SEED-Bench-image/55_1", "mm-vet/images/v1_0.png",
          "llava-bench-in-the-wild/images/001.jpg", "vqav2/test2015/COCO_test2015_000000000001.jpg",
          "vizwiz/test/VizWiz_test_00000000.jpg")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with LLaVA's `playground`, tiny questions in it, and a tiny VLM."""
    folder = tmp_path_factory.mktemp("llava")
    data = folder / "playground" / "data" / "eval"
    for suite, files in FILES.items():
        MAKERS[suite](folder / "made" / suite)
        for source, target in files.items():
            (data / target).parent.mkdir(parents=True, exist_ok=True)
            source = folder / "made" / suite / source
            shutil.copytree(source, data / target) if source.is_dir() else shutil.copy(source, data / target)
    write(data / "vqav2" / "llava_vqav2_mscoco_test-dev2015.jsonl", [
        {"question_id": 262144000, "image": "COCO_test2015_000000000001.jpg", "text": "Is the ball flying?" + SHORT,
         "category": "default"}])
    write(data / "vizwiz" / "llava_test.jsonl", [
        {"question_id": 0, "image": "VizWiz_test_00000000.jpg", "text": "What is this?" + SUFFIX,
         "category": "default"}])
    for name in IMAGES:
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(PICTURES[0])
    make_vlm(folder / "vlm")
    return folder


def test_one_command_fills_the_row(world, monkeypatch):
    """All suites of the table, from the guide's folders with the configuration as it is: only the model is named."""
    monkeypatch.chdir(world)
    execute(CONFIG, "model=vlm", "output_dir=run", "max_new_tokens=3")
    scores = json.loads(Path("run/scores.json").read_text())
    assert list(scores["suites"]) == ["vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mme", "mmbench",
                                      "mmbench_cn", "seedbench", "llava_bench", "mmvet"]
    for suite, part in scores["suites"].items():
        figures = [one for one in part.values() if isinstance(one, dict)]
        sha256 = [one["questions_sha256"] for one in figures if "questions_sha256" in one]
        assert sha256 and all(re.fullmatch("[0-9a-f]{64}", one) for one in sha256), suite
        assert sum(one.get("n", 0) for one in figures) > 0, suite
    summary = Path("run/summary.md").read_text()
    assert "Rule `official`, batch size 16" in summary
    assert all(sha256 in summary for sha256 in re.findall(r'"questions_sha256": "(\w+)"', json.dumps(scores)))
    assert scores["batch_size"] == 16 and scores["rule"] == "official"
    assert "test split" in scores["suites"]["vqav2"]["questions"]["warn"]
    assert "run eval_vlm.judge" in scores["suites"]["mmvet"]["questions"]["warn"]
    assert scores["submissions"] == {suite: f"submissions/{suite}.{ending}" for suite, ending in (
        ("vqav2", "json"), ("gqa", "json"), ("vizwiz", "json"), ("textvqa", "json"), ("mmbench", "xlsx"),
        ("mmbench_cn", "xlsx"), ("seedbench", "jsonl"), ("llava_bench", "jsonl"), ("mmvet", "json"))}
    assert all(Path("run", place).is_file() for place in scores["submissions"].values())
    vizwiz, = json.loads(Path("run/submissions/vizwiz.json").read_text())
    assert vizwiz["image"] == "VizWiz_test_00000000.jpg"
    prompts = {suite: json.loads(Path(f"run/predictions/{suite}.jsonl").read_text().splitlines()[0])["prompt"]
               for suite in scores["suites"]}
    assert prompts["vqav2"] == "Is the ball flying?" + SHORT and prompts["vizwiz"] == "What is this?" + SUFFIX
    assert "Reference OCR token: AB, 12" in prompts["textvqa"] and "请直接回答选项字母" in prompts["mmbench_cn"]


def test_suites_without_files_are_named_all_at_once(world, monkeypatch, tmp_path):
    shutil.copytree(world / "playground", tmp_path / "playground")
    monkeypatch.chdir(tmp_path)
    shutil.rmtree("playground/data/eval/gqa")
    Path("playground/data/eval/mmbench/mmbench_dev_cn_20231003.tsv").unlink()
    with pytest.raises(UserError, match=r"no question files of gqa \(playground/.*/testdev_balanced_questions.json\), "
                                        r"mmbench_cn \(.*\); put them there, or name others: suites=\[vqav2.*mmvet\]"):
        execute(CONFIG, f"model={world / 'vlm'}", "output_dir=run")
    assert not Path("run").exists()
