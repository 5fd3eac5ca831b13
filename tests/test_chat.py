"""Conversations to ids and labels: against what the original LLaVA makes of them, other templates by invariants."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers import decoders as token_decoders
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from clipmoe_vlm.chat_templates import IMAGE_TOKEN, chat_template
from clipmoe_vlm.runs import UserError
from train_vlm.chat import IGNORE_INDEX, ChatEncoder

REFERENCE = Path(__file__).parent / "reference"
CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
          "'<|im_end|>' + '\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
TRIMMED_WITH_BOS = ("{{ bos_token }}{% for message in messages %}{{ '[' + message['role'] + '] ' + "
                    "message['content'] | trim + eos_token }}{% endfor %}"
                    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}")
LLAVA_CASES = [(case["version"], case["conversations"], case["input_ids"], case["labels"], None)
               for case in json.loads((REFERENCE / "llava/conversations.json").read_text())["cases"]]
for stage, version in (("stage1", "plain"), ("stage2", "v1")):
    data = {sample["id"]: sample for sample in json.loads((REFERENCE / f"llava_train/{stage}.json").read_text())}
    for sample in json.loads((REFERENCE / "llava_train/samples.json").read_text())[stage]:
        limit = None if "image" in data[sample["id"]] else 160  # LLaVA cuts text-only samples already here
        LLAVA_CASES.append((version, data[sample["id"]]["conversations"], sample["input_ids"], sample["labels"], limit))


@pytest.fixture(scope="module")
def llama():
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE / "llava_train/llama")
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    return tokenizer


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE without merges, with <s> put in front of every text, as Llama 3 has it."""
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = token_decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in ("<|im_start|>", IMAGE_TOKEN)],
                         special_tokens=True)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer


def encoder_of(tokenizer, template: str, source: str | None = None) -> ChatEncoder:
    tokenizer.chat_template = source
    return ChatEncoder(tokenizer, chat_template(template, tokenizer))


def test_ids_and_labels_equal_llava_token_for_token(llama):
    image_token_id = llama.convert_tokens_to_ids(IMAGE_TOKEN)
    encoders = {name: encoder_of(llama, name) for name in ("v1", "plain")}
    for version, conversations, expected_ids, expected_labels, limit in LLAVA_CASES:
        input_ids, labels = encoders[version].encode(conversations)
        assert [-200 if token == image_token_id else token for token in input_ids][:limit] == expected_ids
        assert labels[:limit] == expected_labels


text = st.text(st.characters(codec="utf-8", exclude_characters="<\ue000", exclude_categories=["C"]), min_size=1,
               max_size=12).filter(str.strip)


@pytest.mark.parametrize("source", [CHATML, TRIMMED_WITH_BOS])
@given(turns=st.lists(st.tuples(text, text), min_size=1, max_size=4), picture=st.booleans())
def test_own_chat_template_labels_answers_only(byte_level, source, turns, picture):
    """The labelled text is each answer and its end mark; ids before each answer are those of the prompt."""
    conversations = []
    for question, answer in turns:
        conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    if picture:
        conversations[0]["value"] = f"{IMAGE_TOKEN}\n{conversations[0]['value']}"
    encoder = encoder_of(byte_level, "chat", source)
    input_ids, labels = encoder.encode(conversations)
    assert input_ids.count(byte_level.bos_token_id) == 1 and input_ids[0] == byte_level.bos_token_id
    assert input_ids.count(byte_level.convert_tokens_to_ids(IMAGE_TOKEN)) == picture
    answers = [answer.strip() if source is TRIMMED_WITH_BOS else answer for _, answer in turns]
    labelled = byte_level.decode([label for label in labels if label != IGNORE_INDEX])
    assert labelled == "".join(answer + "<|im_end|>" for answer in answers)
    prompt = byte_level(encoder.prompt(conversations[:-1])).input_ids
    assert input_ids[: len(prompt)] == prompt


def test_samples_without_answers_are_refused(llama):
    encoder = encoder_of(llama, "v1")
    for conversations in ([{"from": "human", "value": "Hello?"}], [{"from": "gpt", "value": "First!"}]):
        with pytest.raises(ValueError, match="no turn of the assistant"):
            encoder.encode(conversations)


def test_a_template_that_asks_in_another_way_than_it_answers_is_refused(byte_level):
    source = CHATML.replace("<|im_start|>assistant\\n' }}{% endif", "<|im_start|>assistant\\n<think>' }}{% endif")
    with pytest.raises(UserError, match="another prompt than it is asked with"):
        encoder_of(byte_level, "chat", source)
