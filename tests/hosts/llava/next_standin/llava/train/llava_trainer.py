from transformers import Trainer


class LLaVATrainer(Trainer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.trainable_params = [name for name, p in self.model.named_parameters() if p.requires_grad]
        print(f"Trainable parameters amount: {len(self.trainable_params)}")

    def create_optimizer(self):
        if self.optimizer is None:
            rates = {"mm_projector": self.args.mm_projector_lr, "vision_tower": self.args.mm_vision_tower_lr}
            rates = {word: rate for word, rate in rates.items() if rate is not None}
            named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
            groups = [{"params": [p for name, p in named if not any(word in name for word in rates)]}]
            groups += [{"params": [p for name, p in named if word in name], "lr": rate} for word, rate in rates.items()]
            kind, values = Trainer.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(groups, **values)
        return self.optimizer

    def _save_checkpoint(self, model, trial, metrics=None):
        super()._save_checkpoint(model, trial, metrics)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
