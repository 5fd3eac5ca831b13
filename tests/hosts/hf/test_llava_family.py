"""CLIP-MoE as the tower of Llava, LLaVA-NeXT and VipLlava: what a user of transformers does with such a model."""

import copy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from llava_family import (
    CLASSES,
    KINDS,
    PROCESSOR_EXPANDS,
    QUESTION,
    SIZES,
    VERSION,
    answer,
    ask,
    logits_of,
    loss_of,
    make_processor,
    make_vlm,
    picture,
    tower_config,
)
from transformers import AutoProcessor, CLIPVisionConfig, pipeline

from clipmoe_vlm.moe import Router
from clipmoe_vlm.vlm import body, save_vlm, set_tower

ROOT = Path(__file__).parents[3]
LISTS = pytest.mark.skipif(VERSION < (5, 0), reason="several layers at once are newer")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a saved VLM with a CLIP-MoE tower, made once a kind."""
    folders = {}

    def make(kind: str) -> Path:
        if kind not in folders:
            model = make_vlm(kind)
            folders[kind] = tmp_path_factory.mktemp(kind) / "vlm"
            save_vlm(model, make_processor(model), folders[kind])
        return folders[kind]

    return make


def load(kind: str, folder: Path, **kwargs):
    return getattr(transformers, f"{CLASSES[kind]}ForConditionalGeneration").from_pretrained(folder, **kwargs).eval()


# --- equality ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [-2, -1, 0, 2, pytest.param([-2, 0, 3], marks=LISTS)])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_a_dense_tower_gives_the_logits_of_transformers_clip(layer, strategy, tmp_path):
    model = make_vlm("llava", CLIPVisionConfig(**SIZES), vision_feature_layer=layer,
                     vision_feature_select_strategy=strategy)
    inputs = ask(make_processor(model), 3, 5)
    theirs = logits_of(model, inputs, output_hidden_states=True)  # without, transformers' own tower forgets layer 0
    body(model).vision_tower.save_pretrained(tmp_path / "clip")
    set_tower(model, tmp_path / "clip")
    assert model.config.vision_config.model_type == "clip_moe_vision_model"
    torch.testing.assert_close(logits_of(model, inputs), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_so_it_does_in_the_other_hosts(kind, tmp_path):
    model = make_vlm(kind, CLIPVisionConfig(**SIZES))
    inputs = ask(make_processor(model), 3, 5)
    theirs = logits_of(model, inputs)
    body(model).vision_tower.save_pretrained(tmp_path / "clip")
    set_tower(model, tmp_path / "clip")
    torch.testing.assert_close(logits_of(model, inputs), theirs, rtol=1e-5, atol=1e-5)


def test_hidden_states_of_the_language_model_do_not_disturb_the_tower():
    model = make_vlm("llava")
    inputs = ask(make_processor(model))
    plain = logits_of(model, inputs)
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    torch.testing.assert_close(output.logits[:, -6:], plain)
    assert len(output.hidden_states) == 3  # the language model's two layers


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["routers", "projector", "everything"])
def test_training_moves_what_it_should_and_lowers_the_loss(kind, part):
    model = make_vlm(kind)
    inputs = ask(make_processor(model), 3, 5)
    trained = {name: part == "everything" or (part == "projector" and "multi_modal_projector" in name)
               for name, _ in model.named_parameters()}
    if part == "routers":
        routers = {id(module.weight) for module in body(model).vision_tower.modules() if isinstance(module, Router)}
        trained = {name: id(parameter) in routers for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])
    before = copy.deepcopy(dict(model.named_parameters()))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = loss_of(model, inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved <= {name for name, trains in trained.items() if trains}
    # Hidden state -2 of three blocks: the last block and what follows see no gradient, but in VipLlava, which takes -1.
    routers = [name for name in moved if name.endswith("mlp.router.weight")]
    assert len(routers) == (0 if part == "projector" else 3 if kind == "vipllava" else 2)
    assert any("multi_modal_projector" in name for name in moved) == (part != "routers")


@pytest.mark.skipif(VERSION < (4, 37), reason="transformers 4.36 cannot take labels beside a picture")
@pytest.mark.parametrize("kind", KINDS)
def test_labels_give_a_loss_that_reaches_the_routers(kind):
    model = make_vlm(kind).train()
    inputs = ask(make_processor(model), 3)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 1200, -100)
    # What Trainer adds, and today's Llava hands down to the tower.
    trainer = {"num_items_in_batch": torch.tensor(4)} if VERSION >= (5, 0) else {}
    model(**inputs, labels=labels, **trainer).loss.backward()
    router = next(module for module in body(model).vision_tower.modules() if isinstance(module, Router))
    assert router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing(kind):
    model = make_vlm(kind).train()
    inputs = ask(make_processor(model), 3, 5)
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert body(model).vision_tower.vision_model.encoder.gradient_checkpointing
        loss_of(model, inputs).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


# --- saving and loading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_answers_as_before(kind, saved):
    model, folder = make_vlm(kind), saved(kind)
    inputs = ask(make_processor(model), 3, 5)
    again = load(kind, folder)
    torch.testing.assert_close(logits_of(again, inputs), logits_of(model, inputs), rtol=0, atol=0)
    assert torch.equal(answer(again, inputs), answer(model, inputs))
    loaded = ask(AutoProcessor.from_pretrained(folder), 3, 5)
    assert {name: torch.equal(torch.as_tensor(value), torch.as_tensor(inputs[name]))
            for name, value in loaded.items()} == dict.fromkeys(inputs, True)


def test_a_fresh_process_answers_as_this_one(saved, tmp_path):
    """All kinds of this version in one process, which knows the towers from `import clipmoe_vlm` alone."""
    kinds = [kind for kind, name in CLASSES.items() if hasattr(transformers, f"{name}Config")]
    expected = {}
    for kind in kinds:
        model = load(kind, saved(kind))
        expected[kind] = (saved(kind), answer(model, ask(make_processor(model))))
    torch.save(expected, tmp_path / "expected.pt")
    picture().save(tmp_path / "picture.png")
    program = textwrap.dedent("""
        import sys, torch, transformers, clipmoe_vlm
        from PIL import Image
        folder, question = sys.argv[1:3]
        options = {"weights_only": False} if torch.__version__ >= "2.6" else {}
        for kind, (vlm, answer) in torch.load(folder + "/expected.pt", **options).items():
            name = dict(zip(sys.argv[3::2], sys.argv[4::2]))[kind]
            model = getattr(transformers, name + "ForConditionalGeneration").from_pretrained(vlm)
            processor = transformers.AutoProcessor.from_pretrained(vlm)
            inputs = processor(images=[Image.open(folder + "/picture.png")], text=[question], return_tensors="pt")
            got = model.generate(**inputs, do_sample=False, max_new_tokens=6, min_new_tokens=6)
            assert torch.equal(got, answer), (kind, got, answer)
    """)
    names = [word for kind in kinds for word in (kind, CLASSES[kind])]
    subprocess.run([sys.executable, "-c", program, str(tmp_path), QUESTION, *names], check=True, timeout=120, cwd=ROOT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offload", [False, True])
def test_device_map(kind, offload, saved, tmp_path):
    """With `auto` and little memory, blocks of the tower wait on the disk until they are needed."""
    inputs = ask(make_processor(make_vlm(kind)), 3, 5)
    expected = logits_of(load(kind, saved(kind)), inputs)
    # Less than half of the model, of which room for its largest layer is kept free: not even the tower fits.
    options = {"max_memory": {"cpu": 300_000}, "offload_folder": str(tmp_path)} if offload else {}
    model = load(kind, saved(kind), device_map="auto", **options)
    if offload:
        places = {str(place) for name, place in model.hf_device_map.items() if "vision_tower" in name}
        assert places == {"cpu", "disk"}
    torch.testing.assert_close(logits_of(model, inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_implementations_agree(kind, implementation, saved):
    if implementation == "sdpa" and VERSION < (4, 37):
        pytest.skip("Llava of transformers 4.36 has no sdpa")
    model = make_vlm(kind)
    inputs = ask(make_processor(model), 3, 5)
    again = load(kind, saved(kind), attn_implementation=implementation)
    if VERSION >= (5, 0):
        assert body(again).vision_tower.config._attn_implementation == implementation
    torch.testing.assert_close(logits_of(again, inputs), logits_of(model, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind, saved):
    inputs = ask(make_processor(make_vlm(kind)), 3)
    expected = logits_of(load(kind, saved(kind)), inputs)
    model = load(kind, saved(kind), torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    logits = logits_of(model, inputs)
    # Experts are chosen anew at rounding's mercy, so only the bulk agrees.
    assert (logits.float() - expected).abs().median() < 0.1 * expected.std()
    assert answer(model, inputs).shape[0] == 1


@pytest.mark.skipif(VERSION < (4, 37), reason="torch 2.0 cannot compile under Python 3.11")
def test_a_compiled_tower_gives_the_same():
    model = make_vlm("llava")
    inputs = ask(make_processor(model), 3, 5)
    expected = logits_of(model, inputs)
    tower = body(model).vision_tower
    tower.forward = torch.compile(tower.forward, backend="aot_eager")
    torch.testing.assert_close(logits_of(model, inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_pipeline(kind, saved):
    folder = str(saved(kind))
    if PROCESSOR_EXPANDS:
        ask_pipeline = pipeline("image-text-to-text", model=folder, device="cpu")
        output = ask_pipeline(images=picture(), text=QUESTION, max_new_tokens=6, min_new_tokens=6, do_sample=False,
                              return_full_text=False)
    else:
        ask_pipeline = pipeline("image-to-text", model=folder)
        output = ask_pipeline(picture(), prompt=QUESTION,
                              generate_kwargs={"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False})
    model = load(kind, folder)
    processor = make_processor(model)
    inputs = ask(processor)
    ids = answer(model, inputs)[0]
    ids = ids[inputs["input_ids"].shape[1]:] if PROCESSOR_EXPANDS else ids
    assert output[0]["generated_text"].strip() == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("tower", [{}, {"num_experts": 1, "num_experts_per_tok": 1}])
def test_dense_and_moe_towers_save_alike(tower, tmp_path):
    model = make_vlm("llava", tower_config(**tower))
    processor = make_processor(model)
    save_vlm(model, processor, tmp_path / "vlm")
    again = load("llava", tmp_path / "vlm")
    assert torch.equal(answer(again, ask(processor)), answer(model, ask(processor)))
