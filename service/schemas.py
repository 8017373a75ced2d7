"""What crosses HTTP: requests (unknown fields are refused) and answers. The CONTRACT of the service.

Positions are degrees ICRS or sexagesimal strings ("12:34:56.7", "-00:12:34"; RA then in hours). Wavelengths are
Angstrom in vacuum, fluxes 1e-17 erg/s/cm2/A (spectra) or nanomaggies (images).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    FiniteFloat,
    SerializerFunctionWrapHandler,
    StrictBool,
    Tag,
    model_serializer,
    model_validator,
)

from astroclip.types import Modality

__all__ = [
    "Combine",
    "CombineQuery",
    "DENSITY_BINS",
    "DensityModel",
    "EmbedAnswer",
    "ErrorAnswer",
    "EstimateAnswer",
    "EstimateRequest",
    "FuseWeights",
    "ExplainAgainst",
    "ExplanationModel",
    "IndexInfo",
    "InfoAnswer",
    "ListAnswer",
    "ListInfo",
    "ListsAnswer",
    "ModelInfo",
    "ObjectAnswer",
    "ObjectQuery",
    "ObjectsAnswer",
    "PositionQuery",
    "Query",
    "SearchAnswer",
    "SearchRequest",
    "SpectrumPreview",
    "UploadQuery",
    "VectorQuery",
    "VectorsAnswer",
    "VectorsRequest",
]


DENSITY_BINS = 200  # of `"density": true`


class Strict(BaseModel):
    """What a request holds. A wrong one is refused for its first fault, and no more of them are collected than it has
    fields: of a few megabytes of faults the list would take a gigabyte, and the event loop for seconds. So lists fail
    fast."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=(), strict=True)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown_field_is_enough(cls, given: Any) -> Any:
        known = cls.model_fields
        if not isinstance(given, dict) or len(given) <= len(known):
            return given
        unknown = next(name for name in given if name not in known)
        return {name: value for name, value in given.items() if name in known or name == unknown}


# --- queries ---------------------------------------------------------------------------------------------------


class ObjectQuery(Strict):
    """An object of the index. `modality` picks which of its vectors asks, or both fused; by default the one like the
    target."""

    object_id: str = Field(min_length=1, max_length=256)
    modality: Modality | Literal["both"] | None = None


class Position(Strict):
    """The object nearest to a place on the sky, within `radius_arcsec`."""

    ra: FiniteFloat | Annotated[str, Field(max_length=64)]
    dec: FiniteFloat | Annotated[str, Field(max_length=64)]
    radius_arcsec: float = Field(default=5.0, gt=0, le=3600)


class PositionQuery(Strict):
    position: Position
    modality: Modality | Literal["both"] | None = None


class VectorQuery(Strict):
    """A vector of the index's space, any norm. `model_sha256`, where given, must be the served model's (else 409)."""

    vector: Annotated[list[FiniteFloat], Field(fail_fast=True)] = Field(min_length=1, max_length=65536)
    modality: Modality
    model_sha256: str | None = Field(default=None, max_length=128)


class UploadQuery(Strict):
    """The multipart file part of that name."""

    upload: Modality


class Combine(Strict):
    """Several queries as one. `weights` runs over the positives, then the negatives; 1 where not given.

    average: the weighted mean of the positives' unit vectors, plus its difference from the negatives' mean. best_score:
    objects near any one of the positives and nearer to none of the negatives, see `index.examples`.
    """

    positive: Annotated[list[Query], Field(fail_fast=True)] = Field(min_length=1)
    negative: Annotated[list[Query], Field(fail_fast=True)] = Field(default_factory=list)
    weights: Annotated[list[Annotated[FiniteFloat, Field(ge=0)]], Field(fail_fast=True)] | None = None
    strategy: Literal["average", "best_score"] = "average"

    @model_validator(mode="after")
    def _one_weight_each(self) -> Combine:
        wanted = (len(self.positive), len(self.positive) + len(self.negative))
        if self.weights is not None and len(self.weights) not in wanted:
            raise ValueError(
                f"{len(self.weights)} weights for {len(self.positive)} positive and {len(self.negative)} negative "
                "queries; give one for each positive, or one for each of both lists in that order"
            )
        if self.weights is not None and not any(self.weights[: len(self.positive)]):
            raise ValueError("all weights of the positive queries are zero; give one that is not")
        return self


class FuseWeights(Strict):
    """Weights of image and spectrum where both enter as one object."""

    image: FiniteFloat = Field(default=1.0, ge=0)
    spectrum: FiniteFloat = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _not_both_zero(self) -> FuseWeights:
        if not (self.image or self.spectrum):
            raise ValueError("the weights of image and spectrum are both zero; give one that is not")
        return self


class CombineQuery(Strict):
    combine: Combine


_TAGS = {kind: f"kind:{kind}" for kind in ("object_id", "position", "vector", "upload", "combine")}


def _tag(raw: Any) -> str | None:
    """The tag of the query a JSON object means, told by its one distinguishing key; None unless there is one."""
    keys = raw if isinstance(raw, dict) else getattr(raw, "model_fields_set", ())
    named = [tag for key, tag in _TAGS.items() if key in keys]
    return named[0] if len(named) == 1 else None


Query = Annotated[
    Annotated[ObjectQuery, Tag(_TAGS["object_id"])]
    | Annotated[PositionQuery, Tag(_TAGS["position"])]
    | Annotated[VectorQuery, Tag(_TAGS["vector"])]
    | Annotated[UploadQuery, Tag(_TAGS["upload"])]
    | Annotated[CombineQuery, Tag(_TAGS["combine"])],
    Discriminator(
        _tag,
        custom_error_type="query_form",
        custom_error_message="a query is an object with exactly one of object_id, position, vector, upload, combine",
    ),
]


class ExplainAgainst(Strict):
    """The object whose vector an upload is explained against; `modality` picks which, by default the hit's."""

    object_id: str = Field(min_length=1, max_length=256)
    modality: Modality | None = None


# --- requests --------------------------------------------------------------------------------------------------


class SearchRequest(Strict):
    """`query` may be left out in a multipart request: the file parts are the query then, fused when there are two."""

    query: Query | None = None
    target: Literal["image", "spectrum", "either"] | None = Field(
        default=None, description="Which embeddings to search. Default: either (search), the query's own (estimate)."
    )
    k: int | None = Field(default=None, ge=1, strict=True, description="Hits wanted; the largest k stands in /v1/info.")
    filter: dict[str, Any] | None = Field(
        default=None,
        description="and/or/not over range, in, cone, box, polygon, moc; e.g. "
        '{"and": [{"column": "redshift", "range": [0.1, 0.3]}, {"cone": {"ra": 180, "dec": 0, "radius_deg": 5}}]}.',
    )
    exclude_arcsec: float | None = Field(
        default=None, ge=0, le=36000, description="Leave out hits this near to the query."
    )
    score_threshold: float | None = Field(
        default=None,
        ge=-1,
        le=1,
        description="Leave out hits with a smaller score (least_similar: a larger one); fewer than k then say that "
        "there are no more.",
    )
    order: Literal["most_similar", "least_similar"] = Field(
        default="most_similar", description="From which end of the ranking the k hits are taken."
    )
    fuse: FuseWeights | None = Field(
        default=None, description="Weights of image and spectrum where both enter as one object; default: equal."
    )
    columns: Annotated[list[Annotated[str, Field(max_length=128)]], Field(fail_fast=True)] | None = Field(
        default=None, description="Catalogue columns to return with each hit; default: the index's properties."
    )
    preview: bool = Field(default=False, description="Return a small view of the query itself.")
    explain: Annotated[
        Annotated[StrictBool, Tag("kind:switch")] | Annotated[ExplainAgainst, Tag("kind:against")],
        Discriminator(lambda raw: "kind:switch" if isinstance(raw, bool) else "kind:against"),
    ] = Field(
        default=False,
        description="Uploads only: say which wavelengths and image regions made the match with the top hit, or with "
        "the object named. Some hundred passes of the model; the largest number stands in /v1/info.",
    )


def _bins(value: Any) -> Any:
    """true and false as numbers of bins."""
    return (DENSITY_BINS if value else 0) if isinstance(value, bool) else value


class EstimateRequest(SearchRequest):
    """`k` is the number of neighbours every property uses; without it, each uses the number the index chose for it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"query": {"object_id": "sim-00000042"}},
                {
                    "query": {"object_id": "sim-00000042", "modality": "image"},
                    "method": "head",
                    "properties": ["redshift"],
                    "coverage": 0.9,
                    "density": 50,
                },
            ]
        }
    )

    order: Literal["most_similar"] = Field(
        default="most_similar", description="Estimates rest on the most similar objects."
    )
    properties: Annotated[list[Annotated[str, Field(max_length=128)]], Field(fail_fast=True)] | None = Field(
        default=None, description="Properties to estimate; default: every one the index knows."
    )
    coverage: float = Field(default=0.68, gt=0, lt=1, description="Probability the interval lo..hi is meant to hold.")
    method: Literal["knn", "head"] = Field(
        default="knn",
        description="knn: from the nearest neighbours. head: by the index's networks, from the query's own embedding; "
        "/v1/info lists which an index has.",
    )
    density: Annotated[int, BeforeValidator(_bins)] = Field(
        default=0,
        ge=0,
        strict=True,
        description="Return the probability density of every property as a histogram of so many bins (true: 200; the "
        "largest number stands in /v1/info).",
    )


# --- answers ---------------------------------------------------------------------------------------------------


class Answer(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class ModelInfo(Answer):
    id: str
    sha256: str
    preprocess_version: str


class IndexInfo(Answer):
    id: str
    manifest_sha256: str


class Provenance(Answer):
    request_id: str
    model: ModelInfo
    index: IndexInfo


class FlagModel(Answer):
    code: str
    message: str


class QualityModel(Answer):
    masked_fraction: float
    snr: float | None
    coverage: float | None
    flags: list[FlagModel]


class TrustModel(Answer):
    """p-values, small = unusual. `ood_p`: share of objects like the index's own that are as unusual as this one;
    `measures`: what it is made of, by modality: the k-th neighbour's distance, the residual from the neighbours' mean,
    the input's own statistics. `disagreement_p`: share of the index's pairs of image and spectrum that fit together as
    badly as this object's; null unless both are known."""

    ood_p: float | None
    measures: dict[Modality, dict[str, float]] = Field(default_factory=dict)
    disagreement_p: float | None = None
    flags: list[FlagModel]


class ErrorModel(Answer):
    code: str
    message: str
    field: str | None
    limit: float | None
    request_id: str


class ErrorAnswer(Answer):
    error: ErrorModel


class EmbedItem(Answer):
    """One object, in file order. An item that could not be embedded has `error` and no embedding."""

    name: str | None = None
    object_id: str | None = None
    modality: Modality
    embedding: list[float] | None = None
    quality: QualityModel | None = None
    trust: TrustModel | None = None
    error: ErrorModel | None = None


class EmbedAnswer(Provenance):
    items: list[EmbedItem]


class Previews(Answer):
    image: str | None = None
    spectrum: str | None = None


class Hit(Answer):
    """`score`: cosine; `percentile`: of that score among random pairs of the same two modalities."""

    object_id: str
    score: float
    percentile: float | None
    modality: Modality | None
    ra: float | None
    dec: float | None
    properties: dict[str, Any]
    previews: Previews


class SearchReportModel(Answer):
    mode: str
    candidates: int
    expected_recall: float | None


class QueryEcho(Answer):
    """What was asked: the modalities that entered, identity and place where known, what was found in the upload."""

    modalities: list[Modality]
    object_id: str | None = None
    ra: float | None = None
    dec: float | None = None
    quality: dict[str, QualityModel] = Field(default_factory=dict)
    image: str | None = Field(default=None, description="JPEG as a data URL; with preview only.")
    spectrum: dict[str, list[float | None]] | None = Field(
        default=None, description="wave and flux; with preview only."
    )


class ExplanationModel(Answer):
    """What hiding one window of the upload after the other does to its cosine with the vector of `against`.

    `windows`: [first, last] wavelength in Angstrom, or [x0, y0, x1, y1] in pixels of the model's view, x1 and y1
    exclusive. `drop`: `score` less the cosine with that window hidden; `share`: of all drops above zero. `control`:
    root mean square of the drops with as many pixels hidden, scattered: smaller drops say nothing.
    """

    against: ObjectQuery
    score: float
    control: float
    unit: Literal["Angstrom", "pixel"]
    windows: list[list[float]]
    drop: list[float]
    share: list[float]
    pixel_scale_arcsec: float | None = None
    passes: int
    plot: str = Field(description="SVG as a data URL.")


class SearchAnswer(Provenance):
    hits: list[Hit]
    search: SearchReportModel
    trust: TrustModel
    query: QueryEcho
    explanation: dict[Modality, ExplanationModel] | None = Field(
        default=None, description="Only where `explain` was asked for."
    )

    @model_serializer(mode="wrap")
    def _without_absent_explanation(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        record: dict[str, Any] = plain(self)
        if self.explanation is None:
            del record["explanation"]
        return record


class DensityModel(Answer):
    """A histogram: `pdf[i]` is the mean probability density between `edges[i]` and `edges[i + 1]`, per unit of the
    property. The bins hold 99.9 % of the probability."""

    edges: list[float]
    pdf: list[float]


class EstimateModel(Answer):
    """`n_eff`: neighbours that carry the weight (knn), null with method head. `k`: how many of the nearest hits the
    estimate looked at, null with method head. `calibrated`: whether the share of truths that such intervals hold was
    measured when the index was built; false = they are the spread of the neighbours."""

    name: str
    unit: str
    value: float | None
    lo: float | None
    hi: float | None
    coverage: float
    n_eff: float | None
    k: int | None
    calibrated: bool
    density: DensityModel | None = Field(default=None, description="Only where `density` was asked for.")

    @model_serializer(mode="wrap")
    def _without_absent_density(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        record: dict[str, Any] = plain(self)
        if self.density is None:
            del record["density"]
        return record


class EstimateAnswer(SearchAnswer):
    method: Literal["knn", "head"]
    estimates: list[EstimateModel]


class ObjectModel(Answer):
    object_id: str
    ra: float | None
    dec: float | None
    separation_arcsec: float | None = None
    has_image: bool
    has_spectrum: bool
    properties: dict[str, Any]
    columns: dict[str, Any]
    previews: Previews


class ObjectAnswer(Provenance):
    object: ObjectModel


class ObjectsAnswer(Provenance):
    objects: list[ObjectModel]
    truncated: bool = False


class ListInfo(Answer):
    """A survey-wide list: `rows` kept of the `found` there are, and what it was computed with."""

    kind: str
    rows: int
    found: int
    created: str
    parameters: dict[str, Any]


class ListsAnswer(Provenance):
    lists: list[ListInfo]
    note: str | None = Field(default=None, description="Why there are none.")


class ListAnswer(Provenance):
    """`items` from `offset` on, of the `total` rows of this list (and modality); `found` as in `ListInfo`."""

    kind: str
    found: int
    created: str
    parameters: dict[str, Any]
    modality: Modality | None
    offset: int
    total: int
    items: list[dict[str, Any]]


class VectorsRequest(Strict):
    """Parameters of a search for many vectors; their meaning is that of `SearchRequest`."""

    modality: Modality = Field(description="What the vectors are embeddings of.")
    target: Literal["image", "spectrum", "either"] = Field(default="either", description="Which embeddings to search.")
    k: int | None = Field(default=None, ge=1, strict=True, description="Hits of each vector.")
    filter: dict[str, Any] | None = Field(default=None, description="As for /v1/search, as JSON.")
    score_threshold: float | None = Field(default=None, ge=-1, le=1, description="As for /v1/search.")
    order: Literal["most_similar", "least_similar"] = Field(default="most_similar", description="As for /v1/search.")


class VectorsAnswer(Provenance):
    """One entry a vector in every list, in the order sent; inside, its hits, best first."""

    object_id: list[list[str]]
    score: list[list[float]]
    percentile: list[list[float | None]]
    modality: list[list[Modality]]
    search: SearchReportModel


class SpectrumPreview(Answer):
    """`wave` in vacuum, observed; `flux` null where unknown."""

    object_id: str
    wave: list[float]
    flux: list[float | None]
    wave_unit: Literal["Angstrom"] = "Angstrom"
    flux_unit: Literal["1e-17 erg/s/cm2/A"] = "1e-17 erg/s/cm2/A"


class PropertyModel(Answer):
    name: str
    unit: str


class ServedModel(ModelInfo):
    dim: int
    modalities: list[Modality]
    device: str
    dtype: str
    dtype_reason: str


class ServedIndex(IndexInfo):
    """`heads`: what was measured of each property of a head, by its modality. `knn`: the same of estimates from
    neighbours, for each pair of modalities."""

    survey: str
    created: str
    counts: dict[str, int]
    dim: int
    properties: list[PropertyModel]
    default_properties: list[str]
    methods: list[Literal["knn", "head"]]
    heads: dict[str, dict[str, Any]]
    knn: list[dict[str, Any]]
    columns: list[str]
    backends: dict[str, str]
    licence: str | None
    citations: list[str]


class InfoAnswer(Provenance):
    """`limits`: the settings that bound a request; in `reader` and `filter` what a file and a filter may hold."""

    models: list[ServedModel]
    indexes: list[ServedIndex]
    limits: dict[str, float | dict[str, float]]
    versions: dict[str, str]
    uptime_s: float
    licences: dict[str, str | None]
    citations: list[str]
