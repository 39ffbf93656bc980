"""Losses and weights of reinforcement learning, as functions of tensors: torch only, no trainer.

`fast: off` lets TRL compute the policy's loss and takes the terms from here; `fast: on` takes all of it from here.
Shapes: B sequences of T completion tokens; R completions of a step, in groups of G that follow one another; F rewards.
"""
