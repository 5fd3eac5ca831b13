import json
import os
from dataclasses import dataclass, field

import torch
import transformers

from llava.model import LlavaLlamaForCausalLM
from llava.train.llava_trainer import LLaVATrainer


@dataclass
class ModelArguments:
    model_name_or_path: str = ""
    mm_tunable_parts: str | None = None
    unfreeze_mm_vision_tower: bool = False
    vision_tower: str | None = None
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    remove_unused_columns: bool = False
    mm_projector_lr: float | None = None
    mm_vision_tower_lr: float | None = None
    report_to: list[str] = field(default_factory=lambda: ["none"])


def collate(samples):
    """Marks of pictures become positions without a label."""
    batch = {"input_ids": torch.stack([sample["ids"] for sample in samples])}
    batch["labels"] = batch["input_ids"].clamp(min=-100)
    batch["images"] = [image for sample in samples for image in sample["images"]]
    batch["modalities"] = ["image"] * len(batch["images"])
    return batch


def train():
    parser = transformers.HfArgumentParser((ModelArguments, TrainingArguments))
    model_args, training_args = parser.parse_args_into_dataclasses()
    model = LlavaLlamaForCausalLM.from_pretrained(model_args.model_name_or_path)
    model.config.use_cache = False
    model.get_model().initialize_vision_modules(model_args=model_args)
    tower = model.get_vision_tower()
    tower.to(dtype=torch.float32, device=training_args.device)
    if model_args.mm_tunable_parts is None:
        model.config.unfreeze_mm_vision_tower = model_args.unfreeze_mm_vision_tower
        tower.requires_grad_(model_args.unfreeze_mm_vision_tower)
    else:
        model.config.mm_tunable_parts = model_args.mm_tunable_parts
        model.requires_grad_(False)
        parts = model_args.mm_tunable_parts.split(",")
        for name, parameter in model.named_parameters():
            is_tower, is_projector = "vision_tower" in name, "mm_projector" in name
            part = "mm_vision_tower" if is_tower else "mm_mlp_adapter" if is_projector else "mm_language_model"
            parameter.requires_grad_(part in parts)
    model.initialize_vision_tokenizer(model_args, tokenizer=None)
    torch.manual_seed(0)
    size = tower.config.image_size
    pictures, words = torch.randn(4, 3, size, size), torch.randint(5, 50, (2, 12))
    words[0, 3] = words[0, 7] = -200
    # One sample shows a picture of three tiles and one of a single tile, the other none: it gets a black one.
    data = [{"ids": words[0], "images": [pictures[:3], pictures[3:]]}, {"ids": words[1], "images": [pictures[:1] * 0]}]
    trainer = LLaVATrainer(model=model, args=training_args, train_dataset=data * 4, data_collator=collate)
    trainer.train()
    trainer.save_state()
    trainer._save(training_args.output_dir)
    groups = [{"lr": group["initial_lr"], "size": sum(p.numel() for p in group["params"])}
              for group in trainer.optimizer.param_groups]
    torch.save({"pictures": pictures, "tower": {k: v.clone() for k, v in tower.vision_tower.state_dict().items()},
                "groups": groups}, os.path.join(training_args.output_dir, "seen.pt"))
    print(json.dumps(trainer.state.log_history[0]))


if __name__ == "__main__":
    train()
