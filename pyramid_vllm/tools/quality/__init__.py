"""How much of a model's quality a KV policy keeps."""
