"""Connections in live modules: their source is edited, and saved."""
