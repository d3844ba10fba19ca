"""What a run says of its data before it starts: on the screen, and in data_report.json."""

from nanomed.batches import slices
from nanomed.batches.loader import Loader, overlap_remark, split_remark
from nanomed.config import Run
from nanomed.store.tally import remarks


def report(loader: Loader) -> dict:
    """The content of data_report.json."""
    is_cpt = isinstance(loader.data, slices.Slices)
    return slices.report(loader) if is_cpt else loader.data.meta["report"]


def lines(c: Run, loader: Loader, report: dict) -> list[str]:
    """How much there is to train on, and what somebody should know of it before it costs time."""
    if isinstance(loader.data, slices.Slices):
        sides = [] if c.val_data else slices.split_remarks(loader.data, c.val_fraction)
        read = [source["read"] for source in report["sources"].values()]
        said = _slices_lines(report)
    else:
        sides = split_remark("examples", loader.data, len(loader.val), c.val_fraction)
        if c.val_data:
            sides = overlap_remark(loader.data, loader.train, loader.val)
        read, said = [report], [_examples_line(report, loader)]
    return said + sides + [line for part in read for line in remarks(part)]


def _examples_line(report: dict, loader: Loader) -> str:
    return (
        f"{report['examples']:,} examples, {_changes(report)}; "
        f"{len(loader.train):,} to train on, "
        f"{len(loader.val):,} held out; {report['tokens']:,} tokens, "
        f"{report['trained_tokens'] / report['tokens']:.0%} trained on"
    )


def _slices_lines(report: dict) -> list[str]:
    lines = []
    for name, source in report["sources"].items():
        train, held_out, weight = (source[k] for k in ("train", "held_out", "weight"))
        drawn = "" if weight is None else f"{weight:.1%} of the draws, "
        lines.append(
            f"{name}: {train['documents']:,} documents to train on, {train['tokens']:,} tokens in "
            f"{train['slices']:,} slices; {drawn}seen {source['seen']:.2f} times; "
            f"{held_out['documents']:,} documents held out; {_changes(source['read'])}"
        )
    return lines


def _changes(report: dict) -> str:
    parts = [f"{n} dropped ({cause})" for cause, n in report["dropped"].items()]
    if report["shortened"]:
        parts.append(f"{report['shortened']} shortened by {report['turns_cut']} old turns")
    parts += [f"{n} x {change}" for change, n in report["changed"].items()]
    return ", ".join(parts) or "none dropped or shortened"
