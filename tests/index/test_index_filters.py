"""Filters against plain numpy, and everything malformed refused with a reason."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from astropy import units
from astropy.coordinates import SkyCoord
from hypothesis import given, settings
from hypothesis import strategies as st

from astroclip.errors import AstroClipError, InputError, LimitError, NotFoundError
from index.catalog import Catalog
from index.filters import DEFAULT_FILTER_LIMITS, parse_filter

N = 4000
RNG = np.random.default_rng(8)
RA, DEC = RNG.uniform(0, 360, N), np.degrees(np.arcsin(RNG.uniform(-1, 1, N)))
Z, CLASS = RNG.uniform(0, 1, N), RNG.choice(["BGS", "LRG", "ELG"], N)
Z_NULL, NO_POSITION = np.arange(N) % 10 == 0, np.arange(N) % 50 == 7


def catalog() -> Catalog:
    table = pa.table(
        {
            "object_id": [f"o{i}" for i in range(N)],
            "ra": pa.array(RA, mask=NO_POSITION),
            "dec": pa.array(DEC, mask=NO_POSITION),
            "has_image": pa.array(np.arange(N) % 3 == 0),
            "has_spectrum": pa.array(np.ones(N, bool)),
            "redshift": pa.array(Z, mask=Z_NULL),
            "target_class": CLASS,
            "plate": pa.array(np.arange(N) % 7),
        }
    )
    return Catalog(table, {})


CATALOG = catalog()
KNOWN = ~NO_POSITION


def mask(expression):
    return parse_filter(expression).mask(CATALOG)


IN_RANGE = (Z >= 0.2) & (Z <= 0.3) & ~Z_NULL


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ({"column": "redshift", "range": [0.2, 0.3]}, IN_RANGE),
        ({"column": "z", "range": [0.2, 0.3]}, IN_RANGE),
        ({"column": "redshift", "range": [None, 0.3]}, (Z <= 0.3) & ~Z_NULL),
        ({"column": "redshift", "range": [0.3, None]}, (Z >= 0.3) & ~Z_NULL),
        ({"not": {"column": "redshift", "range": [0.2, 0.3]}}, ~IN_RANGE),
        ({"column": "target_class", "in": ["BGS", "ELG"]}, CLASS != "LRG"),
        ({"column": "plate", "in": [2, 5.0]}, np.isin(np.arange(N) % 7, [2, 5])),
        ({"column": "has_image", "in": [True]}, np.arange(N) % 3 == 0),
        ({"box": {"ra": [350, 10], "dec": [-90, 90]}}, ((RA >= 350) | (RA <= 10)) & KNOWN),
        ({"box": {"ra": [-10, 10], "dec": [0, 90]}}, ((RA >= 350) | (RA <= 10)) & (DEC >= 0) & KNOWN),
        ({"box": {"ra": [0, 360], "dec": [-5, 5]}}, (np.abs(DEC) <= 5) & KNOWN),
        (
            {
                "and": [
                    {"column": "z", "range": [0.2, 0.3]},
                    {"or": [{"column": "plate", "in": [1]}, {"column": "target_class", "in": ["LRG"]}]},
                ]
            },
            IN_RANGE & ((np.arange(N) % 7 == 1) | (CLASS == "LRG")),
        ),
    ],
)
def test_conditions_equal_numpy(expression, wanted):
    found = mask(expression)
    assert found.dtype == bool and found.any()
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("unit", [("radius_deg", 1), ("radius_arcmin", 60), ("radius_arcsec", 3600)])
def test_cone(unit):
    key, factor = unit
    distance = SkyCoord(30 * units.deg, 88 * units.deg).separation(SkyCoord(RA * units.deg, DEC * units.deg)).deg
    np.testing.assert_array_equal(mask({"cone": {"ra": 30, "dec": 88, key: 15 * factor}}), (distance <= 15) & KNOWN)


def test_polygon_is_bounded_by_great_circles():
    """A triangle: inside means on the same side of its three planes; either winding, over RA 0 and over the pole."""
    for triangle in ([[350, -20], [20, -10], [5, 40]], [[0, 70], [120, 65], [240, 75]], [[10, 5], [15, 5], [12, 9]]):
        v = [SkyCoord(a * units.deg, d * units.deg).cartesian.xyz.value for a, d in triangle]
        points = SkyCoord(RA * units.deg, DEC * units.deg).cartesian.xyz.value.T
        sides = np.stack([points @ np.cross(v[i], v[(i + 1) % 3]) for i in range(3)])
        near = points @ np.mean(v, axis=0) > 0
        wanted = ((sides > 0).all(axis=0) | (sides < 0).all(axis=0)) & near & KNOWN
        np.testing.assert_array_equal(mask({"polygon": triangle}), wanted)
        np.testing.assert_array_equal(mask({"polygon": triangle[::-1]}), wanted)


def test_polygon_may_be_concave():
    arrow = [[0, 0], [20, 10], [0, 20], [8, 10]]
    pieces = mask({"polygon": [arrow[0], arrow[1], arrow[3]]}) | mask({"polygon": [arrow[1], arrow[2], arrow[3]]})
    np.testing.assert_array_equal(mask({"polygon": arrow}), pieces)
    assert pieces.any()


def test_moc_equals_mocpy():
    from mocpy import MOC

    moc = MOC.from_string("3/5-9 44 4/1000 1003 6/0-300 20000-24000")
    wanted = np.zeros(N, bool)
    wanted[KNOWN] = moc.contains_lonlat(RA[KNOWN] * units.deg, DEC[KNOWN] * units.deg)
    np.testing.assert_array_equal(mask({"moc": moc.to_string()}), wanted)
    np.testing.assert_array_equal(mask({"moc": moc.serialize("json")}), wanted)
    np.testing.assert_array_equal(mask({"moc": "0/0-11"}), KNOWN)


def test_moc_cells_may_overlap():
    np.testing.assert_array_equal(mask({"moc": "2/5 3/20-23 4/80"}), mask({"moc": "2/5"}))


@pytest.mark.parametrize(
    "expression",
    [
        None, [], {}, "z < 3", 3, {"and": []}, {"and": {}}, {"or": 3}, {"not": []}, {"xor": []},
        {"and": [{}], "or": [{}]}, {"column": "z"}, {"column": 3, "range": [0, 1]},
        {"column": "z", "range": [1, 0]}, {"column": "z", "range": [0]}, {"column": "z", "range": "01"},
        {"column": "z", "range": [True, 1]}, {"column": "z", "range": [float("nan"), 1]},
        {"column": "z", "range": [0, 1], "in": [1]}, {"column": "z", "in": []}, {"column": "z", "in": [1, "a"]},
        {"column": "z", "in": [[1]]}, {"cone": {"ra": 1, "dec": 2}}, {"cone": {"ra": 1, "dec": 95, "radius_deg": 1}},
        {"cone": {"ra": 1, "dec": 2, "radius_deg": -1}}, {"cone": {"ra": 1, "dec": 2, "radius_deg": 1, "x": 1}},
        {"cone": {"ra": "1", "dec": 2, "radius_deg": 1}}, {"cone": [1, 2, 3]}, {"box": {"ra": [0, 1]}},
        {"box": {"ra": [0, 1], "dec": [5, -5]}}, {"box": {"ra": [0, 1], "dec": [0, 95]}}, {"polygon": [[0, 0], [1, 1]]},
        {"polygon": [[0, 0], [1, 1], [1]]}, {"polygon": "abc"}, {"moc": ""}, {"moc": "5"}, {"moc": "40/1"},
        {"moc": "1/48"}, {"moc": "1/5-3"}, {"moc": {"1": ["a"]}}, {"moc": {"x": [1]}}, {"moc": {}}, {"moc": 3},
        {"moc": "1/-"},
    ],
)  # fmt: skip
def test_malformed_filters_are_refused(expression):
    with pytest.raises(InputError) as caught:
        parse_filter(expression)
    assert caught.value.code in ("bad_filter", "bad_position") and "wanted" in caught.value.message


Z_LOW, Z_HIGH = {"column": "z", "range": [0.0, 0.2]}, {"column": "z", "range": [0.3, None]}


@pytest.mark.parametrize(
    "parts",
    [
        [Z_LOW, Z_HIGH],
        [Z_LOW, {"and": [{"column": "plate", "in": [1]}, Z_HIGH]}],
        [Z_LOW, {"not": Z_LOW}],
        [{"column": "target_class", "in": ["BGS"]}, {"column": "target_class", "in": ["LRG", "ELG"]}],
        [{"column": "plate", "range": [3, None]}, {"column": "plate", "in": [1, 2]}],
    ],
)
def test_contradictions_are_refused(parts):
    with pytest.raises(InputError) as caught:
        parse_filter({"and": parts})
    assert caught.value.code == "bad_filter" and caught.value.field == "filter.and"
    parse_filter({"or": parts})
    parse_filter({"not": {"or": parts}})


def test_what_only_the_catalogue_contradicts_matches_nothing():
    assert not mask({"and": [{"column": "z", "range": [7, 8]}, {"column": "plate", "in": [1]}]}).any()
    assert mask({"and": [Z_LOW, {"column": "z", "range": [0.2, 1]}]}).sum() == 0  # they meet at 0.2
    assert mask({"and": [{"column": "plate", "in": [1, 2]}, {"column": "plate", "range": [2, 9]}]}).any()


def test_a_polygon_must_be_smaller_than_a_hemisphere():
    with pytest.raises(InputError, match="hemisphere"):
        mask({"polygon": [[0, 0], [120, 0], [240, 0]]})


def test_columns_that_cannot_be_compared():
    with pytest.raises(NotFoundError, match="no column 'mag_q'.*redshift"):
        mask({"column": "mag_q", "range": [0, 1]})
    with pytest.raises(NotFoundError, match="wanted numbers"):
        mask({"column": "target_class", "range": [0, 1]})
    with pytest.raises(NotFoundError, match="wanted numbers"):
        mask({"column": "target_class", "in": [1]})
    with pytest.raises(InputError, match="holds double"):
        mask({"column": "redshift", "in": ["a"]})


def test_limits_below_and_above():
    leaf = {"column": "z", "range": [0, 1]}

    def nested(depth):
        node = leaf
        for _ in range(depth - 1):
            node = {"not": node}
        return node

    parse_filter(nested(DEFAULT_FILTER_LIMITS.max_depth))
    with pytest.raises(LimitError):
        parse_filter(nested(DEFAULT_FILTER_LIMITS.max_depth + 1))
    parse_filter({"and": [leaf] * (DEFAULT_FILTER_LIMITS.max_terms - 1)})
    with pytest.raises(LimitError):
        parse_filter({"and": [leaf] * DEFAULT_FILTER_LIMITS.max_terms})
    parse_filter({"column": "z", "in": [1] * 10_000})
    with pytest.raises(LimitError):
        parse_filter({"column": "z", "in": [1] * 10_001})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["z", "ra", "target_class", "5/1-3"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "and",
                    "or",
                    "not",
                    "column",
                    "range",
                    "in",
                    "cone",
                    "box",
                    "polygon",
                    "moc",
                    "ra",
                    "dec",
                    "radius_deg",
                    "5",
                ]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_any_json_gives_a_mask_or_a_clear_refusal(expression):
    try:
        found = mask(expression)
    except AstroClipError:
        return
    assert found.shape == (N,) and found.dtype == bool


@pytest.mark.parametrize(
    ("limit", "below", "above"),
    [
        ("max_vertices", {"polygon": [[0, 0], [1, 0], [1, 1], [0, 1]]}, {"polygon": [[0, 0], [1, 0], [2, 1], [1, 2],
        [0, 1]]}),
        ("max_cells", {"moc": "3/1 2 4/1-9 12"}, {"moc": "3/1 2 4/1-9 12 13"}),
        ("max_cells", {"moc": {"3": [1, 2], "4": [1, 2]}}, {"moc": {"3": [1, 2], "4": [1, 2, 3]}}),
        ("max_values", {"column": "z", "in": [1, 2, 3, 4]}, {"column": "z", "in": [1, 2, 3, 4, 5]}),
        ("max_terms", {"or": [{"column": "z", "range": [0, 1]}] * 3}, {"or": [{"column": "z", "range": [0, 1]}] * 4}),
    ],
)  # fmt: skip
def test_budgets_of_a_filter(limit, below, above):
    limits = dataclasses.replace(DEFAULT_FILTER_LIMITS, **{limit: 4})
    parse_filter(below, limits)
    with pytest.raises(LimitError) as refused:
        parse_filter(above, limits)
    assert refused.value.limit == 4
    if limit != "max_terms":  # and they hold for all parts together
        with pytest.raises(LimitError):
            parse_filter({"or": [below, {"not": below}]}, limits)


def test_budgets_are_above_zero():
    for field in dataclasses.fields(DEFAULT_FILTER_LIMITS):
        with pytest.raises(ValueError, match=field.name):
            dataclasses.replace(DEFAULT_FILTER_LIMITS, **{field.name: 0})


def test_large_polygon_and_moc_are_parsed_in_time():
    import time

    start = time.process_time()
    with pytest.raises(LimitError):
        parse_filter({"moc": "29/1 " * 5_000_000})
    with pytest.raises(LimitError):
        parse_filter({"polygon": [[0, 0]] * 1_000_000})
    assert time.process_time() - start < 1.0
