"""Strict configuration: models, YAML loading, overrides, redaction."""
