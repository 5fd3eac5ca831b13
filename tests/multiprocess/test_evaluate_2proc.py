"""Zero-shot evaluation with two processes (gloo) gives the scores of one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml

from clipmoe_vlm.runs import load_config
from train_encoder.evaluate import EvaluateConfig, main

sys.path.insert(0, str(Path(__file__).parent.parent))
from encoder_data import ROOT, environment, make_world  # noqa: E402


def test_two_processes_score_like_one(tmp_path):
    world = make_world(tmp_path / "world")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({
        "output_dir": str(tmp_path / "one"), "models": {"clip": str(world / "clip")}, "workers": 0,
        "tasks": {"scenes": {"kind": "retrieval", "data": str(world / "train.csv")},
                  "hard": {"kind": "hard_captions", "data": str(world / "test_hard.jsonl")}}}))
    main(load_config(EvaluateConfig, [str(config)], "evaluate"))
    words = ["-m", "train_encoder.evaluate", str(config), f"output_dir={tmp_path / 'two'}", "workers=1"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([sys.executable, *launcher, *words], cwd=ROOT, env=environment(), text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[clip] scenes: image->text") == 1
    one, two = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("one", "two"))
    assert one == two and one["scenes"]["models"]["clip"]["text to image R@1"]["n"] == 64
    words = [*words[:3], f"output_dir={tmp_path / 'three'}", "tasks.hard.data=nowhere"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment(), text=True, capture_output=True)
    assert done.returncode == 2 and "error: tasks.hard.data: nowhere: no such file or folder" in done.stderr
