"""Exported programs as models: a program's graph is written as PyTorch source, which is built, trained and rewritten as any other."""
