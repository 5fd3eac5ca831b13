"""Converters: equal outputs to the model that a folder came from, exact round trips, one sentence for wrong sources."""

import contextlib
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPImageProcessor
from transformers import CLIPModel as HFCLIPModel

from clipmoe_vlm import CLIPMoEModel
from clipmoe_vlm.__main__ import main
from clipmoe_vlm.convert import (
    clip_tokenizer,
    convert,
    load_dense,
    load_model,
    load_vision,
    processors_of,
    save_folder,
    save_official,
)
from clipmoe_vlm.upcycling import upcycle

REFERENCE = Path(__file__).parent / "reference"
GOLDEN = {"golden_full": 2, "golden_lastlayers": 1}


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    file = REFERENCE / "clip_moe" / f"{name}.safetensors"
    with safe_open(file, "pt") as stream:
        return load_file(file), json.loads(stream.metadata()["config"])


def write_official(name: str, file: Path) -> dict[str, torch.Tensor]:
    tensors, _ = golden(name)
    state = {key[len("state."):]: tensor for key, tensor in tensors.items() if key.startswith("state.")}
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)
    return state


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def command(*arguments: str | Path) -> subprocess.CompletedProcess:
    """The command line, in this process (importing torch anew for each call takes seconds)."""
    words = ["clipmoe_vlm", *map(str, arguments)]
    code = 0
    with (mock.patch.object(sys, "argv", words), contextlib.redirect_stdout(io.StringIO()) as output,
          contextlib.redirect_stderr(io.StringIO()) as errors):
        try:
            main()
        except SystemExit as end:
            code = end.code
    return subprocess.CompletedProcess(words, code, output.getvalue(), errors.getvalue())


def test_command_line_in_a_process_of_its_own(tmp_path):
    write_official("golden_full", tmp_path / "official.pt")
    words = [sys.executable, "-m", "clipmoe_vlm", "convert", str(tmp_path / "official.pt"), str(tmp_path / "folder")]
    done = subprocess.run([*words, "--top-k", "2"], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert "4 experts (top 2) from block 0 on" in done.stdout
    assert (tmp_path / "folder" / "model.safetensors").is_file()


# --- the official CLIP-MoE -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_official_state_dict_gives_the_official_outputs_losses_and_router_gradients(name, tmp_path):
    write_official(name, tmp_path / "official.safetensors")
    done = command("convert", tmp_path / "official.safetensors", tmp_path / "folder", "--top-k", GOLDEN[name])
    assert done.returncode == 0, done.stderr
    reference, sizes = golden(name)
    model = CLIPMoEModel.from_pretrained(tmp_path / "folder")
    for tower in (model.config.vision_config, model.config.text_config):
        assert (tower.num_experts, tower.num_experts_per_tok) == (sizes["num_experts"], sizes["top_k"])
    pixels, ids = reference["in.pixel_values"], reference["in.input_ids"]

    close(model.get_image_features(pixels), reference["out.image_features"])
    close(model.get_text_features(ids), reference["out.text_features"])
    vision = model.vision_model(pixels, output_hidden_states=True)
    assert len(vision.hidden_states) == sizes["vision_layers"] + 1
    for index, hidden in enumerate(vision.hidden_states):
        close(hidden, reference[f"out.vision_hidden.{index}"])
    # The official code runs text and pictures with the tokens first: its logits are [layers, T * B, E].
    for ours, theirs, batch in (
        (vision.router_logits, reference["out.image_router_logits"], len(pixels)),
        (model.text_model(ids).router_logits, reference["out.text_router_logits"], len(ids)),
    ):
        ours = torch.stack(ours)
        close(ours, theirs.view(len(ours), -1, batch, ours.shape[-1]).transpose(1, 2).flatten(1, 2))

    output = model(input_ids=ids, pixel_values=pixels)
    targets = torch.arange(len(ids))
    contrastive = (F.cross_entropy(output.logits_per_image, targets, label_smoothing=0.1)
                   + F.cross_entropy(output.logits_per_text, targets, label_smoothing=0.1)) / 2
    total = contrastive + 0.01 * (output.image_balance_loss + output.text_balance_loss / 2)
    close(contrastive, reference["out.contrastive_loss"].squeeze())
    close(output.image_balance_loss, reference["out.image_balance_loss"].squeeze())
    close(output.text_balance_loss, reference["out.text_balance_loss"].squeeze())
    close(total, reference["out.total_loss"].squeeze())
    total.backward()
    gradients = 0
    for official, ours in (("visual.transformer.resblocks", "vision_model"), ("transformer.resblocks", "text_model")):
        for block, layer in enumerate(model.get_submodule(ours).encoder.layers):
            expected = reference.get(f"grad.{official}.{block}.gate.weight")
            assert (expected is None) == (not hasattr(layer.mlp, "router"))
            if expected is not None:
                error = (layer.mlp.router.weight.grad - expected).norm() / expected.norm()
                assert error < 1e-4, f"{ours} block {block}: {error}"
                gradients += 1
    assert gradients == sum(key.startswith("grad.") for key in reference)


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_official_state_dict_comes_back_exactly(name, suffix, tmp_path):
    state = write_official(name, tmp_path / f"official{suffix}")
    convert(tmp_path / f"official{suffix}", tmp_path / "folder", top_k=GOLDEN[name])
    done = command("convert", tmp_path / "folder", tmp_path / f"back{suffix}", "--to", "official")
    assert done.returncode == 0, done.stderr
    assert f"num_experts={golden(name)[1]['num_experts']}" in done.stdout
    file = tmp_path / f"back{suffix}"
    back = load_file(file) if suffix == ".safetensors" else torch.load(file, weights_only=True)
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        # The official code reads rows 0-19 of the one table and the other rows of the other.
        rows = {"positional_embedding": slice(0, 20), "positional_embedding_res": slice(20, None)}.get(key, ...)
        assert torch.equal(back[key][rows], tensor[rows]), key
    # What we wrote gives the same model again, whichever of its position rows are read.
    assert torch.equal(back["positional_embedding"], back["positional_embedding_res"])
    convert(file, tmp_path / "again", top_k=GOLDEN[name])
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "folder" / "model.safetensors").read_bytes()


def test_half_precision_survives_the_round_trip(tmp_path):
    state = {key: tensor.half() for key, tensor in write_official("golden_full", tmp_path / "float32.pt").items()}
    torch.save({f"module.{key}": tensor for key, tensor in state.items()}, tmp_path / "half.pt")
    convert(tmp_path / "half.pt", tmp_path / "folder", top_k=2)
    convert(tmp_path / "folder", tmp_path / "back.pt", to="official")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items() if "positional" not in key)
    assert {tensor.dtype for tensor in back.values()} == {torch.float16}


def test_official_file_without_top_k_or_with_a_wrong_one_is_refused(tmp_path):
    write_official("golden_full", tmp_path / "official.pt")
    for top_k in (None, 0, 5):
        with pytest.raises(ValueError, match=r"4 experts.*--top-k 1\.\.4"):
            load_model(tmp_path / "official.pt", top_k=top_k)


# --- transformers' CLIPModel ---------------------------------------------------------------------------------------


def hf_clip(folder: Path, activation: str = "quick_gelu", eos_token_id: int = 98) -> HFCLIPModel:
    torch.manual_seed(0)
    sizes = {"intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_act": activation}
    config = CLIPConfig(
        text_config={"hidden_size": 32, "vocab_size": 99, "max_position_embeddings": 20, "eos_token_id": eos_token_id,
                     "bos_token_id": 97, "pad_token_id": 0, **sizes},
        vision_config={"hidden_size": 48, "image_size": 32, "patch_size": 8, **sizes},
        projection_dim=24,
    )
    model = HFCLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model


def texts_and_pictures() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, 97, (5, 20))
    for row, end in enumerate((3, 19, 7, 12, 1)):
        ids[row, end] = 98
        ids[row, end + 1:] = 0
    return ids, torch.randn(4, 3, 32, 32)


def features_of_hf(model: HFCLIPModel, ids: torch.Tensor, pixels: torch.Tensor) -> tuple:
    vision = model.vision_model(pixel_values=pixels, output_hidden_states=True)
    text = model.text_model(input_ids=ids)
    return (model.visual_projection(vision.pooler_output), model.text_projection(text.pooler_output),
            vision.hidden_states)


@pytest.mark.parametrize(("activation", "eos_token_id"), [("quick_gelu", 98), ("gelu", 98), ("gelu", 2)])
def test_hf_clip_folder_gives_the_same_features_and_hidden_states(activation, eos_token_id, tmp_path):
    theirs = hf_clip(tmp_path / "hf", activation, eos_token_id)
    ids, pixels = texts_and_pictures()
    image_features, text_features, hidden_states = features_of_hf(theirs, ids, pixels)
    convert(tmp_path / "hf", tmp_path / "ours")
    for ours in (load_dense(tmp_path / "hf"), CLIPMoEModel.from_pretrained(tmp_path / "ours")):
        close(ours.get_image_features(pixels), image_features)
        close(ours.get_text_features(ids), text_features)
        for mine, other in zip(ours.vision_model(pixels, output_hidden_states=True).hidden_states, hidden_states,
                               strict=True):
            close(mine, other)
        close(ours(input_ids=ids, pixel_values=pixels).logits_per_image,
              theirs(input_ids=ids, pixel_values=pixels).logits_per_image)


def test_sharded_and_torch_weights_are_read(tmp_path):
    theirs = hf_clip(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    state = load_file(tmp_path / "whole" / "model.safetensors")
    torch.save({**state, "text_model.embeddings.position_ids": torch.arange(20)[None]},
               tmp_path / "bin" / "pytorch_model.bin")
    expected = load_dense(tmp_path / "whole").state_dict()
    for folder in ("shards", "bin"):
        found = load_dense(tmp_path / folder).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_hf_folder_keeps_its_image_processor_and_tokenizer(tmp_path):
    hf_clip(tmp_path / "hf")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3],
                       image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path / "hf")
    clip_tokenizer(20).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ours")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert (list(processor.image_mean), processor.size["shortest_edge"]) == ([0.1, 0.2, 0.3], 32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert tokenizer("a photo")["input_ids"] == [49406, 320, 1125, 49407]
    assert tokenizer.model_max_length == 20
    # Not the one file that transformers 5 writes: that of LLaVA's users cannot read it.
    files = {path.name for path in (tmp_path / "ours").iterdir()}
    assert {"vocab.json", "merges.txt"} < files and "tokenizer.json" not in files


# --- open_clip -----------------------------------------------------------------------------------------------------


ARCHITECTURE = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 48, "head_width": 16, "patch_size": 8, "mlp_ratio": 2.0},
    "text_cfg": {"context_length": 20, "vocab_size": 99, "width": 32, "heads": 4, "layers": 2},
}


def open_clip_model(**changes):
    import open_clip

    torch.manual_seed(2)
    values = {**ARCHITECTURE, **changes}
    custom_text = values.pop("custom_text", False)
    model = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**values).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


def check_open_clip(ours: CLIPMoEModel, theirs: torch.nn.Module) -> None:
    ids, pixels = texts_and_pictures()
    blocks = []
    hooks = [block.register_forward_hook(lambda module, inputs, output: blocks.append(output))
             for block in theirs.visual.transformer.resblocks]
    close(ours.get_image_features(pixels), theirs.encode_image(pixels))
    close(ours.get_text_features(ids), theirs.encode_text(ids))
    for hook in hooks:
        hook.remove()
    hidden_states = ours.vision_model(pixels, output_hidden_states=True).hidden_states[1:]
    assert len(hidden_states) == len(blocks) == 3
    for mine, other in zip(hidden_states, blocks, strict=True):
        close(mine, other)
    close(ours.logit_scale, theirs.logit_scale)


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("custom_text", [True, False])
def test_open_clip_training_checkpoint_gives_the_same_outputs(quick_gelu, custom_text, tmp_path):
    theirs = open_clip_model(quick_gelu=quick_gelu, custom_text=custom_text)
    (tmp_path / "tiny.json").write_text(json.dumps({**ARCHITECTURE, "quick_gelu": quick_gelu}))
    state = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, tmp_path / "epoch_3.pt")
    check_open_clip(load_dense(tmp_path / "epoch_3.pt", str(tmp_path / "tiny.json")), theirs)
    done = command("convert", tmp_path / "epoch_3.pt", tmp_path / "ours", "--architecture", tmp_path / "tiny.json")
    assert done.returncode == 0, done.stderr
    assert "no tokenizer" in done.stdout
    check_open_clip(CLIPMoEModel.from_pretrained(tmp_path / "ours"), theirs)


@pytest.mark.parametrize("weights", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_open_clip_folder_with_its_vocabulary_and_preprocessing(weights, tmp_path):
    architecture = {**ARCHITECTURE, "text_cfg": {**ARCHITECTURE["text_cfg"], "vocab_size": 49408}}
    theirs = open_clip_model(**architecture)
    preprocess = {"size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bilinear",
                  "resize_mode": "shortest"}
    source = tmp_path / "open_clip"
    source.mkdir()
    (source / "open_clip_config.json").write_text(json.dumps({"model_cfg": architecture, "preprocess_cfg": preprocess}))
    if weights.endswith(".bin"):
        torch.save(theirs.state_dict(), source / weights)
    else:
        save_file(theirs.state_dict(), source / weights)
    convert(source, tmp_path / "ours")
    ours = CLIPMoEModel.from_pretrained(tmp_path / "ours")
    check_open_clip(ours, theirs)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.5] * 3, [0.25] * 3)
    assert (processor.size["shortest_edge"], processor.crop_size["height"], processor.resample) == (32, 32, 2)

    import open_clip

    captions = ["A photo of two cats' hats!!", "eleven   RED parrots, 12 (twelve) left of a café"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    expected = open_clip.SimpleTokenizer(context_length=20)(captions)
    # open_clip pads with 0, transformers with the end mark: neither is looked at by the text's feature.
    for ours_row, row in zip(ids, expected, strict=True):
        length = int(row.argmax()) + 1
        assert torch.equal(ours_row[:length], row[:length])
    close(ours.get_text_features(ids), theirs.encode_text(expected))


def test_architecture_by_open_clips_name(tmp_path):
    import open_clip

    theirs = open_clip.create_model("ViT-S-32", pretrained=None)
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    ours = load_dense(tmp_path / "weights.pt", "ViT-S-32")
    assert ours.config.vision_config.hidden_act == "gelu"
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        close(ours.get_image_features(pixels), theirs.eval().encode_image(pixels))


# --- refusals ------------------------------------------------------------------------------------------------------


def refused(match: str, source: Path, *arguments: str | Path) -> None:
    target = source.parent / "must_not_appear"
    done = command("convert", source, target, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert match in done.stderr
    assert not target.exists()


def test_missing_source_is_refused(tmp_path):
    refused("no such file or folder", tmp_path / "nothing")


def test_names_of_the_hub_are_looked_up(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    refused("no such model from the hub", Path("nobody/nothing"))
    cached = tmp_path / "cache" / "models--somebody--clip"
    theirs = hf_clip(cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    assert torch.equal(load_dense("somebody/clip").logit_scale, theirs.logit_scale)


def test_unknown_model_type_is_refused(tmp_path):
    source = tmp_path / "clip_moe_by_name_only"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    refused("model_type 'siglip'; supported are CLIP-MoE folders", source)


@pytest.mark.parametrize(("changes", "found"), [
    ({"vision_cfg": {"layers": [3, 4, 6, 3], "width": 64, "patch_size": None, "image_size": 32}}, "ResNet"),
    ({"vision_cfg": {"timm_model_name": "convnext_base", "image_size": 32}}, "convnext_base"),
    ({"vision_cfg": {**ARCHITECTURE["vision_cfg"], "attentional_pool": True}}, "attentional_pool"),
    ({"vision_cfg": {**ARCHITECTURE["vision_cfg"], "pool_type": "avg"}}, "pool_type = 'avg'"),
    ({"text_cfg": {"hf_model_name": "roberta-base"}}, "roberta-base"),
    ({"text_cfg": {**ARCHITECTURE["text_cfg"], "no_causal_mask": True}}, "no_causal_mask"),
])
def test_other_open_clip_architectures_are_refused(changes, found, tmp_path):
    torch.save(open_clip_model().state_dict(), tmp_path / "weights.pt")
    (tmp_path / "model.json").write_text(json.dumps({**ARCHITECTURE, **changes}))
    with pytest.raises(ValueError, match=f"{found}.*supported are"):
        load_dense(tmp_path / "weights.pt", str(tmp_path / "model.json"))


def test_weights_of_another_architecture_are_refused(tmp_path):
    state = open_clip_model().state_dict()
    torch.save(state, tmp_path / "weights.pt")
    wider = {**ARCHITECTURE, "vision_cfg": {**ARCHITECTURE["vision_cfg"], "width": 64}}
    (tmp_path / "model.json").write_text(json.dumps(wider))
    refused("do not fit the configuration", tmp_path / "weights.pt", "--architecture", tmp_path / "model.json")
    refused("needs --architecture", tmp_path / "weights.pt")
    refused("neither a file nor a name that open_clip knows", tmp_path / "weights.pt", "--architecture", "ViT-B-33")
    torch.save({**state, "visual.layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pt")
    refused("ResNet", tmp_path / "resnet.pt", "--architecture", "RN50")
    torch.save({**state, "extra": torch.zeros(1)}, tmp_path / "extra.pt")
    refused("for example extra", tmp_path / "extra.pt", "--architecture", tmp_path / "model.json")
    del state["visual.ln_post.bias"]
    torch.save(state, tmp_path / "missing.pt")
    refused("no tensor visual.ln_post.bias", tmp_path / "missing.pt", "--architecture", tmp_path / "model.json")


def test_unreadable_files_are_refused(tmp_path):
    (tmp_path / "text.pt").write_text("not weights")
    refused("not a readable weights file", tmp_path / "text.pt", "--top-k", "2")
    (tmp_path / "text.safetensors").write_text("not weights")
    refused("not a readable weights file", tmp_path / "text.safetensors", "--top-k", "2")
    torch.save({"numbers": [1, 2]}, tmp_path / "numbers.pt")
    refused("holds no state dict", tmp_path / "numbers.pt", "--top-k", "2")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("model/constants.pkl", "what a TorchScript archive has and a state dict has not")
    refused("TorchScript", tmp_path / "script.pt")
    hf_clip(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    refused("holds no weights", tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text("{")
    refused("not valid JSON", tmp_path / "hf")


def test_vision_tower_alone_has_no_text():
    with pytest.raises(ValueError, match="vision tower alone"):
        load_dense(REFERENCE / "llava_train" / "tower")
    assert load_vision(REFERENCE / "llava_train" / "tower").config.num_hidden_layers == 3


def test_moe_is_no_dense_base_and_options_must_apply(tmp_path):
    write_official("golden_full", tmp_path / "official.pt")
    convert(tmp_path / "official.pt", tmp_path / "moe", top_k=2)
    with pytest.raises(ValueError, match="CLIP-MoE already"):
        load_dense(tmp_path / "moe")
    with pytest.raises(ValueError, match="--top-k with an official"):
        load_model(tmp_path / "moe", top_k=2)


def test_target_that_is_no_model_folder_is_left_alone(tmp_path):
    hf_clip(tmp_path / "hf")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    with pytest.raises(ValueError, match="is no CLIP-MoE folder"):
        convert(tmp_path / "hf", tmp_path / "photos")
    with pytest.raises(ValueError, match="is the source itself"):
        convert(tmp_path / "hf", tmp_path / "hf")
    assert (tmp_path / "photos" / "cat.png").read_bytes() == b"cat"
    convert(tmp_path / "hf", tmp_path / "ours")
    convert(tmp_path / "hf", tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours", "photos"]


def test_models_that_the_official_code_cannot_hold_are_refused(tmp_path):
    hf_clip(tmp_path / "hf")
    dense = load_dense(tmp_path / "hf")
    with pytest.raises(ValueError, match="num_attention_heads of the vision tower"):
        save_official(dense, tmp_path / "official.pt")
    write_official("golden_full", tmp_path / "full.pt")
    golden_model = load_model(tmp_path / "full.pt", top_k=2)
    golden_model.config.text_config.first_moe_layer = 1
    with pytest.raises(ValueError, match="must start at block 0, not at 1"):
        save_official(golden_model, tmp_path / "official.pt")
    assert not (tmp_path / "official.pt").exists()


# --- our own folders -----------------------------------------------------------------------------------------------


def test_own_folder_is_read_back_exactly_and_its_vision_tower_alone(tmp_path):
    hf_clip(tmp_path / "hf")
    moe = upcycle([load_dense(tmp_path / "hf")] * 3, vision_first_moe_layer=1)
    image_processor, _ = processors_of(tmp_path / "hf")
    save_folder(moe, tmp_path / "moe", image_processor)
    again = load_model(tmp_path / "moe")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in moe.state_dict().items())
    tower = load_vision(tmp_path / "moe")
    tower.save_pretrained(tmp_path / "tower")
    _, pixels = texts_and_pictures()
    expected = moe.eval().vision_model(pixels).pooler_output
    for vision in (tower, load_vision(tmp_path / "tower")):
        assert torch.equal(vision(pixels).pooler_output, expected)
