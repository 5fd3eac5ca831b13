"""The benchmarks: what the encoder's compares computes the same, runs and fills in its document; the data's verdict."""

import json

import pytest
import torch

from benchmarks import encoder, encoder_data
from clipmoe_vlm import CLIPMoEConfig, CLIPMoEVisionModel
from clipmoe_vlm.runs import UserError


@pytest.mark.parametrize("loop", [encoder.MaskedLoop, encoder.EveryExpert])
def test_loops_compute_the_same_on_the_same_memory(tiny_config, loop):
    ours = CLIPMoEVisionModel(CLIPMoEConfig(**tiny_config(num_experts=4, num_experts_per_tok=2)).vision_config)
    plain = encoder.with_loops(ours, loop)
    pixels, gradients = torch.randn(3, 3, 32, 32), []
    for model in (ours, plain):
        output = model(pixels).pooler_output
        output.backward(torch.ones_like(output))
        experts = model.vision_model.encoder.layers[0].mlp.experts
        fc1 = experts.fc1_weight.grad if model is ours else torch.stack([expert[0].grad for expert in experts])
        gradients.append((output, fc1, model.vision_model.embeddings.patch_embedding.weight.grad))
        model.zero_grad()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        ours.vision_model.encoder.layers[0].mlp.experts.fc1_weight.zero_()
    assert not plain.vision_model.encoder.layers[0].mlp.experts[3][0].any()


def test_it_runs_and_writes_between_the_marks(tmp_path, capsys):
    document = tmp_path / "performance.md"
    document.write_text(f"before\n{encoder.MARKS[0]}\nold\n{encoder.MARKS[1]}\nafter\n")
    encoder.main([str(document), f"json={tmp_path / 'b.json'}", "layers=1", "pictures=1", "pairs=2", "repeats=1"])
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("met |") + text.count("missed |") == 4
    table = capsys.readouterr().out.strip()
    assert table in text
    values = json.loads((tmp_path / "b.json").read_text())
    assert values["largest_difference"] < 1e-5 and len(values["seconds"]) == 12
    assert 1.5 < values["flop_ratio"]["forward"] < 1.7


def test_a_document_without_marks_is_refused_before_anything_is_timed(tmp_path):
    with pytest.raises(UserError, match="needs the lines"):
        encoder.main([str(tmp_path / "README.md")])


@pytest.mark.parametrize(("most", "workers", "says"), [
    (190.0, 4, "The model is the bottleneck: with workers=4 the loader delivers 190.0 samples/s, the model takes 100."),
    (190.0, 1, "loader delivers 50.0 samples/s, the model takes 100.0; workers=4 would do."),
    (90.0, 1, "the most here is 90.0 with workers=4, so more cores or smaller pictures are needed."),
])
def test_the_benchmarks_verdict(most, workers, says):
    assert says in encoder_data.verdict({1: 50.0, 4: most}, 100.0, workers)
