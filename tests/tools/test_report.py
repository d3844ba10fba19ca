"""The page of runs: their curves, settings beside the paper's, data, answers, evaluations."""

import dataclasses
import json
import re
import stat
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from nanomed.config import CPT, DPO, SFT, InputError
from nanomed.tools.report import of_runs
from tests.conftest import ROOT
from tests.evals.test_page import write as write_evaluation
from tests.test_page import drawn


def write_run(folder, settings, lines, **files):
    folder.mkdir()
    config = {"stage": settings.stage, **dataclasses.asdict(settings)}
    for name, value in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value, ensure_ascii=False))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def step(k: int, loss: float, **more) -> dict:
    rest = {"lr": 1e-3 / k, "grad_norm": 2.0, "tokens_per_s": 900.0, "peak_memory_gb": 0.5}
    return {"step": k, "loss": loss, **rest, **more}


COUNTS = {
    "examples": 90, "kept": 88, "dropped": {"too long": 2}, "shortened": 1, "turns_cut": 1,
    "changed": {}, "tokens": 12_345, "trained_tokens": 2469, "trained_share": 0.2,
    "length_percentiles": {"p0": 3, "p50": 77, "p100": 512}, "language_share": {"zh": 0.75},
}  # fmt: skip


@pytest.fixture
def sft(tmp_path):
    lines = [{"step": 0, "val_loss": 8.5}, step(1, 8.0, accuracy=0.1), step(2, 4.0, accuracy=0.5)]
    answer = {"history": [["user", "早"]], "question": "<b>发热</b>?", "reference": "是",
              "answer": "不是", "mark": "fact seen"}  # fmt: skip
    return write_run(
        tmp_path / "sft", SFT(lr=2e-6, batch_size=16), [*lines, {"step": 2, "val_loss": 3.25}],
        data_report=COUNTS | {"files": {"chats.jsonl": COUNTS | {"sources": {"exam": COUNTS}}}},
        answers={"the best checkpoint": [answer]},
        results={"held_out_answers": {"right": 9, "of": 12}, "note": "not a count"},
    )  # fmt: skip


def figure(text: str, title: str) -> str:
    return re.search(f'<figure><svg [^>]*aria-label="{title}".*?</figure>', text, re.DOTALL)[0]


def cells(text: str, name: str) -> list[str]:
    row = re.search(rf"<tr><td[^>]*>{re.escape(name)}</td>(.*?)</tr>", text)
    return re.findall(r"<td[^>]*>(.*?)</td>", row[1])


def test_runs_of_a_stage_are_drawn_over_each_other(sft, tmp_path):
    other = write_run(tmp_path / "other", SFT(), [step(1, 7.0), step(2, 5.0), step(3, 4.5)])
    dpo = write_run(tmp_path / "dpo", DPO(), [step(1, 0.69, **{"rewards/margins": 0.0})])
    text = of_runs([sft, other, dpo])
    lines, _, dots = drawn(figure(text, "loss, nats"))
    assert list(map(len, lines)) == [2, 3, 2] and len(dots) == 2  # both runs, one's held out
    assert lines[0][0][1] < lines[1][0][1] and lines[0][1][1] > lines[1][2][1]  # 8 above 7, ...
    titles = re.findall('aria-label="(.*?)"', text)
    for title in (
        "learning rate",
        "gradient norm before clipping",
        "peak memory of a process, GiB",
    ):
        assert titles.count(title) == 2  # one of each stage
    assert titles.index("accuracy") > titles.index("learning rate") and "reward margin" in titles
    assert cells(text, "sft") == ["sft", "nothing (tiny)", "2", "8.5000 → 3.2500", "3.2500", "2"]


def test_settings_stand_beside_the_papers(sft, tmp_path):
    second = write_run(tmp_path / "cpt", CPT(batch_size=384), [step(1, 3.0)])
    text = of_runs([sft, second])
    rows, of_cpt = text.split("Continued pre-training</h2>")
    assert cells(rows, "lr") == ["2e-6", "2e-06"]  # the paper's, so not bold
    assert cells(rows, "batch_size") == ["128", "<b>16</b>"]
    assert cells(of_cpt, "batch_size") == ["768 and 384", "384"]
    assert cells(rows, "log_every") == ["1", "1"] and "hardware" not in text


def test_data_answers_results_and_evaluations(sft, tmp_path):
    read = {"weight": 0.7, "seen": 1.25, "held_out": {"documents": 6}, "read": COUNTS}
    sources = {"med": read, "web": read | {"weight": None}}
    lines = [step(1, 3.0)]
    cpt = write_run(tmp_path / "cpt", CPT(), lines, data_report={"sources": sources})
    pairs = {"n": 3, "unread": 1, "win": 1, "tie": 1, "loss": 1, "orders_disagree": 1 / 3,
             "first_seat_wins": 0.5, "longer_wins": None, "win_interval": [0.06, 0.79]}  # fmt: skip
    judged = write_evaluation(tmp_path / "judged", {"pairs": pairs})
    text = of_runs([sft, cpt], [judged])
    counts = ["90", "88", "2 too long", "1", "12,345", "20%", "77", "512", "zh 75%"]
    for name in ("all", "chats.jsonl", "chats.jsonl: exam"):
        assert cells(text, name) == counts
    assert cells(text, "med") == [*counts, "0.70", "1.25", "6"]
    assert cells(text, "web") == [*counts, "", "1.25", "6"]
    assert cells(text, "answers") == ["9 of 12 (75%)"] and "not a count" not in text
    assert "user: 早\n&lt;b&gt;发热&lt;/b&gt;?" in text and "fact seen" in text
    assert "Figures 4 and 5" in text and str(judged) in text and "Figures" not in of_runs([sft])


class Balance(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open = [*self.open, tag]

    def handle_endtag(self, tag):
        assert self.open[-1] == tag
        self.open = self.open[:-1]


def test_the_command_writes_one_file_that_loads_nothing(sft):
    """Of a run that is still going: its last line is half written, one loss is no number."""
    with open(sft / "metrics.jsonl", "a") as file:
        file.write(json.dumps(step(3, 0.0) | {"loss": "nan"}) + '\n{"step": 4, "lo')
    command = [sys.executable, "-m", "nanomed.tools.report", str(sft)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    out = sft / "report.html"
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{out}\n", "")
    text = out.read_text(encoding="utf-8")
    assert "not finite, not drawn, at steps [3]" in text
    assert not re.search(r"<script|https?:|src=|href=|@import|url\(", text)
    parser = Balance()
    parser.feed(text)
    assert parser.open == [] and stat.S_IMODE(out.stat().st_mode) == 0o600


def test_folders_without_a_run(sft, tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        of_runs([sft, tmp_path])
    judged = write_evaluation(tmp_path / "judged", {"pairs": {"n": 0}})
    with pytest.raises(InputError, match="an evaluation; give it after --evals"):
        of_runs([judged])
