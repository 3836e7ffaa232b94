"""MLLM-SRec: next-item recommendation with a multimodal large language model."""
