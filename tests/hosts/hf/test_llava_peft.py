"""LoRA on a VLM with a CLIP-MoE tower: on the language model alone, on the tower on purpose, beside routers."""

import peft
import pytest
import torch
from llava_family import KINDS, ask, logits_of, loss_of, make_processor, make_vlm
from peft import LoraConfig, PeftModel, get_peft_model

from clipmoe_vlm.vlm import body, language_model_linears

IN_TOWER = r".*vision_tower\..*\.self_attn\.(q_proj|k_proj|v_proj|out_proj)"
PEFT = tuple(int(part) for part in peft.__version__.split(".")[:2])


def lora(targets, **more) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=targets, **more)


def adapted(model) -> set[str]:
    """Names of the modules that LoRA adapts, as the model before had them."""
    return {name.split(".lora_")[0].removeprefix("base_model.model.")
            for name, _ in model.named_parameters() if ".lora_" in name}


def train(model, inputs) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        loss_of(model, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def save_and_load(model, base, folder):
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(base, folder).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_full_names_keep_lora_in_the_language_model(kind, tmp_path):
    model = make_vlm(kind)
    inputs = ask(make_processor(model), 3, 5)
    names = language_model_linears(model)
    assert len(names) == 2 * 7  # layers; query, key, value, output, gate, up, down
    tower = {name: tensor.clone() for name, tensor in body(model).vision_tower.state_dict().items()}
    trained = get_peft_model(model, lora(names))
    assert adapted(trained) == set(names)
    train(trained, inputs)
    again = save_and_load(trained, make_vlm(kind), tmp_path)
    assert adapted(again) == set(names)
    torch.testing.assert_close(logits_of(again, inputs), logits_of(trained, inputs), rtol=1e-5, atol=1e-5)
    merged = trained.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, inputs), logits_of(again, inputs), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor, tower[name]) for name, tensor in body(merged).vision_tower.state_dict().items())


def test_a_suffix_hits_the_tower_which_is_why_there_are_full_names():
    assert any("vision_tower" in name for name in adapted(get_peft_model(make_vlm("llava"), lora(["q_proj"]))))


@pytest.mark.skipif(PEFT < (0, 14), reason="newer in peft")
def test_a_suffix_with_the_tower_excluded():
    model = make_vlm("llava")
    names = {name for name in language_model_linears(model) if name.endswith(("q_proj", "v_proj"))}
    settings = lora(["q_proj", "v_proj"], exclude_modules=r".*vision_tower.*")
    assert adapted(get_peft_model(model, settings)) == names


@pytest.mark.parametrize("kind", KINDS)
def test_lora_on_the_tower_on_purpose(kind, tmp_path):
    model = make_vlm(kind)
    inputs = ask(make_processor(model), 3, 5)
    trained = get_peft_model(model, lora(IN_TOWER))
    assert len(adapted(trained)) == 3 * 4 and all("vision_tower" in name for name in adapted(trained))
    before = logits_of(trained, inputs)
    train(trained, inputs)
    assert not torch.allclose(logits_of(trained, inputs), before)
    again = save_and_load(trained, make_vlm(kind), tmp_path)
    torch.testing.assert_close(logits_of(again, inputs), logits_of(trained, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(PEFT < (0, 15), reason="older wrappers hide a router's attributes")
def test_routers_and_projector_train_beside_lora(tmp_path):
    """peft freezes all but its own; `modules_to_save` names what trains whole."""
    model = make_vlm("llava")
    inputs = ask(make_processor(model), 3, 5)
    trained = get_peft_model(model, lora(language_model_linears(model),
                                         modules_to_save=["multi_modal_projector", "router"]))
    whole = {name for name, parameter in trained.named_parameters()
             if parameter.requires_grad and ".modules_to_save." in name}
    assert sum("router" in name for name in whole) == 3 and sum("linear_" in name for name in whole) == 4
    tower = body(trained.get_base_model()).vision_tower
    assert tower(inputs["pixel_values"], output_hidden_states=True).aux_loss.requires_grad
    train(trained, inputs)
    again = save_and_load(trained, make_vlm("llava"), tmp_path)
    torch.testing.assert_close(logits_of(again, inputs), logits_of(trained, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(PEFT < (0, 17), reason="newer in peft")
def test_lora_on_the_stacked_experts(tmp_path):
    """They are parameters, not linear layers: `target_parameters`."""
    model = make_vlm("llava")
    inputs = ask(make_processor(model), 3, 5)
    trained = get_peft_model(model, LoraConfig(
        r=4, lora_alpha=8, target_modules=[],
        target_parameters=["mlp.experts.fc1_weight", "mlp.experts.fc2_weight"]))
    before = logits_of(trained, inputs)
    train(trained, inputs)
    assert not torch.allclose(logits_of(trained, inputs), before)
    again = save_and_load(trained, make_vlm("llava"), tmp_path)
    torch.testing.assert_close(logits_of(again, inputs), logits_of(trained, inputs), rtol=1e-5, atol=1e-5)
    merged = trained.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, inputs), logits_of(again, inputs), rtol=1e-4, atol=1e-4)
