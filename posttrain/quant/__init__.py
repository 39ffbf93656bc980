"""Weight quantization: one file a method, one exporter, one check that reads the export back."""
