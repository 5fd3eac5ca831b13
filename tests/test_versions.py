"""The warning about versions of hosts that the tests do not run with."""

import warnings
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

import pytest

from clipmoe_vlm import versions


def warnings_with(monkeypatch, **installed: str) -> list[str]:
    def version(package: str) -> str:
        if package not in installed:
            raise PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(versions, "version", version)
    versions.warn_if_untested.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            versions.warn_if_untested()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(("installed", "said"), [
    ({"transformers": "4.35.2"}, ["transformers 4.35.2, but with 4.36 to 5."]),
    ({"transformers": "6.0.0.dev0", "torch": "1.13.1"}, ["torch 1.13.1, but", "transformers 6.0.0.dev0, but"]),
    ({"llava": "1.7.0.dev0"}, ["llava 1.7.0.dev0, but with 1.2"]),
    ({"transformers": "4.36.0", "torch": "2.0.1+cu117", "llava": "1.2.2.post1"}, []),
])
def test_what_is_outside_is_said_once(monkeypatch, installed, said):
    messages = warnings_with(monkeypatch, **installed)
    assert len(messages) == len(said)
    assert all(part in message for part, message in zip(said, messages, strict=True))


def test_these_tests_run_with_tested_versions(monkeypatch):
    installed = {package: installed_version(package) for package in ("torch", "transformers")}
    assert warnings_with(monkeypatch, **installed) == []
