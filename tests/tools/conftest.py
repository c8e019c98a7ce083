"""Fixtures of tests of the command line tools."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project() -> Path:
    """The top of the checkout."""
    return ROOT


@pytest.fixture
def load_tool(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a script below tools/ by its path there."""

    def load(path: str) -> ModuleType:
        name = 'tool_' + path.replace('/', '_').removesuffix('.py')
        spec = importlib.util.spec_from_file_location(name, ROOT / 'tools' / path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load
