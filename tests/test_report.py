"""The demo's result page, made from output files as the programs write them, with known right answers."""

import base64
import html
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import CLIPImageProcessor

from clipmoe_vlm import CLIPMoEConfig, CLIPMoEModel
from clipmoe_vlm.convert import save_folder
from clipmoe_vlm.runs import UserError, write_json
from demo.report import main, write_report
from eval_vlm.compare import compare_runs
from eval_vlm.suites import mme, pope

KINDS = ("object", "color", "place", "count")
PICTURES = 60
EVIL = '<script>alert("x")</script> & more'


def write_lines(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluation(name: str, right: dict[str, float], moe: bool, draw: random.Random) -> dict:
    """Hard captions right with the given shares, exactly; retrieval right for every third picture."""
    items, hard = [], {}
    for kind in KINDS:
        correct = [int(index < right[kind] * PICTURES) for index in range(PICTURES)]
        draw.shuffle(correct)
        items += [{"id": f"{index}_{kind}", "image": f"images/test/{index}.png", "kind": kind, "correct": value}
                  for index, value in enumerate(correct)]
        share = sum(correct) / PICTURES
        hard[kind] = {"accuracy": share, "low": share - 0.1, "high": share + 0.1, "n": PICTURES}
    ranks = [index % 3 for index in range(PICTURES)]
    recalls = {"R@1": 1 / 3, "R@5": 0.5, "R@10": 0.75}
    load = [[0.25, 0.75], [0.5, 0.5]]
    return {"name": name, "model": "model", "hard": hard, "hard_items": items,
            "retrieval": {"n_images": PICTURES, "n_captions": PICTURES, "image_to_text": recalls,
                          "text_to_image": recalls, "image_to_text_ranks": ranks, "text_to_image_ranks": ranks,
                          "owners": list(range(PICTURES))},
            "routing": {"vision_load": load, "text_load": load, "vision_entropy": [0.1, 0.2],
                        "text_entropy": [0.3, 0.4]} if moe else None}


def answers(suite, rows: list[dict], share: float, draw: random.Random) -> list[dict]:
    result = []
    for row in rows:
        right = draw.random() < share
        result.append({**row, "answer": row["label"].capitalize() if right else
                       {"yes": "No", "no": "Yes"}[row["label"].lower()]})
    return result


def make_run(run: Path, tiny_config, color: float, vlm: tuple[float, float]) -> Path:
    """A run folder in which CLIP-MoE has `color` right on colour (its base half), all others half of everything."""
    draw = random.Random(0)
    half = dict.fromkeys(KINDS, 0.5)
    dmu = run / "encoder" / "dmu"
    for name, moe in (("base", False), ("expert_1", False), ("final", True), ("random_routers", True),
                      ("uniform_average", True)):
        right = {**half, "color": color} if name == "final" else half
        write_json(dmu / "evaluation" / f"{name}.json", evaluation(name, right, moe, draw))
    for method in ("direct", "sparse_upcycling"):
        write_json(run / "encoder" / method / "evaluation" / "final.json", evaluation("final", half, False, draw))
        write_lines(run / "encoder" / method / "metrics.jsonl",
                    [{"stage": method, "step": step, "loss": 4 - step / 10} for step in range(1, 21)])
    write_lines(dmu / "metrics.jsonl", [{"stage": stage, "step": step, "loss": 4 - step / 10}
                                        for stage in ("mcl_1", "router") for step in range(1, 11)])
    write_json(dmu / "stage_1" / "clusters.json", {"sizes": [50, 70, 3], "num_clusters": 3, "used_samples": 120,
                                                   "dropped_samples": 3})
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    model = CLIPMoEModel(CLIPMoEConfig(**tiny_config(num_experts=2, num_experts_per_tok=1)))
    save_folder(model, dmu / "model", processor)
    save_folder(CLIPMoEModel(CLIPMoEConfig(**tiny_config())), dmu / "base", processor)

    for index in range(8):
        file = run / "data" / "images" / "test" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (30 * index, 90, 200)).save(file)
        (run / "data" / "mme" / "color").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, run / "data" / "mme" / "color" / file.name)
    asked = {"pope": [{"id": f"{category}/{number}", "suite": "pope", "category": category, "question_id": number,
                       "image": f"{number % 8}.png", "question": EVIL, "label": ("yes", "no")[number % 2]}
                      for category in ("random", "popular", "adversarial") for number in range(160)],
             "mme": [{"id": f"color/{number}/{pair}", "suite": "mme", "category": "color", "question": "Red?",
                      "image": f"color/{number}.png", "question_id": f"{number}/{pair}", "label": ("Yes", "No")[pair]}
                     for number in range(8) for pair in range(2)]}
    for tower, share in zip(("base", "clipmoe"), vlm, strict=True):
        folder = run / "eval" / tower
        scores = {}
        for suite, module in (("pope", pope), ("mme", mme)):
            rows = answers(suite, asked[suite], share, draw)
            write_lines(folder / "predictions" / f"{suite}.jsonl", rows)
            scores[suite] = module.report(rows, "official", {})
        write_json(folder / "scores.json", {"suites": scores})
        for stage in ("stage_1", "stage_2"):
            write_lines(run / "vlm" / tower / stage / "metrics.jsonl",
                        [{"step": step, "loss": 3 - step / 10} for step in range(1, 11)])
        shutil.copytree(dmu / "model", run / "vlm" / tower / "stage_2" / "model")
    write_json(run / "eval" / "clipmoe" / "compare.json", compare_runs(run / "eval" / "base", run / "eval" / "clipmoe"))
    write_json(run / "llm" / "text_questions.json", {"kinds": {"count": {"accuracy": 0.875, "n": 8}}})
    write_json(run / "timing.json", {"size": "tiny", "llm": "little", "steps": [
        {"name": "DMU", "command": "python -m train_encoder.run a.yaml", "seconds": 61.0, "started": 1000.0},
        {"name": "direct", "command": "python -m train_encoder.run b.yaml", "seconds": 50.0, "started": 1000.0},
        {"name": "compare", "command": "python -m eval_vlm.compare a b", "seconds": 4.0, "started": 2000.0}]})
    return run


@pytest.fixture(scope="module")
def good(tmp_path_factory, tiny_config) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs") / "good", tiny_config, color=0.9, vlm=(0.6, 0.9))
    write_report(run)
    return run


def test_the_page_stands_alone(good):
    page = (good / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert html.escape(EVIL, quote=False)[:20] in page.replace("&#34;", '"')
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "url(" not in page and "@import" not in page
    for encoded in re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", page):
        assert b"<svg" in base64.b64decode(encoded)
    assert all("alt=" in tag for tag in re.findall(r"<img[^>]*>", page))


def test_the_verdict_follows_the_numbers(good, tmp_path, tiny_config):
    summary = json.loads((good / "summary.json").read_text())
    assert summary["headline"].startswith("DMU added colour, to which the base was blind; the VLM sees better")
    assert summary["hard_captions"]["clipmoe"]["color"][0] == pytest.approx(0.9)
    gained, low, high = summary["hard_captions_clipmoe_minus_base"]["color"]
    assert gained == pytest.approx(0.4) and low > 0
    assert summary["seconds"] == 65.0  # the first two ran side by side
    assert summary["vlm"]["POPE all"]["difference"][1] > 0
    assert [goal["met"] for goal in summary["targets"]] == [True, False, True]  # 60% of POPE random is below 70%

    same = write_report(make_run(tmp_path / "same", tiny_config, color=0.5, vlm=(0.8, 0.8)))
    assert same["headline"].startswith("These numbers don't show that DMU added detail; whether the VLM sees better")
    worse = write_report(make_run(tmp_path / "worse", tiny_config, color=0.1, vlm=(0.9, 0.6)))
    assert "It lost colour" in worse["verdict"]["second"] and "the VLM sees worse" in worse["headline"]


def test_what_the_page_shows(good):
    page = (good / "report.html").read_text(encoding="utf-8")
    assert page.count('<div class="card">') == 20
    marks = re.findall(r"<dt>true</dt><dd>(\w+)</dd>\s*<dt>base</dt><dd class=\"(\w+)\">. (\w+)</dd>", page)
    assert len(marks) == 20 and {mark for _, mark, _ in marks} == {"better", "worse"}
    for label, mark, answer in marks:
        assert (label.lower() == answer.lower()) == (mark == "better")
    for name in ("Base CLIP", "Expert 1 alone", "CLIP-MoE (DMU)", "Direct fine-tuning", "Sparse upcycling",
                 "Random routers", "Uniform average"):
        assert name in page
    assert "3 clusters of\n  3 to 70 samples; 120 used in a pass,\n  3 left over" in page
    assert "one seed" in page and "first trained on the text" in page
    assert "count 88% right." in page
    assert "| CLIP-MoE (DMU) | 50.0 [40.0, 60.0] | 90.0 [80.0, 100.0] |" in (good / "results.md").read_text()
    with Image.open(good / "result.png") as opened:
        assert opened.width > 800


def test_a_missing_file_is_named(good, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(good, run)
    (run / "eval" / "clipmoe" / "compare.json").unlink()
    with pytest.raises(UserError, match=r"compare\.json: no such file"):
        write_report(run)


def test_the_command_ends_with_the_page(good, tmp_path):
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", "demo.report", str(good)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith(str(good / "report.html"))
    assert "CLIP-MoE (DMU)" in done.stdout and "90.0" in done.stdout
    with pytest.raises(UserError, match="make demo"):
        main([str(tmp_path / "nothing")])
