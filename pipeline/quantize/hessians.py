"""What stage `moments` keeps: the text it read, and the Hessians H = Σ x xᵀ of what layers read, a file per input.

Wide layers are treated in spans of columns, each with a matrix of its own, so that the work on the widest one is
bounded: a matrix 16,384 wide would need 2 GB for its Hessian alone.
"""

INDEX = "index.json"
"""In the folder of stage `moments`: name of a weight → file, float32 [spans, span, span]."""
WINDOWS, STATES = "windows.npy", "states.npy"
"""The text that was read, tokens int32 [N, L], and the model's final hidden states of it, float32 [N, L, H]."""
SPAN = 2048


def span(columns: int) -> int:
    """How many columns are treated together: all, or the largest equal part of them that is at most `SPAN`."""
    parts = -(-columns // SPAN)
    # Equal parts, so that one array holds them all.
    while columns % parts:
        parts += 1
    return columns // parts
