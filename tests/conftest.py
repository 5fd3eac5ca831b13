"""Small models and reference files that several tests use."""

import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest  # noqa: E402
import torch  # noqa: E402
from encoder_crash import Server  # noqa: E402
from encoder_data import environment, make_world  # noqa: E402

REFERENCE = Path(__file__).parent / "reference"


@pytest.fixture(scope="session")
def reference() -> Path:
    """Vectors, trajectories and question files made with the original programs."""
    return REFERENCE


@pytest.fixture(scope="module")
def moe_tower(tmp_path_factory) -> str:
    """A small CLIP-MoE vision tower with an image processor."""
    from vlm_world import save_moe_tower

    return save_moe_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_config():
    """Keyword arguments of a `CLIPMoEConfig`: two blocks per tower, 32 pixels, patch 8, 24 text positions."""

    def make(**moe_fields):
        tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                 **moe_fields}
        return {
            "vision_config": {**tower, "image_size": 32, "patch_size": 8},
            "text_config": {**tower, "vocab_size": 120, "max_position_embeddings": 24, "eos_token_id": 119,
                            "bos_token_id": 118, "pad_token_id": 0},
            "projection_dim": 16,
        }

    return make


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The folder of a tiny CLIP and of training and test scenes, for train_encoder."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def server(world):
    """Runs train_encoder in processes that a mishap befalls."""
    with Server(world, environment()) as server:
        yield server


@pytest.fixture(scope="module")
def one_process():
    """`train_vlm.train` joins a process group of one; leave neither it nor its environment to other tests."""
    before = dict(os.environ)
    torch.set_num_threads(1)  # as in the processes that tests start: sums of several threads differ in the last bit
    yield
    if torch.distributed.is_initialized():
        import deepspeed

        deepspeed.comm.destroy_process_group()  # torch's own leaves DeepSpeed with groups that are no more
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium, driven by playwright."""
    chromium = shutil.which("chromium")
    if chromium is None:
        missing = "there is no chromium on the PATH"
        (pytest.fail if os.environ.get("CLIPMOE_NEEDS_CHROMIUM") == "1" else pytest.skip)(missing)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=[
            "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--no-first-run"])
        yield browser
        browser.close()
