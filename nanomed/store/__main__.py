"""Tokenises documents for continued pre-training.

    python -m nanomed.store FILES --tokenizer DIR --out STORE
    python -m nanomed.store --verify STORE

FILES are JSON lines, JSON arrays, CSV or plain text, each also as .gz; docs/formats.md has the
fields. All cores work, memory does not grow with the files, and the same command goes on where a
killed one stopped.
"""

import argparse
import signal
import sys
from pathlib import Path

from nanomed.arguments import command_line
from nanomed.config import InputError
from nanomed.processes import n_cores
from nanomed.store.stream import Documents, verify
from nanomed.store.tally import remarks
from nanomed.store.writing import build
from nanomed.text import template, tokenizer


def main() -> None:
    parser = command_line("python -m nanomed.store", __doc__)
    parser.add_argument("files", nargs="*", metavar="FILES", help="of documents")
    parser.add_argument("--tokenizer", help="file or folder; a model's folder has one")
    parser.add_argument("--out", type=Path, help="the store's folder")
    parser.add_argument(
        "--fields",
        nargs="+",
        default=[],
        metavar="KNOWN=THEIRS",
        help="names of fields in the files: text=body reads `body` as `text`",
    )
    parser.add_argument("--text_key", metavar="NAME", help="short for --fields text=NAME")
    parser.add_argument("--template", help="name or JSON file, for a tokenizer of no known model")
    parser.add_argument("--processes", type=int, default=n_cores(), help="default: one per core")
    parser.add_argument(
        "--verify", type=Path, metavar="STORE", help="read a whole store and compare its hashes"
    )
    arguments = parser.parse_args()
    try:
        if arguments.verify:
            _describe(verify(arguments.verify))
            print("every hash is that of what was written")
        elif arguments.files and arguments.tokenizer and arguments.out:
            _build(arguments)
        else:
            parser.error("give FILES, --tokenizer and --out, or --verify STORE")
    except (InputError, OSError) as error:  # a full disk, a process that died
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nended by Ctrl-C; the same command goes on where it was", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _build(arguments: argparse.Namespace) -> None:
    tok = tokenizer.load(arguments.tokenizer)
    named = arguments.template
    encoder = template.Encoder(template.load(named) if named else template.fitting(tok), tok)
    fields = arguments.fields + [f"text={name}" for name in [arguments.text_key] if name]
    n_processes = max(1, arguments.processes)
    _describe(build(arguments.out, arguments.files, encoder, fields, n_processes=n_processes))


def _describe(store: Documents) -> None:
    found, report = store.manifest, store.manifest["report"]
    dropped = ", ".join(f"{n:,} dropped ({cause})" for cause, n in report["dropped"].items())
    print(
        f"{store.folder}: {found['documents']:,} documents, {found['tokens']:,} tokens in "
        f"{len(found['shards']):,} shards, of {found['bytes'] / 1e6:,.1f} MB of text; "
        f"{dropped or 'none dropped'}"
    )
    for line in remarks(report):
        print(line)


if __name__ == "__main__":
    main()
