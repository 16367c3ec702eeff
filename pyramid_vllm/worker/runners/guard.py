"""Executors that would run steps past the worker.

Cause: the worker takes the plan from the step that it is given, but vLLM 0.32's older
Ray executor gives steps to the model runner: tokens would be evicted in the plan alone,
and outputs be silently wrong. Removal: once executors cannot do so, or a plan reaches
the runner by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyramid_vllm.plan import plan_of

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    from pyramid_vllm.worker.step import TierStep


def guard_runner(runner: Any, step: TierStep) -> None:
    """Let a runner refuse every step but the worker's current one.

    Args:
        runner: vLLM's runner, V1 or V2.
        step: the worker's.
    """
    stock = runner.execute_model

    def execute_model(
        scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any
    ) -> Any:
        # Steps of the runner's own, for warm-up and idle ranks, have none.
        if plan_of(scheduler_output) is not step.plan:
            raise RuntimeError(
                "KV policy: the model runner was given a step past the worker, which "
                "alone runs its plan: the executor has to call the worker's "
                "execute_model"
            )
        return stock(scheduler_output, *args, **kwargs)

    runner.execute_model = execute_model
