"""One word decides what of a vision tower trains."""

import pytest
import torch

from clipmoe_vlm import CLIPMoEVisionConfig, CLIPMoEVisionModel
from clipmoe_vlm.tuning import TOWER_TUNING, set_tower_trainable


def make_tower(**fields) -> CLIPMoEVisionModel:
    torch.manual_seed(0)
    values = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8, "num_experts": 3, "num_experts_per_tok": 2, "first_moe_layer": 1}
    return CLIPMoEVisionModel(CLIPMoEVisionConfig(**{**values, **fields}))


def trained(tower: CLIPMoEVisionModel) -> set[str]:
    return {name for name, parameter in tower.named_parameters() if parameter.requires_grad}


def names(tower: CLIPMoEVisionModel, *parts: str) -> set[str]:
    return {name for name, _ in tower.named_parameters() if any(part in name for part in parts)}


def test_each_word_trains_its_parts_of_the_blocks_that_are_used():
    tower = make_tower()  # select_layer -2: blocks 0, 1 and 2 are used, and 1 and 2 are mixtures
    expected = {
        "frozen": set(),
        "routers": names(tower, "layers.1.mlp.router", "layers.2.mlp.router"),
        "experts": names(tower, "layers.1.mlp", "layers.2.mlp"),
        "last_n": names(tower, "layers.1.", "layers.2."),
        "full": names(tower, "embeddings", "pre_layrnorm", "layers.0.", "layers.1.", "layers.2."),
    }
    assert set(expected) == set(TOWER_TUNING)
    for tuning, parts in expected.items():
        set_tower_trainable(tower, tuning, select_layer=-2, last_n=2)
        assert trained(tower) == parts, tuning
        assert tower.training == (tuning != "frozen")


@pytest.mark.parametrize("tuning", ["routers", "experts", "last_n", "full"])
@pytest.mark.parametrize("select_layer", [-1, -2, 3, [1, 2]])
def test_all_that_trains_gets_a_gradient(tuning, select_layer):
    """With DDP, and no search for unused parameters, anything else ends in an error."""
    tower = make_tower()
    set_tower_trainable(tower, tuning, select_layer)
    output = tower(torch.randn(3, 3, 16, 16), output_hidden_states=select_layer)
    features = [output.hidden_states[layer] for layer in
                (select_layer if isinstance(select_layer, list) else [select_layer])]
    (sum((feature**2).sum() for feature in features) + output.aux_loss).backward()
    got = {name for name, parameter in tower.named_parameters() if parameter.grad is not None}
    assert got == trained(tower) and got


def test_heads_behind_the_blocks_never_train():
    tower = make_tower(pooling="map")
    set_tower_trainable(tower, "full", select_layer=-1)
    assert not trained(tower) & names(tower, "post_layernorm", "head") and names(tower, "head")
    assert names(tower, "layers.3.") <= trained(tower)


def test_gates_and_biases_follow_their_routers():
    tower = make_tower(base_gate=True, balance_bias=True)
    set_tower_trainable(tower, "routers", select_layer=-2)
    assert any("base_gate" in name for name in trained(tower))


@pytest.mark.parametrize(("fields", "tuning", "select_layer", "last_n", "words"), [
    ({"num_experts": 1, "num_experts_per_tok": 1}, "routers", -2, 1, "the vision tower is dense: it has no routers"),
    ({"num_experts": 1, "num_experts_per_tok": 1}, "experts", -2, 1, "the vision tower is dense: it has no experts"),
    ({}, "routers", 1, 1, "the blocks that are used have no routers"),
    ({}, "last_n", -2, 4, "tower_last_n: 4, but 3 blocks of the tower are used"),
    ({}, "last_n", -2, 0, "tower_last_n: 0, but 3 blocks"),
    ({}, "gates", -2, 1, "'gates' is none of frozen, routers, experts, last_n, full"),
    ({}, "full", 5, 1, "hidden state 5 does not exist"),
])
def test_what_cannot_train_is_refused(fields, tuning, select_layer, last_n, words):
    with pytest.raises(ValueError, match=words):
        set_tower_trainable(make_tower(**fields), tuning, select_layer, last_n)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_blocks_get_the_same_gradients(use_reentrant):
    """Also where the first input needs none, which reentrant checkpoints, once the default, give up on."""
    gradients = []
    for checkpointed in (False, True):
        tower = make_tower()
        set_tower_trainable(tower, "routers", select_layer=-2)
        if checkpointed:
            tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        torch.manual_seed(1)
        output = tower(torch.randn(3, 3, 16, 16), output_hidden_states=-2)
        ((output.hidden_states[-2] ** 2).sum() + output.aux_loss).backward()
        gradients.append({name: value.grad for name, value in tower.named_parameters() if value.requires_grad})
    assert all(gradient is not None for gradient in gradients[1].values())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


def test_only_pictures_of_the_mask_count_in_the_balance_loss():
    tower = make_tower()
    set_tower_trainable(tower, "routers", select_layer=-2)
    pictures = torch.randn(4, 3, 16, 16)
    mask = torch.tensor([True, False, True, False])
    counted = tower(pictures, output_hidden_states=-2, picture_mask=mask)
    alone = tower(pictures[mask], output_hidden_states=-2)
    everything = tower(pictures, output_hidden_states=-2)
    torch.testing.assert_close(counted.aux_loss, alone.aux_loss)
    torch.testing.assert_close(counted.hidden_states[-2], everything.hidden_states[-2])
    assert abs(counted.aux_loss - everything.aux_loss) > 1e-4
