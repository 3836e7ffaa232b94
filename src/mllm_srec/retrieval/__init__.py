"""Candidates from the whole catalogue: `Retriever`, and `choose` for what validation decides about it."""

from mllm_srec.retrieval.choosing import choose
from mllm_srec.retrieval.retriever import Mix, Retriever
from mllm_srec.retrieval.sequence import SequenceEncoder
from mllm_srec.retrieval.signals import CoOccurrence, Likeness, Trend

__all__ = ["CoOccurrence", "Likeness", "Mix", "Retriever", "SequenceEncoder", "Trend", "choose"]
