"""What an installed Braid has: the wheel holds everything that the program reads beside its own code, Braid's own model above all."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
WANTED = (
    "service/weights/braid-nano/config.json",
    "service/weights/braid-nano/tokenizer.json",
    "service/weights/braid-nano/model.safetensors",
    "service/weights/braid-nano/image_tokenizer/model.safetensors",
    "service/weights/braid-nano/README.md",
    "service/api/static/index.html",
    "training/recipes/nano.toml",
    "training/pages/model.md.j2",
    "kernels/verified.json",
)


@pytest.mark.long
def test_a_wheel_serves_braids_own_model_wherever_it_is_installed(tmp_path: Path) -> None:
    source, wheels, site = tmp_path / "source", tmp_path / "wheels", tmp_path / "site"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        if (REPOSITORY / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, source / name)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", wheels, source], check=True)
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
    assert not [each for each in WANTED if each not in names]
    assert any(each.startswith("kernels/cpu/") and each.endswith(".so") for each in names)
    assert wheel.stat().st_size < 30_000_000
    code = "from service.catalog import resolve; print(resolve('braid-nano').path)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(site)}, capture_output=True, check=True, text=True
    )
    assert Path(found.stdout.strip()) == site / "service/weights/braid-nano"
