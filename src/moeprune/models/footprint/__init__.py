"""How large models are: measured on files, and predicted without weights."""
