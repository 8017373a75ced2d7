"""Positions and cones: poles, the meridian, negative zero."""

from __future__ import annotations

import numpy as np
import pytest
from astropy import units
from astropy.coordinates import SkyCoord
from hypothesis import example, given, settings
from hypothesis import strategies as st

from astroclip.errors import InputError
from index.sky import SkyIndex, parse_position, separation_deg

RNG = np.random.default_rng(4)
# All over the sky, crowded at both poles and about RA 0.
RA = np.concatenate([RNG.uniform(0, 360, 3000), RNG.uniform(0, 360, 500), RNG.normal(0, 0.5, 500) % 360, [0.0, np.nan]])
DEC = np.concatenate(
    [
        np.degrees(np.arcsin(RNG.uniform(-1, 1, 3000))),
        np.where(np.arange(500) % 2, 90, -90) * (1 - RNG.uniform(0, 0.02, 500)),
        RNG.normal(0, 0.5, 500),
        [-0.0, 10.0],
    ]
)
SKY = SkyIndex(RA, DEC)
COORDINATES = SkyCoord(RA[:-1] * units.deg, DEC[:-1] * units.deg)


@settings(max_examples=80, deadline=None)
@given(st.floats(0, 360), st.floats(-90, 90), st.floats(-4, 2.25))
@example(0.0, 90.0, 0.0)
@example(123.0, -90.0, 0.3)
@example(359.9999, 0.0, -0.5)
@example(0.0, -0.0, -1.0)
@example(45.0, 41.8, 0.9)
@example(10.0, 10.0, 2.2552725)
def test_cone_equals_brute_force(ra, dec, log_radius):
    radius = min(10**log_radius, 180.0)
    distance = SkyCoord(ra * units.deg, dec * units.deg).separation(COORDINATES).deg
    rows = SKY.cone(ra, dec, radius)
    edge = np.abs(distance - radius) < 1e-9
    inside = distance <= radius
    found = np.zeros(len(RA), bool)
    found[rows] = True
    assert np.array_equal(found[:-1][~edge], inside[~edge]) and not found[-1]
    assert np.all(np.diff(separation_deg(RA[rows], DEC[rows], ra, dec)) >= 0)


def test_small_separations_keep_their_digits():
    assert separation_deg([180.0], [1e-7], 180.0, 0.0)[0] == pytest.approx(1e-7, rel=1e-6)
    assert SKY.cone(0.0, 0.0, 0.0).tolist() == [4000]


def test_empty_catalogue():
    assert len(SkyIndex(np.array([np.nan]), np.array([1.0])).cone(0, 0, 5)) == 0


@pytest.mark.parametrize(
    ("text", "ra", "dec"),
    [
        ("188.7 -0.2", 188.7, -0.2),
        ("188.7,-0.2", 188.7, -0.2),
        ("188.7, 0.2", 188.7, 0.2),
        ("188.7-0.2", 188.7, -0.2),
        ("1.887e2 +2e-1", 188.7, 0.2),
        ("1.5e-1 -2", 0.15, -2.0),
        ("12:34:56 -00:12:34", 188.73333333, -0.20944444),
        ("12:34:56 +00:12:34", 188.73333333, 0.20944444),
        ("12:34:56.5-00:12:34.5", 188.73541667, -0.20958333),
        ("12 34 56 -00 12 34", 188.73333333, -0.20944444),
        ("12 34 56 00 12 34", 188.73333333, 0.20944444),
        ("12h34m56s -0d12m34s", 188.73333333, -0.20944444),
        ("12h34m56s, -0°12′34″", 188.73333333, -0.20944444),
        ("12:34 -00:12", 188.5, -0.2),
        ("\u221210 \u22125", 350.0, -5.0),
        ("0 -90", 0.0, -90.0),
        ("360 0", 0.0, 0.0),
    ],
)
def test_positions(text, ra, dec):
    assert parse_position(f"  {text} ") == pytest.approx((ra, dec), abs=1e-7)


@pytest.mark.parametrize("hours", ["12:34:56", "12h34m56s", "12 34 56"])
def test_against_astropy(hours):
    wanted = SkyCoord(hours, "-00:12:34", unit=("hourangle", "deg"))
    assert parse_position(f"{hours} -00:12:34") == pytest.approx((wanted.ra.deg, wanted.dec.deg), abs=1e-9)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "188.7",
        "NGC 4565",
        "1 2 3",
        "188.7 95",
        "400 2",
        "nan nan",
        "inf 0",
        "12:60:00 -1:00:00",
        "1,2,3",
        "25:00:00 1:00:00",
    ],
)
def test_refused_positions(text):
    with pytest.raises(InputError) as caught:
        parse_position(text)
    assert caught.value.code == "bad_position" and "wanted" in caught.value.message


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40) | st.text("0123456789:+-. hmsd", max_size=40))
def test_parsing_raises_nothing_else(text):
    try:
        ra, dec = parse_position(text)
    except InputError:
        return
    assert 0 <= ra < 360 and -90 <= dec <= 90
