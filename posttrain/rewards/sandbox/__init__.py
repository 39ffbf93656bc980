"""Evaluation that may hang, crash, or be hostile: warm workers that run every task in a jail and can always be rid of it.

`pool` is the side of this process; `worker` and everything it imports run apart, on the standard library alone.
"""
