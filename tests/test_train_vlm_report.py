"""What a run of train_vlm shows: held-out loss, early answers, suites during training, trackers, the summary."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_data import ROOT, environment, make_questions
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration
from vlm_world import save_moe_tower
from wandb_file import wandb_rows

import eval_vlm.run
from clipmoe_vlm.runs import UserError, load_config, read_jsonl
from eval_vlm.config import EvalConfig
from train_vlm.config import LoraSettings, VLMConfig
from train_vlm.data import make_dataset
from train_vlm.model import build
from train_vlm.samples import read_samples
from train_vlm.train import train

LLAVA_TRAIN = Path(__file__).parent / "reference" / "llava_train"
STEPS = 6
PICTURES = 5  # of the suite, with 6 questions in each of 3 sets
OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
MEASURED = ("seconds", "data_seconds", "tokens_per_second", "peak_memory_gib", "validation_seconds", "utilisation")


pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A CLIP-MoE tower, held-out samples (some without a picture, one with an unreadable one), and eval_vlm's files."""
    folder = tmp_path_factory.mktemp("world")
    save_moe_tower(folder / "tower")
    samples = json.loads((LLAVA_TRAIN / "stage1.json").read_text())[:9]
    samples[2]["image"] = "nowhere.png"
    for sample in samples[5:7]:
        del sample["image"]
        sample["conversations"][0]["value"] = "What is shown?"
    (folder / "held_out.json").write_text(json.dumps(samples))
    questions = make_questions(folder / "questions", pictures=PICTURES)
    (folder / "eval.yaml").write_text(json.dumps({
        "pope": {"questions_dir": str(questions / "pope"), "image_folder": str(questions / "images")},
        "suites": ["pope"], "max_new_tokens": 6, "batch_size": 1}))
    return folder


def settings(world: Path, output: str, **changes) -> VLMConfig:
    values = dict(
        output_dir=str(world / output), data=str(LLAVA_TRAIN / "stage2.json"), image_folder=str(LLAVA_TRAIN / "images"),
        llm=str(LLAVA_TRAIN / "llama"), vision_tower=str(world / "tower"), tower="routers", llm_tuning="lora",
        lora=LoraSettings(r=4, alpha=8, dropout=0.2), max_length=160, global_batch_size=4, micro_batch_size=2,
        precision="fp32", zero_stage=0, workers=0, learning_rate=3e-3, max_steps=STEPS)
    return VLMConfig(**(values | changes))


def measured(world: Path) -> dict:
    return {"validation_data": str(world / "held_out.json"), "validation_every": 2, "answers": 2,
            "evaluation": str(world / "eval.yaml"), "evaluation_every": 4}


@pytest.fixture(scope="module")
def whole(world) -> Path:
    train(settings(world, "whole", **measured(world)))
    return world / "whole"


@pytest.fixture(scope="module")
def broken(world) -> tuple[Path, int]:
    """The output of the same run with trackers, killed in the middle of its first evaluation and resumed; and how many
    questions were not asked again."""
    config = settings(world, "broken", **measured(world), trackers=["tensorboard", "wandb"])
    (world / "broken.yaml").write_text(json.dumps(dataclasses.asdict(config)))
    alone = {name: value for name, value in environment().items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    process = subprocess.Popen([sys.executable, "-m", "train_vlm.run", str(world / "broken.yaml")], cwd=ROOT,
                               env={**alone, **OFFLINE}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    predictions = world / "broken/evaluations/step_4/predictions/pope.jsonl"
    while process.poll() is None and not (predictions.is_file() and predictions.read_bytes().count(b"\n") >= 3):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL and not (world / "broken/evaluations/step_4/scores.json").exists()
    answered = []
    answers = eval_vlm.run.Answerer.answers

    def recorded(self, records, folder, before):
        answered.append(len(before))
        return answers(self, records, folder, before)

    with pytest.MonkeyPatch.context() as context:
        for name, value in OFFLINE.items():
            context.setenv(name, value)
        context.setattr(eval_vlm.run.Answerer, "answers", recorded)
        train(config)
    return world / "broken", answered[0]


def updates(output: Path) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in MEASURED}
            for row in read_jsonl(output / "metrics.jsonl") if "loss" in row]


def measurements(output: Path) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in MEASURED}
            for row in read_jsonl(output / "metrics.jsonl") if "loss" not in row]


# --- measurements ----------------------------------------------------------------------------------------------------


def test_measuring_changes_nothing(world, whole):
    train(settings(world, "plain"))
    assert updates(world / "plain") == updates(whole) and not measurements(world / "plain")
    plain, ours = (load_file(output / "model/model.safetensors") for output in (world / "plain", whole))
    assert all(torch.equal(value, ours[name]) for name, value in plain.items())


def test_held_out_loss_is_that_of_the_finished_model_sample_by_sample(world, whole):
    rows = [row for row in measurements(whole) if "validation_loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    config = settings(world, "unused")
    samples = read_samples(str(world / "held_out.json"), config.image_folder, world / "index")
    dataset, _ = make_dataset(config, samples, *build(config))
    model = LlavaForConditionalGeneration.from_pretrained(whole / "model").eval()
    total = tokens = 0
    for item in (dataset[index] for index in range(len(samples))):
        if "problem" not in item:
            inputs = {"pixel_values": item["pictures"]} if "pictures" in item else {}
            with torch.no_grad():
                logits = model(input_ids=item["input_ids"][None], **inputs).logits[0, :-1, :model.config.image_token_id]
            labels = item["labels"][1:]
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            tokens += int((labels >= 0).sum())
    assert rows[-1]["validation_loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert rows[-1]["validation_label_tokens"] == tokens
    assert (rows[-1]["validation_samples"], rows[-1]["validation_skipped"]) == (8, 1)
    assert rows[0]["validation_loss"] > rows[-1]["validation_loss"]


def test_an_update_says_how_fast_it_was(whole):
    for row in (row for row in read_jsonl(whole / "metrics.jsonl") if "loss" in row):
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"], rel=0.05)
        assert 0 < row["utilisation"] < 1 and 0 <= row["data_seconds"] < row["seconds"]
        assert 0.1 < row["peak_memory_gib"] < 10


def test_answers_come_early(world, tmp_path):
    train(settings(world, str(tmp_path / "run"), answers=1, max_steps=11, checkpoint_every=100))
    assert [row["step"] for row in read_jsonl(tmp_path / "run/answers.jsonl")] == [0, 10, 11]


def test_answers_are_those_of_the_finished_model(whole):
    rows = read_jsonl(whole / "answers.jsonl")
    assert [(row["step"], row["id"]) for row in rows] == [(step, f"cap0{n}") for step in (0, 2, 4, 6) for n in (0, 4)]
    samples = {sample["id"]: sample for sample in json.loads((LLAVA_TRAIN / "stage1.json").read_text())}
    model = LlavaForConditionalGeneration.from_pretrained(whole / "model").eval()
    processor = AutoProcessor.from_pretrained(whole / "model", backend="pil")
    for row in rows[-2:]:
        sample = samples[row["id"]]
        question, expected = (turn["value"] for turn in sample["conversations"])
        assert row["pictures"] == [str(LLAVA_TRAIN / "images" / sample["image"])] and row["expected"] == expected
        assert row["question"] == question.replace("<image>", "").strip()
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}],
            add_generation_prompt=True)
        inputs = processor(images=Image.open(LLAVA_TRAIN / "images" / sample["image"]).convert("RGB"), text=prompt,
                           return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=64)[0, inputs["input_ids"].shape[1]:]
        assert row["answer"] == processor.decode(output, skip_special_tokens=True).strip()
    assert rows[0]["answer"] != rows[-2]["answer"]


def test_answers_of_tied_embeddings_under_zero3_and_without_held_out_samples(world, tmp_path):
    """Training samples are asked, text alone, too; ZeRO-3 keeps the head, which is also the embedding, in pieces."""
    LlamaForCausalLM(LlamaConfig(vocab_size=1200, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                 num_attention_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
                                 max_position_embeddings=256)).save_pretrained(tmp_path / "llm")
    for file in (LLAVA_TRAIN / "llama").glob("token*"):
        shutil.copy(file, tmp_path / "llm")
    found = []
    for stage in (0, 3):
        output = tmp_path / f"zero{stage}"
        train(settings(world, str(output), llm=str(tmp_path / "llm"), llm_tuning="full", max_steps=2, answers=3,
                       zero_stage=stage))
        found.append(read_jsonl(output / "answers.jsonl"))
    assert found[0] == found[1] and {row["step"] for row in found[0]} == {0, 2}
    assert len(found[0]) == 6 and {len(row["pictures"]) for row in found[0]} >= {0, 1}


def test_scores_are_those_of_eval_vlm_on_the_finished_folder(world, whole):
    output = world / "scored"
    eval_vlm.run.main(load_config(EvalConfig, [str(world / "eval.yaml"), f"model={whole / 'model'}",
                                               f"output_dir={output}"], "eval_vlm"))
    assert (output / "predictions/pope.jsonl").read_bytes() == (
        whole / "evaluations/step_6/predictions/pope.jsonl").read_bytes()
    scores = json.loads((output / "scores.json").read_text())["suites"]
    assert json.loads((whole / "evaluations/step_6/scores.json").read_text())["suites"] == scores
    rows = {row["step"]: row["evaluation"] for row in measurements(whole) if "evaluation" in row}
    assert list(rows) == [4, 6] and not (whole / "evaluations/model").exists()
    assert rows[6]["pope/random"] == pytest.approx(100 * scores["pope"]["random"]["f1"])


def test_killed_evaluation_goes_on(whole, broken):
    output, answered = broken
    assert 3 <= answered < PICTURES * 6 * 3
    for step in (4, 6):
        ours, theirs = ({row["id"]: row for row in read_jsonl(
            folder / f"evaluations/step_{step}/predictions/pope.jsonl")} for folder in (output, whole))
        assert ours == theirs
    assert updates(output) == updates(whole) and measurements(output) == measurements(whole)
    assert read_jsonl(output / "answers.jsonl") == read_jsonl(whole / "answers.jsonl")


# --- trackers ------------------------------------------------------------------------------------------------------


def test_tensorboard_has_every_number_once(broken):
    output, _ = broken
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    rows = read_jsonl(output / "metrics.jsonl")
    for name, get in (("loss", lambda row: row.get("loss")), ("grad_norm", lambda row: row.get("grad_norm")),
                      ("lr/projector", lambda row: row.get("lr", {}).get("projector")),
                      ("validation_loss", lambda row: row.get("validation_loss")),
                      ("evaluation/pope/mean", lambda row: row.get("evaluation", {}).get("pope/mean"))):
        expected = [(row["step"], get(row)) for row in rows if get(row) is not None]
        np.testing.assert_allclose([(event.step, event.value) for event in events.Scalars(name)], expected, rtol=1e-6)
    summary = events.Tensors("summary/text_summary")[0].tensor_proto.string_val[0].decode()
    assert summary == (output / "summary.md").read_text()


def test_wandb_has_every_line_of_the_metrics_once(broken):
    output, _ = broken
    file, = output.glob("wandb/offline-run-*/*.wandb")
    sent, logged = wandb_rows(file), read_jsonl(output / "metrics.jsonl")
    assert [row["_step"] for row in sent] == list(range(1, len(logged) + 1))
    for row, ours in zip(sent, logged, strict=True):
        assert row["step"] == ours["step"]
        for name in ("loss", "validation_loss"):
            assert row.get(name) == (pytest.approx(ours[name]) if name in ours else None)


# --- summary -------------------------------------------------------------------------------------------------------


def test_summary_says_what_was_trained_from_what_and_shows_the_curves(world, whole):
    summary = (whole / "summary.md").read_text()
    for words in ("# whole\n", "| language model | `llama` |", "| vision tower | `tower` |",
                  "`stage2.json`: 49 samples", "held-out data | `held_out.json`", "6 of 4 samples",
                  "loss on 8 held-out samples", "## Answers", "| scene00.png |", "pope/mean",
                  "tokens per second, median", "one run with one seed (42)", "python -m eval_vlm.compare"):
        assert words in summary, words
    assert str(world) not in summary and str(ROOT) not in summary
    image = np.asarray(Image.open(whole / "curves.png").convert("RGB"))
    assert image.std() > 10 and min(image.shape[:2]) > 200


def test_held_out_samples_that_are_trained_on_are_counted(world, tmp_path, capsys):
    samples = json.loads((LLAVA_TRAIN / "stage2.json").read_text())[:4]
    samples[1]["id"] = "another"
    samples[2]["conversations"][-1]["value"] = "Another answer."
    (tmp_path / "same.json").write_text(json.dumps(samples))
    train(settings(world, str(tmp_path / "run"), validation_data=str(tmp_path / "same.json"), max_steps=1,
                   max_length=100))
    assert "3 of the 4 samples" in capsys.readouterr().out
    summary = (tmp_path / "run/summary.md").read_text()
    assert "**3 of the" in summary and "held-out samples are trained on, too**" in summary
    rows = read_jsonl(tmp_path / "run/problems.jsonl")
    assert sum(len(row["truncated"]) for row in rows) == sum(row["truncated"] for row in updates(tmp_path / "run"))


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, words", [
    ({"trackers": ["mlflow"]}, ["mlflow", "tensorboard, wandb"]),
    ({"validation_every": 0}, ["validation_every", "at least 1"]),
    ({"answers": -1}, ["answers", "at least 0"]),
    ({"validation_data": "nowhere.json"}, ["nowhere.json", "no such file"]),
    ({"evaluation": "nowhere.yaml"}, ["nowhere.yaml", "no such configuration file"]),
    ({"evaluation": "bad.yaml"}, ["bad.yaml", "'suite'", "did you mean 'suites'"]),
    ({"evaluation": "no_pictures.yaml"}, ["0.png", "no such picture"]),
])
def test_mistakes_are_told_before_training(world, tmp_path, changes, words):
    (tmp_path / "bad.yaml").write_text("suite: [pope]")
    values = json.loads((world / "eval.yaml").read_text())
    values["pope"]["image_folder"] = str(tmp_path)
    (tmp_path / "no_pictures.yaml").write_text(json.dumps(values))
    if (tmp_path / str(changes.get("evaluation"))).is_file():
        changes = {"evaluation": str(tmp_path / changes["evaluation"])}
    with pytest.raises(UserError) as error:
        train(settings(world, str(tmp_path / "run"), **changes))
    assert all(word in str(error.value) for word in words), str(error.value)
    metrics = tmp_path / "run/metrics.jsonl"
    assert not metrics.is_file() or not metrics.read_text()
