"""One suite for all backends: the same searches of one table, compared with float64 numpy; and their files."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

from astroclip.errors import IndexFileError, InputError
from index import BuildOptions, SurveyIndex, append_index, build_index
from index.backends import ANN, ExactBackend
from index.backends.torch_exact import TorchBackend
from index.examples import Examples
from index.manifest import Manifest
from index.planner import MeasuredSearch, Plan
from index.recall import measure
from index.table_search import Ask, TableSearch
from index.vectors import VectorTable

N, DIM = 4000, 32
BACKENDS = ("numpy", "torch", "torch-half", *ANN)


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def clumps(rng, count):
    centres = np.random.default_rng(1).normal(size=(25, 6))
    turn = np.random.default_rng(2).normal(size=(6, DIM))
    points = centres[rng.integers(0, 25, count)] + 0.6 * rng.normal(size=(count, 6))
    return unit(points @ turn + 0.3 * rng.normal(size=(count, DIM)))


@pytest.fixture(scope="module")
def table():
    rows = np.sort(np.random.default_rng(4).choice(2 * N, N, replace=False))  # every other object lacks the modality
    return VectorTable(clumps(np.random.default_rng(3), N).astype(np.float16), rows)


@pytest.fixture(scope="module")
def queries():
    return clumps(np.random.default_rng(5), 40)


@pytest.fixture(scope="module")
def searches(table):
    """By name: the table searched with each backend, approximate ones measured and used wherever they can be."""
    out = {
        "numpy": TableSearch(table),
        "torch": TableSearch(table, TorchBackend(table, "cpu")),
        "torch-half": TableSearch(table, TorchBackend(table, "cpu", "float16")),
    }
    for name, kind in ANN.items():
        ann = kind.build(table)
        record = measure(ann, table, {"image": table}, np.random.default_rng(6))
        out[name] = TableSearch(table, ann=ann, measured=MeasuredSearch(record["recall"], exact_below=50))
    return out


def region(table, share):
    """The rows nearest to one of the vectors."""
    scores = table.block(0, N) @ table.block(0, 1)[0]
    mask = np.zeros(2 * N, bool)
    mask[table.rows[scores >= np.quantile(scores, 1 - share)]] = True
    return mask


def some(share, seed=7):
    return np.random.default_rng(seed).random(2 * N) < share


def truth(table, queries, ask):
    """(rows, scores) of each query by float64 numpy."""
    scores = queries.astype(np.float64) @ table.block(0, N).astype(np.float64).T
    scores = np.clip(scores, -1, 1)
    sign = -1 if ask.order == "most_similar" else 1
    for line in scores:
        allowed = np.ones(N, bool) if ask.mask is None else ask.mask[table.rows]
        allowed &= ~np.isin(table.rows, ask.excluded)
        if ask.score_threshold is not None:
            allowed &= sign * line <= sign * ask.score_threshold
        slots = np.flatnonzero(allowed)
        slots = slots[np.argsort(sign * line[slots], kind="stable")][: ask.k]
        yield table.rows[slots], line[slots]


EXCLUDED = np.arange(0, 400, 3)
ASKS = {
    "plain": lambda t: Ask(10, "image"),
    "unknown modality": lambda t: Ask(10),
    "many": lambda t: Ask(100, "image"),
    "half at random": lambda t: Ask(10, "image", some(0.5)),
    "tenth at random": lambda t: Ask(10, "image", some(0.1)),
    "hundredth at random": lambda t: Ask(10, "image", some(0.01)),
    "half in a region": lambda t: Ask(10, "image", region(t, 0.5)),
    "tenth in a region": lambda t: Ask(10, "image", region(t, 0.1)),
    "hundredth in a region": lambda t: Ask(10, "image", region(t, 0.01)),
    "three rows": lambda t: Ask(10, "image", np.isin(np.arange(2 * N), t.rows[[5, 50, 500]])),
    "no row": lambda t: Ask(10, "image", np.zeros(2 * N, bool)),
    "excluded": lambda t: Ask(10, "image", None, EXCLUDED),
    "excluded and filtered": lambda t: Ask(10, "image", some(0.3), EXCLUDED),
    "threshold": lambda t: Ask(50, "image", None, score_threshold=0.9),
    "least similar": lambda t: Ask(10, "image", None, order="least_similar"),
    "least similar, filtered": lambda t: Ask(10, "image", region(t, 0.2), order="least_similar"),
    "least similar, threshold": lambda t: Ask(20, "image", order="least_similar", score_threshold=-0.6),
}


@pytest.mark.parametrize("form", ASKS)
@pytest.mark.parametrize("name", BACKENDS)
def test_congruence(searches, table, queries, name, form):
    ask = ASKS[form](table)
    found = searches[name].search(queries, ask)
    agree = []
    for i, (rows, scores) in enumerate(truth(table, queries, ask)):
        got = found.rows[i][found.rows[i] >= 0]
        assert len(got) == len(rows) == len(set(got.tolist()))
        assert ask.mask is None or ask.mask[got].all()
        assert not np.isin(got, ask.excluded).any()
        sign = 1 if ask.order == "most_similar" else -1
        assert np.all(sign * np.diff(found.scores[i][: len(got)]) <= 0)
        agree.append(len(np.intersect1d(rows, got)) / len(rows) if len(rows) else 1.0)
        if found.mode == "exact":
            np.testing.assert_allclose(found.scores[i][: len(got)], scores, atol=2e-6)
    assert np.mean(agree) >= (0.999 if found.mode == "exact" else 0.985)
    assert found.mode in ("exact", name) and 0.995 <= found.expected_recall <= 1.0
    assert found.mode == name or found.expected_recall == 1.0


@pytest.mark.parametrize("name", ANN)
def test_approximate_backends_answer_what_they_can(searches, table, queries, name):
    """Plain and mildly filtered searches are theirs; selective, thresholded and least-similar ones are not."""
    modes = {form: searches[name].search(queries, make(table)).mode for form, make in ASKS.items()}
    for form in ("plain", "half at random", "half in a region"):
        assert modes[form] == name, form
    for form in ("three rows", "no row", "threshold", "least similar"):
        assert modes[form] == "exact", form


@pytest.mark.parametrize("farthest", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
def test_best_score_congruence(searches, table, queries, name, farthest):
    """score = max positive where it beats the max negative, else -(max negative)^2."""
    mask = some(0.4)
    examples = Examples(queries[:3], queries[3:5], np.ones(3), np.ones(2))
    order = "least_similar" if farthest else "most_similar"
    found = searches[name].search_examples(examples, Ask(30, None, mask, EXCLUDED, order))
    cosines = table.block(0, N).astype(np.float64) @ queries[:5].astype(np.float64).T
    p, n = cosines[:, :3].max(axis=1), cosines[:, 3:].max(axis=1)
    scores = np.where(p > n, p, -n * n)
    allowed = np.flatnonzero(mask[table.rows] & ~np.isin(table.rows, EXCLUDED))
    wanted = allowed[np.argsort(scores[allowed] if farthest else -scores[allowed], kind="stable")[:30]]
    np.testing.assert_array_equal(found.rows[0], table.rows[wanted])
    np.testing.assert_allclose(found.scores[0], scores[wanted], atol=2e-6)
    assert found.mode == "exact" and (p > n)[allowed].any() and (p <= n)[allowed].any()


def test_weights_of_examples(table, queries):
    search, none = TableSearch(table), np.empty((0, DIM), np.float32)

    def ids(positive, weights):
        examples = Examples(positive, none, np.asarray(weights, float), np.empty(0))
        return search.search_examples(examples, Ask(12)).rows[0].tolist()

    one, two = ids(queries[:1], [1]), ids(queries[1:2], [1])
    assert ids(queries[:2], [5, 0]) == one and ids(queries[:2], [0, 5]) == two
    assert ids(queries[:2], [2, 2]) == ids(queries[:2], [1, 1])
    both = ids(queries[:2], [1, 1])
    assert set(both) & set(one) and set(both) & set(two)
    shared = [len(set(ids(queries[:2], [1, w])) & set(two)) for w in (1.0, 0.5, 0.05)]
    assert shared[0] >= shared[1] >= shared[2] and shared[0] > shared[2]


@pytest.mark.parametrize("name", ANN)
def test_a_region_far_from_the_query_is_answered_exactly(searches, table, queries, name):
    """None of the nearest passes: the answer must not be filled with survivors that happened to be looked at."""
    search = searches[name]
    far = queries[np.argsort(queries @ table.block(0, 1)[0])[:10]]
    ask = Ask(10, "image", region(table, 0.2))
    slots = search.ann.search(far, 10, ask.mask[table.rows], breadth=64, fetch=48)
    assert (slots >= 0).sum() < 20
    found = search.search(far, ask)
    for i, (rows, _) in enumerate(truth(table, far, ask)):
        np.testing.assert_array_equal(np.sort(found.rows[i]), np.sort(rows))


@pytest.mark.parametrize("name", ANN)
def test_too_few_behind_the_filter_are_searched_for_more_widely(searches, table, queries, name, monkeypatch):
    search, asked = searches[name], []
    original = search.ann.search

    def narrow(q, k, mask=None, *, breadth=0, fetch=0):
        asked.append((len(q), fetch))
        return original(q, k, mask, breadth=breadth, fetch=fetch if len(asked) > 1 else 12)

    monkeypatch.setattr(search.ann, "search", narrow)
    monkeypatch.setattr(type(search.ann), "rerank", 1)
    ask = Ask(10, "image", some(0.5))
    found = search.search(queries, ask)
    assert len(asked) == 2 and 0 < asked[1][0] and asked[1][1] > asked[0][1]
    assert np.all(found.rows >= 0)


def test_coarse_codes_keep_enough_behind_a_filter_to_be_rescored(searches, table, queries, monkeypatch):
    """Just k survivors among coarse proposals are not the k nearest: such queries are asked again, then exactly."""
    search, asked = searches["ivf-pq"], []
    mask = np.zeros(2 * N, bool)
    mask[table.rows[:: max(1, N // 200)]] = True
    allowed = mask[table.rows]
    k = 10

    def few(vectors, k, mask=None, **how):
        return np.tile(np.flatnonzero(mask)[: 2 * k], (len(vectors), 1))  # more than k, less than k to choose from

    monkeypatch.setattr(search.ann, "search", few)
    exact = search.exact.search
    monkeypatch.setattr(search.exact, "search", lambda q, k, mask=None: asked.append(len(q)) or exact(q, k, mask))
    search._approximate(search.ann, queries, k, allowed, Plan("ivf-pq", 8, 100, 1.0))
    assert sum(asked) == len(queries)


def test_random_filters_never_leak(searches, table, queries):
    """A small run of the campaign in benchmarks/filtered_search.py: 3,000 filtered queries through every backend."""
    rng = np.random.default_rng(11)
    for name in BACKENDS:
        for _ in range(15):
            share = float(10 ** rng.uniform(-3.5, 0))
            mask = some(share, int(rng.integers(10**6))) if rng.random() < 0.5 else region(table, share)
            excluded = np.unique(rng.integers(0, 2 * N, 5))
            force = name if name in ANN and rng.random() < 0.5 else None
            k = int(rng.integers(1, 60))
            found = searches[name].search(queries, Ask(k, "image", mask, excluded, force=force))
            there = found.rows >= 0
            assert mask[found.rows[there]].all() and not np.isin(found.rows[there], excluded).any()
            allowed = np.intersect1d(np.setdiff1d(np.flatnonzero(mask), excluded), table.rows)
            assert np.all(there.sum(axis=1) == min(k, len(allowed)))


def test_a_backend_that_leaks_is_checked(searches, table, queries, monkeypatch):
    search = searches["hnsw"]
    original = search.ann.search
    monkeypatch.setattr(search.ann, "search", lambda q, k, mask=None, **how: original(q, k, None, breadth=512))
    mask = some(0.5)
    found = search.search(queries, Ask(10, "image", mask, force="hnsw"))
    assert mask[found.rows[found.rows >= 0]].all()


def test_a_table_of_every_object(table, queries):
    """Slots are rows then."""
    every = TableSearch(VectorTable(table.block(0, N), np.arange(N)))
    mask = some(0.3)[table.rows]
    wide = np.zeros(2 * N, bool)
    wide[table.rows] = mask
    wanted = TableSearch(table).search(queries, Ask(10, None, wide))
    found = every.search(queries, Ask(10, None, mask))
    np.testing.assert_array_equal(table.rows[found.rows], wanted.rows)


@pytest.mark.parametrize("name", ANN)
def test_many_queries_are_asked_in_parts(searches, table, queries, name, monkeypatch):
    ann, mask = searches[name].ann, some(0.3)[table.rows]
    for m in (None, mask):
        whole = ann.search(queries, 10, m, breadth=64, fetch=80)
        with monkeypatch.context() as patch:
            patch.setattr("index.backends.faiss_file._PROPOSALS", 500)
            np.testing.assert_array_equal(ann.search(queries, 10, m, breadth=64, fetch=80), whole)


# --- torch ------------------------------------------------------------------------------------------------------------


def test_half_precision_loses_no_neighbour_where_vectors_crowd(monkeypatch):
    """A thousand vectors within float16's rounding of one another: more are proposed until it is excluded."""
    rng = np.random.default_rng(8)
    centre = unit(rng.normal(size=DIM))
    vectors = unit(centre + 3e-3 / np.sqrt(DIM) * rng.normal(size=(1000, DIM)))
    table = VectorTable(vectors, np.arange(1000))
    query = unit(centre + 1e-3 * rng.normal(size=DIM))[None]
    wanted = np.argsort(-(vectors.astype(np.float64) @ query[0]))[:10]
    half = TorchBackend(table, "cpu", "float16")
    assert set(wanted) <= set(half.search(query, 10)[0].tolist())
    monkeypatch.setattr(half, "_rounding", 0.0)
    assert half.search(query, 10).shape[1] < 100


def test_torch_in_chunks_is_torch_at_once(table, queries, monkeypatch):
    backend = TorchBackend(table, "cpu")
    whole = [np.sort(backend.search(queries, 9, m), axis=1) for m in (None, some(0.3)[table.rows])]
    monkeypatch.setattr("index.backends.torch_exact._CHUNK", 333)
    monkeypatch.setattr("index.backends.torch_exact._QUERIES", 7)
    for mask, wanted in zip((None, some(0.3)[table.rows]), whole, strict=True):
        np.testing.assert_array_equal(np.sort(backend.search(queries, 9, mask), axis=1), wanted)


def test_a_device_that_is_not_there_is_refused(table):
    with pytest.raises(InputError, match="search with numpy"):
        TorchBackend(table, "cuda:99")
    with pytest.raises(InputError, match="cannot be held by 'no such'"):
        TorchBackend(table, "no such")


def test_torch_on_a_gpu_equals_numpy(table, queries):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    search, exact = TableSearch(table, TorchBackend(table, "cuda")), TableSearch(table)
    for make in ASKS.values():
        np.testing.assert_array_equal(search.search(queries, make(table)).rows, exact.search(queries, make(table)).rows)


# --- files and indexes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ANN)
def test_files_come_back_as_they_were(searches, table, queries, name, tmp_path):
    ann = searches[name].ann
    ann.write(tmp_path / "a.faiss")
    again = ANN[name].read(tmp_path / "a.faiss", "a.faiss", count=N, dim=DIM)
    np.testing.assert_array_equal(again.search(queries, 10, breadth=32), ann.search(queries, 10, breadth=32))
    assert len(again) == N and again.settings == ann.settings
    other = next(kind for kind in ANN if kind != name)
    for kind, count, dim in ((ANN[name], N + 1, DIM), (ANN[name], N, DIM + 1), (ANN[other], N, DIM)):
        with pytest.raises(IndexFileError, match="a.faiss holds Index.*wanted Index"):
            kind.read(tmp_path / "a.faiss", "a.faiss", count=count, dim=dim)
    whole = (tmp_path / "a.faiss").read_bytes()
    (tmp_path / "a.faiss").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IndexFileError, match="cannot be read by FAISS"):
        ANN[name].read(tmp_path / "a.faiss", "a.faiss", count=N, dim=DIM)


@pytest.mark.parametrize("name", ANN)
def test_indexes_of_every_backend(toy, tmp_path, name, monkeypatch):
    from parts_fixture import write_parts

    for kind in ANN.values():
        monkeypatch.setattr(kind, "least", 300)
    path = build_index(toy.parts, tmp_path / "i", survey="Toy", options=BuildOptions(backend=name, heads="never"))
    index = SurveyIndex.open(path)
    assert set(index.manifest.backends["image"]) == {name} and index.graph("image").name == name
    exact = SurveyIndex.open(path, exact="torch", device="cpu")
    q = toy.truth["image"][toy.indexed[:30]]
    hits, report = index.search(q, target="image", k=5, query_modality="image")
    wanted, _ = exact.search(q, target="image", k=5, query_modality="image", mode="exact")
    assert report.mode == name and report.expected_recall >= 0.99
    assert np.mean([len(np.intersect1d(a.rows, b.rows)) / 5 for a, b in zip(hits, wanted, strict=True)]) >= 0.98
    write_parts(tmp_path / "more", 60, prefix="new", seed=9)
    append_index(tmp_path / "i", tmp_path / "more", heads="never")
    after = SurveyIndex.open(tmp_path / "i")
    assert after.graph("image").name == name and len(after.graph("image")) == len(after.tables["image"])


def test_indexes_built_before_selectivities_were_measured(toy, graph_root, tmp_path):
    """Their manifest has a graph, with recall by ef and under one filter: unfiltered searches use it as before."""
    shutil.copytree(graph_root / "CURRENT", tmp_path / "i")
    manifest, _ = Manifest.read(tmp_path / "i")
    old = [
        {"query": q, "filtered": f, "k": k, "ef": ef, "recall": 0.999}
        for q in ("image", "spectrum") for f in (False, True) for k, ef in ((10, 64), (100, 128))
    ]  # fmt: skip
    backends = {m: {"hnsw": {"m": 32, "ef_construction": 80, "recall": old}} for m in ("image", "spectrum")}
    (tmp_path / "i" / "manifest.json").write_bytes(replace(manifest, backends=backends).to_bytes())
    index = SurveyIndex.open(tmp_path / "i")
    ask = {"target": "image", "k": 5, "query_modality": "image"}
    hits, report = index.search(toy.truth["image"][0], **ask)
    assert (report.mode, report.candidates, report.expected_recall) == ("hnsw", 64, 0.999) and len(hits[0]) == 5
    hits, report = index.search(toy.truth["image"][0], **ask, mask=np.arange(len(index)) % 10 > 0)
    assert report.mode == "exact" and len(hits[0]) == 5
    unknown = replace(manifest, backends={"image": {"annoy": {"recall": []}}})
    (tmp_path / "i" / "manifest.json").write_bytes(unknown.to_bytes())
    with pytest.raises(IndexFileError, match="annoy.*wanted one of hnsw"):
        SurveyIndex.open(tmp_path / "i")


def test_tables_too_small_for_a_backend_are_searched_exactly(toy, tmp_path):
    path = build_index(toy.parts, tmp_path / "i", survey="Toy", options=BuildOptions(backend="ivf-pq", heads="never"))
    index = SurveyIndex.open(path)
    assert index.manifest.backends == {} and index.graph("image") is None


def test_an_unknown_way_of_exact_search_is_refused(graph_root):
    with pytest.raises(InputError, match="numpy, torch"):
        SurveyIndex.open(graph_root, exact="jax")


def test_exact_backend_gathers_few_and_multiplies_many(table, queries, monkeypatch):
    exact, mask = ExactBackend(table), some(0.1)[table.rows]
    gathered = np.sort(exact.search(queries, 8, mask), axis=1)
    monkeypatch.setattr("index.backends.exact._GATHER", 0.0)
    np.testing.assert_array_equal(np.sort(exact.search(queries, 8, mask), axis=1), gathered)
