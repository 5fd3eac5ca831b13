"""Answers beyond the main path: yes or no by logits, cut answers, other families, routing rows, killed processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from eval_data import command, config_file, environment, execute, load_answers, make_questions, make_vlm
from PIL import Image
from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

from clipmoe_vlm import CLIPMoEVisionModel
from clipmoe_vlm.llava_layout import convert_vlm
from clipmoe_vlm.pictures import open_rgb
from clipmoe_vlm.runs import UserError
from eval_vlm.generate import Answerer
from eval_vlm.models import find_folder, load_vlm
from eval_vlm.routing_rows import DIGITS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return make_vlm(tmp_path_factory.mktemp("vlm") / "model")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return make_questions(tmp_path_factory.mktemp("questions") / "data")


def records_of(questions: Path, words: list[str], pictures: int = 3) -> list[dict]:
    return [{"id": f"{picture}/{number}", "image": f"{picture}.png", "prompt": word}
            for picture in range(pictures) for number, word in enumerate(words)]


def inputs_of(processor, record: dict, folder: Path) -> dict:
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": record["prompt"]}]}
    return processor(text=processor.apply_chat_template([message], add_generation_prompt=True),
                     images=open_rgb(folder / record["image"]), return_tensors="pt")


def plain(model, processor, records: list[dict], folder: Path, tokens: int) -> dict[str, str]:
    """transformers' own generate, one question at a time."""
    answers = {}
    for record in records:
        inputs = inputs_of(processor, record, folder)
        new = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)[0, inputs["input_ids"].shape[1]:]
        answers[record["id"]] = processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    return answers


# --- what is computed ------------------------------------------------------------------------------------------------


def test_prompts_of_like_length_share_a_batch(vlm, questions):
    """Of mixed prompts hardly a token of a batch is padding; in the file's order a third would be."""
    model, processor = load_vlm(vlm, CPU)
    lengths = [3, 40, 5, 60, 2, 30, 4, 50] * 2
    for index in range(len(lengths)):
        Image.new("RGB", (40, 40), (index, 0, 0)).save(questions / "images" / f"like{index}.png")
    records = [{"id": str(index), "image": f"like{index}.png", "prompt": "word " * length}
               for index, length in enumerate(lengths)]
    seen = []

    def count(module, inputs, kwargs):
        if kwargs["inputs_embeds"].shape[0] == 4:  # the prefixes of four pictures; each has one question
            seen.append(kwargs["attention_mask"].float().mean().item())

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    answerer = Answerer(model, processor, batch_size=4, max_new_tokens=1)
    answerer.near_tie = 0.0
    got = [record["id"] for record, _ in answerer.answers(records, questions / "images")]
    handle.remove()
    assert sorted(got, key=int) == [record["id"] for record in records] and got != sorted(got, key=int)
    assert len(seen) == 8 and min(seen) > 0.85


def test_prompts_that_share_nothing(tmp_path, questions):
    """Pictures whose prompts differ from the first token on, in one batch with pictures whose prompts don't."""
    template = "{% for message in messages %}{{ message['content'][1]['text'] }}<image>{% endfor %}"
    folder = make_vlm(tmp_path / "model", template)
    model, processor = load_vlm(folder, CPU)
    processor.tokenizer.add_bos_token = False
    records = records_of(questions, ["cat", "dog", "big"], 2)
    records.append({"id": "single", "image": "2.png", "prompt": "a single question"})
    answers = [{record["id"]: result["answer"] for record, result in Answerer(model, processor, size, 8).answers(
        records, questions / "images")} for size in (1, 3, 16)]
    assert answers[0] == answers[1] == answers[2]


def test_a_picture_in_memory_gives_the_file_answer(vlm, questions):
    model, processor = load_vlm(vlm, CPU)
    records = records_of(questions, ["Is it a cat?", "What is it?"])
    in_memory = [{**record, "pil": open_rgb(questions / "images" / record["image"])} for record in records]
    answerer = Answerer(model, processor, 4, 8)
    expected = [(record["id"], result) for record, result in answerer.answers(records, questions / "images")]
    assert [(record["id"], result) for record, result in answerer.answers(in_memory, Path("nowhere"))] == expected


def test_a_question_with_the_mark_of_pictures_is_named(vlm, questions):
    answerer = Answerer(*load_vlm(vlm, CPU), 4, 3)
    with pytest.raises(UserError, match="question 0/1 holds <image>"):
        list(answerer.answers(records_of(questions, ["Cat?", "Is <image> a cat?"]), questions / "images"))


def test_an_answer_without_end_is_cut_marked_and_counted(tmp_path, vlm, questions):
    model, processor = load_vlm(vlm, CPU)
    records = records_of(questions, ["Is it a cat?", "What is it?"])
    short = {record["id"]: result for record, result in Answerer(model, processor, 4, 3).answers(
        records, questions / "images")}
    long = {record["id"]: result for record, result in Answerer(model, processor, 4, 100).answers(
        records, questions / "images")}
    assert any("cut" in result for result in short.values())
    for question, result in short.items():
        assert ("cut" in result) == (long[question]["answer"] != result["answer"] or "cut" in long[question])
    execute(config_file(tmp_path, vlm, questions, suites=["pope"], max_new_tokens=3))
    rows = [json.loads(line) for line in (tmp_path / "run/predictions/pope.jsonl").read_text().splitlines()]
    cut = sum("cut" in row for row in rows)
    assert json.loads((tmp_path / "run/scores.json").read_text())["cut_answers"] == {"pope": cut} and cut
    assert f"pope: {cut} of 90 answers were cut at max_new_tokens=3" in (tmp_path / "run/summary.md").read_text()


def test_an_answer_of_ten_thousand_tokens_ends_at_the_limit(tmp_path, questions):
    """A model that never ends an answer, with positions for very many tokens."""
    folder = make_vlm(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 20_000
    (folder / "config.json").write_text(json.dumps(config))
    model, processor = load_vlm(folder, CPU)
    answerer = Answerer(model, processor, 2, 300)
    answerer.end_tokens = [10**6]
    (_, result), = answerer.answers(records_of(questions, ["Go on."], 1), questions / "images")
    assert result["cut"] and 200 < len(processor.tokenizer(result["answer"])["input_ids"]) < 400


# --- yes or no -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("swapped", [False, True])
def test_yes_no_takes_the_larger_logit(swapped, vlm, questions):
    model, processor = load_vlm(vlm, CPU)
    starts = {word: {processor.tokenizer(blank + word, add_special_tokens=False)["input_ids"][0] for blank in ("", " ")}
              for word in ("yes", "Yes", "YES", "no", "No", "NO")}
    yes, no = (set().union(*(starts[word] for word in words)) for words in (("yes", "Yes", "YES"), ("no", "No", "NO")))
    if swapped:  # the words' weights change places, and so do the answers
        with torch.no_grad():
            for one, other in zip(("yes", "Yes", "YES"), ("no", "No", "NO"), strict=True):
                pair = [min(starts[one] - no), min(starts[other] - yes)]
                model.lm_head.weight[pair] = model.lm_head.weight[pair[::-1]]
    records = records_of(questions, ["Is there a cat?", "Is there a big red truck in the image?", "Dog?"], 5)
    expected = {}
    for record in records:
        with torch.no_grad():
            logits = model(**inputs_of(processor, record, questions / "images")).logits[0, -1]
        expected[record["id"]] = [max(logits[token].item() for token in one) for one in (yes - no, no - yes)]
    for size in (1, 3, 16):
        for record, result in Answerer(model, processor, size, answering="yes_no").answers(
                records, questions / "images"):
            assert result["yes_no"] == pytest.approx(expected[record["id"]], abs=1e-4)
            assert result["answer"] == ("No" if swapped else "Yes") and "cut" not in result


def test_yes_no_in_a_run(tmp_path, vlm, questions):
    config = config_file(tmp_path, vlm, questions, answering="yes_no")
    execute(config)
    assert set(load_answers(tmp_path / "run").values()) <= {"Yes", "No"}
    assert json.loads((tmp_path / "run/scores.json").read_text())["answering"] == "yes_no"
    with pytest.raises(UserError, match="another answering"):
        execute(config, "answering=generate")
    with pytest.raises(UserError, match="yes_no is for pope and mme.* leave gqa out"):
        execute(config, "suites=[pope,gqa]")
    with pytest.raises(UserError, match="'logits' is unknown"):
        execute(config, "answering=logits")


def test_auto_is_another_precision_on_another_device(tmp_path, vlm, questions):
    """A run begun with auto on a GPU (bf16) does not go on with auto on a CPU (fp32)."""
    config = config_file(tmp_path, vlm, questions, suites=["pope"])
    execute(config)
    owner = tmp_path / "run/predictions/pope.owner.json"
    assert json.loads(owner.read_text())["precision"] == "fp32"
    owner.write_text(owner.read_text().replace('"fp32"', '"bf16"'))
    with pytest.raises(UserError, match="another precision"):
        execute(config)


# --- families --------------------------------------------------------------------------------------------------------


def test_vipllava_answers_as_transformers_does(tmp_path, vlm, questions):
    """Its features are five layers of the tower side by side."""
    model, processor = load_vlm(vlm, CPU)
    torch.manual_seed(3)
    config = VipLlavaConfig(vision_config=model.config.vision_config.to_dict(),
                            text_config=model.config.text_config.to_dict(), vision_feature_layers=[-2, -3, 1],
                            image_token_index=model.config.image_token_id, image_seq_length=16)
    other = VipLlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in other.model.multi_modal_projector.parameters():
            parameter.normal_(0, 0.3)
    other.generation_config.eos_token_id = 2
    other.save_pretrained(tmp_path / "vip")
    processor.save_pretrained(tmp_path / "vip")
    loaded, processor = load_vlm(tmp_path / "vip", CPU)
    records = records_of(questions, ["Is there a cat?", "What?", "How many boats are there?"])
    got = {record["id"]: result["answer"] for record, result in Answerer(loaded, processor, 4, 8).answers(
        records, questions / "images")}
    assert got == plain(loaded, processor, records, questions / "images", 8) and len(set(got.values())) > 3


def test_a_llava_checkpoint_is_pointed_to_the_converter_and_answers_after_it(tmp_path, vlm, questions):
    convert_vlm(vlm, tmp_path / "llava", to="llava", say=lambda _: None)
    with pytest.raises(UserError, match="checkpoint of the original LLaVA.*convert-vlm"):
        execute(config_file(tmp_path, tmp_path / "llava", questions))
    convert_vlm(tmp_path / "llava", tmp_path / "back", say=lambda _: None)
    records = records_of(questions, ["Is there a cat?", "What?"])
    model, processor = load_vlm(tmp_path / "back", CPU)
    got = {record["id"]: result["answer"] for record, result in Answerer(model, processor, 4, 8).answers(
        records, questions / "images")}
    assert got == plain(model, processor, records, questions / "images", 8) and len(set(got.values())) > 3


def test_names_on_the_hub(tmp_path, monkeypatch, vlm):
    """What the hub's cache holds is found without a network; a name it does not hold is a sentence."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="llava-hf/none: there is no such folder, and the hub does not give"):
        find_folder("llava-hf/none")
    cache = tmp_path / "models--someone--vlm"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    (cache / "snapshots").mkdir()
    os.symlink(vlm, cache / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert (find_folder("someone/vlm") / "config.json").read_bytes() == (vlm / "config.json").read_bytes()
    assert find_folder(str(vlm)) == vlm


# --- routing rows ----------------------------------------------------------------------------------------------------


def test_routing_rows_are_the_routers_first_choices(tmp_path, vlm, questions):
    execute(config_file(tmp_path, vlm, questions, suites=["pope"], batch_size=7))
    rows = [json.loads(line) for line in (tmp_path / "run/predictions/pope.routing.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == [f"{index}.png" for index in range(5)]
    model, processor = load_vlm(vlm, CPU)
    tower = next(module for module in model.modules() if isinstance(module, CLIPMoEVisionModel))
    chosen = set()
    for row in rows:
        pixels = processor.image_processor(open_rgb(questions / "images" / row["image"]),
                                           return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            logits = tower(pixels).router_logits
        assert row["grid"] == [4, 4] and row["num_experts"] == 3
        assert list(row["layers"]) == ["0", "1"]  # the third block's output is not used: vision_feature_layer is -2
        for layer, digits in row["layers"].items():
            best = logits[int(layer)][1:].argmax(-1)  # without the class token
            assert digits == "".join(DIGITS[expert] for expert in best)
            chosen |= set(digits)
    assert len(chosen) > 1


def test_a_dense_tower_has_no_routing(tmp_path, vlm, questions):
    model, processor = load_vlm(vlm, CPU)
    model.model.vision_tower.config.num_experts = 1
    answerer = Answerer(model, processor, 4, 2)
    list(answerer.answers(records_of(questions, ["Cat?"]), questions / "images"))
    assert answerer.take_routing() == []


def test_lost_routing_is_made_again_and_that_of_removed_predictions_goes(tmp_path, vlm, questions):
    config = config_file(tmp_path, vlm, questions, suites=["pope"])
    execute(config)
    answers, routing = (tmp_path / "run/predictions" / name for name in ("pope.jsonl", "pope.routing.jsonl"))
    before = answers.read_bytes(), routing.read_bytes()
    routing.write_bytes(b"".join(routing.read_bytes().splitlines(keepends=True)[1:]))
    execute(config)
    assert (answers.read_bytes(), routing.read_bytes()) == before
    answers.unlink()
    routing.write_text('{"image": "of another run.png"}\n')
    execute(config)
    assert (answers.read_bytes(), routing.read_bytes()) == before


def test_answers_of_another_process_alone_belong_to_their_model(tmp_path, vlm, questions):
    config = config_file(tmp_path, vlm, questions, suites=["pope"])
    execute(config)
    folder = tmp_path / "run/predictions"
    part = (folder / "pope.jsonl").rename(folder / "pope.part1.jsonl")
    owner = json.loads((folder / "pope.owner.json").read_text())
    (folder / "pope.owner.json").write_text(json.dumps(owner | {"model_sha256": "0"}))
    with pytest.raises(UserError, match="another model"):
        execute(config)
    assert part.is_file()


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_two_processes_killed_and_gone_on_with_end_like_one(tmp_path, vlm, questions):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    values = {"suites": ["pope"], "max_new_tokens": 30, "batch_size": 1}
    one, two = (config_file(tmp_path / name, vlm, questions, **values) for name in ("one", "two"))
    execute(one)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    process = subprocess.Popen([*launcher, *command(two)[2:]], env=environment(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    folder = tmp_path / "two/run/predictions"
    files = [folder / "pope.jsonl", folder / "pope.part1.jsonl"]
    deadline = time.monotonic() + 120
    while not all(file.exists() and file.read_bytes().count(b"\n") >= 3 for file in files):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.send_signal(signal.SIGKILL)
        one.wait()
    files[1].write_bytes(files[1].read_bytes() + b'{"id": "ran')
    kept = set().union(*(file.read_bytes().split(b"\n")[:-1] for file in files))
    assert 6 <= len(kept) < 90
    execute(two)  # by one process
    assert not files[1].exists()
    for name in ("pope.jsonl", "pope.routing.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / "one/run/predictions" / name).read_bytes()
    assert kept <= set((folder / "pope.jsonl").read_bytes().split(b"\n"))
    one, two = (json.loads((tmp_path / name / "run/scores.json").read_text()) for name in ("one", "two"))
    assert one == two
