"""What is read and written, whole or not at all: ONNX and exported programs, plans, manifests."""
