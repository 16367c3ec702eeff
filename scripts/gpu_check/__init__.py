"""What ``scripts/gpu-check`` runs; see ``scripts/gpu-check --help``."""
