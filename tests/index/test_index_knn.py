"""Calibrated k-NN estimates: intervals and densities hold what they say, whatever the k, and their file is checked."""

from __future__ import annotations

import numpy as np
import pytest
from parts_fixture import embeddings, write_parts
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy.stats import kstest

from astroclip.errors import IndexFileError, InputError, NotFoundError
from index import BuildOptions, SurveyIndex, best_target, build_index, estimate, estimate_many, knn_histogram, stacked
from index.density import Axis
from index.knn_build import KNN_FILE, _merged, _nearest
from index.knn_conformal import (
    LADDER,
    LEVELS,
    OWN_UP_TO,
    Neighbourhood,
    Rung,
    Rungs,
    fit_rung,
    intervals,
    neighbourhood,
    rung_of,
)
from index.knn_density import KNOTS, Smoothing, choose_smoothing
from index.knn_estimate import neighbours_wanted
from index.knn_files import PropertyCalibration, read_knn, write_knn

N = 6000


@pytest.fixture(scope="module")
def drawn():
    """x, d (N, 64), y (N,): neighbours scatter about the truth by an amount that differs, and grows with distance."""
    rng = np.random.default_rng(5)
    scatter = rng.uniform(0.002, 0.05, (N, 1))
    d = np.sort(rng.uniform(0.1, 0.4, (N, 64)), axis=1) * (1 + 10 * scatter)
    truth = rng.uniform(0.2, 0.8, N)
    return truth[:, None] + scatter * rng.standard_normal((N, 64)), d, truth + 0.5 * scatter[:, 0] * rng.normal(size=N)


HALVES = np.arange(0, 2000), np.arange(2000, 4000)
FRESH = np.arange(4000, N)


def inside(rung, x, d, y, k, coverage):
    found = neighbourhood(x[:, None], d, [k], [0] * rung.median)
    lo, hi = intervals(found, Rungs([k], [rung]), coverage)
    return (lo[:, 0] <= y) & (y <= hi[:, 0]), found.distance[:, 0]


@pytest.mark.parametrize("k", [1, 4, 32])
@pytest.mark.parametrize("coverage", [0.3, 0.68, 0.95])
def test_intervals_hold_the_truth_as_often_as_they_say_near_and_far(drawn, k, coverage):
    x, d, y = drawn
    rung, crps = fit_rung(x, d, y, k, *HALVES)
    held, distance = inside(rung, x[FRESH], d[FRESH], y[FRESH], k, coverage)
    assert held.mean() == pytest.approx(coverage, abs=0.03) and crps > 0
    thirds = np.digitize(distance, np.quantile(distance, [1 / 3, 2 / 3]))
    for third in range(3):
        assert held[thirds == third].mean() == pytest.approx(coverage, abs=0.06)


def test_an_interval_follows_the_spread_of_its_neighbours(drawn):
    x, d, y = drawn
    rung, _ = fit_rung(x, d, y, 16, *HALVES)
    found = neighbourhood(x[FRESH, None], d[FRESH], [16], [0] * rung.median)
    lo, hi = intervals(found, Rungs([16], [rung]), 0.68)
    narrow = found.spread[:, 0] < np.median(found.spread)
    assert np.mean((hi - lo)[~narrow]) > 2 * np.mean((hi - lo)[narrow])


def test_any_coverage_is_answered_and_more_is_wider():
    rung = Rung(False, np.array([0.1, 0.0, 0.0]), np.zeros(2), np.tile(LEVELS, (3, 1)))
    one = np.array([[0.5]])
    found = Neighbourhood(one, one, one, one)
    asked = [1e-6, 0.005, 0.3, 0.68, 0.6801, 0.9, 0.95, 0.991, 0.99999]
    widths = [(hi - lo).item() for lo, hi in (intervals(found, Rungs([1], [rung]), c) for c in asked)]
    assert widths == sorted(widths)
    assert widths[3] == pytest.approx(0.136) and widths[4] == pytest.approx(0.138)  # between two: the wider
    everything = Rung(False, rung.scale, rung.edges, np.full((3, len(LEVELS)), np.inf))
    assert [float(a[0, 0]) for a in intervals(found, Rungs([1], [everything]), 0.68)] == [0.0, 1.0]


def test_quantiles_of_few_scores_are_infinite_where_they_cannot_tell(drawn):
    x, d, y = drawn
    rung, _ = fit_rung(x, d, y, 8, HALVES[0], np.arange(2000, 2300))
    assert np.isfinite(rung.scores[:, LEVELS < 0.98]).all() and np.isinf(rung.scores[:, LEVELS > 0.995]).all()
    assert np.all(np.diff(np.where(np.isinf(rung.scores), 1e9, rung.scores), axis=1) >= 0)


def test_neighbours_without_the_property_are_left_out(drawn):
    x, d, _ = drawn
    gaps = x[:50, None].copy()
    gaps[:, 0, 1:8:2] = np.nan
    some = neighbourhood(gaps, d[:50], [8], [0])
    less = neighbourhood(x[:50, None, 0:8:2], d[:50, 0:8:2], [4], [0])
    for name in ("value", "spread", "distance", "n_eff"):
        np.testing.assert_allclose(getattr(some, name), getattr(less, name))
    none = neighbourhood(np.full((2, 1, 4), np.nan), d[:2, :4], [4], [])
    assert np.isnan(none.value).all() and (none.n_eff == 0).all()


def test_a_property_too_rare_for_few_neighbours_is_the_whole_axis(drawn):
    x, d, y = drawn
    rare = np.where(np.arange(64) == 40, x, np.nan)
    rung, crps = fit_rung(rare, d, y, 4, *HALVES)
    assert np.isinf(rung.scores).all() and np.isinf(crps)
    rung, crps = fit_rung(rare, d, y, 64, *HALVES)
    assert np.isfinite(rung.scores[:, LEVELS < 0.9]).all() and np.isfinite(crps)


def test_rungs():
    assert [LADDER[rung_of(k)] for k in (1, 2, 3, 4, 15, 16, 64, 9999)] == [1, 2, 2, 4, 8, 16, 64, 64]


# --- densities --------------------------------------------------------------------------------------------------------


def test_densities_are_calibrated_on_fresh_objects(drawn):
    x, d, y = drawn
    chosen = choose_smoothing(*(a[HALVES[0]] for a in drawn))
    calibrated = chosen.calibrated(*(a[HALVES[1]] for a in drawn))
    pit = calibrated.cdf(x[FRESH], d[FRESH], y[FRESH, None])[:, 0]
    assert kstest(pit, "uniform").statistic < 0.04
    twice = Smoothing(chosen.k, 9 * chosen.floor, 3 * chosen.share + 1, chosen.pit)
    assert kstest(twice.cdf(x[FRESH], d[FRESH], y[FRESH, None])[:, 0], "uniform").statistic > 0.08


def test_a_density_shows_both_modes_and_quantiles_invert_it():
    smoothing = Smoothing(8, 0.01, 0.0, np.linspace(0, 1, KNOTS))
    x = np.array([[0.2, 0.2, 0.2, 0.2, 0.7, 0.7, np.nan, 0.7]])
    u = np.linspace(0, 1, 401)
    cdf = smoothing.cdf(x, np.ones((1, 8)), u[None])[0]
    assert cdf[0] == 0 and cdf[-1] == 1 and np.all(np.diff(cdf) >= 0)
    density = np.diff(cdf)
    assert density[80] > 50 * density[180] and density[280] > 50 * density[180]  # 0.2, 0.7 and between
    levels = np.array([0.1, 0.5, 0.9])
    at = smoothing.quantiles(x, np.ones((1, 8)), levels)
    np.testing.assert_allclose(smoothing.cdf(x, np.ones((1, 8)), at)[0], levels, atol=1e-9)
    assert np.isnan(smoothing.cdf(np.full((1, 8), np.nan), np.ones((1, 8)), np.array([[0.5]]))).all()


# --- the index --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    """An index of 1,500 objects, some properties of which are missing, and how it was made."""
    root = tmp_path_factory.mktemp("knn")
    truth = write_parts(root / "parts", 1500, seed=3)
    build_index(root / "parts", root / "index", survey="toy", options=BuildOptions(heads="never"), plain=True)
    return SurveyIndex.open(root / "index"), truth


def test_every_pair_and_property_is_calibrated_and_reported(survey):
    index, _ = survey
    queries, targets = ("image", "spectrum", "both"), ("image", "spectrum", "either")
    assert set(index.knn) == {(q, t) for q in queries for t in targets}
    reports = index.manifest.calibration["knn"]["pairs"]
    assert {(r["query"], r["target"]) for r in reports} == set(index.knn)
    for report in reports:
        for name, said in report["properties"].items():
            assert said["k"] == index.knn[report["query"], report["target"]][name].k <= OWN_UP_TO
            assert said["coverage"]["0.68"] == pytest.approx(0.68, abs=0.12) and said["pit_ks"] < 0.15
            assert said["crps"] > 0 and said["statistic"] in ("mean", "median") and said["labels"] > 900


@pytest.mark.parametrize("pair", [("image", "image"), ("spectrum", "image"), ("image", "either"), ("both", "either")])
def test_estimates_of_new_objects_hold_what_they_say(survey, pair):
    index, _ = survey
    rng = np.random.default_rng(17)
    z = rng.uniform(0.0, 1.2, 1000)
    made = {m: embeddings(rng, z, m) for m in ("image", "spectrum")}
    queries = made["image"] + made["spectrum"] if pair[0] == "both" else made[pair[0]]
    modality = None if pair[0] == "both" else pair[0]
    hits, _ = index.search(queries, target=pair[1], k=OWN_UP_TO, query_modality=modality)
    for coverage in (0.5, 0.9):
        (found,) = estimate_many(index, *stacked(hits), ["redshift"], coverage, pair=pair)
        assert found.calibrated and found.k == index.knn[pair]["redshift"].k
        assert np.mean((found.lo <= z) & (z <= found.hi)) == pytest.approx(coverage, abs=0.07)
        assert np.all((found.lo <= found.value) & (found.value <= found.hi))
    assert np.median(np.abs(found.value - z)) < 0.02


def test_an_object_is_never_its_own_neighbour(survey):
    index, _ = survey
    for modality, table in index.tables.items():
        rows, scores = _nearest(table.take(np.arange(300)), table.rows[:300], table)
        assert rows.shape == (300, LADDER[-1]) and not np.any(rows == table.rows[:300, None])
        wanted, _ = index.search(table.take(np.arange(3)), target=modality, k=65)
        for i in range(3):
            assert rows[i].tolist() == [r for r in wanted[i].rows if r != table.rows[i]][: LADDER[-1]]
            np.testing.assert_allclose(scores[i][:5], wanted[i].scores[1:6], atol=1e-6)


@pytest.mark.parametrize("query", ["image", None])
def test_merged_neighbours_are_those_of_a_search_of_either(survey, query):
    index, truth = survey
    queries = truth["image"][:40] if query else truth["image"][:40] + truth["spectrum"][:40]
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    own = np.full(40, -1)
    found = {m: _nearest(queries, own, table) for m, table in index.tables.items()}
    tails = {m: index._percentiles.get((query, m)) for m in found}
    rows, scores = _merged(found, tails)
    wanted, _ = index.search(queries, target="either", k=LADDER[-1], query_modality=query)
    for i, hits in enumerate(wanted):
        assert rows[i].tolist() == hits.rows.tolist()
        np.testing.assert_allclose(scores[i], hits.scores, atol=1e-6)


def test_a_batch_is_its_queries_one_by_one_and_short_hits_are_padded(survey):
    index, truth = survey
    hits, _ = index.search(truth["image"][:20], target="image", k=40, query_modality="image")
    short = index.search(truth["image"][20], target="image", k=3, query_modality="image")[0]
    hits, pair = [*hits, *short], ("image", "image")
    rows, scores = stacked(hits)
    assert rows.shape == (21, 40) and rows[20, 3:].tolist() == [-1] * 37
    batch = estimate_many(index, rows, scores, coverage=0.9, pair=pair)
    for i, one in enumerate(hits):
        for e, found in zip(estimate(index, one, coverage=0.9, pair=pair), batch, strict=True):
            alone = (e.value, e.lo, e.hi, e.n_eff)
            np.testing.assert_allclose(alone, [a[i] for a in (found.value, found.lo, found.hi, found.n_eff)], rtol=1e-9)
    empty = estimate(index, short[0].__class__(rows[0, :0], [], scores[0, :0], None, []), pair=pair)
    assert all(e.value is e.lo is e.hi is None and e.n_eff == 0 for e in empty)


def test_k_is_the_indexs_or_the_callers(survey):
    index, truth = survey
    pair = ("spectrum", "spectrum")
    (hits,), _ = index.search(truth["spectrum"][1], target="spectrum", k=64, query_modality="spectrum")
    own = {name: entry.k for name, entry in index.knn[pair].items()}
    assert {e.name: e.k for e in estimate(index, hits, list(own), pair=pair)} == own
    assert neighbours_wanted(index, list(own), pair) == max(own.values())
    assert neighbours_wanted(index, ["redshift"], pair, density=True) >= index.knn[pair]["redshift"].smoothing.k
    assert neighbours_wanted(index, None, None) == 16
    for k in (1, 6, 64):
        assert all((e.k, e.calibrated) == (k, True) for e in estimate(index, hits, pair=pair, k=k))
    first = estimate(index, hits, ["redshift"], pair=pair, k=1)[0]
    assert first.value == pytest.approx(index.catalog.values("redshift")[hits.rows[0]])
    bare = estimate(index, hits, ["redshift"])[0]
    assert not bare.calibrated and bare.k == 16
    with pytest.raises(InputError, match="k is 0"):
        estimate(index, hits, pair=pair, k=0)
    with pytest.raises(NotFoundError, match="colour"):
        estimate(index, hits, ["colour"], pair=pair)


def test_histograms_of_neighbours(survey):
    index, truth = survey
    pair = ("spectrum", "spectrum")
    (hits,), _ = index.search(truth["spectrum"][1], target="spectrum", k=32, query_modality="spectrum")
    (found,) = knn_histogram(index, hits, ["redshift"], 50, pair)
    assert found.edges.shape == (51,) and np.sum(found.pdf * np.diff(found.edges)) == pytest.approx(0.999, abs=1e-6)
    middle = found.edges[np.argmax(found.pdf)]
    assert middle == pytest.approx(truth["redshift"][1], abs=0.05) and (found.pdf >= 0).all()
    with pytest.raises(InputError, match="no calibration of redshift for such a query"):
        knn_histogram(index, hits, ["redshift"], 50, None)


def test_a_fused_query_looks_where_the_densities_are_best(survey):
    index, _ = survey
    reports = {r["target"]: r["properties"] for r in index.manifest.calibration["knn"]["pairs"] if r["query"] == "both"}
    score = {t: np.mean([np.log(r[n]["crps"]) for n in index.default_properties]) for t, r in reports.items()}
    assert best_target(index, "both") == min(score, key=score.get) and best_target(index, "neither") is None


def test_an_index_without_a_calibration_answers_as_before(tmp_path):
    truth = write_parts(tmp_path / "parts", 300)
    build_index(tmp_path / "parts", tmp_path / "index", survey="small", plain=True)
    index = SurveyIndex.open(tmp_path / "index")
    assert index.knn == {} and "knn" not in index.manifest.calibration and best_target(index, "both") is None
    (hits,), _ = index.search(truth["image"][0], target="image", k=16, query_modality="image")
    found = estimate(index, hits, ["redshift"], pair=("image", "image"))[0]
    assert (found.k, found.calibrated) == (16, False) and found.lo <= found.value <= found.hi
    with pytest.raises(InputError, match="no calibration of redshift for a query by image among image"):
        knn_histogram(index, hits, ["redshift"], 10, ("image", "image"))


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_file_gives_back_what_was_written(survey, tmp_path):
    index, _ = survey
    written = (index.folder / KNN_FILE).read_bytes()
    write_knn(tmp_path / "again", index.knn)
    assert (tmp_path / "again").read_bytes() == written
    same = read_knn(tmp_path / "again", "again")["both", "either"]["redshift"]
    other = index.knn["both", "either"]["redshift"]
    assert isinstance(same, PropertyCalibration) and same.axis == other.axis == Axis("redshift", *ends(other), True, ())
    for one, two in zip(same.rungs, other.rungs, strict=True):
        np.testing.assert_array_equal(one.scores, two.scores)


def ends(entry):
    return entry.axis.lo, entry.axis.hi


@pytest.mark.parametrize(
    ("key", "spoil", "what"),
    [
        ("0.scores", lambda a: a[..., ::-1].copy(), "do not ascend"),
        ("0.scores", lambda a: a * np.float32(np.nan), "NaN"),
        ("0.scale", lambda a: -a, "negative"),
        ("0.scale", lambda a: a * 0, "not positive"),
        ("0.edges", lambda a: a[:, :1].copy(), "wanted float64"),
        ("0.pit", lambda a: a / 2, "from 0 to 1"),
        ("99999.pit", lambda a: np.zeros(3), "belongs to nothing"),
    ],
)
def test_a_spoilt_file_is_refused_by_name(survey, tmp_path, key, spoil, what):
    index, _ = survey
    with safe_open(index.folder / KNN_FILE, framework="numpy") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()
    tensors[key] = spoil(tensors.get(key))
    save_file(tensors, tmp_path / "spoilt", metadata=metadata)
    with pytest.raises(IndexFileError, match=what) as caught:
        read_knn(tmp_path / "spoilt", "calibration/knn.safetensors")
    assert caught.value.field == "calibration/knn.safetensors"
    (tmp_path / "spoilt").write_bytes(b"\x00" * 100)
    with pytest.raises(IndexFileError):
        read_knn(tmp_path / "spoilt", "x")
