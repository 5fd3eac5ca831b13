"""Our functions get into LLaVA whatever was imported first, and say so where they cannot."""

import sys
import textwrap
from pathlib import Path

import pytest
from host import FLOAT32_TRAIN, TRAIN, fork, run, train

# What must hold after any order of imports: a folder of ours becomes our tower, another stays LLaVA's.
CHECK = """
import types
from clipmoe_vlm import CLIPMoEVisionTower
arguments = types.SimpleNamespace(mm_vision_select_layer=-2)
import llava.model.llava_arch, llava.model.multimodal_encoder.builder, llava.model
for where in (llava.model.llava_arch, llava.model.multimodal_encoder.builder, *PLACES):
    arguments.mm_vision_tower = MOE
    assert type(where.build_vision_tower(arguments, delay_load=True)) is CLIPMoEVisionTower, where
    arguments.mm_vision_tower = CLIP
    assert type(where.build_vision_tower(arguments, delay_load=True)).__name__ == "CLIPVisionTower", where
model = llava.model.LlavaLlamaForCausalLM(llava.model.LlavaConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16, mm_hidden_size=64,
    mm_vision_tower=MOE, mm_vision_select_layer=-2))
assert type(model.get_vision_tower()) is CLIPMoEVisionTower
print("all is ours")
"""


def script(folder: Path, towers: Path, body: str, check: str = CHECK) -> Path:
    file = folder / "script.py"
    file.write_text(f"MOE, CLIP, PLACES = {str(towers / 'moe')!r}, {str(TRAIN / 'tower')!r}, []\n"
                    f"{textwrap.dedent(body)}\n{check}")
    return file


def test_imported_before_llava(towers, tmp_path):
    assert "all is ours" in run([sys.executable, str(script(tmp_path, towers, "import clipmoe_vlm.llava"))]).stdout


@pytest.mark.parametrize("body", [
    "import llava; import clipmoe_vlm.llava",
    "from llava.model.builder import load_pretrained_model; import clipmoe_vlm.llava; clipmoe_vlm.llava.patch()",
    """
    import sys, types
    from llava.model.llava_arch import *
    mine = types.ModuleType("mine")
    exec("from llava.model.multimodal_encoder.builder import build_vision_tower as build", mine.__dict__)
    sys.modules["mine"] = mine
    import clipmoe_vlm.llava
    mine.build_vision_tower = mine.build
    PLACES = [mine, sys.modules["__main__"]]
    """,
], ids=["llava", "its builder", "bound by name elsewhere"])
def test_imported_after_llava(towers, tmp_path, body):
    assert "all is ours" in fork([str(script(tmp_path, towers, body))], tmp_path / "log")


LATER_CLASS = """
    import llava.train.train as module
    import llava.model.language_model.llava_llama as llava_llama
    class LaterConfig(llava_llama.LlavaConfig):
        model_type = "later"
    class Later(llava_llama.LlavaLlamaForCausalLM):
        config_class = LaterConfig
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)
        {more}
    module.LlavaLlamaForCausalLM = Later
    import runpy
    runpy.run_path({script!r}, run_name="__main__")
    """


def test_a_model_class_that_is_defined_later(towers, tmp_path):
    """Its own forward around its parent's does not count the auxiliary loss twice."""
    file = script(tmp_path, towers, LATER_CLASS.format(script=FLOAT32_TRAIN, more=""), check="")
    losses = [train(tmp_path / name, towers / "moe", "stage2", ours=("--tower", "routers"), max_steps="2",
                    script=path).losses for name, path in (("later", str(file)), ("usual", FLOAT32_TRAIN))]
    assert losses[0] == losses[1]


def test_a_patch_that_did_not_take_is_an_error(towers, tmp_path):
    file = script(tmp_path, towers, LATER_CLASS.format(script=FLOAT32_TRAIN, more="""
        def initialize_vision_tokenizer(self, *args, **kwargs):
            pass"""), check="")
    with pytest.raises(AssertionError, match="has not prepared the vision tower of Later for training"):
        train(tmp_path / "own", towers / "moe", "stage2", ours=("--tower", "routers"), script=str(file))
    file = script(tmp_path, towers, f"""
        import clipmoe_vlm.llava, runpy
        import llava.model.llava_arch as arch
        from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
        class Lenient(CLIPVisionTower):  # as if the folder were a CLIP's
            def __init__(self, tower, args, **kwargs):
                super().__init__(CLIP, args, **kwargs)
                self.vision_tower_name = tower
        arch.build_vision_tower = lambda config, **kwargs: Lenient(config.vision_tower, config, **kwargs)
        runpy.run_path({FLOAT32_TRAIN!r}, run_name="__main__")""", check="")
    with pytest.raises(AssertionError, match="LLaVA built a Lenient of it"):
        train(tmp_path / "lost", towers / "moe", "stage2", script=str(file))


@pytest.mark.parametrize(("tower", "ours", "changed", "words"), [
    ("clip", ("--tower", "routers"), {}, "is no CLIP-MoE folder, and LLaVA trains its own by its own rules"),
    ("dense", ("--tower", "experts"), {}, "the vision tower is dense: it has no experts"),
    ("moe", ("--tower", "last_n", "--tower_last_n", "9"), {}, "tower_last_n: 9, but 2 blocks of the tower are used"),
    ("moe", ("--tower_learning_rate", "1e-5"), {}, "nothing of the vision tower trains: say what, with --tower"),
    ("moe", ("--tower", "routers"), {"label_smoothing_factor": "0.1"}, "no loss to add the routers' auxiliary loss to"),
    ("moe", ("--tower", "routers"), {"vision_tower": None, "version": "v1"}, "give a --vision_tower"),
])
def test_settings_that_cannot_work(towers, tmp_path, tower, ours, changed, words):
    folder = TRAIN / "tower" if tower == "clip" else towers / tower
    projector = str(towers / "projector_start.bin")
    with pytest.raises(AssertionError, match=words):
        train(tmp_path / "llava", folder, ours=ours, **{"pretrain_mm_mlp_adapter": projector, **changed})


def test_another_tower_than_the_checkpoints(towers, tmp_path):
    """LLaVA goes on with the one that it finds in the checkpoint, and does not say so."""
    start = str(towers / "projector_start.bin")
    first = train(tmp_path / "llava", TRAIN / "tower", "stage2", max_steps="1", pretrain_mm_mlp_adapter=start).folder
    with pytest.raises(AssertionError, match="LLaVA goes on with the tower of the checkpoint that it starts from"):
        train(tmp_path / "second", towers / "moe", "stage2", model_name_or_path=str(first))


def test_help_comes_before_llava_is_imported(tmp_path):
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "__init__.py").write_text("raise RuntimeError('imported')")
    done = run([sys.executable, "-m", "clipmoe_vlm.llava", "--help"], cwd=tmp_path)
    assert "a module such as llava.train.train_mem" in done.stdout


def test_another_llava_and_none(tmp_path):
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "__init__.py").write_text("")
    (tmp_path / "train.py").write_text("")
    done = run([sys.executable, "-m", "clipmoe_vlm.llava", "train.py"], check=False, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"there is no module llava.model in {tmp_path}/llava/__init__.py" in done.stderr
    file = tmp_path / "none.py"
    file.write_text(textwrap.dedent("""
        import sys
        class Without:
            def find_spec(self, name, *_):
                if name == "llava":
                    raise ModuleNotFoundError("No module named 'llava'", name="llava")
        for name in [name for name in sys.modules if name.split(".")[0] == "llava"]:
            del sys.modules[name]
        sys.meta_path.insert(0, Without())
        import clipmoe_vlm.llava"""))
    with pytest.raises(AssertionError, match="there is no module llava: install it"):
        fork([str(file)], tmp_path / "log")


@pytest.mark.parametrize(("words", "code", "said"), [
    (["--tower", "gates", "x.py"], 2, "invalid choice: 'gates'"),
    (["nowhere/train.py", "--bf16", "True"], 2, "error: nowhere/train.py: no such file"),
    (["llava.train.trane"], 2, "error: llava.train.trane: neither a .py file nor a module"),
    (["--local_rank=1", "FILE", "7"], 7, "'--local_rank=1', '7'] __main__ True"),
    (["FILE"], 3, "] __main__ True"),
])
def test_what_the_script_sees_and_its_exit_code(tmp_path, words, code, said):
    file = tmp_path / "exit.py"
    file.write_text("import sys\nprint(sys.argv, __name__, sys.modules['__main__'].__dict__ is globals())\n"
                    "sys.exit(int(sys.argv[2]) if len(sys.argv) > 2 else 3)")
    with pytest.raises(AssertionError) as error:
        fork(["-m", "clipmoe_vlm.llava", *(str(file) if word == "FILE" else word for word in words)], tmp_path / "log")
    assert f"ended with {{0: {code}}}" in str(error.value) and said in str(error.value)
    assert "Traceback" not in str(error.value)
