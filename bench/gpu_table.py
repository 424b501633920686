"""The scorecard of `bench.gpu` as text, a row for each case. No torch: the command that prints it computes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_ABOUT = ("case", "line", "workload", "limit", "floor", "target", "trace", "took_s")


def table(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The scorecard as lines of text, a row for each case."""
    lines = [f"{'case':52} {'limit':>10} {'measured':>10} {'score':>6}  baselines, x our time"]
    for row in rows:
        why = next((f"{key}: {row[key]}" for key in ("not_built", "needs_device", "left_out", "failed") if key in row), None)
        if why is not None or "measured_s" not in row:
            shown = why or ", ".join(f"{key} {_short(row[key])}" for key in row if key not in _ABOUT)
            lines.append(f"{row['case']:52} {shown[:150]}")
            continue
        others = [f"{name} {value / row['measured_s']:.2f}" for name, value in row["baselines"].items() if isinstance(value, float)]
        missing = [name for name, value in row["baselines"].items() if not isinstance(value, float)]
        others += [f"none: {', '.join(missing)}"] if missing else []
        lines.append(
            f"{row['case']:52} {row['limit_s'] * 1e6:>7.1f} us {row['measured_s'] * 1e6:>7.1f} us {row['score']:>6.2f}  {', '.join(others)}"
        )
    return lines


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)[:60]
