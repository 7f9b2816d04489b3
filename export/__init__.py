"""A Hugging Face checkpoint directory in, device bundles out."""
