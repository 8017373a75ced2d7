"""What one object costs before and in the model: reading its file, putting it on the grid, encoding it.

    python benchmarks/preparing.py [--model service/demo/model] [--threads 1] [--out benchmarks/results/preparing.json]

Made-up objects of the test suite's sky (`tests/sky.py`, `tests/io/survey_files.py`): a noisy galaxy of 96, 152 and 256
pixels and at other scales, spectra on DESI's wavelengths, as .npy and FITS. Milliseconds of processor time, which a
busy machine does not stretch much: medians over the rounds. The grids are compared with the plain preparation that the
tests keep (`tests/preprocess/reference.py`), timed in turn with the product's. The model runs on `--threads` threads.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from astroclip.embed import Embedder
from astroclip.io import read_images, read_spectra
from astroclip.preprocess import GridImage, GridSpectrum
from astroclip.types import Image, Spectrum
from training.evaluate.report import provenance, write_json

for folder in ("tests", "tests/io", "tests/preprocess"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / folder))

from reference import reference_image, reference_spectrum  # noqa: E402  # of the tests, found by the path above
from sky import make_image, make_spectrum  # noqa: E402
from survey_files import cutout, desi_coadd, npy_bytes, sdss_spec  # noqa: E402

ROUNDS = 100
BATCHES = {1: 30, 8: 10, 32: 5, 64: 3}  # objects a pass: rounds
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("service/demo/model"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/preparing.json"))
    arguments = parser.parse_args()
    started, rng = time.perf_counter(), np.random.default_rng(SEED)
    torch.set_num_threads(arguments.threads)
    embedder = Embedder.from_pretrained(arguments.model, device="cpu")
    results = [*reading(rng), *preparing(embedder, rng), *encoding(embedder, rng)]
    found = {"threads": arguments.threads, "model_sha256": embedder.model_sha256, "results": results}
    write_json(arguments.out, {"kind": "preparing", **provenance(seed=SEED, started=started), **found})


def reading(rng: np.random.Generator) -> list[dict[str, Any]]:
    spectrum = make_spectrum(rng)
    columns = np.column_stack([spectrum.wave, spectrum.flux, spectrum.ivar])
    files: dict[str, tuple[Callable[[bytes], Any], bytes]] = {
        "image npy 96": (read_images, npy_bytes(make_image(rng, 96).pixels)),
        "image FITS 152": (read_images, cutout(rng, make_image(rng, 152).pixels)),
        "image FITS 256": (read_images, cutout(rng, make_image(rng, 256).pixels)),
        "spectrum npy": (read_spectra, npy_bytes(columns)),
        "spectrum SDSS": (read_spectra, sdss_spec(rng)),
        "spectrum DESI": (read_spectra, desi_coadd(rng, 1)),
        "spectrum DESI, 50 targets": (read_spectra, desi_coadd(rng, 50)),
    }
    out = []
    for name, (read, data) in files.items():
        (spent,) = medians([partial(read, data)])
        out.append(said({"read": name, "bytes": len(data), "objects": len(read(data)), "cpu_ms": spent}))
    return out


def preparing(embedder: Embedder, rng: np.random.Generator) -> list[dict[str, Any]]:
    objects: dict[str, Image | Spectrum] = {
        "image on the grid, 96": make_image(rng, 96),
        "image 152": make_image(rng, 152),
        "image 256": make_image(rng, 256),
        'image 100 of 0.4"': replace(make_image(rng, 100), pixel_scale_arcsec=0.4),
        'image 256 of 0.13"': replace(make_image(rng, 256), pixel_scale_arcsec=0.13),
        "spectrum": make_spectrum(rng),
        "spectrum DESI": read_spectra(desi_coadd(rng, 1))[0],
        "spectrum SDSS": read_spectra(sdss_spec(rng))[0],
    }
    out = []
    for name, item in objects.items():
        spent, plain = medians([partial(embedder.prepare, item), partial(plainly, embedder, item)])
        out.append(said({"prepare": name, "cpu_ms": spent, "plain_cpu_ms": plain, "ratio": plain / spent}))
    return out


def plainly(embedder: Embedder, item: Image | Spectrum) -> GridImage | GridSpectrum:
    """As the tests' reference does it; without the doubts, which it leaves out."""
    if isinstance(item, Image):
        return reference_image(item, embedder.image_grid)
    return reference_spectrum(item, embedder.spectrum_grid)


def encoding(embedder: Embedder, rng: np.random.Generator) -> list[dict[str, Any]]:
    out = []
    for modality, make in (("image", make_image), ("spectrum", make_spectrum)):
        grids: list[Any] = [embedder.prepare(make(rng)) for _ in range(max(BATCHES))]
        for batch, rounds in BATCHES.items():
            (spent,) = medians([partial(embedder.encode, grids[:batch])], rounds)
            out.append(said({"encode": modality, "batch": batch, "cpu_ms": spent / batch}))
    return out


def medians(works: list[Callable[[], Any]], rounds: int = ROUNDS) -> list[float]:
    """Milliseconds of processor time of each of `works`, which take turns."""
    spent = []
    for _ in range(rounds + 3):
        row = []
        for work in works:
            start = time.process_time()
            work()
            row.append(time.process_time() - start)
        spent.append(row)
    return [1e3 * float(value) for value in np.median(np.array(spent[3:]), axis=0)]


def said(found: dict[str, Any]) -> dict[str, Any]:
    print(found, flush=True)
    return found


if __name__ == "__main__":
    main()
