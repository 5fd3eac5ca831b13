"""Image processors and tokenizers: a converted folder's give the pixels and ids of the source's own library."""

import json
from pathlib import Path

import convert_cases
import numpy as np
import open_clip
import pytest
import sentencepiece
import torch
from convert_cases import architecture, open_clip_model
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    PreTrainedTokenizerFast,
    SiglipTokenizer,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from clipmoe_vlm import CLIPMoEModel
from clipmoe_vlm.convert import convert, load_dense, processors_of
from clipmoe_vlm.processors import clip_tokenizer, image_processor_of

CAPTIONS = ["A photo of two cats' hats!!", "eleven   RED parrots_12 (twelve), left of a house.", ""]


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((90, 60), Image.Resampling.BICUBIC)


def write_open_clip(folder: Path, values: dict, **config) -> torch.nn.Module:
    torch.manual_seed(2)
    convert_cases.register_small_timm_models()
    model = open_clip_model(values)
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": values, **config}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


# --- transformers --------------------------------------------------------------------------------------------------


def test_hf_folder_keeps_its_image_processor_and_tokenizer(tmp_path):
    convert_cases.hf_clip()(tmp_path / "hf")
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


def sentences() -> list[str]:
    words = "a photo of two cats hats red parrots left house eleven twelve".split()
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(words, 6)) for _ in range(200)]


@pytest.mark.parametrize("saved", ["preprocessor_config.json", "processor_config.json", "nothing"])
def test_siglip_folder_keeps_its_image_processor_and_tokenizer(saved, tmp_path):
    source = convert_cases.hf_siglip()(tmp_path / "siglip")
    theirs = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    if saved == "preprocessor_config.json":
        theirs.save_pretrained(source.path)
    elif saved == "processor_config.json":
        (source.path / saved).write_text(json.dumps({"image_processor": json.loads(theirs.to_json_string())}))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()), model_prefix=str(source.path / "spiece"), vocab_size=30, pad_id=-1,
        bos_id=-1, unk_id=2, eos_id=1, control_symbols=["<pad>"], minloglevel=2)
    tokenizer = SiglipTokenizer(str(source.path / "spiece.model"), model_max_length=20)
    tokenizer.save_pretrained(source.path)
    values = json.loads((source.path / "config.json").read_text())
    values["text_config"]["pad_token_id"] = 7  # what SigLIP 2's say of padding is not what their tokenizers do
    (source.path / "config.json").write_text(json.dumps(values))
    convert(source.path, tmp_path / "ours")

    processor = AutoImageProcessor.from_pretrained(tmp_path / "ours", backend="pil")
    ours, other = (one(images=picture(), return_tensors="pt")["pixel_values"] for one in (processor, theirs))
    assert torch.equal(ours, other) and ours.shape == (1, 3, 32, 32)

    own = AutoTokenizer.from_pretrained(tmp_path / "ours")
    arguments = {"padding": "max_length", "truncation": True, "max_length": 20, "return_tensors": "pt"}
    assert torch.equal(own(CAPTIONS, **arguments)["input_ids"], tokenizer(CAPTIONS, **arguments)["input_ids"])
    ids = own(CAPTIONS, **arguments)["input_ids"]
    model = CLIPMoEModel.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(model.get_text_features(ids), source.text(ids), rtol=1e-5, atol=1e-5)
    assert model.text_model.pooled_position(ids).tolist() == [19, 19, 19]
    assert torch.equal(model.text_model.token_mask(ids), ids != own.pad_token_id)


# --- open_clip -----------------------------------------------------------------------------------------------------


def test_open_clip_folder_with_its_vocabulary_and_preprocessing(tmp_path):
    preprocess = {"size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bilinear",
                  "resize_mode": "shortest"}
    theirs = write_open_clip(tmp_path / "source", architecture(text={"vocab_size": 49408}), preprocess_cfg=preprocess)
    convert(tmp_path / "source", tmp_path / "ours")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.5] * 3, [0.25] * 3)
    assert (processor.size["shortest_edge"], processor.crop_size["height"], processor.resample) == (32, 32, 2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    ids = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    expected = open_clip.SimpleTokenizer(context_length=20)(CAPTIONS)
    # open_clip pads with 0, transformers with the end mark: neither is looked at by the text's feature.
    for ours_row, row in zip(ids, expected, strict=True):
        length = int(row.argmax()) + 1
        assert torch.equal(ours_row[:length], row[:length])
    ours = CLIPMoEModel.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(ours.get_text_features(ids), theirs.encode_text(expected), rtol=1e-5, atol=1e-5)
    assert ours.text_model.token_mask(ids).sum(1).tolist() == [int(row.argmax()) + 1 for row in expected]


def test_a_text_tower_that_looks_at_padding_gets_open_clips_padding(tmp_path):
    theirs = write_open_clip(tmp_path / "source", architecture(text={"vocab_size": 49408, "no_causal_mask": True}))
    clip_tokenizer(20).save_pretrained(tmp_path / "source")  # as some folders have it; open_clip does not read it
    (tmp_path / "source" / "config.json").write_text('{"architecture": "timm\'s"}')
    convert(tmp_path / "source", tmp_path / "ours")
    captions = [*CAPTIONS, "!", "wow!a?!"]
    expected = open_clip.SimpleTokenizer(context_length=20)(captions)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, expected)
    ours = CLIPMoEModel.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(ours.get_text_features(ids), theirs.encode_text(expected), rtol=1e-5, atol=1e-5)


def write_word_tokenizer(folder: Path) -> None:
    """A tokenizer of words and punctuation in the form of those beside open_clip's SigLIPs: `</s>` at the end."""
    words = [*"abcdefghijklmnopqrstuvwxyz0123456789.,!?()'_", *" ".join(sentences()[:20]).split(), "RED", "A"]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(["<pad>", "</s>", "<unk>", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
                            ).save_pretrained(folder)


def siglip_architecture(**text) -> dict:
    return architecture({"timm_model_name": "small_vit_siglip", "timm_pool": "map", "timm_proj": "none"},
                        {**convert_cases.SIGLIP_TEXT, "tokenizer_kwargs": {"clean": "canonicalize"}, **text},
                        embed_dim=48, custom_text=True, init_logit_bias=-10)


def test_open_clip_siglip_folder_cleans_captions_and_squashes_pictures(tmp_path):
    preprocess = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    source = tmp_path / "source"
    write_open_clip(source, siglip_architecture(), preprocess_cfg=preprocess)
    write_word_tokenizer(source)
    convert(source, tmp_path / "ours")
    expected = HFTokenizer(str(source), context_length=20, clean="canonicalize")(CAPTIONS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    ids = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=20, return_tensors="pt")["input_ids"]
    assert torch.equal(ids, expected)
    transform = image_transform_v2(PreprocessCfg(**{**preprocess, "size": (32, 32)}), is_train=False)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "ours", backend="pil")
    pixels = processor(images=picture(), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels, transform(picture()), rtol=0, atol=1e-5)


def test_a_tokenizer_whose_cleaning_cannot_be_kept_is_refused(tmp_path):
    write_open_clip(tmp_path / "source", siglip_architecture(tokenizer_kwargs={"strip_sep_token": True}))
    write_word_tokenizer(tmp_path / "source")
    with pytest.raises(ValueError, match="tokenizer_kwargs .*strip_sep_token.*supported are clean"):
        processors_of(tmp_path / "source")


def test_preprocessing_of_a_name_is_what_its_published_weights_agree_on(tmp_path):
    squashed = image_processor_of(tmp_path / "weights.pt", 224, "ViT-B-16-SigLIP")
    assert not squashed.do_center_crop and list(squashed.image_mean) == [0.5] * 3
    assert (squashed.size["height"], squashed.size["width"]) == (224, 224)
    for name in ("ViT-L-14", "ViT-B-32-quickgelu", None):  # of the first, some were trained with other statistics
        openais = image_processor_of(tmp_path / "weights.pt", 224, name)
        assert openais.do_center_crop and round(openais.image_mean[0], 3) == 0.481


def test_resizing_that_clips_processor_cannot_do_is_refused(tmp_path):
    write_open_clip(tmp_path / "source", architecture(), preprocess_cfg={"resize_mode": "longest"})
    with pytest.raises(ValueError, match="resized by mode 'longest'.*supported are mode 'shortest'"):
        image_processor_of(tmp_path / "source", 32)
    assert load_dense(tmp_path / "source").config.vision_config.image_size == 32
