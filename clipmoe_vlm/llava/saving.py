"""A tuned tower is written beside every checkpoint of LLaVA's, and found again when that is loaded.

LLaVA builds the tower from `mm_vision_tower` and reads that folder after all other weights, so whatever of the tower a
checkpoint holds is lost. Here each `config.save_pretrained(folder)`, which is part of each of its ways to save, also
writes `folder/vision_tower`, and `mm_vision_tower` says that the tower is there, wherever the checkpoint is moved.
"""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from ..llava_layout import TOWER_BESIDE, TOWER_FOLDER
from ..processors import image_processor_of
from ..runs import atomic_folder
from ..tower import CLIPMoEVisionTower
from ..weights import read_folder, read_json
from .around import around

# Models that train, by the id of their configuration, which has no room for the model itself: it is written as JSON.
_models: dict[int, weakref.ref] = {}


def follow(model: Any, trainer_class: type) -> None:
    """From now on the tower of `model` is saved with its configuration."""
    _models[id(model.config)] = weakref.ref(model)
    tower = model.get_vision_tower()
    # Not the one in use: that one answers LLaVA's questions about sizes in its own way. And not when saving: the folder
    # that training started from may be gone then.
    tower.image_processor_to_save = image_processor_of(tower.vision_tower_name, tower.config.image_size)
    for name, ours in (("train", _train), ("_save_checkpoint", _save_checkpoint), ("_save", _save),
                       ("_load_from_checkpoint", _load_from_checkpoint)):
        setattr(trainer_class, name, around(getattr(trainer_class, name), ours))


def patch_config(config_class: type[PretrainedConfig]) -> None:
    """`save_pretrained` writes a tuned tower too; loading finds it."""
    config_class.save_pretrained = around(config_class.save_pretrained, _save_pretrained)
    for name, ours in (("from_pretrained", _from_pretrained), ("from_dict", _from_dict)):
        setattr(config_class, name, classmethod(around(getattr(config_class, name).__func__, ours)))


# --- saving --------------------------------------------------------------------------------------------------------


def _save_pretrained(theirs: Callable, config: PretrainedConfig, save_directory: str | os.PathLike, *args: Any,
                     **kwargs: Any) -> None:
    tower, source = _tuned_tower(config), getattr(config, "mm_vision_tower", None)
    if tower is None and not _is_beside_a_checkpoint(source):
        return theirs(config, save_directory, *args, **kwargs)
    folder = Path(save_directory).resolve() / TOWER_FOLDER
    if _is_main():
        if tower is not None:
            _write(tower, folder)
        elif folder != Path(source).resolve():  # LoRA was merged, say, or a run went on with the tower frozen
            with atomic_folder(folder) as new:
                shutil.copytree(source, new, dirs_exist_ok=True)
    config.mm_vision_tower = TOWER_BESIDE
    try:
        return theirs(config, save_directory, *args, **kwargs)
    finally:
        config.mm_vision_tower = source


def _tuned_tower(config: PretrainedConfig) -> CLIPMoEVisionTower | None:
    model = _models.get(id(config), lambda: None)()
    if model is None or model.config is not config:
        return None
    tower = model.get_vision_tower()
    return tower if any(parameter.requires_grad for parameter in tower.parameters()) else None


def _is_beside_a_checkpoint(source: str | None) -> bool:
    """Whether this folder belongs to a checkpoint; then it goes along with each that is made of that one."""
    if source is None or Path(source).name != TOWER_FOLDER:
        return False
    file = Path(source).resolve().parent / "config.json"
    return file.is_file() and read_json(file).get("mm_vision_tower") in (TOWER_BESIDE, TOWER_FOLDER)


def _is_main() -> bool:
    """Whether this process writes: the first of all machines. LLaVA calls some of its ways to save in every process,
    others in the first of each machine."""
    return os.environ.get("RANK", "0") == "0"


def _write(tower: CLIPMoEVisionTower, folder: Path) -> None:
    with atomic_folder(folder) as new:
        tower.vision_tower.save_pretrained(new, state_dict=_state(tower))
        tower.image_processor_to_save.save_pretrained(new)


def _state(tower: CLIPMoEVisionTower) -> dict[str, Tensor]:
    """Copies of the weights; under ZeRO-3 those gathered last, since saving may be the work of one process alone.

    Under ZeRO-1 and 2 the weights themselves are parts of one buffer, for which `save_pretrained` would leave most out.
    """
    state = tower.vision_tower.state_dict(keep_vars=True)
    if _is_partitioned(state):
        return tower.gathered_state
    return {name: _copy(tensor) for name, tensor in state.items()}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _is_partitioned(state: dict[str, Tensor]) -> bool:
    return any(hasattr(tensor, "ds_id") for tensor in state.values())


def _gather(model: Any) -> None:
    """Under ZeRO-3 the main process gets the tuned tower's weights; all processes must call this together."""
    tower = _tuned_tower(model.config)
    state = {} if tower is None else tower.vision_tower.state_dict(keep_vars=True)
    if not _is_partitioned(state):
        return
    from deepspeed import zero

    gathered = {}
    for name, tensor in state.items():  # one by one, as LLaVA does: the whole may not fit on a GPU
        with zero.GatheredParameters([tensor]):
            if _is_main():
                gathered[name] = _copy(tensor)
    tower.gathered_state = gathered


# --- what of LLaVA's Trainer has to do with it ---------------------------------------------------------------------


def _train(theirs: Callable, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    result = theirs(trainer, *args, **kwargs)
    _gather(trainer.model)
    return result


def _save_checkpoint(theirs: Callable, trainer: Any, *args: Any, **kwargs: Any) -> None:
    _gather(trainer.model)
    theirs(trainer, *args, **kwargs)


def _save(theirs: Callable, trainer: Any, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
    theirs(trainer, output_dir, *args, **kwargs)
    tower = _tuned_tower(trainer.model.config)
    # PEFT writes its adapter alone, without a configuration.
    if tower is not None and not isinstance(trainer.model, PreTrainedModel) and _is_main():
        _write(tower, Path(output_dir or trainer.args.output_dir) / TOWER_FOLDER)


def _load_from_checkpoint(theirs: Callable, trainer: Any, checkpoint: str, *args: Any, **kwargs: Any) -> None:
    """Resumes the tower, too: with LoRA the Trainer would read the adapter alone."""
    theirs(trainer, checkpoint, *args, **kwargs)
    tower, folder = _tuned_tower(trainer.model.config), Path(checkpoint) / TOWER_FOLDER
    if tower is not None and folder.is_dir():
        # Not `load_vision`: a new model would draw random numbers, and the Trainer others than in an unbroken run.
        tower.vision_tower.load_state_dict(read_folder(folder, SAFE_WEIGHTS_NAME))


# --- loading -------------------------------------------------------------------------------------------------------


def _from_pretrained(theirs: Callable, config_class: type, checkpoint: str | os.PathLike, *args: Any,
                     **kwargs: Any) -> Any:
    loaded = theirs(config_class, checkpoint, *args, **kwargs)
    _find_tower(loaded, checkpoint, kwargs)
    return loaded


def _from_dict(theirs: Callable, config_class: type, config_dict: dict[str, Any], **kwargs: Any) -> Any:
    loaded = theirs(config_class, config_dict, **kwargs)
    if "name_or_path" in kwargs:  # AutoConfig's way
        _find_tower(loaded, kwargs["name_or_path"], kwargs)
    return loaded


def _find_tower(loaded: Any, checkpoint: str | os.PathLike, kwargs: dict[str, Any]) -> None:
    """Has `mm_vision_tower` name the tower's folder in a checkpoint, downloaded if need be.

    Raises:
        FileNotFoundError: there is none.
    """
    config = loaded[0] if isinstance(loaded, tuple) else loaded
    name = getattr(config, "mm_vision_tower", None)
    if name not in (TOWER_BESIDE, TOWER_FOLDER):
        return
    folder = Path(checkpoint)
    if folder.is_file():
        folder = folder.parent
    elif not folder.is_dir():
        options = {name: kwargs[name] for name in ("cache_dir", "token", "local_files_only") if name in kwargs}
        folder = Path(snapshot_download(str(checkpoint), revision=getattr(config, "_commit_hash", None),
                                        allow_patterns=f"{TOWER_FOLDER}/*", **options))
    if not (folder / TOWER_FOLDER).is_dir():
        if name == TOWER_FOLDER:  # somebody's own, where LLaVA is started
            return
        raise FileNotFoundError(f"{checkpoint}: its config.json says that its tuned vision tower is in {TOWER_FOLDER}/ "
                                "beside it, but there is no such folder: copy it together with the checkpoint")
    config.mm_vision_tower = str((folder / TOWER_FOLDER).resolve())
    if getattr(config, "unfreeze_mm_vision_tower", False):
        config.unfreeze_mm_vision_tower = False  # or it would be read early, for the checkpoint to overwrite
