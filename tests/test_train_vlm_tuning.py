"""What trains in a run of train_vlm is what is saved; what routers lose and do; adapters as peft reads them."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from llava_runs import LLAVA_TRAIN, losses, settings
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

from clipmoe_vlm.moe import Router
from clipmoe_vlm.runs import UserError, read_jsonl
from train_vlm.config import LoraSettings
from train_vlm.data import make_dataset
from train_vlm.model import build
from train_vlm.sampler import BatchPlan
from train_vlm.samples import read_samples
from train_vlm.train import train
from train_vlm.tuning import describe, parameter_groups, set_trainable

pytestmark = pytest.mark.usefixtures("one_process")

TOWER = r"model\.vision_tower\.vision_model\."
BLOCKS = TOWER + r"encoder\.layers\.[01]\."  # of three; the last lies behind select_layer -2
PROJECTOR = r"model\.multi_modal_projector\."
LINEARS = r"model\.language_model\.layers\.\d\.(self_attn|mlp)\.\w+_proj\.weight"
LLM = r"model\.language_model\.|lm_head\."
LORA = LoraSettings(r=4, alpha=8, dropout=0.1)
FOUR_BITS = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"])


@pytest.fixture(scope="module")
def start(moe_tower, tmp_path_factory) -> Path:
    """A VLM folder to go on from, in the place of stage 1's."""
    folder = tmp_path_factory.mktemp("start")
    model, processor = build(settings(folder, vision_tower=moe_tower))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return LlavaForConditionalGeneration.from_pretrained(folder).state_dict()


def check_saved(start_model: Path, run: Path, trained: list[str]) -> None:
    """The tensors whose names begin with one of `trained` are others than at the start, and no other tensor is."""
    before, after = weights(start_model), weights(run / "model")
    assert before.keys() == after.keys()
    expected = {name for name in before if any(re.match(part, name) for part in trained)}
    assert {name for name, value in before.items() if not torch.equal(value, after[name])} == expected


@pytest.mark.parametrize("llm_tuning, tower, projector, trained", [
    ("frozen", "frozen", "train", [PROJECTOR]),
    ("frozen", "routers", "frozen", [BLOCKS + r"mlp\.router\."]),
    ("frozen", "experts", "frozen", [BLOCKS + r"mlp\.(router|experts)\."]),
    ("frozen", "last_n", "train", [TOWER + r"encoder\.layers\.1\.", PROJECTOR]),
    ("full", "frozen", "frozen", [LLM]),
    ("lora", "frozen", "frozen", [LINEARS]),
])
def test_what_trains_is_what_is_saved(start, tmp_path, llm_tuning, tower, projector, trained):
    train(settings(tmp_path, vlm=str(start), llm_tuning=llm_tuning, tower=tower, projector=projector, max_steps=2,
                   learning_rate=1e-2, lora=LORA))
    check_saved(start, tmp_path, trained)


def test_checkpointed_blocks_train_the_same(start, tmp_path):
    """Of the language model, and of the tower while it trains: each block is computed again, with its dropout."""
    for checkpointing in (False, True):
        train(settings(tmp_path / str(checkpointing), vlm=str(start), tower="experts", llm_tuning="lora", lora=LORA,
                       max_steps=3, gradient_checkpointing=checkpointing))
    rows, again = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("False", "True"))
    for name in ("loss", "aux_loss", "grad_norm"):
        assert [row[name] for row in again] == pytest.approx([row[name] for row in rows], rel=1e-5)
    for tower in ("experts", "frozen"):
        config = settings("unused", vlm=str(start), tower=tower, llm_tuning="lora", gradient_checkpointing=True)
        model, _ = build(config)
        set_trainable(model, config)
        parts = (model.model.language_model, model.model.vision_tower)
        assert [any(getattr(module, "gradient_checkpointing", False) for module in part.modules())
                for part in parts] == [True, tower != "frozen"]


# --- adapters ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["lora", "dora", "qlora"])
def adapted(request, start, tmp_path_factory) -> Path:
    """A run with adapters, projector and routers."""
    folder = tmp_path_factory.mktemp(request.param)
    train(settings(folder, vlm=str(start), llm_tuning=request.param, tower="routers", max_steps=3, learning_rate=1e-2,
                   lora=LORA))
    return folder


def test_what_trains_beside_adapters_is_saved(start, adapted):
    check_saved(start, adapted, [LINEARS, PROJECTOR, BLOCKS + r"mlp\.router\."])


def test_another_stage_follows_adapters(adapted, tmp_path):
    """It starts from what they learned, and trains all there is."""
    train(settings(tmp_path, vlm=str(adapted / "model"), tower="full", max_steps=2))
    assert losses(tmp_path)[0] < losses(adapted)[0] - 0.1
    check_saved(adapted / "model", tmp_path, [TOWER + "(embeddings|pre_layrnorm)", BLOCKS, PROJECTOR, LLM])


def test_peft_puts_the_adapter_on_the_start_and_gets_the_saved_model(start, adapted):
    from peft import PeftModel

    quantized = None
    if "qlora" in adapted.name:
        quantized = FOUR_BITS
    base = LlavaForConditionalGeneration.from_pretrained(start, quantization_config=quantized, dtype=torch.float32)
    for module in base.modules():
        module.support_avx512bf16_for_cpu = False  # bitsandbytes' faster way stumbles over layers as small as these
    model = PeftModel.from_pretrained(base, adapted / "adapter").eval()
    saved = LlavaForConditionalGeneration.from_pretrained(adapted / "model").eval()
    inputs = {"input_ids": torch.tensor([[1, 5, *[1200] * 4, 7, 8, 9]]), "pixel_values": torch.randn(1, 3, 28, 28)}
    with torch.no_grad():
        logits = model(**inputs).logits
        torch.testing.assert_close(saved(**inputs).logits, logits, atol=1e-4, rtol=1e-5)
        assert (LlavaForConditionalGeneration.from_pretrained(start)(**inputs).logits - logits).abs().max() > 0.1
    if quantized is None:
        merged = model.merge_and_unload().state_dict()
        assert merged.keys() == saved.state_dict().keys()
        for name, value in saved.state_dict().items():
            torch.testing.assert_close(merged[name], value, atol=1e-6, rtol=1e-6)


def test_qlora_keeps_the_base_in_four_bits(start):
    """As transformers loads it: NF4, and the scales in 8 bits again."""
    config = settings("unused", vlm=str(start), llm_tuning="qlora", lora=LORA)
    model, _ = build(config)
    set_trainable(model, config)
    theirs = LlavaForConditionalGeneration.from_pretrained(start, quantization_config=FOUR_BITS,
                                                           dtype=torch.float32).state_dict()
    ours = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()
            if ".lora_" not in name}
    assert ours.keys() == theirs.keys() and sum("nested_absmax" in name for name in ours) == 2 * 7
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())


def test_the_table_counts_every_number_once(start):
    def table(llm_tuning, tower, projector="train"):
        config = settings("unused", vlm=str(start), llm_tuning=llm_tuning, tower=tower, projector=projector, lora=LORA,
                          tower_learning_rate=1e-6)
        model, _ = build(config)
        set_trainable(model, config)
        lines = describe(model, parameter_groups(model, config)).splitlines()[1:]
        return {name: (int(count.replace(",", "")), int(trained.replace(",", "")), rate)
                for name, count, trained, rate in map(str.split, lines)}

    whole = {name: sum(value.numel() for key, value in weights(start).items() if re.match(part, key))
             for name, part in (("tower", TOWER), ("projector", PROJECTOR), ("llm", LLM))}
    linears = [value.shape for name, value in weights(start).items() if re.match(LINEARS, name)]
    adapters = sum(4 * (rows + columns) for rows, columns in linears)
    magnitudes = sum(rows for rows, _ in linears)
    assert table("frozen", "frozen") == {"tower": (whole["tower"], 0, "-"), "llm": (whole["llm"], 0, "-"),
                                         "projector": (whole["projector"], whole["projector"], "0.001")}
    assert table("full", "routers", "frozen") == {"tower": (whole["tower"], 2 * 4 * 32, "1e-06"),
                                                  "projector": (whole["projector"], 0, "-"),
                                                  "llm": (whole["llm"], whole["llm"], "0.001")}
    for llm_tuning, added in (("lora", adapters), ("dora", adapters + magnitudes), ("qlora", adapters)):
        assert table(llm_tuning, "frozen")["llm"] == (whole["llm"] + added, added, "0.001")


@pytest.mark.parametrize("module, change, words", [
    ("bitsandbytes.nn", None, "needs the package bitsandbytes: pip install bitsandbytes, or use llm_tuning: lora"),
    ("bitsandbytes.functional", "quantize_4bit", r"can't make 4-bit weights on this machine \(no kernel\); use"),
])
def test_qlora_on_a_machine_without_four_bits(start, monkeypatch, module, change, words):
    def no_kernel(*_, **__):
        raise NotImplementedError("no kernel")

    if change:
        monkeypatch.setattr(sys.modules[module], change, no_kernel)
    else:
        monkeypatch.setitem(sys.modules, module, None)
    config = settings("unused", vlm=str(start), llm_tuning="qlora")
    model, _ = build(config)
    with pytest.raises(UserError, match=words):
        set_trainable(model, config)


def test_qlora_refuses_zero_3(start, tmp_path):
    with pytest.raises(UserError, match="qlora does not go with zero_stage 3.*use zero_stage 2, or llm_tuning: lora"):
        train(settings(tmp_path, vlm=str(start), llm_tuning="qlora", zero_stage=3))


# --- routers -------------------------------------------------------------------------------------------------------


def test_router_losses_and_load_are_those_of_a_plain_computation(start, tmp_path, monkeypatch):
    """Two micro-batches, one of them of text alone, whose dummy picture counts nowhere."""
    samples = json.loads((LLAVA_TRAIN / "stage2.json").read_text())
    pictures = [sample for sample in samples if "image" in sample][:3]
    text = [sample for sample in samples if "image" not in sample][:3]
    (tmp_path / "data.json").write_text(json.dumps([*pictures, *text]))
    monkeypatch.setattr(BatchPlan, "order", lambda plan, epoch: [0, 1, 2, 3, 4, 5])
    for tower in ("routers", "frozen"):
        train(settings(tmp_path / tower, vlm=str(start), data=str(tmp_path / "data.json"), tower=tower,
                       llm_tuning="frozen", router_aux_loss_coef=0.5, router_z_loss_coef=0.1, global_batch_size=6,
                       micro_batch_size=3, max_steps=3, epochs=3, warmup_ratio=0.5, log_routing_every=2,
                       max_grad_norm=0.0))
    rows = read_jsonl(tmp_path / "routers/metrics.jsonl")
    for row in rows:
        assert row["loss"] == pytest.approx(row["lm_loss"] + 0.5 * row["aux_loss"] + 0.1 * row["z_loss"])
    assert all(row["aux_loss"] == row["z_loss"] == 0 for row in read_jsonl(tmp_path / "frozen/metrics.jsonl"))

    model, processor = build(settings("unused", vlm=str(start)))
    logits = []
    for module in model.model.vision_tower.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda *call: logits.append(call[-1]))
    config = settings("unused", vlm=str(start), packing=False)
    samples = read_samples(str(tmp_path / "data.json"), config.image_folder, tmp_path)
    dataset, collate = make_dataset(config, samples, model, processor)
    batch = collate([dataset[number] for number in range(3)])["inputs"]
    found = model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"]).logits[..., :1200]
    assert len(logits) == 2  # the last block is not run
    chosen, probabilities, squares, entropy = [], [], [], []
    for layer in logits:
        p = layer.double().exp() / layer.double().exp().sum(1, keepdim=True)
        chosen.append([[expert in sorted(range(4), key=lambda e, row=row: -row[e])[:2] for expert in range(4)]
                       for row in p.tolist()])
        probabilities.append(p)
        squares.append(layer.double().exp().sum(1).log() ** 2)
        entropy.append(-(p * p.log()).sum(1).mean().item())
    chosen = torch.tensor(chosen, dtype=torch.float64)  # [layers, tokens, experts]
    balance = 4 * (chosen.mean((0, 1)) * torch.stack(probabilities).mean((0, 1))).sum()
    z_loss = torch.stack(squares).mean()
    assert rows[0]["aux_loss"] == pytest.approx(balance.item(), rel=1e-5)
    assert rows[0]["z_loss"] == pytest.approx(z_loss.item(), rel=1e-5)
    # Words alone move neither routers nor projector, but their labels count in the mean.
    lm_loss = F.cross_entropy(found.flatten(0, 1)[batch["label_positions"]], batch["targets"], reduction="sum")
    trained = [parameter for name, parameter in model.named_parameters()
               if re.match(f"{PROJECTOR}|{BLOCKS}mlp.router", name)]
    gradients = torch.autograd.grad(lm_loss / rows[0]["label_tokens"] + 0.5 * balance + 0.1 * z_loss, trained)
    norm = sum(gradient.square().sum() for gradient in gradients).sqrt().item()
    assert rows[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for tower in ("routers", "frozen"):
        routing = read_jsonl(tmp_path / tower / "routing.jsonl")
        assert [row["step"] for row in routing] == [1, 2, 3]
        torch.testing.assert_close(torch.tensor(routing[0]["vision_load"]), (chosen.mean(1) / 2).float())
        assert routing[0]["vision_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert routing[0]["vision_load"] == routing[2]["vision_load"]
