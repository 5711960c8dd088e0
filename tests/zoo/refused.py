"""The attention classes that are left as they are, by model type, with a part of the reason that must be given."""

REFUSED: dict[str, dict[str, str]] = {
    "grounding-dino": {
        "GroundingDinoBiMultiHeadAttention": "a second softmax over scores, at transformers.models.grounding_dino.mo",
    },
    "lilt": {
        "LiltSelfAttention": "a second softmax over scores, at transformers.models.lilt.modeling_lil",
    },
    "mm-grounding-dino": {
        "MMGroundingDinoBiMultiHeadAttention": "a second softmax over scores, at transformers.models.mm_grounding_dino",
    },
    "pegasus_x": {
        "PegasusXGlobalLocalAttention": "a second softmax over scores, at transformers.models.pegasus_x.modelin",
    },
}
