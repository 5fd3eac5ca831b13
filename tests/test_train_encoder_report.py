"""What a run of train_encoder shows and shares: pictures, routing over time, trackers, the summary, the model card."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
from encoder_data import ROOT, command, environment, make_world, tiny_config
from hub import running_hub
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb_file import wandb_records, wandb_rows

from clipmoe_vlm import CLIPMoEModel
from clipmoe_vlm.routing import router_movement, routing_statistics
from clipmoe_vlm.runs import UserError, load_config, read_jsonl
from clipmoe_vlm.upcycling import router_parameters, upcycle
from train_encoder import report
from train_encoder.compare import differences, intervals, losses
from train_encoder.config import EncoderConfig
from train_encoder.run import main

STEPS = {"mcl_1": 10, "router": 60}
VALUES = {"num_experts": 2, "checkpoint_every": 10, "log_routing_every": 8, "mcl": {"max_steps": STEPS["mcl_1"]},
          "router": {"max_steps": STEPS["router"]}}
OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"))
    (folder / "clip" / "README.md").write_text("---\nlicense: mit\n---\n\nA tiny CLIP.\n")
    return folder


@pytest.fixture(scope="module")
def whole(world) -> Path:
    """The output of a run without trackers."""
    torch.set_num_threads(1)
    main(load_config(EncoderConfig, [str(tiny_config(world, world / "whole", **VALUES))], "train_encoder"))
    return world / "whole"


@pytest.fixture(scope="module")
def broken(world) -> Path:
    """The output of the same run with both trackers, killed between two checkpoints of the router and resumed."""
    output = world / "broken"
    config = tiny_config(world, output, **VALUES, trackers=["tensorboard", "wandb"])
    process = subprocess.Popen(command(config), cwd=ROOT, env={**environment(), **OFFLINE}, stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)
    metrics, wanted = output / "metrics.jsonl", STEPS["mcl_1"] + 15
    while process.poll() is None and not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= wanted):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL and not (output / "router" / "done.json").exists()
    assert (output / "stage_1" / "stage.png").is_file()  # a stage's picture does not wait for the end of the run
    with pytest.MonkeyPatch.context() as context:
        for name, value in OFFLINE.items():
            context.setenv(name, value)
        torch.set_num_threads(1)
        for _ in range(2):  # and typed once more when it has ended
            main(load_config(EncoderConfig, [str(config)], "train_encoder"))
    return output


# --- routing -------------------------------------------------------------------------------------------------------


def test_routing_statistics_are_those_of_a_plain_loop_over_real_tokens(whole):
    model = CLIPMoEModel.from_pretrained(whole / "model").eval()
    for tower in (model.vision_model, model.text_model):
        tower.config.num_experts_per_tok = 1  # of two experts a token would always choose both
    eos = model.config.text_config.eos_token_id
    pixels, ids = torch.randn(3, 3, 16, 16), torch.full((2, 16), 0)
    ids[0, :4], ids[1, :7] = torch.tensor([1, 5, 6, eos]), torch.tensor([1, 5, 6, 7, 8, 9, eos])
    found = routing_statistics(model, pixels, ids)
    with torch.no_grad():
        logits = {"vision": model.vision_model(pixels).router_logits, "text": model.text_model(ids).router_logits}
    real = {"vision": range(len(logits["vision"][0])), "text": [*range(4), *range(16, 16 + 7)]}
    for tower, per_layer in logits.items():
        for layer, rows in enumerate(per_layer):
            load, entropy = np.zeros(2), 0.0
            for token in real[tower]:
                p = rows[token].double().softmax(-1)
                load[int(p.argmax())] += 1
                entropy -= sum(float(x) * math.log(x) for x in p)
            np.testing.assert_allclose(found[f"{tower}_load"][layer], load / load.sum(), rtol=1e-6)
            assert found[f"{tower}_entropy"][layer] == pytest.approx(entropy / len(real[tower]), rel=1e-5)


def test_router_movement():
    start = [torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])]
    moved = router_movement([torch.tensor([[3.0, 4.5]]), torch.tensor([[0.0, 2.0]])], start)
    torch.testing.assert_close(moved, torch.tensor([0.1, 0.0]))


def test_routing_is_logged_over_time_with_the_distance_from_the_untuned_mixture(whole):
    rows = read_jsonl(whole / "routing.jsonl")
    assert [row["step"] for row in rows] == [1, *range(8, 60, 8), 60]
    experts = [CLIPMoEModel.from_pretrained(whole / name) for name in ("base", "stage_1/model")]
    start, end = (dict(router_parameters(model)) for model in (
        upcycle(experts, seed=0), CLIPMoEModel.from_pretrained(whole / "model")))
    for tower in ("vision", "text"):
        expected = [(end[name] - start[name]).norm() / start[name].norm() for name in start if name.startswith(tower)]
        np.testing.assert_allclose(rows[-1][f"{tower}_moved"], [value.item() for value in expected], rtol=1e-4)
        assert 0 < rows[0][f"{tower}_moved"][0] < rows[-1][f"{tower}_moved"][0]
        for row in rows:
            np.testing.assert_allclose(np.sum(row[f"{tower}_load"], 1), 1, rtol=1e-5)
            assert np.all(np.array(row[f"{tower}_entropy"]) <= math.log(2) + 1e-6)


def test_killed_and_resumed_with_trackers_it_logs_what_an_unbroken_run_logs(whole, broken):
    assert read_jsonl(broken / "routing.jsonl") == read_jsonl(whole / "routing.jsonl")
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (broken, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# --- trackers ------------------------------------------------------------------------------------------------------


def test_tensorboard_has_every_update_once(broken):
    metrics, routing = read_jsonl(broken / "metrics.jsonl"), read_jsonl(broken / "routing.jsonl")
    for stage, steps in STEPS.items():
        events = EventAccumulator(str(broken / "tensorboard" / stage), size_guidance={"scalars": 0}).Reload()
        rows = [row for row in metrics if row["stage"] == stage]
        for name in ("loss", "contrastive", "lr", "grad_norm"):
            found = events.Scalars(name)
            assert [event.step for event in found] == list(range(1, steps + 1))
            np.testing.assert_allclose([event.value for event in found], [row[name] for row in rows], rtol=1e-6)
    for name, get in (("vision_moved/layer_1", lambda row: row["vision_moved"][1]),
                      ("text_entropy/layer_0", lambda row: row["text_entropy"][0]),
                      ("text_load/layer_0/expert_1", lambda row: row["text_load"][0][1])):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        np.testing.assert_allclose(found, [(row["step"], get(row)) for row in routing], rtol=1e-6)
    text = EventAccumulator(str(broken / "tensorboard" / "summary")).Reload().Tensors("summary/text_summary")
    assert text[0].tensor_proto.string_val[0].decode() == (broken / "summary.md").read_text()


def test_wandb_continues_one_run_without_repeating_an_update(broken):
    file, = broken.glob("wandb/offline-run-*/*.wandb")  # that of the killed process has gone
    records, rows = list(wandb_records(file)), wandb_rows(file)
    metrics = read_jsonl(broken / "metrics.jsonl")
    assert [row["_step"] for row in rows] == list(range(1, len(metrics) + 1))
    for row, logged in zip(rows, metrics, strict=True):
        stage = logged["stage"]
        assert row[f"{stage}/step"] == logged["step"]
        assert row[f"{stage}/loss"] == pytest.approx(logged["loss"], rel=1e-6)
    assert rows[-1]["router/vision_moved/layer_0"] == pytest.approx(
        read_jsonl(broken / "routing.jsonl")[-1]["vision_moved"][0], rel=1e-6)
    summary = {"/".join(item.nested_key) or item.key: item.value_json for record in records
               if record.WhichOneof("record_type") == "summary" for item in record.summary.update}
    final = intervals(json.loads((broken / "evaluation" / "final.json").read_text()))
    assert float(summary["final/color"]) == pytest.approx(final["color"].mean)


def test_a_tracker_that_cannot_run_is_told_in_a_sentence(world, tmp_path, monkeypatch):
    def config(**values) -> EncoderConfig:
        return load_config(EncoderConfig, [str(tiny_config(world, tmp_path / "out", **values))], "train_encoder")

    with pytest.raises(UserError, match="trackers: 'mlflow' is not one of tensorboard, wandb"):
        main(config(trackers=["mlflow"]))
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "wandb", None)  # as if it were not there
        with pytest.raises(UserError, match="trackers: wandb is not installed; type `pip install wandb`"):
            main(config(trackers=["wandb"]))
    with pytest.raises(UserError, match="log_routing_every: 0 must be at least 1"):
        main(config(log_routing_every=0))
    wandb.teardown()  # what other runs of this process have told it
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # nobody is logged in
    with pytest.raises(UserError, match="trackers: wandb does not start .*; type `wandb login`, or set WANDB_MODE"):
        main(config(trackers=["wandb"]))


# --- summary -------------------------------------------------------------------------------------------------------


def test_summary_says_what_was_made_from_what_and_shows_every_picture(whole):
    summary = (whole / "summary.md").read_text()
    for words in ("# whole\n", "a CLIP-MoE of 2 experts, of which each token uses 2", "| base | `clip`: pictures of",
                  "`train.csv`: 64 pairs", "`test.csv`: 12 pictures, 12 captions", "60 updates of 8 pairs",
                  "learning rate 0.001", "| stage_1 | 10 |", "| router | 60 |", "one run with one seed (0)",
                  "- vision tower, after update 60: routers are"):
        assert words in summary
    assert str(whole.parent) not in summary
    pictures = [line[line.index("(") + 1:-1] for line in summary.splitlines() if line.startswith("![")]
    assert pictures == ["scores.png", "stage_1/stage.png", "router/stage.png", "routing.png"]
    for picture in pictures:
        image = np.asarray(Image.open(whole / picture).convert("RGB"))
        assert image.std() > 10 and min(image.shape[:2]) > 200


def hard(right: list[int]) -> dict:
    return {"hard_items": [{"id": n, "image": str(n), "kind": "color", "correct": value}
                           for n, value in enumerate(right)]}


def test_controls_are_judged_in_words():
    half, most = [0, 1] * 20, [1] * 36 + [0] * 4
    results = {"base": hard(half), "expert_1": hard(half), "expert_2": hard(most), "random_routers": hard(most),
               "uniform_average": hard([1] * 40), "final": hard(most)}
    config = EncoderConfig(seed=3)
    text = "\n".join(report.support(results, config))
    assert "Router tuning: the final model against the same experts with untuned routers: no clear difference" in text
    assert "equal weights, for more compute: **worse on color (-10.0" in text
    assert "its best single expert (`expert_2`" in text and "seed (3)" in text and "method=direct" in text
    results |= {"uniform_average": hard(half), "expert_2": hard(half)}
    text = "\n".join(report.support(results, config))
    assert "for more compute: better on color (+40.0" in text and "worse" not in text
    assert "Nothing was measured" in "\n".join(report.support({}, config))


def assert_no_path_of_this_machine(model: Path) -> None:
    for file in model.iterdir():
        content = file.read_bytes()
        for path in (tempfile.gettempdir(), str(ROOT)):
            assert f"{path}/".encode() not in content, file


@pytest.mark.parametrize("method", ["direct", "sparse_upcycling"])
def test_baselines_have_their_summary_and_card_too(world, method):
    output = world / method
    values = {**VALUES, "mcl": {"max_steps": 2}, "router": {"max_steps": 2}, "validation_data": None,
              "hard_captions": None}
    main(load_config(EncoderConfig, [str(tiny_config(world, output, method=method, **values))], "train_encoder"))
    assert (output / method / "stage.png").is_file()
    assert (output / "routing.png").is_file() == (method == "sparse_upcycling")
    summary, card = (output / "summary.md").read_text(), (output / "model" / "README.md").read_text()
    kind = "a dense CLIP of" if method == "direct" else "a CLIP-MoE of 2 experts"
    for text in (summary, card):
        assert kind in text and "measured on held-out data" in text
    assert ModelCard(card).data.eval_results is None
    assert_no_path_of_this_machine(output / "model")


# --- sharing -------------------------------------------------------------------------------------------------------


def test_model_card_has_the_figures_and_the_licence_of_the_base(whole):
    card = ModelCard.load(whole / "model" / "README.md")
    assert card.data.license == "mit" and card.data.base_model is None  # the base has no name on the hub
    assert card.data.pipeline_tag == "zero-shot-image-classification" and "clip-moe" in card.data.tags
    results = [json.loads((whole / "evaluation" / f"{name}.json").read_text()) for name in ("base", "final")]
    base, final = map(intervals, results)
    assert {(found.dataset_name, found.metric_name): found.metric_value for found in card.data.eval_results} == {
        ("test_hard.jsonl" if name in ("color", "place", "all rows", "mean of the kinds") else "test.csv", name):
            pytest.approx(100 * interval.mean, abs=0.01) for name, interval in final.items()}
    for measure, interval in base.items():
        line = next(line for line in card.text.splitlines() if line.startswith(f"| {measure} |"))
        assert f"| {100 * interval.mean:.1f} (" in line
    sentence = losses(differences(*results))
    assert sentence in card.text if sentence else "scores lower than its base" not in card.text


def test_nothing_of_the_makers_machine_is_in_the_model_folder(whole):
    names = {file.name for file in (whole / "model").iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "modeling_clipmoe.py"} <= names
    for folder in ("base", "stage_1/model", "model"):
        assert_no_path_of_this_machine(whole / folder)


def test_a_card_that_a_person_changed_stays(whole, world):
    card = whole / "model" / "README.md"
    before = card.read_text()
    card.write_text(before + "\nMy own words.\n")
    main(load_config(EncoderConfig, [str(world / "whole.yaml")], "train_encoder"))
    assert card.read_text().endswith("My own words.\n")
    card.write_text(before)


PUSH = """
import sys
from clipmoe_vlm import CLIPMoEModel
from transformers import AutoImageProcessor, AutoTokenizer
for part in (CLIPMoEModel, AutoImageProcessor, AutoTokenizer):
    part.from_pretrained(sys.argv[1]).push_to_hub("me/pushed")
CLIPMoEModel.from_pretrained(sys.argv[1]).config.push_to_hub("me/config")
"""


def test_the_hub_gives_back_what_was_pushed_to_people_without_the_package(whole, world, tmp_path):
    local = CLIPMoEModel.from_pretrained(whole / "model").eval()
    card = (whole / "model" / "README.md").read_text()
    lines = card.split("```python\n")[1].split("```")[0]
    with running_hub() as (address, repositories):
        env = {**environment(), "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache"),
               "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_TELEMETRY": "1", "CUDA_VISIBLE_DEVICES": ""}

        def python(code: str, *arguments: str, **values: str) -> str:
            result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, env={**env, **values},
                                    stdin=subprocess.DEVNULL, text=True, capture_output=True, timeout=300)
            assert result.returncode == 0, result.stderr
            return result.stdout

        python(PUSH, str(whole / "model"))
        upload = Path(sys.executable).with_name("hf")  # as the card says
        subprocess.run([upload, "upload", "me/whole", whole / "model"], env=env, check=True, capture_output=True)
        files = {file.name: file.read_bytes() for file in (whole / "model").iterdir()}
        assert repositories["me/whole"] == files
        assert set(repositories["me/pushed"]) == set(files)
        assert repositories["me/pushed"]["model.safetensors"] == files["model.safetensors"]
        assert set(repositories["me/config"]) == {"README.md", "config.json", "configuration_clipmoe.py"}
        Image.open(world / "test" / "000.png").save(tmp_path / "picture.jpg")
        code = "import sys, torch; sys.modules['clipmoe_vlm'] = None  # importing it is an error\n"
        for name in ("whole", "pushed"):
            code += lines.replace("FOLDER", f"me/{name}") + (
                f"torch.save([pixels, ids, model(input_ids=ids, pixel_values=pixels).logits_per_image], '{name}.pt')\n")
        assert python(code, PYTHONPATH="").count("SoftmaxBackward") == 2
    for name in ("whole", "pushed"):
        pixels, ids, logits = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        with torch.no_grad():
            torch.testing.assert_close(local(input_ids=ids, pixel_values=pixels).logits_per_image, logits.detach())
