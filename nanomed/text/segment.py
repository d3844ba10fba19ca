"""What examples are made of. Apart from packing.py, because reading data does without torch."""

from typing import NamedTuple

import numpy as np

IGNORE = -100  # the label of a token that is not trained on


class Segment(NamedTuple):
    """One token sequence of an example, as data sets give them."""

    ids: np.ndarray  # [n] int64
    trained: np.ndarray  # [n] bool, which tokens are learned; the first has no predecessor
    last_label: int = IGNORE  # the token after the last one, if that one is learned here
