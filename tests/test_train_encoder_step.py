"""A step of train_encoder: its loss against the textbook, gradient caching, and what frozen weights do not cost."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from clipmoe_vlm import CLIPMoEConfig, CLIPMoEModel
from clipmoe_vlm.moe import SparseMoE
from clipmoe_vlm.runs import Distributed, set_seed, stage_seed
from clipmoe_vlm.upcycling import ffn_parameters
from train_encoder.loss import principal_components, total_loss
from train_encoder.step import encode_samples

sys.path.insert(0, str(Path(__file__).parent / "multiprocess"))
from encoder_step import SAMPLES, assert_same, batch, moe_model, step  # noqa: E402

ALONE = Distributed(0, 1, torch.device("cpu"))


def dense_config() -> CLIPMoEConfig:
    """Of the models of the MCL stages."""
    config = moe_model().config
    for tower in (config.vision_config, config.text_config):
        tower.num_experts = tower.num_experts_per_tok = 1
    return config


def test_the_loss_is_the_sum_of_its_textbook_terms():
    model, inputs = moe_model(), batch()
    found = step(model, inputs, None, ALONE)
    model.zero_grad()
    for tower in (model.config.vision_config, model.config.text_config):
        tower.router_z_loss_coef = 0.1
    output = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
    valid = inputs["valid"]
    image, text = output.image_embeds[valid], output.text_embeds[valid]
    short = F.normalize(model.get_text_features(inputs["short_input_ids"][valid]), dim=-1)
    mean, centred = image.mean(0).double(), image.double() - image.mean(0).double()  # an SVD's gradient loses digits
    components = torch.linalg.svd(centred)[2][:32]
    coarse = (mean + centred @ components.T @ components).float()

    def info_nce(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        logits, target = 10 * image @ text.T, torch.arange(len(image))
        return sum(F.cross_entropy(scores, target, label_smoothing=0.1) for scores in (logits, logits.T)) / 2

    contrastive, brief = info_nce(image, text), info_nce(coarse, short)
    loss = contrastive + brief + 0.5 * (output.vision_model_output.aux_loss + output.text_model_output.aux_loss / 2)
    loss.backward()
    assert_same(found, {"loss": loss.detach(), "contrastive": contrastive.detach(), "short": brief.detach(),
                        "image_balance": output.image_balance_loss.detach(),
                        "text_balance": output.text_balance_loss.detach(),
                        **{name: torch.zeros_like(p) if p.grad is None else p.grad
                           for name, p in model.named_parameters()}}, 5e-6)


@pytest.mark.parametrize("micro_batch_size", [5, 7, 20])
def test_gradient_caching_changes_nothing(micro_batch_size):
    model = moe_model()
    assert_same(step(model, batch(), micro_batch_size, ALONE), step(model, batch(), None, ALONE))


def test_gradient_caching_is_exact_with_dropout():
    """Dropout is drawn per micro-batch. Uncached is then: all micro-batches encoded with their graphs, one backward."""
    model, inputs = moe_model(expert_dropout=0.3), batch()
    found = step(model, inputs, 16, ALONE)
    assert not torch.equal(found["loss"], step(moe_model(), inputs, 16, ALONE)["loss"])
    model.zero_grad()
    parts = []
    for number, start in enumerate(range(0, SAMPLES, 16)):
        set_seed(stage_seed(5, number))
        parts.append(encode_samples(model, {name: value[start:start + 16] for name, value in inputs.items()}))
    losses = total_loss({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, inputs["valid"],
                        logit_scale=10.0, label_smoothing=0.1, balance_coef=0.5, z_loss_coef=0.1, world_size=1)
    losses["loss"].backward()
    assert_same(found, {name: value.detach() for name, value in losses.items()}
                | {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()})


@pytest.mark.parametrize("micro_batch_size", [None, 16])
def test_gradient_checkpointing_changes_nothing_and_keeps_less(micro_batch_size):
    def kept_by(model: CLIPMoEModel) -> tuple[dict, int]:
        sizes = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return step(model, batch(), micro_batch_size, ALONE), sum(sizes)

    model = moe_model(expert_dropout=0.3)
    plain, plain_size = kept_by(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed, checkpointed_size = kept_by(model)
    assert_same(checkpointed, plain)
    assert checkpointed_size < plain_size / 2


def test_compiled_towers_compute_the_same():
    """Traced, in both passes of gradient caching, but not turned into machine code, which takes a minute."""
    model = CLIPMoEModel(dense_config())
    plain = step(model, batch(), None, ALONE)
    for tower in (model.vision_model, model.text_model):
        tower.compile(backend="eager")
    assert_same(step(model, batch(), 16, ALONE), plain)


def test_a_compiled_moe_layer_computes_the_same():
    layer = SparseMoE(3, 2, 16, 32, F.gelu, 0.0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    inputs = torch.randn(2, 5, 16)
    torch.testing.assert_close(torch.compile(layer, backend="eager")(inputs)[0], layer(inputs)[0])


@pytest.mark.parametrize("count", [1, 5, 12])
def test_principal_components_and_their_gradient_are_those_of_an_svd(count):
    features, weight = torch.randn(30, 12, dtype=torch.float64), torch.randn(30, 12, dtype=torch.float64)
    valid = torch.ones(30, dtype=torch.bool)
    valid[3] = False
    features.requires_grad_()
    found = principal_components(features, valid, count)
    gradient, = torch.autograd.grad((found * weight)[valid].sum(), features)
    used = features[valid]
    basis = torch.linalg.svd(used - used.mean(0), full_matrices=False)[2][:count]
    expected = used.mean(0) + (used - used.mean(0)) @ basis.T @ basis
    expected_gradient, = torch.autograd.grad((expected * weight[valid]).sum(), features)
    torch.testing.assert_close(found[valid], expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-8)


def test_equal_samples_do_not_break_the_principal_components():
    """An SVD's gradient is NaN here: all but two singular values are zero."""
    features = torch.eye(3, 64).repeat(20, 1).requires_grad_()
    found = principal_components(features, torch.ones(60, dtype=torch.bool), 32)
    found.square().sum().backward()
    torch.testing.assert_close(found, features)
    torch.testing.assert_close(features.grad, 2 * features, rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_reach_the_loss(value):
    """Which training then reports with the step and its samples."""
    features = F.normalize(torch.randn(6, 40), dim=-1)
    features[2, 3] = value
    rows = {"image": features, "text": features, "short_text": features}
    losses = total_loss(rows, torch.ones(6, dtype=torch.bool), logit_scale=10.0, label_smoothing=0.1, balance_coef=0.0,
                        z_loss_coef=0.0, world_size=1)
    assert losses["short"].isnan() and losses["loss"].isnan()


def test_frozen_weights_cost_no_gradient():
    """The operations of the backward are those of full training less, at least, the frozen weights' gradients."""

    def operations(first: int | None) -> int:
        model = CLIPMoEModel(dense_config()).requires_grad_(first is None)
        trained = dict(model.named_parameters()) if first is None else dict(ffn_parameters(model, first))
        for parameter in trained.values():
            parameter.requires_grad_(True)
        inputs = batch()
        rows = encode_samples(model, inputs)
        loss = total_loss(rows, inputs["valid"], logit_scale=10.0, label_smoothing=0.1, balance_coef=0.0,
                          z_loss_coef=0.0, world_size=1)["loss"]
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        assert all((parameter.grad is not None) == (name in trained) for name, parameter in model.named_parameters()
                   if "position" not in name and name != "logit_scale")
        return counter.get_total_flops()

    full, mcl, mcl_last_block = operations(None), operations(0), operations(1)
    tokens = SAMPLES * (5 + 2 * 8)  # of a picture, of the long and the short caption
    attention = 2 * tokens * 2 * 4 * 32 * 32  # operations x tokens x blocks x projections
    assert mcl <= full - attention
    # With the last vision block alone, that block's attention needs no gradient nor anything below it.
    assert mcl_last_block < mcl
