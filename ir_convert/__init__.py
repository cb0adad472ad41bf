"""Informed routing for pretrained language models: to ONNX Runtime and to Hugging Face checkpoints."""

__version__ = "0.3.0"
