"""The survey index: catalogue, search across modalities, estimates from neighbours, and how far to trust them.

index = SurveyIndex.open("my-index")
hits, report = index.search(vectors, target="spectrum", k=16, query_modality="image")
estimates = estimate(index, hits[0])
"""

from index.build import BuildOptions, append_index, build_index
from index.head_estimate import Histogram, head_estimate, head_histogram
from index.knn_estimate import (
    Estimates,
    best_target,
    estimate,
    estimate_many,
    knn_histogram,
    neighbours_wanted,
    stacked,
)
from index.regress import Estimate, Regression, knn_regress
from index.store import Hits, HitTable, How, SearchReport, SurveyIndex, Target
from index.trust import Trust, assess, disagreement_flag, disagreement_p, own_statistics

__all__ = [
    "BuildOptions",
    "Estimate",
    "Estimates",
    "Histogram",
    "HitTable",
    "Hits",
    "How",
    "Regression",
    "SearchReport",
    "SurveyIndex",
    "Target",
    "Trust",
    "append_index",
    "assess",
    "best_target",
    "build_index",
    "disagreement_flag",
    "disagreement_p",
    "estimate",
    "estimate_many",
    "head_estimate",
    "head_histogram",
    "knn_histogram",
    "knn_regress",
    "neighbours_wanted",
    "own_statistics",
    "stacked",
]
