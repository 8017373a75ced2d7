"""The Python client of the service, sync and async. Imports neither torch nor faiss; astropy only when a table is made.

    client = Client("http://127.0.0.1:8000")
    client.embed_spectrum("coadd.fits")                          # (N, D) float32
    client.search(spectrum="coadd.fits", target="image", k=10)   # astropy Table, provenance in .meta
    client.estimate(image="cutout.fits")
    client.search(position=("12:34:56.7", "-00:12:34"))

Failures are the exceptions of `astroclip.errors`, as if the library had been called in process.
"""

from astroclip.client.aio import AsyncClient
from astroclip.client.calls import Call, Source
from astroclip.client.retry import Retry
from astroclip.client.sync import Client
from astroclip.client.transport import InProcessTransport

__all__ = ["AsyncClient", "Call", "Client", "InProcessTransport", "Retry", "Source"]
