"""Configuration, output folders, atomic files and metrics that the programs share."""

import json
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field

import pytest
from omegaconf import MISSING

from clipmoe_vlm import runs
from clipmoe_vlm.runs import UserError


@dataclass
class Optimizer:
    learning_rate: float = 1e-3
    warmup_steps: int = 10


@dataclass
class Config:
    output_dir: str = MISSING
    workers: int = 0
    seed: int = 0
    optimizer: Optimizer = field(default_factory=Optimizer)


def load(tmp_path, text, *overrides):
    (tmp_path / "config.yaml").write_text(text)
    return runs.load_config(Config, [str(tmp_path / "config.yaml"), *overrides], "python -m program")


def test_defaults_file_and_command_line_in_this_order(tmp_path):
    config = load(tmp_path, "output_dir: out\nseed: 3\noptimizer: {warmup_steps: 5}", "seed=4", "--local_rank=1")
    assert config == Config(output_dir="out", seed=4, optimizer=Optimizer(warmup_steps=5))


@pytest.mark.parametrize("text, overrides, message", [
    ("output_dir: o\nsead: 1", [], "config.yaml: there is no key 'sead'; did you mean 'seed'"),
    ("output_dir: o\noptimizer: {learn_rate: 1}", [], "did you mean 'optimizer.learning_rate'"),
    ("output_dir: o", ["optimizer.warmup=3"], "command line: .*did you mean 'optimizer.warmup_steps'"),
    ("output_dir: o", ["seed=one"], "seed"),
    ("output_dir: o", ["seed"], "'seed' on the command line is not of the form key=value"),
    ("seed: 1", [], "no value for output_dir"),
    ("output_dir: [", [], "not valid YAML"),
    ("- a", [], "must hold"),
])
def test_config_mistakes_are_named(tmp_path, text, overrides, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, text, *overrides)


def test_a_folder_may_have_an_equals_sign_in_its_name(tmp_path):
    (tmp_path / "lr=1").mkdir()
    (tmp_path / "lr=1" / "config.yaml").write_text("output_dir: there\n")
    assert runs.load_config(Config, [str(tmp_path / "lr=1" / "config.yaml")], "program").output_dir == "there"


def test_missing_config_file():
    with pytest.raises(UserError, match="nowhere.yaml: no such configuration file"):
        runs.load_config(Config, ["nowhere.yaml"], "python -m program")


def test_another_configuration_is_refused_with_the_difference(tmp_path):
    config = Config(output_dir=str(tmp_path / "out"))
    folder = runs.prepare_output(config)
    runs.prepare_output(config)
    config.workers = 4
    runs.prepare_output(config, may_change=["workers"])
    config.optimizer.learning_rate = 0.1
    with pytest.raises(UserError, match="optimizer.learning_rate was 0.001 and is now 0.1"):
        runs.prepare_output(config, may_change=["workers"])
    assert "learning_rate: 0.001" in (folder / "config.yaml").read_text()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    runs.write_json(tmp_path / "a.json", {"version": 1})
    with pytest.raises(RuntimeError), runs.atomic_write(tmp_path / "a.json") as stream:
        stream.write("half")
        raise RuntimeError
    assert json.loads((tmp_path / "a.json").read_text()) == {"version": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_folder_leaves_the_old_folder_and_nothing_else(tmp_path):
    for attempt in (1, 2):
        with runs.atomic_folder(tmp_path / "model") as folder:
            (folder / f"{attempt}.txt").write_text("whole")
    with pytest.raises(RuntimeError), runs.atomic_folder(tmp_path / "model") as folder:
        (folder / "3.txt").write_text("half")
        raise RuntimeError
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*")] == ["model", "model/2.txt"]


def test_metrics_drop_what_a_resumed_run_repeats_and_a_torn_line(tmp_path):
    metrics = runs.Metrics(tmp_path / "metrics.jsonl")
    for step in range(5):
        metrics.log(step=step, loss=1.0)
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 5, "lo')
    runs.Metrics(tmp_path / "metrics.jsonl", keep=lambda row: row["step"] < 3).log(step=3, loss=0.5)
    assert [row["step"] for row in runs.read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


def test_json_lines_mistakes_name_file_and_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(UserError, match="rows.jsonl, line 3: not valid JSON"):
        runs.read_jsonl(file)
    file.write_text('{"a": 1}\n[1]\n')
    with pytest.raises(UserError, match="line 2: expected a JSON object"):
        runs.read_jsonl(file)


@pytest.mark.parametrize("body, message", [
    ("raise runs.UserError('cat.png is unreadable')", "error: cat.png is unreadable\n"),
    ("raise SafetensorError('I/O error: No space left on device (os error 28)')", "error: the disk is full"),
    ("raise OSError(errno.ENOSPC, 'No space left on device', 'model.safetensors')", "error: the disk is full"),
])
def test_a_users_mistake_ends_in_one_line_and_exit_code_2(tmp_path, body, message):
    (tmp_path / "config.yaml").write_text("output_dir: out")
    program = textwrap.dedent(f"""
        import errno
        from safetensors import SafetensorError
        from clipmoe_vlm import runs
        from tests.test_runs import Config
        def main(config): {body}
        runs.run_program(main, Config, "program")
    """)
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "config.yaml"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(message.strip())
    assert "Traceback" not in done.stderr


def test_progress_where_there_is_no_terminal_is_lines(capsys):
    with runs.progress(total=4, description="outer") as outer:
        for _ in runs.progress(range(3), description="inner: A"):
            outer.write("a sentence")
        outer.update(4)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "a sentence\n" * 3 and captured.err.endswith("\n")
    assert all(line.startswith(("outer: ", "inner: A: ")) for line in lines) and "\r" not in captured.err
    assert any("4/4" in line for line in lines) and any("3/3" in line for line in lines)
