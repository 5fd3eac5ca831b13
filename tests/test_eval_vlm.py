"""eval_vlm end to end: question files, generation whatever the batch, stopping and going on, comparing, bad input."""

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from eval_data import REFERENCE, command, config_file, environment, execute, load_answers, make_questions, make_vlm, run
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from clipmoe_vlm.runs import UserError
from eval_vlm.compare import compare_runs
from eval_vlm.config import MmeConfig, PopeConfig
from eval_vlm.generate import Answerer
from eval_vlm.models import load_vlm
from eval_vlm.suites import mme, pope


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return make_vlm(tmp_path_factory.mktemp("vlm") / "model")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return make_questions(tmp_path_factory.mktemp("questions") / "data")


@pytest.fixture
def own_questions(questions, tmp_path):
    return Path(shutil.copytree(questions, tmp_path / "data"))


def pope_records(questions: Path, suffix: str = "\nAnswer the question using a single word or phrase.") -> list[dict]:
    config = PopeConfig(str(questions / "pope"), str(questions / "images"))
    return [{**record, "prompt": record["question"] + suffix} for record in pope.load(config)[0]]


def generate(vlm: Path, records: list[dict], folder: Path, batch_size: int, max_new_tokens: int = 12) -> dict[str, str]:
    answerer = Answerer(*load_vlm(vlm, torch.device("cpu")), batch_size, max_new_tokens)
    return {record["id"]: result["answer"] for record, result in answerer.answers(records, folder)}


def plain_answers(vlm: Path, records: list[dict], folder: Path, max_new_tokens: int = 12) -> dict[str, str]:
    """transformers' own generate, one question at a time."""
    model, processor = load_vlm(vlm, torch.device("cpu"))
    answers = {}
    for record in records:
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": record["prompt"]}]}
        text = processor.apply_chat_template([message], add_generation_prompt=True)
        inputs = processor(text=text, images=Image.open(folder / record["image"]).convert("RGB"), return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        new = tokens[0, inputs["input_ids"].shape[1]:]
        answers[record["id"]] = processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    return answers


# --- question files --------------------------------------------------------------------------------------------------


def test_the_real_pope_files_load():
    records, hashes = pope.load(PopeConfig(str(REFERENCE / "pope"), ""))
    assert [sum(record["category"] == name for record in records) for name in pope.SETS] == [3000] * 3
    assert len({record["id"] for record in records}) == 9000 and len({record["image"] for record in records}) == 500
    assert records[0]["question"] == "Is there a snowboard in the image?" and records[0]["label"] == "yes"
    file = REFERENCE / "pope" / "coco_pope_popular.json"
    assert hashes["popular"] == hashlib.sha256(file.read_bytes()).hexdigest()
    always_yes = pope.score([{**record, "answer": "Yes"} for record in records])
    assert always_yes["mean"]["accuracy"] == 0.5 and always_yes["mean"]["yes_ratio"] == 1.0


def test_limit_keeps_whole_pictures(questions):
    records, _ = pope.load(PopeConfig(str(questions / "pope"), ""), limit=8)
    assert len(records) == 3 * 12  # two pictures of six questions in each set
    records, _ = mme.load(MmeConfig(str(questions / "mme")), limit=3)
    assert len(records) == 2 * 4


def test_mme_reads_both_layouts(questions):
    records, hashes = mme.load(MmeConfig(str(questions / "mme")))
    assert set(hashes) == {"existence", "artwork"} and len(records) == 12
    by_id = {record["id"]: record for record in records}
    assert by_id["artwork/1/2"]["image"] == "artwork/images/1.jpg" and by_id["artwork/1/2"]["label"] == "No"
    assert by_id["existence/0/1"]["question"] == "Is a cat here? Please answer yes or no."
    assert (mme.picture_folder(MmeConfig(str(questions / "mme"))) / by_id["artwork/1/2"]["image"]).is_file()


# --- generation ------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_plain_generate_whatever_the_batch(vlm, questions):
    records = pope_records(questions)[:18] + pope_records(questions, suffix="")[30:37]
    expected = plain_answers(vlm, records, questions / "images")
    assert len(set(expected.values())) > 5  # answers differ, so agreement means something
    for batch_size in (1, 3, 16):
        assert generate(vlm, records, questions / "images", batch_size) == expected


@pytest.mark.parametrize("template", [
    "{% for message in messages %}USER: {{ message['content'][1]['text'] }}\n<image> ASSISTANT:{% endfor %}",
    "<s>{% for message in messages %}<image>{{ message['content'][1]['text'] }}{% endfor %} ASSISTANT:",
], ids=["picture after the question", "template writes the start token"])
def test_other_templates_give_plain_generates_answers_too(template, tmp_path, questions):
    folder = make_vlm(tmp_path / "model", template)
    records = pope_records(questions)[:7]
    answers = generate(folder, records, questions / "images", 4)
    if not template.startswith("<s>"):
        assert answers == plain_answers(folder, records, questions / "images")
    else:
        without_start = make_vlm(tmp_path / "plain", template.removeprefix("<s>"))
        assert answers == plain_answers(without_start, records, questions / "images")


def test_near_ties_do_not_depend_on_the_batch(vlm, questions):
    """Tokens that rounding alone can tell apart: only answering such questions alone keeps their answers equal."""
    model, processor = load_vlm(vlm, torch.device("cpu"))
    with torch.no_grad():
        noise = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
        model.lm_head.weight.copy_(model.lm_head.weight[:1] + 1e-7 * noise)
    records = pope_records(questions)[:20]

    def answers(batch_size: int, near_tie: float) -> list[str]:
        answerer = Answerer(model, processor, batch_size, max_new_tokens=12)
        answerer.near_tie = near_tie
        return sorted((record["id"], result["answer"])
                      for record, result in answerer.answers(records, questions / "images"))

    usual = Answerer(model, processor).near_tie
    assert answers(1, 0.0) != answers(16, 0.0)
    assert answers(1, usual) == answers(3, usual) == answers(16, usual)


def test_each_picture_goes_through_the_tower_once(vlm, questions):
    model, processor = load_vlm(vlm, torch.device("cpu"))
    seen = []
    model.model.vision_tower.register_forward_hook(lambda module, inputs, kwargs, output: seen.append(
        (inputs or (kwargs["pixel_values"],))[0].shape[0]), with_kwargs=True)
    records = pope_records(questions)
    answerer = Answerer(model, processor, batch_size=4, max_new_tokens=3)
    answerer.near_tie = 0.0  # the second look at near ties computes its picture again, on purpose
    assert len(list(answerer.answers(records, questions / "images"))) == 90
    assert sum(seen) == 5


def test_pictures_are_resized_as_in_training(vlm, questions):
    """train_vlm's processors work with PIL; torchvision's resizing gives other pixels."""
    _, processor = load_vlm(vlm, torch.device("cpu"))
    picture = Image.open(questions / "images" / "0.png")
    expected = CLIPImageProcessorPil(**processor.image_processor.to_dict())(picture, return_tensors="pt")
    assert torch.equal(processor.image_processor(picture, return_tensors="pt").pixel_values, expected.pixel_values)


# --- the program -----------------------------------------------------------------------------------------------------


def test_a_run_writes_scores_and_summary_and_is_not_redone(tmp_path, vlm, questions):
    config = config_file(tmp_path, vlm, questions)
    execute(config)
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    sets = scores["suites"]["pope"]
    for name in pope.SETS:
        low, high = sets[name]["accuracy_interval"]
        assert sets[name]["n"] == 30 and sets[name]["pictures"] == 5 and low <= sets[name]["accuracy"] <= high
        assert sets[name]["always_yes"]["accuracy"] == 0.5
    assert scores["suites"]["mme"]["existence"]["always_yes"] == 50 and scores["suites"]["mme"]["perception"] is None
    assert scores["suites"]["mme"]["total_max"] == 400 and scores["batch_size"] == 16 and scores["rule"] == "official"
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions" / "pope.jsonl").read_text().splitlines()]
    assert {"id", "suite", "category", "image", "prompt", "label", "answer"} <= set(rows[0])
    assert pope.score(rows)["random"]["accuracy"] == sets["random"]["accuracy"]
    summary = (tmp_path / "run" / "summary.md").read_text()
    assert "| random | 30 | 5 |" in summary and sets["random"]["questions_sha256"] in summary

    before = (tmp_path / "run" / "predictions" / "pope.jsonl").stat().st_mtime_ns, load_answers(tmp_path / "run")
    execute(config, "rule=vlmevalkit", "batch_size=3")
    assert load_answers(tmp_path / "run") == before[1]
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["suites"]["pope"]["random"]["chance"] == 50 and scores["rule"] == "vlmevalkit"
    assert "rule vlmevalkit, batch size 3, max_new_tokens 6" in (tmp_path / "run" / "report.html").read_text()


def test_a_killed_run_goes_on_and_ends_like_an_unbroken_one(tmp_path, vlm, questions):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = config_file(tmp_path / "whole", vlm, questions, max_new_tokens=60, suites=["pope"])
    killed = config_file(tmp_path / "killed", vlm, questions, max_new_tokens=60, suites=["pope"], batch_size=1)
    execute(whole)

    file = tmp_path / "killed" / "run" / "predictions" / "pope.jsonl"
    process = subprocess.Popen(command(killed), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not file.exists() or file.read_bytes().count(b"\n") < 20:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = file.read_bytes()
    assert 20 <= kept.count(b"\n") < 90
    file.write_bytes(kept + b'{"id": "random/1", "answ')  # as a kill in the middle of a write would leave it
    routing = file.with_name("pope.routing.jsonl")
    rows = routing.read_bytes().splitlines()
    routing.write_bytes(b"\n".join(rows)[:-9])  # the last picture's row torn, too

    execute(killed)
    assert set(kept.splitlines()[:kept.count(b"\n")]) <= set(file.read_bytes().splitlines())
    assert file.read_bytes() == (tmp_path / "whole" / "run" / "predictions" / "pope.jsonl").read_bytes()
    assert routing.read_bytes() == (tmp_path / "whole" / "run" / "predictions" / routing.name).read_bytes()
    assert load_answers(tmp_path / "killed" / "run") == load_answers(tmp_path / "whole" / "run")


def test_compare_gives_the_paired_difference(tmp_path, vlm, questions):
    outputs = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for output in outputs:
        output.parent.mkdir()
        execute(config_file(output.parent, vlm, questions))
    # Model b answers everything right, but for one question.
    for name in ("pope", "mme"):
        for output, right in zip(outputs, (False, True), strict=True):
            file = output / "predictions" / f"{name}.jsonl"
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            for row in rows:
                row["answer"] = row["label"] if right and row["id"] != "random/1" else "Yes"
            file.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows) if right) or
                            "".join(json.dumps(row) + "\n" for row in rows))
    done = run([sys.executable, "-m", "eval_vlm.compare", *map(str, outputs)])
    assert done.returncode == 0, done.stderr
    result = json.loads((outputs[1] / "compare.json").read_text())["suites"]
    assert result["pope"]["random"]["a"] == 0.5 and result["pope"]["random"]["b"] == pytest.approx(29 / 30)
    assert result["pope"]["random"]["difference"] == pytest.approx(14 / 30)
    assert result["pope"]["popular"]["interval"] is None and result["pope"]["popular"]["p_value"] == 2 ** -4
    assert result["mme"]["existence"]["difference"] == 150 and result["mme"]["total"]["difference"] == 300
    assert result["mme"]["total"]["a"] == 100
    assert re.search(r"mme +│ total +│ +6 │ +100.0 │ +400.0 ", done.stdout), done.stdout
    flips = json.loads((outputs[1] / "compare.json").read_text())["flips"]["pope"]
    assert len(flips["better"]) == 44 and flips["worse"] == []
    row = outputs[0] / "predictions" / "pope.jsonl"
    row.write_text("\n".join(row.read_text().splitlines()[1:]) + "\n")
    with pytest.raises(UserError, match="different questions.*random/1"):
        compare_runs(*outputs)


# --- bad input -------------------------------------------------------------------------------------------------------


def check_refused(words: tuple[str, ...], config: Path, *overrides: str) -> None:
    """The program ends with one sentence that holds these words."""
    with pytest.raises(UserError) as error:
        execute(config, *overrides)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), str(error.value)


def test_a_refusal_is_one_line_and_exit_code_2(tmp_path, questions):
    done = run(command(config_file(tmp_path, tmp_path, questions), "batch_sise=3"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if "batch_sise" in line and "batch_size" in line]


def test_a_missing_picture_is_named_before_anything_runs(tmp_path, vlm, own_questions):
    (own_questions / "images" / "3.png").unlink()
    check_refused(("3.png", "random/19"), config_file(tmp_path, vlm, own_questions))
    assert not (tmp_path / "run").exists()


def test_an_unreadable_picture_is_named_and_earlier_answers_stay(tmp_path, vlm, own_questions):
    whole = (own_questions / "images" / "3.png").read_bytes()
    (own_questions / "images" / "3.png").write_bytes(whole[:200])
    config = config_file(tmp_path, vlm, own_questions, suites=["pope"], batch_size=6)
    check_refused(("3.png", "random/19"), config)
    kept = load_answers(tmp_path / "run")
    assert len(kept) == 3 * 18 and not (tmp_path / "run" / "scores.json").exists()
    (own_questions / "images" / "3.png").write_bytes(whole)
    execute(config)
    assert kept.items() <= load_answers(tmp_path / "run").items()


@pytest.mark.parametrize(("change", "words"), [
    (lambda data: edit(data / "pope/coco_pope_popular.json", '"label": "no"', '"label": "maybe"'),
     ("coco_pope_popular.json", "question 1", "maybe")),
    (lambda data: edit(data / "pope/coco_pope_random.json", '"text": ', '"question": '), ("line 1", "no field text")),
    (lambda data: edit(data / "pope/coco_pope_random.json", '"image": "0.png"', '"image": 0'), ("line 1", "no string")),
    (lambda data: edit(data / "pope/coco_pope_random.json", '"question_id": 2,', '"question_id": 1,'),
     ("line 2", "question_id 1", "twice")),
    (lambda data: edit(data / "pope/coco_pope_random.json", '"question_id": 1,', '"question_id": 1 '),
     ("line 1", "JSON")),
    (lambda data: (data / "pope/coco_pope_adversarial.json").unlink(), ("coco_pope_adversarial.json", "no such file")),
    (lambda data: edit(data / "mme/existence/1.txt", "Is it night? Please answer yes or no.\tNo\n", ""),
     ("existence/1.png has 1 of its 2 questions",)),
    (lambda data: edit(data / "mme/existence/1.txt", "\tNo\n", "\tNo.\n"), ("1.txt, line 2", "'No.'")),
    (lambda data: edit(data / "mme/existence/1.txt", "\tNo\n", " No\n"), ("1.txt, line 2", "<TAB>")),
    (lambda data: (data / "mme/artwork/images/2.jpg").unlink(), ("2.txt", "artwork/2/1")),
    (lambda data: shutil.rmtree(data / "mme"), ("no MME subtask",)),
])
def test_bad_question_files_are_named(own_questions, change, words):
    change(own_questions)
    with pytest.raises(UserError) as error:
        pope.load(PopeConfig(str(own_questions / "pope"), str(own_questions / "images")))
        mme.load(MmeConfig(str(own_questions / "mme")))
    assert all(word in str(error.value) for word in words)


def edit(file: Path, old: str, new: str) -> None:
    """Changes the first occurrence."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_predictions_of_other_questions_or_another_model_are_refused(tmp_path, vlm, own_questions):
    config = config_file(tmp_path, vlm, own_questions, suites=["mme"])
    execute(config)
    answers = load_answers(tmp_path / "run")
    check_refused(("mme.jsonl", "prompt_suffix", "another output_dir"), config, "prompt_suffix=!")
    check_refused(("max_new_tokens",), config, "max_new_tokens=7")
    other = make_vlm(tmp_path / "other", logit_scale=0.5)
    check_refused(("another model",), config, f"model={other}")
    owner = tmp_path / "run" / "predictions" / "mme.owner.json"
    owner.rename(tmp_path / "owner.json")
    check_refused(("mme.owner.json", "missing"), config)
    (tmp_path / "owner.json").rename(owner)
    predictions = owner.with_name("mme.jsonl")
    text = predictions.read_text()
    predictions.write_text(text + text.splitlines()[0].replace('"id": "', '"id": "x') + "\n")
    check_refused(("line 13", "not among"), config)
    predictions.write_text("{}\n" + text)
    check_refused(("mme.jsonl, line 1", "not a prediction"), config)
    predictions.write_text(text)
    edit(own_questions / "mme" / "existence" / "0.txt", "cat", "cow")
    check_refused(("other questions",), config)
    assert load_answers(tmp_path / "run") == answers


def test_a_folder_that_is_no_vlm_is_refused(tmp_path, questions):
    tower = REFERENCE / "llava_train" / "tower"
    check_refused(("not a VLM", "clip_vision_model", "llava"), config_file(tmp_path, tower, questions))
    check_refused(("nothing", "config.json"), config_file(tmp_path, tmp_path / "nothing", questions))


def test_broken_models_are_refused(tmp_path, vlm, questions):
    records = pope_records(questions)[:2]
    model, processor = load_vlm(vlm, torch.device("cpu"))
    with torch.no_grad():
        model.model.language_model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="random/[12] .*not finite"):
        list(Answerer(model, processor).answers(records, questions / "images"))
    long = [{**records[0], "prompt": "word " * 300}]
    with pytest.raises(UserError, match="random/1 .* has .* tokens .* 256 positions"):
        list(Answerer(model, processor).answers(long, questions / "images"))
    shutil.copytree(vlm, tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="chat template"):
        load_vlm(tmp_path / "bare", torch.device("cpu"))
    edit(tmp_path / "bare" / "config.json", '"num_hidden_layers": 2', '"num_hidden_layers": 3')
    with pytest.raises(UserError, match="no weights for .*language_model"):
        load_vlm(tmp_path / "bare", torch.device("cpu"))


@pytest.mark.parametrize(("override", "words"), [
    ("batch_sise=3", ("batch_sise", "batch_size")),
    ("suites=[pope,popp]", ("popp", "pope, mme")),
    ("rule=mine", ("mine", "lmms_eval")),
    ("precision=double", ("double", "fp32")),
    ("batch_size=0", ("batch_size", "0")),
    ("limit=0", ("limit",)),
    ("mme.folder=''", ("mme.folder",)),
])
def test_bad_configurations_are_named(tmp_path, questions, override, words):
    check_refused(words, config_file(tmp_path, tmp_path, questions), override)
