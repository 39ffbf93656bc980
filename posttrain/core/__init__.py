"""Artifacts, stage keys, run directories, planning, launching, events, reports. Imports no torch (the worker excepted)."""
