"""From a Hugging Face checkpoint to on-device files that are proven equal to it."""

import logging

# torchao names each CUDA library that it can't load, and torch its own deprecations, on every import. Whoever runs a
# stage can't act on either, and both come before the stage says its first word.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
