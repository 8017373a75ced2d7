"""POST /v1/embed: every kind of upload, several objects, isolation of bad ones, array answers."""

from __future__ import annotations

import io

import numpy as np
import pytest
from sky import make_image, make_spectrum
from survey import desi_fits, image_fits, npy, png, sdss_fits, spectrum_csv


def vectors(response) -> np.ndarray:
    assert response.status_code == 200, response.text
    return np.array([item["embedding"] for item in response.json()["items"]], np.float32)


def test_raw_fits_image_is_the_embedders_own_vector(client, engine, galaxy):
    response = client.post("/v1/embed/image", content=image_fits(galaxy), headers={"content-type": "application/fits"})
    got = vectors(response)
    assert got.shape == (1, engine.embedder.dim)
    np.testing.assert_allclose(got[0], engine.embedder.embed([galaxy])[0], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(got[0]), 1.0, atol=1e-5)


def test_long_answers_are_written_by_the_worker_for_them(client, engine, galaxy, monkeypatch):
    written, small = [], galaxy.pixels[:, 44:108, 44:108]
    write = engine.workers.write
    monkeypatch.setattr(
        engine.workers, "write", lambda trace, weight, *rest: written.append(weight) or write(trace, weight, *rest)
    )
    for count in (16, 17):
        answer = client.post("/v1/embed/image", content=npy(np.stack([small] * count)))
        assert answer.status_code == 200 and len(answer.json()["items"]) == count
    assert written == [1]


def test_answer_carries_what_the_contract_says(client, galaxy):
    answer = client.post("/v1/embed/image", content=image_fits(galaxy)).json()
    assert set(answer) == {"items", "model", "index", "request_id"}
    assert set(answer["model"]) == {"id", "sha256", "preprocess_version"}
    assert set(answer["index"]) == {"id", "manifest_sha256"}
    item = answer["items"][0]
    assert item["modality"] == "image" and item["error"] is None
    assert set(item["quality"]) == {"masked_fraction", "snr", "coverage", "flags"}
    assert 0 < item["trust"]["ood_p"] <= 1


@pytest.mark.parametrize(
    ("kind", "media_type"),
    [("csv", "text/csv"), ("sdss", "application/fits"), ("npy", "application/x-npy"), ("desi", None)],
)
def test_spectrum_in_every_form_gives_the_same_place(client, spectrum, kind, media_type):
    forms = {
        "csv": lambda: spectrum_csv(spectrum),
        "sdss": lambda: sdss_fits(spectrum),
        "npy": lambda: npy(np.column_stack([spectrum.wave, spectrum.flux, spectrum.ivar])),
        "desi": lambda: desi_fits([spectrum]),
    }
    headers = {"content-type": media_type} if media_type else {}
    got = vectors(client.post("/v1/embed/spectrum", content=forms[kind](), headers=headers))
    reference = vectors(client.post("/v1/embed/spectrum", content=desi_fits([spectrum])))
    assert float(got[0] @ reference[0]) > 0.9999


def test_png_is_flagged_uncalibrated(client):
    response = client.post("/v1/embed/image", content=png(), headers={"content-type": "image/png"})
    vectors(response)
    codes = {flag["code"] for flag in response.json()["items"][0]["quality"]["flags"]}
    assert "uncalibrated" in codes


def test_multipart_files_come_back_in_order(client):
    images = [make_image(np.random.default_rng(i), noise=0.3, radius=3 + i) for i in range(3)]
    files = [("file", (f"{i}.fits", image_fits(image))) for i, image in enumerate(images)]
    response = client.post("/v1/embed/image", files=files)
    together = vectors(response)
    alone = np.concatenate([vectors(client.post("/v1/embed/image", content=image_fits(image))) for image in images])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert [item["name"] for item in response.json()["items"]] == ["0.fits", "1.fits", "2.fits"]


def test_one_object_alone_and_in_a_batch_of_64(client, galaxy):
    others = [make_image(np.random.default_rng(i), noise=0.3) for i in range(63)]
    files = [("file", (f"{i}.npy", npy(image.pixels))) for i, image in enumerate([*others, galaxy])]
    alone = vectors(client.post("/v1/embed/image", content=npy(galaxy.pixels)))
    together = vectors(client.post("/v1/embed/image", files=files))
    assert len(together) == 64
    np.testing.assert_allclose(together[-1], alone[0], atol=1e-5)


def test_targets_of_one_file_keep_their_order_and_ids(client):
    spectra = [make_spectrum(np.random.default_rng(i), redshift=0.1 + 0.2 * i) for i in range(3)]
    response = client.post("/v1/embed/spectrum", content=desi_fits(spectra))
    items = response.json()["items"]
    assert [item["object_id"] for item in items] == [str(39627000000000000 + i) for i in range(3)]
    one = client.post("/v1/embed/spectrum?object=39627000000000001", content=desi_fits(spectra)).json()["items"]
    np.testing.assert_allclose(one[0]["embedding"], items[1]["embedding"], atol=1e-5)


def test_poison_hurts_nobody_but_itself(client, galaxy):
    good = [image_fits(make_image(np.random.default_rng(i), noise=0.3)) for i in range(3)]
    constant = npy(np.ones((3, 96, 96), np.float32))
    clean = vectors(
        client.post("/v1/embed/image", files=[("file", (f"{i}.fits", data)) for i, data in enumerate(good)])
    )
    mixed = [good[0], constant, good[1], good[2][:5000], good[2]]
    response = client.post("/v1/embed/image", files=[("file", ("", data)) for data in mixed])
    response = client.post("/v1/embed/image", files=[("file", (f"f{i}", data)) for i, data in enumerate(mixed)])
    assert response.status_code == 200
    items = response.json()["items"]
    assert [item["embedding"] is not None for item in items] == [True, False, True, False, True]
    np.testing.assert_allclose([items[i]["embedding"] for i in (0, 2, 4)], clean, atol=1e-6)
    assert items[1]["error"]["code"] == "constant_image"
    assert items[3]["error"]["message"]


def test_weak_targets_of_a_coadd_carry_their_error(client):
    spectra = [make_spectrum(np.random.default_rng(i)) for i in range(3)]
    items = client.post("/v1/embed/spectrum", content=desi_fits(spectra, dead=[1])).json()["items"]
    assert [item["error"] is None for item in items] == [True, False, True]
    assert items[1]["object_id"] == "39627000000000001"


def test_npy_answer(client, engine, galaxy):
    files = [("file", ("a.fits", image_fits(galaxy))), ("file", ("b.npy", npy(np.ones((3, 96, 96), np.float32))))]
    response = client.post("/v1/embed/image", files=files, headers={"accept": "application/x-npy"})
    assert response.status_code == 200 and response.headers["content-type"] == "application/x-npy"
    array = np.load(io.BytesIO(response.content), allow_pickle=False)
    assert array.shape == (2, engine.embedder.dim) and array.dtype == np.float32
    np.testing.assert_allclose(array[0], engine.embedder.embed([galaxy])[0], atol=1e-5)
    assert np.isnan(array[1]).all() and response.headers["x-failed-items"] == "1"
    assert response.headers["x-model-sha256"] == engine.embedder.model_sha256


def test_options_reach_the_readers(client, galaxy, spectrum):
    plain = npy(galaxy.pixels[::-1].copy())
    right = vectors(client.post("/v1/embed/image?bands=z,r,g&pixel_scale_arcsec=0.262", content=plain))
    np.testing.assert_allclose(right, vectors(client.post("/v1/embed/image", content=image_fits(galaxy))), atol=1e-4)
    nm = npy(np.column_stack([spectrum.wave / 10, spectrum.flux, spectrum.ivar]))
    got = vectors(client.post("/v1/embed/spectrum?wave_unit=nm&medium=vacuum", content=nm))
    reference = vectors(client.post("/v1/embed/spectrum", content=desi_fits([spectrum])))
    assert float(got[0] @ reference[0]) > 0.9999


def test_times_and_ids_in_the_headers(client, galaxy):
    response = client.post("/v1/embed/image", content=image_fits(galaxy), headers={"x-request-id": "night-7.field_3"})
    assert response.headers["x-request-id"] == response.json()["request_id"] == "night-7.field_3"
    for stage in ("queue", "decode", "inference", "search"):
        assert float(response.headers[f"x-{stage}-time"]) >= 0
    assert float(response.headers["x-inference-time"]) > 0
    assert float(response.headers["x-decode-time"]) > 0


@pytest.mark.parametrize("kind", ["image", "spectrum"])
def test_inputs_are_measured_only_where_the_answer_judges_them(client, galaxy, spectrum, monkeypatch, kind):
    measured = []
    for module in ("image", "spectrum"):
        name = f"astroclip.preprocess.{module}.{module}_statistics"
        monkeypatch.setattr(name, lambda *grid: measured.append(1) or (0.0,) * 10)
    body = image_fits(galaxy) if kind == "image" else desi_fits([spectrum])
    alone = client.post(f"/v1/embed/{kind}", content=body, headers={"accept": "application/x-npy"})
    assert alone.status_code == 200 and not measured
    judged = client.post(f"/v1/embed/{kind}", content=body)
    assert judged.json()["items"][0]["trust"] is not None and measured == [1]
    assert np.allclose(np.load(io.BytesIO(alone.content)), judged.json()["items"][0]["embedding"], atol=1e-6)
