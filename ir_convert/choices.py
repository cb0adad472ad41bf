"""What options choose from: apart, so that the command line need not load torch to say it."""

RECIPES = ("local", "paper", "greedy")
KV_CACHES = ("full", "strict")
