from abc import ABC, abstractmethod

import torch

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX

from .multimodal_encoder.builder import build_vision_tower
from .multimodal_projector.builder import build_vision_projector
from .multimodal_resampler.builder import build_vision_resampler


class LlavaMetaModel:
    def __init__(self, config):
        super().__init__(config)
        if hasattr(config, "mm_vision_tower"):
            self.vision_tower = build_vision_tower(config, delay_load=getattr(config, "delay_load", False))
            self.vision_resampler = build_vision_resampler(config, vision_tower=self.vision_tower)
            self.mm_projector = build_vision_projector(config, vision_cfg=self.vision_tower.config)

    def get_vision_tower(self):
        tower = getattr(self, "vision_tower", None)
        return tower[0] if isinstance(tower, list) else tower

    def initialize_vision_modules(self, model_args, fsdp=None):
        self.config.mm_vision_tower = model_args.vision_tower
        self.config.vision_tower_pretrained = None
        if self.get_vision_tower() is None:
            tower = build_vision_tower(model_args)
            resampler = build_vision_resampler(model_args, vision_tower=tower)
            for name, value in resampler.config.items():
                setattr(self.config, name, value)
            self.vision_tower, self.vision_resampler = ([tower], [resampler]) if fsdp else (tower, resampler)
        else:
            tower = self.get_vision_tower()
            tower.load_model()
        self.config.mm_hidden_size = getattr(self.vision_resampler, "hidden_size", tower.hidden_size)
        self.config.mm_vision_select_layer = model_args.mm_vision_select_layer
        self.config.mm_vision_select_feature = model_args.mm_vision_select_feature
        if getattr(self, "mm_projector", None) is None:
            self.mm_projector = build_vision_projector(self.config, vision_cfg=tower.config)


class LlavaMetaForCausalLM(ABC):
    @abstractmethod
    def get_model(self):
        pass

    def get_vision_tower(self):
        return self.get_model().get_vision_tower()

    def encode_images(self, images):
        return self.get_model().mm_projector(self.get_model().get_vision_tower()(images))

    def prepare_inputs_labels_for_multimodal(self, input_ids, labels, images, modalities=("image",), image_sizes=None):
        images = [image.unsqueeze(0) if image.ndim == 3 else image for image in images]
        tiles = self.encode_images(torch.cat(images)).split([len(image) for image in images])
        features = iter([part.flatten(0, 1) for part in tiles])
        embeds, targets = [], []
        for ids, row in zip(input_ids, labels, strict=True):
            spans, rows, start = [], [], 0
            marks = (ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
            picture = None if marks else next(features)[:0]
            for mark in [*marks, len(ids)]:
                spans.append(self.get_model().embed_tokens(ids[start:mark]))
                rows.append(row[start:mark])
                if mark < len(ids):
                    spans.append(next(features))
                    rows.append(row.new_full((len(spans[-1]),), IGNORE_INDEX))
                start = mark + 1
            embeds.append(torch.cat([*spans, *([] if picture is None else [picture])]))
            targets.append(torch.cat(rows))
        pad = torch.nn.utils.rnn.pad_sequence
        return pad(embeds, batch_first=True), pad(targets, batch_first=True, padding_value=IGNORE_INDEX)

    def initialize_vision_tokenizer(self, model_args, tokenizer):
        assert self.get_vision_tower().is_loaded
