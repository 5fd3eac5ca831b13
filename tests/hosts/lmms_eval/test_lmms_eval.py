"""The real lmms-eval, which finds our model by its entry point: its numbers are ours under rule `lmms_eval`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval")
ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "tests"))

import datasets  # noqa: E402
import torch  # noqa: E402
from eval_data import config_file, environment, execute, make_questions, make_vlm  # noqa: E402

from clipmoe_vlm.pictures import open_rgb  # noqa: E402
from clipmoe_vlm.runs import UserError  # noqa: E402
from eval_vlm.lmms import ClipmoeVlm, cut_at  # noqa: E402
from eval_vlm.models import load_vlm  # noqa: E402

TASK = """
task: {name}
dataset_path: {data}
dataset_kwargs:
  load_from_disk: true
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pope_doc_to_visual
doc_to_text: !function utils.pope_doc_to_text
doc_to_target: "answer"
generation_kwargs:
  max_new_tokens: {tokens}
  temperature: 0
  do_sample: false
process_results: !function utils.pope_process_results
metric_list:
{metrics}
lmms_eval_specific_kwargs:
  default:
    pre_prompt: ""
    post_prompt: "\\nAnswer the question using a single word or phrase."
metadata:
  - version: 0.0
"""
FIGURES = ("accuracy", "precision", "recall", "f1_score", "yes_ratio")
METRICS = "\n".join(f"  - metric: pope_{name}\n    aggregation: !function utils.pope_aggregate_{name}\n"
                    "    higher_is_better: true" for name in FIGURES)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tiny VLM that says yes or no now and then, POPE's files, and lmms-eval's tasks on the same questions."""
    folder = tmp_path_factory.mktemp("world")
    make_questions(folder / "data")
    says_yes_or_no(make_vlm(folder / "model"), folder / "data" / "images")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "utils.py").write_text("from lmms_eval.tasks.pope.utils import *  # noqa: F403\n")
    for category in ("random", "popular", "adversarial"):
        rows = [json.loads(line) for line in
                (folder / "data" / "pope" / f"coco_pope_{category}.json").read_text().splitlines()]
        images = [str(folder / "data" / "images" / row["image"]) for row in rows]
        columns = {"question_id": [str(row["question_id"]) for row in rows], "question": [row["text"] for row in rows],
                   "answer": [row["label"] for row in rows], "image": images}
        data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        datasets.DatasetDict({"test": data}).save_to_disk(folder / "tasks" / category)
        (folder / "tasks" / f"{category}.yaml").write_text(TASK.format(
            name=f"local_pope_{category}", data=folder / "tasks" / category, tokens=1, metrics=METRICS))
    return folder


@torch.no_grad()
def says_yes_or_no(folder: Path, images: Path) -> None:
    """Gives the model weights with which its first token is Yes about half of the time, and else No."""
    model, processor = load_vlm(folder, torch.device("cpu"))
    hidden = []
    for file in sorted(images.iterdir()):
        for thing in ("cat", "tree", "boat with three sails"):
            question = f"Is there a {thing} in the image?\nAnswer the question using a single word or phrase."
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            text = processor.apply_chat_template(chat, add_generation_prompt=True)
            inputs = processor(text=text, images=open_rgb(file), return_tensors="pt")
            hidden.append(model.model(**inputs).last_hidden_state[0, -1])
    hidden = torch.stack(hidden)
    mean = hidden.mean(0)
    tilt = torch.linalg.svd(hidden - mean).Vh[0]
    one = mean / (mean @ mean)  # its product with a hidden state is about 1
    processor.tokenizer.add_tokens(["Yes", "No"])
    yes, no = processor.tokenizer.convert_tokens_to_ids(["Yes", "No"])
    model.resize_token_embeddings(len(processor.tokenizer))
    model.lm_head.weight.zero_()
    model.lm_head.weight[yes] = 9 * one
    model.lm_head.weight[no] = 9 * one + tilt - (hidden @ tilt).median() * one
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def lmms_eval(world: Path, output: Path, *more: str) -> subprocess.CompletedProcess:
    arguments = [sys.executable, "-m", "lmms_eval", "--model", "clipmoe_vlm", "--model_args",
                 f"pretrained={world / 'model'}", "--include_path", str(world / "tasks"), "--output_path", str(output),
                 "--log_samples", *more]
    return subprocess.run(arguments, env={**environment(), "HF_HUB_OFFLINE": "1", "HF_HOME": str(output / "home")},
                          capture_output=True, text=True, timeout=500, cwd=world)


def test_lmms_eval_gets_our_numbers_and_our_answers(world, tmp_path):
    execute(config_file(tmp_path, world / "model", world / "data", suites=["pope"], rule="lmms_eval",
                        max_new_tokens=1))
    ours = json.loads((tmp_path / "run" / "scores.json").read_text())["suites"]["pope"]
    answers = {row["id"]: row["answer"] for row in
               map(json.loads, (tmp_path / "run" / "predictions" / "pope.jsonl").read_text().splitlines())}
    assert set(answers.values()) == {"Yes", "No"} and 0 < ours["random"]["f1_score"] < 1

    tasks = [f"local_pope_{category}" for category in ("random", "popular", "adversarial")]
    done = lmms_eval(world, tmp_path / "theirs", "--tasks", ",".join(tasks), "--batch_size", "7")
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "theirs").rglob("*results.json")
    theirs = json.loads(file.read_text())["results"]
    for task in tasks:
        category = task.removeprefix("local_pope_")
        for name in FIGURES:
            assert theirs[task][f"pope_{name},none"] == pytest.approx(ours[category][name], abs=1e-12), (task, name)
        (samples,) = (tmp_path / "theirs").rglob(f"*samples_{task}.jsonl")
        for row in map(json.loads, samples.read_text().splitlines()):
            number = row["doc"]["question_id"] if "doc" in row and "question_id" in row["doc"] else row["doc_id"] + 1
            assert row["filtered_resps"] == answers[f"{category}/{number}"]


def test_yes_and_no_in_the_figures(world):
    """The figures above with answers that are not all wrong: their script on made-up answers, and our rule."""
    from lmms_eval.tasks.pope import utils

    from eval_vlm.suites import pope

    words = ["yes", "No", "Yes.", "no", " YES ", "maybe", "", "no"]
    labels = ["yes", "no", "yes", "yes", "no", "no", "yes", "no"]
    rows = [utils.pope_process_results({"answer": label, "question_id": str(number)}, [word])["pope_accuracy"]
            for number, (word, label) in enumerate(zip(words, labels, strict=True))]
    records = [{"id": str(number), "question_id": number, "category": "random", "image": "a", "label": label,
                "answer": word} for number, (word, label) in enumerate(zip(words, labels, strict=True))]
    ours = pope.score(records, "lmms_eval")["random"]
    for name in FIGURES:
        assert getattr(utils, f"pope_aggregate_{name}")(rows) == pytest.approx(ours[name])


def test_what_it_cannot_do_is_a_sentence(world):
    model = ClipmoeVlm(str(world / "model"))
    with pytest.raises(UserError, match="local asks for sampling"):
        model._settings({"temperature": 0.7}, "local")
    with pytest.raises(UserError, match="has no max_pixels"):
        ClipmoeVlm(str(world / "model"), max_pixels=3)
    with pytest.raises(UserError, match="batch_size auto"):
        ClipmoeVlm(str(world / "model"), batch_size="auto")
    with pytest.raises(UserError, match="not a VLM"):
        ClipmoeVlm(str(ROOT / "tests/reference/llava_train/tower"))
    assert cut_at("Yes\n\nQ: next", ("\n\n", "")) == "Yes" and model._settings(
        {"until": "\n", "max_new_tokens": 3}, "t") == (3, ("\n",))
    assert os.environ.get("WORLD_SIZE", "1") == "1" and model.rank == 0 and model.world_size == 1
