"""From a model or a file to a dataflow: capture, the readings of fx and ONNX graphs, shapes."""
