"""The store of documents: what goes in comes out, in any range, on the right side of the split."""

import json
from itertools import pairwise

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanomed import store
from nanomed.loader import is_held_out

TEXTS = st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=30)


def write(path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def stream(store_: store.Documents, shard: int) -> list[list[int]]:
    """The documents of a shard, as its arrays say."""
    borders = store_._load(shard, "borders")
    tokens = store_._load(shard, "tokens").tolist()
    return [tokens[a:b] for a, b in pairwise(borders)]


@given(texts=TEXTS, fraction=st.floats(0, 1), data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_range_of_either_part(tmp_path_factory, encoder, texts, fraction, data):
    folder = tmp_path_factory.mktemp("store")
    file = write(folder / "texts.jsonl", [*texts, "end"])
    built = store.build(folder / "store", [file], encoder, shard_tokens=50)
    kept = [text for text in [*texts, "end"] if text.strip()]
    assert built.manifest["documents"] == len(kept)
    n_found = 0
    for held_out, part in enumerate(built.split(fraction)):
        expected = []  # (ids, shard, document)
        for shard in range(len(built.manifest["shards"])):
            sides = is_held_out(built._load(shard, "keys"), fraction)
            documents = stream(built, shard)
            expected += [(ids, shard, d) for d, ids in enumerate(documents) if sides[d] == held_out]
        flat = [(i, k == len(ids) - 1) for ids, _, _ in expected for k, i in enumerate(ids)]
        assert (part.n_tokens, part.n_documents) == (len(flat), len(expected))
        n_found += part.n_documents
        start = data.draw(st.integers(0, len(flat)))
        stop = data.draw(st.integers(start, len(flat)))
        pieces = part.read(start, stop)
        assert [i for piece in pieces for i in piece.ids] == [i for i, _ in flat[start:stop]]
        assert part.n_ends(start, stop) == sum(last for _, last in flat[start:stop])
        at = start
        for piece in pieces:
            at += len(piece.ids)
            assert piece.follows == (-100 if flat[at - 1][1] else flat[at][0])
            assert piece.ids.dtype == np.int64 and len(piece.ids)
            ids, *_ = next(e for e in expected if e[1:] == (piece.shard, piece.document))
            assert piece.begins == (at - len(piece.ids) in (0, *_starts(flat)))
            assert encoder.tokenizer.decode(ids[:-1]) in _readable(kept)
            number = built.where(piece.shard, piece.document)[1]
            assert ids == [*encoder.tokenizer.encode([*texts, "end"][number - 1]), ids[-1]]
    assert n_found == len(kept)


def _starts(flat) -> list[int]:
    return [k + 1 for k, (_, last) in enumerate(flat) if last]


def _readable(texts: list[str]) -> list[str]:
    return [text.replace("\u2581", " ") for text in texts]
