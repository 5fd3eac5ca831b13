"""Tiny VLMs of transformers' LLaVA family for its tests, built alike in every version of transformers."""

import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, LlamaConfig

from clipmoe_vlm import CLIPMoEVisionConfig
from clipmoe_vlm.vlm import build_processor

LLAVA_TRAIN = Path(__file__).parents[2] / "reference" / "llava_train"
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
# From 4.45 on the processor writes one `<image>` token per feature; before, the model makes room for them.
PROCESSOR_EXPANDS = "patch_size" in inspect.signature(transformers.LlavaProcessor.__init__).parameters
CLASSES = {"llava": "Llava", "llava_next": "LlavaNext", "vipllava": "VipLlava"}
KINDS = list(CLASSES)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32,
         "patch_size": 8}
MOE = {"num_experts": 3, "num_experts_per_tok": 2}
NO_CLASS_TOKEN = {"class_token": False, "pooling": "avg"}
QUESTION = "<image>\nWhat is shown?"


def tower_config(**values) -> CLIPMoEVisionConfig:
    return CLIPMoEVisionConfig(**{**SIZES, **MOE, **values})


def make_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(LLAVA_TRAIN / "llama", padding_side="left")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


def make_config(kind: str, vision_config, **values):
    """LLM of 2 layers, 32 wide; the vocabulary is the tokenizer's 1,200 entries and `<image>`. Skips new hosts."""
    config_class = getattr(transformers, f"{CLASSES[kind]}Config", None)
    if config_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {CLASSES[kind]}")
    llm = LlamaConfig(vocab_size=1201, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                      num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0)
    if kind == "llava_next":
        values.setdefault("image_grid_pinpoints", [[32, 64], [64, 32]])
    if kind == "vipllava":
        name = "vision_feature_layer" if VERSION >= (5, 0) else "vision_feature_layers"
        values.setdefault(name, [-2, -1, 1])
    return config_class(
        vision_config=vision_config, text_config=llm, image_token_index=1200, pad_token_id=0, vocab_size=1201, **values)


def make_vlm(kind: str, vision_config=None, seed: int = 0, **values):
    """A model whose weights are large enough for its answers to depend on everything."""
    torch.manual_seed(seed)
    config = make_config(kind, vision_config or tower_config(), **values)
    model = getattr(transformers, f"{CLASSES[kind]}ForConditionalGeneration")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def image_processor(size: int = 32):
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def make_processor(model):
    return build_processor(model.config, image_processor(model.config.vision_config.image_size), make_tokenizer())


def picture(number: int = 3) -> Image.Image:
    return Image.open(LLAVA_TRAIN / "images" / f"scene{number:02}.png").convert("RGB")


def ask(processor, *pictures: int, text: str = QUESTION):
    """Model inputs of one question per picture."""
    pictures = pictures or (3,)
    return processor(images=[picture(number) for number in pictures], text=[text] * len(pictures), padding=True,
                     return_tensors="pt")


def logits_of(model, inputs, **kwargs) -> torch.Tensor:
    """Of the question's last tokens: before a shorter sequence stands padding, whose logits mean nothing."""
    with torch.no_grad():
        return model(**inputs, **kwargs).logits[:, -6:]


def loss_of(model, inputs) -> torch.Tensor:
    """Cross-entropy of the last tokens; transformers 4.36 cannot take labels beside a picture."""
    text = inputs["input_ids"][:, -4:]
    return F.cross_entropy(model(**inputs).logits[:, -5:-1].flatten(0, 1), text.flatten())


def answer(model, inputs) -> torch.Tensor:
    """Greedy answer's token ids, ended by length alone."""
    return model.generate(**inputs, do_sample=False, max_new_tokens=6, min_new_tokens=6)
