"""Evaluation of a model: retrieval of texts by images and of images by texts."""

from finelip_sdxl.evaluation.retrieval import (
    EncodedPairs,
    Recall,
    RetrievalResult,
    encode_pairs,
    evaluate_retrieval,
    retrieval_ranks,
)

__all__ = ["EncodedPairs", "Recall", "RetrievalResult", "encode_pairs", "evaluate_retrieval", "retrieval_ranks"]
