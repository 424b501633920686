"""Everything a GPU hour should answer, in one command:

    python -m bench.gpu --budget 540 --out FOLDER
    python -m bench.gpu --device cpu --tiny --out FOLDER     the whole of it without a GPU, under Triton's interpreter: slow, and
                                                             only to see that everything runs

Probes of the device first and last; every kernel's cases against float64; decode graphs against eager steps; the scorecard G1 to G23, each
line as limit / measured beside its baselines; the kernel table. Each part is a process of its own with a share of the budget: what fails,
hangs or poisons the device is a row that says so, and what stood behind it runs in a fresh process. The results are FOLDER/gpu.json and
FOLDER/verified.json; docs/performance.md is written from them. Torch is imported by the parts alone.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

PROJECT = Path(__file__).parents[1]
VERIFIED = PROJECT / "kernels" / "verified.json"
POISONED = 3
"""A part's exit status when no kernel can run in its process any more."""
STALL_S = 100.0
"""So long without a row and a process is taken for stuck; compiling for a baseline is the longest that a row does."""


@dataclass(frozen=True, slots=True)
class Part:
    """share: of the budget. workers: processes at once, for what is not timed."""

    module: str
    share: float
    workers: int = 1


# In order of what one would miss most.
PARTS = {
    "probe_before": Part("gpu_probe", 0.03),
    "correctness": Part("gpu_correctness", 0.13, workers=8),
    "gpu_tests": Part("gpu_tests", 0.08, workers=8),
    "graphs": Part("gpu_graphs", 0.03),
    "attention": Part("gpu_attention", 0.15),
    "steps": Part("gpu_steps", 0.17),
    "offline": Part("gpu_offline", 0.13),
    "products": Part("gpu_products", 0.09),
    "sampling": Part("gpu_sampling", 0.04),
    "serving": Part("gpu_serving", 0.10),
    "kernels": Part("gpu_kernels", 0.02),
    "probe_after": Part("gpu_probe", 0.03),
}


@dataclass(frozen=True, slots=True)
class Run:
    """What every process of a run is told."""

    device: str
    is_tiny: bool
    rates: dict[str, float]

    def arguments(self) -> list[str]:
        return ["--device", self.device, *(["--tiny"] if self.is_tiny else []), "--rates", json.dumps(self.rates)]


# In a part's own process


def run_part(name: str, out: Path, run: Run, place: tuple[int, int], first: int) -> int:
    """Of every place[1]-th step from place[0] on those from number `first` on. Rows are written after each step, so that a kill loses only
    what is not yet measured. The exit status."""
    import torch

    from bench.gpu_clock import NeedsDeviceError, NotBuiltError, Rates, clock_of

    clock = clock_of(run.device, run.is_tiny, Rates(**run.rates) if run.rates else None)
    steps = importlib.import_module(f"bench.{PARTS[name].module}").steps(clock)[place[0] :: place[1]]
    rows = json.loads(out.read_text()) if first else [about | {"not_reached": True} for about, _ in steps]
    is_lacking = run.device == "cuda" and not torch.cuda.is_available()
    for at in range(first, len(steps)):
        about, work = steps[at]
        begun = time.monotonic()
        try:
            if is_lacking:
                raise RuntimeError("torch finds no CUDA device")
            rows[at] = about | work()
        except NotBuiltError as error:
            rows[at] = about | {"not_built": str(error)}
        except NeedsDeviceError as error:
            rows[at] = about | {"needs_device": str(error)}
        except Exception as error:  # a failed case is a row; the next ones still run
            trace = traceback.format_exc().replace(f"{PROJECT}/", "")  # the result is committed: no paths of a machine
            rows[at] = about | {"failed": f"{type(error).__name__}: {error}"[:600], "trace": trace[-1500:]}
        rows[at]["took_s"] = round(time.monotonic() - begun, 2)
        write_whole(out, rows)
        if "failed" in rows[at] and not is_lacking:
            gc.collect()  # what the traceback held
            if clock.is_gpu and not _is_alive():
                return POISONED
            clock.free()
    write_whole(out, rows)
    return 0


def _is_alive() -> bool:
    """Whether the device still computes for this process: after some faults every later call fails too."""
    import torch

    try:
        torch.cuda.synchronize()
        return float(torch.ones(1, device="cuda")) == 1.0
    except Exception:
        return False


def write_whole(path: Path, rows: Sequence[Any]) -> None:
    """A reader sees the old file or the new one."""
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(rows))
    fresh.replace(path)


# In the command's process


def run_in_processes(name: str, limit_s: float, out: Path, run: Run) -> dict[str, Any]:
    """One part with its time limit; whatever it had written before it ended is in the result."""
    start = time.monotonic()
    count = 1 if run.device == "cpu" else min(PARTS[name].workers, max(1, (os.cpu_count() or 1) // 2))
    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(lambda index: _run_slice(name, (index, count), start + limit_s, out, run), range(count)))
    status = next((status for status, _, _ in found if status != "ok"), "ok")
    rows = [row for _, rows, _ in found for row in rows]
    return {
        "part": name,
        "status": status,
        "seconds": time.monotonic() - start,
        "rows": rows,
        "log": "\n".join(log for *_, log in found)[-3000:],
    }


def _run_slice(name: str, place: tuple[int, int], end: float, out: Path, run: Run) -> tuple[str, list[dict[str, Any]], str]:
    """(status, rows, log). A process that dies or is stuck costs the row it was at; the rest goes on in a fresh one."""
    file = out / f"{name}.{place[0]}.part.json"
    limit_s, first, notes = end - time.monotonic(), 0, ""
    while True:
        options = [*run.arguments(), "--part", name, "--place", *map(str, place), "--first", str(first), "--out", str(file)]
        status, log = _watch([sys.executable, "-m", "bench.gpu", *options], file, end, run)
        notes += log
        rows = json.loads(file.read_text()) if file.exists() else []
        reached = next((at for at, row in enumerate(rows) if "not_reached" in row), len(rows))
        if status in ("ok", "cut") or reached == len(rows):
            break
        if status != f"exit status {POISONED}":
            rows[reached] = rows[reached] | {"failed": f"its process ended: {status}; {log[-300:]}"}
            del rows[reached]["not_reached"]
            write_whole(file, rows)
            reached += 1
        first = reached
        if end - time.monotonic() < 10 or first == len(rows):
            break
    file.unlink(missing_ok=True)
    return (f"cut after {limit_s:.0f} s" if status == "cut" else status), rows, notes


def _watch(command: list[str], file: Path, end: float, run: Run) -> tuple[str, str]:
    """(how the process ended, the end of what it said): "ok", "cut" at its time, "stuck", or its exit status."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, (str(PROJECT), os.environ.get("PYTHONPATH")))))
    if run.device == "cpu":
        environment |= {"TRITON_INTERPRET": "1"}
    said = file.with_suffix(".log")
    with said.open("wb") as stream:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stream, env=environment)
        status = ""
        while not status:
            try:
                code = process.wait(0.1)
                status = "ok" if code == 0 else f"exit status {code}"
            except subprocess.TimeoutExpired:
                now, last = time.monotonic(), file.stat().st_mtime if file.exists() else time.time()
                is_stuck = time.time() - last > (10 * STALL_S if run.is_tiny else STALL_S)
                status = "cut" if now > end else "stuck" if is_stuck else ""
        if process.poll() is None:
            process.kill()
            process.wait()
    log = "" if status == "ok" else said.read_text(errors="replace")[-3000:]
    said.unlink()
    return status, log


def rates_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """As `Rates` takes them; nothing where a probe failed that limits are made of."""
    found = {key: value for row in rows for key, value in row.items()}
    if not {"read_bytes_per_s", "bf16_flops_per_s", "kernel_in_graph_s"} <= set(found):
        return {}
    names = {"read": "read_bytes_per_s", "bf16": "bf16_flops_per_s", "fp8": "fp8_flops_per_s", "kernel_s": "kernel_in_graph_s"}
    return {name: found.get(key, 0.0) for name, key in names.items()}


def drift_of(parts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """By how much each rate that limits are made of moved between the first and the last probe, as a share of the first."""
    ends = [rates_of(part["rows"]) for part in parts if part["part"] in ("probe_before", "probe_after")]
    if len(ends) < 2 or not all(ends):
        return {}
    return {name: abs(ends[1][name] / ends[0][name] - 1) for name in ends[0] if ends[0][name]}


def scorecard(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all lines by their number; a baseline of whole models stands with the first measured row of its line."""
    rows = [dict(row) for part in parts for row in part["rows"] if "line" in row]
    for row in [row for row in rows if "baseline" in row]:
        mine = next((one for one in rows if one["line"] == row["line"] and "measured_s" in one), None)
        if mine is not None:
            mine["baselines"] = mine["baselines"] | {row["baseline"]: row["baseline_s"]}
    return sorted(rows, key=lambda row: int(row["line"][1:]))


def report_of(parts: list[dict[str, Any]], options: dict[str, Any]) -> dict[str, Any]:
    drift = drift_of(parts)
    # A tiny run times nothing worth the word.
    is_void = not options["tiny"] and (not drift or max(drift.values()) > 0.05)
    return {"void": is_void, "drift": drift, "options": options, "parts": parts, "scorecard": scorecard(parts)}


def verified_of(parts: Sequence[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """{GPU: {kernel: commit}} of the kernels all of whose cases were reached and passed; of a variant ("kernel/variant") that also was
    faster than none where both were timed, at least once by 2 %, and never slower by 2 %."""
    machine: dict[str, Any] = next((row for part in parts for row in part["rows"] if row.get("case") == "machine"), {})
    by_kernel: dict[str, bool] = {}
    gains: dict[str, list[float]] = {}
    for row in (row for part in parts for row in part["rows"]):
        if "kernel" in row:
            by_kernel[row["kernel"]] = by_kernel.get(row["kernel"], True) and row.get("passes") is True
        times = {name: value for name, value in (row.get("variants") or {}).items() if isinstance(value, float)}
        for name in times.keys() - {"none"} if "none" in times else ():
            gains.setdefault(name, []).append(times["none"] / times[name])
    for name in [name for name in by_kernel if "/" in name]:
        found = gains.get(name, [1.0])
        by_kernel[name] = by_kernel[name] and max(found) > 1.02 and min(found) > 0.98
    passed = {kernel: machine["commit"] for kernel, is_whole in sorted(by_kernel.items()) if is_whole and "commit" in machine}
    return {machine["gpu"]: passed} if passed and machine["gpu"] != "none" else {}


def summary(part: dict[str, Any]) -> str:
    rows = part["rows"]
    failed = [row["case"] for row in rows if "failed" in row or row.get("passes") is False]
    counts = {name: sum(name in row for row in rows) for name in ("not_reached", "not_built", "needs_device", "left_out")}
    told = "".join(f", {count} {name.replace('_', ' ')}" for name, count in counts.items() if count)
    return f"{len(rows)} rows{told}" + (f", {len(failed)} FAILED: {', '.join(failed)[:400]}" if failed else "")


@click.command()
@click.option("--budget", type=click.FloatRange(30), default=540, show_default=True, help="Seconds for everything.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for gpu.json and verified.json.")
@click.option("--only", multiple=True, type=click.Choice(list(PARTS)), help="A part; repeatable. All unless given.")
@click.option("--write-verified", "has_verified", is_flag=True, help="Put what passed into kernels/verified.json too.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--tiny", "is_tiny", is_flag=True, help="Shapes that an interpreter can do, to see that everything runs.")
@click.option("--part", type=click.Choice(list(PARTS)), hidden=True, help="Run one part in this process; --out is then its file.")
@click.option("--place", nargs=2, type=int, default=(0, 1), hidden=True)
@click.option("--first", default=0, hidden=True)
@click.option("--rates", default="{}", hidden=True)
def main(
    budget: float, out: Path, only: tuple[str, ...], has_verified: bool, device: str, is_tiny: bool, part: str | None, **inner: Any
) -> None:
    """Check and time everything on a GPU."""
    if device == "cpu" and not is_tiny:
        raise click.UsageError("--device cpu is the interpreter's, which can do --tiny alone")
    if part:
        sys.exit(run_part(part, out, Run(device, is_tiny, json.loads(inner["rates"])), inner["place"], inner["first"]))
    out.mkdir(parents=True, exist_ok=True)
    end, left, parts = time.monotonic() + budget, 1.0, []
    run = Run(device, is_tiny, {})
    for name in [name for name in PARTS if not only or name in only]:
        # What earlier parts did not use goes to the later ones.
        limit_s = max((end - time.monotonic()) * (PARTS[name].share / left if not only else 1.0), 10)
        left -= PARTS[name].share
        parts.append(run_in_processes(name, limit_s, out, run))
        if name == "probe_before":
            run = Run(device, is_tiny, rates_of(parts[-1]["rows"]))
        report = report_of(parts, {"budget": budget, "device": device, "tiny": is_tiny, "only": list(only)})
        (out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        click.echo(f"{name:12} {parts[-1]['status']:18} {parts[-1]['seconds']:6.1f} s  {summary(parts[-1])}")
    finish(out, report, verified_of(parts), has_verified)


def finish(out: Path, report: dict[str, Any], verified: dict[str, dict[str, str]], has_verified: bool) -> None:
    """Shows the scorecard and writes what passed."""
    from bench.gpu_table import table

    click.echo("\n".join(table(report["scorecard"])))
    (out / "verified.json").write_text(json.dumps(verified, indent=1) + "\n")
    if has_verified and verified:
        known = json.loads(VERIFIED.read_text())
        merged = known | {gpu: known.get(gpu, {}) | kernels for gpu, kernels in verified.items()}
        VERIFIED.write_text(json.dumps(merged, indent=1) + "\n")
    if report["void"]:
        moved = ", ".join(f"{name} {share:.1%}" for name, share in report["drift"].items()) or "one of them is missing"
        click.echo(f"VOID: the probes before and after differ by more than 5 % ({moved})")
    click.echo(f"written: {out / 'gpu.json'}, {out / 'verified.json'}")


if __name__ == "__main__":
    main()
