"""What options choose from: apart, so that the command line need not load torch to say it."""

RECIPES = ("local", "paper", "greedy")
KV_CACHES = ("full", "strict")
TARGETS = ("hf", "triton")  # what an output folder holds
INT4_METHODS = ("rtn", "rtn_asym", "hqq", "k_quant")
