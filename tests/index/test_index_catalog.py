"""Looking objects up, and what a row looks like."""

from __future__ import annotations

import json

import numpy as np
import pytest

from astroclip.errors import NotFoundError


def test_rows_by_id(toy, index):
    for row in (0, 5, 298, 299, len(index) - 1):
        object_id = str(toy.truth["id"][toy.indexed[row]])
        assert index.catalog.rows_by_id(object_id).tolist() == [row]
        assert index.catalog.row(row)["object_id"] == object_id
    for absent in ("", "obj-0", "obj-000000x", "zzz", "\U0001f52d"):
        assert len(index.catalog.rows_by_id(absent)) == 0


def test_cone_finds_an_object_at_its_position(toy, index):
    rows = index.catalog.cone(toy.truth["ra"][3], toy.truth["dec"][3], 1 / 3600)
    assert index.catalog.take(rows, ["object_id"]).column(0).to_pylist() == ["obj-000003"]


def test_rows_are_valid_json_with_nulls_for_what_is_missing(index):
    row = index.catalog.row(0)
    json.dumps(row, allow_nan=False)
    assert row["log_stellar_mass"] is None and row["redshift"] is not None
    assert {"ra", "dec", "has_image", "has_spectrum", "preview_image", "source"} <= set(index.catalog.columns)
    assert not {"image_embedding", "spectrum_embedding", "error"} & set(index.catalog.columns)


def test_take_keeps_the_order_and_the_columns_asked(index):
    taken = index.catalog.take([7, 3, 7], ["z", "object_id"]).to_pylist()
    assert [r["object_id"] for r in taken] == ["obj-000007", "obj-000003", "obj-000007"]
    assert set(taken[0]) == {"redshift", "object_id"}
    with pytest.raises(NotFoundError, match="no column 'nope'"):
        index.catalog.take([1], ["nope"])


def test_values_are_nan_where_null(toy, index):
    values = index.catalog.values("log_stellar_mass")
    assert values.shape == (len(index),) and np.isnan(values[0]) and np.isfinite(values[1])
    assert index.catalog.values("has_image").sum() == index.manifest.counts["image"]


def test_identity(index):
    assert (index.index_id, index.dim, index.preprocess_version) == ("toy-survey", 16, "1")
    assert index.model_sha256 == "ab" * 32 and index.catalog.properties == {
        "redshift": "",
        "log_stellar_mass": "dex(solMass)",
    }
