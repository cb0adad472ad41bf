"""Runs an exported model with ONNX Runtime: logits, generation, and the dial between quality and speed.

model = OnnxModel.load("ir-llama.onnx")
model.set_sparsity(0.3)
for token in model.generate(model.tokenizer("Once upon", return_tensors="np").input_ids, max_new_tokens=20):
    print(model.tokenizer.decode(token), end="")
"""

from .model import OnnxModel

__all__ = ["OnnxModel"]
