"""The Triton kernels, interpreted on the CPU, beside their torch references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyramid_vllm.kernels import normalizer_triton, score_triton, select_triton
from pyramid_vllm.kernels.compact_triton import compact_pages
from pyramid_vllm.kernels.requests_triton import INTERPRETED, PagedLayers
from tests.parity.cases import all_cases, some_of
from tests.parity.compared import Case
from tests.parity.moves import compare_compaction, compare_levels, compare_selection
from tests.parity.paging import LAYOUTS, Cache, Request, Shape
from tests.parity.scores import Scoring, compare_scores, scored

if not INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

HALF = torch.bfloat16
CASES = all_cases("cpu")


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.kernel}-{case.variant}"
)
def test_a_kernel_gives_what_its_reference_gives(case: Case) -> None:
    compared = case.run()
    assert compared.num_values > 0
    assert compared.is_same, compared


def test_a_few_cases_are_of_every_kernel() -> None:
    few = some_of(CASES)
    assert {case.kernel for case in few} == {case.kernel for case in CASES}
    assert len(few) < len(CASES) / 4


def test_a_gpu_runs_these_cases_and_more() -> None:
    """The cases are listed, not run: running them needs a GPU."""
    native = {(case.kernel, case.variant) for case in all_cases("cuda")}
    assert native > {(case.kernel, case.variant) for case in CASES}


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("sizes", [(16, 16, 32), (32, 64, 64)])
def test_scores_of_small_blocks(
    kind: int, sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, there are many blocks of rows, and keys are split."""
    monkeypatch.setattr(score_triton, "_sizes", lambda *_: sizes[:2])
    monkeypatch.setattr(normalizer_triton, "_split", lambda *_: sizes[2])
    requests = [scored(held, 19) for held in (1, 33, 90)]
    compared = compare_scores(Scoring(Shape(1), 3, kind, distance_weight=1.0), requests)
    assert compared.is_same, compared


@pytest.mark.parametrize("kind", range(3))
def test_scores_in_several_launches(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where all normalizers of a step are more than fit."""
    monkeypatch.setattr(normalizer_triton, "MAX_NORMALIZERS", 1)
    requests = [scored(held, 19) for held in (1, 33, 90)]
    compared = compare_scores(Scoring(Shape(1), 3, kind, distance_weight=1.0), requests)
    assert compared.is_same, compared


@pytest.mark.parametrize("block", [16, 64])
def test_selection_in_small_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_triton, "_BLOCKS", (block, block))
    requests = [
        Request(held, kept, kept // 3, kept // 4)
        for held in (16, 33, 65, 100)
        for kept in (held // 2, held - 1)
    ]
    assert compare_levels(requests, 3, 1).is_same


VALUES = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4e38, -3.4e38, float("-inf"), float("inf")]
)


@settings(max_examples=30)
@given(st.data())
def test_any_selection(data: st.DataObject) -> None:
    held = data.draw(st.integers(1, 40))
    row = data.draw(st.lists(VALUES, min_size=held, max_size=held))
    first = data.draw(st.integers(0, held))
    recent = data.draw(st.integers(0, held - first))
    kept = data.draw(st.integers(first + recent, held))
    cache = Cache(Shape(), [Request(held, kept, first, recent)])
    assert compare_selection(cache, [torch.tensor(row)[None, None]]).is_same


@settings(max_examples=30)
@given(st.data())
def test_any_compaction(data: st.DataObject) -> None:
    held = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=3))
    requests = []
    for count in held:
        kept = data.draw(st.integers(0, count))
        requests.append(Request(count, kept, data.draw(st.integers(0, kept))))
    shape = Shape(2, 32, 16, data.draw(st.sampled_from(LAYOUTS)), HALF, 1)
    groups = data.draw(st.sampled_from([1, 2]))
    assert compare_compaction(shape, groups, requests).is_same


def test_compaction_refuses_values_laid_out_otherwise() -> None:
    cache = Cache(Shape(), [Request(20, 10)])
    other = PagedLayers.of([part.contiguous() for part in cache.values])
    kept = torch.zeros(2, 1, cache.num_scores, dtype=torch.int32)
    with pytest.raises(ValueError, match="valid are those of the values"):
        compact_pages(cache.paged(), other, cache.table, cache.spans(), kept)


def test_layers_have_one_shape() -> None:
    wide, narrow = torch.zeros(3, 2, 16, 64), torch.zeros(3, 2, 16, 32)
    with pytest.raises(ValueError, match="valid are those of the other layers"):
        PagedLayers.of([wide, narrow])


def test_scores_refuse_other_dtypes() -> None:
    scoring = Scoring(Shape(dtype=torch.float64), query_dtype=HALF)
    with pytest.raises(ValueError, match=r"dtype=torch.float64: valid are torch.f"):
        compare_scores(scoring, [scored(20, 4)])
