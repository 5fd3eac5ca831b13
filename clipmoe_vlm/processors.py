"""Image processors and tokenizers that belong to a source of weights, in the forms that every transformers reads."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, CLIPImageProcessor, CLIPTokenizer

from .configuration_clipmoe import CLIPMoETextConfig
from .weights import local, read_json

CLIP_VOCABULARY = 49408


def image_processor_of(source: str | Path, image_size: int, architecture: str | None = None) -> CLIPImageProcessor:
    """The source's own image processor, as CLIP's class, which also does what SigLIP's does.

    Read from what transformers saved or from open_clip_config.json; for a name of open_clip's as all its published
    weights have it; else SigLIP's or OpenAI's, at `image_size`. Pictures are resized by their shorter side and cut to
    a square, or (SigLIP) resized to a square without cutting.

    Raises:
        ValueError: the source asks for another kind of resizing.
    """
    source = local(source)
    values = _transformers_preprocessing(source)
    if values is not None:
        size = values.get("size", {})
        if "crop_size" in values or not isinstance(size, dict) or "shortest_edge" in size:
            return CLIPImageProcessor.from_dict(values)
        names = ("resample", "image_mean", "image_std")  # SigLIP's class
        return _squashing(size.get("height", image_size), **{name: values[name] for name in names if name in values})
    file = source / "open_clip_config.json"
    values = read_json(file).get("preprocess_cfg", {}) if file.is_file() else _published_preprocessing(architecture)
    resize_mode, interpolation = values.get("resize_mode", "shortest"), values.get("interpolation", "bicubic")
    resample = {"bicubic": 3, "bilinear": 2}.get(interpolation)  # PIL's numbers
    if resize_mode not in ("shortest", "squash") or resample is None:
        raise ValueError(f"{file}: pictures are resized by mode '{resize_mode}' and interpolation '{interpolation}'; "
                         "supported are mode 'shortest' (then a centre crop) or 'squash', 'bicubic' or 'bilinear'")
    kwargs = {ours: values[theirs] for theirs, ours in (("mean", "image_mean"), ("std", "image_std"))
              if theirs in values}
    if resize_mode == "squash":
        return _squashing(image_size, resample=resample, **kwargs)
    return CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size},
                              resample=resample, **kwargs)


def resize_processor(processor: CLIPImageProcessor, image_size: int) -> CLIPImageProcessor:
    """The same processor for pictures of `image_size` pixels; a margin that is cut off keeps its share."""
    values, square = processor.to_dict(), {"height": image_size, "width": image_size}
    edge = values["size"].get("shortest_edge")
    old = (values.get("crop_size") or {}).get("height", edge)
    size = square if edge is None else {"shortest_edge": round(edge * image_size / old)}
    return CLIPImageProcessor.from_dict({**values, "size": size, "crop_size": square})


def as_class(image_processor: Any, processor_class: type, **more: Any) -> Any:
    """CLIP's preprocessing, with the same values, as another of transformers' classes."""
    names = ("size", "crop_size", "resample", "image_mean", "image_std", "rescale_factor", "do_resize",
             "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
    values = image_processor.to_dict()
    return processor_class(**{name: values[name] for name in names if values.get(name) is not None}, **more)


def _transformers_preprocessing(source: Path) -> dict[str, Any] | None:
    """What transformers saved beside a model; nothing but the class's own defaults for a SigLIP that came without."""
    if (source / "preprocessor_config.json").is_file():
        return read_json(source / "preprocessor_config.json")
    if (source / "processor_config.json").is_file():  # a whole processor, saved by transformers 5
        return read_json(source / "processor_config.json").get("image_processor")
    config = source / "config.json"
    return {} if config.is_file() and str(read_json(config).get("model_type")).startswith("siglip") else None


def _squashing(side: int, **kwargs: Any) -> CLIPImageProcessor:
    square = {"height": side, "width": side}
    kwargs = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **kwargs}
    # Nothing is cut; hosts ask crop_size for the size of the result.
    return CLIPImageProcessor(size=square, crop_size=square, do_center_crop=False, **kwargs)


def _published_preprocessing(architecture: str | None) -> dict[str, Any]:
    """What all published weights of an architecture of open_clip's agree on; nothing if they differ or are unknown."""
    try:
        from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
    except ImportError:
        return {}
    names = ("mean", "std", "interpolation", "resize_mode")
    published = []
    for tag in list_pretrained_tags_by_model(architecture) if architecture else ():
        values = get_pretrained_cfg(architecture, tag)
        published.append({name: values[name] for name in names if values.get(name)})
    return published[0] if published and all(values == published[0] for values in published) else {}


def tokenizer_of(source: str | Path, config: CLIPMoETextConfig) -> Any:
    """The tokenizer of the folder, else CLIP's BPE when the vocabulary has its 49,408 entries, else None.

    open_clip cleans captions before some tokenizers (SigLIP's) see them; that is put into the tokenizer. It pads CLIP's
    BPE with zeros, whatever the tokenizer files beside a model say; that is kept where the text tower looks at padding.
    """
    source = local(source)
    file = source / "open_clip_config.json"
    values = read_json(file) if file.is_file() else {}
    text = values.get("model_cfg", values).get("text_cfg", {})
    sees_zeros = config.vocab_size == CLIP_VOCABULARY and not config.is_causal
    has_files = (source / "tokenizer_config.json").is_file()
    if has_files and not (sees_zeros and file.is_file() and not text.get("hf_tokenizer_name")):
        tokenizer = AutoTokenizer.from_pretrained(source)
        _clean_as_open_clip(tokenizer, text.get("tokenizer_kwargs") or {}, text.get("tokenizer_mode"), file)
        return tokenizer
    if config.vocab_size == CLIP_VOCABULARY:
        return clip_tokenizer(config.max_position_embeddings, pads_with_zero=sees_zeros)
    return None


def _clean_as_open_clip(tokenizer: Any, kwargs: dict[str, Any], mode: str | None, file: Path) -> None:
    """Lower case and no punctuation, for `clean: canonicalize`; HTML entities and broken Unicode are left as they are.

    Raises:
        ValueError: another rule, which the tokenizer cannot carry.
    """
    if mode or kwargs not in ({}, {"clean": "whitespace"}, {"clean": "canonicalize"}):
        raise ValueError(f"{file}: its tokenizer has tokenizer_kwargs {kwargs} and tokenizer_mode {mode!r}; supported "
                         "are clean 'whitespace' and 'canonicalize'")
    if kwargs.get("clean") != "canonicalize":
        return
    from tokenizers import Regex, normalizers

    steps = [normalizers.Replace("_", " "), normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""), normalizers.Lowercase(),
             normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    own = tokenizer.backend_tokenizer.normalizer
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([*steps, own] if own else steps)


def clip_tokenizer(max_length: int, pads_with_zero: bool = False) -> CLIPTokenizer:
    """CLIP's BPE tokenizer, made from the vocabulary file inside the open_clip package.

    Args:
        pads_with_zero: pad as open_clip does, with id 0, which matters to a tower that looks at padding; else with the
            end mark, as transformers does.
    """
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError:
        raise ValueError("CLIP's vocabulary comes with the open_clip package, which is not installed: "
                         "pip install open_clip_torch, or put the tokenizer's files into the source folder") from None
    theirs = SimpleTokenizer()
    vocabulary = sorted(theirs.encoder, key=theirs.encoder.__getitem__)
    # The last two entries are the marks, which open_clip spells in its own way.
    vocabulary[-2:] = ["<|startoftext|>", "<|endoftext|>"]
    merges = sorted(theirs.bpe_ranks, key=theirs.bpe_ranks.__getitem__)
    # Id 0 is "!". Split, it stays the letter that it is where it stands in a caption.
    padding = {"pad_token": vocabulary[0], "split_special_tokens": True} if pads_with_zero else {}
    with tempfile.TemporaryDirectory() as folder:
        _write_bpe(Path(folder), {token: index for index, token in enumerate(vocabulary)}, merges)
        return CLIPTokenizer.from_pretrained(folder, model_max_length=max_length, **padding)


def save_tokenizer(tokenizer: Any, folder: Path, max_length: int) -> None:
    """Writes the tokenizer's files, CLIP's as vocab.json and merges.txt.

    Every transformers since 4.36 reads those; today's tokenizer.json does not load in the transformers of LLaVA's
    users.
    """
    tokenizer.model_max_length = max_length
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    if isinstance(tokenizer, CLIPTokenizer) and file.is_file():
        values = read_json(file)
        vocabulary = values["model"]["vocab"]
        if all(token["content"] in vocabulary for token in values["added_tokens"]):
            merges = [pair.split() if isinstance(pair, str) else pair for pair in values["model"]["merges"]]
            _write_bpe(folder, vocabulary, merges)
            file.unlink()


def _write_bpe(folder: Path, vocabulary: dict[str, int], merges: Sequence[Sequence[str]]) -> None:
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
