"""Builds the CPU kernels beside the package: one shared library, each file compiled for the instruction set that it is named after. And
puts the models that ship with Braid into the package.

Everything else about the package is in pyproject.toml. Without a C++ compiler the build goes on, and the server falls back to PyTorch.
"""

from __future__ import annotations

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

FLAGS = [
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-fPIC",
    "-pthread",
    "-g0",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
]
ISA_FLAGS = {
    "x86_64": {
        "isa_avx512.cpp": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma -mf16c -mprefer-vector-width=512".split(),
        "isa_avx2.cpp": "-mavx2 -mfma -mf16c".split(),
    },
    "aarch64": {"isa_neon.cpp": ["-march=armv8.2-a+dotprod"]},
}
SAME_MACHINE = {"amd64": "x86_64", "arm64": "aarch64"}
FOLDER = Path("kernels/cpu")
WEIGHTS = Path("weights")


def flags_of(source: str, machine: str) -> list[str]:
    """What a file of the library is compiled with for a machine, named as `platform.machine` does."""
    machine = machine.lower()
    return FLAGS + ISA_FLAGS.get(SAME_MACHINE.get(machine, machine), {}).get(source, [])


class BuildKernels(build_ext):
    """Adds flags file by file: one flag set for the whole library would let machines without AVX-512 run into it."""

    def build_extension(self, ext: Extension) -> None:
        objects: list[str] = []
        for source in ext.sources:
            flags = flags_of(Path(source).name, platform.machine())
            objects += self.compiler.compile([source], output_dir=self.build_temp, depends=ext.depends, extra_postargs=flags)
        self.compiler.link_shared_object(objects, self.get_ext_fullpath(ext.name), extra_postargs=["-pthread"], target_lang="c++")


class BuildWithWeights(build_py):
    """Where an installed server looks for them; a checkout has them beside the package (`service.catalog.ShippedEntry`)."""

    def run(self) -> None:
        super().run()
        for path in sorted(WEIGHTS.rglob("*")) if not self.editable_mode else ():
            if path.is_file():
                target = Path(self.build_lib, "service", path)
                self.mkpath(str(target.parent))
                self.copy_file(str(path), str(target))


if __name__ == "__main__":  # the tests take the flags from here
    setup(
        ext_modules=[
            Extension(
                "kernels.cpu._braid_cpu",
                sources=sorted(str(path) for path in FOLDER.glob("*.cpp")),
                depends=sorted(str(path) for path in FOLDER.glob("*.h")),
                language="c++",
                optional=True,
            )
        ],
        cmdclass={"build_ext": BuildKernels, "build_py": BuildWithWeights},
    )
