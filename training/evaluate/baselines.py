"""Runs of the supervised baselines: survey in, checkpoint and result JSON out, resumable and bounded in time.

`resnet` (images), `photometry` (g, r, z) and `redshift` (spectra), each trained on the training shards, stopped on
the validation shards, judged once on the test shards.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from astroclip.models import ImageTowerConfig
from astroclip.preprocess import SpectrumGrid
from training.data import PROPERTIES, SurveyArrays, find_shards, load_survey
from training.evaluate import metrics
from training.evaluate.fit import FitOptions, Rows, choose_device, fit
from training.evaluate.report import plain, provenance, write_json
from training.evaluate.supervised import (
    ImageRegression,
    RedshiftClasses,
    RedshiftNet,
    TableRegression,
    image_net,
    table_net,
)
from training.evaluate.survey import photometry, read_columns
from training.split import Split, split_shards

__all__ = ["KINDS", "load_redshift_net", "run_baseline"]

Array = npt.NDArray[Any]
KINDS = ("resnet", "photometry", "redshift")
Z_MAX = 1.7  # of the redshift classes: the survey ends at about 1.4, and shifted copies need room


@dataclass(frozen=True)
class _Data:
    """The split's objects in one survey, and which rows are whose; rows with an unknown property belong to none."""

    survey: SurveyArrays
    shards: list[Path]
    train: Rows
    val: Rows
    test: Rows


def run_baseline(
    kind: str,
    data: Path,
    out: Path,
    options: FitOptions,
    *,
    image_config: ImageTowerConfig | None = None,
    spectrum_grid: SpectrumGrid | None = None,
    report: Callable[[dict[str, Any]], None] = lambda entry: None,
) -> dict[str, Any]:
    """Train baseline `kind` on the survey in `data`; `<out>/checkpoint.pt`, `weights.pt`, `result.json`.

    Run again with the same `out` it goes on where it stopped; a finished run gives its result at once. In the result
    "test" maps each property to {"value", "lo", "hi"} R2; for `redshift` the other redshift numbers too.
    """
    if kind not in KINDS:
        raise ValueError(f"baseline {kind!r} is unknown; wanted one of {', '.join(KINDS)}")
    started = time.perf_counter()
    grid = spectrum_grid or SpectrumGrid()
    split = split_shards(find_shards(data))
    names = split.names()
    request = {"kind": kind, "options": asdict(options)} | {f"{part}_shards": names[part] for part in names}
    if (done := _finished(out, request)) is not None:
        return done
    loaded = _load(split, grid)
    torch.manual_seed(options.seed)
    device = choose_device(options.device)
    run = {"resnet": _resnet, "photometry": _photometry, "redshift": _redshift}[kind]
    net, task = run(loaded, options, image_config, grid)
    history = fit(net, task, loaded.train, loaded.val, options, out / "checkpoint.pt", report)
    predicted = np.asarray(task.predict(net, loaded.test, device))
    out.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), out / "weights.pt")
    truth = loaded.survey.targets()[loaded.test]
    result = {
        **provenance(seed=options.seed, started=started),
        **request,
        "objects": {"train": len(loaded.train), "val": len(loaded.val), "test": len(loaded.test)},
        "epochs": len(history),
        "training_seconds": history[-1]["seconds"] if history else 0.0,
        "history": history,
        "test": metrics.redshift_numbers(truth[:, PROPERTIES.index("redshift")], predicted)
        if kind == "redshift"
        else _r2_numbers(truth, predicted),
    }
    if kind == "redshift":
        result["net"] = net.settings
    write_json(out / "result.json", result)
    return dict(plain(result))


def load_redshift_net(out: Path, device: str = "auto") -> RedshiftNet:
    """The trained redshift CNN of a `redshift` run, in eval mode."""
    settings = json.loads((out / "result.json").read_text(encoding="utf-8"))["net"]
    net = RedshiftNet(**settings)
    place = choose_device(device)
    net.load_state_dict(torch.load(out / "weights.pt", map_location=place, weights_only=True))
    return net.to(place).eval()


def _finished(out: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The result in `out` where it answers the very same request; a survey takes minutes and gigabytes to read."""
    path = out / "result.json"
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return result if all(result.get(name) == value for name, value in request.items()) else None


def _load(split: Split, grid: SpectrumGrid) -> _Data:
    shards = [*split.train, *split.val, *split.test]
    survey = load_survey(shards, spectrum_grid=grid)
    known = np.asarray(np.isfinite(survey.targets()).all(axis=1))
    counts = [_count(part) for part in (split.train, split.val, split.test)]
    train, val, test = (rows[known[rows]] for rows in np.split(np.arange(len(survey)), np.cumsum(counts)[:-1]))
    return _Data(survey, shards, train, val, test)


def _count(shards: Sequence[Path]) -> int:
    total = 0
    for shard in shards:
        with h5py.File(shard, "r") as file:
            total += len(file["object_id"])
    return total


def _resnet(
    data: _Data, options: FitOptions, config: ImageTowerConfig | None, grid: SpectrumGrid
) -> tuple[nn.Module, Any]:
    def images(rows: Rows) -> torch.Tensor:
        return data.survey.image_batch(torch.from_numpy(rows))

    return image_net(len(PROPERTIES), config), ImageRegression(images, data.survey.targets(), data.train)


def _photometry(
    data: _Data, options: FitOptions, config: ImageTowerConfig | None, grid: SpectrumGrid
) -> tuple[nn.Module, Any]:
    features = photometry(read_columns(data.shards), seed=options.seed)
    net = table_net(features.shape[1], len(PROPERTIES))
    return net, TableRegression(features, data.survey.targets(), data.train)


def _redshift(
    data: _Data, options: FitOptions, config: ImageTowerConfig | None, grid: SpectrumGrid
) -> tuple[RedshiftNet, Any]:
    def spectra(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        return data.survey.spectrum_batch(torch.from_numpy(rows))

    net = RedshiftNet(grid.n_pixels, float(np.log(grid.wave_max / grid.wave_min)), Z_MAX)
    return net, RedshiftClasses(spectra, data.survey.catalogue["redshift"], net, grid)


def _r2_numbers(truth: Array, predicted: Array) -> dict[str, dict[str, float]]:
    return {name: metrics.with_interval(metrics.r2, truth[:, i], predicted[:, i]) for i, name in enumerate(PROPERTIES)}
