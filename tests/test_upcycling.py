"""Upcycling and its inverses."""

import pytest
import torch

from clipmoe_vlm import CLIPMoEConfig, CLIPMoEModel, CLIPMoEVisionModel, upcycling


@pytest.fixture
def dense_models(tiny_config):
    """A base and two copies whose feed-forward layers alone differ."""
    base = CLIPMoEModel(CLIPMoEConfig(**tiny_config())).eval()
    models = [base]
    for seed in (1, 2):
        torch.manual_seed(seed)
        copy = CLIPMoEModel(base.config)
        copy.load_state_dict(base.state_dict())
        with torch.no_grad():
            for _, parameter in upcycling.ffn_parameters(copy):
                parameter.add_(torch.randn_like(parameter) * 0.2)
        models.append(copy.eval())
    return models


@pytest.fixture
def inputs():
    torch.manual_seed(5)
    return torch.randint(1, 118, (4, 24)).index_fill(1, torch.tensor([20]), 119), torch.randn(4, 3, 32, 32)


def features(model, inputs):
    with torch.no_grad():
        return model.get_text_features(inputs[0]), model.get_image_features(inputs[1])


def test_copies_of_one_model_make_the_same_model(dense_models, inputs):
    moe = upcycling.upcycle([dense_models[0]] * 4, expert_dropout=0.0).eval()
    torch.testing.assert_close(features(moe, inputs), features(dense_models[0], inputs), rtol=1e-5, atol=1e-6)


def test_each_expert_comes_back(dense_models, inputs):
    moe = upcycling.upcycle(dense_models)
    for index, dense in enumerate(dense_models):
        torch.testing.assert_close(features(upcycling.dense_expert(moe, index), inputs), features(dense, inputs))
    with pytest.raises(ValueError, match="experts 0..2"):
        upcycling.dense_expert(moe, 3)


def test_first_moe_layer_keeps_the_base_below(dense_models):
    moe = upcycling.upcycle(dense_models, vision_first_moe_layer=1)
    names = [name for name, _ in upcycling.router_parameters(moe)]
    assert names == ["vision_model.encoder.layers.1.mlp.router.weight",
                     "text_model.encoder.layers.0.mlp.router.weight", "text_model.encoder.layers.1.mlp.router.weight"]
    assert torch.equal(moe.vision_model.encoder.layers[0].mlp.fc1.weight,
                       dense_models[0].vision_model.encoder.layers[0].mlp.fc1.weight)


def test_uniform_average_weighs_all_experts_equally(dense_models):
    average = upcycling.uniform_average(upcycling.upcycle(dense_models))
    hidden = torch.randn(2, 5, 32)
    ours, _ = average.vision_model.encoder.layers[0].mlp(hidden)
    plain = sum(model.vision_model.encoder.layers[0].mlp(hidden)[0] for model in dense_models) / len(dense_models)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_routers_are_a_function_of_the_seed(dense_models):
    first, again, other = (
        dict(upcycling.router_parameters(upcycling.upcycle(dense_models, seed=seed))) for seed in (1, 1, 2)
    )
    for name, weight in first.items():
        assert torch.equal(weight, again[name]) and not torch.equal(weight, other[name])
        assert weight.abs().max() <= 32**-0.5


def test_refuses_what_does_not_fit(dense_models, tiny_config):
    with pytest.raises(ValueError, match="at least two"):
        upcycling.upcycle(dense_models[:1])
    with pytest.raises(ValueError, match="already"):
        upcycling.upcycle([upcycling.upcycle(dense_models)] * 2)
    wider = tiny_config()
    wider["vision_config"]["intermediate_size"] = 128
    with pytest.raises(ValueError, match="another architecture"):
        upcycling.upcycle([dense_models[0], CLIPMoEModel(CLIPMoEConfig(**wider))])


def test_stretch_follows_long_clip(tiny_config):
    values = tiny_config()
    values["text_config"]["max_position_embeddings"] = 77
    model = CLIPMoEModel(CLIPMoEConfig(**values))
    old = model.text_model.embeddings.position_embedding.weight.detach()
    new = upcycling.stretch_text_positions(model).text_model.embeddings.position_embedding.weight.detach()
    expected = torch.zeros(248, 32)
    expected[:20] = old[:20]
    for i in range(57):
        for j in range(4):
            following = old[21 + i] if i < 56 else 2 * old[76] - old[75]
            expected[20 + 4 * i + j] = ((4 - j) * old[20 + i] + j * following) / 4
    torch.testing.assert_close(new, expected)
    with pytest.raises(ValueError, match="20 . k"):
        upcycling.stretch_text_positions(model, 250)


@pytest.mark.parametrize(("changes", "reason"), [
    ({"pooling": "last"}, "reads its last position"), ({"is_causal": False}, "attends to its padding"),
])
def test_a_text_tower_that_looks_at_padding_is_not_stretched(tiny_config, changes, reason):
    values = tiny_config()
    values["text_config"] |= {"max_position_embeddings": 64, **changes}
    with pytest.raises(ValueError, match=f"{reason}.*keep its 64 positions"):
        upcycling.stretch_text_positions(CLIPMoEModel(CLIPMoEConfig(**values)), 240)


@pytest.mark.parametrize(("tower", "changes", "message"), [
    ("vision", {"class_token": False}, "pooling 'cls' needs a class token"),
    ("vision", {"pooling": "mean"}, "pooling 'mean' must be one of cls, avg, map, attention"),
    ("vision", {"projection": "none"}, "pooled feature of 32 channels must have projection_dim .16."),
    ("text", {"pooling": "cls"}, "pooling 'cls' must be one of eos, argmax, first, last"),
    ("text", {"projection": "conv"}, "projection 'conv' must be one of linear, mlp, none"),
])
def test_configurations_that_make_no_sense_are_refused(tiny_config, tower, changes, message):
    values = tiny_config()
    values[f"{tower}_config"] |= changes
    with pytest.raises(ValueError, match=message):
        CLIPMoEConfig(**values)


def test_where_a_text_is_read_and_which_tokens_are_its_own(tiny_config):
    ids = torch.tensor([[118, 5, 119, 0, 0], [118, 7, 8, 9, 119]])
    ends, own = [2, 4], [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    for pooling, position in (("eos", ends), ("argmax", ends), ("first", [0, 0]), ("last", [4, 4])):
        values = tiny_config()
        values["text_config"]["pooling"] = pooling
        tower = CLIPMoEModel(CLIPMoEConfig(**values)).text_model
        assert tower.pooled_position(ids).tolist() == position
        assert tower.token_mask(ids).int().tolist() == own


def test_save_and_load_whole_and_vision_part(dense_models, inputs, tmp_path):
    moe = upcycling.upcycle(dense_models).eval()
    moe.save_pretrained(tmp_path / "clip-moe")
    loaded = CLIPMoEModel.from_pretrained(tmp_path / "clip-moe")
    assert all(torch.equal(a, b) for a, b in zip(features(moe, inputs), features(loaded, inputs), strict=True))
    tower = CLIPMoEVisionModel.from_pretrained(tmp_path / "clip-moe")
    with torch.no_grad():
        assert torch.equal(tower(inputs[1]).last_hidden_state, moe.vision_model(inputs[1]).last_hidden_state)
    tower.save_pretrained(tmp_path / "tower")
    again = CLIPMoEVisionModel.from_pretrained(tmp_path / "tower")
    assert all(torch.equal(a, b) for a, b in zip(tower.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("asked, indices, computed", [
    (True, [0, 1, 2], 2), (0, [0], 0), (1, [1], 1), (-2, [-2], 1), (-1, [-1], 2), ([0, -2], [0, -2], 1),
])
def test_unneeded_blocks_are_not_computed(dense_models, inputs, asked, indices, computed):
    tower = upcycling.upcycle(dense_models).eval().vision_model
    calls = []
    for layer in tower.encoder.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        output = tower(inputs[1], output_hidden_states=asked)
        assert len(calls) == computed and len(output.hidden_states) == 3
        everything = tower(inputs[1], output_hidden_states=True).hidden_states
    for index in indices:
        assert torch.equal(output.hidden_states[index], everything[index])
    with pytest.raises(ValueError, match="-3..2"):
        tower(inputs[1], output_hidden_states=5)


def test_gradient_checkpointing_changes_nothing(dense_models, inputs):
    moe = upcycling.upcycle(dense_models, expert_dropout=0.0).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            moe.gradient_checkpointing_enable()
        moe.zero_grad()
        output = moe(input_ids=inputs[0], pixel_values=inputs[1])
        (output.logits_per_image.diagonal().sum() + output.image_balance_loss).backward()
        gradients.append({name: p.grad.clone() for name, p in moe.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)
