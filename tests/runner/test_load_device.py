"""Which GPU a start is told to use, and that it is the current one before anything is launched."""

from __future__ import annotations

import pytest
import torch

from service.engine.messages import Load
from service.errors import StartupError
from service.runner.load import choose_device, load_models


class Chosen(Exception):
    pass


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_device(device: torch.device) -> None:
        raise Chosen(str(device))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)


def test_the_gpu_that_is_named_is_the_current_one() -> None:
    """Where it is not, kernels of the first GPU are given addresses of another."""
    load = Load((), "auto", "cuda:1", 0, 0, max_batch_tokens=64, max_sequences=5, prefix_cache=True)
    with pytest.raises(Chosen, match="cuda:1"):
        load_models(load, lambda phase, fraction: None)


def test_a_gpu_that_is_not_there_is_refused() -> None:
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(StartupError, match="--device cuda:2: torch finds 2 CUDA devices, cuda:0 to cuda:1"):
        choose_device("cuda:2")
