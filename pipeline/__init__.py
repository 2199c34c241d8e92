"""From a Hugging Face checkpoint to on-device files that are proven equal to it."""

import gc
import logging

# What a stage makes (graphs, configurations, tokenizers of a million entries) lives as long as it does. Looking for
# circles among it after every 700 objects, as Python has it, took a quarter of graph's time and half of a tokenizer's.
gc.set_threshold(50_000, 10, 10)
# torchao names each CUDA library that it can't load, and torch its own deprecations, on every import. Whoever runs a
# stage can't act on either, and both come before the stage says its first word.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
