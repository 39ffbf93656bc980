"""Metrics with intervals, on live models."""

from posttrain.eval.run import EvalSetData, Results, around, evaluate, load_eval_sets, validation_sets

__all__ = ["EvalSetData", "Results", "around", "evaluate", "load_eval_sets", "validation_sets"]
