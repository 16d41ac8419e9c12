"""Connections in ONNX graphs."""
