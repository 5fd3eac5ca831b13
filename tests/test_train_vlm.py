"""train_vlm through its entry point, in this process: reference trajectories of the original LLaVA, and invariants."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from clipmoe_vlm import CLIPMoEVisionConfig, CLIPMoEVisionModel
from clipmoe_vlm.runs import UserError, read_jsonl
from train_vlm import saving
from train_vlm import train as train_module
from train_vlm.chat import IMAGE_TOKEN
from train_vlm.config import LoraSettings, VLMConfig
from train_vlm.data import ConversationDataset
from train_vlm.loss import VLMLoss
from train_vlm.model import build
from train_vlm.sampler import BatchPlan
from train_vlm.samples import read_picture
from train_vlm.train import schedule, train
from train_vlm.tuning import parameter_groups, set_trainable

REFERENCE = Path(__file__).parent / "reference"
LLAVA_TRAIN = REFERENCE / "llava_train"
RUNS = json.loads((LLAVA_TRAIN / "runs.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def one_process():
    """`train` joins a process group of one; leave neither it nor its environment to other tests."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


def settings(output, **changes) -> VLMConfig:
    values = dict(
        output_dir=str(output), data=str(LLAVA_TRAIN / "stage2.json"), image_folder=str(LLAVA_TRAIN / "images"),
        llm=str(LLAVA_TRAIN / "llama"), vision_tower=str(LLAVA_TRAIN / "tower"), max_length=160, global_batch_size=4,
        micro_batch_size=4, precision="fp32", zero_stage=0, workers=0, learning_rate=1e-3)
    values |= changes
    if "vlm" in values:
        values |= {"llm": None, "vision_tower": None}
    return VLMConfig(**values)


def losses(output) -> list[float]:
    return [row["lm_loss"] for row in read_jsonl(Path(output) / "metrics.jsonl")]


@pytest.fixture(scope="module")
def moe_tower(tmp_path_factory) -> str:
    """A small CLIP-MoE vision tower with an image processor."""
    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(0)
    config = CLIPMoEVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
                                 image_size=28, patch_size=14, num_experts=4, num_experts_per_tok=2)
    CLIPMoEVisionModel(config).save_pretrained(folder)
    values = json.loads((LLAVA_TRAIN / "tower/preprocessor_config.json").read_text())
    values |= {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return str(folder)


def start_of_stage1(folder: Path) -> Path:
    """A VLM folder with the reference's first projector."""
    model, processor = build(settings(folder, template="plain"))
    projector = load_file(LLAVA_TRAIN / "projector.safetensors")
    names = {"0": "linear_1", "2": "linear_2"}
    model.model.multi_modal_projector.load_state_dict(
        {f"{names[key[0]]}{key[1:]}": value for key, value in projector.items()})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def follow(monkeypatch, run: str) -> None:
    """Makes training take the samples in the order that the reference run recorded."""
    order = [index for step in RUNS[run]["steps"] for micro in step["micro"] for index in micro["samples"]]
    monkeypatch.setattr(BatchPlan, "order", lambda plan, epoch: order)


def compare_with_reference(output: Path, run: str) -> None:
    rows, steps = read_jsonl(output / "metrics.jsonl"), RUNS[run]["steps"]
    assert len(rows) == len(steps)
    for row, step in zip(rows, steps, strict=True):
        assert row["lm_loss"] == pytest.approx(step["loss"], abs=2e-5)
        assert row["grad_norm"] == pytest.approx(step["grad_norm"], rel=1e-4)
        assert row["label_tokens"] == sum(micro["targets"] for micro in step["micro"])
        assert sorted(set(row["lr"].values())) == pytest.approx(sorted(set(step["lr"])))


def llava_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our tensors under the reference's names."""
    names = {}
    for name, value in state.items():
        if name.startswith("model.language_model."):
            names["llm.model." + name.removeprefix("model.language_model.")] = value
        elif name.startswith("model.multi_modal_projector."):
            part = name.removeprefix("model.multi_modal_projector.")
            names["projector." + part.replace("linear_1", "0").replace("linear_2", "2")] = value
        elif name == "lm_head.weight":
            names["llm.lm_head.weight"] = value
    return names


@pytest.fixture(scope="module")
def stage1(tmp_path_factory) -> Path:
    """The reference's stage 1, followed."""
    folder = tmp_path_factory.mktemp("stage1")
    with pytest.MonkeyPatch.context() as monkeypatch:
        follow(monkeypatch, "stage1")
        train(settings(folder / "run", vlm=str(start_of_stage1(folder / "start")), template="plain",
                       data=str(LLAVA_TRAIN / "stage1.json"), image_aspect_ratio="square", llm_tuning="frozen",
                       learning_rate=2e-3, group_by_modality_length=False))
    return folder / "run"


def test_stage1_follows_llava(stage1):
    compare_with_reference(stage1, "stage1")
    model = LlavaForConditionalGeneration.from_pretrained(stage1 / "model")
    ours = llava_names(model.state_dict())
    for name, value in load_file(LLAVA_TRAIN / "stage1.safetensors").items():
        if name.startswith("final."):
            assert (ours[name.removeprefix("final.")] - value).abs().max() < 1e-5


def test_stage2_follows_llava(stage1, tmp_path, monkeypatch):
    follow(monkeypatch, "stage2")
    train(settings(tmp_path, vlm=str(stage1 / "model")))
    compare_with_reference(tmp_path, "stage2")
    ours = llava_names(LlavaForConditionalGeneration.from_pretrained(tmp_path / "model").state_dict())
    for name, value in load_file(LLAVA_TRAIN / "stage2.safetensors").items():
        if name.startswith("final."):
            assert (ours[name.removeprefix("final.")][: len(value)] - value).abs().max() < 2e-5, name


def test_lora_follows_llava_and_spares_the_tower(stage1, tmp_path, monkeypatch):
    reference = load_file(LLAVA_TRAIN / "lora.safetensors")

    def with_reference_adapters(model, config):
        set_trainable(model, config)
        adapted = [name for name, _ in model.named_parameters() if "lora_" in name]
        assert adapted and all(name.startswith("model.language_model.") for name in adapted)
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                key = name.removeprefix("model.language_model.").replace(".default", "")
                parameter.data.copy_(reference[f"initial.lora.model.{key}"])

    follow(monkeypatch, "lora")
    monkeypatch.setattr(train_module, "set_trainable", with_reference_adapters)
    train(settings(tmp_path, vlm=str(stage1 / "model"), llm_tuning="lora", learning_rate=2e-3,
                   projector_learning_rate=5e-4, lora=LoraSettings(r=8, alpha=16, dropout=0.0)))
    compare_with_reference(tmp_path, "lora")
    before = LlavaForConditionalGeneration.from_pretrained(stage1 / "model").state_dict()
    after = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model").state_dict()
    assert before.keys() == after.keys()
    for name, value in after.items():
        if "vision_tower" in name:
            assert torch.equal(value, before[name])
    key = "layers.1.mlp.down_proj"
    down, up = (reference[f"final.lora.model.{key}.lora_{x}.weight"] for x in "AB")
    change = after[f"model.language_model.{key}.weight"] - before[f"model.language_model.{key}.weight"]
    torch.testing.assert_close(change, 2 * up @ down, atol=1e-5, rtol=0)


def test_accumulation_changes_nothing(stage1, tmp_path, monkeypatch):
    follow(monkeypatch, "stage2")
    for micro in (4, 2, 1):
        train(settings(tmp_path / str(micro), vlm=str(stage1 / "model"), micro_batch_size=micro, max_steps=5))
    for micro in (2, 1):
        assert losses(tmp_path / str(micro)) == pytest.approx(losses(tmp_path / "4"), abs=1e-6)


def test_forward_equals_llava():
    """Loss, projector gradients and labelled logits of the original LLaVA's forward, 1e-4."""
    data = load_file(REFERENCE / "llava/forward.safetensors")
    model, _ = build(settings("unused"))
    state = {}
    for name, value in data.items():
        kind, _, rest = name.partition(".")
        if kind == "vision":
            state["model.vision_tower." + rest] = value
        elif kind == "projector":
            state["model.multi_modal_projector." + rest.replace("0.", "linear_1.").replace("2.", "linear_2.")] = value
        elif kind == "llm":
            if value.shape[:1] == (1200,):  # our vocabulary has one more row, for <image>
                value = torch.cat([value, torch.zeros(1, value.shape[1])])
            state[rest if rest.startswith("lm_head") else "model.language_model." + rest[len("model."):]] = value
    model.load_state_dict(state)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    ids, labels, mask = (data[f"in.{name}"] for name in ("input_ids", "labels", "attention_mask"))
    rows, row_labels = [], []
    for row, row_label, length in zip(ids.tolist(), labels.tolist(), mask.sum(1).tolist(), strict=True):
        row = [(token, label) for token, label in zip(row, row_label, strict=True)][:length]
        row = [pair for token, label in row for pair in ([(1200, -100)] * 16 if token == -200 else [(token, label)])]
        rows.append(torch.tensor([token for token, _ in row]))
        row_labels.append(torch.tensor([label for _, label in row]))
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    long_labels = torch.nn.utils.rnn.pad_sequence(row_labels, batch_first=True, padding_value=-100)
    attention_mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    pixel_values = data["in.pixel_values"]
    loss_sum, aux_loss = VLMLoss(model)(input_ids, long_labels, pixel_values, len(pixel_values))
    count = (long_labels[:, 1:] != -100).sum()
    assert aux_loss == 0
    assert (loss_sum / count).item() == pytest.approx(data["out.loss"].item(), abs=1e-4)
    (loss_sum / count).backward()
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        expected = data["grad.projector." + name.replace("linear_1", "0").replace("linear_2", "2")]
        torch.testing.assert_close(parameter.grad, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values).logits
        features = model.get_image_features(pixel_values).pooler_output
    labelled = long_labels != -100
    torch.testing.assert_close(logits[labelled][:, :1200], data["out.logits"][:, : logits.shape[1]][labelled],
                               atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.stack(list(features)), data["out.projected"], atol=1e-4, rtol=1e-4)


def test_routers_train_with_their_loss(moe_tower, tmp_path):
    """The aux loss is part of the loss, and of the tower the routers change, nothing else."""
    train(settings(tmp_path, vision_tower=moe_tower, tower="routers", llm_tuning="frozen", max_steps=4,
                   router_aux_loss_coef=0.5, tower_learning_rate=1e-2))
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert any(row["aux_loss"] > 1 for row in rows)
    for row in rows:
        assert row["loss"] == pytest.approx(row["lm_loss"] + 0.5 * row["aux_loss"])
        assert (row["aux_loss"] > 0) == (row["pictures"] > 0)
    before = CLIPMoEVisionModel.from_pretrained(moe_tower).state_dict()
    after = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model").model.vision_tower.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # The last block lies behind select_layer -2: it is not computed, so its router can't change.
    assert changed == {f"vision_model.encoder.layers.{layer}.mlp.router.weight" for layer in (0, 1)}


def test_frozen_tower_has_no_aux_loss_and_stays(moe_tower, tmp_path):
    train(settings(tmp_path, vision_tower=moe_tower, max_steps=2))
    assert all(row["aux_loss"] == 0 for row in read_jsonl(tmp_path / "metrics.jsonl"))
    before = CLIPMoEVisionModel.from_pretrained(moe_tower).state_dict()
    after = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model").model.vision_tower.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("tower, trained", [
    ("experts", {"0.mlp.router", "0.mlp.experts", "1.mlp.router", "1.mlp.experts"}),
    ("last_n", {"1.layer_norm1", "1.self_attn", "1.layer_norm2", "1.mlp.router", "1.mlp.experts"}),
])
def test_what_trains_in_the_tower(moe_tower, tower, trained):
    config = settings("unused", vision_tower=moe_tower, tower=tower, llm_tuning="frozen", tower_learning_rate=1e-6)
    model, _ = build(config)
    set_trainable(model, config)
    names = [name for name, p in model.model.vision_tower.named_parameters() if p.requires_grad]
    assert all(".layers." in name for name in names)
    found = {".".join(name.split(".layers.")[1].split(".")[:3]) for name in names}
    assert {name if ".mlp." in name else ".".join(name.split(".")[:2]) for name in found} == trained
    rates = {group["name"]: group["lr"] for group in parameter_groups(model, config)}
    assert rates == {"tower": 1e-6, "projector": 1e-3}


def test_saved_folder_answers_as_the_trained_model(stage1, tmp_path, monkeypatch):
    """The README's six lines, and the same logits as the model that was trained."""
    trained = {}

    def keep(model, weights, processor, folder):
        trained.update(model=model)
        saving.save_vlm(model, weights, processor, folder)

    monkeypatch.setattr(train_module, "save_vlm", keep)
    train(settings(tmp_path, vlm=str(stage1 / "model"), max_steps=3, llm_tuning="lora", learning_rate=1e-2,
                   lora=LoraSettings(r=4, alpha=8, dropout=0.1)))
    processor = AutoProcessor.from_pretrained(tmp_path / "model", backend="pil")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model")
    picture = read_picture("scene03.png", LLAVA_TRAIN / "images")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]}]
    inputs = processor(images=picture, text=processor.apply_chat_template(messages, add_generation_prompt=True),
                       return_tensors="pt")
    answer = processor.decode(model.generate(**inputs, max_new_tokens=8)[0], skip_special_tokens=True)
    assert "What is shown? ASSISTANT:" in answer and IMAGE_TOKEN not in answer
    trained["model"].eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, trained["model"](**inputs).logits, atol=1e-5, rtol=1e-5)


def test_saved_processor_makes_the_training_sample(stage1, tmp_path):
    """The processor's ids and pixels for a prompt are those of the training sample up to the answer."""
    config = settings(tmp_path, vlm=str(stage1 / "model"))
    model, processor = build(config)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path, backend="pil")
    sample = {"image": "scene03.png", "conversations": [{"from": "human", "value": f"What is it?\n{IMAGE_TOKEN}"},
                                                         {"from": "gpt", "value": "A teapot."}]}
    encoder = train_module.ChatEncoder(processor.tokenizer, processor.chat_template)
    item = ConversationDataset([sample], LLAVA_TRAIN / "images", encoder, processor.image_processor,
                               model.config.image_token_id, 16, 160)[0]
    prompt = again.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
        add_generation_prompt=True)
    inputs = again(images=read_picture("scene03.png", LLAVA_TRAIN / "images"), text=prompt, return_tensors="pt")
    first_label = (item["labels"] != -100).nonzero()[0].item()
    assert inputs["input_ids"][0].tolist() == item["input_ids"][:first_label].tolist()
    torch.testing.assert_close(inputs["pixel_values"], item["pixel_values"], atol=0, rtol=0)


def test_chat_template_of_the_llm_outlives_stage1(tmp_path):
    """A language model with tied embeddings and a template of its own: stage 1 is plain, stage 2 uses the template."""
    llm = LlamaForCausalLM(LlamaConfig(
        vocab_size=1200, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, max_position_embeddings=256))
    llm.save_pretrained(tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(LLAVA_TRAIN / "llama")
    tokenizer.chat_template = ("{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + "
                               "eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}")
    tokenizer.save_pretrained(tmp_path / "llm")
    train(settings(tmp_path / "one", llm=str(tmp_path / "llm"), data=str(LLAVA_TRAIN / "stage1.json"),
                   template="plain", llm_tuning="frozen", max_steps=2))
    train(settings(tmp_path / "two", vlm=str(tmp_path / "one/model"), template="chat", max_steps=3))
    processor = AutoProcessor.from_pretrained(tmp_path / "two/model")
    prompt = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}],
                                           add_generation_prompt=True)
    assert prompt == "[user]<image></s>[assistant]"  # the tokenizer writes <s> itself
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "two/model")
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert not torch.equal(model.lm_head.weight[:1200], llm.lm_head.weight)
    assert model.lm_head.weight[1200:].abs().max() == 0
    assert model.generation_config.eos_token_id == [2]
    one = LlavaForConditionalGeneration.from_pretrained(tmp_path / "one/model")
    assert torch.equal(one.lm_head.weight[:1200], llm.lm_head.weight)


def test_text_only_training(tmp_path):
    """A language model learns from samples without pictures through the same program."""
    samples = [{"id": n, "conversations": [{"from": "human", "value": f"Count to {n}."},
                                           {"from": "gpt", "value": " ".join(map(str, range(n + 1)))}]}
               for n in range(8)]
    (tmp_path / "text.json").write_text(json.dumps(samples))
    train(settings(tmp_path / "run", data=str(tmp_path / "text.json"), projector="frozen", epochs=5,
                   learning_rate=5e-3))
    found = losses(tmp_path / "run")
    assert len(found) == 10 and found[-1] < found[0] - 1


def test_killed_run_goes_on_to_the_same_weights(moe_tower, tmp_path, monkeypatch):
    """Stopped after step 4 of 6 with checkpoints at 3: same metrics and weights as an unbroken run, bit for bit."""
    def config(name):
        return settings(tmp_path / name, vision_tower=moe_tower, tower="routers", max_steps=6, checkpoint_every=3,
                        llm_tuning="lora", lora=LoraSettings(r=4, alpha=8, dropout=0.2))

    train(config("whole"))
    schedule_of = train_module.schedule

    def killed(step, total, ratio):
        if step == 4:
            raise KeyboardInterrupt
        return schedule_of(step, total, ratio)

    monkeypatch.setattr(train_module, "schedule", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config("broken"))
    monkeypatch.setattr(train_module, "schedule", schedule_of)
    train(config("broken"))
    rows = [[{k: v for k, v in row.items() if k != "tokens_per_second"}
             for row in read_jsonl(tmp_path / name / "metrics.jsonl")] for name in ("whole", "broken")]
    assert rows[0] == rows[1]
    states = [load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "broken")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not (tmp_path / "broken/checkpoints").exists()


def test_datasets_folder_equals_json(tmp_path):
    import datasets

    samples = json.loads((LLAVA_TRAIN / "stage1.json").read_text())
    rows = [{**s, "image": str(LLAVA_TRAIN / "images" / s["image"])} for s in samples]
    features = datasets.Features({"id": datasets.Value("string"), "image": datasets.Image(),
                                  "conversations": [{"from": datasets.Value("string"),
                                                     "value": datasets.Value("string")}]})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "folder"))
    for name, data in (("json", str(LLAVA_TRAIN / "stage1.json")), ("folder", str(tmp_path / "folder"))):
        train(settings(tmp_path / name, data=data, template="plain", llm_tuning="frozen", max_steps=2))
    assert losses(tmp_path / "json") == losses(tmp_path / "folder")


def test_schedule_is_warmup_then_half_a_cosine():
    values = [schedule(step, 100, 0.03) for step in range(100)]
    assert values[:4] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert values[51] == pytest.approx(0.5 * (1 + math.cos(math.pi * 48 / 97)))
    assert all(a > b for a, b in zip(values[3:], values[4:], strict=False))


# --- bad input -----------------------------------------------------------------------------------------------------


def broken_data(folder: Path, change) -> Path:
    samples = json.loads((LLAVA_TRAIN / "stage1.json").read_text())
    change(samples)
    (folder / "data.json").write_text(json.dumps(samples))
    return folder / "data.json"


def test_unreadable_pictures_are_skipped_counted_and_named(tmp_path, capsys):
    shutil.copytree(LLAVA_TRAIN / "images", tmp_path / "images")
    (tmp_path / "images/scene00.png").write_bytes(b"no picture")
    (tmp_path / "images/scene01.png").unlink()
    broken = (tmp_path / "images/scene02.png").read_bytes()
    (tmp_path / "images/scene02.png").write_bytes(broken[: len(broken) // 2])
    samples = json.loads((LLAVA_TRAIN / "stage1.json").read_text())
    bad = [s["id"] for s in samples if s["image"] in ("scene00.png", "scene01.png", "scene02.png")]
    train(settings(tmp_path / "run", data=str(LLAVA_TRAIN / "stage1.json"), image_folder=str(tmp_path / "images"),
                   template="plain", llm_tuning="frozen"))
    rows = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert sum(row["skipped"] for row in rows) == len(bad)
    assert sum(row["samples"] for row in rows) == len(samples) - len(bad)
    output = "".join(capsys.readouterr())
    assert all(f"skipped sample {name}: unreadable picture" in output for name in bad)


@pytest.mark.parametrize("change, words", [
    (lambda s: s[3].pop("conversations"), ["data.json", "sample 3", "cap03", "conversations"]),
    (lambda s: s[5]["conversations"][0].update(value="no mark"), ["data.json", "cap05", "1 picture", "0 <image>"]),
    (lambda s: s[2]["conversations"][1].update({"from": "bot"}), ["cap02", "human or gpt"]),
    (lambda s: s.__delitem__(slice(3, None)), ["3 samples", "global_batch_size 4"]),
])
def test_bad_samples_end_in_one_sentence(tmp_path, change, words):
    with pytest.raises(UserError) as error:
        train(settings(tmp_path / "run", data=str(broken_data(tmp_path, change))))
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("changes, words", [
    ({"data": "nowhere.json"}, ["nowhere.json", "no such file"]),
    ({"llm": "nowhere"}, ["llm", "nowhere"]),
    ({"vision_tower": "nowhere"}, ["vision_tower", "nowhere"]),
    ({"template": "vicuna"}, ["template", "plain, v1, chat"]),
    ({"template": "chat"}, ["chat template"]),
    ({"tower": "routers"}, ["dense", "no routers"]),
    ({"micro_batch_size": 3}, ["global_batch_size 4", "micro_batch_size 3"]),
    ({"max_length": 20}, ["max_length", "picture"]),
    ({"max_length": 5000}, ["max_length", "512 positions"]),
    ({"select_layer": 9}, ["select_layer", "-4..3"]),
])
def test_bad_settings_end_in_one_sentence(tmp_path, changes, words):
    with pytest.raises(UserError) as error:
        train(settings(tmp_path, **changes))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_loss_that_is_not_finite_stops_before_the_update(tmp_path, monkeypatch):
    forward = VLMLoss.forward

    def overflow(self, input_ids, *rest, **named):
        loss, aux = forward(self, input_ids, *rest, **named)
        return (loss * float("inf") if len(losses(tmp_path)) == 2 else loss), aux

    monkeypatch.setattr(VLMLoss, "forward", overflow)
    with pytest.raises(UserError, match=r"step 3: the loss is not finite .*samples: cap\d\d, cap\d\d"):
        train(settings(tmp_path, data=str(LLAVA_TRAIN / "stage1.json"), template="plain", llm_tuning="frozen",
                       checkpoint_every=2))
    assert (tmp_path / "checkpoints/latest").read_text() == "step_2"


def test_full_disk_at_a_checkpoint_keeps_the_previous_one(tmp_path, monkeypatch):
    import deepspeed

    save = deepspeed.DeepSpeedEngine.save_checkpoint

    def full(engine, folder, tag, **named):
        if tag == "step_4":
            (Path(folder) / tag).mkdir()
            raise OSError(28, "No space left on device")
        return save(engine, folder, tag=tag, **named)

    monkeypatch.setattr(deepspeed.DeepSpeedEngine, "save_checkpoint", full)
    with pytest.raises(UserError, match="step_4 could not be written .*previous checkpoint"):
        train(settings(tmp_path, checkpoint_every=2))
    assert (tmp_path / "checkpoints/latest").read_text() == "step_2"
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_2"]


def test_checkpoint_of_more_processes_is_refused(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_module, "gather_weights", killed)
        train(settings(tmp_path, zero_stage=1, checkpoint_every=1, max_steps=2))
    (tmp_path / "checkpoints/step_1/zero_pp_rank_1_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(UserError, match="written by 2 processes and this run has 1"):
        train(settings(tmp_path, zero_stage=1, checkpoint_every=1, max_steps=2))
