for module, names in (("llava_llama", "LlavaLlamaForCausalLM, LlavaConfig"), ("llava_moe", "LlavaMoeForCausalLM")):
    try:
        exec(f"from .language_model.{module} import {names}")
    except Exception as error:
        print(f"no {module}: {error}")
