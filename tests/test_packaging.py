"""What the distribution asks for, and what the plugin pulls into a host's process."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest there

ROOT = Path(__file__).parents[1]
PROGRAMS = ("train_encoder", "train_vlm", "eval_vlm")
PLUGIN_FILES = sorted((ROOT / "clipmoe_vlm").glob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def imported(file: Path) -> set[str]:
    """First parts of the names of all modules that a source file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_the_plugin_asks_only_for_torch_and_transformers():
    assert {Requirement(one).name: str(Requirement(one).specifier) for one in PROJECT["dependencies"]} == {
        "torch": ">=2.0", "transformers": ">=4.36"}


def test_constraints_pin_what_the_extras_name():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(str(pin.specifier).startswith("==") for pin in pins)
    pinned = {pin.name.replace("_", "-").lower() for pin in pins}
    asked = {Requirement(one).name.replace("_", "-").lower()
             for extra in PROJECT["optional-dependencies"].values() for one in extra}
    assert asked - {"clipmoe-vlm"} - pinned == set()
    tested = {pin.name: str(pin.specifier) for pin in pins}
    assert tested["torch"] == "==2.14.1" and tested["torchvision"] == "==0.29.1"  # these two go together


def test_importing_the_plugin_imports_no_program_and_none_of_their_libraries():
    """transformers is imported first: what it loads by itself is not the plugin's doing."""
    code = ("import sys, transformers\n"
            "from transformers import AutoModel, AutoTokenizer, AutoImageProcessor, CLIPImageProcessor, CLIPTokenizer\n"
            "before = set(sys.modules)\n"
            "import clipmoe_vlm\n"
            "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    new = set(done.stdout.split())
    assert "clipmoe_vlm" in new
    assert not new & {"omegaconf", "open_clip", "deepspeed", "datasets", "sklearn", "webdataset", "peft", "matplotlib",
                      "jinja2", *PROGRAMS}


@pytest.mark.parametrize("file", PLUGIN_FILES, ids=lambda file: file.name)
def test_the_plugin_knows_nothing_of_the_programs(file):
    assert not imported(file) & {*PROGRAMS, "demo", "tests"}


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_do_not_import_each_other(program):
    files = sorted((ROOT / program).rglob("*.py"))
    assert files
    for file in files:
        own = {program, "eval_vlm"} if file == ROOT / "train_vlm/evaluation.py" else {program}  # it runs the suites
        assert not imported(file) & ({*PROGRAMS, "demo", "tests"} - own), file


def test_the_package_holds_the_configuration_files():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    for program in ("train_encoder", "train_vlm", "eval_vlm"):
        files = [file for file in (ROOT / program / "configs").rglob("*") if file.is_file()]
        assert files, program
        for file in files:
            assert any(file.match(pattern) for pattern in data[program]), f"{file} would not be installed"
