"""The demo's little language model: it resumes exactly, and what it writes is an ordinary transformers folder."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from clipmoe_vlm.runs import Metrics, read_jsonl
from demo import little_llm


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    animals = ("cow", "horse", "sheep", "pig")
    rows = [{"id": str(i), "image": "x.png", "conversations": [
        {"from": "human", "value": f"A {animals[i % 4].upper()} TOP LEFT.\nIs there a {animals[i // 4 % 4]} here?"},
        {"from": "gpt", "value": "Yes" if i % 4 == i // 4 % 4 else "No"}]} for i in range(260)]
    for name in ("llm_text", "llava_stage1", "llava_stage2"):
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder


def run(monkeypatch, data, folder):
    monkeypatch.setattr("sys.argv", ["little_llm", str(data), str(folder), "--steps", "7", "--width", "32", "--layers",
                                     "2", "--batch-size", "4", "--vocabulary", "60"])
    little_llm.main()


def test_a_stopped_run_ends_like_an_unbroken_one(data, tmp_path, monkeypatch):
    monkeypatch.setattr(little_llm, "CHECKPOINT_EVERY", 2)
    run(monkeypatch, data, tmp_path / "unbroken")

    class Killed(Exception):
        pass

    log = Metrics.log

    def stop_at_step_6(self, **values):
        if values["step"] == 6:
            raise Killed
        log(self, **values)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Metrics, "log", stop_at_step_6)
        run(patch, data, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    run(monkeypatch, data, tmp_path / "stopped")
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()
    assert [row["step"] for row in read_jsonl(tmp_path / "stopped" / "metrics.jsonl")] == list(range(1, 8))


def test_the_folder_is_an_ordinary_one(data, tmp_path, monkeypatch):
    run(monkeypatch, data, tmp_path / "llm")
    model, tokenizer = (kind.from_pretrained(tmp_path / "llm") for kind in (AutoModelForCausalLM, AutoTokenizer))
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Is there a cow here?"}], tokenize=False,
                                           add_generation_prompt=True)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "<q>Is there a cow here?<a>"
    with torch.no_grad():
        assert model(ids).logits.shape == (1, ids.shape[1], len(tokenizer))
    ids, labels = little_llm.encode(tokenizer, [{"from": "human", "value": "Is there a cow here?"},
                                                {"from": "gpt", "value": "Yes"}])
    assert tokenizer.decode([label for label in labels if label >= 0]) == "Yes</s>"
    assert len(ids) == len(labels)
