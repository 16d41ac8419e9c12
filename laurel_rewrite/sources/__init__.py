"""MODEL and its inputs: what the word on the command line stands for."""
