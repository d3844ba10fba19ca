"""Which of the scored chats are kept: limits on their scores, then diversity, then proportions.

What came before (duplicates, benchmarks) was dropped by the stages of a corpus. What goes here is a
line with reason, value and limit in the same form.
"""

import gzip
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanomed.build.files import line_of, whole
from nanomed.build.scores import NUMBERS
from nanomed.build.shards import Doc, Finding, Judge, Tally, read_shard, write_shard
from nanomed.config import InputError

BLOCK = 1024  # chats that are compared at once
NO_LIMIT = 99.0  # as --max_cr, --max_answer_loss
PAPER = {  # figure 3
    "single_turn_zh": 0.272, "single_turn_en": 0.14, "option_zh": 0.248, "multi_turn_zh": 0.34,
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    min_score: float
    min_cr: float
    max_cr: float
    max_similarity: float
    keep: int  # 0: all
    shares: dict[str, float]
    max_answer_loss: float = NO_LIMIT

    def of(self, line: dict[str, Any]) -> list[Finding]:
        """Of a line of scores.jsonl."""
        if line["dropped"]:
            return [Finding(line["dropped"].replace(" ", "_"), 0.0, 0.0, False)]
        if line["score"] is None:
            return [Finding("no_score", 0.0, 0.0, False)]
        score, cr = line["score"], line["cr"]
        found = [Finding("score", score, self.min_score, score >= self.min_score)]
        if cr is None and line["cr_is_missing"] and (self.min_cr > 0 or self.max_cr < NO_LIMIT):
            found.append(Finding("no_cr", 0.0, 0.0, False))
        if cr is not None:
            found.append(Finding("repeated_turns", cr, self.min_cr, cr >= self.min_cr))
            found.append(Finding("unrelated_turns", cr, self.max_cr, cr <= self.max_cr))
        if (loss := line["answer_loss"]) is not None:
            most = self.max_answer_loss
            found.append(Finding("answer_loss", loss, most, loss <= most))
        elif self.max_answer_loss < NO_LIMIT:
            found.append(Finding("no_answer_loss", 0.0, 0.0, False))
        return found


def shares_of(given: Sequence[str]) -> dict[str, float]:
    """KEY=SHARE each, or `paper`. Raises InputError."""
    if list(given) == ["paper"]:
        return PAPER
    shares = {}
    for entry in given:
        key, _, share = entry.rpartition("=")
        try:
            shares[key] = float(share)
        except ValueError:
            shares[key] = -1.0
        if not key or not 0 < shares[key] <= 1:
            raise InputError(f"--shares {entry}: expected KEY=SHARE, as zh=0.86, or paper")
    if sum(shares.values()) > 1 + 1e-6:
        raise InputError(f"--shares add up to {sum(shares.values()):.3f}; they must not pass 1")
    return shares


def diverse(
    vectors: np.ndarray, order: Sequence[int], limit: float, device: torch.device
) -> dict[int, tuple[float, int]]:
    """Greedy, exactly as one by one: a chat goes if its cosine with one that was kept before it is
    above `limit`. vectors [n,D]; `order`: rows, the best first. Of each row that goes, the largest
    cosine and the row that it is with."""
    kept, places, gone = torch.empty(0, vectors.shape[1], device=device), [], {}
    for start in range(0, len(order), BLOCK):
        rows = list(order[start : start + BLOCK])
        known = torch.from_numpy(vectors[rows]).to(device).nan_to_num()  # of what was too long
        block = torch.nn.functional.normalize(known, dim=1)
        best, which = (
            (block @ kept.T).max(1) if len(kept) else (torch.full((len(rows),), -1.0), None)
        )
        inside, new = (block @ block.T).cpu(), []
        for i, (value, row) in enumerate(zip(best.tolist(), rows, strict=True)):
            other = places[int(which[i])] if which is not None else -1
            if new and (most := inside[i, new].max(0)).values > value:
                value, other = float(most.values), rows[new[int(most.indices)]]
            if value > limit:
                gone[row] = (value, other)
            else:
                new.append(i)
        kept, places = torch.cat([kept, block[new]]), places + [rows[i] for i in new]
    return gone


def quotas(keys: Sequence[str], shares: dict[str, float], keep: int) -> dict[str, int]:
    """How many of each key may stay so that the shares are kept: as many as the scarcest allows."""
    there, rest = Counter(keys), 1 - sum(shares.values())
    wanted = shares | ({"": rest} if rest > 1e-6 else {})
    if missing := [key for key in shares if not there[key]]:
        raise InputError(
            f"--shares {missing[0]}: no chat that is left is of it; there are {dict(there)}"
        )
    total = min(there[key] / share for key, share in wanted.items() if key or there[key])
    total = min(total, keep or total)
    # Rounded from one border to the next: rounded by themselves they could be more than `keep`.
    borders = [int(total * up_to + 0.5) for up_to in (0.0, *accumulate(wanted.values()))]
    return {key: b - a for key, (a, b) in zip(wanted, pairwise(borders), strict=True)}


def judge(
    ids: Sequence[int], lines: Sequence[dict[str, Any]], sources: Sequence[str],
    vectors: np.ndarray | None, limits: Limits, device: torch.device,
) -> tuple[Judge, list[int]]:  # fmt: skip
    """The judge of all chats, and the rows that it keeps. Rows of ids, lines, sources and vectors
    are of the same chats."""
    found = [limits.of(line) for line in lines]
    left = [row for row, findings in enumerate(found) if all(f.keeps for f in findings)]
    left.sort(key=lambda row: (-lines[row]["score"], ids[row]))
    if vectors is not None and limits.max_similarity < 1:
        gone = diverse(vectors, left, limits.max_similarity, device)
        for row, (value, other) in gone.items():
            kept = {name: lines[other][name] for name in ("file", "record")}
            found[row].append(
                Finding("similar", value, limits.max_similarity, False, {"survivor": kept})
            )
        left = [row for row in left if row not in gone]
    if limits.shares or limits.keep:
        keys = [_key(lines[row], sources[row], limits.shares) for row in left]
        most, seen = quotas(keys, limits.shares, limits.keep), Counter()
        for row, key in zip(left, keys, strict=True):
            seen[key] += 1
            stays = seen[key] <= most.get(key, 0)
            more = {"share_of": key or "all others"}
            found[row].append(Finding("share", seen[key], most.get(key, 0), stays, more))
        left = [row for row in left if all(f.keeps for f in found[row])]
    row_of = {id: row for row, id in enumerate(ids)}

    def append(docs: list[Doc]) -> None:
        for doc in docs:
            doc.findings += found[row_of[doc.id]]

    return append, left


def _key(line: dict[str, Any], source: str, shares: dict[str, float]) -> str:
    names = {line["kind"], line["kind"].rpartition("_")[2], source}
    mine = [key for key in shares if key in names]
    if len(mine) > 1:
        raise InputError(f"--shares: a chat is both {mine[0]} and {mine[1]}; give shares of one")
    return mine[0] if mine else ""


def write(
    out: Path, cleaned: Path, append: Judge, lines: dict[int, dict], files: list[str],
    show_text: bool,
) -> Tally:  # fmt: skip
    """OUT/selected.jsonl, the records as they came with their scores, and OUT/dropped.jsonl with
    all that went: what the stages of a corpus dropped, and what goes here."""
    docs = (doc for path in finals(cleaned) for doc in read_shard(path) if doc.id in lines)
    tally = write_shard(out / "select/00000", docs, append, files, show_text)
    with gzip.open(out / "select/00000.jsonl.gz") as kept, whole(out / "selected.jsonl") as file:
        for record in map(json.loads, kept):
            line = lines[record["nanomed"]["id"]]
            file.write(line_of(record | {"nanomed": {name: line[name] for name in NUMBERS}}))
    places = {(line["file"], line["record"]) for line in lines.values()}
    with whole(out / "dropped.jsonl") as file:
        for path in [
            *sorted(cleaned.glob("*/*.dropped.jsonl")),
            out / "select/00000.dropped.jsonl",
        ]:
            for line in map(json.loads, path.open(encoding="utf-8")):
                if (line["file"], line["record"]) in places:
                    file.write(line_of(line))
    return Tally.of([tally])


def finals(cleaned: Path) -> list[Path]:
    """What the stages of a corpus keep."""
    return sorted((cleaned / "final").glob("*.jsonl.gz"))


def proportions(lines: Sequence[dict], sources: Sequence[str], kept: Sequence[int]) -> list[list]:
    """A table: of each language, kind and source, how many there were and how many are kept."""
    rows = [["", "scored", "share", "selected", "share"]]
    for of in (lambda i: lines[i]["kind"].rpartition("_")[2], lambda i: lines[i]["kind"],
               lambda i: sources[i]):  # fmt: skip
        before, after = Counter(map(of, range(len(lines)))), Counter(map(of, kept))
        for name in sorted(before):
            shares = before[name] / len(lines), after[name] / max(1, len(kept))
            rows.append([name, before[name], f"{shares[0]:.1%}", after[name], f"{shares[1]:.1%}"])
    return rows
