"""The attention classes that are left as they are, by model type, with a part of the reason that must be given."""

REFUSED: dict[str, dict[str, str]] = {
    "pegasus_x": {
        "PegasusXGlobalLocalAttention": "a second softmax over scores, at transformers.models.pegasus_x.modelin",
    },
}
