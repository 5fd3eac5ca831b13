"""What the converter is tested on: small random models of every supported class, built by the library they come from.

`CASES` and `REFUSED` drive test_convert_cases.py, and `python -m tests.convert_cases` writes the README's table from
them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- made by python -m tests.convert_cases -->\n", "<!-- end -->\n"
VOCABULARY, PIXELS = 99, 32


@dataclass
class Source:
    """A source of weights, and what the library that made it computes.

    Attributes:
        path, architecture: as `convert.load_model` takes them.
        image, text: pixels, ids -> features, not normalised.
        vision_blocks, text_blocks: the modules whose outputs are the hidden states.
    """

    path: Path
    image: Callable[[Tensor], Tensor]
    text: Callable[[Tensor], Tensor]
    vision_blocks: nn.ModuleList
    text_blocks: nn.ModuleList
    model: nn.Module
    architecture: str | None = None


@dataclass
class Case:
    family: str
    given: str
    special: str
    build: Callable[[Path], Source]

    def __str__(self) -> str:
        return f"{self.family}: {self.special}"


def outputs_of_blocks(blocks: Iterable[nn.Module], run: Callable[..., Any], *arguments: Tensor
                      ) -> tuple[Any, list[Tensor]]:
    """What `run` returns, and each block's output."""
    outputs = []
    hooks = [block.register_forward_hook(lambda module, inputs, output: outputs.append(output)) for block in blocks]
    result = run(*arguments)
    for hook in hooks:
        hook.remove()
    return result, [output[0] if isinstance(output, tuple) else output for output in outputs]


def _randomised(model: nn.Module) -> nn.Module:
    """Zeros and ones at initialisation would hide swapped tensors."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


# --- transformers --------------------------------------------------------------------------------------------------


def _transformers(model: nn.Module, folder: Path) -> Source:
    _randomised(model).save_pretrained(folder)

    def features(output: Any) -> Tensor:  # transformers 5 gives the tower's output, its pooled feature projected
        return output if isinstance(output, Tensor) else output.pooler_output

    return Source(folder, lambda pixels: features(model.get_image_features(pixels)),
                  lambda ids: features(model.get_text_features(ids)), model.vision_model.encoder.layers,
                  model.text_model.encoder.layers, model)


def hf_clip(activation: str = "quick_gelu", eos_token_id: int = VOCABULARY - 1) -> Callable[[Path], Source]:
    def build(folder: Path) -> Source:
        from transformers import CLIPConfig, CLIPModel

        sizes = {"intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_act": activation}
        return _transformers(CLIPModel(CLIPConfig(
            text_config={"hidden_size": 32, "vocab_size": VOCABULARY, "max_position_embeddings": 20, **sizes,
                         "eos_token_id": eos_token_id, "bos_token_id": 97, "pad_token_id": 0},
            vision_config={"hidden_size": 48, "image_size": PIXELS, "patch_size": 8, **sizes},
            projection_dim=24,
        )), folder)

    return build


def hf_siglip(text_width: int = 48, **changes: Any) -> Callable[[Path], Source]:
    def build(folder: Path) -> Source:
        from transformers import SiglipConfig, SiglipModel

        sizes = {"intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 4, **changes}
        return _transformers(SiglipModel(SiglipConfig(
            text_config={"hidden_size": text_width, "vocab_size": VOCABULARY, "max_position_embeddings": 20,
                         "projection_size": 48, **sizes},
            vision_config={"hidden_size": 48, "image_size": PIXELS, "patch_size": 8, **sizes},
        )), folder)

    return build


# --- open_clip -----------------------------------------------------------------------------------------------------

VISION = {"image_size": PIXELS, "layers": 3, "width": 48, "head_width": 16, "patch_size": 8, "mlp_ratio": 2.0}
TEXT = {"context_length": 20, "vocab_size": VOCABULARY, "width": 32, "heads": 4, "layers": 2}
SIGLIP_TEXT = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}


def architecture(vision: dict | None = None, text: dict | None = None, **top: Any) -> dict[str, Any]:
    """A small model configuration of open_clip's."""
    vision = vision if vision and "timm_model_name" in vision else {**VISION, **(vision or {})}
    return {"embed_dim": 24, "vision_cfg": vision, "text_cfg": {**TEXT, **(text or {})}, **top}


def open_clip_model(values: dict[str, Any]) -> nn.Module:
    import open_clip

    values = dict(values)
    kind = open_clip.CustomTextCLIP if values.pop("custom_text", False) else open_clip.CLIP
    return _randomised(kind(**values))


def open_clip(vision: dict | None = None, text: dict | None = None, as_folder: bool = False,
              **top: Any) -> Callable[[Path], Source]:
    """Given as a folder with open_clip_config.json, or as a training checkpoint with its model.json."""

    def build(folder: Path) -> Source:
        register_small_timm_models()
        values = architecture(vision, text, **top)
        model = open_clip_model(values)
        folder.mkdir()
        if as_folder:
            (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": values}))
            save_file(model.state_dict(), folder / "open_clip_model.safetensors")
            path, name = folder, None
        else:
            (folder / "model.json").write_text(json.dumps(values))
            state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
            torch.save({"epoch": 3, "name": "run", "state_dict": state}, folder / "epoch_3.pt")
            path, name = folder / "epoch_3.pt", str(folder / "model.json")
        return _open_clip_source(model, path, name)

    return build


def _open_clip_source(model: nn.Module, path: Path, name: str | None) -> Source:
    visual = model.visual
    text = getattr(model, "text", model)

    def first(output: Any) -> Tensor:  # with output_tokens, the tokens follow the feature
        return output[0] if isinstance(output, tuple) else output

    return Source(path, lambda pixels: first(visual(pixels)),
                  lambda ids: first(text(ids)) if text is not model else model.encode_text(ids),
                  visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks,
                  text.transformer.resblocks, model, name)


def register_small_timm_models() -> None:
    """timm knows a model by its name alone: small ones of the kinds that open_clip's architectures name."""
    import timm
    from timm.models.vision_transformer import _create_vision_transformer

    def small(name: str, **arguments: Any) -> None:
        def make(pretrained: bool = False, **kwargs: Any) -> nn.Module:
            sizes = {"img_size": PIXELS, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}
            return _create_vision_transformer(name, pretrained=pretrained, **{**sizes, **arguments, **kwargs})

        make.__name__, make.__module__ = name, __name__
        timm.models.register_model(make)

    if timm.is_model("small_vit"):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small("small_vit")
        small("small_vit_clip", pre_norm=True, act_layer="quick_gelu")
        small("small_vit_siglip", class_token=False, global_pool="map", act_layer="gelu_tanh")
        small("small_vit_map", global_pool="map", no_embed_class=True, mlp_ratio=3)
        small("small_vit_gap", class_token=False, global_pool="avg")
        small("small_vit_scaled", init_values=1e-3)
        small("small_vit_registers", reg_tokens=2)
        small("small_vit_qk_norm", qk_norm=True)
        small("small_vit_swiglu", mlp_layer=timm.layers.SwiGLU)


# --- OpenAI --------------------------------------------------------------------------------------------------------


def openai(archive: bool) -> Callable[[Path], Source]:
    def build(folder: Path) -> Source:
        from open_clip.model import build_model_from_openai_state_dict

        sizes = {"vision_cfg": {**VISION, "width": 128, "head_width": 64, "mlp_ratio": 4.0},
                 "text_cfg": {**TEXT, "width": 64, "heads": 1}}
        model = build_model_from_openai_state_dict(
            open_clip_model({**architecture(), **sizes, "quick_gelu": True}).state_dict(), cast_dtype=torch.float32)
        model = model.float().eval()
        folder.mkdir()
        file = folder / "ViT-T-8.pt"
        for constant, value in (("input_resolution", PIXELS), ("context_length", 20), ("vocab_size", VOCABULARY)):
            if hasattr(model, constant):
                delattr(model, constant)
            model.register_buffer(constant, torch.tensor(value))
        if archive:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.jit.save(torch.jit.script(model), file)
        else:
            torch.save(model.state_dict(), file)
        return _open_clip_source(model, file, None)

    return build


# --- the list ------------------------------------------------------------------------------------------------------

FOLDER = "folder, or its name on the hub"
ARCHITECTURE = "`open_clip_config.json` folder; or `--architecture` (a name, or a `model.json`) and a weights file"
HF_CLIP, HF_SIGLIP = "transformers' `CLIPModel`", "transformers' `SiglipModel`: SigLIP, SigLIP 2 with fixed size"
OWN, TIMM, OPENAI = "open_clip's own ViTs", "open_clip with a plain ViT of timm's", "OpenAI's ViTs"

CASES = [
    Case(HF_CLIP, FOLDER, "QuickGELU", hf_clip()),
    Case(HF_CLIP, FOLDER, "GELU", hf_clip("gelu")),
    Case(HF_CLIP, FOLDER, "text read at its largest id", hf_clip("gelu", eos_token_id=2)),
    Case(HF_SIGLIP, FOLDER, "as published", hf_siglip()),
    Case(HF_SIGLIP, FOLDER, "towers of different width", hf_siglip(text_width=32)),
    Case(HF_SIGLIP, FOLDER, "GELU", hf_siglip(hidden_act="gelu", layer_norm_eps=1e-5)),
    Case(OWN, ARCHITECTURE, "class token, GELU", open_clip()),
    Case(OWN, ARCHITECTURE, "QuickGELU", open_clip(quick_gelu=True, as_folder=True)),
    Case(OWN, ARCHITECTURE, "`CustomTextCLIP`", open_clip(custom_text=True)),
    Case(OWN, ARCHITECTURE, "average pooling, no norm before the blocks, final norm after pooling (CLIPA)",
         open_clip({"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
                   {"no_causal_mask": True, "pool_type": "last"}, as_folder=True)),
    Case(OWN, ARCHITECTURE, "average pooling after the final norm, sine positions, tanh GELU",
         open_clip({"pool_type": "avg", "pos_embed_type": "sin_cos_2d", "act_kwargs": {"approximate": "tanh"}})),
    Case(OWN, ARCHITECTURE, "attentional pooling (the image tower of CoCa)",
         open_clip({"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 2,
                    "output_tokens": True})),
    Case(OWN, ARCHITECTURE, "attentional pooling, tower as wide as the shared space",
         open_clip({"attentional_pool": True, "attn_pooler_heads": 3, "attn_pooler_queries": 2,
                    "norm_kwargs": {"eps": 1e-6}}, embed_dim=48, as_folder=True)),
    Case(OWN, ARCHITECTURE, "text pooled at a given end mark",
         open_clip(text={"pool_type": "eos", "eos_id": 98, "output_tokens": True}, custom_text=True)),
    Case(OWN, ARCHITECTURE, "text pooled at the first token, both directions, projection with bias",
         open_clip(text={"pool_type": "first", "no_causal_mask": True, "proj_bias": True})),
    Case(OWN, ARCHITECTURE, "text without projection, logit bias",
         open_clip(text={"proj_type": "none", "width": 24}, init_logit_bias=-10, nonscalar_logit_scale=True)),
    Case(TIMM, ARCHITECTURE, "attention-map pooling (SigLIP, SigLIP 2)",
         open_clip({"timm_model_name": "small_vit_siglip", "timm_pool": "map", "timm_proj": "none"},
                   {**SIGLIP_TEXT, "act_kwargs": {"approximate": "tanh"}}, embed_dim=48, init_logit_bias=-10,
                   custom_text=True, as_folder=True)),
    Case(TIMM, ARCHITECTURE, "attention-map pooling with a class token that has no position",
         open_clip({"timm_model_name": "small_vit_map", "timm_pool": "map", "timm_proj": "linear",
                    "timm_proj_bias": True})),
    Case(TIMM, ARCHITECTURE, "class token, projection by timm's classifier, text in both directions (MobileCLIP2-L)",
         open_clip({"timm_model_name": "small_vit_clip", "timm_pool": "token", "timm_proj": None,
                    "timm_drop_path": 0.1}, {"no_causal_mask": True}, custom_text=True)),
    Case(TIMM, ARCHITECTURE, "average pooling, linear projection",
         open_clip({"timm_model_name": "small_vit_gap", "timm_pool": "avg", "timm_proj": "linear"}, as_folder=True)),
    Case(TIMM, ARCHITECTURE, "average of a model made for its class token, MLP projection",
         open_clip({"timm_model_name": "small_vit", "timm_pool": "avg", "timm_proj": "mlp"})),
    Case(TIMM, ARCHITECTURE, "timm's own pooling, MLP projection with bias",
         open_clip({"timm_model_name": "small_vit_gap", "timm_pool": "", "timm_proj": "mlp", "timm_proj_bias": True})),
    Case(OPENAI, "`.pt`", "TorchScript archive, as published", openai(archive=True)),
    Case(OPENAI, "`.pt`", "its state dict", openai(archive=False)),
]

# What is said of it in the README, the model configuration, the words in the refusal.
REFUSED = [
    ("ResNets", architecture({"layers": [3, 4, 6, 3], "width": 64}), "ResNet"),
    ("ConvNeXts", architecture({"timm_model_name": "convnext_base"}), "is a ConvNeXt"),
    ("EVA and PE (rotary positions)", architecture({"timm_model_name": "eva02_base_patch16_clip_224"}), "is a Eva"),
    ("MobileCLIP's convolutions", architecture({"timm_model_name": "vit_base_mci_224"}), "has a HybridEmbed"),
    ("CoCa", architecture(multimodal_cfg={"width": 32}), "is a CoCa"),
    ("CoCa", architecture(text={"embed_cls": True}), "embed_cls"),
    ("CoCa", architecture({"attentional_pool": "parallel"}), "attentional_pool = 'parallel'"),
    ("transformers text towers", architecture(text={"hf_model_name": "roberta-base"}), "roberta-base"),
    ("layer scale", architecture({"ls_init_value": 1e-4}), "ls_init_value = 0.0001"),
    ("layer scale", architecture({"timm_model_name": "small_vit_scaled"}), "has a LayerScale"),
    ("norms inside the attention", architecture({"qk_norm": True}), "qk_norm"),
    ("norms inside the attention", architecture({"timm_model_name": "small_vit_qk_norm"}), "has a LayerNorm"),
    ("registers", architecture({"timm_model_name": "small_vit_registers"}), "2 register tokens"),
    ("gated feed-forward layers", architecture({"timm_model_name": "small_vit_swiglu"}), "has a SwiGLU"),
]


# --- the README's table --------------------------------------------------------------------------------------------


def table() -> str:
    """Lines of the README: one row per family, then what is refused."""
    rows: dict[tuple[str, str], list[str]] = {}
    for case in CASES:
        rows.setdefault((case.family, case.given), []).append(case.special)
    rows["the published CLIP-MoE", "state dict (`.pt`, `.safetensors`) and `--top-k`"] = [
        "both ways, `--to official` to the last bit"]
    lines = ["Any of these can be converted, or named as `model` (and `architecture`) of `train_encoder`; the folders",
             "also as `vision_tower` of `train_vlm`. Features and every block's output equal the source's to 1e-5:", "",
             "| source | given as | tested |", "|---|---|---|"]
    lines += [f"| {family} | {given} | {'; '.join(specials)} |" for (family, given), specials in rows.items()]
    refused = list(dict.fromkeys(name for name, _, _ in REFUSED))
    lines += ["", f"Refused, with a sentence: SigLIP 2 NaFlex, {', '.join(refused)}."]
    return "\n".join(lines) + "\n"


def with_table(readme: str) -> str:
    """The README's text with today's table between its markers."""
    start, end = readme.index(BEGIN) + len(BEGIN), readme.index(END)
    return readme[:start] + table() + readme[end:]


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
