"""The routers' auxiliary loss under transformers' Trainer and TRL's SFTTrainer."""

from types import SimpleNamespace

import pytest
import torch
from aux_loss_case import COEF, UPDATES, largest_difference, make_processor, make_trainer, make_vlm, own_loop, run
from aux_loss_case import trained_weights as weights_of
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from clipmoe_vlm import CLIPMoEVisionConfig, add_router_aux_loss
from clipmoe_vlm.upcycling import router_parameters

LIBRARIES = ("transformers", "trl")


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.mark.parametrize("trained", ["routers", "experts"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("library", LIBRARIES)
def test_same_updates_as_our_own_loop(library, accumulation, trained, tmp_path):
    found = run(library, accumulation, trained, tmp_path)
    label_tokens = [(batch["labels"] != -100).sum().item() for batch in found["batches"]]
    assert len(set(label_tokens)) > 2  # so that equal weights per micro-batch would show
    assert largest_difference(found, own_loop([found["batches"]], accumulation, trained)) < 1e-6


def test_last_update_of_an_epoch_with_fewer_micro_batches(processor, tmp_path):
    """5 micro-batches at accumulation 4: the second update has one, which then is not divided by 4."""
    aux_losses = {}
    for coef in (0.0, COEF):
        model = make_vlm(processor, "routers")
        trainer = make_trainer("transformers", model, processor, 4, tmp_path, max_steps=2)
        trainer.train_dataset = trainer.train_dataset[:10]
        add_router_aux_loss(trainer, coef)
        trainer.train()
        aux_losses[coef] = trainer.state.log_history[1]
    assert len(trainer.data_collator.batches) == 5
    with_aux, without = aux_losses[COEF], aux_losses[0.0]
    assert with_aux["loss"] - without["loss"] == pytest.approx(COEF * with_aux["aux_loss"], rel=0.02)


@pytest.mark.parametrize("library", LIBRARIES)
def test_evaluation_and_prediction_are_left_alone(library, processor, tmp_path):
    trainer = make_trainer(library, make_vlm(processor, "routers"), processor, 1, tmp_path)
    before = trainer.evaluate()["eval_loss"]
    add_router_aux_loss(trainer, COEF)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == before and "eval_aux_loss" not in metrics
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == before


def test_evaluation_amid_training_leaves_no_trace(processor, tmp_path):
    """Neither in the logged aux loss nor in the weights."""
    results = []
    for changes in ({}, {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 2}):
        model = make_vlm(processor, "routers")
        trainer = make_trainer("transformers", model, processor, 2, tmp_path, max_steps=4, **changes)
        add_router_aux_loss(trainer, COEF)
        trainer.train()
        results.append((weights_of(model), [row["aux_loss"] for row in trainer.state.log_history if "loss" in row]))
    (weights, every), (others, second) = results
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert second == pytest.approx([sum(every[:2]) / 2, sum(every[2:]) / 2])


def test_micro_batch_without_pictures_counts_as_zero(processor, tmp_path):
    model = make_vlm(processor, "routers")
    model.lm_head.requires_grad_(True)  # or the loss of such a micro-batch would have no gradient at all
    trainer = make_trainer("transformers", model, processor, 2, tmp_path, max_steps=1)
    add_router_aux_loss(trainer, COEF)
    collate, batches = trainer.data_collator, []

    def second_without_pictures(samples):
        batch = collate(samples)
        if batches:
            del batch["pixel_values"]
            batch["input_ids"] = batch["input_ids"].masked_fill(
                batch["input_ids"] == model.config.image_token_id, 7)
        batches.append(batch)
        return batch

    trainer.data_collator = second_without_pictures
    trainer.train()
    assert "pixel_values" in batches[0] and "pixel_values" not in batches[1]
    tower = make_vlm(processor, "routers").model.vision_tower
    aux_loss = tower(batches[0]["pixel_values"], output_hidden_states=-1).aux_loss.item()
    assert trainer.state.log_history[0]["aux_loss"] == pytest.approx(aux_loss / 2)


def test_forward_for_metrics_alone_does_not_count(processor, tmp_path):
    """Some trainers run a second one, without gradient: TRL under label smoothing."""
    model = make_vlm(processor, "routers")
    trainer = make_trainer("transformers", model, processor, 2, tmp_path)
    compute_loss = trainer.compute_loss

    def with_metrics(model, inputs, *args, **kwargs):
        with torch.no_grad():
            model(**{**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])})
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = with_metrics
    add_router_aux_loss(trainer, COEF)
    trainer.train()
    expected = own_loop([trainer.data_collator.batches], 2, "routers")
    logged = [row["aux_loss"] for row in trainer.state.log_history if "loss" in row]
    assert logged == pytest.approx([row["aux_loss"] for row in expected["logs"]], rel=1e-6)


def test_peft(processor, tmp_path):
    """Adapters on the language model, routers beside them; both come back from the saved adapter."""
    from peft import LoraConfig, PeftModel, get_peft_model

    routers = {}
    for coef in (0.0, COEF):
        model = make_vlm(processor, "routers")
        targets = [name for name, module in model.named_modules()
                   if "language_model" in name and isinstance(module, torch.nn.Linear)]
        settings = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, modules_to_save=["router"])
        peft_model = get_peft_model(model, settings)
        trainer = make_trainer("trl", peft_model, processor, 1, tmp_path, max_steps=1)
        add_router_aux_loss(trainer, coef)
        trainer.train()
        routers[coef] = [gradient for name, gradient in trainer.optimizer.optimizer.gradients[0].items()
                         if ".router.modules_to_save." in name]
    assert any("lora_A" in name for name in trainer.optimizer.optimizer.gradients[0])
    model = make_vlm(processor, "routers")
    pictures = trainer.data_collator.batches[0]["pixel_values"]
    (COEF * model.model.vision_tower(pictures).aux_loss).backward()
    for without, with_aux, (_, weight) in zip(routers[0.0], routers[COEF], router_parameters(model), strict=True):
        torch.testing.assert_close(with_aux - without, weight.grad, rtol=1e-4, atol=1e-6)

    trainer.save_model(tmp_path / "adapter")
    trained = peft_model.merge_and_unload().state_dict()
    again = PeftModel.from_pretrained(make_vlm(processor, "routers"), tmp_path / "adapter").merge_and_unload()
    assert all(torch.equal(value, trained[name]) for name, value in again.state_dict().items())
    assert not torch.equal(trained["model.vision_tower.vision_model.encoder.layers.0.mlp.router.weight"],
                           model.model.vision_tower.vision_model.encoder.layers[0].mlp.router.weight)


def test_resumed_training_ends_with_the_same_routers(processor, tmp_path):
    """A trained tower is in Trainer's checkpoints and comes back from them, if `from_pretrained` reads the weights.

    By itself `Trainer` of transformers 5 brings no LLaVA's weights back, whatever its tower (transformers #43701).
    """
    results = []
    for resume in (None, str(tmp_path / f"checkpoint-{UPDATES - 1}")):
        model = make_vlm(processor, "experts")
        if resume:
            saved = LlavaForConditionalGeneration.from_pretrained(resume)
            assert not torch.equal(*(part.model.vision_tower.vision_model.encoder.layers[0].mlp.router.weight
                                     for part in (model, saved)))
            model.load_state_dict(saved.state_dict())
        trainer = make_trainer("transformers", model, processor, 2, tmp_path, save_strategy="steps", save_steps=1)
        add_router_aux_loss(trainer, COEF)
        trainer.train(resume_from_checkpoint=resume)
        results.append((weights_of(model), trainer.state.log_history[-2]))
    (unbroken, log), (resumed, other) = results
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    assert log == other and log["step"] == UPDATES
    saved = LlavaForConditionalGeneration.from_pretrained(tmp_path / f"checkpoint-{UPDATES}").state_dict()
    assert all(torch.equal(saved[name], unbroken[name]) for name in unbroken)


def refusal(model: torch.nn.Module) -> str:
    with pytest.raises(ValueError) as error:
        add_router_aux_loss(SimpleNamespace(model=model, compute_loss=None))
    return str(error.value)


def test_model_without_trained_routers_is_refused(processor, tmp_path):
    model = make_vlm(processor, "routers").requires_grad_(False)
    assert "no router of the vision tower trains" in refusal(model)
    text = model.config.text_config
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28,
                 patch_size=14)
    with torch.device("meta"):
        dense = LlavaForConditionalGeneration(LlavaConfig(vision_config=CLIPMoEVisionConfig(**sizes),
                                                          text_config=text))
        other = LlavaForConditionalGeneration(LlavaConfig(vision_config=CLIPVisionConfig(**sizes), text_config=text))
    assert "the vision tower is dense" in refusal(dense)
    assert "LlavaForConditionalGeneration has no CLIP-MoE vision tower" in refusal(other)


def test_second_call_is_refused(processor, tmp_path):
    trainer = make_trainer("transformers", make_vlm(processor, "routers"), processor, 1, tmp_path)
    add_router_aux_loss(trainer)
    with pytest.raises(ValueError, match="already"):
        add_router_aux_loss(trainer)


def test_tower_out_of_reach_of_the_gradient_is_an_error(processor, tmp_path):
    """Never silently off."""
    for mishap in (lambda tower: tower.requires_grad_(False),
                   lambda tower: setattr(tower, "forward", torch.no_grad()(tower.forward))):
        model = make_vlm(processor, "routers")
        trainer = make_trainer("transformers", model, processor, 1, tmp_path)
        add_router_aux_loss(trainer)
        mishap(model.model.vision_tower)
        with pytest.raises(RuntimeError, match="no gradient can reach its routers"):
            trainer.train()
