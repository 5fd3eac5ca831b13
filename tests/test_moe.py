"""The MoE layer against a slow plain version: outputs and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from clipmoe_vlm import CLIPMoEConfig, CLIPMoEModel, moe, routing


def plain_moe(layer, hidden_states):
    """Every token by itself through each of its experts."""
    tokens = hidden_states.flatten(0, 1)
    logits = tokens @ layer.router.weight.T
    outputs = []
    for token, scores in zip(tokens, logits.softmax(-1), strict=True):
        best = scores.topk(layer.top_k)
        total = 0
        for probability, expert in zip(best.values / best.values.sum(), best.indices.tolist(), strict=True):
            e = layer.experts
            hidden = e.activation(e.fc1_weight[expert] @ token + e.fc1_bias[expert])
            total = total + probability * (e.fc2_weight[expert] @ hidden + e.fc2_bias[expert])
        outputs.append(total)
    return torch.stack(outputs).view_as(hidden_states), logits


def make_layer(num_experts, top_k, hidden_size=16, intermediate_size=32, dropout=0.0):
    torch.manual_seed(0)
    layer = moe.SparseMoE(num_experts, top_k, hidden_size, intermediate_size, F.gelu, dropout)
    for parameter in layer.experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


@pytest.fixture(params=["looped", "grouped"])
def way(request, monkeypatch):
    """How experts are computed: `grouped` is the GPU's way, whose kernel torch has for the CPU, too."""
    if request.param == "grouped":
        if not hasattr(F, "grouped_mm"):
            pytest.skip("this torch has no grouped_mm")
        monkeypatch.setattr(moe, "_has_grouped_mm", lambda *_, **__: True)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("num_experts, top_k", [(4, 2), (3, 1), (2, 2), (8, 3)])
@pytest.mark.parametrize("idle", [False, True])
def test_layer_equals_plain_version(num_experts, top_k, idle):
    layer = make_layer(num_experts, top_k)
    inputs = torch.randn(3, 7, 16)
    if idle and num_experts > top_k:  # expert 0 is never chosen
        inputs = inputs.abs()
        with torch.no_grad():
            layer.router.weight[0] = -100.0
    results = []
    for function in (layer, lambda x: plain_moe(layer, x)):
        leaf = inputs.clone().requires_grad_()
        output, logits = function(leaf)
        torch.manual_seed(1)
        loss = (output * torch.randn_like(output)).sum() + moe.load_balancing_loss([logits], top_k)
        gradients = torch.autograd.grad(loss, [leaf, *layer.parameters()])
        results.append((output, logits, *gradients))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("way")
def test_frozen_experts_get_no_gradient_and_routers_do():
    layer = make_layer(4, 2)
    layer.experts.requires_grad_(False)
    output, _ = layer(torch.randn(2, 5, 16))
    output.square().sum().backward()
    assert layer.router.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in layer.experts.parameters())


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
def test_both_ways_agree_under_autocast(monkeypatch):
    layer, results = make_layer(4, 2), []
    inputs = torch.randn(3, 7, 16)
    for grouped in (False, True):
        monkeypatch.setattr(moe, "_has_grouped_mm", lambda *_, grouped=grouped, **__: grouped)
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = layer(inputs)
        assert output.dtype is torch.bfloat16
        results.append((output, *torch.autograd.grad(output, layer.parameters(), torch.ones_like(output))))
    for looped, grouped in zip(*results, strict=True):
        torch.testing.assert_close(looped, grouped, rtol=0.05, atol=0.05)


def test_expert_dropout_only_in_training_mode():
    layer = make_layer(4, 2, dropout=0.5)
    inputs = torch.randn(2, 5, 16)
    assert not torch.equal(layer.train()(inputs)[0], layer(inputs)[0])
    assert torch.equal(layer.eval()(inputs)[0], layer(inputs)[0])


def test_balance_loss_is_k_when_balanced_and_larger_when_collapsed():
    balanced = torch.eye(4).repeat(10, 1) * 1e-3
    assert moe.load_balancing_loss([balanced, balanced], 1).item() == pytest.approx(1, abs=1e-3)
    collapsed = torch.tensor([[9.0, 5.0, 0.0, 0.0]]).repeat(40, 1)
    assert moe.load_balancing_loss([collapsed], 2).item() > 3


def test_balance_loss_mask_equals_leaving_tokens_out():
    logits = [torch.randn(12, 4), torch.randn(12, 4)]
    mask = torch.tensor([1, 1, 0, 1] * 3)
    kept = [layer[mask.bool()] for layer in logits]
    torch.testing.assert_close(moe.load_balancing_loss(logits, 2, mask), moe.load_balancing_loss(kept, 2))
    assert moe.load_balancing_loss(logits, 2) != moe.load_balancing_loss(logits, 2, mask)


def test_z_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    expected = (torch.tensor([2.0]).log() ** 2 + (torch.tensor(1.0).exp() + torch.tensor(3.0).exp()).log() ** 2) / 2
    torch.testing.assert_close(moe.router_z_loss([logits]), expected.squeeze())


def test_routing_statistics():
    logits = torch.tensor([[5.0, 0.0, 1.0], [5.0, 2.0, 1.0], [0.0, 4.0, 1.0], [0.0, 4.0, 1.0], [0.0, 0.0, 9.0]])
    assert routing.expert_load([logits], 1).tolist() == [[pytest.approx(0.4), pytest.approx(0.4), pytest.approx(0.2)]]
    assert routing.routing_map(logits, 1, (2, 2)).tolist() == [[[0, 1], [1, 2]]]
    torch.testing.assert_close(routing.router_entropy([torch.zeros(7, 4)]), torch.tensor([4.0]).log())


def test_aux_loss_follows_what_trains_not_what_is_returned(tiny_config):
    model = CLIPMoEModel(CLIPMoEConfig(**tiny_config(num_experts=4, num_experts_per_tok=2)))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        trained = model.vision_model(pixels)
        assert trained.aux_loss == trained.balance_loss > 0
        assert model.vision_model(pixels, output_hidden_states=True).aux_loss == trained.aux_loss
        model.requires_grad_(False)
        frozen = model.vision_model(pixels)
    assert frozen.aux_loss == 0 and frozen.balance_loss == trained.balance_loss
