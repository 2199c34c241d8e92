"""What comes in: a Hugging Face checkpoint, its headers, its weights by rows, whether it can be converted."""
