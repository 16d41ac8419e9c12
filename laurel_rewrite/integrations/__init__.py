"""What engines that people train with need beside the model itself; a file an engine, none of which is imported by anything else."""
