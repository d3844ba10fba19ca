"""What test_hf_runs.py does on two processes: import of a folder as train_sft.py does it, then
export. Fresh ones where it measures memory:

    torchrun --nproc_per_node 2 tests/sharded_worker.py FOLDER

A folder NAME is written again as NAME-out; each rank writes NAME-report-RANK.
"""

import json
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from nanomed import config, hf
from nanomed.config import InputError
from nanomed.distributed import start
from nanomed.hf import tensors as hf_tensors
from nanomed.stages import stage


def rss_anon() -> int:
    """Bytes of this process that are no mapped file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peak:
    """The highest RssAnon inside `with`, above that at its beginning, looked at every 2 ms."""

    def __enter__(self):
        self.start = self.highest = rss_anon()
        self.running = True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while self.running:
            self.highest = max(self.highest, rss_anon())
            time.sleep(0.002)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()
        self.bytes = max(self.highest, rss_anon()) - self.start


def main(folder: str) -> None:
    hf_tensors.SHARD_BYTES = 250 * 10**6
    with start(torch.device("cpu")) as world:
        torch.zeros(1000, 1000) @ torch.zeros(1000, 1000)  # what the first matmul allocates
        Path(f"{folder}-report-{world.rank}").write_text(json.dumps(report(world, folder)))


def report(world, folder: str) -> dict:
    """Peak anonymous memory above what it was before, in bytes; or the error."""
    try:
        return go(folder, f"{folder}-out", world)
    except InputError as error:
        return {"error": str(error)}


def go(folder: str, out: str, world) -> dict[str, int]:
    c = config.SFT(init=folder, seq_len=64, micro_tokens=64, device="cpu")
    model_config, encoder = stage.model_and_encoder(c)
    with Peak() as imported:
        model = stage.build_model(c, model_config, world)
    with Peak() as exported:
        hf.export(model, encoder.tokenizer, out, torch.float32)
    return {
        "import": imported.bytes,
        "export": exported.bytes,
        "share": sum(p.to_local().nbytes for p in model.parameters()),
        "largest": max(p.nbytes for p in model.parameters()),
    }


if __name__ == "__main__":
    main(sys.argv[1])
