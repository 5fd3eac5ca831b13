"""The routers' auxiliary loss in the original LLaVA, beside LLaVA's own loss and gradients, computed plainly."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch
from host import RUNS, TRAIN, train

from clipmoe_vlm import CLIPMoEVisionTower
from clipmoe_vlm.moe import Router

COEFFICIENT = 0.3
# With a learning rate of 0 all updates see the same weights.
STILL = {"learning_rate": "0", "mm_projector_lr": None, "weight_decay": "0", "max_grad_norm": "0"}


class Plain:
    """LLaVA without any patch, with our tower put into it by hand."""

    def __init__(self, tower: Path, recorded: str):
        from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

        arguments = types.SimpleNamespace(
            vision_tower=str(TRAIN / "tower"), mm_vision_select_layer=-2, mm_vision_select_feature="patch",
            pretrain_mm_mlp_adapter=None, mm_patch_merge_type="flat", mm_projector_type="mlp2x_gelu")
        self.model = LlavaLlamaForCausalLM.from_pretrained(TRAIN / "llama")
        self.model.get_model().initialize_vision_modules(arguments)
        self.model.config.tokenizer_model_max_length = int(RUNS["stage2"]["arguments"]["model_max_length"])
        stage = "start" if recorded == "stage1" else "stage1"
        state = torch.load(tower.parent / f"projector_{stage}.bin")
        self.model.load_state_dict(state, strict=False)
        self.tower = CLIPMoEVisionTower(str(tower), arguments)
        self.model.model.vision_tower = self.tower
        self.model.requires_grad_(False)
        self.routers = [(name, module) for name, module in self.tower.named_modules()
                        if isinstance(module, Router) and "layers.2." not in name]  # behind the selected layer
        for _, router in self.routers:
            router.weight.requires_grad_(True)

    def losses(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """LLaVA's loss and the balance loss of the pictures that samples show (None: no sample has one)."""
        logits = []
        hooks = [router.register_forward_hook(lambda module, inputs, output: logits.append(output))
                 for _, router in self.routers]
        loss = self.model(**batch).loss
        for hook in hooks:
            hook.remove()
        shown = [row for row, ids in enumerate(batch["input_ids"].tolist()) if -200 in ids]
        if not shown:
            return loss, None
        experts, tokens = logits[0].shape[-1], len(logits[0]) // len(batch["images"])
        balance = torch.zeros(())
        rows = torch.cat([layer.unflatten(0, (-1, tokens))[shown].flatten(0, 1) for layer in logits])
        probabilities = rows.exp() / rows.exp().sum(-1, keepdim=True)
        best = probabilities.argsort(-1, descending=True)[:, :2]
        for expert in range(experts):
            share = (best == expert).any(-1).float().mean()
            balance = balance + experts * share * probabilities[:, expert].mean()
        return loss, balance


@pytest.mark.parametrize(("recorded", "ranks", "text_only", "changed"), [
    ("stage1", 1, False, {"max_steps": "3"}),
    ("stage2", 1, True, {}),
    ("stage2", 1, False, {"gradient_checkpointing": "True", "per_device_train_batch_size": "2",
                          "gradient_accumulation_steps": "2", "dataloader_num_workers": "2", "max_steps": "4"}),
    ("lora", 1, False, {"max_steps": "3"}),
    ("two_ranks:0", 2, False, {"max_steps": "3"}),
    ("two_ranks_grouped:0", 2, True, {"gradient_checkpointing": "True", "per_device_train_batch_size": "1",
                                      "gradient_accumulation_steps": "2", "max_steps": "13"}),
], ids=["stage 1", "stage 2", "accumulation 2, checkpointing, workers", "LoRA", "two ranks",
        "two ranks, accumulation 2, checkpointing"])
def test_loss_and_gradients_are_the_plain_sums(towers, tmp_path, recorded, ranks, text_only, changed):
    trained = train(tmp_path / "llava", towers / "moe", recorded, processes=ranks,
                    ours=("--tower", "routers", "--router_aux_loss_coef", str(COEFFICIENT)),
                    environment={"RECORD": "1"}, **{**STILL, **changed})
    records = [torch.load(trained.folder / f"record_{rank}.pt") for rank in range(ranks)]
    plain = Plain(towers / "moe", recorded)
    accumulation = int(changed.get("gradient_accumulation_steps", 1))
    updates = len(records[0]["gradients"])
    assert updates == len(trained.updates) > 2
    batches_of_text = 0
    for update in range(updates):
        balances = []
        parameters = {f"vision_tower.{name}.weight": router.weight for name, router in plain.routers}
        for parameter in parameters.values():
            parameter.grad = None
        for rank, record in enumerate(records):
            for micro in range(update * accumulation, (update + 1) * accumulation):
                loss, balance = plain.losses(record["batches"][micro])
                if balance is None:
                    batches_of_text += 1
                else:
                    loss = loss + COEFFICIENT * balance
                    balances.append(balance.item())
                assert trained.losses[rank][micro] == pytest.approx(loss.item(), abs=1e-6)
                (loss / accumulation / ranks).backward()
        for record in records:
            got = {name[name.index("vision_tower."):]: gradient
                   for name, gradient in record["gradients"][update].items() if "router" in name}
            assert set(got) == set(parameters)
            for name, parameter in parameters.items():
                torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-7)
        logged = trained.updates[update]["logged"]
        if balances:
            assert logged["router_aux_loss"] == pytest.approx(sum(balances) / len(balances), abs=6e-5)
        else:
            assert "router_aux_loss" not in logged
    assert not text_only or batches_of_text
