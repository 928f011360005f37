"""A candidate as something that runs without Bitfront: an ONNX file, or a torch module with 8-bit kernels.

``transforms`` simulates number formats in floating point; the results of this folder compute in them. The rest of
Bitfront uses three functions and an error:

- ``export.onnx.onnx_model(graph, formats)``: an ONNX model;
- ``export.written.write_onnx(graph, formats, path, x)``: the same as a file that was read back and compared;
- ``export.integer.integer_model(graph, formats)``: an ``nn.Module`` of oneDNN's byte kernels;
- ``errors.ExportError``: the model or a format cannot be exported; the message names the node.

``export.packing`` has the form of a format in bytes, which both use. This folder imports ``graph`` and ``transforms``,
but neither spaces nor searches.
"""
