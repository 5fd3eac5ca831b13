"""train_vlm through its entry point, in this process: invariants."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from llava_runs import LLAVA_TRAIN, after_stage1, losses, settings
from transformers import AutoProcessor, AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from clipmoe_vlm.pictures import open_rgb
from clipmoe_vlm.runs import UserError, read_jsonl
from train_vlm import saving
from train_vlm import train as train_module
from train_vlm.chat import IMAGE_TOKEN, ChatEncoder
from train_vlm.config import LoraSettings
from train_vlm.data import ConversationDataset
from train_vlm.loss import VLMLoss
from train_vlm.model import build
from train_vlm.train import schedule, train

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def stage1(tmp_path_factory) -> Path:
    """What the reference's stage 1 ended with."""
    folder = tmp_path_factory.mktemp("stage1")
    after_stage1(folder / "model")
    return folder


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
    picture = open_rgb(LLAVA_TRAIN / "images/scene03.png")
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
    sample = {"image": str(LLAVA_TRAIN / "images/scene03.png"),
              "conversations": [{"from": "human", "value": f"What is it?\n{IMAGE_TOKEN}"},
                                {"from": "gpt", "value": "A teapot."}]}
    encoder = ChatEncoder(processor.tokenizer, processor.chat_template)
    item = ConversationDataset([sample], encoder, processor.image_processor,
                               model.config.image_token_id, lambda size: 16, 160)[0]
    prompt = again.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
        add_generation_prompt=True)
    inputs = again(images=open_rgb(LLAVA_TRAIN / "images/scene03.png"), text=prompt, return_tensors="pt")
    first_label = (item["labels"] != -100).nonzero()[0].item()
    assert inputs["input_ids"][0].tolist() == item["input_ids"][:first_label].tolist()
    torch.testing.assert_close(inputs["pixel_values"], item["pictures"], atol=0, rtol=0)


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
        loss, *others = forward(self, input_ids, *rest, **named)
        return loss * float("inf") if len(losses(tmp_path)) == 2 else loss, *others

    monkeypatch.setattr(VLMLoss, "forward", overflow)
    with pytest.raises(UserError, match=r"step 3: the loss is not finite .*samples: cap\d\d, cap\d\d"):
        train(settings(tmp_path, data=str(LLAVA_TRAIN / "stage1.json"), template="plain", llm_tuning="frozen",
                       checkpoint_every=2))
    assert (tmp_path / "checkpoints/latest").read_text() == "step_2"
