"""The model that files are held against: Hugging Face's own, in fp32, whole in memory or streamed from its file."""
