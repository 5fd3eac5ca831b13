"""transformers' common model checks, over our classes and in every host's environment.

Its own mixin is no part of the wheel, so the checks are written plainly here, next to what hosts need beyond them.
"""

import copy
import inspect
import json
import os
import pickle
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import AutoModel, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from clipmoe_vlm import CLIPMoEConfig, CLIPMoEModel, CLIPMoEVisionConfig, CLIPMoEVisionModel
from clipmoe_vlm.modeling_clipmoe import interpolate_positions
from clipmoe_vlm.moe import Experts, Router

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
         "initializer_range": 0.2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "first_moe_layer": 1}
VISION = {"image_size": 32, "patch_size": 8}
TEXT = {"vocab_size": 60, "max_position_embeddings": 12, "bos_token_id": 57, "eos_token_id": 58, "pad_token_id": 0}
SIGLIP = {"class_token": False, "patch_bias": True, "pre_norm": False, "pooling": "map", "norm_after_pooling": False}
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[57, 5, 9, 58, 0, 0], [57, 3, 58, 0, 0, 0]])
DTYPE = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def vision(**fields) -> CLIPMoEVisionModel:
    return CLIPMoEVisionModel(CLIPMoEVisionConfig(**{**TOWER, **VISION, **fields})).eval()


def whole(**fields) -> CLIPMoEModel:
    config = CLIPMoEConfig(vision_config={**TOWER, **VISION, **fields}, text_config={**TOWER, **TEXT, **fields},
                           projection_dim=16)
    return CLIPMoEModel(config).eval()


def outputs(model: nn.Module, **options) -> list[torch.Tensor]:
    """Every tensor that the model gives."""
    inputs = {"pixel_values": PIXELS.to(model.dtype)}
    if isinstance(model, CLIPMoEModel):
        inputs["input_ids"] = IDS
    return tensors(model(**inputs, **options))


def tensors(output) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    return [tensor for part in parts if part is not None for tensor in tensors(part)]


def same(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 0.0) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


both_classes = pytest.mark.parametrize("make", [vision, whole])
dense_and_moe = pytest.mark.parametrize("fields", [{}, MOE], ids=["dense", "moe"])


# --- hosts that do not know us -------------------------------------------------------------------------------------


@dense_and_moe
@pytest.mark.parametrize("name", ["CLIPVisionModel", "CLIPModel", "CLIPTextModel", "CLIPVisionModelWithProjection"])
def test_clip_classes_of_transformers_refuse_our_folders(name, fields, tmp_path):
    fields = {**fields, "first_moe_layer": 0}
    # With CLIP's default sizes, which those classes assume for what they do not find, nothing but the note stops them.
    CLIPMoEVisionModel(CLIPMoEVisionConfig(num_hidden_layers=1, **fields)).save_pretrained(tmp_path / "vision")
    whole(**fields).save_pretrained(tmp_path / "whole")
    for folder in ("vision", "whole"):
        with pytest.raises(KeyError, match="This folder holds a CLIP-MoE.*python -m clipmoe_vlm.llava"):
            getattr(transformers, name).from_pretrained(tmp_path / folder)


def test_original_llava_without_our_import_refuses_our_folders(tmp_path):
    encoder = pytest.importorskip("llava.model.multimodal_encoder.clip_encoder")
    vision(**MOE).save_pretrained(tmp_path / "checkpoint" / "vision_tower")
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "checkpoint" / "vision_tower")
    arguments = type("Arguments", (), {"mm_vision_select_layer": -2})
    with pytest.raises(KeyError, match="This folder holds a CLIP-MoE.*import clipmoe_vlm.llava"):
        encoder.CLIPVisionTower(str(tmp_path / "checkpoint" / "vision_tower"), arguments)


def test_configurations_of_other_models_or_formats_are_refused(tmp_path):
    CLIPVisionConfig().save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="model_type 'clip_vision_model'.*clipmoe_vlm convert"):
        CLIPMoEVisionModel.from_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="field `activation`"):
        CLIPMoEVisionConfig(hidden_act="gelu")
    with pytest.raises(ValueError, match="activation 'swiglue' must be one of"):
        CLIPMoEVisionConfig(activation="swiglue")
    for make, kind in ((vision, "clip_moe_vision_model"), (whole, "clip_moe")):
        folder = tmp_path / kind
        make().save_pretrained(folder)
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, "format": 99}))
        with pytest.raises(ValueError, match=f"{kind} was written in format 99"):
            AutoModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="model_type 'clip_moe_vision_model' is none of a clip_moe"):
        CLIPMoEModel.from_pretrained(tmp_path / "clip_moe_vision_model")


# --- save and load -------------------------------------------------------------------------------------------------


@both_classes
@dense_and_moe
@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"device_map": "auto"}, {DTYPE: "auto"}],
                         ids=["plain", "low_cpu_mem_usage", "device_map", "dtype"])
def test_saved_and_loaded_model_is_the_same(make, fields, options, tmp_path):
    model = make(activation="gelu", balance_bias=bool(fields), base_gate=bool(fields), **fields)
    sharded = not options
    model.save_pretrained(tmp_path, **({"max_shard_size": "80KB"} if sharded else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == sharded
    for loaded in (type(model).from_pretrained(tmp_path, **options), AutoModel.from_pretrained(tmp_path, **options)):
        assert type(loaded) is type(model) and not loaded.training
        assert loaded.config.to_dict().keys() == model.config.to_dict().keys()
        same(outputs(loaded), outputs(model))
        same(outputs(loaded), outputs(loaded))


def test_vision_tower_loads_from_the_folder_of_the_whole_model(tmp_path):
    model = whole(**MOE)
    model.save_pretrained(tmp_path)
    loaded, report = CLIPMoEVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    same(tensors(loaded(PIXELS)), tensors(model.vision_model(PIXELS)))


def test_loading_says_what_is_missing_unexpected_or_of_another_shape(tmp_path):
    vision(**MOE, num_hidden_layers=2).save_pretrained(tmp_path)

    def load(**changes):
        config = CLIPMoEVisionConfig.from_pretrained(tmp_path)
        for name, value in changes.items():
            setattr(config, name, value)
        return CLIPMoEVisionModel.from_pretrained(tmp_path, config=config, output_loading_info=True)[1]

    assert "vision_model.encoder.layers.2.mlp.router.weight" in load(num_hidden_layers=3)["missing_keys"]
    assert "vision_model.encoder.layers.1.mlp.router.weight" in load(num_hidden_layers=1)["unexpected_keys"]
    with pytest.raises(RuntimeError, match="mismatch"):
        load(num_experts=3)


@both_classes
def test_half_precision_is_kept_and_found_again(make, tmp_path):
    model = make(**MOE).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, **{DTYPE: "auto"})
    assert loaded.dtype is torch.bfloat16
    same(outputs(loaded), outputs(model))
    tower = loaded.vision_model(PIXELS.to(torch.bfloat16))
    assert {logits.dtype for logits in tower.router_logits} | {tower.aux_loss.dtype} == {torch.float32}
    assert type(model).from_pretrained(tmp_path, **{DTYPE: torch.float16}).dtype is torch.float16


def test_blocks_may_lie_on_other_devices(tmp_path):
    pytest.importorskip("accelerate")
    model = whole(**MOE, balance_bias=True, base_gate=True)
    model.save_pretrained(tmp_path / "model")
    assert list(model._no_split_modules) == [type(model.vision_model.encoder.layers[0]).__name__]
    device_map = {name: "cpu" for name, _ in model.named_children()} | {"logit_scale": "cpu"}
    for tower in ("vision_model", "text_model"):
        del device_map[tower]
        children = {name for name, _ in getattr(model, tower).named_children()} - {"encoder", "head"}
        device_map |= {f"{tower}.{name}": "disk" for name in children}
        device_map |= {f"{tower}.encoder.layers.{index}": "disk" if index else "cpu" for index in range(3)}
    loaded = CLIPMoEModel.from_pretrained(tmp_path / "model", device_map=device_map,
                                          offload_folder=tmp_path / "offload")
    assert loaded.vision_model.encoder.layers[1].mlp.experts.fc1_weight.device.type == "meta"
    with torch.no_grad():
        same(outputs(loaded), outputs(model))


@both_classes
@dense_and_moe
def test_copies_and_pickles_are_the_same_model(make, fields):
    model = make(**fields)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same(outputs(other), outputs(model))
    assert model.half().dtype is torch.float16
    storages = [parameter.data_ptr() for parameter in model.state_dict().values()]
    assert len(set(storages)) == len(storages)  # nothing is tied


@dense_and_moe
def test_fresh_weights_are_in_their_ranges(fields):
    model = whole(**fields)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
    for module in model.modules():
        if isinstance(module, Router):
            assert 0.5 * 32**-0.5 < module.weight.abs().max() <= 32**-0.5
        elif isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)):
            assert module.weight.std().item() == pytest.approx(0.2, rel=0.2)
        elif isinstance(module, Experts):
            assert module.fc1_weight.std().item() == pytest.approx(0.2, rel=0.2)
            assert not module.fc1_bias.any() and not module.fc2_bias.any()


def test_folder_loads_without_the_package(tmp_path):
    model = whole(**MOE)
    model.save_pretrained(tmp_path / "whole")
    CLIPMoEVisionModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "vision")
    code = ("import sys, torch; sys.modules['clipmoe_vlm'] = None\n"
            "from transformers import AutoModel\n"
            "for folder in ('whole', 'vision'):\n"
            "    model = AutoModel.from_pretrained(folder, trust_remote_code=True)\n"
            "    print(model.vision_model(torch.ones(1, 3, 32, 32)).pooler_output.sum().item())")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    expected = model.vision_model(torch.ones(1, 3, 32, 32)).pooler_output.sum().item()
    assert [float(line) for line in done.stdout.split()[-2:]] == pytest.approx([expected, expected], abs=1e-4)


# --- forward -------------------------------------------------------------------------------------------------------


@dense_and_moe
def test_hidden_states_as_bool_index_or_several(fields):
    model = vision(**fields)
    everything = model(PIXELS, output_hidden_states=True).hidden_states
    assert len(everything) == 4 and model(PIXELS).hidden_states is None
    for wanted in (0, 2, -1, -2, [0, -1], (1,), [-4, 2]):
        output = model(PIXELS, output_hidden_states=wanted, return_dict=True)
        assert len(output.hidden_states) == 4
        for index in [wanted] if isinstance(wanted, int) else wanted:
            assert torch.equal(output.hidden_states[index], everything[index])
    model.config.output_hidden_states = True
    assert len(model(PIXELS).hidden_states) == 4
    with pytest.raises(ValueError, match="hidden state 4 does not exist"):
        model(PIXELS, output_hidden_states=4)


@both_classes
def test_tuple_instead_of_a_named_output(make):
    model = make(**MOE)
    found = model(**({"input_ids": IDS} if make is whole else {}), pixel_values=PIXELS, return_dict=False)
    assert type(found) is tuple
    same(tensors(found), outputs(model))
    if make is vision:
        named = model(PIXELS)
        assert list(named) == ["last_hidden_state", "pooler_output", "router_logits", "aux_loss", "balance_loss"]
        same(list(found[:2]), [named.last_hidden_state, named.pooler_output])  # CLIP's order


@both_classes
@dense_and_moe
@pytest.mark.parametrize("head", [{}, {"class_token": False, "pooling": "map"}], ids=["cls", "map"])
def test_attention_implementations_agree(make, fields, head, tmp_path):
    model = make(**fields)
    if make is vision:
        model = make(**fields, **head)
    model.save_pretrained(tmp_path)
    expected = outputs(model)
    for asked, used in (("eager", "eager"), ("sdpa", "sdpa"), ("flash_attention_2", "sdpa"), (None, "sdpa")):
        loaded = type(model).from_pretrained(tmp_path, attn_implementation=asked)
        assert loaded.config._attn_implementation == used
        with mock.patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as sdpa:
            same(outputs(loaded), expected, 1e-5)
        assert sdpa.called == (used == "sdpa")
        if hasattr(loaded, "set_attn_implementation") and make is vision:
            loaded.set_attn_implementation("eager")
            assert loaded.config._attn_implementation == "eager"
            loaded.set_attn_implementation("flash_attention_2")
            assert loaded.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("asked", ["eager", "sdpa"])
def test_attention_implementation_comes_down_from_a_parent(asked, tmp_path):
    config = LlavaConfig(
        vision_config=vision(**MOE).config, image_token_index=90, vision_feature_layer=-2,
        text_config=LlamaConfig(vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                num_attention_heads=2, num_key_value_heads=2))
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    try:
        loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=asked)
    except ValueError as error:  # transformers 4.36's parent has no SDPA; of this it is not for us to speak
        pytest.skip(str(error))
    tower = next(module for module in loaded.modules() if isinstance(module, CLIPMoEVisionModel))
    if hasattr(loaded, "set_attn_implementation"):  # before, a parent does not hand it down
        assert tower.config._attn_implementation == asked
    assert tower(PIXELS).last_hidden_state.shape == (2, 17, 32)


@pytest.mark.parametrize("reentrant", [True, False, None])
@pytest.mark.parametrize("fields, trains", [({}, "everything"), ({}, "last block"), (MOE, "everything"),
                                            (MOE, "routers"), (MOE, "last block")])
def test_gradient_checkpointing_changes_nothing(fields, reentrant, trains):
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = whole(**fields, expert_dropout=0.3 if fields else 0.0, router_z_loss_coef=0.01).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_({"everything": True, "routers": ".router." in name,
                                      "last block": ".layers.2." in name}[trains])
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            if reentrant is None:
                enable()
            else:
                (kwargs_name,) = [name for name in inspect.signature(enable).parameters if name.endswith("kwargs")]
                enable(**{kwargs_name: {"use_reentrant": reentrant}})
        runs: list[nn.Module] = []
        for module in model.vision_model.modules():
            if isinstance(module, Router):
                module.register_forward_hook(lambda router, *_, runs=runs: runs.append(router))
        torch.manual_seed(1)
        output = model(IDS, PIXELS)
        losses = [output.logits_per_image.diagonal().mean(), output.vision_model_output.aux_loss,
                  output.text_model_output.aux_loss]
        sum(losses).backward()
        results.append((losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, runs))
    (losses, gradients, once), (again, found, twice) = results
    same(again, losses)
    assert found.keys() == gradients.keys() and len(gradients) > 1
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)
    if trains == "last block":
        assert len(twice) == len(once) + (1 if fields else 0)  # frozen blocks below are not computed again


@pytest.mark.skipif(torch.__version__ < "2.6", reason="torch 2.0 does not compile under Python 3.11")
@pytest.mark.parametrize("fields, trains, calls", [
    ({}, "everything", [None, [0, -2]]),
    ({**MOE, "first_moe_layer": 0}, "routers", [True, -2]),
    ({**MOE, "balance_bias": True, "base_gate": True, "router_z_loss_coef": 0.1}, "everything", [None]),
    ({**MOE, **SIGLIP}, "everything", [None]),
], ids=["dense", "moe", "beyond_paper", "siglip"])
def test_tower_compiles_as_one_graph(fields, trains, calls):
    model = vision(**{"num_hidden_layers": 2, **fields}).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains == "everything" or ".router." in name)
    for wanted in calls:
        torch._dynamo.reset()
        results = []
        for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
            model.zero_grad()
            output = function(PIXELS, output_hidden_states=wanted)
            loss = output.last_hidden_state.square().mean() + output.aux_loss
            if loss.requires_grad:
                loss.backward()
            results.append((output, [p.grad for p in model.parameters() if p.grad is not None and p.grad.any()]))
        (eager, gradients), (compiled, found) = results
        assert type(compiled) is type(eager) and compiled.keys() == eager.keys()
        same(tensors(compiled), tensors(eager), 1e-4)
        same(found, gradients, 1e-4)
        assert gradients


@pytest.mark.skipif(torch.__version__ < "2.6", reason="torch 2.0 does not compile under Python 3.11")
def test_compiled_tower_takes_pictures_of_another_size():
    model = vision(num_hidden_layers=1)
    pixels = torch.randn(1, 3, 48, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        same(tensors(compiled(pixels, interpolate_pos_encoding=True)),
             tensors(model(pixels, interpolate_pos_encoding=True)), 1e-4)


# --- positions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("size", [(32, 32), (48, 48), (16, 40), (24, 24)])
def test_pictures_of_another_size_give_transformers_features(family, size):
    name = {"clip": "CLIPVision", "siglip": "SiglipVision"}[family]
    reference = getattr(transformers, f"{name}Model", None)
    if reference is None or "interpolate_pos_encoding" not in inspect.signature(reference.forward).parameters:
        reference = None
    ours = vision(**(SIGLIP if family == "siglip" else {}))
    pixels = torch.randn(2, 3, *size)
    found = ours(pixels, interpolate_pos_encoding=True).last_hidden_state
    tokens = size[0] // 8 * (size[1] // 8) + (family == "clip")
    assert found.shape == (2, tokens, 32)
    if size == (32, 32):
        assert torch.equal(found, ours(pixels).last_hidden_state)
    if reference is None:
        pytest.skip("this transformers has no interpolation of positions to compare with")
    sizes = {key: value for key, value in TOWER.items() if key != "initializer_range"}
    config = getattr(transformers, f"{name}Config")(**sizes, **VISION, hidden_act="quick_gelu", layer_norm_eps=1e-5,
                                                    **({"vision_use_head": False} if family == "siglip" else {}))
    theirs = reference(config).eval()
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in theirs.state_dict()) else ""
    state = {prefix + key: tensor for key, tensor in ours.vision_model.state_dict().items()}
    missing, _ = theirs.load_state_dict(state, strict=False)
    assert all("position_ids" in key for key in missing)
    expected = theirs(pixels, interpolate_pos_encoding=True).last_hidden_state
    if family == "siglip":  # theirs is behind the final norm
        found = ours.vision_model.post_layernorm(found)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_interpolated_positions_keep_dtype_class_token_and_gradient():
    weight = torch.randn(17, 8, dtype=torch.bfloat16, requires_grad=True)
    found = interpolate_positions(weight, 1, (4, 4), (6, 5))
    assert found.shape == (31, 8) and found.dtype is torch.bfloat16 and torch.equal(found[0], weight[0])
    exact = interpolate_positions(weight.float(), 1, (4, 4), (6, 5))
    torch.testing.assert_close(found, exact.to(torch.bfloat16), rtol=0, atol=0)  # float32 inside, rounded once
    found.float().square().sum().backward()
    assert weight.grad.any(1).all()
    oblong = torch.arange(6.0).view(2, 3)  # columns grow, and so they do in the new grid
    grown = interpolate_positions(oblong.view(6, 1), 0, (2, 3), (2, 6)).view(2, 6)
    assert (grown.diff(dim=1) > 0).all() and (grown[1] > grown[0]).all()
    with pytest.raises(ValueError, match="17 positions are not those of 0 class tokens and a grid of 4x4"):
        interpolate_positions(weight, 0, (4, 4), (6, 5))


def test_pictures_of_a_wrong_size_are_refused():
    model = vision()
    with pytest.raises(ValueError, match="32x32 pixels, got 40x32.*interpolate_pos_encoding=True"):
        model(torch.randn(1, 3, 40, 32))
    with pytest.raises(ValueError, match="44x32 pixels cannot be cut into patches of 8x8.*multiples of 8"):
        model(torch.randn(1, 3, 44, 32), interpolate_pos_encoding=True)
    # A size of the tower's own that is no multiple (SigLIP's 384 with patch 14) loses a rim, as in transformers.
    assert vision(image_size=35)(torch.randn(1, 3, 35, 35)).last_hidden_state.shape == (1, 17, 32)


# --- quantisation --------------------------------------------------------------------------------------------------


class Opaque(nn.Module):
    """What 8- and 4-bit libraries put in the place of a linear layer: its weight is not to be looked at."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.hidden = [layer]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.hidden[0](inputs)


@both_classes
@dense_and_moe
def test_linear_layers_may_be_replaced_by_quantised_ones(make, fields):
    model = make(**fields, balance_bias=bool(fields), base_gate=bool(fields))
    expected = outputs(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                assert not isinstance(child, Router)
                setattr(module, name, Opaque(child))
    same(outputs(model), expected)
