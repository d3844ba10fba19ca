"""Benchmarks, and what they show, on one page.

    python evaluate.py --model runs/sft                the samples' exam and held-out chats
    python evaluate.py --model MODEL --tasks paper --data benchmarks --shots 3 --out evals/sft
    torchrun --nproc_per_node 8 evaluate.py --model MODEL ...              the same on several GPUs
    python evaluate.py show mmlu_anatomy --data benchmarks --shots 3       the exact prompts
    python evaluate.py cmb --model MODEL --data QUESTIONS --key KEY        CMB-Exam, in words
    python evaluate.py answer --model MODEL --set cmb-clin --history model      dialogues
    python evaluate.py judge --answers A --against B --judge URL --max_cost 5
    python evaluate.py compare evals/sft evals/dpo                         which items changed
    python evaluate.py report evals/*                                      report.html

The first is scored by likelihood; stopped at any moment, the same command goes on. What the numbers
mean is in docs/evaluation.md.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from nanomed.arguments import command_line
from nanomed.build.files import line_of, write_json
from nanomed.build.labeller import Answer, Cache, Endpoint
from nanomed.config import InputError
from nanomed.distributed import alone_or_start, launch, pick_device
from nanomed.evals import answers, benchmarks, cmb, report, samples, tasks
from nanomed.evals import compare as pairs
from nanomed.evals import judge as judging
from nanomed.evals import page as pages
from nanomed.evals.folder import identity, open_folder
from nanomed.evals.requests import PROTOCOLS, all_requests, requests_of
from nanomed.evals.score import bos_of, encode
from nanomed.hf import pretrained
from nanomed.model.packed import pack_linears
from nanomed.model.scoring import Scorer, plan
from nanomed.run.progress import progress
from nanomed.stages.answers import show_answers
from nanomed.store.cache import digest
from nanomed.tools.generate import add_model, load_model, positive_int


def score(argv: list[str]) -> None:
    """Multiple-choice benchmarks by likelihood."""
    parser = _parser("", __doc__)
    add_model(parser)
    parser.add_argument("--tasks", nargs="+", help="tasks and groups; paper: those of Table 1")
    _items(parser)
    parser.add_argument("--out", type=Path, help="folder of the results; default evals/MODEL")
    begin = "a begin token before each text; auto: if the tokenizer asks for it"
    parser.add_argument("--bos", default="auto", choices=("auto", "yes", "no"), help=begin)
    parser.add_argument("--limit", type=positive_int, help="only the first items of each task")
    parser.add_argument(
        "--micro_tokens",
        type=positive_int,
        default=4096,
        help="most tokens in one packed row; default 4096",
    )
    c = parser.parse_args(argv)
    if not c.tasks and (c.data or c.shots or c.protocol):
        raise InputError(
            "without --tasks the samples are asked, in chats and without shots; --data, --shots "
            "and --protocol need --tasks, as in --tasks paper"
        )
    protocol = c.protocol or ("plain" if c.tasks else "chat")
    given = {"plain": c.template and "--template", "chat": c.bos != "auto" and "--bos"}[protocol]
    if given:
        raise InputError(f"{given} has no part in protocol {protocol}; leave it out")
    out = c.out or Path("evals") / Path(c.model).resolve().name
    device = pick_device(c.device)
    tokenizer, encoder, held_out = pretrained.tokenizer_of(c.model, c.tokenizer), None, None
    if protocol == "chat":
        _, encoder = pretrained.describe(c.model, c.tokenizer, c.template)
    bos = [] if encoder else bos_of(tokenizer, c.bos)
    longest = pretrained.config_of(c.model).max_seq_len

    prepared = []
    if not c.tasks:
        held_out = samples.held_out(c.model, encoder, longest)
        prepared = samples.prepared(held_out, encoder, longest, c.micro_tokens, c.limit)
    data, named = c.data or samples.FOLDER, tasks.named(c.tasks or [])
    for task, requests, split in all_requests(named, data, c.shots, protocol):
        asked, encoded = requests[: c.limit], []
        with progress(len(asked), "item", f"reading {task.name}") as bar:
            for request in asked:
                encoded.append(encode(request, tokenizer, bos, longest, encoder))
                bar.update()
        rows = plan(encoded, c.micro_tokens)
        prepared.append(benchmarks.Prepared(task.name, asked, encoded, rows, split))

    model = load_model(c, device)
    settings = {
        "protocol": protocol,
        "shots": c.shots,
        "bos": bos,
        "micro_tokens": c.micro_tokens,
    }
    settings |= identity(model, tokenizer, encoder and encoder.template)
    settings |= benchmarks.asked(prepared, data)
    pack_linears(model)
    with alone_or_start(device) as world:
        if world.is_main:
            open_folder(out, settings)
        benchmarks.score(prepared, Scorer(model, world), out)
        if world.is_main:
            _finish(prepared, out)
        if held_out and len(held_out.val):
            show_answers(model, encoder, held_out, samples.Screen(out, world), str(c.model))


def _finish(prepared: list[benchmarks.Prepared], out: Path) -> None:
    results = benchmarks.results(prepared, benchmarks.read_items(out))
    write_json(out / "results.json", results)
    print(report.aligned(report.accuracies(results)), *report.losses(results), sep="\n")
    print(*benchmarks.warnings(results), f"all in {out}", sep="\n")


def show(argv: list[str]) -> None:
    """What a task asks: contexts to the byte, and their continuations."""
    parser = _parser("show", show.__doc__)
    parser.add_argument("task", help=f"one of {', '.join(tasks.tasks())}")
    _items(parser)
    parser.add_argument("-n", type=int, default=2, help="items shown; default 2, with --json all")
    parser.add_argument("--json", action="store_true", help="one JSON line for each item")
    c = parser.parse_args(argv)
    (task,) = tasks.named([c.task])
    protocol = c.protocol or "plain"
    requests, _ = requests_of(task, c.data or samples.FOLDER, c.shots, protocol)
    if c.json:
        return print("\n".join(request.to_json() for request in requests))
    for request in requests[: c.n]:
        print(f"--- {request.id}, shots {request.shots}; a space is drawn as ·")
        system = request.chat.system if request.chat else ""
        asked = (system + request.context).replace(" ", "·")
        print(asked + " ".join(f"⟦{text.replace(' ', '·')}⟧" for text in request.continuations))
        print(f"right: {request.continuations[request.gold]!r}\n")


def answer(argv: list[str]) -> None:
    """A model's answers to dialogues, turn by turn."""
    parser = _parser("answer", answer.__doc__)
    add_model(parser)
    _generation(parser)
    parser.add_argument(
        "--set",
        required=True,
        choices=[*answers.SETS, "file"],
        help="which dialogues; file: those of --data",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("benchmarks"),
        help="the benchmarks' folder, or the file; default benchmarks",
    )
    parser.add_argument(
        "--history",
        default="gold",
        choices=("gold", "model"),
        help="earlier answers that the model sees: the reference's or its own; default gold",
    )
    c = parser.parse_args(argv)
    path = c.data if c.set == "file" else answers.file_of(c.set, c.data)
    asked, aside = answers.dialogues(path)
    if aside:
        print(f"{aside} records that are no dialogues were set aside", file=sys.stderr)
    out = c.out or Path("evals") / f"{Path(c.model).resolve().name}-{c.set}-{c.history}"
    about = {"set": c.set, "history": c.history, "files": {"data": digest(path)}}
    lines = _answered(c, asked, out, about)
    if lines:
        cut = sum(line["end"] == "length" for line in lines)
        shortened = sum(line["dropped_turns"] > 0 for line in lines)
        print(f"{len(lines)} answers to {len(asked)} dialogues in {out / 'answers.jsonl'}")
        print(f"{cut} were cut off at --max_new {c.max_new}, {shortened} lost their oldest turns")


def judge(argv: list[str]) -> None:
    """Answers judged: against others in both orders, or alone, turn by turn, by four aspects."""
    parser = _parser("judge", judge.__doc__)
    parser.add_argument("--answers", type=Path, required=True, help="the --out of `answer`")
    parser.add_argument("--against", help="another --out, or `reference`; default: grade alone")
    parser.add_argument("--out", type=Path, help="default: ANSWERS/judged, or judged-against-OTHER")
    parser.add_argument("--judge_model", default="judge", help="the name that the endpoint knows")
    parser.add_argument("--judge", help="an OpenAI-compatible endpoint, up to /v1")
    parser.add_argument("--send_texts_to", default="", help="--judge's host, if not this machine")
    parser.add_argument("--max_cost", type=float, help="the most that may be spent in all")
    parser.add_argument("--price_in", type=float, help="price of a million tokens that are sent")
    parser.add_argument("--price_out", type=float, help="price of a million tokens of its replies")
    parser.add_argument("--retry_failed", action="store_true", help="ask again what was unreadable")
    parser.add_argument("--write_requests", type=Path, help="a file for them; nobody is asked")
    parser.add_argument("--replies", type=Path, help="file of replies to those requests")
    c = parser.parse_args(argv)
    if c.judge and c.replies:
        raise InputError(
            "--replies and --judge: read the replies first; they are kept, and the same command "
            "with --judge in place of --replies asks for the others alone"
        )
    lines, parse = answers.read(c.answers), judging.parse_scores
    if c.against:
        other = c.against if c.against == judging.REFERENCE else answers.read(Path(c.against))
        asked, parse = judging.pairs(lines, other), judging.parse_verdict
    else:
        asked = judging.turns(lines)
    if c.write_requests:
        text = "".join(judging.batch_line(one, c.judge_model) for one in asked)
        c.write_requests.write_text(text, encoding="utf-8")
        return print(f"{len(asked)} requests in {c.write_requests}; --replies reads the answers")
    name = f"judged-against-{Path(c.against).name}" if c.against else "judged"
    out = c.out or c.answers / name
    found = judging.judged(asked, c.judge_model, _replies(c, asked, parse, out), parse)
    (out / "judgements.jsonl").write_bytes(b"".join(map(line_of, found)))
    results = (judging.pair_results if c.against else judging.turn_results)(found)
    results["set"] = answers.set_of(c.answers)
    write_json(out / "results.json", {"pairs" if c.against else "turns": results})
    print(json.dumps(results, ensure_ascii=False, indent=2), f"all in {out}", sep="\n")
    if results["unread"]:
        print(f"WARNING: {results['unread']} have no readable judgement; --retry_failed asks again")


def _replies(
    c: argparse.Namespace, asked: list[judging.Asked], parse: Callable, out: Path
) -> dict[str, Answer]:
    """By request. Nothing is sent unless --judge names an endpoint."""
    files = [c.answers / "answers.jsonl"]
    if c.against and c.against != judging.REFERENCE:
        files.append(Path(c.against) / "answers.jsonl")
    about = {"judge_model": c.judge_model, "against": c.against}
    open_folder(out, about | {"files": [digest(path) for path in files]})
    if not c.judge:
        cache = Cache(out / "replies.jsonl")
        for reply in judging.replies(c.replies, asked, c.judge_model) if c.replies else []:
            cache.add(reply)
        return cache.answers
    endpoint = Endpoint(
        c.judge,
        c.judge_model,
        out / "replies.jsonl",
        price_in=c.price_in,
        price_out=c.price_out,
        max_cost=c.max_cost,
        send_texts_to=c.send_texts_to,
    )
    endpoint.ask_parsed([one.request for one in asked], parse, c.retry_failed)
    return endpoint.cache.answers


def exam(argv: list[str]) -> None:
    """CMB-Exam, answered in words: its own reading of the letters and a strict one side by side."""
    parser = _parser("cmb", exam.__doc__)
    add_model(parser)
    _generation(parser)
    parser.add_argument("--data", type=Path, required=True, help="the file of questions")
    parser.add_argument("--key", type=Path, required=True, help="CMB-test-choice-answer.json")
    c = parser.parse_args(argv)
    asked, key = cmb.questions(c.data, c.key)
    out = c.out or Path("evals") / f"{Path(c.model).resolve().name}-cmb"
    files = {"data": digest(c.data), "key": digest(c.key)}
    if lines := _answered(c, asked, out, {"history": "gold", "files": files}):
        found = {"cmb": cmb.results(lines, key)}
        write_json(out / "results.json", found)
        print(report.aligned(report.readings(found["cmb"])), f"all in {out}", sep="\n")


def _answered(
    c: argparse.Namespace, asked: list[answers.Dialogue], out: Path, about: dict
) -> list[dict]:
    """The answers, on rank 0."""
    device = pick_device(c.device)
    _, encoder = pretrained.describe(c.model, c.tokenizer, c.template)
    model, by_model = load_model(c, device), about["history"] == "model"
    answerer = answers.Answerer(model, encoder, c.max_new, c.batch_size, by_model)
    with alone_or_start(device) as world:
        return answerer.run(asked, out, about, world)


def compare(argv: list[str]) -> None:
    """Two evaluations of the same items: exact McNemar, and the difference with its interval."""
    parser = _parser("compare", compare.__doc__)
    parser.add_argument("a", type=Path, help="the --out of one model")
    parser.add_argument("b", type=Path, help="the --out of the other")
    parser.add_argument(
        "--json", action="store_true", help="all of it, with the changed items' ids"
    )
    c = parser.parse_args(argv)
    found = pairs.compare(c.a, c.b)
    print(json.dumps(found, indent=2) if c.json else report.aligned(report.differences(found)))


def page(argv: list[str]) -> None:
    """One page of HTML: the paper's tables and figures beside those of evaluations."""
    parser = _parser("report", page.__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="the --out of any of these commands")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="default report.html")
    parser.add_argument("--data", type=Path, help="the benchmarks' folder, to show questions")
    c = parser.parse_args(argv)
    c.out.write_text(pages.page(c.folders, c.data), encoding="utf-8")
    print(c.out)


def _parser(command: str, does: str) -> argparse.ArgumentParser:
    return command_line(f"evaluate.py {command}".strip(), does)


def _items(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="the benchmarks' folder; default samples/")
    parser.add_argument(
        "--shots", type=int, default=0, help="answered examples before a question; default 0"
    )
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="plain: a text to go on with; chat: by the template; default plain",
    )


def _generation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="folder of the answers; default: one in evals/")
    parser.add_argument(
        "--max_new", type=positive_int, default=512, help="most tokens of an answer; default 512"
    )
    parser.add_argument(
        "--batch_size", type=positive_int, default=16, help="answers at a time; default 16"
    )


COMMANDS = {"show": show, "answer": answer, "judge": judge, "cmb": exam}
COMMANDS |= {"compare": compare, "report": page}


def main() -> None:
    first, *rest = sys.argv[1:] or ["--help"]
    if first in COMMANDS:
        return COMMANDS[first](rest)
    score([first, *rest])


if __name__ == "__main__":
    launch(main)
