"""Names that read well in Netron."""

import onnx_ir as ir


def tidy(graph: ir.Graph | ir.Function) -> None:
    """Drops what onnxscript's builder adds for its own use: the ``v_`` before value names, and scope metadata."""
    for node in ir.traversal.RecursiveGraphIterator(graph):
        for key in [key for key in node.metadata_props if key == "namespace" or key.startswith("pkg.onnxscript.")]:
            del node.metadata_props[key]
        for value in node.outputs:
            if value.name:
                value.name = value.name.removeprefix("v_")
