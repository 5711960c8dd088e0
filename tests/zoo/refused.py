"""The attention classes that are left as they are, by model type, with a part of the reason that must be given."""

REFUSED: dict[str, dict[str, str]] = {
    "reformer": {
        "LocalSelfAttention": "a softmax that is written out in parts (logsumexp of scores), at trans",
        "LSHSelfAttention": "a softmax that is written out in parts (logsumexp of scores), at trans",
    },
}
