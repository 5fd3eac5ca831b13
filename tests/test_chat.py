"""Conversations to ids and labels: against what the original LLaVA makes of them, other templates by invariants."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers import decoders as token_decoders
from transformers import AddedToken, AutoTokenizer, CLIPImageProcessor, PreTrainedTokenizerFast

from clipmoe_vlm.chat_templates import IMAGE_TOKEN, chat_template
from clipmoe_vlm.runs import UserError
from train_vlm.chat import IGNORE_INDEX, ChatEncoder
from train_vlm.data import ConversationDataset

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


def turns(*texts: str, first: str = "human") -> list[dict[str, str]]:
    """A conversation of turns that alternate."""
    speakers = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": speakers[number % 2], "value": value} for number, value in enumerate(texts)]


@pytest.mark.parametrize("conversations, words", [
    (turns("Hello?"), "no turn of the assistant"),
    (turns("First!", first="gpt"), "no turn of the assistant"),
    (turns("Hello?", "Yes", " ", "Why?"), "turn 3 .human. is empty"),
    (turns("Hello?", "Yes", "And?", "\n"), "turn 4 .gpt. is empty"),
    (turns("What is it?", "<image> A cat."), "turn 2 is an answer with an <image> mark"),
    (turns("<image>", "What?", "A cat.", first="gpt"), "turn 1 is an answer with an <image> mark"),
    (turns("What does <s>this</s> mean?", "Struck out."), r"turn 1 .human. holds '<s>', .* control token"),
    (turns("What?", "Struck out: </s>"), r"turn 2 .gpt. holds '</s>', .* control token"),
    ([*turns("One", "1"), *turns("Again 1", first="gpt")], "answer 2 behind its generation prompt"),
    (turns("What is \ue000?", "A gap."), "holds the character"),
])
def test_what_cannot_be_learned_from_is_said(llama, conversations, words):
    with pytest.raises(ValueError, match=words):
        encoder_of(llama, "v1").encode(conversations)


def test_opening_turn_of_the_assistant_is_left_out(llama):
    encoder = encoder_of(llama, "v1")
    assert encoder.encode(turns("Welcome!", "Hello?", "Yes", first="gpt")) == encoder.encode(turns("Hello?", "Yes"))


@pytest.mark.parametrize("change, words", [
    (lambda s: s.replace("assistant\\n' }}{% endif", "assistant\\n<think>' }}{% endif"),
     "another prompt than it is asked with"),
    (lambda s: s.replace("'<|im_end|>' + '\\n'", "''"), "does not mark where an answer ends"),
    (lambda s: "{{ raise_exception('no user') }}", "can't render questions and answers: no user"),
    (lambda s: s.replace("message['content']", "'x'"), "leaves out answers"),
])
def test_a_template_that_does_not_fit_is_refused_at_start(byte_level, change, words):
    assert change(CHATML) != CHATML
    with pytest.raises(UserError, match=words):
        encoder_of(byte_level, "chat", change(CHATML))


def test_without_a_chat_template_the_others_are_named(llama):
    with pytest.raises(UserError, match="has no chat template; .*template: v1 .*plain"):
        encoder_of(llama, "chat")


QUESTION = "What is blue?"


@pytest.mark.parametrize("spare, whole_answers", [(0, 3), (-1, 2), (-40, 2), (None, 0)])
def test_long_conversations_end_with_a_whole_answer(llama, spare, whole_answers):
    """`spare`: tokens that the limit leaves behind the last answer; None: the first answer does not fit."""
    conversation = turns("<image>\nLook.", "One long answer of some words.", QUESTION, "The sky.",
                         f"<image>{IMAGE_TOKEN}{' long' * 40}", "A cat.")
    encoder = encoder_of(llama, "v1")
    ids, labels = encoder.encode(conversation)
    image = llama.convert_tokens_to_ids(IMAGE_TOKEN)
    first_end = next(i for i, label in enumerate(labels) if label == llama.eos_token_id)
    limit = first_end + 4 if spare is None else len(ids) + 3 * 4 + spare
    picture = {"bytes": (REFERENCE / "llava_train/images/scene03.png").read_bytes()}
    item = ConversationDataset([{"image": [picture] * 3, "conversations": conversation}], encoder,
                               CLIPImageProcessor.from_pretrained(REFERENCE / "llava_train/tower"), image,
                               lambda size: 5, limit)[0]
    if not whole_answers:
        assert item["problem"] == f"no whole answer within max_length {limit}"
        return
    whole, _ = encoder.encode(conversation[: 2 * whole_answers])
    assert item["input_ids"].tolist() == [token for token in whole for _ in range(5 if token == image else 1)]
    assert item["labels"][-1] == llama.eos_token_id and item["truncated"] == (whole_answers < 3)
    assert (item["labels"] == llama.eos_token_id).sum() == whole_answers
    assert len(item["pictures"]) == whole.count(image) == (3 if whole_answers == 3 else 1)
