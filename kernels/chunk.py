"""How many tokens' logits linear_nll holds at once, in a file that needs no Triton: who predicts a
run's memory asks, too. D model width, V vocabulary, C tokens of a chunk."""


def chunk_tokens(n_tokens: int, d_model: int) -> int:
    """C, the tokens whose logits exist at once.

    Small chunks cost time: each adds its part to the head's float32 gradient, reading and writing
    8 V D bytes beside matmuls of 6 C V D operations. An H100 moves 3.35e12 bytes and computes
    about 7e14 operations in a second, so this takes 280 / C of the matmuls' time: 27% at 1,024
    tokens, 7% at 4,096, 3% at 8,192 (computed). Large chunks cost memory: 2 C V bytes
    of logits in bfloat16, beside the 4 V D of that gradient; C = 2 D takes as much again. Both
    costs grow with V alike, so the best C depends on D alone: most_tokens(D).
    """
    return even(n_tokens, most_tokens(d_model))


def most_tokens(d_model: int) -> int:
    """2 D, but between 4,096 and 8,192."""
    return min(max(2 * d_model, 4096), 8192)


def even(n_tokens: int, most: int) -> int:
    """C for tokens shared out evenly over as few chunks as `most` allows. The last chunk is the one
    whose logits backward finds; it must not be a small rest."""
    n_chunks = max(1, -(-n_tokens // most))
    return max(1, -(-n_tokens // n_chunks))
