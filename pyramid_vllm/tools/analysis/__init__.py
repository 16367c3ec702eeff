"""What a policy would cost, found out on a model of Hugging Face transformers."""
