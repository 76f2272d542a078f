"""Running models larger than memory: experts in mixed precision, brought when tokens ask for them (HOBBIT,
arXiv:2411.01433)."""
