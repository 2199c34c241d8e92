"""From a Hugging Face checkpoint to on-device files that are proven equal to it."""
