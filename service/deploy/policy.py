"""Ray Serve's side of `scaling`: what its controller knows, as a `Load`, and how many replicas that makes.

Runs in Serve's controller. Named in the config by its path; nothing else imports it.
"""

from __future__ import annotations

from typing import Any

from service.deploy.scaling import Goal, Load, decide

_PAST = "braid_past"


class ScalingPolicy:
    """Keywords come from the config: `policy_kwargs`. Ray's own delays are set to 0 there, since `decide` has its own."""

    def __init__(self, requests: float = 16.0, kv_use: float = 0.8, calm_s: float = 300.0) -> None:
        self._requests = requests
        self._kv_use = kv_use
        self._calm_s = calm_s

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """context: ray.serve's AutoscalingContext."""
        goal = Goal(
            requests=self._requests,
            low=context.capacity_adjusted_min_replicas,
            high=context.capacity_adjusted_max_replicas,
            kv_use=self._kv_use,
            calm_s=self._calm_s,
        )
        shares = list((context.aggregated_metrics or {}).get("kv_use", {}).values())
        load = Load(
            replicas=context.current_num_replicas,
            requests=float(context.total_num_requests),
            kv_use=sum(shares) / len(shares) if shares else 0.0,
        )
        past = tuple((when, count) for when, count in context.policy_state.get(_PAST, ()))
        count, past = decide(load, goal, past, context.current_time)
        return count, {_PAST: past}
