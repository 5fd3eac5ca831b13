"""Whole VLMs between LLaVA's layout and transformers': logits of the original LLaVA, and the same bits after both ways.

Checkpoints that the real LLaVA writes and loads are converted in tests/hosts/llava/test_convert_vlm.py.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from clipmoe_vlm import CLIPMoEVisionConfig, CLIPMoEVisionModel, CLIPMoEVisionTower
from clipmoe_vlm.__main__ import main
from clipmoe_vlm.llava_layout import convert_vlm

REFERENCE = Path(__file__).parent / "reference"
TRAINED = REFERENCE / "llava_train"
LLAMA, TOWER = TRAINED / "llama", TRAINED / "tower"
FORWARD = load_file(REFERENCE / "llava/forward.safetensors")
TEXT = {name: value for name, value in json.loads((LLAMA / "config.json").read_text()).items()
        if name not in ("architectures", "model_type")}
LLAVA = {**TEXT, "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "mm_hidden_size": 64,
         "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
         "mm_patch_merge_type": "flat", "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
         "image_aspect_ratio": "pad", "tokenizer_model_max_length": 160, "tokenizer_padding_side": "right",
         "mm_vision_tower": str(TOWER), "tune_mm_mlp_adapter": False, "use_mm_proj": True}
INSIDE = {f"model.vision_tower.vision_tower.{name}": tensor
          for name, tensor in load_file(TOWER / "model.safetensors").items()}
LANGUAGE = {name[len("llm."):]: tensor for name, tensor in FORWARD.items() if name.startswith("llm.")}
PROJECTOR = {f"model.mm_{name}": tensor for name, tensor in FORWARD.items() if name.startswith("projector.")}


def write_checkpoint(folder: Path, state: dict | None = None, tokenizer: Path | None = LLAMA, **values) -> Path:
    """A whole checkpoint as LLaVA's trainer leaves it, by default with the weights of the reference's forward."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**LLAVA, **values}))
    if tokenizer:
        for file in (*tokenizer.glob("*token*"), tokenizer / "generation_config.json"):
            shutil.copy(file, folder)
    state = {**LANGUAGE, **PROJECTOR} if state is None else state
    if state:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def quiet(_line: str) -> None:
    pass


def expanded(ids: torch.Tensor, mask: torch.Tensor, image_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """LLaVA's padded ids, with -200 for a picture, as transformers wants them: 16 tokens a picture."""
    rows = [[token for token in row[:length] for token in ([image_token_id] * 16 if token == -200 else [token])]
            for row, length in zip(ids.tolist(), mask.sum(1).tolist(), strict=True)]
    longest = max(map(len, rows))
    return (torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
            torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]))


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vlm")
    convert_vlm(write_checkpoint(folder / "llava"), folder / "hf", say=quiet)
    return folder / "hf"


# --- the same function, the same bits ------------------------------------------------------------------------------


def test_logits_are_those_of_llava(converted):
    model = LlavaForConditionalGeneration.from_pretrained(converted)
    assert model.config.vision_config.model_type == "clip_vision_model"  # loads without this package
    ids, mask = expanded(FORWARD["in.input_ids"], FORWARD["in.attention_mask"], model.config.image_token_index)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, pixel_values=FORWARD["in.pixel_values"]).logits
    expected = FORWARD["out.logits"][:, : ids.shape[1]]
    torch.testing.assert_close(logits[..., :1200][mask == 1], expected[mask == 1], atol=1e-4, rtol=1e-4)


def test_processor_asks_as_llava_does(converted):
    from train_vlm.chat import ChatEncoder

    processor = AutoProcessor.from_pretrained(converted)
    case = next(case for case in json.loads((REFERENCE / "llava/conversations.json").read_text())["cases"]
                if case["version"] == "v1" and -200 in case["input_ids"])
    ids, _ = ChatEncoder(processor.tokenizer, processor.chat_template).encode(case["conversations"])
    assert [-200 if token == 1200 else token for token in ids] == case["input_ids"]
    assert processor.image_processor.do_pad and processor.tokenizer.model_max_length == 160


def test_both_ways_are_the_same_bits(converted, tmp_path):
    convert_vlm(converted, tmp_path / "llava", to="llava", say=quiet)
    back = load_file(tmp_path / "llava/model.safetensors")
    expected = {**LANGUAGE, **PROJECTOR}
    assert back.keys() == expected.keys() and all(torch.equal(back[name], expected[name]) for name in expected)
    tower = load_file(tmp_path / "llava/vision_tower/model.safetensors")
    assert {f"model.vision_tower.vision_tower.{name}" for name in tower} == INSIDE.keys()
    assert all(torch.equal(tensor, INSIDE[f"model.vision_tower.vision_tower.{name}"]) for name, tensor in tower.items())
    values = json.loads((tmp_path / "llava/config.json").read_text())
    same = LLAVA.keys() - {"mm_vision_tower", "tune_mm_mlp_adapter", "pretraining_tp", "transformers_version"}
    assert {name: values[name] for name in same} == {name: LLAVA[name] for name in same}
    assert values["mm_vision_tower"] == "vision_tower"
    for name, expected in json.loads((TOWER / "config.json").read_text()).items():
        found = json.loads((tmp_path / "llava/vision_tower/config.json").read_text())
        assert name in ("transformers_version", "torch_dtype") or found[name] == expected
    assert (tmp_path / "llava/tokenizer.model").read_bytes() == (LLAMA / "tokenizer.model").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llava")
    assert len(tokenizer) == 1200 and tokenizer.pad_token == "<unk>"

    convert_vlm(tmp_path / "llava", tmp_path / "hf", say=quiet)  # the relative tower is found in the checkpoint
    first, second = (load_file(folder / "model.safetensors") for folder in (converted, tmp_path / "hf"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    for name in ("config.json", "generation_config.json", "processor_config.json", "chat_template.jinja"):
        assert (converted / name).read_text() == (tmp_path / "hf" / name).read_text()


def test_folder_without_sentencepiece_model_goes_back_too(converted, tmp_path):
    """What train_vlm leaves has today's tokenizer.json alone."""
    source = shutil.copytree(converted, tmp_path / "hf")
    (source / "tokenizer.model").unlink()
    convert_vlm(source, tmp_path / "llava", to="llava", say=quiet)
    values = json.loads((tmp_path / "llava/tokenizer.json").read_text())
    assert all(isinstance(pair, str) for pair in values["model"]["merges"])
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "llava", LLAMA))
    text = "A chat. USER: Wo steht die kleine Kuh?\nASSISTANT: rechts</s>"
    assert ours(text).input_ids == theirs(text).input_ids and len(ours) == 1200


def test_mixture_of_experts_tower(tmp_path):
    tower = CLIPMoEVisionModel(CLIPMoEVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14,
        num_experts=3, num_experts_per_tok=2, first_moe_layer=1)).eval()
    llava = write_checkpoint(tmp_path / "llava", mm_vision_tower="vision_tower")  # as clipmoe_vlm.llava saves it
    tower.save_pretrained(llava / "vision_tower")
    CLIPImageProcessor.from_pretrained(TOWER).save_pretrained(llava / "vision_tower")
    convert_vlm(llava, tmp_path / "hf", say=quiet)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    assert isinstance(model.model.vision_tower, CLIPMoEVisionModel)

    args = type("Args", (), {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"})
    pictures = FORWARD["in.pixel_values"]
    weights, biases = ([PROJECTOR[f"model.mm_projector.{layer}.{kind}"] for layer in (0, 2)]
                       for kind in ("weight", "bias"))
    with torch.no_grad():
        features = CLIPMoEVisionTower(str(llava / "vision_tower"), args)(pictures)
        hidden = torch.nn.functional.gelu(features @ weights[0].T + biases[0])
        found = model.get_image_features(pictures).pooler_output
    torch.testing.assert_close(torch.stack(list(found)), hidden @ weights[1].T + biases[1], atol=1e-5, rtol=1e-5)

    convert_vlm(tmp_path / "hf", tmp_path / "back-llava", to="llava", say=quiet)
    again = CLIPMoEVisionModel.from_pretrained(tmp_path / "back-llava/vision_tower").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in tower.state_dict().items())


def test_siglip_tower_goes_back_under_our_names(tmp_path):
    """LLaVA would take transformers' SigLIP for a CLIP."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision = SiglipVisionConfig(**sizes, image_size=56, patch_size=14)
    text = LlamaConfig(**{**TEXT, "vocab_size": 1201, "rope_scaling": None})
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=1200, image_seq_length=16,
        vision_feature_select_strategy="full")).eval()
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    square = SiglipImageProcessor(size={"height": 56, "width": 56})
    for part in (model, tokenizer, square):
        part.save_pretrained(tmp_path / "hf")
    convert_vlm(tmp_path / "hf", tmp_path / "llava", to="llava", say=quiet)
    args = type("Args", (), {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"})
    tower = CLIPMoEVisionTower(str(tmp_path / "llava/vision_tower"), args)
    pictures = FORWARD["in.pixel_values"]
    with torch.no_grad():
        expected = model.model.vision_tower(pictures, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(tower(pictures), expected, atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "llava/config.json").read_text())["mm_vision_select_feature"] == "patch"


def test_vlms_as_the_hub_has_them_go_back(converted, tmp_path):
    """Names from before transformers 4.52, a padding token behind <image>, and embeddings padded to a round number."""
    tokenizer = AutoTokenizer.from_pretrained(converted)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path / "hf")
    CLIPImageProcessor.from_pretrained(TOWER).save_pretrained(tmp_path / "hf")
    values = json.loads((converted / "config.json").read_text())
    values["text_config"] = {**TEXT, "model_type": "llama", "vocab_size": 1216}
    (tmp_path / "hf/config.json").write_text(json.dumps(values))
    state = {name.replace("model.vision_tower.vision_tower.", "vision_tower."): tensor
             for name, tensor in INSIDE.items()}
    state |= {f"language_model.{name}": torch.cat([tensor, torch.randn(16, 96)]) if len(tensor) == 1200 else tensor
              for name, tensor in LANGUAGE.items()}
    state |= {name.replace("model.mm_projector.0", "multi_modal_projector.linear_1")
              .replace("model.mm_projector.2", "multi_modal_projector.linear_2"): tensor
              for name, tensor in PROJECTOR.items()}
    save_file(state, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    convert_vlm(tmp_path / "hf", tmp_path / "llava", to="llava", say=quiet)
    back = load_file(tmp_path / "llava/model.safetensors")
    expected = {**LANGUAGE, **PROJECTOR}
    assert back.keys() == expected.keys() and all(torch.equal(back[name], expected[name]) for name in expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "llava").pad_token == "<unk>"


def test_tiles_become_llava_next(tmp_path):
    newline = torch.randn(96)
    llava = write_checkpoint(tmp_path / "llava", {**LANGUAGE, **PROJECTOR, "model.image_newline": newline},
                             image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad",
                             image_grid_pinpoints=[[56, 112], [112, 112], [168, 56]])
    convert_vlm(llava, tmp_path / "hf", say=quiet)
    model = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "hf")
    assert torch.equal(model.model.image_newline, newline)
    sizes = [[112, 56], [112, 112], [56, 168]]  # transformers says height first
    assert model.config.image_grid_pinpoints == sizes
    assert list(AutoProcessor.from_pretrained(tmp_path / "hf").image_processor.image_grid_pinpoints) == sizes
    convert_vlm(tmp_path / "hf", tmp_path / "back-llava", to="llava", say=quiet)
    assert torch.equal(load_file(tmp_path / "back-llava/model.safetensors")["model.image_newline"], newline)
    values = json.loads((tmp_path / "back-llava/config.json").read_text())
    names = ("image_aspect_ratio", "mm_patch_merge_type", "image_grid_pinpoints")
    assert [values[name] for name in names] == ["anyres", "spatial_unpad", [[56, 112], [112, 112], [168, 56]]]


def test_mistral_with_its_own_positions(tmp_path):
    """rope_theta, which transformers 5 keeps elsewhere, and the sliding window come along."""
    llava = write_checkpoint(tmp_path / "llava", model_type="llava_mistral", rope_theta=1e6, sliding_window=8)
    convert_vlm(llava, tmp_path / "hf", say=quiet)
    text = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").config.text_config
    assert (text.model_type, text.rope_parameters["rope_theta"], text.sliding_window) == ("mistral", 1e6, 8)
    convert_vlm(tmp_path / "hf", tmp_path / "back-llava", to="llava", say=quiet)
    values = json.loads((tmp_path / "back-llava/config.json").read_text())
    assert (values["model_type"], values["rope_theta"], values["sliding_window"]) == ("llava_mistral", 1e6, 8)
    assert values["architectures"] == ["LlavaMistralForCausalLM"]


# --- the other forms of a checkpoint -------------------------------------------------------------------------------


def projector_of(file: str) -> dict[str, torch.Tensor]:
    tensors = load_file(TRAINED / file)
    return {f"model.mm_{name[len('final.'):]}": tensor for name, tensor in tensors.items()
            if name.startswith("final.projector.")}


def test_stage1(tmp_path):
    llava = write_checkpoint(tmp_path / "llava", {}, None, tune_mm_mlp_adapter=True, image_aspect_ratio="square")
    projector = projector_of("stage1.safetensors")
    torch.save(projector, llava / "mm_projector.bin")
    convert_vlm(llava, tmp_path / "hf", LLAMA, say=quiet)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    for layer, theirs in (("linear_1", "0"), ("linear_2", "2")):
        found = getattr(model.model.multi_modal_projector, layer)
        assert torch.equal(found.weight, projector[f"model.mm_projector.{theirs}.weight"])
        assert torch.equal(found.bias, projector[f"model.mm_projector.{theirs}.bias"])
    language = AutoModelForCausalLM.from_pretrained(LLAMA).state_dict()
    assert torch.equal(model.lm_head.weight[:1200], language["lm_head.weight"])
    assert not model.lm_head.weight[1200:].any()
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    assert processor.apply_chat_template(chat) == "<image>"  # the plain template of stage 1
    assert not getattr(processor.image_processor, "do_pad", False)


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_is_merged_as_peft_does(tmp_path, rslora):
    from peft import LoraConfig, PeftModel, get_peft_model

    final = load_file(TRAINED / "lora.safetensors")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(LlamaForCausalLM.from_pretrained(LLAMA),
                           LoraConfig(r=8, lora_alpha=16, target_modules=targets, use_rslora=rslora))
    adapters = {f"base_model.model.{name[len('final.lora.'):].replace('.weight', '.default.weight')}": tensor
                for name, tensor in final.items() if name.startswith("final.lora.")}
    assert len(adapters) == 28 and not model.load_state_dict(adapters, strict=False).unexpected_keys
    llava = write_checkpoint(tmp_path / "llava", {}, None)
    model.save_pretrained(llava)
    projector = projector_of("lora.safetensors")
    torch.save({f"base_model.model.{name}": tensor for name, tensor in projector.items()},
               llava / "non_lora_trainables.bin")
    expected = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(LLAMA), llava).merge_and_unload().state_dict()
    convert_vlm(llava, tmp_path / "hf", LLAMA, say=quiet)
    converted = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    assert torch.equal(converted.model.multi_modal_projector.linear_2.weight,
                       projector["model.mm_projector.2.weight"])
    for name, tensor in converted.model.language_model.state_dict().items():
        torch.testing.assert_close(tensor[:1200], expected[f"model.{name}"], atol=1e-6, rtol=1e-6)
    moved = converted.model.language_model.layers[1].mlp.down_proj.weight
    assert (moved - LANGUAGE["model.layers.1.mlp.down_proj.weight"]).abs().max() > 1e-3


def test_shards_of_bin_files_with_tower_old_buffers_and_padded_embeddings(tmp_path):
    """fp16 as LLaVA trains it; rows that no token has are cut, as LLaVA's loader does."""
    padded = {name: torch.cat([tensor, tensor[:64]]) if len(tensor) == 1200 else tensor
              for name, tensor in LANGUAGE.items()}
    whole = {**padded, **PROJECTOR, **INSIDE, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(12),
             "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None]}
    whole = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in whole.items()}
    llava = write_checkpoint(tmp_path / "llava", {}, vocab_size=1264)
    # Vicuna's own, which transformers 5 refuses to write
    (llava / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}))
    names = sorted(whole)
    files = {name: f"pytorch_model-0000{1 + index % 2}-of-00002.bin" for index, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: whole[name] for name in names if files[name] == file}, llava / file)
    (llava / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    convert_vlm(llava, tmp_path / "hf", say=quiet)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float16}
    assert torch.equal(model.lm_head.weight[:1200], LANGUAGE["lm_head.weight"].half())
    generation = model.generation_config
    assert (generation.temperature, generation.eos_token_id, generation.suppress_tokens) == (None, 2, [1200])
    assert model.lm_head.weight.shape == (1201, 96) and model.config.text_config.vocab_size == 1201


def test_marks_around_pictures(tmp_path):
    """mm_use_im_start_end and mm_use_im_patch_token: three more tokens, and the prompt has the marks."""
    more = {name: torch.cat([LANGUAGE[name], torch.randn(3, 96)]) for name in LANGUAGE if len(LANGUAGE[name]) == 1200}
    llava = write_checkpoint(tmp_path / "llava", {**LANGUAGE, **more, **PROJECTOR}, vocab_size=1203,
                             mm_use_im_start_end=True, mm_use_im_patch_token=True)
    convert_vlm(llava, tmp_path / "hf", say=quiet)
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert "USER: <im_start><image><im_end>\nWhat is it? ASSISTANT:" in prompt
    ids = processor.tokenizer(prompt).input_ids
    assert ids.index(1201) + 1 == ids.index(1203) == ids.index(1202) - 1
    convert_vlm(tmp_path / "hf", tmp_path / "back-llava", to="llava", say=quiet)
    values = json.loads((tmp_path / "back-llava/config.json").read_text())
    assert values["mm_use_im_start_end"] and values["mm_use_im_patch_token"] and values["vocab_size"] == 1203
    assert torch.equal(load_file(tmp_path / "back-llava/model.safetensors")["lm_head.weight"], more["lm_head.weight"])


def test_tuned_tower_inside_a_checkpoint(tmp_path):
    """LLaVA reads it only with unfreeze_mm_vision_tower; without, neither it nor the old one is taken in silence."""
    tuned = {name: tensor + 0.01 for name, tensor in INSIDE.items()}
    state = {**LANGUAGE, **PROJECTOR, **tuned}
    name = "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"

    def weight_in(folder):
        return LlavaForConditionalGeneration.from_pretrained(folder).model.vision_tower.encoder.layers[0].mlp.fc1.weight

    convert_vlm(write_checkpoint(tmp_path / "flag", state, unfreeze_mm_vision_tower=True), tmp_path / "a", say=quiet)
    assert torch.equal(weight_in(tmp_path / "a"), tuned[name])
    llava = write_checkpoint(tmp_path / "llava", state)
    with pytest.raises(ValueError, match="is not the one in its mm_vision_tower"):
        convert_vlm(llava, tmp_path / "b", say=quiet)
    convert_vlm(llava, tmp_path / "b", tower=TOWER, say=quiet)
    assert torch.equal(weight_in(tmp_path / "b"), INSIDE[name])


# --- bad input -----------------------------------------------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return print, ("code of the file has run",)


def without(state: dict, name: str) -> dict:
    return {key: tensor for key, tensor in state.items() if key != name}


WHOLE = {**LANGUAGE, **PROJECTOR}
BAD = {
    "projector": ({"mm_projector_type": "linear"}, WHOLE, [], "mm_projector_type 'linear'; transformers' Llava"),
    "tiles": ({"image_aspect_ratio": "anyres"}, WHOLE, [], "'anyres' and mm_patch_merge_type 'flat'"),
    "no sizes of tiles": ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}, WHOLE, [],
                          "config.json has no image_grid_pinpoints"),
    "scales": ({"s2": True}, WHOLE, [], "s2: true"),
    "mpt": ({"model_type": "llava_mpt"}, WHOLE, [], "model_type 'llava_mpt' and a mm_vision_tower"),
    "no tower": ({"mm_vision_tower": "/home/author/clip"}, WHOLE, [], "say with --tower where that tower is"),
    "tower of the hub": ({"mm_vision_tower": "openai/clip-vit-nowhere"}, WHOLE, [], "no such model from the hub"),
    "layer": ({"mm_vision_select_layer": -9}, WHOLE, [], "vision_feature_layer -9 does not exist"),
    "missing": ({}, without(WHOLE, "model.norm.weight"), [], "lacks 1 tensors: model.norm.weight"),
    "left over": ({}, {**WHOLE, "model.layers.2.x": torch.ones(1)}, [], "no place for, 1 tensors: model.layers.2.x"),
    "width": ({}, {**WHOLE, "model.mm_projector.0.weight": torch.ones(96, 32)}, [],
              "features of 32 channels, but the vision tower has 64"),
    "shape": ({}, {**WHOLE, "model.norm.weight": torch.ones(95)}, [], "model.norm.weight has shape (95,)"),
    "rows": ({}, {**WHOLE, "lm_head.weight": torch.ones(1100, 96)}, [], "1200 tokens, but lm_head.weight only 1100"),
    "no weights": ({}, {}, [], "holds no weights"),
    "base of a whole one": ({}, WHOLE, ["--base", str(LLAMA)], "--base goes with those of stage 1 and LoRA"),
    "no chat template": ({}, WHOLE, ["--template", "chat"], "has no chat template"),
    "other way": ({}, WHOLE, ["--to", "llava"], "model_type 'llava_llama'; --to llava takes VLMs of transformers'"),
}


def run(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["clipmoe_vlm", "convert-vlm", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoint(case, tmp_path, monkeypatch, capsys):
    values, state, arguments, sentence = BAD[case]
    llava = write_checkpoint(tmp_path / "llava", state, **values)
    assert sentence in run(monkeypatch, capsys, llava, tmp_path / "new", *arguments)
    assert sorted(tmp_path.iterdir()) == [llava]


def test_bad_parts_of_a_checkpoint(tmp_path, monkeypatch, capsys):
    target = tmp_path / "new"
    stage1 = write_checkpoint(tmp_path / "stage1", {}, None, _name_or_path="lmsys/vicuna-7b-v1.5")
    torch.save(PROJECTOR, stage1 / "mm_projector.bin")
    assert "(its config.json says lmsys/vicuna-7b-v1.5)" in run(monkeypatch, capsys, stage1, target)
    assert "--base nowhere: no such folder" in run(monkeypatch, capsys, stage1, target, "--base", "nowhere")
    torch.save({"model.mm_projector.0.weight": Malicious()}, stage1 / "mm_projector.bin")
    assert "unpickling that could run any code" in run(monkeypatch, capsys, stage1, target, "--base", LLAMA)
    lora = write_checkpoint(tmp_path / "lora", {}, None)
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
    (lora / "adapter_config.json").write_text(json.dumps({**settings, "use_dora": True}))
    assert "use_dora; supported is plain LoRA" in run(monkeypatch, capsys, lora, target, "--base", LLAMA)
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    module = "base_model.model.model.layers.0.mlp.up_proj"
    torch.save({f"{module}.lora_A.weight": torch.ones(8, 64), f"{module}.lora_B.weight": torch.ones(192, 8)},
               lora / "adapter_model.bin")
    assert "by (192, 64) numbers, but the base has (192, 96)" in run(monkeypatch, capsys, lora, target, "--base", LLAMA)
    torch.save({f"{module}.lora_A.weight": torch.ones(8, 96)}, lora / "adapter_model.bin")
    assert "no tensor model.layers.0.mlp.up_proj.lora_B" in run(monkeypatch, capsys, lora, target, "--base", LLAMA)
    assert not target.exists()


def test_nothing_is_overwritten(converted, tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert "exists; name a folder that does not" in run(monkeypatch, capsys, converted, tmp_path, "--to", "llava")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    assert "in transformers' layout already" in run(monkeypatch, capsys, converted, tmp_path / "new")


def test_bad_folder_on_the_way_back(converted, tmp_path, monkeypatch, capsys):
    source = shutil.copytree(converted, tmp_path / "hf")
    whole = json.loads((source / "config.json").read_text())
    for changes, sentence in (
        ({"projector_hidden_act": "relu"}, "projector_hidden_act 'relu'"),
        ({"vision_feature_layer": [-2, -1]}, "vision_feature_layer [-2, -1]"),
        ({"image_token_index": 7}, "but the tokenizer's id of <image> is 1200"),
        ({"text_config": {**whole["text_config"], "rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn",
                                                                      "factor": 2.0}}}, "scaled by 'yarn'"),
        ({"text_config": {**whole["text_config"], "model_type": "granite"}}, "model_type 'granite'"),
    ):
        (source / "config.json").write_text(json.dumps({**whole, **changes}))
        assert sentence in run(monkeypatch, capsys, source, tmp_path / "new", "--to", "llava")
    assert not (tmp_path / "new").exists()
