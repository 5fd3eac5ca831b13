"""Makes transformers' Auto classes, and so every host built on them, know our model types; and the other way round,
makes saved folders load in a transformers that does not know us (`trust_remote_code=True`)."""

from __future__ import annotations

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, CLIPImageProcessor, CLIPTokenizer

from .configuration_clipmoe import CLIPMoEConfig, CLIPMoETextConfig, CLIPMoEVisionConfig
from .modeling_clipmoe import CLIPMoEModel, CLIPMoEVisionModel

try:  # transformers 5 has one class per backend; given one alone it would forget CLIP's other
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    IMAGE_PROCESSORS: tuple[type, ...] = (CLIPImageProcessorPil, CLIPImageProcessor)
except ImportError:
    IMAGE_PROCESSORS = (CLIPImageProcessor,)


def register() -> None:
    """Registers configurations, models, CLIP's image processor and CLIP's tokenizer; safe to call again."""
    for config_class in (CLIPMoEConfig, CLIPMoEVisionConfig, CLIPMoETextConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for config_class, model_class in ((CLIPMoEConfig, CLIPMoEModel), (CLIPMoEVisionConfig, CLIPMoEVisionModel)):
        AutoModel.register(config_class, model_class, exist_ok=True)
        AutoImageProcessor.register(config_class, *IMAGE_PROCESSORS, exist_ok=True)
        # `save_pretrained` and `push_to_hub` then add our three files, for people without this package.
        config_class.register_for_auto_class()
        model_class.register_for_auto_class("AutoModel")
    AutoTokenizer.register(CLIPMoEConfig, CLIPTokenizer, exist_ok=True)
