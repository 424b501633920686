"""Everything a GPU hour should answer, in one command:

    python -m bench.gpu --budget 540 --out FOLDER

Correctness of every kernel against float64 (error at most twice that of plain PyTorch in the same dtype), the kernel table with each
case's share of the measured limit, decode graphs against eager steps, and end-to-end step times on random weights of known shapes.
Each part is a process of its own with a share of the budget: one that fails, hangs or poisons the device is a row that says so.
The one result is FOLDER/gpu.json; docs/performance.md is written from it.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

PROJECT = Path(__file__).parents[1]
# Name: the share of the budget it may take. In order of what one would miss most.
PARTS = {"machine": 0.08, "correctness": 0.30, "graphs": 0.12, "kernels": 0.30, "end_to_end": 0.20}


def machine() -> list[dict[str, Any]]:
    """What the device can do at best: copy and read bandwidth, bf16 matrix product, an empty kernel inside a graph."""
    import torch
    import triton

    from bench.probe import describe_machine

    device = torch.cuda.get_device_properties(0)
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    row = torch.zeros(1, device="cuda")
    copy_s = seconds(lambda: target.copy_(source))
    read_s = seconds(lambda: source.sum())
    matmul_s = seconds(lambda: a @ b)
    chain_s = seconds(graph_of(lambda: [row.add_(1) for _ in range(200)])) / 200
    return [
        describe_machine()
        | {
            "gpu": device.name,
            "memory_bytes": device.total_memory,
            "multiprocessors": device.multi_processor_count,
            "triton": triton.__version__,
            "copy_bytes_per_s": 2 * source.nbytes / copy_s,
            "read_bytes_per_s": source.nbytes / read_s,
            "bf16_flops_per_s": 2 * 8192**3 / matmul_s,
            "kernel_in_graph_s": chain_s,
        }
    ]


def graph_of(work: Callable[[], Any]) -> Callable[[], Any]:
    """The work as one CUDA graph, so that launches cost what they cost in serving."""
    import torch

    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def seconds(work: Callable[[], Any]) -> float:
    """Median seconds of one call, by device events, after a warm-up."""
    from triton.testing import do_bench

    return float(do_bench(work, warmup=30, rep=150, return_mode="median")) / 1e3


def run_part(name: str, out: Path) -> None:
    """In a process of its own. Rows are written after each step, so that a kill loses only what is not yet measured."""
    rows: list[dict[str, Any]] = []

    def write(row: dict[str, Any]) -> None:
        rows.append(row)
        out.write_text(json.dumps(rows))

    if name == "machine":
        for row in machine():
            write(row)
        return
    part = importlib.import_module(f"bench.gpu_{name}")
    for title, work in part.steps():
        try:
            write({"case": title} | work())
        except Exception as error:  # a failed case is a row; the next ones still run
            trace = traceback.format_exc().replace(f"{PROJECT}/", "")  # the result is committed: no paths of a machine
            write({"case": title, "failed": f"{type(error).__name__}: {error}"[:600], "trace": trace[-1500:]})


def run_in_process(name: str, limit_s: float, out: Path) -> dict[str, Any]:
    """One part with its time limit; whatever it had written before it ended is in the result."""
    start = time.monotonic()
    file = out / f"{name}.part.json"
    command = [sys.executable, "-m", "bench.gpu", "--part", name, "--out", str(file)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
        status, log = ("ok", "") if done.returncode == 0 else (f"exit status {done.returncode}", done.stderr[-3000:])
    except subprocess.TimeoutExpired as expired:
        status, log = f"cut after {limit_s:.0f} s", str(expired.stderr or "")[-3000:]
    rows = json.loads(file.read_text()) if file.exists() else []
    file.unlink(missing_ok=True)
    return {"part": name, "status": status, "seconds": time.monotonic() - start, "rows": rows, "log": log}


@click.command()
@click.option("--budget", type=click.FloatRange(30), default=540, show_default=True, help="Seconds for everything.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for gpu.json.")
@click.option("--part", type=click.Choice(list(PARTS)), help="Run one part in this process; --out is then its file.")
def main(budget: float, out: Path, part: str | None) -> None:
    """Check and time everything on a GPU."""
    if part:
        run_part(part, out)
        return
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget
    results: list[dict[str, Any]] = []
    left = 1.0
    for name, share in PARTS.items():
        # What earlier parts did not use goes to the later ones.
        limit_s = max((end - time.monotonic()) * share / left, 10)
        left -= share
        results.append(run_in_process(name, limit_s, out))
        (out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
        click.echo(f"{name:12} {results[-1]['status']:18} {results[-1]['seconds']:6.1f} s  {summary(results[-1]['rows'])}")
    click.echo(f"written: {out / 'gpu.json'}")


def summary(rows: list[dict[str, Any]]) -> str:
    failed = [row["case"] for row in rows if "failed" in row or row.get("passes") is False]
    return f"{len(rows)} rows" + (f", {len(failed)} FAILED: {', '.join(failed)[:400]}" if failed else "")


if __name__ == "__main__":
    main()
