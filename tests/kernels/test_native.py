"""The native checks (native/check.cpp): against the library as it was built; under sanitizers; and for ARM's NEON under emulation.

`test_cpu_*.py` compare the same operations with the references of `kernels/`; these run where Python can't be.
"""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kernels.cpu.library import load
from tests.kernels.cpu_inputs import ISAS, needs_library

ROOT = Path(__file__).parents[2]
SOURCES = sorted(ROOT.glob("kernels/cpu/*.cpp"))
CHECK = Path(__file__).parent / "native" / "check.cpp"
NATIVE = os.environ.get("CXX", "g++")
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
ON_ARM = platform.machine().lower() in ("aarch64", "arm64")

needs_compiler = pytest.mark.skipif(shutil.which(NATIVE) is None, reason=f"there is no {NATIVE}")
needs_emulator = pytest.mark.skipif(
    shutil.which(CROSS) is None or shutil.which(EMULATOR) is None,
    reason=f"{CROSS} or {EMULATOR} is missing (Debian's packages g++-aarch64-linux-gnu and qemu-user)",
)


def command(*words: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, env={**os.environ, **(env or {})})


def build(compiler: str, isas: Iterable[str], machine: str, extra: Sequence[str], folder: Path) -> Path:
    """The checks and the library's files in one program, each file with the flags that setup.py gives it for the machine; of the
    instruction sets only those asked for, since a sanitizer makes each of them slow to compile."""
    flags_of = runpy.run_path(str(ROOT / "setup.py"))["flags_of"]
    left_out = [source for source in SOURCES if source.stem.startswith("isa_") and source.stem.removeprefix("isa_") not in isas]
    absent = folder / "absent.cpp"
    tables = [f"const Table* {source.stem.removeprefix('isa_')}_table() {{ return nullptr; }}\n" for source in left_out]
    absent.write_text('#include "braid_cpu.h"\n' + "".join(tables))

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        done = command(compiler, *flags_of(source.name, machine), *extra, f"-I{SOURCES[0].parent}", "-c", source, "-o", target)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr, done.stderr
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [source for source in SOURCES if source not in left_out] + [absent, CHECK]))
    done = command(compiler, *extra, "-pthread", *objects, "-o", folder / "check")
    assert done.returncode == 0, done.stderr
    return folder / "check"


def expect_ok(done: subprocess.CompletedProcess[str], isas: Iterable[str]) -> None:
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    for isa in isas:
        assert f"ok    {isa} attention" in done.stdout


@needs_compiler
@needs_library
def test_the_installed_library_passes(tmp_path: Path) -> None:
    library = load()
    assert library is not None
    flags = ("-std=c++17", "-O0", "-Wall", "-Wextra", "-Wno-psabi", "-pthread")
    done = command(NATIVE, *flags, CHECK, library._name, "-o", tmp_path / "check")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    expect_ok(command(tmp_path / "check"), ISAS)


@pytest.mark.long
@pytest.mark.timeout(900)
@needs_compiler
@pytest.mark.parametrize("isa", ISAS)
def test_sanitizers_of_addresses_and_undefined_behaviour_find_nothing(isa: str, tmp_path: Path) -> None:
    """At -O1, because what the sanitizers add to each access takes the optimiser minutes."""
    extra = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    program = build(NATIVE, [isa], platform.machine(), extra, tmp_path)
    expect_ok(command(program, isa, env={"UBSAN_OPTIONS": "print_stacktrace=1"}), [isa])


@pytest.mark.long
@pytest.mark.timeout(900)
@needs_compiler
def test_the_sanitizer_of_threads_finds_nothing(tmp_path: Path) -> None:
    """Over the plain operations alone: threads share the same things at every instruction set."""
    program = build(NATIVE, ["generic"], platform.machine(), ("-O1", "-g1", "-fsanitize=thread"), tmp_path)
    expect_ok(command(program, "generic"), ["generic"])


@pytest.fixture(scope="module")
def arm_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Static, so that the emulator needs no libraries of the other machine."""
    return build(CROSS, ["neon", "generic"], "aarch64", ("-static",), tmp_path_factory.mktemp("arm"))


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(ON_ARM, reason="this machine runs it itself")
@needs_emulator
def test_neon_under_emulation(arm_program: Path) -> None:
    done = command(EMULATOR, arm_program)
    expect_ok(done, ["neon", "generic"])
    assert "the best here is neon" in done.stdout


@pytest.mark.long
@pytest.mark.timeout(900)
@needs_emulator
def test_a_processor_without_dot_products_takes_the_plain_operations(arm_program: Path) -> None:
    done = command(EMULATOR, "-cpu", "cortex-a53", arm_program, "neon")
    assert done.returncode == 2
    assert "the best here is generic" in done.stdout
    assert "neon can't be run here" in done.stdout
