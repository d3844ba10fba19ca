"""How nanomed's step grows: with documents' length, the row's, and the number of processes."""

import torch

from bench.measure import interleaved, ratio, shown, table
from bench.ours import Examples, Ours, settings
from nanomed.config import CPT
