"""Where connections are put in: modules, fx graphs, ONNX graphs."""
