"""What options choose from: apart, so that the command line need not load torch to say it."""

RECIPES = ("local", "paper", "greedy")
KV_CACHES = ("full", "strict")
TARGETS = ("hf", "triton")  # what an output folder holds
LOGITS = ("all", "last")  # of which tokens an ONNX file gives them
INT4_METHODS = ("rtn", "rtn_asym", "hqq", "k_quant")
