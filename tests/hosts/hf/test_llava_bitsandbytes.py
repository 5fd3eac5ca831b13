"""An 8- or 4-bit language model under a CLIP-MoE tower in full precision."""

import pytest
import torch
from llava_family import KINDS, VERSION, answer, ask, logits_of, make_processor, make_vlm
from torch import nn
from transformers import BitsAndBytesConfig

from clipmoe_vlm.vlm import body, save_vlm

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.skipif(VERSION < (5, 0), reason="older transformers want a GPU for it")

# Names from the start: today's transformers reads "vision_tower" as the end of a name, and would quantise the tower.
KEEP = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_language_model(kind, bits, tmp_path):
    model = make_vlm(kind)
    processor = make_processor(model)
    inputs = ask(processor, 3, 5)
    expected = logits_of(model, inputs)
    save_vlm(model, processor, tmp_path / "vlm")
    settings = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, bnb_4bit_quant_type="nf4",
                                  llm_int8_skip_modules=KEEP)
    small = type(model).from_pretrained(tmp_path / "vlm", quantization_config=settings, device_map="cpu",
                                        dtype=torch.float32).eval()
    linears = [module for module in body(small).language_model.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 2 * 7
    assert all(type(module).__module__.startswith("bitsandbytes") for module in linears)
    for module in linears:  # on CPUs with bfloat16 it would repack weights, and fails for layers narrower than a block
        module.support_avx512bf16_for_cpu = False
    tower = body(small).vision_tower
    whole = body(model).vision_tower.state_dict()
    assert tower.state_dict().keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in tower.state_dict().items())
    logits = logits_of(small, inputs)
    assert torch.cosine_similarity(logits.flatten(), expected.flatten(), 0) > (0.99 if bits == 8 else 0.8)
    assert answer(small, inputs).shape[0] == 2
