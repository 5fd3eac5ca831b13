"""A micro-batch in one row, in padded rows and sample by sample: the same losses and gradients."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from llava_runs import LLAVA_TRAIN, settings
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoTokenizer, Lfm2Config, LlavaForConditionalGeneration, MambaConfig, MistralConfig

from clipmoe_vlm.runs import UserError
from clipmoe_vlm.vlm import tokens_per_picture
from train_vlm.attention import attend_per_sample, row_arguments
from train_vlm.data import Collator, make_dataset
from train_vlm.loss import LabelLoss, VLMLoss
from train_vlm.model import build
from train_vlm.samples import read_samples
from train_vlm.tuning import set_trainable

IMAGES = str(LLAVA_TRAIN / "images")
PICTURES = {"id": "two", "image": [f"{IMAGES}/scene01.png", f"{IMAGES}/scene02.png"], "conversations": [
    {"from": "human", "value": "First <image>, then <image>: what changed?"}, {"from": "gpt", "value": "The colour."}]}
BROKEN = {"id": "broken", "image": "missing.png", "conversations": [
    {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Nothing."}]}
# Numbers are those of stage2.json: 0, 1, 3, 4 have a picture, 2, 5 none.
BATCHES = {"one picture and text": [0, 2, 3], "several pictures": [PICTURES, 5, 1], "text alone": [2, 5],
           "a skipped sample": [4, BROKEN, 2], "one sample": [1], "nothing usable": [BROKEN, BROKEN]}


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    """The model with everything trainable, and a function from samples to items."""
    torch.manual_seed(0)
    config = settings("unused", tower="full")
    model, processor = build(config)
    set_trainable(model, config)
    samples = read_samples(config.data, config.image_folder, tmp_path_factory.mktemp("index"))

    def items(names):
        chosen = [samples[name] if isinstance(name, int) else name for name in names]
        dataset, _ = make_dataset(config, chosen, model, processor)
        return [dataset[index] for index in range(len(dataset))]

    return model, items


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def plain_loss(model, items):
    """Each sample alone through transformers' model, with logits at every position."""
    total = torch.zeros(())
    for item in items:
        if "problem" in item:
            continue
        pictures = {"pixel_values": item["pictures"]} if "pictures" in item else {}
        logits = model(input_ids=item["input_ids"].unsqueeze(0), use_cache=False, **pictures).logits
        vocabulary = model.config.image_token_id  # its row is appended and has no part in the softmax
        total = total + F.cross_entropy(logits[0, :-1, :vocabulary], item["labels"][1:], reduction="sum")
    return total


def collate(items, packing):
    return Collator(0, torch.zeros(1, 3, 56, 56), packing)(items)


@pytest.mark.parametrize("names", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_and_padded_equal_each_sample_alone(vlm, names, attention):
    model, items = vlm
    batch = items(names)
    found = {}
    for packing in (True, False):
        made = collate(batch, packing)
        assert len(made["inputs"]["input_ids"]) == 1 or not packing
        found[packing] = VLMLoss(model)(**made["inputs"])[0]
        assert made["counts"]["skipped"] == sum(name is BROKEN for name in names)
        found[packing] = found[packing].item(), gradients(model, found[packing])
    model.model.language_model.set_attn_implementation(attention)
    expected = plain_loss(model, batch)
    expected = expected.item(), gradients(model, expected) if expected.requires_grad else {}
    model.model.language_model.set_attn_implementation("sdpa_per_sample")
    for loss, grads in found.values():
        assert loss == pytest.approx(expected[0], rel=1e-5)
        assert grads.keys() >= expected[1].keys()
        largest = max([grad.abs().max() for grad in expected[1].values()], default=torch.tensor(1.0))
        for name, grad in grads.items():  # what the plain way leaves out (the tower, for text alone) is zero
            other = expected[1].get(name, torch.zeros(()))
            assert (grad - other).abs().max() <= 1e-5 * largest, name


def test_a_sample_in_the_row_does_not_see_the_others(vlm):
    model, items = vlm
    inputs = collate(items([0, 2, PICTURES, 5]), packing=True)["inputs"]
    ends = torch.tensor(inputs["sample_lengths"]).cumsum(0)
    sample = torch.bucketize(inputs["label_positions"], ends, right=True)

    def each(inputs):
        with torch.no_grad():
            return torch.stack([VLMLoss(model)(**inputs | {
                "label_positions": inputs["label_positions"][i:i + 1], "targets": inputs["targets"][i:i + 1]})[0]
                for i in range(len(sample))])

    before = each(inputs)
    other = inputs["input_ids"].clone()
    text = (other != model.config.image_token_id)[0]
    for changed, (start, end) in enumerate(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)):
        ids = other.clone()
        ids[0, start:end] = torch.where(text[start:end], (ids[0, start:end] + 7) % 1000, ids[0, start:end])
        moved = each(inputs | {"input_ids": ids}) != before
        assert moved[sample == changed].all() and not moved[sample != changed].any()


def test_windows_of_attention_slide_within_a_sample():
    torch.manual_seed(0)
    model = AutoModel.from_config(MistralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=3)).eval()
    ids, lengths = torch.randint(0, 50, (1, 12)), [2, 7, 3]
    alone = torch.cat([model(input_ids=part).last_hidden_state for part in ids.split(lengths, dim=1)], dim=1)
    attend_per_sample(model)
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    row = model(input_ids=ids, position_ids=positions, **row_arguments(lengths, alone)).last_hidden_state
    torch.testing.assert_close(row, alone, atol=1e-6, rtol=1e-5)


SMALL = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2)


@pytest.mark.parametrize("config, words", [
    # Short convolutions between attention layers.
    (Lfm2Config(**SMALL, num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"]),
     "Lfm2Model lets samples in one row see each other"),
    (MambaConfig(**SMALL, state_size=4), "MambaModel does not take an attention from outside"),
], ids=["convolution", "state"])
def test_a_language_model_that_mixes_samples_is_refused(config, words):
    with pytest.raises(UserError, match=f"packing: {words}.* set packing: false"):
        attend_per_sample(AutoModel.from_config(config).eval())


def test_a_packing_model_generates_and_saves_as_any_other(vlm, tmp_path):
    model = vlm[0].eval()
    tokenizer = AutoTokenizer.from_pretrained(LLAVA_TRAIN / "llama", padding_side="left")
    tokenizer.pad_token = tokenizer.unk_token
    inputs = tokenizer(["What is blue?", "Name an animal that can swim, and a fruit."], padding=True,
                       return_tensors="pt")
    options = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.model.language_model.config._attn_implementation == "sdpa"
    for ours, theirs in zip(model.generate(**inputs, **options).logits, again.generate(**inputs, **options).logits,
                            strict=True):
        torch.testing.assert_close(ours, theirs)


class Largest(TorchDispatchMode):
    """The largest number of rows of logits that any operation gives."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and result.shape[-1:] == (self.vocabulary,):
            self.rows = max(self.rows, result.numel() // self.vocabulary)
        return result


@pytest.mark.parametrize("head_trains", [True, False])
@pytest.mark.parametrize("count", [1, 8, 50])
def test_label_loss_in_chunks(monkeypatch, head_trains, count):
    monkeypatch.setattr(LabelLoss, "CHUNK", 8)
    torch.manual_seed(0)
    head, targets = torch.nn.Linear(4, 101, bias=False), torch.randint(0, 100, (count,))
    head.weight.requires_grad_(head_trains)
    states = torch.randn(count, 4, requires_grad=True)
    wanted = [states, head.weight] if head_trains else [states]
    with Largest(100) as seen:
        loss = LabelLoss(head, 100)(states, targets)
        found = torch.autograd.grad(loss, wanted)
    with Largest(100) as seen_plain:
        plain = F.cross_entropy(head(states)[:, :100], targets, reduction="sum")
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    torch.testing.assert_close(found, torch.autograd.grad(plain, wanted), rtol=1e-5, atol=1e-5)
    assert seen.rows <= 8 and seen_plain.rows == count


def test_what_is_frozen_keeps_nothing_for_the_backward(tmp_path):
    """Stage 1: the gradient passes through the language model to the projector, and no weight of it gets one."""
    config = settings(tmp_path, llm_tuning="frozen")
    model, processor = build(config)
    set_trainable(model, config)
    kept = set()

    def keep(tensor):
        kept.add(tensor.data_ptr())
        return tensor

    tower = model.model.vision_tower
    pixels = torch.randn(1, 3, 56, 56)
    ids = torch.tensor([[1, *[model.config.image_token_id] * tokens_per_picture(model.config), 5, 6]])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, *_ = VLMLoss(model)(ids, torch.tensor([ids.shape[1] - 2]), torch.tensor([6]), pixels, 1)
    assert not kept & {parameter.data_ptr() for parameter in tower.parameters()}
    assert not tower(pixels).last_hidden_state.requires_grad
    loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == {
        name for name, parameter in model.named_parameters() if "multi_modal_projector" in name}


@pytest.mark.parametrize("packing", [True, False])
def test_nothing_waits_for_the_device(vlm, packing):
    """Tensors without numbers refuse whatever would have to read one on the host."""
    model, items = vlm
    inputs = collate(items([0, 2, PICTURES]), packing)["inputs"]
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        loss, router_losses, _ = VLMLoss(model)(
            **{name: fake.from_tensor(value) if isinstance(value, torch.Tensor) else value
               for name, value in inputs.items()})
        torch.autograd.grad(loss + router_losses.sum(), [model.lm_head.weight])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it is no error")
def test_liger_needs_a_gpu():
    with pytest.raises(UserError, match="liger: true needs a GPU"):
        build(settings(Path("unused"), liger=True))
