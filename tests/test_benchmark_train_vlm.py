"""The benchmark of train_vlm: it runs at a tiny size and fills in its document."""

import json

from llava_runs import LLAVA_TRAIN

from benchmarks import train_vlm as benchmark

VALUES = {"llm": LLAVA_TRAIN / "llama", "vision_tower": LLAVA_TRAIN / "tower", "data": LLAVA_TRAIN / "stage1.json",
          "data_stage_1": LLAVA_TRAIN / "stage1.json", "image_folder": LLAVA_TRAIN / "images", "template": "plain",
          "batch": 4, "steps": 2, "repeats": 1, "workers": 0}


def test_it_runs_and_writes_between_the_marks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "VARIANTS", {2: benchmark.VARIANTS[2]})  # stage 1 runs the same code
    document, file = tmp_path / "performance.md", tmp_path / "b.json"
    document.write_text(f"before\n{benchmark.MARKS[0]}\nold\n{benchmark.MARKS[1]}\nafter\n")
    benchmark.main([str(document), f"json={file}", *(f"{key}={value}" for key, value in VALUES.items())])
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert capsys.readouterr().out.strip() in text
    values = json.loads(file.read_text())
    assert len(values["measurements"]) == 5
    for row in values["measurements"]:
        assert len(row["wall"]) == len(row["cpu"]) == 2 and min(row["wall"]) > 0 and row["memory"] > 0.1
    assert 0 < values["labelled"] < 1 < values["random"]
