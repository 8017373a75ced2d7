"""Search backends: one protocol, several ways to find the nearest vectors of one table.

exact     numpy, any mask                        the default, and where every other one ends
torch     the same on a GPU, in half precision   chosen when an index is opened
hnsw      FAISS graph                            a file of the index
ivf-sq8   FAISS inverted file, a byte a dimension
ivf-pq    FAISS inverted file, half of that
"""

from index.backends.exact import ExactBackend
from index.backends.faiss_file import FaissBackend
from index.backends.hnsw import HnswBackend
from index.backends.ivf import IvfPqBackend, IvfSq8Backend

__all__ = ["ANN", "ExactBackend", "FaissBackend"]

ANN: dict[str, type[FaissBackend]] = {kind.name: kind for kind in (HnswBackend, IvfSq8Backend, IvfPqBackend)}
