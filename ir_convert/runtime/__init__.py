"""Runs an exported model with ONNX Runtime: logits, generation, and the dial between quality and speed.

model = OnnxModel.load("ir-llama.onnx")
model.set_sparsity(0.3)
prompt = model.tokenizer("Once upon", return_tensors="np").input_ids
print(model.tokenizer.decode([int(token[0]) for token in model.generate(prompt, max_new_tokens=20)]))
"""

from .model import OnnxModel

__all__ = ["OnnxModel"]
