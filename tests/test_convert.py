"""Converters: equal outputs to the model that a folder came from, exact round trips, one sentence for wrong sources."""

import contextlib
import io
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

import convert_cases
import pytest
import torch
import torch.nn.functional as F
from convert_cases import architecture, open_clip_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPModel as HFCLIPModel

from clipmoe_vlm import CLIPMoEModel
from clipmoe_vlm.__main__ import main
from clipmoe_vlm.convert import (
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


def hf_clip(folder: Path) -> HFCLIPModel:
    torch.manual_seed(0)
    return convert_cases.hf_clip()(folder).model


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


# --- open_clip -----------------------------------------------------------------------------------------------------


def test_architecture_by_open_clips_name(tmp_path):
    import open_clip

    theirs = open_clip.create_model("ViT-S-32", pretrained=None)
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    ours = load_dense(tmp_path / "weights.pt", "ViT-S-32")
    assert ours.config.vision_config.activation == "gelu"
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
    (source / "config.json").write_text(json.dumps({"model_type": "siglip2"}))
    refused("model_type 'siglip2' (SigLIP 2 NaFlex, which takes pictures of any shape); supported are", source)
    values = {"model_type": "siglip", "vision_config": {"vision_use_head": False}}
    (source / "config.json").write_text(json.dumps(values))
    refused("without its pooling head (vision_use_head: false); supported are", source)


def test_weights_of_another_architecture_are_refused(tmp_path):
    values = architecture()
    state = open_clip_model(values).state_dict()
    torch.save(state, tmp_path / "weights.pt")
    (tmp_path / "wider.json").write_text(json.dumps(architecture({"width": 64})))
    (tmp_path / "model.json").write_text(json.dumps(values))
    refused("do not fit the configuration", tmp_path / "weights.pt", "--architecture", tmp_path / "wider.json")
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
    hf_clip(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    refused("holds no weights", tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text("{")
    refused("not valid JSON", tmp_path / "hf")


class Touch:
    """Unpickled by Python's own pickle, it makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_no_pickled_code_runs(tmp_path):
    """Neither of torch's old format, nor of its archives, nor where one claims to be OpenAI's TorchScript."""
    made = tmp_path / "made"
    payload = {"visual.conv1.weight": torch.zeros(1), "extra": Touch(made)}
    torch.save(payload, tmp_path / "archive.pt")
    torch.save(payload, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(payload))
    for name in ("archive", "old"):
        refused("no plain archive of tensors: it holds the Python object ", tmp_path / f"{name}.pt")
    refused("not a readable weights file", tmp_path / "plain.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "script.pt") as archive, zipfile.ZipFile(tmp_path / "fake.pt", "w") as fake:
        for name in archive.namelist():
            content = archive.read(name)
            fake.writestr(name, pickle.dumps(Touch(made), 2) if name.endswith("data.pkl") else content)
    refused("not a readable weights file", tmp_path / "fake.pt")
    assert not made.exists()
    torch.load(tmp_path / "archive.pt", weights_only=False)
    assert made.exists()  # the payload would have worked


class Rebuilds(torch.nn.Module):
    """TorchScript that does something of its own when it is loaded."""

    @torch.jit.export
    def __getstate__(self) -> int:
        return 1

    @torch.jit.export
    def __setstate__(self, state: int) -> None:
        self.training = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_no_code_of_a_torchscript_archive_runs(tmp_path):
    torch.jit.save(torch.jit.script(Rebuilds()), tmp_path / "script.pt")
    refused("runs code of its own when it is loaded (__setstate__)", tmp_path / "script.pt")


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
    pixels = torch.randn(4, 3, 32, 32)
    expected = moe.eval().vision_model(pixels).pooler_output
    for vision in (tower, load_vision(tmp_path / "tower")):
        assert torch.equal(vision(pixels).pooler_output, expected)
