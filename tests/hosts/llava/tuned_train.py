"""float32_train.py, which also writes the vision tower down without our saving.

In the output folder: `truth_N.pt`, the tower after N updates, at each checkpoint and at the end; `begun_N.pt`, as it is
when training begins, or goes on after N updates; for a single process `truth_answer.pt`, what the trained model says.
"""

import os
import runpy
import sys
from pathlib import Path

import torch
from llava.train.llava_trainer import LLaVATrainer
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parent))
from answers import answer

if "--deepspeed" in sys.argv:
    from deepspeed import comm

    def all_gather_into_tensor(*args, theirs=comm.all_gather_into_tensor, **kwargs):
        """To its end. DeepSpeed 0.16 gathers a module's tensors in parallel, waits for the last alone and leaves the
        rest to the order of a GPU's stream, which a CPU does not have: when LLaVA saves a ZeRO-3 model, a tensor that
        comes late is overwritten for good. (Mended in DeepSpeed since.)
        """
        handle = theirs(*args, **kwargs)
        if handle is not None:
            handle.wait()
        return handle

    comm.all_gather_into_tensor = all_gather_into_tensor


def write(name, output_dir, model):
    tower = model.get_vision_tower().vision_tower
    state = tower.state_dict(keep_vars=True)
    for key, tensor in state.items():
        if hasattr(tensor, "ds_id"):  # ZeRO-3 has split it up
            from deepspeed import zero

            with zero.GatheredParameters([tensor]):
                state[key] = tensor.detach().clone()
    if os.environ.get("RANK", "0") == "0":
        torch.save({key: tensor.detach() for key, tensor in state.items()}, Path(output_dir) / f"{name}.pt")


class Witness(TrainerCallback):
    begun = False

    def on_step_begin(self, args, state, control, model, **kwargs):
        if not self.begun:
            self.begun = True
            Path(args.output_dir).mkdir(exist_ok=True)
            write(f"begun_{state.global_step}", args.output_dir, self.trainer.model)

    def on_save(self, args, state, control, model, **kwargs):
        write(f"truth_{state.global_step}", args.output_dir, self.trainer.model)

    def on_train_end(self, args, state, control, model, **kwargs):
        write(f"truth_{state.global_step}", args.output_dir, self.trainer.model)
        if args.world_size == 1:
            model = model.base_model.model if hasattr(model, "peft_config") else model
            torch.save(answer(model.eval()), Path(args.output_dir) / "truth_answer.pt")


def init(self, *args, theirs=LLaVATrainer.__init__, **kwargs):
    theirs(self, *args, **kwargs)
    witness = Witness()
    witness.trainer = self
    self.add_callback(witness)


LLaVATrainer.__init__ = init
runpy.run_path(str(Path(__file__).with_name("float32_train.py")), run_name="__main__")
