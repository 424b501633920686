"""What start-up may import: little before the engine's process is started and the port answers, and of torch what it brings itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def modules_after(code: str) -> set[str]:
    """The packages that a process of its own has loaded after it, dotted names included."""
    shown = f"import sys\n{code}\nprint(' '.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", shown], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())


def test_the_engine_is_started_by_few_imports() -> None:
    found = modules_after("import service.cli, service.__main__")
    assert "service.engine.client" in found
    assert not found & {"uvicorn", "starlette", "fastapi", "pydantic", "numpy", "tokenizers", "jinja2", "httpx", "rich", "torch"}


def test_the_port_answers_without_the_app() -> None:
    found = modules_after("import service.api.door, service.api.server, service.api.layers, service.metrics, service.jobs.desk")
    assert not found & {"fastapi", "pydantic", "numpy", "tokenizers", "jinja2", "httpx", "rich", "PIL", "torch"}


def test_the_app_needs_no_http_client() -> None:
    assert not modules_after("import service.api.app, service.api.insider, service.codec.prompt") & {"httpx", "rich", "torch"}


def test_the_engine_imports_no_part_of_torch_that_torch_does_not() -> None:
    plain = modules_after("import torch")
    found = modules_after("import service.worker, service.runner.load")
    assert {"torch", "service.runner.load"} <= found
    assert {name for name in found - plain if name.partition(".")[0] in ("torch", "sympy")} == set()
    assert not found & {"transformers", "triton", "torch._dynamo", "torch._inductor", "fastapi", "pydantic", "tokenizers"}
