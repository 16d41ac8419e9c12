"""Experiments whose results are committed, each made again by one command."""
