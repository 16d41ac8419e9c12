"""What the engines that people train with need of a rewritten model."""
