"""Progressive-mask, offline-GRPO distillation of vision-language models (METHOD: arXiv 2512.22238)."""
