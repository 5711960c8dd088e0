"""Every model type of the installed transformers, with the one architecture that stands for it."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.models.auto import modeling_auto

# In order of preference. A table that the installed version lacks is skipped.
_ORDER: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("vision_language", ("IMAGE_TEXT_TO_TEXT", "VISION_2_SEQ")),
    ("audio", ("MULTIMODAL_LM",)),
    ("seq2seq", ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")),
    ("audio", ("TEXT_TO_WAVEFORM",)),
    ("causal_lm", ("CAUSAL_LM",)),
    ("masked_lm", ("MASKED_LM",)),
    ("audio", ("TEXT_TO_SPECTROGRAM", "CTC", "RNNT", "TDT", "AUDIO_CLASSIFICATION")),
    ("audio", ("AUDIO_FRAME_CLASSIFICATION", "AUDIO_XVECTOR")),
    (
        "vision",
        (
            "OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION", "INSTANCE_SEGMENTATION", "IMAGE_SEGMENTATION", "MASK_GENERATION",
            "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION", "NORMAL_ESTIMATION", "POINTMAP_ESTIMATION", "POSE_ESTIMATION",
            "IMAGE_MATTING", "KEYPOINT_DETECTION", "KEYPOINT_MATCHING", "TEXT_RECOGNITION", "TABLE_RECOGNITION",
            "MASKED_IMAGE_MODELING", "CAUSAL_IMAGE_MODELING", "IMAGE_TO_IMAGE", "VIDEO_CLASSIFICATION",
            "IMAGE_CLASSIFICATION",
        ),
    ),
    ("vision_language", ("VISUAL_QUESTION_ANSWERING", "DOCUMENT_QUESTION_ANSWERING", "RETRIEVAL")),
    ("vision_language", ("ZERO_SHOT_OBJECT_DETECTION",)),
    ("classification", ("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "TABLE_QUESTION_ANSWERING")),
    ("classification", ("MULTIPLE_CHOICE", "NEXT_SENTENCE_PREDICTION", "DECISION")),
    ("other", ("TIME_SERIES_PREDICTION", "TIME_SERIES_CLASSIFICATION", "TIME_SERIES_REGRESSION")),
    ("vision_language", ("ZERO_SHOT_IMAGE_CLASSIFICATION",)),
    ("other", ("PRETRAINING",)),
    ("other", ("",)),  # bare models
    ("vision", ("BACKBONE", "IMAGE")),
    ("other", ("TEXT_ENCODING",)),
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One model type: the class to build and the kind of inputs it takes."""

    model_type: str
    architecture: str
    kind: str
    table: str


def _table(name: str) -> dict[str, str | tuple[str, ...]]:
    middle = f"_FOR_{name}" if name else ""
    return getattr(modeling_auto, f"MODEL{middle}_MAPPING_NAMES", {})


def _all_types() -> set[str]:
    tables = [n for n in dir(modeling_auto) if n.startswith("MODEL_") and n.endswith("_MAPPING_NAMES")]
    return {model_type for name in tables for model_type in getattr(modeling_auto, name)}


# Bare models whose inputs say that they are of another kind than "other".
_MARKS = (
    ("vision_language", ("MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",)),
    ("vision", ("MODEL_FOR_IMAGE_MAPPING_NAMES", "MODEL_FOR_BACKBONE_MAPPING_NAMES")),
)


# ... and where no table says it, words of the type's name.
_WORDS = (
    ("vision", ("vision", "_video", "vit_model", "hiera", "radio", "pixtral", "mgp-str", "seggpt", "uvdoc", "vqmodel")),
    ("audio", ("audio", "codec", "mimi", "_asr", "asr_", "voxtral", "lasr", "parakeet", "speech", "dac", "univnet", "clap")),
)


def _kind(model_type: str, kind: str) -> str:
    if kind != "other":
        return kind
    for better, names in _MARKS:
        if any(model_type in getattr(modeling_auto, name, {}) for name in names):
            return better
    for better, words in _WORDS:
        if any(word in model_type for word in words):
            return better
    return kind


def _entries() -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for kind, names in _ORDER:
        for name in names:
            for model_type, architecture in _table(name).items():
                if model_type not in found:
                    first = architecture if isinstance(architecture, str) else architecture[0]
                    found[model_type] = Entry(model_type, first, _kind(model_type, kind), name or "BARE")
    # a table that a later version adds still counts, after the known ones
    for model_type in _all_types() - set(found):
        for name in sorted(dir(modeling_auto)):
            if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES"):
                architecture = getattr(modeling_auto, name).get(model_type)
                if architecture is not None and model_type not in found:
                    first = architecture if isinstance(architecture, str) else architecture[0]
                    found[model_type] = Entry(model_type, first, "other", name)
    return dict(sorted(found.items()))


ENTRIES: dict[str, Entry] = _entries()
TYPES: list[str] = list(ENTRIES)
