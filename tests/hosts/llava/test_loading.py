"""LLaVA's own load_pretrained_model with our towers: what it answers, and the ways to place, cast and build a tower."""

import json
import types
from pathlib import Path

import pytest
import torch
from answers import answer, float32, in_fork, load
from host import TRAIN
from PIL import Image
from safetensors.torch import load_file, save_file

from clipmoe_vlm.convert import load_vision

MODEL = {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu",
         "mm_hidden_size": 64, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "use_mm_proj": True,
         "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "mm_patch_merge_type": "flat",
         "tune_mm_mlp_adapter": False, "image_aspect_ratio": "pad"}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """`checkpoint(tower, **changed)`: as LLaVA's full fine-tuning leaves it, with the recorded answers' weights."""

    def make(tower: Path, **changed) -> Path:
        folder = tmp_path_factory.mktemp("llava")
        for file in (TRAIN / "llama").iterdir():
            if file.name != "model.safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
        config = {**json.loads((TRAIN / "llama" / "config.json").read_text()), **MODEL, "mm_vision_tower": str(tower),
                  **changed}
        (folder / "config.json").write_text(json.dumps(config))
        names = {"llm.": "", "projector.": "model.mm_projector."}
        state = {names[name.split(".")[0] + "."] + name.split(".", 1)[1]: tensor
                 for name, tensor in load_file(TRAIN / "generation.safetensors").items()}
        size = config["mm_hidden_size"]  # several scales: the recorded projector sees the first alone
        weight = state["model.mm_projector.0.weight"]
        state["model.mm_projector.0.weight"] = torch.cat([weight, *[weight.new_zeros(96, 64)] * (size // 64 - 1)], 1)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


def test_the_recorded_answers(towers, checkpoint):
    """The unmodified LLaVA's greedy answers, with its tower replaced by ours: exactly the same tokens."""
    recorded = json.loads((TRAIN / "generation.json").read_text())["answers"]
    found = in_fork(_answers, checkpoint(towers / "dense"), recorded)
    assert [(tokens, text) for tokens, text in found] == [
        ([token for token in expected["output_ids"] if token != 1], expected["text"]) for expected in recorded]


def _answers(folder: Path, recorded: list[dict]) -> list[tuple[list[int], str]]:
    """As llava/eval/model_vqa_loader.py asks. transformers 4.36 puts <s> before the new tokens, 4.37 does not."""
    from llava.mm_utils import process_images

    with float32():
        tokenizer, model, image_processor, _ = load(folder)
    answers = []
    for question in recorded:
        picture = Image.open(TRAIN / "images" / question["image"]).convert("RGB")
        pixels = process_images([picture], image_processor, model.config)[0]
        assert float(pixels.double().sum()) == pytest.approx(question["pixel_sum"], abs=1e-2)
        with torch.inference_mode():
            tokens = model.generate(torch.tensor([question["input_ids"]]), images=pixels[None],
                                    image_sizes=[picture.size], **question["generate_arguments"])
        text = tokenizer.batch_decode(tokens, skip_special_tokens=True)[0].strip()
        answers.append(([token for token in tokens[0].tolist() if token != 1], text))
    return answers


@pytest.mark.parametrize("placed", [{"device": "cpu"}, {"device": "cuda", "device_map": "cpu"},
                                    {"device": "cuda", "device_map": "auto"}],
                         ids=["cpu", "device_map cpu", "device_map auto"])
def test_placements_give_the_same_features(towers, checkpoint, placed):
    """On a machine without a GPU 'auto' is the CPU for language model and tower alike."""
    found = in_fork(_loaded, checkpoint(towers / "moe"), **placed)
    torch.testing.assert_close(found["features"], _features(towers / "moe"), rtol=0, atol=0)
    assert set(found["devices"]) == {"cpu"} and found["trainable"] == 0


def _loaded(folder: Path, base: Path | None = None, name: str = "llava", half: bool = False, **changed) -> dict:
    with float32():
        model = load(folder, base, name, **changed)[1]
    tower = model.get_vision_tower()
    if half:
        tower.to(dtype=torch.bfloat16)
    parameters = list(tower.parameters())
    return {"devices": [parameter.device.type for parameter in parameters], "dtype": tower.dtype,
            "trainable": sum(parameter.requires_grad for parameter in parameters), "hidden_size": tower.hidden_size,
            "state": tower.vision_tower.state_dict(), **answer(model)}


def _features(folder: Path, feature: str = "patch", **changed) -> torch.Tensor:
    from clipmoe_vlm import CLIPMoEVisionTower

    tower = CLIPMoEVisionTower(str(folder), types.SimpleNamespace(
        mm_vision_select_layer=-2, mm_vision_select_feature=feature, **changed))
    pictures = load_file(TRAIN / "pixels.safetensors")
    return tower(pictures[min(name for name in pictures if name.startswith("pad."))][None])


def test_a_map_of_devices(towers, checkpoint):
    """LLaVA itself fails with one, whatever the tower: it hands it to torch's `to`. The tower alone takes it."""
    with pytest.raises(RuntimeError, match="to.. received an invalid combination of arguments"):
        in_fork(_loaded, checkpoint(TRAIN / "tower"), device_map={"": "cpu"})
    from clipmoe_vlm import CLIPMoEVisionTower

    tower = CLIPMoEVisionTower(str(towers / "moe"), types.SimpleNamespace(mm_vision_select_layer=-2), delay_load=True)
    assert not list(tower.parameters())
    tower.load_model(device_map={"": "cpu"})
    assert tower.device.type == "cpu"


@pytest.mark.skipif(torch.__version__ < "2.6", reason="this torch has no float16 on a CPU")
def test_nothing_patched_in_float16(towers, checkpoint):
    found = in_fork(_float16, checkpoint(towers / "moe"))
    expected = load_vision(towers / "moe").state_dict()
    assert all(torch.equal(tensor, expected[name].half()) for name, tensor in found["state"].items())
    assert found["features"].dtype == torch.float16
    torch.testing.assert_close(found["features"].float(), _features(towers / "moe"), rtol=0, atol=2e-2)


def _float16(folder: Path) -> dict:
    model = load(folder, device="cuda", device_map="cpu")[1]
    return {"state": model.get_vision_tower().vision_tower.state_dict(), **answer(model, torch.float16)}


def test_cast_towers(towers, checkpoint):
    found = in_fork(_loaded, checkpoint(towers / "moe"), half=True)
    assert found["dtype"] == torch.bfloat16 and found["features"].dtype == torch.float32
    torch.testing.assert_close(found["features"], _features(towers / "moe"), rtol=0, atol=0.1)


def test_several_scales(towers, checkpoint):
    found = in_fork(_loaded, checkpoint(towers / "moe", s2=True, s2_scales="56,112", mm_hidden_size=128))
    assert found["hidden_size"] == 128
    expected = _features(towers / "moe", s2=True, s2_scales="56,112")
    torch.testing.assert_close(found["features"], expected, rtol=0, atol=0)


def test_the_class_token_can_stay(towers, checkpoint):
    found = in_fork(_loaded, checkpoint(towers / "moe", mm_vision_select_feature="cls_patch"))
    assert found["features"].shape[1] == 17
    torch.testing.assert_close(found["features"], _features(towers / "moe", "cls_patch"), rtol=0, atol=0)


@pytest.mark.parametrize("lora", [False, True])
def test_unfrozen_towers_are_loaded_and_not_made_up(towers, checkpoint, lora):
    """LLaVA then builds the tower amid its own loading, on the meta device, and without weights in the checkpoint."""
    folder, base = checkpoint(towers / "moe", unfreeze_mm_vision_tower=True), None
    if lora:
        base = _make_lora(folder)
    found = in_fork(_loaded, folder, base, "llava-lora" if lora else "llava")
    expected = load_vision(towers / "moe").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found["state"].items())
    torch.testing.assert_close(found["features"], _features(towers / "moe"), rtol=0, atol=0)


def _make_lora(folder: Path) -> Path:
    """Makes a checkpoint of LoRA of it, whose adapter does nothing; returns its base."""
    adapter = {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight": torch.zeros(shape)
               for part, shape in (("A", (2, 96)), ("B", (96, 2)))}
    torch.save(adapter, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"],
         "base_model_name_or_path": "llama", "bias": "none", "layers_to_transform": [0]}))
    projector = {f"base_model.model.model.mm_projector.{name[len('projector.'):]}": tensor for name, tensor in
                 load_file(TRAIN / "generation.safetensors").items() if name.startswith("projector.")}
    torch.save(projector, folder / "non_lora_trainables.bin")
    return TRAIN / "llama"


def test_a_tower_outside_of_the_model(towers, checkpoint):
    """As --fsdp keeps it."""
    found = in_fork(_listed, checkpoint(towers / "moe"), towers / "moe")
    torch.testing.assert_close(found["features"], _features(towers / "moe"), rtol=0, atol=0)
    assert found["listed"] and torch.equal(found["tokens"], in_fork(_loaded, checkpoint(towers / "moe"))["tokens"])


def _listed(folder: Path, tower: Path) -> dict:
    with float32():
        model = load(folder)[1]
    inner = model.get_model()
    del inner.vision_tower
    inner.vision_tower = None
    inner.initialize_vision_modules(types.SimpleNamespace(
        vision_tower=str(tower), mm_vision_select_layer=-2, mm_vision_select_feature="patch",
        pretrain_mm_mlp_adapter=None, mm_patch_merge_type="flat"), fsdp=["full_shard"])
    return {"listed": isinstance(inner.vision_tower, list), **answer(model)}
