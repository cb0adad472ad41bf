"""What leaves: exporters that read a routing file and the base weights. Imported as ``ir_convert.export``."""
