"""The benchmark of eval_vlm: it runs at a tiny size, finds equal answers and fills in its document."""

import json
import re

from eval_data import make_questions, make_vlm

from benchmarks import eval_vlm as benchmark


def test_it_runs_and_writes_between_the_marks(tmp_path, capsys):
    vlm, questions = make_vlm(tmp_path / "model"), make_questions(tmp_path / "data")
    document, file = tmp_path / "performance.md", tmp_path / "b.json"
    document.write_text(f"before\n{benchmark.MARKS[0]}\nold\n{benchmark.MARKS[1]}\nafter\n")
    benchmark.main([str(document), f"json={file}", f"model={vlm}", f"questions_dir={questions / 'pope'}",
                    f"image_folder={questions / 'images'}", "pictures=2", "repeats=2", "max_new_tokens=4",
                    f"lmms_python={tmp_path / 'none'}"])
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.split(benchmark.MARKS[0])[1].split(benchmark.MARKS[1])[0].strip() in capsys.readouterr().out
    values = json.loads(file.read_text())
    assert values["questions"] == 36 and all(len(taken) == 2 and min(taken) > 0 for taken in values["seconds"].values())
    rows = re.findall(r"^\| (.+?) \| [\d.]+ \(.*\) \| [\d.]+ \(.*\) \| (\d+) \|$", text, re.MULTILINE)
    different = {name: int(count) for name, count in rows}
    assert list(different) == [benchmark.ONE_BY_ONE, *benchmark.BATCHES, benchmark.YES_NO]
    assert all(not different[name] for name in benchmark.BATCHES) and different[benchmark.YES_NO] == 36
