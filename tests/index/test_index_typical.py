"""The measures of trust: valid on objects drawn as the survey's are, and each sees what it is there for."""

from __future__ import annotations

import numpy as np
import pytest

from astroclip.errors import IndexFileError
from index.typical import Typicality, conformal_p, fit_typicality, read_typicality, write_typicality
from index.vectors import VectorTable

DIM, NAMES = 16, ("a", "b", "c")


def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors on a thin curved sheet, and statistics that follow from them up to a little scatter."""
    u = rng.uniform(0, 1, (n, 2))
    vectors = np.concatenate([np.cos(u), np.sin(u), np.cos(2 * u), np.sin(3 * u), u, u**2, u**3, np.ones((n, 2))], 1)
    vectors += 0.01 * rng.standard_normal(vectors.shape)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    statistics = vectors[:, :3] + 0.01 * rng.standard_normal((n, 3))
    return vectors.astype(np.float32), statistics.astype(np.float32)


@pytest.fixture(scope="module")
def table() -> tuple[VectorTable, np.ndarray]:
    vectors, statistics = draw(np.random.default_rng(1), 4000)
    return VectorTable(vectors, np.arange(4000) * 2), statistics


@pytest.fixture(scope="module")
def typical(table: tuple[VectorTable, np.ndarray]) -> Typicality:
    found = fit_typicality(*table, NAMES, 16, np.random.default_rng(2))
    assert found is not None
    return found


def test_p_values_of_new_objects_are_uniform(typical, rng):
    found = typical.p_values(*draw(rng, 3000))
    assert set(found) == {"distance", "residual", "input", "ood"}
    for name, p in found.items():
        for level in (0.05, 0.2, 0.5):
            assert abs(np.mean(p <= level) - level) < 0.25 * level + 0.005, (name, level)


def test_a_vector_beside_the_sheet_is_seen_by_the_residual(typical, rng):
    vectors, _ = draw(rng, 300)
    lifted = vectors.copy()
    lifted[:, -1] += 0.08  # the two last coordinates are alike on the sheet
    lifted /= np.linalg.norm(lifted, axis=1, keepdims=True)
    p = typical.p_values(lifted)
    assert np.mean(p["residual"] <= 0.05) > 0.95 > 0.9 > np.mean(p["distance"] <= 0.05)
    assert np.array_equal(p["ood"], p["residual"])  # nothing else is known of it


def test_permuted_statistics_are_seen_by_the_input(typical, rng):
    vectors, statistics = draw(rng, 300)
    p = typical.p_values(vectors, statistics[::-1])
    assert np.mean(p["input"] <= 0.05) > 0.9 and np.mean(p["residual"] <= 0.05) < 0.1
    assert np.mean(p["ood"] <= 0.05) > 0.9


def test_unknown_statistics_leave_the_embedding_alone(typical, rng):
    vectors, statistics = draw(rng, 20)
    statistics[::2] = np.nan
    p = typical.p_values(vectors, statistics)
    assert np.array_equal(p["ood"][::2], p["residual"][::2]) and np.isnan(p["input"][::2]).all()
    assert not np.array_equal(p["ood"][1::2], p["residual"][1::2])


def test_its_own_object_is_left_out(typical):
    own = typical.reference[[5]]
    rows = typical.rows[[5]]
    alone = typical.scores(own, exclude_rows=rows)["distance"]
    cosines = np.sort(np.delete(own @ typical.reference.T, 5, axis=1))[0]
    assert alone[0] == pytest.approx(cosines[-16]) and alone[0] < typical.scores(own)["distance"][0]


def test_batches_do_not_matter(typical, rng):
    vectors, statistics = draw(rng, 1100)
    whole, one = typical.scores(vectors, statistics), typical.scores(vectors[[1050]], statistics[[1050]])
    for name, score in one.items():
        assert score[0] == pytest.approx(whole[name][1050], rel=1e-4)


def test_small_tables(rng):
    vectors, statistics = draw(rng, 100)
    few = fit_typicality(VectorTable(vectors, np.arange(100)), statistics, NAMES, 16, rng)
    assert few is not None and set(few.tables) == {"distance"}  # 25 objects make no 16-d covariance
    assert len(few.tables["distance"]) == 50
    assert set(few.p_values(vectors[:2], statistics[:2])) == {"distance", "ood"}
    assert fit_typicality(VectorTable(vectors[:31], np.arange(31)), None, (), 16, rng) is None
    assert fit_typicality(VectorTable(vectors[:32], np.arange(32)), None, (), 16, rng) is not None


def test_statistics_of_too_few_objects_are_not_used(table, rng):
    vectors, statistics = table[0], table[1].copy()
    statistics[: int(0.999 * len(statistics))] = np.nan
    found = fit_typicality(vectors, statistics, NAMES, 16, rng)
    assert found is not None and found.names == () and set(found.tables) == {"distance", "residual"}


def test_conformal_p_counts_and_is_monotone():
    table = np.array([0.1, 0.2, 0.3], np.float32)
    assert conformal_p(table, [0.05, 0.2, 0.9]).tolist() == [0.25, 0.75, 1.0]
    assert np.all(np.diff(conformal_p(table, np.linspace(-1, 1, 50))) >= 0)
    assert np.isnan(conformal_p(table, np.nan))


def test_file_round_trip(typical, table, tmp_path, rng):
    write_typicality(tmp_path / "t", typical)
    again = read_typicality(tmp_path / "t", "t", table[0])
    vectors, statistics = draw(rng, 50)
    expected = typical.p_values(vectors, statistics)
    for name, p in again.p_values(vectors, statistics).items():
        np.testing.assert_array_equal(p, expected[name])


def test_files_that_are_none_are_refused_by_name(typical, table, tmp_path):
    path = tmp_path / "t"
    other = VectorTable(draw(np.random.default_rng(3), 4000)[0], np.arange(4000) * 2 + 1)
    write_typicality(path, typical)
    for damage, where in (
        (lambda: None, other),
        (lambda: path.write_bytes(path.read_bytes()[:-10]), table[0]),
        (lambda: path.write_bytes(b"nothing"), table[0]),
        (lambda: path.unlink(), table[0]),
    ):
        damage()
        with pytest.raises(IndexFileError, match="typical-image"):
            read_typicality(path, "typical-image", where)
