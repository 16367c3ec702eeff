"""The goals that `scripts/reproduce` reports, from results that this file makes up."""

from typing import Any

import pytest
from goals import (
    batch_goals,
    one_prompt_goals,
    peer_figures,
    peer_goals,
    quality_goals,
)

from pyramid_vllm.tools.quality.tasks import Task


def tasks(losses: list[float], scores: list[float], share: float) -> dict[str, Any]:
    interval = {"value": share, "low": share - 0.01, "high": share + 0.01}
    return {
        "continuation": {
            "summary": {"loss_difference_share": interval},
            "samples": {"loss": losses},
        },
        "single_needle 2048": {"samples": {"score": scores}},
    }


def results(share: float, scores: list[float], full: list[float]) -> dict[str, Any]:
    ours = tasks([3.1, 3.3], scores, share)
    sides = [
        {"label": "full cache", "retention": None, "tasks": tasks([3.0, 3.2], full, 0)},
        {"label": "pyramid", "retention": 0.6, "tasks": {}},
        {"label": "pyramid", "retention": 0.4, "tasks": ours},
    ]
    return {"sides": sides}


@pytest.mark.parametrize(("share", "met"), [(0.009, True), (0.011, False)])
def test_the_loss_may_rise_by_one_percent(share: float, met: bool) -> None:
    loss, needles = quality_goals(results(share, [1, 0], [1, 1]), "a model", "command")
    assert (loss["met"], loss["value"]) == (met, share)
    assert (needles["met"], needles["value"]) == (False, 0.5)


def test_needles_count_only_where_the_full_cache_finds_them() -> None:
    assert len(quality_goals(results(0.0, [1, 1], [1, 0]), "a model", "command")) == 1


def test_the_best_press_is_what_counts() -> None:
    peers = {
        "full": {"nll": [[3.0], [3.2]]},
        "presses": {
            "better": {"nll": [[3.05], [3.25]], "outputs": [[1]], "kept_tokens": 8.0},
            "worse": {"nll": [[4.0], [4.0]], "outputs": [[2]], "kept_tokens": 8.0},
        },
    }
    retrieval = Task(
        "single_needle",
        "retrieval",
        [],
        lambda result, full: {"score": [float(result.outputs == [[2]])]},
    )
    figures = peer_figures(peers, retrieval)
    assert figures["worse"]["scores"] == [1.0]
    loss, needles = peer_goals(results(0.0, [1, 1], [1, 1]), figures, "command")
    assert loss["value"] == pytest.approx(0.05)
    assert not loss["met"]
    assert (needles["value"], needles["met"]) == (0.0, False)


def point(label: str, binds: bool, **ratios: float) -> dict[str, Any]:
    ours = {
        key: {"ratio": {"median": value, "min": value, "max": value}}
        for key, value in ratios.items()
    }
    return {"label": label, "memory_binds": binds, "sides": {"pyramid": ours}}


def test_speeds_are_judged_on_their_side_of_the_crossover() -> None:
    points = [
        point("2x", True, total_tokens_per_s=2.3),
        point("4x", True, total_tokens_per_s=1.5),
        point("9x", False, total_tokens_per_s=0.96),
    ]
    bound, free = batch_goals({"points": points}, "command")
    assert (bound["value"], bound["met"]) == (2.3, True)
    assert "2x" in bound["name"]
    assert (free["value"], free["met"]) == (0.96, False)


def test_memory_and_first_token_of_one_prompt() -> None:
    one = point("2x", False, kv_bytes_per_request=0.44, ttft_p50_s=0.8)
    memory, sooner = one_prompt_goals({"points": [one]}, "command")
    assert (memory["met"], sooner["met"]) == (True, False)
