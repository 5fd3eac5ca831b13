"""`python -m demo.run [size=default|tiny|full] [llm=little|smollm2] [out=FOLDER] [seed=0]`: the whole path.

Every step is an ordinary command line of the three programs (or of open_clip, or of the demo's own makers of data),
printed so that it can be copied. Two steps that do not need each other run side by side, each on half of the cores,
which models as small as these use better than one step uses them all. Killed and typed again, finished steps are not
run again, and the programs go on from their checkpoints.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from clipmoe_vlm.runs import UserError, fail, write_json
from demo import fetch
from demo.sizes import PLANS, Plan

ROOT = Path(__file__).resolve().parents[1]
LLMS = ("little", "smollm2")
SIDE_BY_SIDE = 2  # steps at once
MARK = "CLIPMOE_DEMO_RUN"  # in the environment of every process of a run, so that leftovers of a killed one are known


@dataclass
class Step:
    name: str
    command: list[str]
    needs: tuple[str, ...] = ()  # names of steps that must be finished
    folder: Path | None = None  # where the command runs, if not in the repository's root

    def __str__(self) -> str:
        words = " ".join("$'\\t'" if word == "\t" else shlex.quote(word) for word in self.command)
        return f"(cd {self.folder} && {words})" if self.folder else words


# --- the steps -----------------------------------------------------------------------------------------------------


def steps(out: Path, size: str, llm: str, seed: int) -> list[Step]:
    """All steps; those on the longest way to the end come first, so that they are started first."""
    plan, data = PLANS[size], out / "data"
    sizes = [word for name, value in vars(plan.data).items() for word in (f"--{name.replace('_', '-')}", str(value))]
    towers = {"clipmoe": out / "encoder" / "dmu" / "model", "base": out / "base"}
    needed = {"clipmoe": "dmu", "base": "convert"}
    llm_folder, llm_needed = (fetch.SMOLLM2, ()) if llm == "smollm2" else (out / "llm", ("little LLM",))
    return [
        Step("data", ["python", "-m", "demo.data", str(data), "--stamps", str(fetch.STAMPS), "--seed", str(seed),
                      *sizes]),
        base_clip(out, plan.base_epochs, seed),
        Step("convert", ["python", "-m", "clipmoe_vlm", "convert",
                         str(out / "base_open_clip" / "checkpoints" / f"epoch_{plan.base_epochs}.pt"),
                         str(out / "base"), "--architecture", "demo/configs/clip_64.json"], needs=("base CLIP",)),
        encoder(out, plan, "dmu", seed),
        *([] if llm == "smollm2" else [Step("little LLM", [
            "python", "-m", "demo.little_llm", str(data), str(llm_folder), "--steps", str(plan.llm_steps),
            "--seed", str(seed)], needs=("data",))]),
        *(vlm(out, plan, tower, 1, [f"llm={llm_folder}", f"vision_tower={towers[tower]}"],
              (needed[tower], *llm_needed), llm, seed) for tower in towers),
        *(vlm(out, plan, tower, 2, [f"vlm={out}/vlm/{tower}/stage_1/model"],
              (f"VLM {tower} stage 1",), llm, seed) for tower in towers),
        encoder(out, plan, "sparse_upcycling", seed),
        encoder(out, plan, "direct", seed),
        *(Step(f"score {tower}", [
            "python", "-m", "eval_vlm.run", "demo/configs/eval.yaml",
            f"model={out}/vlm/{tower}/stage_2/model", f"output_dir={out}/eval/{tower}",
            f"pope.questions_dir={data}/pope", f"pope.image_folder={data}/images/test",
            f"mme.folder={data}/mme"], needs=(f"VLM {tower} stage 2",)) for tower in towers),
        Step("compare", ["python", "-m", "eval_vlm.compare", f"{out}/eval/base", f"{out}/eval/clipmoe"],
             needs=("score base", "score clipmoe")),
    ]


def base_clip(out: Path, epochs: int, seed: int) -> Step:
    """open_clip's training program, run in the data folder because its captions file names pictures from there."""
    data = out / "data"
    return Step("base CLIP", [
        "python", os.path.relpath("demo/open_clip_main.py", data), "--model", "clip_64", "--train-data",
        "short_train.csv", "--dataset-type", "csv", "--csv-separator", "\t", "--csv-img-key", "filepath",
        "--csv-caption-key", "title", "--batch-size", "128", "--epochs", str(epochs), "--lr", "1e-3", "--wd", "0.1",
        "--warmup", "50", "--workers", "1", "--precision", "fp32", "--seed", str(seed), "--log-every-n-steps", "10",
        "--save-frequency", "1", "--delete-previous-checkpoint", "--resume", "latest", "--logs", "..",
        "--name", "base_open_clip"], needs=("data",), folder=data)


def encoder(out: Path, plan: Plan, method: str, seed: int) -> Step:
    data = out / "data"
    return Step(method.replace("_", " "), [
        "python", "-m", "train_encoder.run", "demo/configs/encoder.yaml", f"method={method}", f"model={out}/base",
        f"output_dir={out}/encoder/{method}", f"train_data={data}/detailed_train.jsonl",
        f"validation_data={data}/detailed_test.jsonl", f"hard_captions={data}/hard_test.jsonl",
        f"mcl.max_steps={plan.mcl_steps}", f"router.max_steps={plan.router_steps}", f"seed={seed}"],
        needs=("convert",))


def vlm(out: Path, plan: Plan, tower: str, stage: int, source: list[str], needs: tuple[str, ...], llm: str,
        seed: int) -> Step:
    # SmolLM2 knows English already: small updates; and two runs of it must fit into memory side by side.
    tuning = ["learning_rate=2e-4", "projector_learning_rate=1e-3", "micro_batch_size=2"] if llm == "smollm2" else []
    precision = ["precision=bf16"] if torch.cuda.is_available() else []
    most = plan.projector_steps if stage == 1 else plan.vlm_steps
    return Step(f"VLM {tower} stage {stage}", [
        "deepspeed", "--num_accelerators", "1", "--master_port", str(free_port()), "train_vlm/run.py",
        f"demo/configs/vlm_stage_{stage}.yaml", *source, f"output_dir={out}/vlm/{tower}/stage_{stage}",
        f"data={out}/data/llava_stage{stage}.json", f"image_folder={out}/data", f"max_steps={most}",
        f"epochs={most}", f"seed={seed}", *tuning, *precision], needs=needs)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- running them --------------------------------------------------------------------------------------------------


def run_all(todo: list[Step], done: set[str], out: Path, finished: Callable[[Step, float], None]) -> None:
    """Runs the steps, two side by side, each as soon as what it needs is done; calls `finished(step, seconds)`.

    Raises:
        UserError: a step failed; what runs beside it is stopped.
    """
    # Always half of the cores, even for a step that is alone: the number of threads moves the last bits of a result.
    threads = max(1, (os.cpu_count() or 1) // SIDE_BY_SIDE)
    environment = {**os.environ, MARK: str(out.resolve()), "OMP_NUM_THREADS": str(threads),
                   "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    running: list[tuple[Step, subprocess.Popen, threading.Thread, float]] = []
    while todo or running:
        for step in [step for step in todo if done.issuperset(step.needs)][:SIDE_BY_SIDE - len(running)]:
            todo.remove(step)
            print(f"\n$ {step}", flush=True)
            process = subprocess.Popen(step.command, cwd=step.folder, env=environment, stdin=subprocess.DEVNULL,
                                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            thread = threading.Thread(target=echo, args=(step.name, process))
            thread.start()
            running.append((step, process, thread, time.monotonic()))
        for item in [item for item in running if item[1].poll() is not None]:
            running.remove(item)
            step, process, thread, started = item
            thread.join()
            if process.returncode:
                stop_leftovers(out)
                raise UserError(f"the step '{step.name}' ended with code {process.returncode} (its words are above); "
                                "mend that and type the same command again: finished steps are kept")
            done.add(step.name)
            finished(step, round(time.monotonic() - started, 1))
        time.sleep(0.1)


def echo(name: str, process: subprocess.Popen) -> None:
    """Prints what a step says, line by line under its name; a progress bar's carriage returns end lines too."""
    with open(process.stdout.fileno(), encoding="utf-8", errors="replace", newline=None, closefd=False) as stream:
        for line in stream:
            line = line.replace("\x1b[A", "").strip()  # a second bar moves up to the first
            if line:
                print(f"[{name}] {line}", flush=True)


def stop_leftovers(out: Path) -> None:
    """Ends processes of this run that still live: other steps of a failed group, children of a killed run."""
    mark = f"{MARK}={out.resolve()}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
        except OSError:
            continue  # it ended meanwhile, or is another user's


def options(arguments: list[str]) -> dict[str, str]:
    """Raises:
        UserError: an option that does not exist, or a value that it cannot have.
    """
    values = {"size": "default", "llm": "little", "out": "", "seed": "0"}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in values:
            raise UserError(f"'{argument}' is not one of size=..., llm=..., out=..., seed=...")
        values[key] = value
    for key, allowed in (("size", tuple(PLANS)), ("llm", LLMS)):
        if values[key] not in allowed:
            raise UserError(f"{key}={values[key]}: choose one of {', '.join(allowed)}")
    if not values["seed"].isdecimal():
        raise UserError(f"seed={values['seed']}: give a whole number")
    names = ["demo", *([values["size"]] if values["size"] != "default" else []),
             *([values["llm"]] if values["llm"] != "little" else [])]
    values["out"] = values["out"] or f"runs/{'_'.join(names)}"
    return values


def read_timing(out: Path, size: str, llm: str, seed: int) -> dict:
    """What is finished already.

    Raises:
        UserError: the folder holds a run of another size, language model or seed.
    """
    ours = {"size": size, "llm": llm, "seed": seed}
    file = out / "timing.json"
    if not file.is_file():
        return {**ours, "cores": os.cpu_count(), "steps": []}
    timing = json.loads(file.read_text(encoding="utf-8"))
    different = [f"{key} {timing[key]}" for key in ours if timing[key] != ours[key]]
    if different:
        raise UserError(f"{out} holds a run with {', '.join(different)}; name another folder with out=..., or "
                        "remove it")
    return timing


def main() -> None:
    os.chdir(ROOT)
    values = options(sys.argv[1:])
    out, seed = Path(values["out"]), int(values["seed"])
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "w")  # noqa: SIM115  held until this process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run is at work in {out}; wait for it, or name another folder with out=...") from None
    stop_leftovers(out)
    timing = read_timing(out, values["size"], values["llm"], seed)
    print("fetching what the demo is made of (once)", flush=True)
    fetch.stamps()
    if values["llm"] == "smollm2":
        fetch.smollm2()
    done = {step["name"] for step in timing["steps"]}

    def finished(step: Step, seconds: float) -> None:
        timing["steps"].append({"name": step.name, "command": str(step), "started": round(time.time() - seconds, 1),
                                "seconds": seconds})
        write_json(out / "timing.json", timing)
        print(f"[{step.name}] finished after {seconds:.0f} s", flush=True)

    todo = [step for step in steps(out, values["size"], values["llm"], seed) if step.name not in done]
    run_all(todo, done, out, finished)
    print(f"\n$ python -m demo.report {out}", flush=True)
    sys.exit(subprocess.run([sys.executable, "-m", "demo.report", str(out)], check=False).returncode)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("stopped; type the same command again to go on")
