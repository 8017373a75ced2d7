"""Files that match their manifest and are hostile all the same; files that change while an index is opened."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from astroclip.errors import IndexFileError
from index import BuildOptions, SurveyIndex, build_index
from index.backends.faiss_file import faiss_module
from index.manifest import Manifest

# Opens and searches an index whose FAISS file has changed bytes and whose manifest was made to match, many times.
TRIALS = """
import sys
from pathlib import Path
import numpy as np
from astroclip.errors import IndexFileError
from index import SurveyIndex
from index.manifest import Manifest
root, backend, trials = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
content, rng = (root / "image.faiss").read_bytes(), np.random.default_rng(3)
manifest, _ = Manifest.read(root)
refused = 0
for trial in range(trials):
    changed = bytearray(content)
    for _ in range(1 + trial % 3):
        # a third in the headers, where lengths are; a third in the last, where lists are
        region = [(0, 400), (0, len(content)), (2 * len(content) // 3, len(content))][trial % 3]
        changed[int(rng.integers(*region))] = int(rng.choice([0, 1, 127, 128, 255]))
    if changed == content:
        continue
    (root / "image.faiss").write_bytes(changed)
    (root / "manifest.json").write_bytes(manifest.with_files(root, manifest.files).to_bytes())
    try:
        opened = SurveyIndex.open(root)
    except IndexFileError as error:
        assert error.field == "image.faiss", error.message
        refused += 1
        continue
    queries = opened.tables["image"].take(np.arange(32))
    for k in (1, 50):
        opened.search(queries, target="image", k=k, query_modality="image", mode=backend)
print(refused)
"""


@pytest.fixture(scope="module", params=["hnsw", "ivf-sq8", "ivf-pq"])
def built(request, tmp_path_factory) -> tuple[str, Path]:
    from parts_fixture import write_parts

    folder = tmp_path_factory.mktemp("hostile")
    write_parts(folder / "parts", 1300)
    options = BuildOptions(backend=request.param, heads="never")
    return request.param, build_index(folder / "parts", folder / "index", survey="T", options=options, plain=True)


def rewritten(root: Path, content: bytes) -> None:
    (root / "image.faiss").write_bytes(content)
    manifest, _ = Manifest.read(root)
    (root / "manifest.json").write_bytes(manifest.with_files(root, manifest.files).to_bytes())


def test_faiss_files_with_changed_bytes_are_refused_or_harmless(built, tmp_path):
    backend, root = built
    copy = shutil.copytree(root, tmp_path / "index")
    command = [sys.executable, "-c", TRIALS, str(copy), backend, "60"]
    run = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout) >= 5


def test_a_length_larger_than_the_file_is_refused_before_memory_is_taken(built, tmp_path):
    """Eight bytes of 2^40 laid over each place of the header in turn: some are lengths of vectors."""
    import resource

    _, root = built
    copy = shutil.copytree(root, tmp_path / "index")
    content = (copy / "image.faiss").read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for at in range(4, 400, 4):
        rewritten(copy, content[:at] + (2**40).to_bytes(8, "little") + content[at + 8 :])
        try:
            SurveyIndex.open(copy)
        except IndexFileError as error:
            assert error.field == "image.faiss"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 200, f"{grown:.0f} MB"


def test_an_inverted_file_must_hold_every_vector_once(built, tmp_path):
    backend, root = built
    if backend == "hnsw":
        pytest.skip("a graph has no lists")
    faiss = faiss_module()
    copy = shutil.copytree(root, tmp_path / "index")
    inner = faiss.read_index(str(copy / "image.faiss"))
    longest = max(range(inner.nlist), key=inner.invlists.list_size)
    ids = faiss.rev_swig_ptr(inner.invlists.get_ids(longest), inner.invlists.list_size(longest))
    for value, complaint in ((10**9, "names a vector outside"), (int(ids[1]), "twice")):
        ids[0] = value
        faiss.write_index(inner, str(copy / "image.faiss"))
        rewritten(copy, (copy / "image.faiss").read_bytes())
        with pytest.raises(IndexFileError, match=f"image.faiss.*{complaint}"):
            SurveyIndex.open(copy)


def test_limits_of_faiss_are_put_back_even_when_threads_read_at_once(built):
    _, root = built
    faiss = faiss_module()
    limits = (faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit())
    faults: list[Exception] = []

    def read() -> None:
        try:
            for _ in range(4):
                SurveyIndex.open(root)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert (faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()) == limits


def test_limits_are_those_of_the_file_while_it_is_read(built, monkeypatch):
    _, root = built
    faiss, seen = faiss_module(), []
    real = faiss.read_index

    def read(path, flags):
        seen.append((faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit(), path))
        return real(path, flags)

    monkeypatch.setattr(faiss, "read_index", read)
    SurveyIndex.open(root)
    assert len(seen) == 2
    assert all(limit == loops == Path(path).stat().st_size for limit, loops, path in seen)


@pytest.mark.parametrize("name", ["catalog.parquet", "vectors-image.npy", "manifest.json"])
def test_a_file_replaced_between_hashing_and_reading_is_noticed(graph_root, tmp_path, monkeypatch, name):
    """Same bytes, another file: as when a directory is copied over while it is opened."""
    copy = shutil.copytree(graph_root / "versions" / "v000001", tmp_path / "index")
    real = SurveyIndex._table

    def meddled(self, modality):
        content = (copy / name).read_bytes()
        (copy / "fresh").write_bytes(content)
        os.replace(copy / "fresh", copy / name)
        return real(self, modality)

    SurveyIndex.open(copy)
    monkeypatch.setattr(SurveyIndex, "_table", meddled)
    with pytest.raises(IndexFileError, match=f"{name} changed while") as caught:
        SurveyIndex.open(copy)
    assert caught.value.code == "index_changed"


def test_vectors_on_disk_may_be_unlinked_under_an_open_index(graph_root, tmp_path, monkeypatch):
    """What a publisher does to old versions: the open index goes on reading its own files."""
    monkeypatch.setattr("index.vectors.RESIDENT_BYTES", 0)
    copy = shutil.copytree(graph_root / "versions" / "v000001", tmp_path / "index")
    opened = SurveyIndex.open(copy)
    queries = opened.tables["image"].take(np.arange(3))
    before = [hits.object_ids for hits in opened.search(queries, target="image", k=5, mode="exact")[0]]
    shutil.rmtree(copy)
    assert [hits.object_ids for hits in opened.search(queries, target="image", k=5, mode="exact")[0]] == before
