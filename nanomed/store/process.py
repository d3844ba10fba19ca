"""A tokenising process: pool.py starts it and gives it one end of a pipe.

python -m nanomed.store.process FILE_DESCRIPTOR
"""

import signal
import sys
from multiprocessing.connection import Connection

from nanomed.store.texts import encode
from nanomed.text import tokenizer
from nanomed.text.template import Encoder


def main() -> None:
    """The settings come first, then batches; what is sent back is the result or the error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and that ends this
    pipe = Connection(int(sys.argv[1]))
    try:
        path, template = pipe.recv()
        encoder = Encoder(template, tokenizer.load(path))
        while True:
            batch = pipe.recv()
            try:
                answer = encode(batch, encoder)
            except Exception as error:
                answer = error
            pipe.send(answer)
    except (EOFError, ConnectionError):  # the parent is done, or gone
        return


if __name__ == "__main__":
    main()
