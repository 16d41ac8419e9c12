"""The engines that people train with, each tried on a rewritten model with an operator of each class."""
