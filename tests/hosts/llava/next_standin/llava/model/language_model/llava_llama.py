from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaConfig(LlamaConfig):
    model_type = "llava_llama"


class LlavaLlamaModel(LlavaMetaModel, LlamaModel):
    config_class = LlavaConfig


class LlavaLlamaForCausalLM(LlamaForCausalLM, LlavaMetaForCausalLM):
    config_class = LlavaConfig

    def __init__(self, config):
        LlamaForCausalLM.__init__(self, config)
        self.model = LlavaLlamaModel(config)
        self.post_init()

    def get_model(self):
        return self.model

    def forward(self, input_ids=None, labels=None, inputs_embeds=None, images=None, image_sizes=None, modalities=None,
                dpo_forward=None, return_dict=None, **kwargs):
        if inputs_embeds is None:
            inputs_embeds, labels = self.prepare_inputs_labels_for_multimodal(
                input_ids, labels, images, modalities, image_sizes)
        if dpo_forward:
            return self.lm_head(self.model(inputs_embeds=inputs_embeds)[0]), labels
        return super().forward(inputs_embeds=inputs_embeds, labels=labels, return_dict=return_dict)


AutoConfig.register("llava_llama", LlavaConfig)
AutoModelForCausalLM.register(LlavaConfig, LlavaLlamaForCausalLM)
