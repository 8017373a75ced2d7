"""Every way of searching gives what brute force over the stored vectors gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from astroclip.errors import InputError
from astroclip.types import MODALITIES
from index import BuildOptions, SurveyIndex, build_index
from index.filters import parse_filter


def brute(toy, query, modality, k, allowed=None, dtype=np.float16):
    """(rows, scores) of the k nearest by float64 numpy over what was written, rounded as the index stores it."""
    has = toy.truth[f"has_{modality}"][toy.indexed]
    vectors = toy.truth[modality][toy.indexed].astype(dtype).astype(np.float64)
    query = query.astype(np.float64)
    scores = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    scores = np.where(has, scores, -np.inf)
    if allowed is not None:
        scores = np.where(allowed, scores, -np.inf)
    rows = np.argsort(-scores, kind="stable")[:k]
    rows = rows[np.isfinite(scores[rows])]
    return rows, scores[rows]


def queries(toy, modality, count=20):
    return toy.truth[modality][toy.indexed[::25]][:count]


@pytest.mark.parametrize("query_modality", MODALITIES)
@pytest.mark.parametrize("target", MODALITIES)
@pytest.mark.parametrize(
    ("mode", "share"), [("exact", None), ("exact", 0.5), ("exact", 0.02), ("hnsw", None), ("hnsw", 0.5)]
)
def test_congruence(toy, index, query_modality, target, mode, share):
    rng = np.random.default_rng(5)
    mask = None if share is None else rng.random(len(index)) < share
    q = queries(toy, query_modality)
    hits, report = index.search(q, target=target, k=10, query_modality=query_modality, mask=mask, mode=mode)
    agree = []
    for vector, h in zip(q, hits, strict=True):
        rows, scores = brute(toy, vector, target, 10, mask)
        agree.append(len(np.intersect1d(rows, h.rows)) / max(len(rows), 1))
        assert mask is None or mask[h.rows].all()
        assert np.all(np.diff(h.scores) <= 0)
        assert h.modalities == [target] * len(h)
        assert h.object_ids == toy.truth["id"][toy.indexed[h.rows]].tolist()
        if mode == "exact":  # a part scaled to unit norm before rounding may fall on the other side of a float16 step
            np.testing.assert_allclose(h.scores, np.minimum(scores, 1), atol=3e-5)
    assert np.mean(agree) >= (0.99 if share is None or mode == "exact" else 0.97)
    assert report.mode == mode and report.index_id == "toy-survey"


def test_a_selective_filter_is_answered_exactly_though_there_is_a_graph(toy, index):
    """Forced through the graph, a 2 % filter loses neighbours unseen; the planner never does that."""
    mask = np.random.default_rng(5).random(len(index)) < 0.02
    for vector in queries(toy, "image"):
        hits, report = index.search(vector, target="spectrum", k=10, query_modality="image", mask=mask)
        rows, _ = brute(toy, vector, "spectrum", 10, mask)
        assert report.mode == "exact" and report.candidates < 25 and set(hits[0].rows) == set(rows)


def test_one_query_or_many_same_answer(toy, index):
    q = queries(toy, "image")
    together, _ = index.search(q, target="spectrum", k=7)
    for vector, batch in zip(q, together, strict=True):
        alone, _ = index.search(vector, target="spectrum", k=7)
        np.testing.assert_array_equal(alone[0].rows, batch.rows)
        np.testing.assert_array_equal(alone[0].scores, batch.scores)


def test_chunked_search_equals_one_product(toy, index, monkeypatch):
    q = queries(toy, "image")
    mask = np.arange(len(index)) % 3 == 0
    whole = [index.search(q, target="spectrum", k=9, mask=m, mode="exact")[0] for m in (None, mask)]
    monkeypatch.setattr("index.backends.exact._CHUNK", 37)
    monkeypatch.setattr("index.backends.exact._QUERIES", 3)
    pieces = [index.search(q, target="spectrum", k=9, mask=m, mode="exact")[0] for m in (None, mask)]
    for a, b in zip(whole, pieces, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x.rows, y.rows)


def test_k_beyond_what_passes_gives_what_there_is(toy, index):
    mask = np.zeros(len(index), bool)
    mask[:5] = True
    vector = toy.truth["image"][0]
    hits, report = index.search(vector, target="either", k=50, mask=mask)
    assert 0 < len(hits[0]) <= 5 and report.mode == "exact"
    none, report = index.search(vector, target="image", k=3, mask=np.zeros(len(index), bool), query_modality="image")
    assert len(none[0]) == 0 and report.candidates == 0 and len(none[0].percentiles) == 0


@pytest.mark.parametrize("mode", ["exact", "hnsw"])
def test_excluded_rows_never_come_and_cost_no_hit(toy, index, mode):
    vector = toy.truth["spectrum"][toy.indexed[40]]
    all_hits, _ = index.search(vector, target="spectrum", k=12, mode="exact")
    gone = all_hits[0].rows[:4]
    rest, _ = index.search(vector, target="spectrum", k=8, exclude_rows=gone, mode=mode)
    np.testing.assert_array_equal(rest[0].rows, all_hits[0].rows[4:])


def test_many_excluded_rows_equal_a_mask(toy, index, monkeypatch):
    monkeypatch.setattr("index.store._EXCLUDE_BY_RANK", 10)
    vector, gone = toy.truth["spectrum"][3], np.arange(0, 400)
    mask = np.ones(len(index), bool)
    mask[gone] = False
    a, _ = index.search(vector, target="either", k=20, exclude_rows=gone)
    b, _ = index.search(vector, target="either", k=20, mask=mask)
    np.testing.assert_array_equal(a[0].rows, b[0].rows)


def test_either_ranks_by_percentile_and_names_each_object_once(toy, index):
    q = queries(toy, "image")
    hits, report = index.search(q, target="either", k=15, query_modality="image", mode="exact")
    assert report.candidates == index.manifest.counts["image"] + index.manifest.counts["spectrum"]
    for vector, h in zip(q, hits, strict=True):
        assert len(set(h.object_ids)) == len(h) == 15
        assert np.all(np.diff(h.percentiles) <= 0)
        best: dict[int, float] = {}
        for modality in MODALITIES:
            rows, scores = brute(toy, vector, modality, len(index))
            tails = index._percentiles["image", modality].upper_tail(scores)
            for row, tail in zip(rows, tails, strict=True):
                best[int(row)] = min(best.get(int(row), 2.0), tail)
        wanted = sorted(best, key=lambda row: (best[row], row))[:15]
        assert len(set(wanted) & set(h.rows.tolist())) >= 14  # float16 ties at the edge
    names = {m for h in hits for m in h.modalities}
    assert names == {"image", "spectrum"}, "cosine alone would fill the answer with the query's own modality"


def test_either_without_a_known_modality_ranks_by_cosine(toy, index):
    hits, _ = index.search(queries(toy, "image"), target="either", k=15)
    for h in hits:
        assert h.percentiles is None and np.all(np.diff(h.scores) <= 0)


def test_percentiles_are_monotone_and_calibrated(toy, index):
    rng = np.random.default_rng(0)
    for pair, table in index._percentiles.items():
        grid = np.linspace(-1, 1, 4001)
        tail = table.upper_tail(grid)
        assert np.all(np.diff(tail) <= 0) and tail[0] == 1.0 and tail[-1] > 0
        beyond = grid > table.scores[-1]
        assert np.all(np.diff(tail[beyond]) < 0), "strict beyond the sample, or `either` could not rank there"
        a, b = (index.tables[m] for m in pair)
        s = a.take(rng.integers(0, len(a), 3000)) * b.take(rng.integers(0, len(b), 3000))
        assert np.mean(table.percentiles(s.sum(axis=1)) > 90) == pytest.approx(0.1, abs=0.03)


def test_own_vector_finds_itself_first(index):
    for row in (0, 17, 301):
        for modality in MODALITIES:
            vector = index.vector(row, modality)
            if vector is not None:
                hits, _ = index.search(vector, target=modality, k=1)
                assert hits[0].rows[0] == row and hits[0].scores[0] == pytest.approx(1, abs=1e-6)


def test_vector_of_a_missing_modality_is_none(toy, index):
    lacking = np.flatnonzero(~toy.truth["has_image"][toy.indexed])
    assert len(lacking) and index.vector(int(lacking[0]), "image") is None
    assert index.vector(int(lacking[0]), "spectrum") is not None


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"k": 0}, "bad_k"),
        ({"k": 10_001}, "bad_k"),
        ({"target": "radio"}, "bad_target"),
        ({"query_modality": "radio"}, "bad_modality"),
        ({"queries": np.ones((1, 5), np.float32)}, "wrong_dimension"),
        ({"queries": np.full((1, 16), np.nan, np.float32)}, "bad_vector"),
        ({"queries": np.zeros((1, 16), np.float32)}, "bad_vector"),
    ],
)
def test_bad_requests_are_refused(index, change, code):
    request = {"queries": np.ones((1, 16), np.float32), "target": "image", "k": 3, **change}
    with pytest.raises(InputError) as caught:
        index.search(request.pop("queries"), **request)
    assert caught.value.code == code and "wanted" in caught.value.message


def test_planner_falls_back_when_the_graph_runs_dry(toy, index, monkeypatch):
    """A filter may leave out just the region the graph explores: the answer is then made exactly."""
    search = index._searches["image"]
    monkeypatch.setattr(search, "measured", replace(search.measured, exact_below=0))
    vector = toy.truth["image"][toy.indexed[9]]
    mask = parse_filter({"column": "redshift", "range": [0.6, None]}).mask(index.catalog)
    monkeypatch.setattr(
        "index.backends.hnsw.HnswBackend.search", lambda self, q, k, mask=None, **how: np.full((len(q), k), -1)
    )
    hits, report = index.search(vector, target="image", k=10, mask=mask, query_modality="image")
    rows, _ = brute(toy, vector, "image", 10, mask)
    assert report.mode == "exact" and set(hits[0].rows) == set(rows)


def test_a_backend_that_ignores_the_filter_cannot_leak(toy, index, monkeypatch):
    unfiltered = index.graph("image").search
    monkeypatch.setattr(
        "index.backends.hnsw.HnswBackend.search",
        lambda self, q, k, mask=None, **how: unfiltered(q, k, None, breadth=64),
    )
    mask = np.arange(len(index)) % 2 == 0
    hits, _ = index.search(toy.truth["image"][:5], target="image", k=10, mask=mask, mode="hnsw")
    assert all(mask[h.rows].all() for h in hits)


def test_least_similar_is_the_other_end(toy, index):
    q = queries(toy, "image")
    hits, report = index.search(q, target="spectrum", k=9, query_modality="image", order="least_similar")
    assert report.mode == "exact" and report.expected_recall == 1.0
    for vector, h in zip(q, hits, strict=True):
        rows, scores = brute(toy, vector, "spectrum", len(index))
        np.testing.assert_allclose(h.scores, scores[::-1][:9], atol=3e-5)
        assert np.all(np.diff(h.scores) >= 0) and np.all(np.diff(h.percentiles) >= 0)
    both, _ = index.search(q[0], target="either", k=30, query_modality="image", order="least_similar")
    assert len(set(both[0].object_ids)) == 30 and np.all(np.diff(both[0].percentiles) >= 0)


def test_a_threshold_ends_the_answer(toy, index):
    vector = toy.truth["image"][toy.indexed[9]]
    _, scores = brute(toy, vector, "image", len(index))
    bound = float((scores[19] + scores[20]) / 2)
    hits, report = index.search(vector, target="image", k=50, query_modality="image", score_threshold=bound)
    assert len(hits[0]) == 20 and hits[0].scores.min() >= bound
    assert report.mode == "exact"  # fewer than k say that there are no more: only an exact search may
    low, _ = index.search(vector, target="image", k=len(index), score_threshold=bound, order="least_similar")
    assert len(low[0]) == len(scores) - 20 and low[0].scores.max() <= bound


def test_best_score_finds_neighbours_of_either_example(toy, index):
    """Two positives far apart: their mean lies between them, where neither has neighbours."""
    from index.examples import Examples

    vectors = np.stack(
        [toy.truth["image"][toy.indexed[i]] for i in np.argsort(toy.truth["redshift"][toy.indexed])[[9, -9]]]
    )
    none = np.empty((0, 16), np.float32)
    examples = Examples(vectors, none, np.ones(2), np.empty(0))
    hits, report = index.search_examples(examples, target="either", k=20)
    assert report.mode == "exact" and hits.percentiles is None and len(set(hits.object_ids)) == 20
    z = toy.truth["redshift"][toy.indexed][hits.rows]
    assert (z < 0.3).any() and (z > 0.9).any() and not ((z > 0.4) & (z < 0.8)).any()
    bad = Examples(np.full((1, 16), np.nan, np.float32), none, np.ones(1), np.empty(0))
    with pytest.raises(InputError):
        index.search_examples(bad, target="image", k=3)


def test_float32_vectors(toy, tmp_path):
    path = build_index(toy.parts, tmp_path / "i", survey="Toy", options=BuildOptions(vector_dtype="float32"))
    index = SurveyIndex.open(path)
    q = queries(toy, "image")
    hits, report = index.search(q, target="spectrum", k=10)
    assert report.mode == "exact" and index.graph("image") is None
    for vector, h in zip(q, hits, strict=True):
        rows, scores = brute(toy, vector, "spectrum", 10, dtype=np.float32)
        np.testing.assert_array_equal(h.rows, rows)
        np.testing.assert_allclose(h.scores, scores, atol=1e-6)
