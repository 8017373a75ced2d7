"""The synchronous client."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import httpx2
import numpy as np
import numpy.typing as npt

from astroclip.client import calls
from astroclip.client.calls import Call, Source
from astroclip.client.credentials import key_headers
from astroclip.client.results import unreachable
from astroclip.client.retry import Retry

if TYPE_CHECKING:
    from astropy.table import Table

__all__ = ["Client"]

T = TypeVar("T")


class Client:
    """Talks to a service at `base_url`; `transport` replaces the network (`InProcessTransport(app)`, tests).

    api_key: of a service that asks for one; None takes that of the environment (ASTROCLIP_API_KEY), "" sends none.
    timeout_s: of one attempt. Raises the exceptions of `astroclip.errors`; a service that cannot be reached is an
    `AstroClipError` with code "unreachable".
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retry: Retry | None = None,
        headers: Mapping[str, str] | None = None,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self.base_url = base_url
        self.retry = retry or Retry()
        headers = {**key_headers(api_key), **(headers or {})}
        self._http = httpx2.Client(base_url=base_url, timeout=timeout_s, headers=headers, transport=transport)

    def send(self, call: Call[T]) -> T:
        """Send a call of `astroclip.client.calls` and read its answer."""
        attempt = 0
        while True:
            try:
                response = self._http.request(**call.arguments())
            except (httpx2.TransportError, httpx2.InvalidURL) as error:
                raise unreachable(error, self.base_url) from error
            wait = self.retry.wait_s(response, attempt)
            if wait is None:
                return call.read(response)
            time.sleep(wait)
            attempt += 1

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # -- calls ---------------------------------------------------------------------------------------------------

    def embed_image(self, *sources: Source, **options: Any) -> npt.NDArray[np.float32]:
        """(N, D) float32 unit vectors of images: paths, bytes or (3, H, W) arrays in nanomaggies, g, r, z.

        options: pixel_scale_arcsec, bands. Raises InputError if any item cannot be used; `embed` reports them instead.
        """
        return self.send(calls.embed_array("image", sources, options))

    def embed_spectrum(self, *sources: Source, **options: Any) -> npt.NDArray[np.float32]:
        """(N, D) float32 unit vectors of spectra: paths, bytes, (L, 2..4) arrays, or (wave, flux[, ivar[, mask]]).

        options: wave_unit, flux_unit, medium, object. Wavelengths are vacuum Angstrom, fluxes 1e-17 erg/s/cm2/A
        unless the file or the options say otherwise. Raises InputError if any item cannot be used.
        """
        return self.send(calls.embed_array("spectrum", sources, options))

    def embed(self, modality: str, *sources: Source, **options: Any) -> Table:
        """One row an item, with quality, trust and errors beside the embedding."""
        return self.send(calls.embed_table(modality, sources, options))

    def search(
        self,
        *,
        object_id: str | None = None,
        position: Any = None,
        radius_arcsec: float | None = None,
        vector: npt.ArrayLike | None = None,
        modality: str | None = None,
        image: Source | None = None,
        spectrum: Source | None = None,
        query: Mapping[str, Any] | None = None,
        target: str | None = None,
        k: int | None = None,
        filter: Mapping[str, Any] | None = None,
        exclude_arcsec: float | None = None,
        columns: Sequence[str] | None = None,
        score_threshold: float | None = None,
        order: str | None = None,
        fuse: Mapping[str, float] | None = None,
        explain: bool | Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Table:
        """The most similar objects, best first; ``meta`` holds trust, search, model, index, request_id.

        Ask with one of: object_id; position (SkyCoord, (ra, dec) in degrees or sexagesimal); vector and modality;
        image and / or spectrum (both are fused, with the weights `fuse`, e.g. {"image": 2}); query (the service's own
        form, e.g. {"combine": {"positive": [..], "negative": [..], "strategy": "best_score"}}). score_threshold: hits
        with a smaller score are left out; order "least_similar" starts from the other end.
        explain, of uploads: True or {"object_id": ...} adds ``meta["explanation"]``, why they resemble the top hit or
        that object, by modality: windows, drop, score, plot.
        """
        return self.send(
            calls.search(
                query=query,
                object_id=object_id,
                position=position,
                radius_arcsec=radius_arcsec,
                vector=vector,
                modality=modality,
                image=image,
                spectrum=spectrum,
                options=options,
                target=target,
                k=k,
                filter=filter,
                exclude_arcsec=exclude_arcsec,
                columns=columns,
                score_threshold=score_threshold,
                order=order,
                fuse=fuse,
                explain=explain,
            )
        )

    def search_vectors(
        self,
        vectors: npt.ArrayLike,
        modality: str,
        *,
        target: str | None = None,
        k: int | None = None,
        filter: Mapping[str, Any] | None = None,
        score_threshold: float | None = None,
        order: str | None = None,
    ) -> Table:
        """The most similar objects of each of many vectors (Q, D) of the service's model, in one request.

        One row a hit, with the place of its vector in the column query; nothing is left out, so an object of the index
        finds itself. Arguments as for `search`; the largest Q is `max_vectors` of `info()["limits"]`.
        """
        asked = {"target": target, "k": k, "filter": filter, "score_threshold": score_threshold, "order": order}
        return self.send(calls.search_vectors(vectors, modality, **asked))

    def estimate(
        self,
        *,
        object_id: str | None = None,
        position: Any = None,
        radius_arcsec: float | None = None,
        vector: npt.ArrayLike | None = None,
        modality: str | None = None,
        image: Source | None = None,
        spectrum: Source | None = None,
        query: Mapping[str, Any] | None = None,
        target: str | None = None,
        k: int | None = None,
        filter: Mapping[str, Any] | None = None,
        exclude_arcsec: float | None = None,
        columns: Sequence[str] | None = None,
        score_threshold: float | None = None,
        fuse: Mapping[str, float] | None = None,
        properties: Sequence[str] | None = None,
        coverage: float | None = None,
        method: str | None = None,
        density: bool | int | None = None,
        explain: bool | Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Table:
        """Properties of an object: name, unit, value, lo, hi, coverage, n_eff, k, calibrated; the hits in
        ``meta["hits"]``.

        Ask as for `search`. method: "knn", from the neighbours (the default), or "head", by the index's networks;
        n_eff and k are then masked. k: neighbours used for every property; None = for each as many as the index chose.
        calibrated: False where an interval is the neighbours' spread and nothing more. density: True or a number of
        bins; ``meta["density"]`` then maps each property to (edges (G + 1,), pdf (G,)), the mean density per unit of
        it in each bin. explain: as for `search`.
        """
        return self.send(
            calls.estimate(
                query=query,
                object_id=object_id,
                position=position,
                radius_arcsec=radius_arcsec,
                vector=vector,
                modality=modality,
                image=image,
                spectrum=spectrum,
                options=options,
                target=target,
                k=k,
                filter=filter,
                exclude_arcsec=exclude_arcsec,
                columns=columns,
                score_threshold=score_threshold,
                fuse=fuse,
                properties=properties,
                coverage=coverage,
                method=method,
                density=density,
                explain=explain,
            )
        )

    def object(self, object_id: str) -> dict[str, Any]:
        """The catalogue record of one object. Raises NotFoundError."""
        return self.send(calls.one_object(object_id))

    def objects(self, position: Any, radius_arcsec: float = 5.0, limit: int | None = None) -> Table:
        """Objects within a cone, nearest first; position as for `search`."""
        return self.send(calls.cone(position, radius_arcsec, limit))

    def random_objects(self, count: int = 1, seed: int | None = None) -> Table:
        """Objects drawn at random; the same ones for the same seed."""
        return self.send(calls.random_objects(count, seed))

    def lists(self) -> dict[str, dict[str, Any]]:
        """The survey-wide lists of the served index, by kind: rows, found, created, parameters."""
        return self.send(calls.lists())

    def list_rows(self, kind: str, *, modality: str | None = None, offset: int = 0, limit: int | None = None) -> Table:
        """Rows of a survey-wide list: "isolated", "disagreeing" or "duplicates". Raises NotFoundError."""
        return self.send(calls.one_list(kind, modality, offset, limit))

    def info(self) -> dict[str, Any]:
        """Models, indexes, limits, versions, licences and citations."""
        return self.send(calls.info())
