"""The model class for VLMEvalKit against a stand-in with its interface (BaseModel, supported_VLM, a run.py).

VLMEvalKit is not on PyPI; docs/harnesses.md says which commit of it was run by hand. The real lmms-eval is run in
tests/hosts/lmms_eval.
"""

import sys
from pathlib import Path

import pytest
import torch
from eval_data import make_questions, make_vlm

from clipmoe_vlm.runs import UserError
from eval_vlm import vlmevalkit
from eval_vlm.generate import Answerer
from eval_vlm.models import load_vlm

BASE = '''
class BaseModel:
    def __init__(self):
        self.dump_image_func = None

    def generate(self, message, dataset=None):
        return self.generate_inner(message, dataset)

    def message_to_promptimg(self, message, dataset=None):
        texts = [one["value"] for one in message if one["type"] == "text"]
        images = [one["value"] for one in message if one["type"] == "image"]
        return "\\n".join(texts), images[0] if images else None
'''
RUN = '''
import sys
from vlmeval.config import supported_VLM

if __name__ == "__main__":
    name = sys.argv[sys.argv.index("--model") + 1]
    model = supported_VLM[name](verbose=False)  # as run.py hands its own settings on
    message = [{"type": "image", "value": sys.argv[-1]}, {"type": "text", "value": "Is it a cat?"}]
    with open(sys.argv[sys.argv.index("--out") + 1], "w") as stream:
        stream.write(model.generate(message, dataset="POPE"))
'''


@pytest.fixture
def kit(tmp_path, monkeypatch) -> Path:
    for name, text in {"vlmeval/__init__.py": "", "vlmeval/config.py": "supported_VLM = {}\n",
                       "vlmeval/vlm/__init__.py": "", "vlmeval/vlm/base.py": BASE, "run.py": RUN}.items():
        (tmp_path / "kit" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "kit" / name).write_text(text)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    yield tmp_path / "kit"
    for name in [name for name in sys.modules if name.split(".")[0] == "vlmeval"]:
        del sys.modules[name]


def test_run_py_finds_our_model_by_name(kit, tmp_path):
    vlm, questions = make_vlm(tmp_path / "model"), make_questions(tmp_path / "data", pictures=1)
    picture = questions / "images" / "0.png"
    vlmevalkit.main([str(kit / "run.py"), f"tiny={vlm}", "--", "--model", "tiny", "--out", str(tmp_path / "answer"),
                     str(picture)])
    record = {"id": 0, "image": "0.png", "prompt": "Is it a cat?"}
    (_, expected), = Answerer(*load_vlm(vlm, torch.device("cpu")), 1, 1024).answers([record], picture.parent)
    assert (tmp_path / "answer").read_text() == expected["answer"] != ""
    model = vlmevalkit.make_model(str(vlm), max_new_tokens=2)
    assert expected["answer"].startswith(model.generate([{"type": "image", "value": str(picture)},
                                                         {"type": "text", "value": "Is it a cat?"}]))
    with pytest.raises(UserError, match="without a picture"):
        model.generate([{"type": "text", "value": "Is it a cat?"}], dataset="MMMU")


def test_mistakes_are_sentences(kit, tmp_path):
    for arguments in ([], [str(kit / "run.py"), "tiny=x"], [str(kit / "run.py"), "--", "--model", "tiny"],
                      [str(kit / "run.py"), "tiny", "--"]):
        with pytest.raises(UserError, match="usage: "):
            vlmevalkit.main(arguments)
    with pytest.raises(UserError, match="run.py in your copy"):
        vlmevalkit.main([str(tmp_path / "run.py"), "tiny=x", "--"])
    sys.path.insert(0, str(kit))
    with pytest.raises(UserError, match="no config.json"):
        vlmevalkit.make_model(str(tmp_path))


def test_without_vlmevalkit():
    with pytest.raises(UserError, match="VLMEvalKit can't be imported"):
        vlmevalkit.register({"tiny": "x"})
