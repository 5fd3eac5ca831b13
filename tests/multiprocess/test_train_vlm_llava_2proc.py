"""train_vlm on two processes after the original LLaVA's recorded runs."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from encoder_data import environment  # noqa: E402
from llava_runs import after_stage1, compare_with_reference, furthest  # noqa: E402


def test_two_processes_follow_llava(tmp_path):
    start = after_stage1(tmp_path / "start")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "tests/multiprocess/llava_two_ranks.py", str(start), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for run in ("two_ranks", "two_ranks_grouped"):
        compare_with_reference(tmp_path / run, run)
        assert furthest(tmp_path / run, "variants.safetensors", run) < 1e-5
