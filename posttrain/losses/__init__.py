"""Losses, and weights of reinforcement learning, as functions of tensors: torch only, no trainer.

GRPO with `fast: off` lets TRL compute the policy's loss and takes the terms from here; with `fast: on` all of it.
Shapes: B sequences of T completion tokens; R completions of a step, in groups of G that follow one another; F rewards.
"""
