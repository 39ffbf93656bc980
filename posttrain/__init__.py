"""posttrain: select data, fine-tune, align, reinforce, quantize and serve language models from one YAML file.

Importing this package imports nothing heavy; the version is its only public name.
"""

__version__ = "0.1.0"
