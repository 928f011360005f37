"""A candidate as something that runs without Bitfront: an ONNX file, or a torch module with 8-bit kernels.

``transforms`` simulates number formats in floating point; what is made here computes in them. The rest of Bitfront
knows two functions and an error:

- ``export.onnx.onnx_model(graph, formats)``: an ONNX model;
- ``export.integer.integer_model(graph, formats)``: an ``nn.Module`` of oneDNN's byte kernels;
- ``errors.ExportError``: this model, or these formats, cannot be written so; it names the node.

``export.packing`` says how a format is held in bytes, which both need. The room lies above ``graph`` and
``transforms`` and knows neither spaces nor searches.
"""
