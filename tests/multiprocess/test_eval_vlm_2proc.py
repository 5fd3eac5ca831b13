"""Two processes of eval_vlm share the questions and end with what one process writes."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from eval_data import command, config_file, execute, load_answers, make_questions, make_vlm, run  # noqa: E402


def test_two_processes_share_the_work(tmp_path):
    vlm, questions = make_vlm(tmp_path / "model"), make_questions(tmp_path / "data")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = (config_file(tmp_path / name, vlm, questions) for name in ("one", "two"))
    execute(one)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    done = run([*launcher, *command(two)[2:]])
    assert done.returncode == 0, done.stderr
    assert load_answers(tmp_path / "two" / "run") == load_answers(tmp_path / "one" / "run")
    first, second = (json.loads((tmp_path / name / "run" / "scores.json").read_text()) for name in ("one", "two"))
    assert first == second
