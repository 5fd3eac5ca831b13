"""Families of language models, each as a tiny random model of its real class, with its real chat template.

Their tokenizers are small ones of the same kind (byte-level BPE or SentencePiece) with the family's control tokens.
"""

import importlib.util
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from llava_runs import LLAVA_TRAIN, losses, settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers import decoders as token_decoders
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from clipmoe_vlm.pictures import open_rgb
from clipmoe_vlm.runs import UserError, read_jsonl
from train_vlm.chat import IGNORE_INDEX, ChatEncoder
from train_vlm.model import build
from train_vlm.train import train

pytestmark = pytest.mark.usefixtures("one_process")

# Templates that no installed package ships: what the model's tokenizer_config.json renders, written anew.
# mistralai/Mistral-7B-Instruct-v0.2: <s> [INST] question [/INST] answer</s> [INST] ...; the same prompt with and
# without add_generation_prompt, the system's words in the first question, strictly alternating roles.
MISTRAL_V1 = """\
{{- bos_token -}}
{%- set ns = namespace(system='', turn=0) -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' and loop.first -%}
{%- set ns.system = message['content'] + '\\n\\n' -%}
{%- else -%}
{%- if (message['role'] == 'user') != (ns.turn % 2 == 0) -%}
{{- raise_exception('conversation roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{{- ' [INST] ' + (ns.system if ns.turn == 0 else '') + message['content'] + ' [/INST]' -}}
{%- else -%}
{{- ' ' + message['content'] + eos_token -}}
{%- endif -%}
{%- set ns.turn = ns.turn + 1 -%}
{%- endif -%}
{%- endfor -%}
"""
# mistralai/Mistral-7B-Instruct-v0.3: no spaces around the marks, answers trimmed, the system's words in the last
# question.
MISTRAL_V3 = """\
{{- bos_token -}}
{%- set questions = messages | selectattr('role', 'equalto', 'user') | list -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' and message == questions[-1] and messages[0]['role'] == 'system' -%}
{{- '[INST] ' + messages[0]['content'] + '\\n\\n' + message['content'] + '[/INST]' -}}
{%- elif message['role'] == 'user' -%}
{{- '[INST] ' + message['content'] + '[/INST]' -}}
{%- elif message['role'] == 'assistant' -%}
{{- ' ' + message['content'] | trim + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""
# microsoft/phi-4
PHI4 = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant<|im_sep|>' -}}{%- endif -%}
"""
# HuggingFaceTB/SmolLM2-*-Instruct
SMOLLM2 = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             max_position_embeddings=1024, tie_word_embeddings=False,
             initializer_range=0.3)  # so that what a token sees matters
CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>", "<|begin_of_text|>")
GEMMA = ("<start_of_turn>", "<end_of_turn>")
PHI3 = tuple(AddedToken(token, special=True, normalized=False, rstrip=True)  # takes in the line break behind it
             for token in ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"))


@dataclass(frozen=True)
class Family:
    """A language model's kind.

    Args:
        template: jinja source, the name of one that trl ships, or v1 for LLaVA's own.
        end: the token that ends an answer.
        control: the tokenizer's control tokens; sentencepiece: its kind; bos: what it puts in front of every text.
        config: class and what differs from `SIZES`.
    """

    template: str
    end: str
    config: type
    control: tuple = ()
    sentencepiece: bool = False
    bos: str | None = None
    changes: dict = field(default_factory=dict)


WINDOW = {"sliding_window": 24}
FAMILIES = {
    "vicuna": Family("v1", "</s>", LlamaConfig, sentencepiece=True, bos="<s>"),
    "llama3": Family("llama3", "<|eot_id|>", LlamaConfig, LLAMA3, bos="<|begin_of_text|>"),
    "llama3.1": Family("llama3_1", "<|eot_id|>", LlamaConfig, LLAMA3, bos="<|begin_of_text|>"),
    "smollm2": Family(SMOLLM2, "<|im_end|>", LlamaConfig, CHATML, changes={"tie_word_embeddings": True}),
    "qwen2.5": Family("qwen2_5", "<|im_end|>", Qwen2Config, CHATML, changes={"tie_word_embeddings": True}),
    "qwen3": Family("qwen3", "<|im_end|>", Qwen3Config, CHATML, changes={"head_dim": 16}),
    "qwen3-instruct": Family("qwen3_instruct_2507", "<|im_end|>", Qwen3Config, CHATML, changes={"head_dim": 16}),
    "mistral-v0.2": Family(MISTRAL_V1, "</s>", MistralConfig, sentencepiece=True, bos="<s>", changes=WINDOW),
    "mistral-v0.3": Family(MISTRAL_V3, "</s>", MistralConfig, ("[INST]", "[/INST]"), sentencepiece=True, bos="<s>",
                           changes={"sliding_window": None}),
    "phi3": Family("phi3", "<|end|>", Phi3Config, PHI3, sentencepiece=True, changes={**WINDOW, "pad_token_id": 0}),
    "phi4": Family(PHI4, "<|im_end|>", Phi3Config, (*CHATML, "<|im_sep|>"),
                   changes={"pad_token_id": 0, "partial_rotary_factor": 0.5}),
    "gemma": Family("gemma", "<end_of_turn>", GemmaConfig, GEMMA, sentencepiece=True, bos="<s>",
                    changes={"head_dim": 16, "tie_word_embeddings": True}),
    "gemma3": Family("gemma3", "<end_of_turn>", Gemma3TextConfig, GEMMA, sentencepiece=True, bos="<s>",
                     changes={**WINDOW, "head_dim": 16, "tie_word_embeddings": True,
                              "layer_types": ["sliding_attention", "full_attention"]}),
}
TURNS = [
    [("Where is the red circle?\n<image>", "At the bottom left."), ("How many?", "Two, I think: it's 2.")],
    [("Say hello.", "Hello!\n\nAnd a second line,\n- with a list"), ("<b>Bold</b>?", "Yes — of course."),
     ("Bye", "No.")],
    [("<image>\nDescribe it.", "  A green square  ")],
    [("An animal?", "A dog."), ("One more\n", "猫 and 🐈"), ("Über?", "naïve"), ("Last", "x"),
     ("Count.", " ".join(map(str, range(60))))],
    [("Hi", "Yo.")],
]


def conversation(turns) -> list[dict[str, str]]:
    return [{"from": speaker, "value": text} for pair in turns for speaker, text in zip(("human", "gpt"), pair,
                                                                                       strict=True)]


def byte_level(control) -> PreTrainedTokenizerFast:
    """A BPE over bytes, trained on a few sentences."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = token_decoders.ByteLevel()
    texts = [turn["value"] for sample in json.loads((LLAVA_TRAIN / "stage2.json").read_text())
             for turn in sample["conversations"]]
    backend.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def save_family(folder: Path, family: Family) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(LLAVA_TRAIN / "llama") if family.sentencepiece else byte_level(
        family.control)
    tokenizer.add_tokens([token if isinstance(token, AddedToken) else AddedToken(token, special=True, normalized=False)
                          for token in family.control], special_tokens=True)
    tokenizer.eos_token = "</s>" if family.sentencepiece else family.end
    tokenizer.bos_token = family.bos
    if family.sentencepiece and not family.bos:
        tokenizer.add_bos_token = False
    if family.bos and not family.sentencepiece:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, tokenizer.bos_token_id)])
    if "{" in family.template:
        tokenizer.chat_template = family.template
    elif family.template != "v1":
        trl = Path(importlib.util.find_spec("trl").submodule_search_locations[0])
        tokenizer.chat_template = (trl / f"chat_templates/{family.template}.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = family.config(**SIZES | {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
                                      "eos_token_id": tokenizer.eos_token_id} | family.changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: save_family(root / name, family) for name, family in FAMILIES.items()}


def config_of(output, folder, name, **changes):
    template = "v1" if FAMILIES[name].template == "v1" else "chat"
    return settings(output, llm=str(folder), template=template, max_length=1000, **changes)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_token_of_the_assistant_has_a_label_and_no_other(folders, name):
    """From where the prompt to an answer ends, to the first end mark behind it: found by tokenising each prompt."""
    family = FAMILIES[name]
    _, processor = build(config_of("unused", folders[name], name))
    tokenizer, encoder = processor.tokenizer, ChatEncoder(processor.tokenizer, processor.chat_template)
    end = tokenizer.convert_tokens_to_ids(family.end)
    for turns in TURNS:
        ids, labels = encoder.encode(conversation(turns))
        if tokenizer.bos_token_id is not None and family.bos:
            assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
        expected = [IGNORE_INDEX] * len(ids)
        for number in range(len(turns)):
            prompt = tokenizer(encoder.prompt(conversation(turns)[: 2 * number + 1])).input_ids
            assert ids[: len(prompt)] == prompt
            stop = ids.index(end, len(prompt)) + 1
            expected[len(prompt): stop] = ids[len(prompt): stop]
            words = tokenizer.decode(ids[len(prompt): stop])
            assert turns[number][1].strip() in words and words.endswith(family.end)
        assert labels == expected


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"llama3.1", "qwen3-instruct", "mistral-v0.3"}))
def test_trains_packs_saves_and_answers(folders, name, tmp_path):
    samples = [{"id": str(i), "conversations": conversation(turns), "image": "scene03.png" if "<image>" in str(turns)
                else ""} for i, turns in enumerate(TURNS)]
    (tmp_path / "data.json").write_text(json.dumps(samples))
    for packing in (False, True):
        train(config_of(tmp_path / f"packing_{packing}", folders[name], name, data=str(tmp_path / "data.json"),
                        global_batch_size=5, micro_batch_size=5, epochs=2, packing=packing))
    rows = read_jsonl(tmp_path / "packing_True/metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 0]
    assert losses(tmp_path / "packing_True") == pytest.approx(losses(tmp_path / "packing_False"), abs=1e-5)
    folder = tmp_path / "packing_False/model"
    model, processor = LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]}]
    inputs = processor(images=open_rgb(LLAVA_TRAIN / "images/scene03.png"), return_tensors="pt",
                       text=processor.apply_chat_template(chat, add_generation_prompt=True))
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    assert processor.tokenizer.convert_tokens_to_ids(FAMILIES[name].end) in model.generation_config.eos_token_id


@pytest.mark.parametrize("config", [
    Gemma2Config(**SIZES, vocab_size=1200, head_dim=16, final_logit_softcapping=3.0),
    PhiConfig(**{**SIZES, "num_key_value_heads": 2}, vocab_size=1200),  # its head has a bias
], ids=["gemma2", "phi2"])
def test_families_that_llava_cannot_carry_are_refused(tmp_path, config):
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llm")
    AutoTokenizer.from_pretrained(LLAVA_TRAIN / "llama").save_pretrained(tmp_path / "llm")
    with pytest.raises(UserError, match="does more to its logits than one matrix product"):
        train(settings(tmp_path / "run", llm=str(tmp_path / "llm")))


GAP = [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "1"}, {"from": "human", "value": "Two?"},
       {"from": "human", "value": "Three?"}, {"from": "gpt", "value": "3"}]
SYSTEM = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "One?"}, {"from": "gpt", "value": "1"}]
THOUGHT = [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "<think>\nOne\n</think>\n\n1"},
           {"from": "human", "value": "Two?"}, {"from": "gpt", "value": "2"}]


@pytest.mark.parametrize("name, turns, words", [
    ("mistral-v0.2", GAP, "the chat template refuses it: .*must alternate"),
    ("gemma3", GAP, "the chat template refuses it: .*must alternate"),
    ("gemma", SYSTEM, "the chat template refuses it: System role not supported"),
    ("qwen3", THOUGHT, "the chat template changes the words of answer 1"),
])
def test_what_a_template_refuses_or_changes_is_said(folders, name, turns, words):
    _, processor = build(config_of("unused", folders[name], name))
    with pytest.raises(ValueError, match=words):
        ChatEncoder(processor.tokenizer, processor.chat_template).encode(turns)


@pytest.mark.parametrize("name", ["vicuna", "llama3", "qwen2.5", "mistral-v0.2", "mistral-v0.3", "phi3", "gemma3"])
def test_words_of_the_system_have_no_label(folders, name):
    _, processor = build(config_of("unused", folders[name], name))
    ids, labels = ChatEncoder(processor.tokenizer, processor.chat_template).encode(SYSTEM)
    assert "Be brief." in processor.tokenizer.decode(ids)
    spoken = processor.tokenizer.decode([label for label in labels if label != IGNORE_INDEX])
    assert spoken.strip() == "1" + FAMILIES[name].end


def test_of_several_chat_templates_the_default_is_used(folders, tmp_path):
    shutil.copytree(folders["smollm2"], tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    tokenizer.chat_template = {"default": SMOLLM2, "tool_use": PHI4}
    tokenizer.save_pretrained(tmp_path / "llm")
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path / "llm").chat_template, dict)
    encoders = []
    for folder in (folders["smollm2"], tmp_path / "llm"):
        _, processor = build(config_of("unused", folder, "smollm2"))
        encoders.append(ChatEncoder(processor.tokenizer, processor.chat_template))
    assert encoders[0].encode(SYSTEM) == encoders[1].encode(SYSTEM)
