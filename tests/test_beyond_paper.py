"""Options that the paper does not have: base gate, balance bias, router centroids, distillation from the base."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from encoder_data import tiny_config as run_config
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoTokenizer

import train_encoder.train
from clipmoe_vlm import CLIPMoEConfig, CLIPMoEModel, CLIPMoEVisionModel, convert, moe, routing, upcycling
from clipmoe_vlm.runs import UserError, load_config, read_jsonl
from train_encoder.config import EncoderConfig
from train_encoder.loss import distillation_loss
from train_encoder.routers import BiasBalancing, spherical_kmeans
from train_encoder.run import main


@pytest.fixture
def dense_models(tiny_config):
    """A base and two copies whose feed-forward layers alone differ."""
    models = [CLIPMoEModel(CLIPMoEConfig(**tiny_config())).eval()]
    for _ in range(2):
        models.append(CLIPMoEModel(models[0].config).eval())
        models[-1].load_state_dict(models[0].state_dict())
        with torch.no_grad():
            for _, parameter in upcycling.ffn_parameters(models[-1]):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return models


@pytest.fixture
def inputs():
    ids = torch.randint(1, 118, (4, 24)).index_fill(1, torch.tensor([20]), 119)
    return {"input_ids": ids, "pixel_values": torch.randn(4, 3, 32, 32)}


def disturb(model):
    """Gates and biases as after training, in place."""
    with torch.no_grad():
        for layer in (module for module in model.modules() if isinstance(module, moe.SparseMoE)):
            if layer.router.base_gate is not None:
                layer.router.base_gate.weight.normal_(std=0.5)
            if layer.router.balance_bias is not None:
                layer.router.balance_bias.copy_(torch.randn(3))
    return model


def outputs(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits_per_image


def plain_layer(layer, hidden_states):
    """Every token by itself: top k of logits + bias, weighed without the bias, then the gate."""
    router, e = layer.router, layer.experts

    def feed_forward(expert, token):
        hidden = e.activation(e.fc1_weight[expert] @ token + e.fc1_bias[expert])
        return e.fc2_weight[expert] @ hidden + e.fc2_bias[expert]

    rows = []
    for token in hidden_states.flatten(0, 1):
        logits = router.weight @ token
        scores = logits if router.balance_bias is None else logits + router.balance_bias
        best = scores.topk(layer.top_k).indices.tolist()
        total = logits[best].exp().sum()
        output = sum(logits[expert].exp() / total * feed_forward(expert, token) for expert in best)
        if router.base_gate is not None:
            gate = torch.sigmoid(router.base_gate.weight @ token + router.base_gate.bias)
            output = gate * feed_forward(0, token) + (1 - gate) * output
        rows.append(output)
    return torch.stack(rows).view_as(hidden_states)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(("balance_bias", "base_gate"), [(True, False), (False, True), (True, True)])
def test_a_layer_equals_its_plain_version(top_k, balance_bias, base_gate):
    layer = moe.SparseMoE(3, top_k, 16, 32, F.gelu, 0.0, balance_bias, base_gate)
    for parameter in layer.experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if balance_bias:
        layer.router.balance_bias.copy_(torch.tensor([0.4, -0.5, 0.1]))
    inputs = torch.randn(3, 7, 16)
    weights = torch.randn(3, 7, 16)
    results = []
    for function in (lambda x: layer(x)[0], lambda x: plain_layer(layer, x)):
        leaf = inputs.clone().requires_grad_()
        output = function(leaf)
        gradients = torch.autograd.grad((output * weights).sum(), [leaf, *layer.parameters()], materialize_grads=True)
        results.append((output, *gradients))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    if balance_bias:  # it did change who is chosen, and the logits say so
        logits = layer(inputs)[1]
        assert not torch.equal(logits.topk(top_k).indices, (logits - layer.router.balance_bias).topk(top_k).indices)


def test_a_gate_starts_at_the_share_that_was_asked_for(dense_models, inputs):
    hidden = torch.randn(2, 5, 32)
    gated = upcycling.upcycle(dense_models, base_gate=0.7).vision_model.encoder.layers[1].mlp.eval()
    plain = upcycling.upcycle(dense_models).vision_model.encoder.layers[1].mlp.eval()
    base = dense_models[0].vision_model.encoder.layers[1].mlp
    torch.testing.assert_close(gated(hidden)[0], 0.7 * base(hidden)[0] + 0.3 * plain(hidden)[0], rtol=1e-5, atol=1e-6)
    copies = upcycling.upcycle([dense_models[0]] * 2, base_gate=0.2, expert_dropout=0.0)
    torch.testing.assert_close(outputs(disturb(copies), inputs), outputs(dense_models[0], inputs), rtol=1e-4, atol=1e-5)


def test_what_is_off_leaves_no_trace(dense_models):
    names = upcycling.upcycle(dense_models).state_dict()
    assert not any("balance_bias" in name or "base_gate" in name for name in names)


def test_saved_and_loaded_they_are_the_same(dense_models, inputs, tmp_path):
    model = disturb(upcycling.upcycle(dense_models, balance_bias=True, base_gate=0.5)).eval()
    assert (outputs(model, inputs) - outputs(upcycling.upcycle(dense_models).eval(), inputs)).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    loaded = CLIPMoEModel.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        tower = CLIPMoEVisionModel.from_pretrained(tmp_path)(inputs["pixel_values"]).last_hidden_state
        assert torch.equal(tower, model.vision_model(inputs["pixel_values"]).last_hidden_state)


def test_the_parts_come_back(dense_models, inputs):
    model = disturb(upcycling.upcycle(dense_models, balance_bias=True, base_gate=0.5)).eval()
    for index, dense in enumerate(dense_models):
        assert torch.equal(outputs(upcycling.dense_expert(model, index), inputs), outputs(dense, inputs))
    plain = upcycling.uniform_average(upcycling.upcycle(dense_models))
    assert torch.equal(outputs(upcycling.uniform_average(model), inputs), outputs(plain, inputs))


def test_gates_train_with_the_routers_and_biases_never(dense_models, inputs):
    model = upcycling.upcycle(dense_models, balance_bias=True, base_gate=0.5, expert_dropout=0.0)
    model.requires_grad_(False)
    trained = dict(upcycling.router_parameters(model))
    assert {name.split("router.")[1] for name in trained} == {"weight", "base_gate.weight", "base_gate.bias"}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(**inputs).logits_per_image.diagonal().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in trained.items()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(gradient, gradients[1][name])


def test_routing_statistics_know_the_bias(dense_models, inputs):
    model = upcycling.upcycle(dense_models, num_experts_per_tok=1, balance_bias=True).eval()
    with torch.no_grad():
        model.vision_model.encoder.layers[0].mlp.router.balance_bias[2] = 100.0
        logits = model.vision_model(inputs["pixel_values"]).router_logits
    assert routing.expert_load(logits, 1)[0].tolist() == [0, 0, 1]
    assert (routing.routing_map(logits[0], 4, (4, 4)) == 2).all()


@pytest.mark.parametrize("option", [{"balance_bias": True}, {"base_gate": 0.5}])
def test_the_official_layout_has_no_place_for_them(dense_models, tiny_config, tmp_path, option):
    values = tiny_config()
    values["text_config"]["max_position_embeddings"] = 248
    for tower in ("vision_config", "text_config"):
        values[tower].update(hidden_size=64, intermediate_size=256, num_attention_heads=1, activation="quick_gelu")
    base = CLIPMoEModel(CLIPMoEConfig(**values))
    upcycling.upcycle([base, base], **option).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=f"no place for the {next(iter(option))} of the vision tower"):
        convert.convert(tmp_path / "model", tmp_path / "official.safetensors", to="official")


# --- parts of train_encoder ------------------------------------------------------------------------------------------


def test_the_bias_balances_a_skewed_router():
    layer = moe.SparseMoE(4, 1, 8, 16, F.gelu, 0.0, balance_bias=True)
    for parameter in layer.experts.parameters():
        torch.nn.init.normal_(parameter)
    tokens = torch.randn(1, 2000, 8)
    tokens[..., 0] = 2.0
    with torch.no_grad():
        layer.router.weight[0, 0] = 1.0  # nearly all tokens go to expert 0

    def load():
        return routing.expert_load([layer.eval()(tokens)[1]], 1)[0]

    assert load()[0] > 0.9
    balancing = BiasBalancing(layer, rate=0.02)
    layer.train()(tokens)
    balancing.update(world_size=1)
    moved = torch.tensor([-0.03, 0.01, 0.01, 0.01])  # 0.02 down and up, less the mean
    torch.testing.assert_close(layer.router.balance_bias, moved)
    load()  # evaluation does not count
    balancing.update(world_size=1)
    torch.testing.assert_close(layer.router.balance_bias, moved)
    for _ in range(200):
        layer.train()(tokens)
        balancing.update(world_size=1)
    torch.testing.assert_close(load(), torch.full((4,), 0.25), rtol=0, atol=0.05)
    assert layer.router.balance_bias.mean().abs() < 1e-5
    assert torch.equal(layer(tokens)[0], plain_top_1(layer, tokens))  # of weight 1, whatever the bias


def test_the_load_is_counted_in_a_compiled_model():
    biases = []
    for compiled in (False, True):
        torch.manual_seed(0)
        layer = moe.SparseMoE(3, 1, 8, 16, F.gelu, 0.0, balance_bias=True)
        for parameter in layer.experts.parameters():
            torch.nn.init.normal_(parameter)
        balancing = BiasBalancing(layer, rate=0.5)
        if compiled:
            layer.compile(backend="eager")
        for _ in range(3):
            layer(torch.randn(2, 50, 8))
            balancing.update(world_size=1)
        biases.append(layer.router.balance_bias)
    assert torch.equal(*biases) and biases[0].abs().max() > 0.3


def plain_top_1(layer, tokens):
    chosen = layer(tokens)[1].argmax(-1, keepdim=True)
    return layer.experts(tokens[0], chosen, torch.ones(len(chosen), 1))[None]


def test_spherical_kmeans_finds_directions_whatever_their_lengths():
    directions = F.normalize(torch.randn(3, 20), dim=-1)
    member = torch.tensor([0] * 20 + [1] * 50 + [2] * 30)
    points = (directions[member] + 0.02 * torch.randn(100, 20)) * torch.rand(100, 1).add(0.1) * 10
    found = spherical_kmeans(points, 3, seed=0)
    means = torch.stack([F.normalize(points, dim=-1)[member == k].sum(0) for k in (1, 2, 0)])  # the largest first
    torch.testing.assert_close(found, F.normalize(means, dim=-1))
    assert torch.equal(found, spherical_kmeans(points, 3, seed=0))


def test_spherical_kmeans_ends_where_nothing_moves():
    points = torch.randn(300, 6)
    found = spherical_kmeans(points, 4, seed=1)
    sums = [torch.zeros(6) for _ in range(4)]
    for point in points:
        unit = point / point.norm()
        sums[max(range(4), key=lambda k, unit=unit: float(unit @ found[k]))] += unit
    torch.testing.assert_close(found, torch.stack([total / total.norm() for total in sums]))


def unit_rows():
    return F.normalize(torch.randn(6, 5), dim=-1)


def test_distillation_is_the_divergence_where_the_base_is_right():
    image, text, base_image = unit_rows().requires_grad_(), unit_rows(), unit_rows()
    base_text = F.normalize(base_image + 0.1 * unit_rows(), dim=-1)
    base_text[[1, 2]] = base_text[[2, 1]]  # the base takes these two for each other
    valid = torch.tensor([True, True, True, False, True, True])
    loss = distillation_loss(image, text, base_image, base_text, valid, logit_scale=10.0)
    total, used = 0, 0
    for ours, theirs in ((image @ text.T, base_image @ base_text.T), (text @ image.T, base_text @ base_image.T)):
        for row in (0, 1, 2, 4, 5):
            p = (10 * theirs[row][valid]).softmax(-1)
            if theirs[row].masked_fill(~valid, -2).argmax() == row:
                used += 1
                total = total + (p * (p.log() - (10 * ours[row][valid]).log_softmax(-1))).sum()
    assert used == 6
    torch.testing.assert_close(loss, total / 10)
    for ours, plain in zip(torch.autograd.grad(loss, image), torch.autograd.grad(total / 10, image), strict=True):
        torch.testing.assert_close(ours, plain)
    assert distillation_loss(base_image, base_text, base_image, base_text, valid) == 0


# --- whole runs ------------------------------------------------------------------------------------------------------


def run_here(world: Path, output: Path, *arguments: str, mcl=(), router=(), **changes) -> Path:
    torch.set_num_threads(1)
    values = {"num_experts": 2, "validation_data": None, "hard_captions": None, **changes}
    config = run_config(world, output, mcl={"max_steps": 1, **dict(mcl)}, router={"max_steps": 4, **dict(router)},
                        **values)
    main(load_config(EncoderConfig, [str(config), *arguments], "train_encoder"))
    return output


def router_state(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The routers' tensors of this last name in `folder/model`."""
    found = {key: tensor for key, tensor in load_file(folder / "model" / "model.safetensors").items()
             if key.endswith(f"router.{name}")}
    assert len(found) == 4
    return found


def test_routers_start_from_centroids_of_what_the_base_sees(world, tmp_path):
    still = {"init": "centroids", "learning_rate": 1e-12}
    output = run_here(world, tmp_path / "one", router=still, num_experts=3)
    routers = router_state(output, "weight")
    base = CLIPMoEModel.from_pretrained(output / "base").eval()
    seen = {}
    for name in routers:
        layer = base.get_submodule(name.removesuffix(".router.weight"))
        layer.register_forward_pre_hook(lambda _, arguments, name=name: seen.update({name: arguments[0]}))
    rows = [line.split(",") for line in (world / "train.csv").read_text().splitlines()[1:]]
    pictures = AutoImageProcessor.from_pretrained(output / "base", backend="pil")(
        [Image.open(world / file) for file, _ in rows], return_tensors="pt")
    ids = AutoTokenizer.from_pretrained(output / "base")([caption for _, caption in rows], padding="max_length",
                                                         max_length=16, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        base(input_ids=ids, pixel_values=pictures["pixel_values"])
    real = torch.arange(16) <= (ids == base.config.text_config.eos_token_id).int().argmax(-1)[:, None]
    for name, rows in routers.items():
        tokens = (seen[name][real] if name.startswith("text") else seen[name]).reshape(-1, 32)  # padding does not count
        logits = tokens @ rows.T
        assert rows.mean(0).abs().max() < 1e-5
        assert logits.square().mean().sqrt().item() == pytest.approx(1, abs=0.1)
        # A row points to the mean direction of the tokens that it wins (of a sample of them).
        means = torch.stack([F.normalize(tokens[logits.argmax(-1) == expert], dim=-1).sum(0) for expert in range(3)])
        means = F.normalize(means, dim=-1)
        assert F.cosine_similarity(rows, means - means.mean(0)).min() > 0.95
    again = run_here(world, tmp_path / "two", router=still, num_experts=3, workers=1)
    assert all(torch.equal(rows, routers[name]) for name, rows in router_state(again, "weight").items())


def test_biases_are_trained_saved_and_restored(world, tmp_path, monkeypatch):
    options = {"num_experts": 3, "router": {"balancing": "bias", "bias_rate": 0.25, "max_steps": 6}}
    whole = run_here(world, tmp_path / "whole", **options)
    biases = router_state(whole, "balance_bias")
    assert all(bias.abs().max() > 0.1 for bias in biases.values())
    rows = [row for row in read_jsonl(whole / "metrics.jsonl") if row["stage"] == "router"]
    assert all(row["loss"] == row["contrastive"] and row["image_balance"] > 0 for row in rows)
    save = train_encoder.train.save_checkpoint

    def save_and_stop(*arguments, **state):
        save(*arguments, **state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_encoder.train, "save_checkpoint", save_and_stop)
        run_here(world, tmp_path / "broken", **options)
    broken = run_here(world, tmp_path / "broken", **options)
    assert (broken / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


def test_z_loss_stays_when_the_balance_loss_goes(world, tmp_path):
    output = run_here(world, tmp_path / "run", router={"balancing": "bias", "z_loss_coef": 0.5, "balance_coef": 0.1})
    row = [row for row in read_jsonl(output / "metrics.jsonl") if row["stage"] == "router"][0]
    assert 0.01 < row["loss"] - row["contrastive"] < 0.2  # the balance loss alone would be 0.1 * (2 + 2 / 2)


@pytest.mark.parametrize("method", ["dmu", "sparse_upcycling"])
def test_gates_train(world, tmp_path, method):
    output = run_here(world, tmp_path / "run", method=method, router={"base_gate": 0.8})
    model = CLIPMoEModel.from_pretrained(output / "model")
    assert model.config.vision_config.base_gate and model.config.text_config.base_gate
    start = torch.full((32,), 4.0).log()
    for name, bias in router_state(output, "base_gate.bias").items():
        assert 0 < (bias - start).abs().max() < 0.1, name
    assert all(weight.abs().max() > 0 for weight in router_state(output, "base_gate.weight").values())


def test_distillation_holds_a_stage_at_its_base(world, tmp_path):
    rows = []
    for weight in (1e-9, 100.0):
        output = run_here(world, tmp_path / str(weight), mcl={"distillation": weight, "max_steps": 20},
                          router={"distillation": weight})
        rows.append(read_jsonl(output / "metrics.jsonl"))
    assert {row["stage"] for row in rows[1]} == {"mcl_1", "router"}
    first, *later = rows[1][:20]
    assert first["distillation"] == pytest.approx(0, abs=1e-4) and all(row["distillation"] > 0 for row in later)
    for row in later:
        assert row["loss"] == pytest.approx(row["contrastive"] + 100 * row["distillation"], rel=1e-5)
    free, held = (sum(row["distillation"] for row in run[10:20]) for run in rows)
    assert held < 0.7 * free


ALL = {"num_experts": 3, "mcl": {"distillation": 3.0, "max_steps": 2},
       "router": {"init": "centroids", "balancing": "bias", "bias_rate": 0.25, "z_loss_coef": 0.1, "base_gate": 0.6,
                  "distillation": 3.0, "expert_dropout": 0.0}}


def test_gradient_caching_and_checkpointing_change_nothing(world, tmp_path):
    plain = run_here(world, tmp_path / "plain", **ALL)
    small = run_here(world, tmp_path / "small", "micro_batch_size=3", "gradient_checkpointing=true", **ALL)
    for ours, theirs in zip(*(read_jsonl(folder / "metrics.jsonl") for folder in (small, plain)), strict=True):
        for key in ("loss", "contrastive", "distillation"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-4)
    biases = router_state(small, "balance_bias")
    for name, bias in router_state(plain, "balance_bias").items():
        assert bias.abs().max() > 0.1
        torch.testing.assert_close(biases[name], bias)


@pytest.mark.parametrize(("changes", "message"), [
    ({"router": {"init": "kmeans"}}, "router.init: 'kmeans' is not one of random, centroids"),
    ({"router": {"balancing": "none"}}, "router.balancing: 'none' is not one of loss, bias"),
    ({"router": {"bias_rate": 0.0}}, "router.bias_rate: 0.0 must be above 0"),
    ({"router": {"base_gate": 1.0}}, "router.base_gate: 1.0 must lie between 0 and 1"),
    ({"mcl": {"distillation": -1.0}}, "mcl.distillation: -1.0 must not be negative"),
])
def test_a_mistake_is_one_sentence(world, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run_here(world, tmp_path / "out", **changes)
